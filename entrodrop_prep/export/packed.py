"""The packed rows of an epoch: planned from one look at the lengths, made a block of rows at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from entrodrop_prep.export.assembly import Held, Packed, assemble, hold
from entrodrop_prep.export.epoch import FromPlace, Layout, Piece, ShardCounts, Tables
from entrodrop_prep.export.order import Order
from entrodrop_prep.export.packing import Bins, PackedSize, Segments, block_rows, cut, pack


@dataclass(frozen=True)
class _Index:
    """The rows of an epoch in no matter what order: what their places follow from, and their segments."""

    ties: pa.RecordBatch
    segments: Segments
    """``place`` is the row's number here."""
    rows_cut: int
    pieces_left_out: int


class Packer:
    """Plans of epochs. A few numbers a row are held, and one plan at a time."""

    def __init__(self, order: Order, limit: int) -> None:
        self._order, self._limit = order, limit
        self._indexed: tuple[int, _Index] | None = None
        self._planned: tuple[int, Bins] | None = None

    def size(self, epoch: int, rows: int, tokens: int) -> PackedSize:
        """How many packed rows an epoch of so many rows and tokens has."""
        bins, index = self.plan(epoch, rows, tokens), self._index(epoch)
        return PackedSize(self._limit, len(bins), bins.tokens(), index.rows_cut, index.pieces_left_out)

    def plan(self, epoch: int, rows: int, tokens: int) -> Bins:
        """What is in each packed row."""
        if self._planned is None or self._planned[0] != epoch:
            index = self._index(epoch)
            place = self._order.places(index.ties, epoch)[index.segments.place]
            segments = Segments(place, index.segments.start, index.segments.stop)
            by_place = segments[np.argsort(segments.keys)]
            self._planned = epoch, pack(by_place, self._limit, block_rows(rows, tokens))
        return self._planned[1]

    def _index(self, epoch: int) -> _Index:
        """One pass over the rows; the same for all epochs where they hold the same rows."""
        number = epoch if self._order.varies else 0
        if self._indexed is None or self._indexed[0] != number:
            self._indexed = number, self._read(epoch)
        return self._indexed[1]

    def _read(self, epoch: int) -> _Index:
        rows = rows_cut = left_out = 0
        ties: list[pa.RecordBatch] = []
        found: list[Segments] = []
        for batch in self._order.batches(epoch):
            lengths = np.diff(batch.column("input_ids").offsets.to_numpy()).astype(np.int64)
            segments = cut(lengths, self._limit)
            flags = batch.column("loss_mask").flatten().to_numpy(zero_copy_only=False)
            running = np.concatenate([[0], np.cumsum(flags)])
            begin = (np.cumsum(lengths) - lengths)[segments.place]
            kept = running[begin + segments.stop] > running[begin + segments.start + 1]
            found.append(Segments(segments.place + rows, segments.start, segments.stop)[kept])
            ties.append(batch.select(list(self._order.ties)))
            rows += len(lengths)
            rows_cut += int((lengths > self._limit).sum())
            left_out += int((~kept).sum())
        every = Segments(*(np.concatenate([getattr(s, n) for s in found]) for n in ("place", "start", "stop")))
        together = pa.Table.from_batches(ties).combine_chunks().to_batches()[0]
        return _Index(together, every, rows_cut, left_out)


class PackedReader:
    """Packed, masked row groups of one part, shard by shard in ascending order; as ``Reader`` for whole rows."""

    def __init__(
        self,
        schema: pa.Schema,
        layout: Layout,
        shards: list[int],
        tables: Tables,
        rates: Callable[[int, int], NDArray[np.float64]],
        mask: Callable[[pa.Table, NDArray[np.float64]], list[Piece]],
        whole: Layout,
        bins: Bins,
    ) -> None:
        """``layout`` is that of the packed rows, ``whole`` that of the epoch's rows, to which all else belongs."""
        self._schema, self._layout, self._rates, self._mask = schema, layout, rates, mask
        self._whole, self._bins = whole, bins
        asked = [layout.places(s) for s in shards]
        needed = [(bins.block_of(a) * bins.block, (bins.block_of(b - 1) + 1) * bins.block) for a, b in asked if b > a]
        self._rows = FromPlace(tables(lambda first, stop: any(a < stop and first < b for a, b in needed)))
        self._held: tuple[int, Held] | None = None
        self._names: list[str] = []

    def shard(self, shard: int, counts: ShardCounts) -> Iterator[pa.Table]:
        """The row groups of a shard; ``counts`` is filled on the way."""
        first, stop = self._layout.places(shard)
        while first < stop:
            end = min(first + self._layout.rows_per_group, stop)
            yield pa.concat_tables(list(self._made(first, end, counts))).combine_chunks()
            first = end

    def _made(self, first: int, stop: int, counts: ShardCounts) -> Iterator[pa.Table]:
        """Packed rows ``first`` to ``stop - 1``, those of one block at a time."""
        while first < stop:
            block = self._bins.block_of(first)
            end = min(stop, int(self._bins.blocks[block + 1]))
            held = self._block(block)
            packed = assemble(held, self._bins, first, end)
            del held  # at the next block it would be a second one in memory
            _count(packed, self._names, counts)
            yield packed.stored.table(self._schema)
            first = end

    def _block(self, block: int) -> Held:
        """The segments of a block of rows, masked."""
        if self._held is None or self._held[0] != block:
            self._held = None
            size = self._whole.rows + self._whole.left_out
            first, stop = block * self._bins.block, min((block + 1) * self._bins.block, size)
            bins = slice(*self._bins.offsets[self._bins.blocks[block : block + 2]])
            segments = self._bins.segments[bins]
            segments = segments[np.argsort(segments.keys)]
            groups = range(first, stop, self._whole.rows_per_group)
            parts = (
                part
                for group in groups
                for part in self._masked(group, min(group + self._whole.rows_per_group, stop), segments)
            )
            self._held = block, Held.joined(parts, len(segments), int(segments.lengths.sum()))
        return self._held[1]

    def _masked(self, first: int, stop: int, segments: Segments) -> Iterator[Held]:
        """Rows at places [first, stop) of each source, cut into their segments."""
        rates = self._rates(first, stop - first)
        a, b = np.searchsorted(segments.place, [first, stop])
        some = segments[slice(a, b)]
        for piece in self._mask(self._rows.take(first, stop), rates):
            places = np.arange(stop - first) if piece.places is None else piece.places
            row = np.full(stop - first, -1)
            row[places] = np.arange(len(places))
            number = row[some.place - first]
            if piece.source not in self._names:
                self._names.append(piece.source)
            mine, source = number >= 0, self._names.index(piece.source)
            yield hold(piece.rows, piece.masked, rates[places], source, number[mine], some[mine])


def _count(packed: Packed, names: list[str], counts: ShardCounts) -> None:
    """Add what some packed rows hold."""
    rates = packed.rates
    counts.rates[:] = [min(counts.rates[0], float(rates.min())), max(counts.rates[1], float(rates.max()))]
    counts.rows += len(packed.stored.trainable)
    for number in np.unique(packed.source).tolist():
        figures = packed.figures[packed.source == number]
        counts.add_documents(names[number], len(figures), figures.sum(axis=0).tolist())
