"""Exact order statistics of stored scores: of a corpus that does not fit in memory, and of every row of a batch.

A float's bits, with all of them flipped for negative numbers and only the sign flipped for the others, are unsigned
integers ("keys") in the order of the floats. A corpus is counted by the top 16 bits of its keys, then, for float32
only, once more by the low 16 bits inside the one bin that holds the wanted rank: one or two passes over the data, and
512 KiB of counts, whatever its size.

    histogram = Histogram(np.float32)
    for chunk in ...:                    # a pass that may do other work too
        histogram.add(chunk)
    tau = threshold(histogram, 0.5, high=False, again=lambda: chunks of the same scores)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from entrodrop_prep.config import Recipe

DEFAULT_QUANTILE = 0.5
"""The quantile of a recipe that names neither a quantile nor a threshold; ours."""

_BINS = 1 << 16
_GROUPS_BY_16_BITS = 16


def quantile_of(recipe: Recipe) -> float:
    """``--quantile``, or its default."""
    return DEFAULT_QUANTILE if recipe.quantile is None else recipe.quantile


def low_rank(q: float, n: int) -> int | None:
    """Rank (from 0) of the highest of the ceil(q * n) lowest of ``n`` scores; None where that selects none."""
    count = math.ceil(q * n)
    return count - 1 if count else None


def high_rank(q: float, n: int) -> int | None:
    """Rank (from 0) of the lowest of the ceil(q * n) highest of ``n`` scores; None where that selects none."""
    count = math.ceil(q * n)
    return n - count if count else None


class Histogram:
    """Counts of scores, float16 or float32, by 16 bits of their keys."""

    def __init__(self, dtype: DTypeLike) -> None:
        """An empty histogram by the top 16 bits. Raises ValueError for another dtype."""
        self.dtype = np.dtype(dtype)
        if self.dtype not in (np.dtype(np.float16), np.dtype(np.float32)):
            raise ValueError(f"scores are float16 or float32, not {self.dtype}")
        self._shift = 8 * self.dtype.itemsize - 16
        self._prefix: int | None = None  # the key bits above those counted, where they are fixed
        self._below = 0  # scores whose keys are below that prefix
        self.counts: NDArray[np.int64] = np.zeros(_BINS, np.int64)

    @property
    def total(self) -> int:
        """Number of scores counted, those outside the bin of a ``narrow``ed histogram left out."""
        return int(self.counts.sum())

    @property
    def exact(self) -> bool:
        """Whether a bin holds one value only, so that ``value`` can give it."""
        return self._shift == 0

    def add(self, scores: NDArray[Any]) -> None:
        """Count ``scores`` [n], in the histogram's dtype. Raises ValueError for another dtype or a NaN among them."""
        if scores.dtype != self.dtype:
            raise ValueError(f"the histogram counts {self.dtype}, not {scores.dtype}")
        if np.isnan(scores).any():
            raise ValueError("a null score is at a trainable token")
        keys = _keys(scores)
        if self._prefix is not None:
            keys = keys[keys >> 16 == self._prefix] & (_BINS - 1)
        elif self._shift:
            keys = keys >> self._shift
        self.counts += np.bincount(keys, minlength=_BINS)

    def narrow(self, rank: int) -> Histogram:
        """An empty histogram of the values in the bin that holds ``rank``, for another pass over the same scores."""
        if self.exact:
            raise ValueError("each bin holds one value already")
        bin_, below = self._bin(rank)
        finer = Histogram(self.dtype)
        finer._shift, finer._prefix, finer._below = 0, bin_, below
        return finer

    def value(self, rank: int) -> float:
        """The score of ``rank`` (from 0, over all scores of the pass) in ascending order; only where ``exact``."""
        if not self.exact:
            raise ValueError("a bin holds many values: narrow the histogram and add the scores again")
        bin_, _ = self._bin(rank)
        key = bin_ if self._prefix is None else self._prefix << 16 | bin_
        return float(_scores(np.array([key]), self.dtype)[0])

    def _bin(self, rank: int) -> tuple[int, int]:
        """The bin that holds ``rank`` and the number of scores below that bin."""
        ends = self._below + np.cumsum(self.counts)
        if not self._below <= rank < ends[-1]:
            raise ValueError(f"rank {rank} is outside {self._below} to {ends[-1] - 1}")
        bin_ = int(np.searchsorted(ends, rank, side="right"))
        return bin_, int(ends[bin_] - self.counts[bin_])


def threshold(first: Histogram, q: float, *, high: bool, again: Callable[[], Iterable[NDArray[Any]]]) -> float:
    """The corpus threshold in the scores' unit; ``first`` has counted every trainable score.

    Low: sorted[ceil(q n) - 1], at or below which a token is selected. ``high``: sorted[n - ceil(q n)], at or above
    which it is. -inf or +inf where that selects none. ``again()`` yields the same scores once more and is called for
    float32 only.
    """
    rank = high_rank(q, first.total) if high else low_rank(q, first.total)
    if rank is None:
        return math.inf if high else -math.inf
    return _find(first, rank, again)


