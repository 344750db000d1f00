"""Parts of shards, so that one shard can be scored by several engines or servers at once."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

    from entrodrop_prep.backends import Scores
    from entrodrop_prep.backends.feed import Job


@dataclass(frozen=True)
class Batch:
    """Sequences [start, stop) of a job, which are scored together.

    Attributes:
        turn: number of the ``score`` call they belong to.
        failures: how often they were lost: with an engine that ended, or by answers that could not be used.
        timeouts: how often no answer came in time.
    """

    job: Job
    start: int
    stop: int
    turn: int = 0
    failures: int = 0
    timeouts: int = 0

    def __len__(self) -> int:
        return self.stop - self.start

    @property
    def sequences(self) -> list[np.ndarray[Any, Any]]:
        """Their ids."""
        return list(self.job.sequences[self.start : self.stop])

    @property
    def where(self) -> str:
        """For messages."""
        shard = "probe" if self.job.index < 0 else f"shard {self.job.index}"
        return f"{shard}, its sequences {self.start} to {self.stop - 1}"

    def cut(self, at: int) -> tuple[Batch, Batch]:
        """The first ``at`` sequences and the others."""
        return replace(self, stop=self.start + at), replace(self, start=self.start + at)


def batches(job: Job, most_tokens: int, most_sequences: int | None = None, turn: int = 0) -> Iterator[Batch]:
    """Cut a job into batches, in order; a sequence of more than ``most_tokens`` is one by itself.

    The self-check's probe is not cut by tokens: only in one piece is it sure to overflow a step of the engine.
    """
    start, tokens = 0, 0
    for i, sequence in enumerate(job.sequences):
        full = tokens + len(sequence) > most_tokens and job.index >= 0
        if i > start and (full or i - start == most_sequences):
            yield Batch(job, start, i, turn)
            start, tokens = i, 0
        tokens += len(sequence)
    if job.sequences:
        yield Batch(job, start, len(job.sequences), turn)


class AtWork:
    """Jobs of which some batches are not finished, and the scores they have so far."""

    def __init__(self) -> None:
        self._open: dict[int, tuple[Job, list[Scores | None]]] = {}  # by id(job)

    def __len__(self) -> int:
        return len(self._open)

    def add(self, job: Job) -> None:
        """A job with at least one sequence."""
        self._open[id(job)] = (job, [None] * len(job.sequences))

    def finish(self, batch: Batch, scores: list[Scores]) -> list[Scores] | None:
        """Note the scores of a batch; those of the whole job, in order, if it was the last one."""
        _, found = self._open[id(batch.job)]
        found[batch.start : batch.stop] = scores
        whole = [s for s in found if s is not None]
        if len(whole) < len(found):
            return None
        del self._open[id(batch.job)]
        return whole
