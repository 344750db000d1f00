"""Rows in training order, at bounded memory.

An external bucket sort. Keys are uniform 64-bit numbers, so their top bits split the rows evenly: one pass over the
scored shards deals the rows into files, then each bucket is loaded, sorted and passed on. Where there are more buckets
than files may be open, a file holds several, and is dealt once more when its turn comes. The order is that of (key,
row_id, window) and depends on nothing else.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from entrodrop_prep.masking.counter import order_keys
from entrodrop_prep.store.disk import check_held, writing
from entrodrop_prep.store.scored import ScoredDataset

BUCKET_BYTES = 32 << 20
"""Of a bucket: it is loaded, and copied once while it is sorted."""
ORDER_BYTES = 3 * BUCKET_BYTES
"""Memory that the order of up to MAX_FILES ** 2 buckets (512 GiB) takes, whatever the number of rows."""
MAX_FILES = 128
"""Files open at a time; some systems allow a process 256."""
_KEY = "order_key"

Wanted = Callable[[int, int], bool]


def payload_columns(scored: ScoredDataset) -> list[str]:
    """The columns that masks are made from."""
    return ["row_id", "window", "input_ids", "entropy", *(["logprob"] if scored.has_logprob else []), "loss_mask"]


def payload_bytes(rows: int, tokens: int, scores: int, score_dtype: np.dtype[Any]) -> int:
    """Bytes of rows while they are sorted: ``scores`` columns of scores, the key, and what a mixture adds."""
    return rows * (32 + 4 * (2 + scores)) + tokens * (5 + scores * score_dtype.itemsize)


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
            total_bytes: about how much the rows hold (``payload_bytes``), to size the buckets.
        """
        self._scored, self._shuffle, self._seed, self._source, self._tmp = scored, shuffle, seed, source, tmp
        self._buckets = int(np.clip(-(-total_bytes // BUCKET_BYTES), 1, MAX_FILES**2))
        self._per_file = -(-self._buckets // MAX_FILES)
        self._dealt: tuple[tuple[int, int], list[int]] | None = None
        self._split: int | None = None

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
        counts = self._counts(epoch if self._shuffle == "epoch" else 0, epoch if self.varies else 0)
        place = 0
        for bucket, rows in enumerate(counts):
            if rows and wanted(place, place + rows):
                for first, table in self._sorted(bucket):
                    yield place + first, table
            place += rows

    def places(self, rows: pa.RecordBatch, epoch: int) -> np.ndarray[Any, np.dtype[np.int64]]:
        """[R] the place in ``epoch`` of each of all its rows, which come as ``batches`` gives them, with ``ties``."""
        if self._shuffle == "none":
            return np.arange(rows.num_rows)
        ties = [rows.column(name).to_numpy() for name in self.ties]
        order = np.lexsort((*reversed(ties), self.keys(rows, epoch if self._shuffle == "epoch" else 0)))
        result = np.empty(len(order), np.int64)
        result[order] = np.arange(len(order))
        return result

    def close(self) -> None:
        """Remove the bucket files."""
        shutil.rmtree(self._tmp, ignore_errors=True)

    def _counts(self, order_of: int, rows_of: int) -> list[int]:
        """Deal the rows of one epoch by their keys in another; returns the rows of each bucket."""
        if self._dealt and self._dealt[0] == (order_of, rows_of):
            return self._dealt[1]
        self.close()
        keyed = (
            pa.Table.from_batches([batch.append_column(_KEY, pa.array(self.keys(batch, order_of)))])
            for batch in self.batches(rows_of)
        )
        self._split = None
        counts = self._deal(keyed, self._tmp, range(0, self._buckets, self._per_file))
        self._dealt = ((order_of, rows_of), counts)
        return counts

    def _bucket(self, table: pa.Table) -> np.ndarray[Any, np.dtype[np.int64]]:
        """[R] the bucket of each row: the keys' upper halves as fractions of all buckets."""
        half = np.uint64(32)
        scaled = (table[_KEY].to_numpy() >> half) * np.uint64(self._buckets)
        found: np.ndarray[Any, np.dtype[np.int64]] = (scaled >> half).astype(np.int64)
        return found

    def _deal(self, tables: Iterator[pa.Table], folder: Path, firsts: range) -> list[int]:
        """Deal rows into files of ``firsts.step`` buckets each, named by the first; returns the rows of each bucket."""
        counts = np.zeros(self._buckets, np.int64)
        schema = self.schema().append(pa.field(_KEY, pa.uint64()))
        options = pa.ipc.IpcWriteOptions(compression="lz4")
        with writing(folder), ExitStack() as stack:
            check_held(folder)
            folder.mkdir(parents=True)
            files = [stack.enter_context(pa.OSFile(str(_file(folder, first)), "wb")) for first in firsts]
            writers = [stack.enter_context(pa.ipc.new_stream(f, schema, options=options)) for f in files]
            for table in tables:
                bucket = self._bucket(table)
                counts += np.bincount(bucket, minlength=self._buckets)
                file = ((bucket - firsts.start) // firsts.step).astype(np.uint8)
                by_file = np.argsort(file, kind="stable")
                dealt = table.take(pa.array(by_file))
                ends = np.searchsorted(file[by_file], np.arange(len(firsts) + 1)).tolist()
                for writer, (a, b) in zip(writers, pairwise(ends), strict=True):
                    if b > a:
                        writer.write_table(dealt.slice(a, b - a))
        return counts.tolist()

    def _path(self, bucket: int) -> Path:
        """The file that holds one bucket alone, dealt out of a shared one where that is needed."""
        if self._per_file == 1:
            return _file(self._tmp, bucket)
        first = bucket - bucket % self._per_file
        folder = self._tmp / "split"
        if self._split != first:
            shutil.rmtree(folder, ignore_errors=True)
            buckets = range(first, min(first + self._per_file, self._buckets))
            self._deal(self._stored(_file(self._tmp, first)), folder, buckets)
            self._split = first
        return _file(folder, bucket)

    def _stored(self, path: Path) -> Iterator[pa.Table]:
        """The rows of a file, about 260,000 tokens at a time or more."""
        with pa.OSFile(str(path), "rb") as f, pa.ipc.open_stream(f) as reader:
            held, rows = [], 0
            for batch in reader:
                held.append(batch)
                rows += batch.num_rows
                if rows >= self.rows_per_batch:
                    yield pa.Table.from_batches(held)
                    held, rows = [], 0
            if held:
                yield pa.Table.from_batches(held)

    def _sorted(self, bucket: int) -> Iterator[tuple[int, pa.Table]]:
        """A bucket's rows in order, about 260,000 tokens at a time."""
        with pa.OSFile(str(self._path(bucket)), "rb") as f, pa.ipc.open_stream(f) as reader:
            table = reader.read_all().combine_chunks()
        order = pc.sort_indices(table, sort_keys=[(name, "ascending") for name in (_KEY, *self.ties)])
        step = self.rows_per_batch
        table = table.drop_columns([_KEY])
        for first in range(0, len(order), step):
            yield first, table.take(order.slice(first, step))


def _file(folder: Path, bucket: int) -> Path:
    return folder / f"bucket-{bucket:05d}.arrow"
