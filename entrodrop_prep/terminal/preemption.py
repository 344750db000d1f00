"""What a scheduler says before it takes a machine away: SIGTERM or SIGUSR1, and the end of the run that follows."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import FrameType, TracebackType
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
EXIT_CODE = 75
"""EX_TEMPFAIL: run the same command again."""
GRACE = 30.0
"""Seconds in which work that was begun may be finished."""


class Preempted(SystemExit):
    """The run was asked to end, and gave back what it had not finished."""

    def __init__(self, name: str) -> None:
        super().__init__(EXIT_CODE)
        self.name = name

    def __str__(self) -> str:
        return f"stopped by {self.name}: finished files are kept, the rest is given back; run the same command again"


class Preemption:
    """A block in which SIGTERM and SIGUSR1 raise Preempted, as does whatever fails after one of them.

    Outside the main thread no signal is handled.
    """

    def __init__(self) -> None:
        self.ended = threading.Event()
        """Set where also what was begun is to end."""
        self._signal = ""
        self._stopped: threading.Event | None = None
        self._timer: threading.Timer | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Preemption:
        global _current
        if threading.current_thread() is threading.main_thread():
            _current = self
            self._before = {number: signal.signal(number, self._handle) for number in SIGNALS}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        global _current
        if self._timer:
            self._timer.cancel()
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if self._before:
            _current = None
        if self._signal and isinstance(error, Exception):  # of an engine that got the signal too, say
            raise Preempted(self._signal) from error

    @contextmanager
    def finishing(self, stopped: threading.Event) -> Iterator[None]:
        """In the block a first signal only sets ``stopped``; a second one, or ``GRACE`` seconds, end the block.

        Raises Preempted, at the end of the block at the latest.
        """
        self._stopped = stopped
        try:
            yield
        finally:
            self._stopped = None
        if self._signal:
            raise Preempted(self._signal)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        first, self._signal = not self._signal, signal.Signals(number).name
        if first and self._stopped:
            self._stopped.set()
            self._timer = threading.Timer(GRACE, os.kill, (os.getpid(), number))
            self._timer.daemon = True
            self._timer.start()
            return
        self.ended.set()
        for each in SIGNALS:  # what is tidied up now is not to be interrupted
            signal.signal(each, signal.SIG_IGN)
        raise Preempted(self._signal)


_current: Preemption | None = None


def preemptible() -> AbstractContextManager[Preemption]:
    """The block that this is part of, if there is one, or a new one."""
    return nullcontext(_current) if _current else Preemption()
