"""What a report counts: scores as they are stored, and what the masks of every epoch drop."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from entrodrop_prep.masking.epoch_rows import EpochRows
from entrodrop_prep.masking.histogram import EntropyHistogram
from entrodrop_prep.store.rows import Rows, to_rows
from entrodrop_prep.store.schema import RESERVED

Key = tuple[int, int, int]
"""Number of the source, ``row_id``, ``window``."""

DENSITY_BINS, DENSITY_NATS = 80, 10.0
MOST_VALUES = 20
"""A column with more values is not shown by value."""
SEEN_NATS, SEEN_TOKENS = 0.1, 32
"""A row of at least so many trainable tokens whose surprisal is below this on average was probably trained on."""
_CHUNK_ROWS = 4096


@dataclass
class Group:
    """Trainable tokens that have something in common, their rows, and the sums of their scores in nats."""

    rows: int = 0
    tokens: int = 0
    entropy: float = 0.0
    surprisal: float = 0.0


@dataclass
class Statistics:
    """Of all trainable tokens of the sources that are masked. Surprisal is -logprob, in nats as the entropy is."""

    spread: EntropyHistogram = field(default_factory=EntropyHistogram)
    density: NDArray[np.int64] = field(default_factory=lambda: np.zeros((DENSITY_BINS, DENSITY_BINS), np.int64))
    """Tokens by (entropy, surprisal), each from 0 to DENSITY_NATS; what is above is in the last bin."""
    groups: dict[str, dict[str, Group]] = field(default_factory=dict)
    """By source, kept column or length: value -> its tokens; none of a column with more than MOST_VALUES values."""
    total: Group = field(default_factory=Group)
    seen_rows: int = 0
    """Rows that the reference model predicts almost wholly."""
    has_surprisal: bool = True


def read_scores(rows: EpochRows, wanted: set[Key], keep: Callable[[Key, Rows, pa.RecordBatch], None]) -> Statistics:
    """Read every scored row once.

    Args:
        rows: whose sources are read.
        wanted: rows to hand on.
        keep: called with each of them: its key, its tokens, its columns.

    Raises IntegrityError for a shard that is not the one that the manifest lists.
    """
    found = Statistics(has_surprisal=all(s.scored.has_logprob for s in rows.sources.all))
    for number, source in enumerate(rows.sources.all):
        columns = [f.name for f in source.scored.schema if f.name not in RESERVED and _is_label(f.type)]
        for batch in map(source.rows_of, source.scored.batches()):
            scored = to_rows(batch)
            for r, at in enumerate(zip(scored.row_id.tolist(), scored.window.tolist(), strict=True)):
                if (number, *at) in wanted:
                    part = batch.slice(r, 1)
                    keep((number, *at), to_rows(part), part)
            if source.plain:
                continue
            kinds = {"source": np.full(len(scored.row_id), source.name)} if rows.sources.named else {}
            kinds |= {name: _labels(batch.column(name)) for name in columns}
            _count(found, scored, kinds | {"length": _lengths(scored.lengths)})
    found.groups = {kind: values for kind, values in found.groups.items() if 2 <= len(values) <= MOST_VALUES}
    return found


def _count(found: Statistics, scored: Rows, kinds: dict[str, NDArray[Any]]) -> None:
    trainable = scored.trainable
    row = np.repeat(np.arange(len(scored.row_id)), scored.lengths)[trainable]
    stored = np.asarray(scored.entropy)[trainable]
    found.spread.add(stored)
    entropy = stored.astype(np.float64)
    surprisal = np.zeros(len(row)) if scored.logprob is None else -scored.logprob[trainable].astype(np.float64)
    scale = DENSITY_BINS / DENSITY_NATS
    x, y = (np.clip(values * scale, 0, DENSITY_BINS - 1).astype(np.int64) for values in (entropy, surprisal))
    found.density += np.bincount(x * DENSITY_BINS + y, minlength=DENSITY_BINS**2).reshape(DENSITY_BINS, -1)
    sums = [np.bincount(row, weights=w, minlength=len(scored.row_id)) for w in (np.ones(len(row)), entropy, surprisal)]
    if scored.logprob is not None:
        found.seen_rows += int(((sums[0] >= SEEN_TOKENS) & (sums[2] < SEEN_NATS * sums[0])).sum())
    for group, members in [(found.total, slice(None)), *_members(found, kinds)]:
        group.rows += int((sums[0][members] > 0).sum())
        group.tokens += int(sums[0][members].sum())
        group.entropy += float(sums[1][members].sum())
        group.surprisal += float(sums[2][members].sum())


def _members(found: Statistics, kinds: dict[str, NDArray[Any]]) -> Iterator[tuple[Group, Any]]:
    """Each group, and which rows [R] bool are in it; a kind with too many values is counted no further."""
    for kind, labels in kinds.items():
        groups = found.groups.setdefault(kind, {})
        for label in np.unique(labels).tolist():
            if len(groups) <= MOST_VALUES:
                yield groups.setdefault(label, Group()), labels == label


def _is_label(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_integer(kind) or pa.types.is_boolean(kind))


def _labels(column: pa.Array) -> NDArray[Any]:
    """[R] values as text."""
    return np.array(["(none)" if v is None else str(v)[:80] for v in column.to_pylist()])


def _lengths(lengths: NDArray[np.int64]) -> NDArray[Any]:
    """[R] between which powers of two each number of tokens is."""
    powers = np.floor(np.log2(np.maximum(lengths, 1))).astype(int)
    return np.array([f"{1 << p:,} to {(2 << p) - 1:,} tokens" for p in powers.tolist()])


def read_masks(rows: EpochRows, epochs: int, vocab_size: int) -> tuple[NDArray[np.int64], int]:
    """Of all epochs together: [2, V] how often each id may be dropped and is dropped; how many tokens are trainable."""
    counts, trainable = np.zeros((2, vocab_size), np.int64), 0
    for epoch in range(epochs):
        total = rows.size(epoch)[0]
        for first in range(0, total, _CHUNK_ROWS):
            for _, some, made, _, _ in rows.masked(epoch, np.arange(first, min(first + _CHUNK_ROWS, total))):
                for count, flags in zip(counts, (made.droppable, made.dropped), strict=True):
                    count += np.bincount(some.input_ids[flags], minlength=vocab_size)
                trainable += int(made.trainable.sum())
    return counts, trainable
