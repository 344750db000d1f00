"""Ctrl-C while the command's modules are still loading ends as it does later: one line, exit code 130."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType

INTERRUPTED = "interrupted: finished files are kept; run the same command again to resume"


def _stop(number: int, frame: FrameType | None) -> None:
    os.write(2, f"{INTERRUPTED}\n".encode())
    os._exit(130)


def loading() -> None:
    """From now on Ctrl-C ends the process: nothing was begun. What the user set, such as ``nohup``, stays."""
    here = threading.current_thread() is threading.main_thread()
    if here and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _stop)


def loaded() -> None:
    """From now on Ctrl-C is KeyboardInterrupt again, so that a run can tidy up."""
    if signal.getsignal(signal.SIGINT) is _stop:
        signal.signal(signal.SIGINT, signal.default_int_handler)


loading()
