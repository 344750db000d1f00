"""A time limit for Python code that somebody else wrote, such as the loops of a chat template."""

from __future__ import annotations

import ctypes
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")

LOOK_EVERY = 0.1
BUSY_SHARE = 0.1
"""Of the limit, in processor time: code that had less was kept from running (a process that was stopped, say)."""


def within(seconds: float, call: Callable[[], T]) -> T:
    """What ``call`` returns. Raises TimeoutError where it takes longer.

    It is interrupted between two steps of Python; a single one that takes long, in C, is waited for.
    """
    try:
        _WATCH.begin(seconds)
        try:
            return call()
        finally:
            _WATCH.end()
    except _TooLong:
        _WATCH.end()
        raise TimeoutError(f"it took longer than {seconds:g} s") from None


class _TooLong(BaseException):
    """Raised in the thread that takes too long. No Exception: templates' helpers swallow those."""


@dataclass
class _Call:
    """When it must be over, its clock of processor time, if there is one, and when it has had enough of that."""

    until: float
    clock: int | None
    busy_until: float

    @property
    def is_late(self) -> bool:
        late = time.monotonic() > self.until
        return late and (self.clock is None or time.clock_gettime(self.clock) > self.busy_until)


class _Watch:
    """A thread that looks at the calls under way."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._calls: dict[int, _Call] = {}
        self._told: set[int] = set()
        self._process: int | None = None

    def begin(self, seconds: float) -> None:
        me, clock = threading.get_ident(), None
        if hasattr(time, "pthread_getcpuclockid"):
            clock = time.pthread_getcpuclockid(me)
        busy = 0.0 if clock is None else time.clock_gettime(clock) + BUSY_SHARE * seconds
        with self._lock:
            if self._process != os.getpid():  # a fork has no thread of its parent's
                self._process = os.getpid()
                threading.Thread(target=self._look, name="time limit", daemon=True).start()
            self._calls[me] = _Call(time.monotonic() + seconds, clock, busy)

    def end(self) -> None:
        """Of this thread's call. Nothing is raised in it afterwards."""
        me = threading.get_ident()
        with self._lock:
            self._calls.pop(me, None)
            if me in self._told:
                self._told.discard(me)
                _raise_in(me, None)

    def _look(self) -> None:
        while True:
            time.sleep(LOOK_EVERY)
            with self._lock:
                for thread, call in self._calls.items():
                    if call.is_late:
                        call.until = time.monotonic() + 1.0  # again, should it not be heard
                        self._told.add(thread)
                        _raise_in(thread, _TooLong)


def _raise_in(thread: int, error: type[BaseException] | None) -> None:
    """Have CPython raise ``error`` in a thread, or forget one that it has not raised yet."""
    exception = ctypes.py_object(error) if error is not None else None
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), exception)


_WATCH = _Watch()
