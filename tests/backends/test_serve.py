"""The end of ``entrodrop serve``: a server that hangs, and what it started, are gone."""

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
from helpers.servers import free_port
from helpers.vllm import until

STUBBORN = """
import signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
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
    note = tmp_path / "pid"
    server = subprocess.Popen([sys.executable, "-Sc", STUBBORN, note], start_new_session=True)
    said: list[str] = []

    def ask() -> None:
        until(lambda: note.exists() and note.read_text() != "" and bool(said) == ready)
        os.kill(os.getpid(), number)

    asking = threading.Thread(target=ask)
    asking.start()
    serve._stay(server, ServeConfig(model="m", port=free_port()), said.append)
    asking.join()
    assert server.returncode == -signal.SIGKILL
    assert until(lambda: not psutil.pid_exists(int(note.read_text())), 5)
    assert any(line.startswith("ready: ") for line in said) == ready
