"""Parts of shards, so that one shard can be scored by several engines or servers at once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

    from entrodrop_prep.backends import Scores
    from entrodrop_prep.backends.prefetch import ShardTokens


@dataclass(frozen=True)
class Batch:
    """Sequences [start, stop) of a job, which are scored together.

    Attributes:
        sequences: their ``input_ids [T] int32``.
        generation: number of the ``score`` call they belong to.
        failures: how often they were lost: with an engine that ended, or by answers that could not be used.
        timeouts: how often no answer came in time.
    """

    job: ShardTokens
    start: int
    stop: int
    sequences: Sequence[np.ndarray[Any, Any]]
    generation: int = 0
    failures: int = 0
    timeouts: int = 0

    def __len__(self) -> int:
        return self.stop - self.start

    @property
    def where(self) -> str:
        """For messages."""
        shard = "probe" if self.job.index < 0 else f"shard {self.job.index}"
        return f"{shard}, its sequences {self.start} to {self.stop - 1}"

    def cut(self, at: int) -> tuple[Batch, Batch]:
        """The first ``at`` sequences and the others."""
        middle = self.start + at
        first = replace(self, stop=middle, sequences=self.sequences[:at])
        return first, replace(self, start=middle, sequences=self.sequences[at:])


def batches(
    job: ShardTokens, most_tokens: int, most_sequences: int | None = None, generation: int = 0
) -> Iterator[Batch]:
    """Cut a job into batches, in order; a sequence of more than ``most_tokens`` is one by itself.

    The self-check's probe is not cut by tokens: only in one piece is it sure to overflow a step of the engine.
    """
    sequences = job.sequences
    start, tokens = 0, 0
    for i, sequence in enumerate(sequences):
        full = tokens + len(sequence) > most_tokens and job.index >= 0
        if i > start and (full or i - start == most_sequences):
            yield Batch(job, start, i, sequences[start:i], generation)
            start, tokens = i, 0
        tokens += len(sequence)
    if sequences:
        yield Batch(job, start, len(sequences), sequences[start:], generation)


class AtWork:
    """Jobs of which some batches are not finished, and the scores they have so far."""

    def __init__(self) -> None:
        self._open: dict[int, _Open] = {}  # by id(job)

    def __len__(self) -> int:
        return len(self._open)

    def add(self, job: ShardTokens) -> None:
        """A job with at least one sequence."""
        count = len(job.sequences)
        self._open[id(job)] = _Open(job, [None] * count, count)

    def finish(self, batch: Batch, scores: list[Scores]) -> list[Scores] | None:
        """Note the scores of a batch; those of the whole job, in order, if it was the last one."""
        work = self._open[id(batch.job)]
        work.scores[batch.start : batch.stop] = scores
        work.left -= len(batch)
        if work.left:
            return None
        del self._open[id(batch.job)]
        return [s for s in work.scores if s is not None]


@dataclass
class _Open:
    """A job, the scores it has so far, and how many sequences have none yet."""

    job: ShardTokens
    scores: list[Scores | None]
    left: int
