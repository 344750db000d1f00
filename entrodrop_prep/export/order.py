"""Rows in training order, at bounded memory.

An external bucket sort. Keys are uniform 64-bit numbers, so their top bits split the rows evenly: one pass over the
scored shards deals the rows into bucket files, then each bucket is loaded, sorted and passed on. The order is that of
(key, row_id, window) and depends on nothing else.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from entrodrop_prep.sample.counter import order_keys
from entrodrop_prep.scored import ScoredDataset
from entrodrop_prep.shards import writing

BUCKET_BYTES = 32 << 20
MAX_BUCKETS = 512
_KEY = "order_key"

Wanted = Callable[[int, int], bool]


def payload_columns(scored: ScoredDataset) -> list[str]:
    """The columns that masks are made from."""
    return ["row_id", "window", "input_ids", scored.score, *(["logprob"] if scored.has_logprob else []), "loss_mask"]


def payload_bytes(scored: ScoredDataset, tokens: int) -> int:
    """Bytes of ``tokens`` in those columns."""
    scores = 2 if scored.has_logprob else 1
    return tokens * (4 + scores * scored.score_dtype.itemsize + 1)


def has_label(lists: pa.ListArray) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """[R] whether any token of each row is trainable (position 0 never is)."""
    flags = lists.flatten().to_numpy(zero_copy_only=False).astype(np.int64)
    offsets = lists.offsets.to_numpy().astype(np.int64)
    offsets -= offsets[0]
    flags[offsets[:-1][np.diff(offsets) > 0]] = 0
    running = np.concatenate([[0], np.cumsum(flags)])
    result: np.ndarray[Any, np.dtype[np.bool_]] = running[offsets[1:]] > running[offsets[:-1]]
    return result


def trainable_batches(scored: ScoredDataset, columns: list[str] | None = None) -> Iterator[pa.RecordBatch]:
    """The rows that have something to train on, in the source's order; ``columns`` are those masks are made from."""
    for batch in scored.batches(columns or payload_columns(scored)):
        keep = has_label(batch.column("loss_mask"))
        yield batch if keep.all() else batch.filter(pa.array(keep))


def tables_of(batches: Iterator[pa.RecordBatch], wanted: Wanted) -> Iterator[tuple[int, pa.Table]]:
    """``(place of the first row, rows)`` in the order they come; parts that are not ``wanted`` are left out."""
    place = 0
    for batch in batches:
        if wanted(place, place + batch.num_rows):
            yield place, pa.Table.from_batches([batch])
        place += batch.num_rows


class Order:
    """The rows of one epoch in training order."""

    ties: tuple[str, ...] = ("row_id", "window")
    """What decides between equal keys."""

    def __init__(
        self, scored: ScoredDataset, *, shuffle: str, seed: int, source: str, tmp: Path, total_bytes: int
    ) -> None:
        """Nothing is read yet.

        Args:
            scored: where the rows are.
            shuffle: ``epoch``, ``once`` or ``none``, as in the recipe.
            seed: the recipe's seed.
            source: name of the dataset in the masks' keys.
            tmp: folder for the bucket files; made and removed here.
            total_bytes: about how much the rows hold, to size the buckets.
        """
        self._scored, self._shuffle, self._seed, self._source, self._tmp = scored, shuffle, seed, source, tmp
        self._buckets = int(np.clip(-(-total_bytes // BUCKET_BYTES), 1, MAX_BUCKETS))
        self._dealt: tuple[tuple[int, int], list[int]] | None = None

    @property
    def score(self) -> str:
        """The column of the rows that masks are made from."""
        return self._scored.score

    @property
    def rows_per_batch(self) -> int:
        """Rows that hold about 260,000 tokens."""
        return self._scored.rows_per_batch

    @property
    def varies(self) -> bool:
        """Whether the rows of one epoch are others than those of another."""
        return False

    def schema(self) -> pa.Schema:
        """Of the rows."""
        return pa.schema([self._scored.schema.field(n) for n in payload_columns(self._scored)])

    def batches(self, epoch: int) -> Iterator[pa.RecordBatch]:
        """The rows of an epoch in the order of ``--shuffle none``."""
        return trainable_batches(self._scored)

    def keys(self, batch: pa.RecordBatch, epoch: int) -> np.ndarray[Any, np.dtype[np.uint64]]:
        """[R] the rows' keys in the order of ``epoch``."""
        row_id, window = (batch.column(n).to_numpy() for n in ("row_id", "window"))
        return order_keys(self._seed, self._source, epoch, row_id, window)

    def tables(self, epoch: int, wanted: Wanted) -> Iterator[tuple[int, pa.Table]]:
        """``(place of the first row, rows)`` in order.

        Parts for which ``wanted(first, stop)`` is false may be left out.
        """
        if self._shuffle == "none":
            yield from tables_of(self.batches(epoch), wanted)
            return
        counts = self._deal(epoch if self._shuffle == "epoch" else 0, epoch if self.varies else 0)
        place = 0
        for bucket, rows in enumerate(counts):
            if rows and wanted(place, place + rows):
                for first, table in self._sorted(bucket):
                    yield place + first, table
            place += rows

    def close(self) -> None:
        """Remove the bucket files."""
        shutil.rmtree(self._tmp, ignore_errors=True)

    def _file(self, bucket: int) -> Path:
        return self._tmp / f"bucket-{bucket:05d}.arrow"

    def _deal(self, order_of: int, rows_of: int) -> list[int]:
        """Deal the rows of one epoch into bucket files by their keys in another; returns the rows of each bucket."""
        if self._dealt and self._dealt[0] == (order_of, rows_of):
            return self._dealt[1]
        self.close()
        counts = [0] * self._buckets
        schema = self.schema().append(pa.field(_KEY, pa.uint64()))
        options = pa.ipc.IpcWriteOptions(compression="lz4")
        with writing(self._tmp), ExitStack() as stack:
            self._tmp.mkdir(parents=True)
            writers = [
                stack.enter_context(
                    pa.ipc.new_stream(stack.enter_context(pa.OSFile(str(self._file(b)), "wb")), schema, options=options)
                )
                for b in range(self._buckets)
            ]
            for batch in self.batches(rows_of):
                keys = self.keys(batch, order_of)
                bucket = ((keys >> np.uint64(32)) * np.uint64(self._buckets) >> np.uint64(32)).astype(np.int64)
                by_bucket = np.argsort(bucket, kind="stable")
                dealt = batch.append_column(_KEY, pa.array(keys)).take(pa.array(by_bucket))
                ends = np.searchsorted(bucket[by_bucket], np.arange(self._buckets + 1))
                for b in range(self._buckets):
                    if ends[b + 1] > ends[b]:
                        writers[b].write_batch(dealt.slice(ends[b], ends[b + 1] - ends[b]))
                        counts[b] += int(ends[b + 1] - ends[b])
        self._dealt = ((order_of, rows_of), counts)
        return counts

    def _sorted(self, bucket: int) -> Iterator[tuple[int, pa.Table]]:
        """A bucket's rows in order, about 260,000 tokens at a time."""
        with pa.OSFile(str(self._file(bucket)), "rb") as f, pa.ipc.open_stream(f) as reader:
            table = reader.read_all().combine_chunks()
        order = pc.sort_indices(table, sort_keys=[(name, "ascending") for name in (_KEY, *self.ties)])
        step = self.rows_per_batch
        table = table.drop_columns([_KEY])
        for first in range(0, len(order), step):
            yield first, table.take(order.slice(first, step))
