"""Which scored rows stand at which place of an epoch: a permutation in memory, the order of ``materialize``."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from entrodrop_prep.export.job import Job
from entrodrop_prep.export.packing import Bins, block_rows, cut, pack
from entrodrop_prep.training.columns import Columns

_STEP = 1 << 20


@dataclass(frozen=True)
class Standing:
    """The rows of one epoch in training order."""

    index: NDArray[np.int64]
    """[R] numbers of rows of ``Columns``."""
    repeat: NDArray[np.int32] | None
    """[R] how many times each stands before in the same epoch; None where each stands once."""


def standing(job: Job, columns: Columns, epoch: int) -> Standing:
    """The order of ``epoch``: 8 bytes a row, 12 where rows stand more than once; about 50 while it is made.

    Rows of ``Columns`` stand by (source, row_id, window), and a stable sort by key keeps that among equal keys.
    """
    parts = [_some(job, columns, epoch, first) for first in range(0, len(columns), _STEP)]
    index, repeat, keys = (np.concatenate([p[i] for p in parts]) for i in range(3))
    del parts
    if job.config.shuffle != "none":
        order = np.argsort(keys, kind="stable")
        index, repeat = index[order], repeat[order]
    return Standing(index, repeat if repeat.any() else None)


def packing(job: Job, columns: Columns, epoch: int, limit: int, order: Standing) -> Bins:
    """What is in each row of ``epoch`` where rows of at most ``limit`` tokens are packed: about 32 bytes a document.

    Pieces of rows that are cut are left out where they have nothing to train on behind their first token.
    """
    lengths = columns.lengths[order.index].astype(np.int64)
    segments = cut(lengths, limit)
    kept = np.ones(len(segments), np.bool_)
    starts, flags = columns.starts[order.index], columns.whole("loss_mask")
    for s in np.flatnonzero(lengths[segments.place] > limit).tolist():
        begin = starts[segments.place[s]]
        kept[s] = flags[begin + segments.start[s] + 1 : begin + segments.stop[s]].any()
    return pack(segments[kept], limit, block_rows(*job.size(epoch)))


def order_varies(job: Job) -> bool:
    """Whether one epoch's order is another than the next one's; if not, that of epoch 0 is that of all."""
    return job.config.shuffle == "epoch" or any(s.share for s in job.sources.all)


def _some(
    job: Job, columns: Columns, epoch: int, first: int
) -> tuple[NDArray[np.int64], NDArray[np.int32], NDArray[np.uint64]]:
    """Number, repeat and key of what stands in an epoch of the rows from ``first`` on."""
    some = slice(first, first + _STEP)
    names = ("source", "row_id", "window")
    rows = pa.RecordBatch.from_arrays([pa.array(columns.arrays[n][some]) for n in names], names)
    times = job.times(rows, epoch)
    picked = np.repeat(np.arange(len(times)), times)
    repeat = (np.arange(len(picked)) - np.repeat(np.cumsum(times) - times, times)).astype(np.int32)
    if job.config.shuffle == "none":
        return first + picked, repeat, np.empty(0, np.uint64)
    standing = rows.take(pa.array(picked)).append_column("repeat", pa.array(repeat))
    return first + picked, repeat, job.keys(standing, epoch if job.config.shuffle == "epoch" else 0)
