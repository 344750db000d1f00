"""Batches on their way to servers: who takes which, what a failure does to it, and when to give up."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import TYPE_CHECKING

from entrodrop_prep.backends.batch import Batch
from entrodrop_prep.backends.server.connect import Checks, Served, backoff, check_same, connect, denied_error
from entrodrop_prep.backends.server.http import Busy, Cut, Denied, Failed, Gone, Server, Slow, Trouble
from entrodrop_prep.backends.server.request import MOST_SEQUENCES, PATH, answer_bytes, read_answer, request_body
from entrodrop_prep.backends.server.state import IN_FLIGHT, ServerState
from entrodrop_prep.errors import ConfigError, EntrodropError, ScoreError

if TYPE_CHECKING:
    from entrodrop_prep.backends import Scores

log = logging.getLogger(__name__)

QUEUED = 2
"""Batches that wait, for each request that may be in flight."""
MOST_FAILURES = 8
"""Answers that cannot be used until a batch is given up; servers that drop a connection do not count."""
DOUBLINGS = 4
"""How often a batch that takes too long gets twice the time."""


class Dispatcher:
    """Threads that send batches, some for each server, and one that looks after the server when it is down.

    A batch is with one thread at a time, or in the queue, or finished. So none is lost, and none is done twice.
    """

    def __init__(
        self, servers: list[Server], found: list[Served | Trouble], checks: Checks, timeout: float, patience: float
    ) -> None:
        self.checks, self.timeout, self.patience = checks, timeout, patience
        self._first = next(f for f in found if isinstance(f, Served))
        self.versions = sorted({f.version for f in found if isinstance(f, Served)})
        self.dtypes = sorted({f.dtype for f in found if isinstance(f, Served)})
        self._lines = [
            ServerState(server, result, MOST_SEQUENCES) for server, result in zip(servers, found, strict=True)
        ]
        self._changed = threading.Condition()
        self._queue: deque[Batch] = deque()
        self._finished: deque[tuple[Batch, list[Scores]]] = deque()
        self._error: BaseException | None = None
        self._stopped = False
        self._generation = 0
        self._last_answer = time.monotonic()
        self._threads = []
        for line in self._lines:
            for work in (self._keep, *[self._send_all] * IN_FLIGHT):
                self._threads.append(threading.Thread(target=self._run, args=(work, line), name="server", daemon=True))
        for thread in self._threads:
            thread.start()

    def begin(self) -> int:
        """Forget what an earlier generation left; returns the number of the new one."""
        with self._changed:
            self._generation += 1
            self._queue.clear()
            self._finished.clear()
            return self._generation

    def add(self, some: Iterable[Batch]) -> None:
        """Put batches into the queue."""
        with self._changed:
            if not self._queue and not self._in_flight():
                self._last_answer = time.monotonic()  # nobody was asked anything
            self._queue.extend(some)
            self._changed.notify_all()

    def needs_work(self) -> bool:
        """Whether so few batches wait that more should be ready."""
        with self._changed:
            up = sum(line.served is not None for line in self._lines)
            return len(self._queue) < QUEUED * IN_FLIGHT * max(1, up)

    def collect(self, timeout: float) -> list[tuple[Batch, list[Scores]]]:
        """Batches that are finished, as soon as there are some; none after ``timeout`` seconds.

        Raises ScoreError where a batch cannot be scored, or no server has answered for too long.
        """
        with self._changed:
            if not self._finished and self._error is None:
                self._changed.wait(timeout)
            finished = list(self._finished)
            self._finished.clear()
            if finished:
                return finished
            if self._error is not None:
                raise self._error
            if self._queue and not self._in_flight() and self._out_of_patience():
                raise ScoreError(
                    f"no server has answered for {self.patience:g} s: "
                    + "; ".join(f"{line.server.url}: {line.reason}" for line in self._lines),
                    fix="finished shards are kept: run the same command again when they are back",
                )
            return []

    def close(self) -> None:
        """Stop sending. A thread that waits for an answer ends when it comes, and does not keep the process."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
        deadline = time.monotonic() + 1.0
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))

    def _in_flight(self) -> int:
        """Sequences."""
        return sum(line.busy for line in self._lines)

    def _out_of_patience(self) -> bool:
        return time.monotonic() - self._last_answer > self.patience

    def _run(self, work: Callable[[ServerState], None], line: ServerState) -> None:
        try:
            work(line)
        except BaseException as e:  # noqa: BLE001 - it is raised again by who waits for the scores
            self._give_up(e)
        with self._changed:
            line.threads -= 1
            last = not line.threads
        if last:
            line.server.close()

    def _give_up(self, error: BaseException) -> None:
        with self._changed:
            self._error = self._error or error
            self._changed.notify_all()

    def _send_all(self, line: ServerState) -> None:
        while (taken := self._take(line)) is not None:
            batch, model = taken
            sent_at = time.monotonic()
            left: list[Batch] = []
            try:
                scores = self._ask(line, model, batch)
            except Trouble as trouble:
                left = self._after(trouble, sent_at, line, batch)
            except Denied as e:
                raise denied_error(e, f"{line.server.url}, {batch.where}", ScoreError) from e
            except EntrodropError as e:
                raise type(e)(e.what, where=f"{line.server.url}, {batch.where}", fix=e.fix) from e
            with self._changed:
                line.busy -= len(batch)
                if not left:
                    line.answered()
                    self._last_answer = time.monotonic()
                if batch.generation == self._generation:
                    self._queue.extendleft(reversed(left))
                    self._finished.extend([] if left else [(batch, scores)])
                self._changed.notify_all()

    def _take(self, line: ServerState) -> tuple[Batch, str] | None:
        """The next batch for a server and the model's id there, once it may have one; None at the end."""
        with self._changed:
            while not self._stopped and self._error is None:
                now = time.monotonic()
                room = line.room(now)
                if self._queue and room and line.served is not None and not self._out_of_patience():
                    batch = self._queue.popleft()
                    if len(batch) > room:
                        batch, rest = batch.cut(room)
                        self._queue.appendleft(rest)
                    line.busy += len(batch)
                    return batch, line.served.model
                self._changed.wait(line.ready_at - now if now < line.ready_at else None)
            return None

    def _ask(self, line: ServerState, model: str, batch: Batch) -> list[Scores]:
        sequences, timeout = batch.sequences, self.timeout * 2**batch.timeouts
        answer = line.server.post(PATH, request_body(model, sequences), timeout, answer_bytes(sequences))
        return read_answer(answer, sequences, self.checks.info)

    def _after(self, trouble: Trouble, sent_at: float, line: ServerState, batch: Batch) -> list[Batch]:
        """Note what a failure says of the server; returns the batch as it goes back to the queue.

        Raises ScoreError for a batch that has failed too often.
        """
        if isinstance(trouble, Gone):
            self._down(line, str(trouble))
            return [batch]
        if isinstance(trouble, (Cut, Slow, Failed)) and (unwell := line.server.unwell()) is not None:
            self._down(line, f"{trouble}, and then {unwell}")
            return [batch]
        with self._changed:
            line.failed(trouble, sent_at, self.patience / 4)
            if isinstance(trouble, Busy) and trouble.full and len(batch) > 1:
                return list(batch.cut(len(batch) // 2))
            if isinstance(trouble, Slow):
                self._last_answer = time.monotonic()  # it is well, so it works: the batch gets more time
                batch = replace(batch, timeouts=batch.timeouts + 1)
            elif isinstance(trouble, Failed):
                batch = replace(batch, failures=batch.failures + 1)
        where = f"{line.server.url}, {batch.where}"
        if batch.timeouts > DOUBLINGS:
            raise ScoreError(str(trouble), where=where, fix="raise --timeout, or lower --batch-tokens")
        if batch.failures >= MOST_FAILURES:
            raise ScoreError(
                f"{batch.failures} answers cannot be used, the last one: {trouble}",
                where=where,
                fix="look at the server's log; finished shards are kept",
            )
        return [batch]

    def _down(self, line: ServerState, reason: str) -> None:
        with self._changed:
            if self._stopped:
                return
            line.reason = reason
            if line.served is not None:
                line.served = None
                log.warning("the server %s is down: %s", line.server.url, reason)
            self._changed.notify_all()

    def _keep(self, line: ServerState) -> None:
        """Ask a server that is down whether it is back, and whether it is still the right one."""
        failures, said = 0, ""
        while True:
            with self._changed:
                while not self._stopped and line.served is not None:
                    failures = 0
                    self._changed.wait()
                if not self._stopped:
                    failures += 1
                    until = time.monotonic() + backoff(failures)
                    while not self._stopped and (left := until - time.monotonic()) > 0:
                        self._changed.wait(left)
                if self._stopped:
                    return
            try:
                served = connect(line.server, self.checks)
                if served.version not in self.versions:
                    raise ConfigError(
                        f"it runs vLLM {served.version} now, this run was begun with {', '.join(self.versions)}",
                        where=line.server.url,
                    )
                check_same(line.server, served, self._first, self.checks.info)
            except (Trouble, EntrodropError) as e:
                with self._changed:
                    line.reason = e.what if isinstance(e, EntrodropError) else str(e)
                if isinstance(e, EntrodropError) and str(e) != said:
                    said = str(e)
                    log.warning("not used again: %s", e)
                continue
            with self._changed:
                line.served, line.failures, line.ready_at = served, 0, 0.0
                log.warning("the server %s is back", line.server.url)
                self._changed.notify_all()
