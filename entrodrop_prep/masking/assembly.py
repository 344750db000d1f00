"""From masked whole rows to packed ones: pure functions over arrays, for any of an epoch's packed rows."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from entrodrop_prep.masking.mask import IGNORE, Masked
from entrodrop_prep.masking.packing import Bins, Segments
from entrodrop_prep.store.rows import Rows

FIGURES = ("tokens", "trainable", "eligible", "dropped", "labels_left")
_PER_TOKEN = ("input_ids", "labels")
_DROPPED, _LEFT = FIGURES.index("dropped"), FIGURES.index("labels_left")


@dataclass(frozen=True)
class MaskedColumns:
    """R rows of N tokens and D documents in all, as they are stored: row r is ``offsets[r]:offsets[r + 1]``."""

    offsets: NDArray[np.int64]
    """[R + 1] from 0 to N."""
    input_ids: NDArray[np.int32]
    """[N] token ids."""
    labels: NDArray[np.int32]
    """[N] unshifted; -100 = no loss."""
    trainable: NDArray[np.int64]
    """[R] tokens of each row that may be trained on, dropped or not; empty where that is not asked for."""
    lengths: NDArray[np.int64]
    """[D] tokens of each document."""
    documents: NDArray[np.int64]
    """[R + 1] row r holds the documents ``documents[r]:documents[r + 1]``."""


def positions(lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """[N] 0, 1, 2, ... in each of [D] stretches of these lengths."""
    ends = np.cumsum(lengths)
    return np.arange(ends[-1] if len(ends) else 0) - np.repeat(ends - lengths, lengths)


@dataclass(frozen=True)
class SegmentBatch:
    """S segments of N tokens, masked, in any order: segment s is ``offsets[s]:offsets[s + 1]`` of each [N] array."""

    keys: NDArray[np.int64]
    """[S] as ``Segments.keys``."""
    lengths: NDArray[np.int64]
    """[S] tokens of each."""
    input_ids: NDArray[np.int32]
    """[N]"""
    labels: NDArray[np.int32]
    """[N] -100 at the first token of each segment, which nothing before it in its row may predict."""
    figures: NDArray[np.int64]
    """[S, 5] FIGURES of each; the first token counts in ``tokens`` alone."""
    source: NDArray[np.int64]
    """[S] number of the source."""
    rates: NDArray[np.float64]
    """[S] drop rate of its row."""
    spare: NDArray[np.int64]
    """[S] of a segment without labels, index of its dropped token of the highest entropy (the first), else -1."""
    spare_entropy: NDArray[np.float64]
    """[S] the entropy there, nats; -inf where it is null or there is none."""
    spare_id: NDArray[np.int32]
    """[S] the id that was there before masking."""

    @classmethod
    def joined(cls, parts: Iterable[SegmentBatch], segments: int, tokens: int) -> SegmentBatch:
        """Several as one, of so many segments and tokens in all; each part is let go once it is copied."""
        made: dict[str, NDArray[Any]] = {}
        s = t = 0
        for part in parts:
            for field in fields(cls):
                values = getattr(part, field.name)
                first, size = (t, tokens) if field.name in _PER_TOKEN else (s, segments)
                if field.name not in made:
                    made[field.name] = np.empty((size, *values.shape[1:]), values.dtype)
                made[field.name][first : first + len(values)] = values
            s, t = s + len(part.keys), t + len(part.labels)
        return cls(**made)


@dataclass(frozen=True)
class Packed:
    """Some packed rows, and what masking did to each of their D segments, in their order."""

    stored: MaskedColumns
    figures: NDArray[np.int64]
    """[D, 5] as in ``SegmentBatch``."""
    source: NDArray[np.int64]
    """[D]"""
    rates: NDArray[np.float64]
    """[D]"""

    @classmethod
    def joined(cls, parts: list[Packed]) -> Packed:
        """Several as one, one after the other."""
        if len(parts) == 1:
            return parts[0]
        every = [p.stored for p in parts]
        offsets, documents = (
            np.concatenate([np.zeros(1, np.int64), np.cumsum(np.concatenate([np.diff(getattr(s, n)) for s in every]))])
            for n in ("offsets", "documents")
        )
        ids, labels, trainable, lengths = (
            np.concatenate([getattr(s, n) for s in every]) for n in ("input_ids", "labels", "trainable", "lengths")
        )
        stored = MaskedColumns(offsets, ids, labels, trainable, lengths, documents)
        return cls(stored, *(np.concatenate([getattr(p, n) for p in parts]) for n in ("figures", "source", "rates")))


def hold(
    rows: Rows, masked: Masked, rates: NDArray[np.float64], source: int, row: NDArray[np.int64], segments: Segments
) -> SegmentBatch:
    """Cut masked rows: segment s is of row ``row[s]`` of ``rows``, whose drop rates are ``rates`` [R]."""
    lengths = segments.lengths
    where = np.repeat(rows.offsets[row] + segments.start, lengths) + positions(lengths)
    ends = np.cumsum(lengths)
    first = ends - lengths
    labels = masked.labels[where]
    labels[first] = IGNORE
    flags = [rows.trainable[where], masked.droppable[where], masked.dropped[where], labels != IGNORE]
    figures = np.empty((len(lengths), len(FIGURES)), np.int64)
    figures[:, 0] = lengths
    for i, flag in enumerate(flags, 1):
        flag[first] = False
        running = np.concatenate([[0], np.cumsum(flag)])
        figures[:, i] = running[ends] - running[first]
    spare = np.full(len(lengths), -1)
    entropy, ids = np.full(len(lengths), -np.inf), np.zeros(len(lengths), np.int32)
    for s in np.flatnonzero((figures[:, _LEFT] == 0) & (figures[:, _DROPPED] > 0)).tolist():
        marked = np.flatnonzero(flags[2][first[s] : ends[s]])
        tokens = where[first[s] + marked]
        scores = np.nan_to_num(rows.entropy[tokens].astype(np.float64), nan=-np.inf)
        best = int(np.argmax(scores))
        spare[s], entropy[s], ids[s] = marked[best], scores[best], rows.input_ids[tokens[best]]
    sources = np.full(len(lengths), source)
    inputs = masked.input_ids[where]
    return SegmentBatch(segments.keys, lengths, inputs, labels, figures, sources, rates[row], spare, entropy, ids)


def assemble(held: SegmentBatch, bins: Bins, first: int, stop: int) -> Packed:
    """Packed rows ``first`` to ``stop - 1``; ``held`` has all their segments, and may have others.

    A row that would have no label takes back the drop of the token with the highest entropy (of the first on ties).
    """
    ends = bins.offsets[first : stop + 1]
    segments = bins.segments[slice(ends[0], ends[-1])]
    documents = ends - ends[0]
    order = np.argsort(held.keys)
    found = order[np.searchsorted(held.keys, segments.keys, sorter=order)]
    lengths = segments.lengths
    begins = np.cumsum(lengths) - lengths
    where = np.repeat((np.cumsum(held.lengths) - held.lengths)[found], lengths) + positions(lengths)
    ids, labels, figures = held.input_ids[where], held.labels[where], held.figures[found]
    for b in np.flatnonzero(np.add.reduceat(figures[:, _LEFT], documents[:-1]) == 0).tolist():
        some = found[documents[b] : documents[b + 1]]
        scores = np.where(held.spare[some] >= 0, held.spare_entropy[some], np.nan)
        best = int(np.nanargmax(np.maximum(scores, np.finfo(np.float64).min)))
        d, s = int(documents[b]) + best, int(some[best])
        at = begins[d] + held.spare[s]
        ids[at] = labels[at] = held.spare_id[s]
        figures[d, _LEFT], figures[d, _DROPPED] = 1, figures[d, _DROPPED] - 1
    offsets = np.concatenate([begins[documents[:-1]], [len(where)]])
    trainable = np.add.reduceat(figures[:, FIGURES.index("trainable")], documents[:-1])
    stored = MaskedColumns(offsets, ids, labels, trainable, lengths, documents)
    return Packed(stored, figures, held.source[found], held.rates[found])
