"""The end of ``entrodrop serve``: a server that hangs, what it started, and what they would leave are gone."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import psutil
import pytest

from entrodrop_prep.backends import serve
from entrodrop_prep.config import ServeConfig
from entrodrop_prep.vllm_plugin import leftovers
from helpers.servers import free_port
from helpers.vllm import until

STUBBORN = """
import mmap, signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
with open(sys.argv[2], "w+b") as file:
    file.truncate(100)
    shared = mmap.mmap(file.fileno(), 100)
child = subprocess.Popen([sys.executable, "-Sc", "import time; time.sleep(600)"])
open(sys.argv[1], "w").write(str(child.pid))
time.sleep(600)
"""


@pytest.mark.parametrize("ready", [False, True])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_server_that_does_not_stop_is_killed_with_its_engine(
    ready: bool, number: signal.Signals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At once while it starts; with some time where it serves."""
    monkeypatch.setattr(serve, "STOP_SECONDS", 0.5)
    monkeypatch.setattr(serve, "_is_healthy", lambda url: ready)
    note, folder = tmp_path / "pid", tmp_path / "temporary"
    folder.mkdir()
    (folder / f"vllm_dist_{os.getpid()}").touch()
    shared, of_ranks, *of_others = (
        leftovers.SHARED / name.format(os.getpid())
        for name in ("psm_{}", "vllm_dist_{}-tp:0-[0-1]-cpushm_0", "psm_other_{}", "vllm_dist_other_{}-tp:0")
    )
    for path in (of_ranks, *of_others):
        path.touch()
    server = subprocess.Popen([sys.executable, "-Sc", STUBBORN, note, shared], start_new_session=True)
    said: list[str] = []

    def ask() -> None:
        until(lambda: note.exists() and note.read_text() != "" and bool(said) == ready)
        os.kill(os.getpid(), number)

    asking = threading.Thread(target=ask)
    asking.start()
    serve._stay(server, ServeConfig(model="m", port=free_port()), said.append, folder)
    asking.join()
    assert server.returncode == -signal.SIGKILL
    assert until(lambda: not psutil.pid_exists(int(note.read_text())), 5)
    assert any(line.startswith("ready: ") for line in said) == ready
    assert not any(path.exists() for path in (folder, shared, of_ranks))
    for path in of_others:  # which no process of the server's has, and no file of its own names
        path.unlink()
