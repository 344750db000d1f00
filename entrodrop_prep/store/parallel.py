"""Several threads over one sequence of work; NumPy, Arrow and hashes leave Python's lock to the others meanwhile."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


def cores() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def in_order(work: Callable[[T], R], items: Iterable[T], jobs: int | None = None) -> Iterator[R]:
    """``work`` of each item, in their order, by ``jobs`` threads, by default one a processor.

    At most one result a thread waits to be taken. Where one fails, or the caller stops, nothing new is begun.
    """
    jobs = jobs or cores()
    if jobs == 1:
        yield from map(work, items)
        return
    waiting: deque[Future[R]] = deque()
    pool = ThreadPoolExecutor(jobs)
    try:
        for item in items:
            waiting.append(pool.submit(work, item))
            if len(waiting) > jobs:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


class Stopped(Exception):
    """Work that others gave up."""


def unless(stopped: threading.Event, items: Iterable[T]) -> Iterator[T]:
    """The items, until it is ``stopped``. Raises Stopped."""
    for item in items:
        if stopped.is_set():
            raise Stopped
        yield item
