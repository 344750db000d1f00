"""One epoch as files: rows in order, masked, cut into row groups and shards at places that nothing else decides."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from entrodrop_prep.errors import IntegrityError
from entrodrop_prep.export.assembly import FIGURES
from entrodrop_prep.export.columns import Stored
from entrodrop_prep.export.order import Wanted
from entrodrop_prep.export.packing import PackedSize
from entrodrop_prep.masking.mask import Masked
from entrodrop_prep.store.digest import ContentDigest
from entrodrop_prep.store.layout import VALIDATION
from entrodrop_prep.store.rows import Rows
from entrodrop_prep.store.shards import read_batches, read_footer

GROUP_TOKENS = 1 << 18
COUNTS = FIGURES


Tables = Callable[[Wanted], Iterator[tuple[int, pa.Table]]]
"""Gives ``(place of the first, rows)`` in order; may leave out what is not wanted."""


@dataclass(frozen=True)
class Piece:
    """Some rows of a table, of one source, as they are trained on."""

    source: str
    places: NDArray[np.int64] | None
    """[R] which rows of the table; None for all of them, in order."""
    rows: Rows
    masked: Masked


@dataclass
class ShardCounts:
    """What masking did to the rows of one shard."""

    rows: int = 0
    values: dict[str, int] = field(default_factory=lambda: dict.fromkeys(COUNTS, 0))
    rates: list[float] = field(default_factory=lambda: [1.0, 0.0])
    sources: dict[str, dict[str, int]] | None = None
    """Rows and figures of each source, where they are kept."""

    def add(self, piece: Piece) -> None:
        """Count a piece."""
        rows, masked = piece.rows, piece.masked
        added = (rows.lengths, masked.trainable, masked.eligible, masked.dropped_count, masked.labels_left)
        figures = {name: int(value.sum()) for name, value in zip(COUNTS, added, strict=True)}
        self.rows += len(rows.row_id)
        add_counts(self.values, figures)
        if self.sources is not None:
            of_source = self.sources.setdefault(piece.source, {})
            add_counts(of_source, {"rows": len(rows.row_id), **figures})

    def add_documents(self, source: str, documents: int, figures: list[int]) -> None:
        """Count documents of packed rows, whose ``rows`` are the caller's to count; ``figures`` are those of COUNTS."""
        counted = {"documents": documents, **dict(zip(COUNTS, figures, strict=True))}
        add_counts(self.values, counted)
        if self.sources is not None:
            add_counts(self.sources.setdefault(source, {}), counted)

    def info(self) -> dict[str, Any]:
        """As stored in the shard's footer. It goes on counting."""
        by_source = {} if self.sources is None else {"sources": self.sources}
        return {"counts": self.values, "rates": self.rates, **by_source}


def add_counts(total: dict[str, int], more: dict[str, int]) -> None:
    """Add figures by name, in place."""
    for name, value in more.items():
        total[name] = total.get(name, 0) + value


