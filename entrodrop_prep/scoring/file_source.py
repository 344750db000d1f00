"""A source made of files of one format, read one after the other."""

from __future__ import annotations

import itertools
import sys
import zlib
from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa

from entrodrop_prep.errors import SourceError
from entrodrop_prep.scoring.delimited import CsvReader
from entrodrop_prep.scoring.files import KNOWN, DataFile, Found, format_of, unreadable
from entrodrop_prep.scoring.json_rows import JsonReader
from entrodrop_prep.scoring.lines import Place, Raw, Reader, TextReader
from entrodrop_prep.scoring.rows import Chunk, Source, SourceRow
from entrodrop_prep.scoring.splits import pick_split
from entrodrop_prep.scoring.tables import ArrowReader, ParquetReader

READERS: dict[str, type[Reader]] = {
    "arrow": ArrowReader,
    "csv": CsvReader,
    "json": JsonReader,
    "parquet": ParquetReader,
    "text": TextReader,
}
ROWS_FOR_COLUMNS = 100


class FileSource(Source):
    """Files of one format as one source; rows are numbered through all of them in the order of their names."""

    def __init__(self, found: Found, *, where: str, split: str, limit: int | None) -> None:
        """Raises SourceError for mixed formats, an unknown split, files that cannot be read, and no rows at all."""
        files, self._split = found.files, split if found.directory else None
        if not files:
            raise SourceError("there are no data files", where=where, fix=f"known extensions: {KNOWN}")
        if found.directory:
            files = pick_split(files, split, where)
        formats = {str(format_of(f.name)): f.name for f in files}
        if len(formats) > 1:
            examples = ", ".join(f"{name} ({example})" for name, example in sorted(formats.items()))
            raise SourceError(f"mixed formats: {examples}", where=where, fix="give the files of one format as a glob")
        self.name, self._files, self._limit = found.name, files, limit
        self._format = next(iter(formats))
        self._reader = READERS[self._format]()
        self._cursor: _Cursor | None = None
        self._counts = [_reading(f, self._reader.count, f) for f in files]
        self._before = [0, *itertools.accumulate(f.size for f in files)]
        self.size_bytes = self._before[-1]
        counts = [count for count in self._counts if count is not None]
        self.total_rows = sum(counts) if len(counts) == len(files) else None
        if self.total_rows is not None and limit is not None:
            self.total_rows = min(self.total_rows, limit)
        self.columns = self._find_columns(where)

    def identity(self) -> dict[str, Any]:
        return {
            "kind": "files",
            "format": self._format,
            "split": self._split,
            "files": [{"name": f.name, "size": f.size} for f in self._files],
        }

    def stat(self) -> dict[str, Any]:
        return {f.name: _reading(f, f.stat) for f in self._files}

    def read(
        self, first: int, count: int, position: dict[str, Any] | None, columns: Sequence[str] | None = None
    ) -> Chunk:
        stop = first + count if self._limit is None else min(first + count, self._limit)
        wanted = None if columns is None else tuple(columns)
        cursor, self._cursor = self._cursor, None
        if cursor is None or cursor.row != first or cursor.columns != wanted:
            if cursor is not None:
                cursor.close()
            cursor = self._place(first, position, wanted)
        began = self._done(cursor) if first else 0
        rows = []
        while cursor.row < stop and cursor.ahead is not None:
            values, problem = self._reader.parse(cursor.ahead.payload)
            rows.append(SourceRow(cursor.row, cursor.ahead.where, values, problem))
            cursor.advance()
        if cursor.ahead is None or cursor.row == self._limit:
            cursor.close()
            return Chunk(rows, None, self._done(cursor) - began)
        self._cursor = cursor
        following = {"row": cursor.row, "file": cursor.file, "at": cursor.ahead.at}
        return Chunk(rows, following, self._done(cursor) - began)

    def _done(self, cursor: _Cursor) -> int:
        return self._before[cursor.file] + cursor.ahead.done if cursor.ahead else self._before[-1]

    def _place(self, first: int, position: dict[str, Any] | None, columns: tuple[str, ...] | None) -> _Cursor:
        """A cursor that stands before row ``first``, or at the end."""
        if position is not None:
            if position["row"] != first:
                raise ValueError(f"the position is that of row {position['row']}, not of row {first}")
            return _Cursor(self._reader, self._files, columns, first, position["file"], position["at"])
        row = file = 0
        while file < len(self._files) - 1 and (size := self._counts[file]) is not None and row + size <= first:
            row, file = row + size, file + 1
        if self._counts[file] is not None:
            return _Cursor(self._reader, self._files, columns, first, file, {"row": first - row})
        cursor = _Cursor(self._reader, self._files, columns, row, file, None)
        while cursor.row < first and cursor.ahead is not None:
            cursor.advance()
        return cursor

    def _find_columns(self, where: str) -> list[str]:
        """The columns, declared or seen. Raises SourceError for a source without rows."""
        peek = min(ROWS_FOR_COLUMNS, self._limit or ROWS_FOR_COLUMNS)
        cursor = self._place(0, None, () if self._format in ("parquet", "arrow") else None)
        if cursor.ahead is None:
            cursor.close()
            raise SourceError("holds no rows", where=where, fix="give a source with at least one row")
        declared = _reading(self._files[cursor.file], self._reader.columns, self._files[cursor.file])
        seen: dict[str, None] = {}
        while declared is None and cursor.row < peek and cursor.ahead is not None:
            values, _ = self._reader.parse(cursor.ahead.payload)
            seen.update(dict.fromkeys(values or ()))
            cursor.advance()
        cursor.close()
        return list(seen) if declared is None else declared


class _Cursor:
    """Stands before a row: ``ahead``, not parsed yet, None at the end; ``row`` is its number, ``file`` its file's."""

    ahead: Raw | None

    def __init__(
        self,
        reader: Reader,
        files: Sequence[DataFile],
        columns: tuple[str, ...] | None,
        row: int,
        file: int,
        at: Place | None,
    ) -> None:
        self._reader, self._files, self.columns = reader, files, columns
        self.row, self.file = row, file
        self._rows: Iterator[Raw] = iter(reader.rows(files[file], at, columns))
        self._fetch()

    def advance(self) -> None:
        self.row += 1
        self._fetch()

    def close(self) -> None:
        close = getattr(self._rows, "close", None)
        if close is not None:
            close()

    def _fetch(self) -> None:
        while True:
            self.ahead = _reading(self._files[self.file], next, self._rows, None)
            if self.ahead is not None or self.file == len(self._files) - 1:
                return
            self.file += 1
            self._rows = iter(self._reader.rows(self._files[self.file], None, self.columns))


def _reading(file: DataFile, call: Any, *arguments: Any) -> Any:
    """``call(*arguments)``; what goes wrong in reading the file becomes a SourceError that names it."""
    errors: tuple[type[Exception], ...] = (OSError, EOFError, zlib.error, pa.ArrowException)
    if "aiohttp" in sys.modules:  # what fsspec reads http with; its errors are not all OSErrors
        errors += (sys.modules["aiohttp"].ClientError,)
    try:
        return call(*arguments)
    except errors as e:
        raise unreadable(file.name, e) from e
