"""Writing shards in the background."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any

BEHIND = 2


class Writer:
    """Runs calls one after the other in a thread, at most ``BEHIND`` waiting; an exception stops the next caller.

    Leaving the ``with`` block waits for all of them, also when the block failed: what was scored is kept.
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "writing")
        self._calls: deque[Future[None]] = deque()

    def submit(self, function: Callable[..., None], *arguments: Any) -> None:
        """Run ``function(*arguments)`` soon. Raises what an earlier call raised."""
        self._calls.append(self._thread.submit(function, *arguments))
        while len(self._calls) > BEHIND:
            self._calls.popleft().result()

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._thread.shutdown(wait=True)
        for call in self._calls:
            if kind is None:
                call.result()
