"""A source made of files of one format, read one after the other."""

from __future__ import annotations

import bisect
import itertools
import logging
import lzma
import sys
import zlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from entrodrop_prep.errors import SourceError
from entrodrop_prep.sources.delimited import CsvReader
from entrodrop_prep.sources.files import DataFile, Found, check_name, mark_of, unreadable
from entrodrop_prep.sources.formats import HEAD_BYTES, KNOWN, format_of, mismatch
from entrodrop_prep.sources.json_rows import JsonReader
from entrodrop_prep.sources.lines import (
    BOM,
    MAX_ROW_BYTES,
    DocumentReader,
    LineReader,
    Position,
    Raw,
    Reader,
    head,
    is_empty,
)
from entrodrop_prep.sources.rows import Block, Chunk, Source, SourceRow
from entrodrop_prep.sources.splits import pick_split
from entrodrop_prep.sources.tables import ArrowReader, ParquetReader
from entrodrop_prep.sources.unions import Union

log = logging.getLogger(__name__)

READERS: dict[str, type[Reader]] = {
    "arrow": ArrowReader,
    "csv": CsvReader,
    "json": JsonReader,
    "parquet": ParquetReader,
    "text": DocumentReader,
}
ROWS_FOR_COLUMNS = 100
MOST_READ = 64 << 20
"""Stored bytes that a sample of compressed files reads."""


