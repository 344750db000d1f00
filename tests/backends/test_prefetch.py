"""Reading ahead of who scores."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest

from entrodrop_prep.backends.prefetch import PrefetchQueue, score_all


@dataclass
class Numbers:
    """A source of numbers from 1, those given in ``made``; it waits for ``gate`` before each, ``error`` is its end."""

    count: int
    error: BaseException | None = None
    gate: threading.Semaphore | None = None
    made: list[int] = field(default_factory=list)

    def __iter__(self) -> Iterator[int]:
        for number in range(1, self.count + 1):
            if self.gate is not None:
                self.gate.acquire()
            self.made.append(number)
            yield number
        if self.error is not None:
            raise self.error


def rest(feed: PrefetchQueue) -> list[Any]:
    found = []
    while (job := feed.take()) is not None:
        found.append(job)
    return found


def test_jobs_come_in_order_and_end() -> None:
    feed = PrefetchQueue(Numbers(50))
    assert rest(feed) == list(range(1, 51))
    assert feed.ended
    assert feed.take() is None
    assert feed.take(wait=False) is None
    assert feed.error is None
    feed.close()


def test_the_first_job_can_be_waited_for_and_stays() -> None:
    feed = PrefetchQueue(Numbers(2))
    assert feed.any()
    assert feed.any()
    assert rest(feed) == [1, 2]
    assert not feed.any()
    empty = PrefetchQueue(())
    assert not empty.any()
    assert empty.ended


@pytest.mark.parametrize("ahead", [1, 2, 5])
def test_it_reads_so_far_ahead_and_no_further(ahead: int) -> None:
    numbers = Numbers(50)
    feed = PrefetchQueue(numbers, ahead)
    assert feed.take() == 1
    deadline = time.monotonic() + 60
    while len(numbers.made) < ahead + 2 and time.monotonic() < deadline:
        time.sleep(0.001)
    time.sleep(0.05)
    assert len(numbers.made) == ahead + 2  # one taken, some ready, one that waits for a place
    feed.close()


def test_an_error_comes_after_the_jobs_before_it() -> None:
    error = ValueError("bad row")
    feed = PrefetchQueue(Numbers(5, error))
    assert rest(feed) == [1, 2, 3, 4, 5]
    assert feed.ended
    assert feed.error is error
    at_once = PrefetchQueue(Numbers(0, error))
    assert not at_once.any()
    assert at_once.error is error


def test_who_does_not_wait_gets_what_a_slow_source_has_in_the_end() -> None:
    gate = threading.Semaphore(0)
    feed = PrefetchQueue(Numbers(3, gate=gate))
    for number in (1, 2, 3):
        assert feed.take(wait=False) is None
        assert not feed.ended
        gate.release()
        deadline = time.monotonic() + 60
        while (job := feed.take(wait=False)) is None and time.monotonic() < deadline:
            time.sleep(0.001)
        assert job == number
    assert feed.take() is None
    assert feed.ended


def test_closing_ends_a_reader_that_waits_for_a_place() -> None:
    numbers = Numbers(50)
    feed = PrefetchQueue(numbers, 1)
    assert feed.any()
    feed.close()
    assert not feed._thread.is_alive()
    assert feed.ended
    made = len(numbers.made)
    assert made < 50
    feed.close()
    assert len(numbers.made) == made


class Doubles:
    """A backend, as far as ``score_all`` looks."""

    def score(self, jobs: Any, done: Any) -> Iterator[tuple[Any, list[Any]]]:
        while (job := jobs.take()) is not None:
            yield job, [2 * sequence for sequence in job.sequences]
        assert jobs.ended


def test_some_sequences_are_one_job() -> None:
    assert score_all(Doubles(), [1, 2, 3]) == [2, 4, 6]  # type: ignore[list-item]
