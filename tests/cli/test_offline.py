"""Nodes without a network: the commands run in a network namespace of their own that has nothing but a loopback.

The kernel counts there what any process of a run tries to send elsewhere, so a run must not even try. Where the system
keeps namespaces to itself, every Python process of a run notes and refuses such tries instead.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from helpers.models import Markov, random_rows, rows_of, words, write_rows
from helpers.pages import ROOT, console_lines
from helpers.servers import ENVIRONMENT
from programs import without_network

pytestmark = pytest.mark.network

PROGRAM = Path(without_network.__file__)
HUB_ID = "org/base-model"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
NAMESPACE = ("unshare", "--net") if os.geteuid() == 0 else ("unshare", "--net", "--user", "--map-root-user")
HAS_NAMESPACES = subprocess.run([*NAMESPACE, "true"], stderr=subprocess.DEVNULL, check=False).returncode == 0
REFUSING = """
import os, sys

def refuse(event, arguments):
    if event == "socket.getaddrinfo":
        host = arguments[0]
    elif event == "socket.connect" and isinstance(arguments[1], tuple):
        host = arguments[1][0]
    else:
        return
    if host not in (None, "", "localhost", "::1", "0.0.0.0", "::") and not str(host).startswith("127."):
        with open(os.environ["ATTEMPTS"], "a") as f:
            f.write("Ip6OutNoRoutes 1\\n")
        raise OSError("no way out of this machine")

sys.addaudithook(refuse)
"""


@dataclass(frozen=True)
class Done:
    """How a run ended, and how often it tried to reach something beyond this machine, or to ask for a name."""

    code: int
    text: str
    attempts: int


@pytest.fixture(scope="module")
def node(closed_form: Markov, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with documents, a model, and the same model in a Hub cache as ``hf download`` leaves it."""
    folder = tmp_path_factory.mktemp("node")
    write_rows(folder / "corpus.jsonl", [{"text": words(ids)} for ids in random_rows(30, 128)])
    shutil.copytree(closed_form.directory, folder / "models" / "base-model")
    cached = folder / "hf" / "hub" / f"models--{HUB_ID.replace('/', '--')}"
    shutil.copytree(closed_form.directory, cached / "snapshots" / COMMIT)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(COMMIT, encoding="utf-8")
    return folder


def score(model: str, backend: str, out: str) -> list[str]:
    given = ["corpus.jsonl", "--model", model, "--backend", backend, "--dtype", "float32", "--out", out]
    return ["-m", "entrodrop_prep", "score", *given]


OFFLINE = {"HF_HUB_OFFLINE": "1"}
SCORES = {"from the cache": score(HUB_ID, "transformers", "b"), "with vllm": score(HUB_ID, "vllm", "c")}
WORDS = {"score": ["--backend", "transformers"]}
"""What a documented command is given beside; it takes vLLM here, which takes long to start."""
DOCUMENTED = {
    line.words[1]: (["-m", "entrodrop_prep", *line.words[1:], *WORDS.get(line.words[1], ())], line.environment)
    for line in console_lines(ROOT / "docs" / "clusters.md")
    if "HF_HUB_OFFLINE" in line.environment or line.words[1] in ("materialize", "verify")
    if "--dry-run" not in line.words
}
ASKING = [f"socket.{ask}" for ask in ("create_connection(('192.0.2.1', 80))", "getaddrinfo('huggingface.co', 443)")]


@pytest.fixture(scope="module")
def runs(node: Path) -> dict[str, Done]:
    """What became of each command, all in one network namespace."""
    plan = [(name, command, OFFLINE) for name, command in SCORES.items()]
    plan += [(name, *line) for name, line in DOCUMENTED.items()]
    plan += [("no model", score("org/another-model", "transformers", "nowhere"), OFFLINE)]
    plan += [(ask, ["-c", f"import socket; {ask}"], {}) for ask in ASKING]
    (node / "plan.json").write_text(json.dumps(plan))
    environment = {k: v for k, v in (os.environ | ENVIRONMENT).items() if not k.startswith(("HF_HUB_", "PYTEST_"))}
    environment |= {"HF_HOME": str(node / "hf"), "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    if not HAS_NAMESPACES:
        (node / "site").mkdir()
        (node / "site" / "sitecustomize.py").write_text(REFUSING, encoding="utf-8")
        (node / "attempts").touch()
        environment |= {
            "PYTHONPATH": f"{node / 'site'}:{environment['PYTHONPATH']}",
            "ATTEMPTS": str(node / "attempts"),
        }
    process = subprocess.Popen(
        [*(NAMESPACE if HAS_NAMESPACES else ()), sys.executable, PROGRAM, "plan.json", "out.json"],
        cwd=node,
        env=environment,
        start_new_session=True,
    )
    try:
        assert process.wait(timeout=500) == 0
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    return {name: Done(*done) for name, done in json.loads((node / "out.json").read_text()).items()}


@pytest.mark.parametrize("name", SCORES)
def test_score_needs_no_network(runs: dict[str, Done], node: Path, name: str) -> None:
    assert runs[name].code == 0, runs[name].text
    assert len(rows_of(node / SCORES[name][-1])) == 30
    assert runs[name].attempts == 0


def test_what_the_docs_say_for_such_a_node_needs_no_network(runs: dict[str, Done]) -> None:
    """What follows the scoring asks nobody, without being told not to."""
    assert list(DOCUMENTED) == ["score", "materialize", "verify"]
    for name in DOCUMENTED:
        assert runs[name].code == 0, runs[name].text
        assert runs[name].attempts == 0, name
    assert runs["verify"].text.splitlines()[-1].startswith("OK: verified ")


def test_a_model_that_is_not_there_is_said_in_one_line(runs: dict[str, Done]) -> None:
    done = runs["no model"]
    assert done.code == 2
    assert "error: org/another-model: cannot load the model: " in done.text
    assert "Traceback" not in done.text
    assert done.attempts == 0


def test_attempts_are_counted(runs: dict[str, Done]) -> None:
    for ask in ASKING:
        assert runs[ask].code == 1
        assert runs[ask].attempts > 0, ask
