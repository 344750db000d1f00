"""Ctrl-C while the command is still loading its modules."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import entrodrop_prep
from entrodrop_prep.terminal import interrupt

LINE = "interrupted: finished files are kept; run the same command again to resume\n"


@pytest.mark.parametrize("start", ["from entrodrop_prep.cli import main; main()", "-m"])
def test_ctrl_c_while_modules_load(start: str, tmp_path: Path) -> None:
    """A module in the place of one that is slow to load."""
    (tmp_path / "typer.py").write_text("import sys, time\nprint('loading', flush=True)\ntime.sleep(60)\n")
    path = os.pathsep.join([str(tmp_path), str(Path(entrodrop_prep.__file__).parent.parent)])
    command = [sys.executable, *(["-m", "entrodrop_prep"] if start == "-m" else ["-c", start]), "--version"]
    process = subprocess.Popen(
        command, env={**os.environ, "PYTHONPATH": path}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "loading\n"
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert (process.returncode, err) == (130, LINE)


def test_importing_the_command_leaves_the_handler_alone() -> None:
    import entrodrop_prep.cli

    assert entrodrop_prep.cli.run is not None
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_command_that_is_to_ignore_ctrl_c_does() -> None:
    """As after ``nohup``, or in the background of a script."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        interrupt.loading()
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
        interrupt.loaded()
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
