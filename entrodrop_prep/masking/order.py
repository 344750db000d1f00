"""Which scored row is at which position of an epoch: one index in memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from entrodrop_prep.config import Recipe
from entrodrop_prep.masking.columns import Columns
from entrodrop_prep.masking.counter import CHOOSE, order_keys, rate_limit, stream_key, token_words
from entrodrop_prep.masking.packing import Bins, block_rows, cut, pack
from entrodrop_prep.masking.sources import Source, Sources

_STEP = 1 << 17

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Order:
    """The rows of one epoch in training order."""

    index: NDArray[Any]
    """[R] uint32, or int64 beyond 2**32 rows: numbers of rows of ``Columns``."""
    repeat: NDArray[np.int32] | None
    """[R] how many times each appears before in the same epoch; None where each appears once."""


def order_varies(sources: Sources, recipe: Recipe) -> bool:
    """Whether one epoch's order is another than the next one's; if not, that of epoch 0 is that of all."""
    return recipe.shuffle == "epoch" or any(s.share for s in sources.all)


def order_of(sources: Sources, recipe: Recipe, columns: Columns, epoch: int) -> Order:
    """The order of ``epoch``: 4 bytes a row, 8 where rows appear more than once; about 20 more while it is made.

    Ascending by (key, source, row_id, window, repeat), without the key with ``--shuffle none``. Rows of ``Columns``
    are sorted by (source, row_id, window), and a stable sort by key keeps that among equal keys.
    """
    rows = size_of(sources, recipe, columns, epoch)[0]
    index = np.empty(rows, np.uint32 if len(columns) < 1 << 32 else np.int64)
    repeat = np.zeros(rows, np.int32) if any(s.weight > 1 for s in sources.all) else None
    keys = np.empty(rows if recipe.shuffle != "none" else 0, np.uint64)
    at = 0
    for source, first, stop in _steps(sources, columns):
        times = _times(source, recipe, columns, first, stop, epoch)
        picked = np.repeat(np.arange(first, stop), times)
        some = slice(at, at + len(picked))
        at, index[some] = some.stop, picked
        again = np.arange(len(picked)) - np.repeat(np.cumsum(times) - times, times)
        if repeat is not None:
            repeat[some] = again
        if recipe.shuffle != "none":
            keys[some] = _keys(source, recipe, columns, picked, again, epoch if recipe.shuffle == "epoch" else 0)
        columns.arrays.release()
    if recipe.shuffle != "none":
        order = np.argsort(keys)
        if _any_equal(keys, order):
            order = np.argsort(keys, kind="stable")
        del keys
        index, repeat = index[order], None if repeat is None else repeat[order]
    return Order(index, repeat)


def _keys(
    source: Source, recipe: Recipe, columns: Columns, picked: Ints, again: Ints, epoch: int
) -> NDArray[np.uint64]:
    """[R] sort keys of rows of one source, each of which appeared ``again`` times before."""
    row_id, window = (columns.arrays[n][picked] for n in ("row_id", "window"))
    keys = np.empty(len(picked), np.uint64)
    for one in np.unique(again).tolist():
        some = again == one
        keys[some] = order_keys(recipe.seed, source.key_name(one), epoch, row_id[some], window[some])
    return keys


def _any_equal(keys: NDArray[np.uint64], order: Ints) -> bool:
    """Whether two of the keys, which ``order`` sorts, are the same."""
    for first in range(0, len(keys), _STEP):
        some = keys[order[first : first + _STEP + 1]]
        if (some[1:] == some[:-1]).any():
            return True
    return False


def size_of(sources: Sources, recipe: Recipe, columns: Columns, epoch: int) -> tuple[int, int]:
    """Rows and tokens of an epoch."""
    rows = tokens = 0
    for source, first, stop in _steps(sources, columns):
        times = _times(source, recipe, columns, first, stop, epoch)
        rows += int(times.sum())
        tokens += int((times * columns.lengths[first:stop]).sum())
    return rows, tokens


def bins_of(columns: Columns, limit: int, order: Order, size: tuple[int, int]) -> Bins:
    """What is in each row of an epoch where rows of at most ``limit`` tokens are packed: about 32 bytes a document.

    Pieces of rows that are cut are left out where they have nothing to train on behind their first token. ``size`` is
    that of the epoch.
    """
    lengths = columns.lengths[order.index].astype(np.int64)
    segments = cut(lengths, limit)
    kept = np.ones(len(segments), np.bool_)
    starts, flags = columns.starts[order.index], columns.arrays.whole("loss_mask")
    for s in np.flatnonzero(lengths[segments.position] > limit).tolist():
        begin = starts[segments.position[s]]
        kept[s] = flags[begin + segments.start[s] + 1 : begin + segments.stop[s]].any()
    return pack(segments[kept], limit, block_rows(*size))


def cut_rows(columns: Columns, limit: int, order: Order) -> tuple[int, int]:
    """Rows of an epoch that are longer than ``limit``, and the pieces that all its rows are cut into."""
    lengths = columns.lengths[order.index].astype(np.int64)
    return int((lengths > limit).sum()), int((-(-lengths // limit)).sum())


def _steps(sources: Sources, columns: Columns) -> list[tuple[Source, int, int]]:
    """Rows of one source at a time, ``_STEP`` or fewer."""
    edges = np.searchsorted(columns.arrays["source"], np.arange(len(sources.all) + 1)).tolist()
    found = []
    for source, first, stop in zip(sources.all, edges[:-1], edges[1:], strict=True):
        found += [(source, a, min(a + _STEP, stop)) for a in range(first, stop, _STEP)]
    return found


def _times(source: Source, recipe: Recipe, columns: Columns, first: int, stop: int, epoch: int) -> NDArray[np.int64]:
    """[R] how often each row appears in an epoch."""
    times = np.full(stop - first, source.times, np.int64)
    if source.share:
        row_id, window = (columns.arrays[n][first:stop] for n in ("row_id", "window"))
        key, one_each = stream_key(recipe.seed, CHOOSE, source.name), np.ones(len(times), np.int64)
        times += token_words(key, row_id, window, one_each, epoch) < rate_limit(np.array([source.share]))
    return times
