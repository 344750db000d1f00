"""Which documents share a packed row: best fit, longest first, inside blocks that keep the order of the epoch.

A pure function of the lengths of an epoch's rows in their order. A row that fits is one segment; a longer one is cut
into segments of ``limit`` tokens and a rest.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

BLOCK_TOKENS = 1 << 22
_SHIFT = 32

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Segments:
    """[S] stretches of rows: tokens ``start`` to ``stop - 1`` of the row at ``position`` of its epoch."""

    position: Ints
    start: Ints
    stop: Ints

    def __len__(self) -> int:
        return len(self.position)

    def __getitem__(self, some: NDArray[np.generic] | slice) -> Segments:
        return Segments(self.position[some], self.start[some], self.stop[some])

    @cached_property
    def lengths(self) -> Ints:
        """[S] tokens of each."""
        return self.stop - self.start

    @cached_property
    def keys(self) -> Ints:
        """[S] numbers that sort them by (position, start)."""
        return self.position << _SHIFT | self.start


@dataclass(frozen=True)
class Bins:
    """B packed rows in order: row b holds the segments ``offsets[b]:offsets[b + 1]``, in the order of the epoch."""

    offsets: Ints
    """[B + 1] from 0 to the number of segments."""
    segments: Segments
    blocks: Ints
    """[K + 1] rows at positions ``k * block`` to ``(k + 1) * block - 1`` are in bins ``blocks[k]:blocks[k + 1]``."""
    block: int
    """Rows of the epoch in a block."""

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def tokens(self) -> int:
        """Of all packed rows."""
        return int(self.segments.lengths.sum())


@dataclass(frozen=True)
class PackedSize:
    """What is known of a packed epoch before it is made."""

    limit: int
    rows: int
    tokens: int
    rows_cut: int
    """Rows of the epoch that are longer than ``limit``."""
    pieces_left_out: int
    """Pieces of those that have nothing to train on once their first token is not predicted."""


def block_rows(rows: int, tokens: int) -> int:
    """Rows that hold about four million tokens."""
    return max(1, BLOCK_TOKENS * rows // max(1, tokens))


def cut(lengths: Ints, limit: int) -> Segments:
    """Rows of ``lengths`` [R] as segments of at most ``limit`` tokens, by (position, start)."""
    count = -(-lengths // limit)
    position = np.repeat(np.arange(len(lengths)), count)
    start = (np.arange(len(position)) - np.repeat(np.cumsum(count) - count, count)) * limit
    return Segments(position, start, np.minimum(start + limit, lengths[position]))


def pack(segments: Segments, limit: int, block: int) -> Bins:
    """Fill rows of at most ``limit`` tokens with ``segments``, sorted by (position, start); each is in one row.

    Inside each block of ``block`` rows of the epoch: the longest segment first (the earlier of equals) goes into the
    row with the least room that still holds it (the one begun first of equals), else into a new one. The rows of a
    block then come in the order of their earliest segments.
    """
    if len(segments) and segments.lengths.max() > limit:
        raise ValueError(f"a segment is longer than {limit} tokens")
    count = int(segments.position[-1]) // block + 1 if len(segments) else 0
    edges = np.searchsorted(segments.position, np.arange(count + 1) * block)
    numbers, blocks = np.empty(len(segments), np.int64), np.zeros(count + 1, np.int64)
    for k in range(count):
        some = slice(edges[k], edges[k + 1])
        found = _best_fit(segments.lengths[some], limit)
        _, earliest, inverse = np.unique(found, return_index=True, return_inverse=True)
        rank = np.empty(len(earliest), np.int64)
        rank[np.argsort(earliest)] = np.arange(len(earliest))
        numbers[some] = blocks[k] + rank[inverse]
        blocks[k + 1] = blocks[k] + len(earliest)
    order = np.argsort(numbers, kind="stable")
    offsets = np.concatenate([[0], np.cumsum(np.bincount(numbers, minlength=int(blocks[-1]) if count else 0))])
    return Bins(offsets.astype(np.int64), segments[order], blocks, block)


def _best_fit(lengths: Ints, limit: int) -> Ints:
    """[S] the row that each segment falls into, numbered as they are begun."""
    sizes, result = lengths.tolist(), [0] * len(lengths)
    room: list[int] = []  # of each row that is not full, sorted: its free tokens, then its number in the low 32 bits
    begun = 0
    for i in np.argsort(-lengths, kind="stable").tolist():
        length = sizes[i]
        at = bisect_left(room, length << _SHIFT)
        if at < len(room):
            free, row = room[at] >> _SHIFT, room.pop(at) & ((1 << _SHIFT) - 1)
        else:
            free, row = limit, begun
            begun += 1
        result[i] = row
        if free > length:
            insort(room, (free - length) << _SHIFT | row)
    return np.array(result, np.int64)
