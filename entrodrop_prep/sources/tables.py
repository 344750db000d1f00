"""Readers of Parquet and Arrow files. A row's position in such a file is ``{"row": n}``, from 0."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from entrodrop_prep.errors import SourceError
from entrodrop_prep.sources.files import BUFFER, DataFile
from entrodrop_prep.sources.lines import MAX_ROW_BYTES, Columns, Parsed, Position, Raw, Reader, too_long
from entrodrop_prep.sources.parquet_pages import page_sizes

BATCH = 32  # rows decoded at a time, at most
BATCH_BYTES = 32 << 20  # about what they may take
PAGE_ROWS = {"dictionary": 12, "page": 24}
"""A page may take as much as so many of the longest rows; pyarrow keeps two copies of a dictionary."""
# What pyarrow says where a batch of nested rows takes more than its offsets address.
_TOO_MUCH = (pa.ArrowInvalid, pa.ArrowNotImplementedError, pa.ArrowCapacityError, pa.ArrowMemoryError)


class Rows:
    """Arrow rows as Python objects.

    Columns of JSON (``arrow.json``, the storage of the Json feature of ``datasets``) come as the objects they hold,
    decoded as ``datasets`` decodes them; everything else as pyarrow gives it. What is mapped from a file is validated
    first: offsets that lead out of it would be followed.

    Args:
        schema: of the batches.
        valid: whether pyarrow made the batches itself, as from Parquet.
    """

    def __init__(self, schema: pa.Schema, *, valid: bool = False) -> None:
        self._valid = valid
        fields = [field for field in schema if "arrow.json" in str(field.type)]
        self._features: Any = None
        if fields:
            from datasets import Features

            self._features = Features.from_arrow_schema(pa.schema(fields, metadata=schema.metadata))
        # Rows share the values of dictionaries and views: what a slice takes in Arrow is not what its rows take.
        self._shared = any("dictionary<" in str(field.type) or "_view" in str(field.type) for field in schema)

    def parse(self, batch: pa.RecordBatch | pa.Table, longest: int = MAX_ROW_BYTES) -> Iterator[tuple[Parsed, int]]:
        """((values, None) or (None, problem), bytes) of each row; few are decoded at once where they are large.

        Raises pyarrow.ArrowInvalid for batches that are damaged.
        """
        if not self._valid and _invalid_text(batch) is not None:
            yield from (self._parse_one(batch.slice(n, 1), longest) for n in range(batch.num_rows))
            return
        if batch.num_rows > 1 and batch.nbytes > BATCH_BYTES and not self._shared:
            half = batch.num_rows // 2
            yield from self.parse(batch.slice(0, half), longest)
            yield from self.parse(batch.slice(half), longest)
            return
        rows: list[tuple[Parsed, int]] | None = None
        if batch.nbytes <= longest and not self._shared:
            size = batch.nbytes // max(1, batch.num_rows)
            with suppress(ValueError, OverflowError, RecursionError):
                rows = [((self._decode(row), None), size) for row in batch.to_pylist()]
        if rows is None:  # some row cannot be had, or is too large: find which
            yield from (self._parse_one(batch.slice(n, 1), longest) for n in range(batch.num_rows))
        else:
            yield from rows

    def _parse_one(self, batch: pa.RecordBatch | pa.Table, longest: int) -> tuple[Parsed, int]:
        name = None if self._valid else _invalid_text(batch)
        if name is not None and not pa.types.is_string(batch.schema.field(name).type):
            return (None, f"invalid UTF-8 in column {name!r}"), 0
        size = 0 if self._shared else batch.nbytes
        try:
            values = None
            if size <= longest:
                values = batch.to_pylist()[0]
                size = _bytes_of(values) if self._shared else size
            if values is None or size > longest:
                return (None, too_long(size, longest)), 0
            return (self._decode(values), None), size
        except UnicodeDecodeError as e:
            return (None, f"invalid UTF-8: byte 0x{e.object[e.start]:02x}"), 0
        except RecursionError:
            return (None, "it is nested too deep"), 0
        except (ValueError, OverflowError) as e:
            return (None, f"a value cannot be read: {e}"), 0

    def _decode(self, row: dict[str, Any]) -> dict[str, Any]:
        if self._features is None:
            return row
        decoded = self._features.decode_example({name: row[name] for name in self._features})
        return {name: decoded.get(name, value) for name, value in row.items()}


def _invalid_text(batch: pa.RecordBatch | pa.Table) -> str | None:
    """The first column with text that is no UTF-8. Raises pyarrow.ArrowInvalid for other damage."""
    found = None
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        try:
            column.validate(full=True)
        except pa.ArrowInvalid as e:
            if "UTF8" not in str(e):
                raise
            found = found or name
    return found


def _bytes_of(value: Any) -> int:
    """About how many bytes a row's values take: those of strings, and 8 for each other one."""
    if isinstance(value, (str, bytes)):
        return len(value)
    if isinstance(value, dict):
        return sum(_bytes_of(item) for item in value.values())
    return sum(_bytes_of(item) for item in value) if isinstance(value, (list, tuple)) else 8


