"""One epoch as files: rows in order, masked, cut into row groups and shards at places that nothing else decides."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from entrodrop_prep.digest import ContentDigest
from entrodrop_prep.errors import IntegrityError
from entrodrop_prep.export.order import Order
from entrodrop_prep.export.plan import Corpus
from entrodrop_prep.sample.curriculum import row_rates
from entrodrop_prep.sample.mask import MaskPlan, apply
from entrodrop_prep.schema import masked_schema
from entrodrop_prep.scored import to_rows
from entrodrop_prep.shards import read_batches, read_footer

GROUP_TOKENS = 1 << 18
SHARD_FILES = "epoch_*/*.parquet"
COUNTS = ("tokens", "trainable", "eligible", "dropped", "labels_left")
SCHEMA = masked_schema()


@dataclass
class ShardCounts:
    """What masking did to the rows of one shard."""

    rows: int = 0
    values: dict[str, int] = field(default_factory=lambda: dict.fromkeys(COUNTS, 0))
    rates: list[float] = field(default_factory=lambda: [1.0, 0.0])

    def info(self) -> dict[str, Any]:
        """As stored in the shard's footer."""
        return {"counts": self.values, "rates": self.rates}


@dataclass(frozen=True)
class Layout:
    """How the rows of an epoch fall into files: shard k holds places [k * rows_per_shard, (k + 1) * rows_per_shard)."""

    rows: int
    rows_per_shard: int
    rows_per_group: int

    @classmethod
    def of(cls, corpus: Corpus, rows_per_shard: int) -> Layout:
        """Row groups of about 260,000 tokens."""
        group = int(np.clip(GROUP_TOKENS * corpus.rows // max(1, corpus.tokens), 1, 1 << 16))
        return cls(corpus.rows, rows_per_shard, min(group, rows_per_shard))

    @property
    def shards(self) -> int:
        """Files in an epoch."""
        return -(-self.rows // self.rows_per_shard)

    def places(self, shard: int) -> tuple[int, int]:
        """First place of a shard and the place behind its last."""
        return shard * self.rows_per_shard, min((shard + 1) * self.rows_per_shard, self.rows)

    def name(self, epoch: int, shard: int) -> str:
        """``epoch_003/train-00000-of-00004.parquet``."""
        return f"{folder(epoch)}/train-{shard:05d}-of-{self.shards:05d}.parquet"


def folder(epoch: int) -> str:
    """``epoch_003``."""
    return f"epoch_{epoch:03d}"


def check_content(path: Path) -> None:
    """A masked file holds the rows it was written with. Reads all of it; raises IntegrityError if not."""
    content = ContentDigest(SCHEMA)
    for batch in read_batches(path):
        content.update(batch)
    if content.hexdigest() != read_footer(path).content_digest:
        raise IntegrityError("its rows are not those that were written", where=str(path), fix="remove it and run again")


class EpochReader:
    """Masked row groups of one epoch, shard by shard in ascending order; shards not asked for cost little."""

    def __init__(self, plan: MaskPlan, order: Order, layout: Layout, epoch: int, shards: list[int]) -> None:
        self._plan, self._layout, self._epoch = plan, layout, epoch
        self._score = order.score
        asked = [layout.places(s) for s in shards]
        self._tables = order.tables(epoch, lambda first, stop: any(a < stop and first < b for a, b in asked))
        self._place, self._held = 0, SCHEMA.empty_table()

    def shard(self, shard: int, counts: ShardCounts) -> Iterator[pa.Table]:
        """The row groups of a shard; ``counts`` is filled on the way."""
        first, stop = self._layout.places(shard)
        while first < stop:
            end = min(first + self._layout.rows_per_group, stop)
            table = pa.concat_tables(list(self._take(first, end)))
            yield self._masked(table, first, counts)
            first = end

    def _take(self, first: int, stop: int) -> Iterator[pa.Table]:
        """Rows at places [first, stop), whatever pieces they come in."""
        while first < stop:
            if self._place + len(self._held) <= first:
                self._place, self._held = next(self._tables)
                continue
            skip = first - self._place
            part = self._held.slice(skip, stop - first)
            yield part
            first += len(part)

    def _masked(self, table: pa.Table, place: int, counts: ShardCounts) -> pa.Table:
        """A row group as it is trained on."""
        rows = to_rows(table, self._score)
        rates = row_rates(self._plan.recipe, self._epoch, place, len(table), self._layout.rows)
        masked = apply(rows, self._plan, self._epoch, rates)
        counts.rows += len(table)
        counts.rates[:] = [min(counts.rates[0], float(rates.min())), max(counts.rates[1], float(rates.max()))]
        for name, value in zip(
            COUNTS,
            (rows.lengths, masked.trainable, masked.eligible, masked.dropped_count, masked.labels_left),
            strict=True,
        ):
            counts.values[name] += int(value.sum())
        offsets = pa.array(rows.offsets.astype(np.int32))
        columns = (masked.input_ids, np.ones(len(rows.input_ids), np.int8), masked.labels)
        lists = [
            pa.ListArray.from_arrays(offsets, pa.array(values), type=f.type)
            for f, values in zip(SCHEMA, columns, strict=True)
        ]
        return pa.table(lists, schema=SCHEMA)
