"""Rows as they are stored, made for any places of an epoch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from entrodrop_prep.export.assembly import Held, assemble, hold
from entrodrop_prep.export.columns import Stored, positions
from entrodrop_prep.export.job import Job
from entrodrop_prep.export.packing import Bins
from entrodrop_prep.masking.curriculum import rates_at
from entrodrop_prep.masking.mask import Masked
from entrodrop_prep.store.rows import Rows
from entrodrop_prep.training.columns import Columns
from entrodrop_prep.training.places import Standing, order_varies, packing, standing

T = TypeVar("T")

_KEPT = 2
"""Epochs whose order is kept: a batch may hold the end of one and the start of the next."""


class Maker:
    """Makes the rows of a surveyed job from the scored ones."""

    def __init__(self, job: Job, columns: Columns) -> None:
        self._job, self._columns = job, columns
        self._orders: dict[int, Standing] = {}
        self._bins: dict[int, Bins] = {}

    def stored(self, epoch: int, places: NDArray[np.int64]) -> Iterator[tuple[NDArray[np.int64], Stored]]:
        """``(which of places, the rows there)``, until each of ``places`` [n], which ascend, was among them."""
        if self._job.config.pack:
            yield from self._packed(epoch, places)
            return
        for at, rows, masked, _ in self._masked(epoch, places):
            one_each = np.arange(len(at) + 1)
            yield at, Stored(rows.offsets, masked.input_ids, masked.labels, masked.trainable, rows.lengths, one_each)

    def _packed(self, epoch: int, places: NDArray[np.int64]) -> Iterator[tuple[NDArray[np.int64], Stored]]:
        bins = self._bins_of(epoch)
        ends = zip(bins.offsets[places].tolist(), bins.offsets[places + 1].tolist(), strict=True)
        segments = bins.segments[np.concatenate([np.arange(a, b) for a, b in ends])]
        whole = np.unique(segments.place)
        held = []
        for at, rows, masked, rates in self._masked(epoch, whole):
            number = np.full(len(whole), -1)
            number[at] = np.arange(len(at))
            row = number[np.searchsorted(whole, segments.place)]
            mine = row >= 0
            held.append(hold(rows, masked, rates, 0, row[mine], segments[mine]))
        together = Held.joined(held, len(segments), int(segments.lengths.sum()))
        for run in np.split(np.arange(len(places)), np.flatnonzero(np.diff(places) != 1) + 1):
            yield run, assemble(together, bins, int(places[run[0]]), int(places[run[-1]]) + 1).stored

    def _masked(
        self, epoch: int, places: NDArray[np.int64]
    ) -> Iterator[tuple[NDArray[np.int64], Rows, Masked, NDArray[np.float64]]]:
        """``(which of places, their rows, as they are trained on, their rates)``, of one source and repeat together."""
        order = self._order(epoch)
        rates = rates_at(self._job.config, epoch, places, len(order.index))
        index = order.index[places]
        repeat = np.zeros(len(places), np.int32) if order.repeat is None else order.repeat[places]
        part = self._columns.arrays["source"][index].astype(np.int64) << 32 | repeat
        for one in np.unique(part).tolist():
            some = np.flatnonzero(part == one)
            rows = self._columns.rows(index[some])
            yield some, rows, self._job.masked(rows, one >> 32, one & 0xFFFFFFFF, epoch, rates[some]), rates[some]

    def _order(self, epoch: int) -> Standing:
        epoch = epoch if order_varies(self._job) else 0
        return _kept(self._orders, epoch, lambda: standing(self._job, self._columns, epoch))

    def _bins_of(self, epoch: int) -> Bins:
        limit, order = self._job.config.pack or 0, self._order(epoch)
        return _kept(self._bins, epoch, lambda: packing(self._job, self._columns, epoch, limit, order))


def _kept(made: dict[int, T], epoch: int, make: Callable[[], T]) -> T:
    """What was made for an epoch, or is made now; that of the epoch made first goes."""
    if epoch not in made:
        if len(made) == _KEPT:
            del made[next(iter(made))]
        made[epoch] = make()
    return made[epoch]


def values_of(stored: Stored, column: str) -> list[Any]:
    """A column of [R] rows as Python values: lists of a row's tokens or documents, or numbers."""
    if column == "n_trainable":
        return list(stored.trainable.tolist())
    offsets = stored.documents if column == "seq_lengths" else stored.offsets
    spans = list(pairwise(offsets.tolist()))
    if column == "attention_mask":
        return [[1] * (b - a) for a, b in spans]
    flat: dict[str, Callable[[], NDArray[Any]]] = {
        "input_ids": lambda: stored.input_ids,
        "labels": lambda: stored.labels,
        "position_ids": lambda: positions(stored.lengths),
        "seq_lengths": lambda: stored.lengths,
    }
    values = flat[column]()
    return [values[a:b].tolist() for a, b in spans]