@dataclass(frozen=True)
class Layout:
    """How rows fall into files: shard k holds places [k * rows_per_shard, (k + 1) * rows_per_shard).

    ``rows`` are those that are stored; ``left_out`` more come behind them in the order, ``tokens`` is of them all.
    """

    rows: int
    tokens: int
    rows_per_shard: int
    rows_per_group: int
    left_out: int = 0

    @classmethod
    def of(cls, rows: int, tokens: int, rows_per_shard: int, multiple: int | None = None) -> Layout:
        """Row groups of about 260,000 tokens; the rows a multiple of ``multiple``, which leaves out the last."""
        group = int(np.clip(GROUP_TOKENS * rows // max(1, tokens), 1, 1 << 16))
        left_out = rows % (multiple or 1)
        return cls(rows - left_out, tokens, rows_per_shard, min(group, rows_per_shard), left_out)

    @property
    def shards(self) -> int:
        """Number of files."""
        return -(-self.rows // self.rows_per_shard)

    def places(self, shard: int) -> tuple[int, int]:
        """First place of a shard and the place behind its last."""
        return shard * self.rows_per_shard, min((shard + 1) * self.rows_per_shard, self.rows)


@dataclass(frozen=True)
class Part:
    """A folder of files: an epoch, the plain rows, or the validation rows."""

    folder: str
    layout: Layout
    epoch: int | None = None
    packed: PackedSize | None = None

    def name(self, shard: int) -> str:
        """``epoch_003/train-00000-of-00004.parquet``."""
        return f"{_stem(self.folder, shard)}-of-{self.layout.shards:05d}.parquet"

    @property
    def label(self) -> dict[str, Any]:
        """What footers and the manifest say of its files."""
        return {"part": self.folder} if self.epoch is None else {"epoch": self.epoch}


def folder(epoch: int) -> str:
    """``epoch_003``."""
    return f"epoch_{epoch:03d}"


def _stem(folder: str, shard: int) -> str:
    """``epoch_003/train-00000``."""
    return f"{folder}/{VALIDATION if folder == VALIDATION else 'train'}-{shard:05d}"


def misplaced(name: str, info: dict[str, Any]) -> str | None:
    """What is wrong with a file of this name in the directory whose footer says it is another; None if nothing is."""
    stem = _stem(folder(info["epoch"]) if "epoch" in info else info.get("part", ""), info.get("shard", 0))
    return None if name.startswith(f"{stem}-of-") else f"by its footer it is {stem}"


def check_content(path: Path, schema: pa.Schema) -> None:
    """A masked file holds the rows it was written with. Reads all of it; raises IntegrityError if not."""
    content = ContentDigest(schema)
    for batch in read_batches(path):
        content.update(batch)
    if content.hexdigest() != read_footer(path).content_digest:
        raise IntegrityError("its rows are not those that were written", where=str(path), fix="remove it and run again")


class FromPlace:
    """Rows of a part by their places, ascending, whatever tables they come in."""

    def __init__(self, tables: Iterator[tuple[int, pa.Table]]) -> None:
        self._tables = tables
        self._place, self._held = 0, pa.table({})

    def take(self, first: int, stop: int) -> pa.Table:
        """Rows at places [first, stop)."""
        return pa.concat_tables(list(self._some(first, stop)))

    def _some(self, first: int, stop: int) -> Iterator[pa.Table]:
        while first < stop:
            if self._place + len(self._held) <= first:
                self._place, self._held = next(self._tables)
                continue
            part = self._held.slice(first - self._place, stop - first)
            yield part
            first += len(part)


class Reader:
    """Masked row groups of one part, shard by shard in ascending order; shards not asked for cost little.

    ``schema`` is that of what is given out. ``tables`` gives ``(place, rows)`` of what is wanted, ``rates(place, n)``
    the drop rates of n rows from a place on, and ``mask`` the rows of a table as pieces.
    """

    def __init__(
        self,
        schema: pa.Schema,
        layout: Layout,
        shards: list[int],
        tables: Tables,
        rates: Callable[[int, int], NDArray[np.float64]],
        mask: Callable[[pa.Table, NDArray[np.float64]], list[Piece]],
    ) -> None:
        self._schema, self._layout, self._rates, self._mask = schema, layout, rates, mask
        asked = [layout.places(s) for s in shards]
        self._rows = FromPlace(tables(lambda first, stop: any(a < stop and first < b for a, b in asked)))

    def shard(self, shard: int, counts: ShardCounts) -> Iterator[pa.Table]:
        """The row groups of a shard; ``counts`` is filled on the way."""
        first, stop = self._layout.places(shard)
        while first < stop:
            end = min(first + self._layout.rows_per_group, stop)
            yield self._masked(self._rows.take(first, end), first, counts)
            first = end

    def _masked(self, table: pa.Table, place: int, counts: ShardCounts) -> pa.Table:
        """A row group as it is trained on."""
        rates = self._rates(place, len(table))
        counts.rates[:] = [min(counts.rates[0], float(rates.min())), max(counts.rates[1], float(rates.max()))]
        pieces = self._mask(table, rates)
        for piece in pieces:
            counts.add(piece)
        result = pa.concat_tables([_stored(p).table(self._schema) for p in pieces])
        if len(pieces) == 1:
            return result
        places = np.concatenate([p.places for p in pieces if p.places is not None])
        return result.combine_chunks().take(pa.array(np.argsort(places)))


def _stored(piece: Piece) -> Stored:
    """A piece as it is stored: every row is one document."""
    rows, masked = piece.rows, piece.masked
    one_each = np.arange(len(rows.row_id) + 1)
    return Stored(rows.offsets, masked.input_ids, masked.labels, masked.trainable, rows.lengths, one_each)
