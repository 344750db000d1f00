"""A part of a shard that goes to a server in one request."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

    from entrodrop_prep.backends.feed import Job


@dataclass(frozen=True)
class Batch:
    """Sequences [start, stop) of a job, which go into one request.

    Attributes:
        turn: number of the ``score`` call they belong to.
        failures: answers that could not be used.
        timeouts: how often no answer came in time.
    """

    job: Job
    start: int
    stop: int
    turn: int
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


def batches(job: Job, turn: int, most_tokens: int, most_sequences: int) -> Iterator[Batch]:
    """Cut a job into batches, in order; a sequence of more than ``most_tokens`` is one by itself."""
    start, tokens = 0, 0
    for i, sequence in enumerate(job.sequences):
        if i > start and (tokens + len(sequence) > most_tokens or i - start == most_sequences):
            yield Batch(job, start, i, turn)
            start, tokens = i, 0
        tokens += len(sequence)
    if job.sequences:
        yield Batch(job, start, len(job.sequences), turn)