class FileSource(Source):
    """Files of one format as one source; rows are numbered through all of them in the order of their names."""

    def __init__(
        self,
        found: Found,
        *,
        where: str,
        split: str,
        limit: int | None,
        text_rows: str = "document",
        max_row_bytes: int = MAX_ROW_BYTES,
    ) -> None:
        """Raises SourceError for mixed formats, an unknown split, files that cannot be read, and no rows at all."""
        files, self._split, left_out = found.files, split if found.directory else None, found.left_out
        if not files:
            what = f"there are no data files; not read: {left_out}" if left_out else "there are no data files"
            raise SourceError(what, where=where, fix=f"known extensions: {KNOWN}")
        if found.directory:
            files = pick_split(files, split, where, left_out)
        formats = {str(format_of(f.name)): f.name for f in files}
        if len(formats) > 1:
            examples = ", ".join(f"{name} ({example})" for name, example in sorted(formats.items()))
            raise SourceError(f"mixed formats: {examples}", where=where, fix="give the files of one format as a glob")
        self.name, self._files, self._limit = found.name, files, limit
        check_name(self.name)
        self._format = next(iter(formats))
        self._text_rows = text_rows if self._format == "text" else None
        self._reader = (LineReader if self._text_rows == "line" else READERS[self._format])(max_row_bytes)
        self._cursor: _Cursor | None = None
        self._columns = Union()
        self._remote = {f.name: _reading(f, f.stat) for f in files if f.mark is None}
        self._counts = []
        for f in files:
            _reading(f, _check_content, f)
            count, columns = _reading(f, self._reader.look, f)
            self._counts.append(count)
            self._columns.add(columns or {}, f.name)
            if _reading(f, is_empty, f):
                left_out.add("empty", f.name)
        if left_out:
            log.warning("%s: files that are not read: %s", found.name, left_out)
        if self._text_rows:
            log.info("%s: %s", found.name, _described(len(files), self._text_rows))
        self._before = [0, *itertools.accumulate(f.size for f in files)]
        self.size_bytes = self._before[-1]
        counts = [count for count in self._counts if count is not None]
        self.total_rows = sum(counts) if len(counts) == len(files) else None
        if self.total_rows is not None and limit is not None:
            self.total_rows = min(self.total_rows, limit)
        self.columns = self._find_columns(where)

    @property
    def direct(self) -> bool:
        return self.total_rows is not None

    def identity(self) -> dict[str, Any]:
        return {
            "kind": "files",
            "format": self._format,
            "split": self._split,
            "files": [{"name": f.name, "size": f.size} for f in self._files],
            **({"text_rows": "document"} if self._text_rows == "document" else {}),
        }

    def check_unchanged(self, *, remote: bool = False) -> bool:
        certain = True
        for f in self._files:
            if f.mark is None:
                if remote and _reading(f, f.stat) != self._remote[f.name]:
                    raise _changed(f)
                continue
            now = mark_of(f.name, f.path)
            if now[:3] != f.mark[:3]:
                raise _changed(f)
            certain = certain and now.ctime == f.mark.ctime
        return certain

    def check(self, columns: Sequence[str]) -> None:
        self._columns.check(columns, self.name)
        for f in self._files:
            _reading(f, self._reader.check, f, columns)

    def stat(self) -> dict[str, Any]:
        return {f.name: _reading(f, f.stat) for f in self._files}

    def read(
        self,
        first: int,
        count: int,
        position: dict[str, Any] | None,
        columns: Sequence[str] | None = None,
        at_most: int | None = None,
    ) -> Chunk:
        stop = first + count if self._limit is None else min(first + count, self._limit)
        wanted = None if columns is None else tuple(columns)
        cursor, self._cursor = self._cursor, None
        if cursor is not None and cursor.columns == wanted and self._is_on_the_way(cursor, first, position):
            while cursor.row < first and cursor.ahead is not None:
                cursor.advance()
        if cursor is None or cursor.row != first or cursor.columns != wanted:
            if cursor is not None:
                cursor.close()
            cursor = self._cursor_at(first, position, wanted)
        began = self._done(cursor) if first else 0
        rows: list[SourceRow] = []
        size = 0
        while cursor.row < stop and cursor.ahead is not None and (at_most is None or size < at_most):
            rows.append(self._row(cursor.row, cursor.ahead))
            size += cursor.ahead.size
            cursor.advance()
        if cursor.ahead is None or cursor.row == self._limit:
            cursor.close()
            return Chunk(rows, None, self._done(cursor) - began)
        self._cursor = cursor
        return Chunk(rows, cursor.position, self._done(cursor) - began)

    def positions(self, every: int, position: dict[str, Any] | None = None) -> Iterator[dict[str, Any]]:
        cursor = self._cursor_at(position["row"] if position else 0, position, ())
        try:
            while cursor.ahead is not None and cursor.row != self._limit:
                if cursor.row and cursor.row % every == 0 and cursor.position != position:
                    yield cursor.position
                cursor.advance()
        finally:
            cursor.close()

    def _is_on_the_way(self, cursor: _Cursor, first: int, position: dict[str, Any] | None) -> bool:
        """Whether a row is reached sooner from here than from the start of its file, as a position in it is read to."""
        if position is None or cursor.row >= first or cursor.file != position["file"]:
            return False
        return self._files[cursor.file].compression is not None or "item" in position["at"]

    def blocks(self, rng: np.random.Generator, count: int, size: int) -> Iterator[Block]:
        """A sample of rows that nobody has counted, with the bytes that they stand for; rows are numbered as they come.

        Files of lines that are not compressed: those that begin in ``count`` windows of ``size`` bytes. Of others the
        beginnings of files in a random order, until as much was read as ``MOST_READ``.
        """
        number = 0
        if all(self._in_lines(f) for f in self._files):
            for at in ((np.arange(count) + rng.random(count)) * (self._before[-1] / count)).astype(int).tolist():
                file = bisect.bisect_right(self._before, at) - 1
                f, start = self._files[file], at - self._before[file]
                stop = min(start + size, f.size)
                found = []
                for raw in _reading(f, self._reader.rows, f, {"offset": start, "line": 1}, None):
                    if raw.at["offset"] >= stop:
                        break
                    if raw.at["offset"] > start or not start:
                        found.append(raw._replace(where=f"{f.name} at byte {raw.at['offset']:,}"))
                yield Block(self._numbered(found, number), len(found), stop - start, sum(raw.size for raw in found))
                number += len(found)
            return
        read = 0
        for file in rng.permutation(len(self._files)).tolist():
            cursor, found, before = _Cursor(self._reader, self._files[: file + 1], None, 0, file, None), [], read
            while cursor.ahead is not None and read - before < MOST_READ // 4:
                found.append(cursor.ahead)
                read = before + self._done(cursor) - self._before[file]
                cursor.advance()
            if cursor.ahead is None:
                read = before + self._files[file].size
            cursor.close()
            pieces = max(1, min(len(found), max(4, count // len(self._files))))
            stored = (read - before) / max(1, sum(raw.size for raw in found))
            for piece in np.array_split(np.arange(len(found)), pieces):
                raws = [found[i] for i in piece]
                chosen = raws[: max(1, size // 2048)]
                sizes = [stored * sum(raw.size for raw in some) for some in (raws, chosen)]
                yield Block(self._numbered(chosen, number), len(raws), *sizes)
                number += len(raws)
            if read >= MOST_READ:
                return

    def _in_lines(self, file: DataFile) -> bool:
        """Whether any line of a file begins a row, and can be sought."""
        if file.compression or file.in_one_piece or self._format not in ("json", "text"):
            return False
        return file.extension != ".json" or not head(file, HEAD_BYTES).removeprefix(BOM).lstrip().startswith(b"[")

    def _numbered(self, found: list[Raw], number: int) -> list[SourceRow]:
        return [self._row(number + i, raw) for i, raw in enumerate(found)]

    def _row(self, number: int, raw: Raw) -> SourceRow:
        values, problem = (None, raw.problem) if raw.problem else self._reader.parse(raw.payload)
        return SourceRow(number, raw.where, values, problem)

    def _done(self, cursor: _Cursor) -> int:
        return self._before[cursor.file] + cursor.ahead.done if cursor.ahead else self._before[-1]

    def _cursor_at(self, first: int, position: dict[str, Any] | None, columns: tuple[str, ...] | None) -> _Cursor:
        """A cursor that is before row ``first``, or at the end."""
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
        """The columns, declared or seen. Raises SourceError for a source without rows, or none that can be read."""
        peek = min(ROWS_FOR_COLUMNS, self._limit or ROWS_FOR_COLUMNS)
        cursor = self._cursor_at(0, None, () if self._format in ("parquet", "arrow") else None)
        if cursor.ahead is None:
            cursor.close()
            raise SourceError("holds no rows", where=where, fix="give a source with at least one row")
        if self._format != "json":
            cursor.close()
            return self._columns.names
        seen: dict[str, None] = {}
        first: SourceRow | None = None
        good = 0
        while cursor.row < peek and cursor.ahead is not None:
            row = self._row(cursor.row, cursor.ahead)
            first, good = first or row, good + (row.values is not None)
            seen.update(dict.fromkeys(row.values or ()))
            cursor.advance()
        cursor.close()
        if first is not None and not good:
            which = f"none of its first {cursor.row} rows" if cursor.row > 1 else "its first row"
            what = (
                f"{which} is a JSON object: {first.problem}"
                if cursor.row > 1
                else f"{which} is no JSON object: {first.problem}"
            )
            fix = "give JSON lines, one object a line; plain text is read from a file called .txt"
            raise SourceError(what, where=first.where, fix=fix)
        return list(seen)


def _changed(file: DataFile) -> SourceError:
    fix = "leave it as it is while it is scored; restore it and run again, or score what it is now with --overwrite"
    return SourceError("it changed during the run, so its rows would be of both", where=file.name, fix=fix)


def _check_content(file: DataFile) -> None:
    """Raises SourceError for a local file that is not what its name says. Of a remote one nothing is asked for this."""
    if file.fs is None:
        with file.open() as stored:
            wrong = mismatch(file.name, stored.read(HEAD_BYTES))
        if wrong:
            raise SourceError(wrong, where=file.name, fix="rename it after what it is, or convert it")


def _described(files: int, text_rows: str) -> str:
    if text_rows == "line":
        return f"{files:,} text file{'s' * (files > 1)}, one row a line (--text-rows line)"
    return f"{files:,} text file{'s' * (files > 1)}, each one document (--text-rows line makes one row of each line)"


class _Cursor:
    """A cursor before a row: ``ahead``, not parsed yet, None at the end; ``row`` is its number, ``file`` its file's."""

    ahead: Raw | None

    def __init__(
        self,
        reader: Reader,
        files: Sequence[DataFile],
        columns: tuple[str, ...] | None,
        row: int,
        file: int,
        at: Position | None,
    ) -> None:
        self._reader, self._files, self.columns = reader, files, columns
        self.row, self.file = row, file
        self._rows: Iterator[Raw] = iter(reader.rows(files[file], at, columns))
        self._fetch()

    @property
    def position(self) -> dict[str, Any]:
        """Of the row ahead, for a later process."""
        return {"row": self.row, "file": self.file, "at": self.ahead.at if self.ahead else None}

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
    errors: tuple[type[Exception], ...] = (
        OSError,
        EOFError,
        zlib.error,
        lzma.LZMAError,
        pa.ArrowException,
        UnicodeError,
    )
    if "aiohttp" in sys.modules:  # what fsspec reads http with; its errors are not all OSErrors
        errors += (sys.modules["aiohttp"].ClientError,)
    try:
        return call(*arguments)
    except errors as e:
        raise unreadable(file.name, e) from e
