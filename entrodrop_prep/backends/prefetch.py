"""Work for a backend, read ahead by a thread of its own, so that the backend never waits for reading."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import numpy as np


class ShardTokens(Protocol):
    """The sequences of one shard.

    ``index`` is unique among them; each of ``sequences`` is ``input_ids [T] int32``, 2 <= T <= the longest row of the
    run. There may be none.
    """

    @property
    def index(self) -> int: ...

    @property
    def sequences(self) -> Sequence[np.ndarray[Any, Any]]: ...


class PrefetchQueue:
    """Jobs from an iterator that a thread runs at most ``ahead`` jobs ahead of the backend.

    An exception of the iterator ends the feed after the jobs before it, and is in ``error``: the backend finishes
    what it has, and who started the feed raises it.
    """

    def __init__(self, jobs: Iterable[Any], ahead: int = 2) -> None:
        self.error: BaseException | None = None
        self.ended = False
        self._ready: queue.Queue[Any] = queue.Queue(ahead)
        self._held: Any = None
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(iter(jobs),), name="reading", daemon=True)
        self._thread.start()

    def any(self) -> bool:
        """Wait until there is a job, which stays the next one; false if there is none at all."""
        self._held = self._held or self.take()
        return self._held is not None

    def take(self, wait: bool = True) -> Any:
        """The next job; None at the end (``ended`` is then true) or, without ``wait``, if none is ready yet."""
        if self._held is not None:
            job, self._held = self._held, None
            return job
        if self.ended:
            return None
        try:
            job = self._ready.get(block=wait)
        except queue.Empty:
            return None
        self.ended = job is None
        return job

    def close(self) -> None:
        """Stop reading."""
        self._stopped.set()
        self.ended = True
        self._thread.join()

    def _run(self, jobs: Iterator[Any]) -> None:
        try:
            for job in jobs:
                if not self._offer(job):
                    return
        except BaseException as e:  # noqa: BLE001 - it is raised again by who started the feed
            self.error = e
        self._offer(None)

    def _offer(self, job: Any) -> bool:
        while not self._stopped.is_set():
            try:
                self._ready.put(job, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False


class _Probe:
    """A job that belongs to no shard."""

    index = -1

    def __init__(self, sequences: Sequence[np.ndarray[Any, Any]]) -> None:
        self.sequences = sequences


class _One(PrefetchQueue):
    """A feed of one job that is there already."""

    def __init__(self, job: Any) -> None:
        self.error, self.ended, self._job = None, False, job

    def take(self, wait: bool = True) -> Any:
        job, self._job, self.ended = self._job, None, self._job is None
        return job

    def close(self) -> None:
        self.ended = True


def score_all(
    backend: Any, sequences: Sequence[np.ndarray[Any, Any]], done: Callable[[Any, int], None] = lambda job, tokens: None
) -> list[Any]:
    """The scores of some sequences, each ``input_ids [T] int32``, from ``Backend.score``, in order."""
    for _, scores in backend.score(_One(_Probe(sequences)), done):
        return list(scores)
    return []
