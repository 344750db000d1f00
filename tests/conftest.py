"""What costs seconds to start is started once."""

from __future__ import annotations

import gc
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from helpers.hub import Hub
from helpers.mixtures import SOURCES
from helpers.models import Markov, markov_model, save_model, tiny_llama
from helpers.scored import write_scored
from helpers.servers import VllmServer
from helpers.vllm import quick_engines

# Else each of a thousand processes would compile the package again.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False
# In the background of a script Ctrl-C is ignored, also by what is started there; tests send it.
signal.signal(signal.SIGINT, signal.default_int_handler)

SLOW = ("vllm", "training", "network")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes minutes comes first, so that no worker is left with a long file at the end."""
    slow = {item.path for item in items if any(item.get_closest_marker(name) for name in SLOW)}
    items.sort(key=lambda item: item.path not in slow)


def pytest_collection_finish() -> None:
    """What is imported by now stays: collections, of which trainers ask for one a run, need not look at it."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish() -> None:
    """What libraries look for at the end may be collected again."""
    gc.unfreeze()


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of 61 tokens and its tokenizer; context of 128 tokens. Never written to by a test."""
    return save_model(tmp_path_factory.mktemp("models") / "tiny", tiny_llama(61))


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Scored directories of ``helpers.mixtures.SOURCES``. Never written to by a test."""
    folder = tmp_path_factory.mktemp("made")
    for name, rows in SOURCES.items():
        write_scored(folder / name, rows)
    return folder


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    """An empty Hub."""
    with Hub(tmp_path / "hub") as server:
        yield server


@pytest.fixture(scope="module")
def quick() -> Iterator[None]:
    """Engines of vLLM start quickly."""
    with quick_engines():
        yield


@pytest.fixture(scope="session")
def closed_form(tmp_path_factory: pytest.TempPathFactory) -> Markov:
    """A model whose scores are known, of a shape that vLLM's CPU attention takes; context of 256 tokens."""
    return markov_model(tmp_path_factory.mktemp("closed-form") / "markov", vocabulary=128, context=256)


@pytest.fixture(scope="session")
def vllm_server(closed_form: Markov, tmp_path_factory: pytest.TempPathFactory) -> Iterator[VllmServer]:
    """A server with the plugin that serves the closed-form model. Tests leave it running."""
    server = VllmServer(closed_form.directory, tmp_path_factory.mktemp("server"))
    try:
        yield server.wait()
    finally:
        server.kill()
