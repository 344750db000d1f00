"""No id of the ``--id-column`` names two rows."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow.compute as pc

from entrodrop_prep.errors import RowError
from entrodrop_prep.scoring.span import ShardInput
from entrodrop_prep.store.shards import read_batches


class UniqueIds:
    """Ids seen so far, as sorted 64-bit hashes: 8 bytes a row."""

    def __init__(self, column: str | None) -> None:
        self._column = column
        self._seen = np.zeros(0, np.uint64)

    def add(self, span: ShardInput) -> None:
        """Raises RowError if an id of the span was there before."""
        if self._column:
            self._add(list(span.ids.values()), [span.wheres[r] for r in span.ids], list(span.ids))

    def add_shard(self, path: Path) -> None:
        """Ids of a finished shard. Raises RowError if one was there before."""
        if self._column:
            batches = read_batches(path, ["id", "row_id", "window"], 1 << 16)
            for first in (batch.filter(pc.equal(batch["window"], 0)) for batch in batches):
                self._add(first["id"].to_pylist(), [path.name] * len(first), first["row_id"].to_pylist())

    def _add(self, ids: list[str], wheres: list[str], rows: list[int]) -> None:
        hashes = np.fromiter(_hashes(ids), np.uint64, len(ids))
        order = np.argsort(hashes, kind="stable")
        twice = np.zeros(len(ids), bool)
        twice[order[1:]] = hashes[order[1:]] == hashes[order[:-1]]
        at = np.searchsorted(self._seen, hashes)
        twice |= self._seen[np.minimum(at, len(self._seen) - 1)] == hashes if len(self._seen) else False
        if twice.any():
            i = int(twice.argmax())
            raise RowError(
                f"row {rows[i]}: the id {ids[i]!r} in column {self._column!r} was there before",
                where=wheres[i],
                fix="choose an --id-column whose values are unique",
            )
        self._seen = np.sort(np.concatenate([self._seen, hashes]))


def _hashes(ids: list[str]) -> Iterator[int]:
    for name in ids:
        yield int.from_bytes(hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big")