class ParquetReader(Reader):
    """Parquet. The footer gives counts and positions; row groups are decoded in batches, never held whole."""

    def look(self, file: DataFile) -> tuple[int | None, Columns | None]:
        with _parquet(file) as parquet:
            schema = parquet.schema_arrow
            return int(parquet.metadata.num_rows), dict(zip(schema.names, schema.types, strict=True))

    def check(self, file: DataFile, columns: Sequence[str]) -> None:
        most = {kind: rows * self._longest for kind, rows in PAGE_ROWS.items()}
        with _parquet(file) as parquet:
            for group in range(parquet.num_row_groups):
                for chunk in map(parquet.metadata.row_group(group).column, range(parquet.metadata.num_columns)):
                    name, _, _ = chunk.path_in_schema.partition(".")
                    if name not in columns or chunk.total_uncompressed_size <= min(most.values()):
                        continue
                    for kind, size in page_sizes(file, chunk):
                        if size > most[kind]:
                            raise _too_large(file, name, kind, size, group, most[kind])

    def rows(self, file: DataFile, at: Position | None, columns: Sequence[str] | None) -> Iterator[Raw]:
        start = at["row"] if at else 0
        with _parquet(file) as parquet:
            names = _wanted(file, parquet.schema_arrow, columns)
            batches = _batches(file, parquet, names, start)
            yield from _raws(file, batches, start, parquet.metadata.num_rows, self._longest, valid=True)

    def parse(self, payload: Any) -> Parsed:
        values, problem = payload
        return values, problem


def _too_large(file: DataFile, column: str, kind: str, size: int, group: int, most: int) -> SourceError:
    return SourceError(
        f"column {column!r} has a {kind} of {size:,} bytes in row group {group}, which is read as a whole, over the "
        f"limit of {most:,} ({PAGE_ROWS[kind]} rows of --max-row-bytes)",
        where=file.name,
        fix="write the file again without dictionaries and with small pages or row groups, or raise --max-row-bytes",
    )


def _batches(file: DataFile, parquet: pq.ParquetFile, names: list[str], start: int) -> Iterator[tuple[int, Any]]:
    """(number of its first row, batch), from the row group of row ``start`` on.

    The first batch has one row; each further one at most twice as many as the one before, as long as they take no more
    than about ``BATCH_BYTES``. So nothing need be known of the rows before: what a footer says of their size does not
    count what dictionaries repeat.
    """
    row, most = start, BATCH
    while True:
        group, first = _group_of(parquet, row)
        size = 1
        try:
            for batch in parquet.iter_batches(
                batch_size=size, row_groups=list(range(group, parquet.num_row_groups)), columns=names
            ):
                if first + batch.num_rows > row:
                    yield first, batch.select(names)
                    row = first + batch.num_rows
                first += batch.num_rows
                size = max(1, min(most, 2 * size, BATCH_BYTES * batch.num_rows // max(1, batch.nbytes)))
                parquet.reader.set_batch_size(size)
            return
        except _TOO_MUCH:
            if size == 1:
                raise
            most = max(1, size // 8)


def _group_of(parquet: pq.ParquetFile, row: int) -> tuple[int, int]:
    """(number of the row group that holds a row, its first row); the number of groups where no row is left."""
    first = 0
    for group in range(parquet.num_row_groups):
        size = parquet.metadata.row_group(group).num_rows
        if first + size > row:
            return group, first
        first += size
    return parquet.num_row_groups, first


class ArrowReader(Reader):
    """Arrow IPC, file or stream. Local files are mapped into memory, so that skipping reads next to nothing."""

    def look(self, file: DataFile) -> tuple[int | None, Columns | None]:
        with ExitStack() as stack:
            schema, _ = _ipc(file, stack, fields=[])
            count = None
            if file.fs is None:
                count = sum(int(batch.num_rows) for batch in _ipc(file, stack, fields=[0])[1])
            return count, dict(zip(schema.names, schema.types, strict=True))

    def rows(self, file: DataFile, at: Position | None, columns: Sequence[str] | None) -> Iterator[Raw]:
        total = self.look(file)[0]
        with ExitStack() as stack:
            schema, _ = _ipc(file, stack, fields=[])
            names = _wanted(file, schema, columns)
            _, batches = _ipc(file, stack, fields=[schema.get_field_index(name) for name in names])
            yield from _raws(file, _numbered(batches, names), at["row"] if at else 0, total, self._longest)

    def parse(self, payload: Any) -> Parsed:
        values, problem = payload
        return values, problem


def _numbered(batches: Iterator[pa.RecordBatch], names: list[str]) -> Iterator[tuple[int, pa.RecordBatch]]:
    first = 0
    for batch in batches:
        yield first, batch.select(names)
        first += batch.num_rows


def _raws(
    file: DataFile,
    batches: Iterator[tuple[int, Any]],
    start: int,
    total: int | None,
    longest: int,
    *,
    valid: bool = False,
) -> Iterator[Raw]:
    """The rows from ``start`` on, of batches that begin with the row whose number is given with them."""
    rows: Rows | None = None
    for first, batch in batches:
        rows = rows or Rows(batch.schema, valid=valid)
        for offset in range(max(0, min(start - first, batch.num_rows)), batch.num_rows, BATCH):
            parts = rows.parse(batch.slice(offset, BATCH), longest)
            for n, (parsed, size) in enumerate(parts, start=first + offset):
                done = file.size * n // total if total else 0
                yield Raw({"row": n}, done, f"{file.name} row {n}", parsed, size=size)


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
