"""The rows of scored directories as flat arrays: read once, then taken by their numbers, in any order."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from entrodrop_prep.errors import ConfigError, IntegrityError
from entrodrop_prep.masking.arrays import Arrays, write_arrays
from entrodrop_prep.masking.histogram import EntropyHistogram
from entrodrop_prep.masking.mask import any_per_row
from entrodrop_prep.masking.sources import Source, Sources
from entrodrop_prep.store.layout import UNIGRAM
from entrodrop_prep.store.parallel import in_order
from entrodrop_prep.store.rows import Rows, stored_scores, to_rows, token_counts
from entrodrop_prep.store.scored import ScoredDataset

MAX_VALUES = 1000
"""Values of a column that may have thresholds of their own."""
MAPPED_BYTES = 1 << 27
"""About how much of the files is mapped into memory at most."""
CHUNK_TOKENS = 1 << 18
_WINDOW = 1 << 16
"""Bytes around a position that the operating system maps at the first look at it."""
_ROWS = MAPPED_BYTES // _WINDOW // 4
"""Rows that are looked at before pages are given back, by two threads and in two arrays."""
TOKEN_BYTES = 10
"""Bytes of a token in all its arrays, about."""
_PER_ROW = ("source", "row_id", "window", "length", "group")


class Columns:
    """R rows of N tokens by (source, row_id, window), each array a file of the directory.

    ``source``, ``row_id``, ``window``, ``length`` and, with thresholds by column, ``group`` are [R]; ``input_ids``,
    ``entropy`` (NaN for null), ``loss_mask`` and, where they are looked at, ``logprob`` and ``excess`` are [N], as in
    ``Rows``. In memory are 8 bytes a row, where each begins; of the files, pages that the operating system may take
    back. What is [R] is checked on opening, what is [N] when it is read. Raises IntegrityError for files that are not
    those written.
    """

    def __init__(self, directory: Path) -> None:
        self.arrays = Arrays(directory)
        for name in _PER_ROW:
            if name in self.arrays:
                self.arrays.whole(name)
        self.starts = np.zeros(len(self) + 1, np.int64)
        """[R + 1] where each row begins."""
        np.cumsum(self.lengths, out=self.starts[1:])
        self._looked, self._lock = 0, threading.Lock()

    def __len__(self) -> int:
        return len(self.arrays["row_id"])

    @property
    def facts(self) -> dict[str, Any]:
        """``rows_without_loss``, ``spread`` (bins of ``EntropyHistogram``), ``values`` of the column."""
        return self.arrays.facts

    @property
    def lengths(self) -> NDArray[np.int32]:
        """[R] tokens of each row."""
        return self.arrays["length"]

    def chunks(self) -> Iterator[tuple[int, int]]:
        """First and last but one of the rows of one source after the other, about 260,000 tokens at a time."""
        edges = np.flatnonzero(np.diff(self.arrays["source"], prepend=-1, append=-1))
        for first, stop in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True):
            while first < stop:
                end = int(np.searchsorted(self.starts, self.starts[first] + CHUNK_TOKENS, "right")) - 1
                end = min(max(end, first + 1), stop)
                yield first, end
                first = end

    def span(self, first: int, stop: int) -> Rows:
        """Rows ``first`` to ``stop - 1`` with all their columns, not copied. Raises IntegrityError for damage."""
        a, b = int(self.starts[first]), int(self.starts[stop])
        self._look((b - a) * TOKEN_BYTES)
        found = {}
        for name in ("input_ids", "entropy", "loss_mask", "logprob", "excess"):
            if name in self.arrays:
                self.arrays.check(name, np.array([a]), np.array([b]))
                found[name] = self.arrays[name][a:b]
        return Rows(
            row_id=self.arrays["row_id"][first:stop],
            window=self.arrays["window"][first:stop],
            offsets=self.starts[first : stop + 1] - a,
            input_ids=found["input_ids"],
            entropy=found["entropy"],
            logprob=found.get("logprob"),
            loss_mask=found["loss_mask"],
            group=self.arrays["group"][first:stop] if "group" in self.arrays else None,
            excess=found.get("excess"),
        )

    def take(self, index: NDArray[np.integer], flags: Arrays) -> Rows:
        """The rows at ``index`` [n], one after the other, a copy.

        Args:
            index: numbers of rows.
            flags: ``flags`` [N] uint8 of all rows: 1 for a token that may be trained on, 3 for one that may be dropped.

        Raises IntegrityError where what is read is damaged.
        """
        first = self.starts[index]
        offsets = np.zeros(len(index) + 1, np.int64)
        np.cumsum(self.starts[index + 1] - first, out=offsets[1:])
        rows, back = np.unique(index, return_inverse=True)
        marks = self._gathered(flags, "flags", rows, back)
        return Rows(
            row_id=self.arrays["row_id"][index],
            window=self.arrays["window"][index],
            offsets=offsets,
            input_ids=self._gathered(self.arrays, "input_ids", rows, back),
            entropy=Scattered(self, first, offsets),
            logprob=None,
            loss_mask=marks > 0,
            eligible=marks > 1,
        )

    def _gathered(self, arrays: Arrays, name: str, rows: NDArray[np.integer], back: NDArray[np.int64]) -> NDArray[Any]:
        """The values of ``rows``, read in ascending order, some at a time, in the order ``back``."""
        values, parts = arrays[name], []
        for at in range(0, len(rows), _ROWS):
            some = rows[at : at + _ROWS]
            first, stop = self.starts[some], self.starts[some + 1]
            self._look(len(some) * _WINDOW, arrays)
            arrays.check(name, first, stop)
            edges = np.column_stack([first, stop]).ravel()  # what lies between two rows is a row for Arrow, too
            parts.append(taken(values, edges, 2 * (back if len(some) == len(rows) else np.arange(len(some)))))
        if len(parts) == 1:
            return parts[0]
        starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(self.starts[rows + 1] - self.starts[rows])])
        return taken(np.concatenate([values[:0], *parts]), starts, back)

    def at(self, name: str, tokens: NDArray[np.int64]) -> NDArray[Any]:
        """The values of an array at some tokens."""
        self._look(len(tokens) * _WINDOW)
        self.arrays.check(name, tokens, tokens + 1)
        found: NDArray[Any] = self.arrays[name][tokens]
        return found

    def _look(self, size: int, *others: Arrays) -> None:
        """Count the bytes that the operating system maps, and have them unmapped where that becomes too much."""
        with self._lock:
            self._looked += size
            due = self._looked > MAPPED_BYTES and len(self.arrays["input_ids"]) * 5 > MAPPED_BYTES
            if self._looked > MAPPED_BYTES:
                self._looked = 0
        if due:
            for arrays in (self.arrays, *others):
                arrays.release()


@dataclass(frozen=True)
class Scattered:
    """Entropies [N] of rows that were taken, read where they are asked for."""

    columns: Columns
    first: NDArray[np.int64]
    offsets: NDArray[np.int64]

    def __len__(self) -> int:
        return int(self.offsets[-1])

    def __getitem__(self, tokens: NDArray[np.int64]) -> NDArray[Any]:
        row = np.searchsorted(self.offsets, tokens, "right") - 1
        return self.columns.at("entropy", self.first[row] + tokens - self.offsets[row])


def taken(array: NDArray[Any], starts: NDArray[np.int64], index: NDArray[np.integer]) -> NDArray[Any]:
    """The values of the rows at ``index``, where row r begins at ``starts[r]`` [R + 1]; to Arrow a row is a string."""
    if not len(array):
        return array[:0]
    buffers = [None, pa.py_buffer(starts * array.itemsize), pa.py_buffer(array)]
    rows = pa.Array.from_buffers(pa.large_binary(), len(starts) - 1, buffers).take(pa.array(index))
    return np.frombuffer(rows.buffers()[2] or b"", array.dtype)


def has_label(lists: pa.ListArray) -> NDArray[np.bool_]:
    """[R] whether any token of each row is trainable (position 0 never is)."""
    flags = lists.flatten().to_numpy(zero_copy_only=False)
    offsets = lists.offsets.to_numpy().astype(np.int64)
    offsets -= offsets[0]
    flags[offsets[:-1][np.diff(offsets) > 0]] = False
    return any_per_row(flags, offsets)


@dataclass(frozen=True)
class _Read:
    """Rows of a batch that have something to train on."""

    source: int
    rows: Rows
    left_out: int
    spread: EntropyHistogram
    column: pa.Array | None
    counted: NDArray[np.int64] | None
    """[V] how often each id occurs in the batch, if that is asked for."""


def write_columns(
    directory: Path, sources: Sources, *, column: str | None, logprob: bool, unigram: bool, lasting: bool, jobs: int
) -> None:
    """Read the sources' rows that have something to train on, and write what ``Columns`` reads.

    Args:
        directory: where the arrays go.
        sources: what is read, see ``masking.sources``.
        column: whose values have thresholds of their own, or None.
        logprob: whether the log-probabilities are looked at.
        unigram: whether how often each id occurs is compared with ``unigram.npy``, as what is drawn depends on it.
        lasting: see ``arrays.write_arrays``.
        jobs: threads beside the one that reads.

    Raises IntegrityError for scores that are not what they were, ConfigError for a column that cannot be used,
    OutputError.
    """
    values = _Values(column)
    facts: dict[str, Any] = {"rows_without_loss": 0, "values": values.codes, "spread": []}
    spread = EntropyHistogram()
    counts = {i: np.zeros(s.scored.vocab_size, np.int64) for i, s in enumerate(sources.all) if unigram and not s.plain}
    dtype = np.result_type(*(s.scored.score_dtype for s in sources.masked)) if sources.masked else np.dtype(np.float16)

    def parts() -> Iterator[dict[str, NDArray[Any]]]:
        compared = any(s.against for s in sources.all)
        batches = _batches(sources, column, logprob or compared)
        for found in in_order(lambda given: _read(*given, dtype, column, logprob, unigram), batches, jobs):
            facts["rows_without_loss"] += found.left_out
            spread.merge(found.spread)
            if found.counted is not None:
                counts[found.source] += found.counted
            groups = values.groups(sources.all[found.source], found) if column else None
            yield _arrays(found, groups, logprob=logprob, excess=compared)
        for index, found_counts in counts.items():
            scored = sources.all[index].scored
            if not np.array_equal(found_counts, scored.unigram):
                raise IntegrityError(
                    "it does not count the shards' tokens",
                    where=str(scored.directory / UNIGRAM),
                    fix="score again",
                )
        facts["values"], facts["spread"] = list(values.codes), spread.summary()["counts"]

    write_arrays(directory, parts(), facts, lasting=lasting)


def _batches(sources: Sources, column: str | None, logprob: bool) -> Iterator[tuple[int, Source, pa.RecordBatch]]:
    for index, source in enumerate(sources.all):
        scores = [] if source.plain else ["entropy", *(["logprob"] if logprob else []), *([column] if column else [])]
        batches = source.scored.batches(["row_id", "window", "input_ids", "loss_mask", *scores])
        for batch in batches if source.against is None else _compared(source, source.against, batches):
            yield index, source, batch


def _compared(source: Source, other: ScoredDataset, batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """The batches with the column ``other``: the log-probabilities of the same rows in the scores compared with.

    Raises ConfigError where these have other rows.
    """
    same = ["row_id", "window", "input_ids"]
    names = [*same, "logprob"]
    more = (pa.Table.from_batches([b]).select(names).replace_schema_metadata() for b in other.batches(names))
    rest = next(more)
    for batch in batches:
        while len(rest) < len(batch) and (following := next(more, None)) is not None:
            rest = pa.concat_tables([rest, following])
        part, rest = rest.slice(0, len(batch)), rest.slice(len(batch))
        one, two = (t.select(same).to_batches() for t in (pa.Table.from_batches([batch]), part.combine_chunks()))
        differ = _first_difference(one[0], two[0] if two else one[0].slice(0, 0))
        if differ is not None:
            raise ConfigError(
                f"--against-scores has other rows than {source.scored.directory}: they differ first at row "
                f"{batch.column('row_id')[differ]}",
                where=str(other.directory),
                fix="score the same source with the same tokenizer, template and windows",
            )
        yield batch.append_column("other", part.combine_chunks()["logprob"].chunk(0))


def _first_difference(one: pa.RecordBatch, two: pa.RecordBatch) -> int | None:
    """The first position at which rows have other values, or are missing in ``two``."""
    alike = len(one) == len(two) and all(a.equals(b) for a, b in zip(one.columns, two.columns, strict=True))
    if alike:
        return None
    return next((r for r in range(len(two)) if one.slice(r, 1).to_pylist() != two.slice(r, 1).to_pylist()), len(two))


def _read(
    index: int,
    source: Source,
    batch: pa.RecordBatch,
    dtype: np.dtype[Any],
    column: str | None,
    logprob: bool,
    unigram: bool,
) -> _Read:
    vocab_size, ids = source.scored.vocab_size, batch.column("input_ids").flatten().to_numpy()
    if len(ids) and not 0 <= ids.min() <= ids.max() < vocab_size:
        raise IntegrityError(
            "it holds a token outside the vocabulary", where=str(source.scored.directory), fix="score again"
        )
    counted = token_counts(to_rows(batch), vocab_size) if unigram and not source.plain else None
    batch = source.rows_of(batch)
    keep = has_label(batch.column("loss_mask"))
    left_out = int((~keep).sum())
    if left_out:
        batch = batch.filter(pa.array(keep))
    spread = EntropyHistogram()
    if source.plain:
        ids = batch.column("input_ids")
        none = pa.nulls(len(ids.flatten()), pa.from_numpy_dtype(dtype))
        scores = pa.ListArray.from_arrays(pc.subtract(ids.offsets, ids.offsets[0]), none)
        for name in ("entropy", *(["logprob"] if logprob else [])):
            batch = batch.append_column(name, scores)
        rows = to_rows(batch)
    else:
        rows = to_rows(batch)
        spread.add(np.compress(rows.trainable, rows.entropy))
        excess = None
        if "other" in batch.schema.names and rows.logprob is not None:
            excess = stored_scores(batch, "other").astype(np.float32) - rows.logprob.astype(np.float32)
        as_one = {n: v.astype(dtype, copy=False) for n in ("entropy", "logprob") if (v := getattr(rows, n)) is not None}
        rows = replace(rows, excess=excess, **as_one)
    return _Read(index, rows, left_out, spread, batch.column(column) if column and not source.plain else None, counted)


def _arrays(found: _Read, groups: NDArray[np.int32] | None, *, logprob: bool, excess: bool) -> dict[str, NDArray[Any]]:
    rows = found.rows
    none = np.full(len(rows.input_ids), np.nan, np.float32)
    arrays: dict[str, NDArray[Any] | None] = {
        "source": np.full(len(rows.row_id), found.source, np.int32),
        "row_id": rows.row_id,
        "window": rows.window,
        "length": rows.lengths.astype(np.int32),
        "group": groups,
        "input_ids": rows.input_ids,
        "entropy": rows.entropy,
        "logprob": rows.logprob if logprob else None,
        "excess": (none if rows.excess is None else rows.excess) if excess else None,
        "loss_mask": rows.loss_mask,
    }
    return {name: array for name, array in arrays.items() if array is not None}


class _Values:
    """The values of the scope's column in the order in which they come."""

    def __init__(self, column: str | None) -> None:
        self.codes: dict[Any, int] = {}
        self._column = column

    def groups(self, source: Source, found: _Read) -> NDArray[np.int32]:
        """[R] the code of each row's value; 0 for rows that are never masked. Raises ConfigError."""
        if found.column is None:
            return np.zeros(len(found.rows.row_id), np.int32)
        coded = found.column.dictionary_encode(null_encoding="encode")
        for value in pc.unique(found.column).to_pylist():
            self.codes.setdefault(value, len(self.codes))
        if len(self.codes) > MAX_VALUES:
            raise ConfigError(
                f"--scope column:{self._column} has more than {MAX_VALUES:,} values",
                where=str(source.scored.directory),
                fix="give a column with fewer",
            )
        codes = np.array([self.codes[v] for v in coded.dictionary.to_pylist()] or [0], np.int32)
        found_places: NDArray[np.int32] = codes[coded.indices.to_numpy()]
        return found_places