def group_thresholds(
    chunks: Callable[[], Iterable[tuple[NDArray[Any], NDArray[Any]]]],
    dtype: DTypeLike,
    groups: int,
    q: float,
    *,
    high: bool,
) -> NDArray[np.float64]:
    """The threshold of each of ``groups`` groups by itself: float64 [groups], as ``threshold`` has it for the corpus.

    ``chunks()`` yields scores [n] of ``dtype`` and the group [n] of each, and is called once for every 16 bits of the
    scores, or for every 8 where there are more than 16 groups: at most 8 MiB of counts for 16 groups, 2 KiB a group
    beyond. Raises ValueError for another dtype or a NaN among the scores.
    """
    kind = np.dtype(dtype)
    bits = 16 if groups <= _GROUPS_BY_16_BITS else 8
    known, rank = np.zeros(groups, np.int64), np.zeros(groups, np.int64)
    selects = np.zeros(groups, np.bool_)
    for shift in range(8 * kind.itemsize - bits, -1, -bits):
        first = shift == 8 * kind.itemsize - bits
        counts = np.zeros((groups, 1 << bits), np.int64)
        for scores, group in chunks():
            if scores.dtype != kind:
                raise ValueError(f"the groups count {kind}, not {scores.dtype}")
            if np.isnan(scores).any():
                raise ValueError("a null score is at a trainable token")
            keys, of = _keys(scores).astype(np.int64), group.astype(np.int64)
            if not first:
                inside = keys >> (shift + bits) == known[of]
                keys, of = keys[inside], of[inside]
            cell = of << bits | (keys >> shift) & ((1 << bits) - 1)
            counts += np.bincount(cell, minlength=counts.size).reshape(counts.shape)
        if first:
            ranks = [(high_rank if high else low_rank)(q, int(n)) for n in counts.sum(axis=1)]
            selects = np.array([r is not None for r in ranks], np.bool_)
            rank = np.array([r or 0 for r in ranks], np.int64)
        ends = np.cumsum(counts, axis=1)
        digit = np.minimum((ends <= rank[:, None]).sum(axis=1), (1 << bits) - 1)
        rank -= (ends - counts)[np.arange(groups), digit]
        known = known << bits | digit
    return np.where(selects, _scores(known, kind).astype(np.float64), math.inf if high else -math.inf)


def row_thresholds(
    scores: NDArray[Any], trainable: NDArray[np.bool_], offsets: NDArray[np.int64], q: float, high: bool
) -> NDArray[np.float64]:
    """The threshold of each row by itself: float64 [R], as ``threshold`` has it for the corpus.

    ``scores`` [N] float16|float32 and ``trainable`` [N] bool, the rows one after the other; row r is
    ``offsets[r]:offsets[r + 1]``. Raises ValueError for a NaN at a trainable token.
    """
    rows = len(offsets) - 1
    chosen = np.flatnonzero(trainable)
    if np.isnan(scores[chosen]).any():
        raise ValueError("a null score is at a trainable token")
    row = np.searchsorted(offsets, chosen, side="right") - 1
    in_order = np.sort(row.astype(np.uint64) << np.uint64(32) | _keys(scores[chosen]).astype(np.uint64))
    n = np.bincount(row, minlength=rows)
    count = np.ceil(q * n).astype(np.int64)
    result = np.full(rows, math.inf if high else -math.inf)
    some = count > 0
    rank = np.cumsum(n) - n + (n - count if high else count - 1)
    keys = in_order[rank[some]] & np.uint64(0xFFFFFFFF)
    result[some] = _scores(keys, scores.dtype)
    return result


def _find(histogram: Histogram, rank: int, again: Callable[[], Iterable[NDArray[Any]]]) -> float:
    if not histogram.exact:
        histogram = histogram.narrow(rank)
        for chunk in again():
            histogram.add(chunk)
    return histogram.value(rank)


def _keys(scores: NDArray[Any]) -> NDArray[Any]:
    """Unsigned integers of the scores' width, in the same order."""
    width = scores.dtype.itemsize
    bits = np.ascontiguousarray(scores).view(f"i{width}")
    flipped = bits >> (8 * width - 1)  # all bits of negative numbers, none of others
    flipped |= np.iinfo(bits.dtype).min
    flipped ^= bits
    return flipped.view(f"u{width}")


def _scores(keys: NDArray[Any], dtype: np.dtype[Any]) -> NDArray[Any]:
    """The scores that have these ``keys``."""
    unsigned = np.dtype(f"u{dtype.itemsize}")
    sign = unsigned.type(1 << (8 * unsigned.itemsize - 1))
    keys = keys.astype(unsigned)
    return np.where(keys & sign, keys ^ sign, ~keys).view(dtype)
