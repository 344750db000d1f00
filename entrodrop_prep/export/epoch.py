"""One epoch as files: its rows cut into row groups and shards at positions that nothing else decides."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from entrodrop_prep.errors import IntegrityError
from entrodrop_prep.masking.assembly import FIGURES
from entrodrop_prep.masking.epoch_rows import Made
from entrodrop_prep.masking.packing import PackedSize
from entrodrop_prep.store.digest import ContentDigest
from entrodrop_prep.store.layout import VALIDATION
from entrodrop_prep.store.shards import read_batches, read_footer

GROUP_TOKENS = 1 << 18
COUNTS = FIGURES


@dataclass
class ShardCounts:
    """What masking did to the rows of one shard."""

    rows: int = 0
    values: dict[str, int] = field(default_factory=lambda: dict.fromkeys(COUNTS, 0))
    rates: list[float] = field(default_factory=lambda: [1.0, 0.0])
    sources: dict[str, dict[str, int]] | None = None
    """Rows and figures of each source, where they are kept."""

    def add(self, made: Made, names: Sequence[str], *, packed: bool) -> None:
        """Count rows of sources with these ``names``; those of ``packed`` rows are their documents."""
        self.rates = [min(self.rates[0], made.rates[0]), max(self.rates[1], made.rates[1])]
        self.rows += len(made.stored.offsets) - 1
        for number, documents, values in made.counts:
            figures = dict(zip(COUNTS, values, strict=True))
            add_counts(self.values, {"documents": documents, **figures} if packed else figures)
            if self.sources is not None:
                of_source = self.sources.setdefault(names[number], {})
                add_counts(of_source, {"documents" if packed else "rows": documents, **figures})

    def merge(self, other: ShardCounts) -> None:
        """Add what another counted."""
        self.rates = [min(self.rates[0], other.rates[0]), max(self.rates[1], other.rates[1])]
        self.rows += other.rows
        add_counts(self.values, other.values)
        if self.sources is not None:
            for name, figures in (other.sources or {}).items():
                add_counts(self.sources.setdefault(name, {}), figures)

    def info(self) -> dict[str, Any]:
        """As stored in the shard's footer. It keeps counting."""
        by_source = {} if self.sources is None else {"sources": self.sources}
        return {"counts": self.values, "rates": self.rates, **by_source}


def add_counts(total: dict[str, int], more: dict[str, int]) -> None:
    """Add figures by name, in place."""
    for name, value in more.items():
        total[name] = total.get(name, 0) + value


@dataclass(frozen=True)
class Layout:
    """How rows fall into files: shard k holds positions [k * rows_per_shard, (k + 1) * rows_per_shard).

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

    def positions(self, shard: int) -> tuple[int, int]:
        """First position of a shard, and the one after its last."""
        return shard * self.rows_per_shard, min((shard + 1) * self.rows_per_shard, self.rows)

    def groups(self, shard: int) -> Iterator[slice]:
        """The positions of each row group of a shard."""
        first, stop = self.positions(shard)
        for begin in range(first, stop, self.rows_per_group):
            yield slice(begin, min(begin + self.rows_per_group, stop))


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
