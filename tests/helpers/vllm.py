"""vLLM engines of the tests: small, with one thread, and all gone afterwards."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from types import SimpleNamespace

import psutil
import pytest

from entrodrop_prep.backends import engines as starting
from helpers.warm import Warm, running

QUICK = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "passive",
}
WORKER = "entrodrop_prep.vllm_plugin.worker"
MODULES = (
    *("vllm.entrypoints.llm", "vllm.entrypoints.openai.api_server", "vllm.v1.worker.cpu_worker"),
    *("compressed_tensors.compressors", "vllm.model_executor.models.llama", "vllm.v1.worker.cpu_model_runner"),
)
VLLM = Warm(*MODULES, nested=True, **QUICK)
"""A start of vLLM is 8 of the 10 seconds of the processor that an engine takes to be ready."""


@contextmanager
def quick_engines() -> Iterator[None]:
    """The environment that engines of tests are started in, and a warm start for those of this process."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in QUICK.items():
            patch.setenv(name, value)
        patch.setattr(starting, "subprocess", SimpleNamespace(**{**vars(subprocess), "Popen": VLLM.popen}))
        yield


def descendants(pid: int | None = None) -> list[psutil.Process]:
    """All processes below one, this one by default."""
    return psutil.Process(pid).children(recursive=True)


def engines(pid: int | None = None) -> list[psutil.Process]:
    """The engines' own processes below one, this one by default, in the order they were started."""
    warm = set() if pid else running(WORKER)
    found = []
    for number in warm | {process.pid for process in descendants(pid)}:
        with suppress(psutil.NoSuchProcess):
            process = psutil.Process(number)
            if number in warm or WORKER in process.cmdline():
                found.append(process)
    return sorted(found, key=lambda process: process.pid)


def alive(processes: Iterable[psutil.Process]) -> list[psutil.Process]:
    """Those that still run; one that nobody has waited for runs no more."""
    return [p for p in processes if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]


def all_gone(processes: Iterable[psutil.Process], seconds: float = 10) -> bool:
    """Whether all of them end within some seconds."""
    some = list(processes)
    return until(lambda: not alive(some), seconds)


def until(condition: Callable[[], bool], seconds: float = 120) -> bool:
    """Wait for something; whether it came true."""
    deadline = time.monotonic() + seconds
    while not (met := condition()) and time.monotonic() < deadline:
        time.sleep(0.005)
    return met


def environment() -> dict[str, str]:
    """The environment of this process, with ``QUICK``: for commands of their own."""
    return {**os.environ, **QUICK}
