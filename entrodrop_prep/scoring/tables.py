"""Readers of Parquet and Arrow files. A row's place in such a file is ``{"row": n}``, from 0."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from entrodrop_prep.errors import SourceError
from entrodrop_prep.scoring.files import BUFFER, DataFile
from entrodrop_prep.scoring.lines import Parsed, Place, Raw, Reader

BATCH = 128  # rows decoded at a time


class Rows:
    """Arrow rows as Python objects.

    Columns of JSON (``arrow.json``, the storage of the Json feature of ``datasets``) come as the objects they hold,
    decoded as ``datasets`` decodes them; everything else as pyarrow gives it.
    """

    def __init__(self, schema: pa.Schema) -> None:
        fields = [field for field in schema if "arrow.json" in str(field.type)]
        self._features: Any = None
        if fields:
            from datasets import Features

            self._features = Features.from_arrow_schema(pa.schema(fields, metadata=schema.metadata))

    def parse(self, batch: pa.RecordBatch | pa.Table) -> list[Parsed]:
        """One (values, None) or (None, problem) for each row."""
        try:
            return [(self._decode(row), None) for row in batch.to_pylist()]
        except (ValueError, OverflowError, RecursionError):  # some row cannot be had: find which
            return [self._parse_one(batch.slice(n, 1)) for n in range(batch.num_rows)]

    def _parse_one(self, batch: pa.RecordBatch | pa.Table) -> Parsed:
        try:
            return self._decode(batch.to_pylist()[0]), None
        except UnicodeDecodeError as e:
            return None, f"invalid UTF-8: byte 0x{e.object[e.start]:02x}"
        except (ValueError, OverflowError, RecursionError) as e:
            return None, f"a value cannot be read: {e}"

    def _decode(self, row: dict[str, Any]) -> dict[str, Any]:
        if self._features is None:
            return row
        decoded = self._features.decode_example({name: row[name] for name in self._features})
        return {name: decoded.get(name, value) for name, value in row.items()}


class ParquetReader(Reader):
    """Parquet. The footer gives counts and places; row groups are decoded in batches, never held whole."""

    def count(self, file: DataFile) -> int | None:
        with _parquet(file) as parquet:
            return int(parquet.metadata.num_rows)

    def columns(self, file: DataFile) -> list[str] | None:
        with _parquet(file) as parquet:
            return list(parquet.schema_arrow.names)

    def rows(self, file: DataFile, at: Place | None, columns: Sequence[str] | None) -> Iterator[Raw]:
        start = at["row"] if at else 0
        with _parquet(file) as parquet:
            total, first, group = parquet.metadata.num_rows, 0, 0
            while group < parquet.num_row_groups:
                size = parquet.metadata.row_group(group).num_rows
                if first + size > start:
                    break
                first, group = first + size, group + 1
            names = _wanted(file, parquet.schema_arrow, columns)
            groups = list(range(group, parquet.num_row_groups))
            batches = parquet.iter_batches(batch_size=BATCH, row_groups=groups, columns=names)
            yield from _raws(file, (b.select(names) for b in batches), first, start, total)

    def parse(self, payload: Any) -> Parsed:
        values, problem = payload
        return values, problem


class ArrowReader(Reader):
    """Arrow IPC, file or stream. Local files are mapped into memory, so that skipping reads next to nothing."""

    def count(self, file: DataFile) -> int | None:
        if file.fs is not None:
            return None
        with ExitStack() as stack:
            return sum(int(batch.num_rows) for batch in _ipc(file, stack, fields=[0])[1])

    def columns(self, file: DataFile) -> list[str] | None:
        with ExitStack() as stack:
            return list(_ipc(file, stack, fields=[])[0].names)

    def rows(self, file: DataFile, at: Place | None, columns: Sequence[str] | None) -> Iterator[Raw]:
        with ExitStack() as stack:
            schema, _ = _ipc(file, stack, fields=[])
            names = _wanted(file, schema, columns)
            total = self.count(file)
            _, batches = _ipc(file, stack, fields=[schema.get_field_index(name) for name in names])
            yield from _raws(file, (b.select(names) for b in batches), 0, at["row"] if at else 0, total)

    def parse(self, payload: Any) -> Parsed:
        values, problem = payload
        return values, problem


def _raws(file: DataFile, batches: Iterator[Any], first: int, start: int, total: int | None) -> Iterator[Raw]:
    """The rows from ``start`` on, where the batches begin with row ``first``."""
    rows: Rows | None = None
    for batch in batches:
        rows = rows or Rows(batch.schema)
        for offset in range(max(0, min(start - first, batch.num_rows)), batch.num_rows, BATCH):
            for n, parsed in enumerate(rows.parse(batch.slice(offset, BATCH)), start=first + offset):
                done = file.size * n // total if total else 0
                yield Raw({"row": n}, done, f"{file.name} row {n}", parsed)
        first += batch.num_rows


def _wanted(file: DataFile, schema: pa.Schema, columns: Sequence[str] | None) -> list[str]:
    """The names to read, in the order of the file. Raises SourceError for one that two columns have."""
    names = [name for name in schema.names if columns is None or name in columns]
    twice = [name for n, name in enumerate(names) if name in names[:n]]
    if twice:
        raise SourceError(f"two columns are called {twice[0]!r}", where=file.name, fix="rename one of them")
    return names


@contextmanager
def _parquet(file: DataFile) -> Iterator[pq.ParquetFile]:
    if file.fs is None:
        with pq.ParquetFile(file.path, buffer_size=BUFFER, pre_buffer=False) as parquet:
            yield parquet
    else:
        with file.open() as stream, pq.ParquetFile(stream, buffer_size=BUFFER, pre_buffer=False) as parquet:
            yield parquet


def _ipc(file: DataFile, stack: ExitStack, fields: list[int]) -> tuple[pa.Schema, Iterator[pa.RecordBatch]]:
    """(schema, batches) of an IPC file or stream, restricted to some fields ([] reads all)."""
    source = stack.enter_context(pa.memory_map(file.path) if file.fs is None else file.open())
    options = pa.ipc.IpcReadOptions(included_fields=fields)
    is_file = source.read(6) == b"ARROW1"
    source.seek(0)
    if is_file:
        reader = stack.enter_context(pa.ipc.open_file(source, options=options))
        return reader.schema, (reader.get_batch(n) for n in range(reader.num_record_batches))
    reader = stack.enter_context(pa.ipc.open_stream(source, options=options))
    return reader.schema, iter(reader)
