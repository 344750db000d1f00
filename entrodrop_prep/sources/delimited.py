"""CSV and TSV files."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from entrodrop_prep.errors import SourceError
from entrodrop_prep.sources.files import DataFile
from entrodrop_prep.sources.lines import Columns, Line, Parsed, Position, Raw, Reader, read_lines

LONGEST_FIELD = 2**31 - 1
_UNDECODED = re.compile("[\udc80-\udcff]")


class CsvReader(Reader):
    """Comma-separated (``.tsv``: tab-separated) with a header; values are strings, an empty field is an empty string.

    Quoted fields may span lines and be long (the csv module's limit, which the process shares, is raised for that).
    Blank lines are no rows. Each file has its own header; a column that it lacks is null in its rows.
    """

    def look(self, file: DataFile) -> tuple[int | None, Columns | None]:
        return None, dict.fromkeys(self._header(file)[0])

    def rows(self, file: DataFile, at: Position | None, columns: Sequence[str] | None) -> Iterator[Raw]:
        header, start = self._header(file)
        for record in _records(file, at or start, self._longest):
            where = f"{file.name}:{record.position['line']}"
            if record.fields is None:
                yield Raw(record.position, record.done, where, None, self._too_long(record.size))
            elif record.fields:
                yield Raw(record.position, record.done, where, (header, record.fields), size=record.size)

    def parse(self, payload: Any) -> Parsed:
        header, fields = payload
        if isinstance(fields, str):
            return None, fields
        if len(fields) != len(header):
            return None, f"{len(fields)} fields where the header has {len(header)}"
        for name, value in zip(header, fields, strict=True):
            if not value.isascii() and _UNDECODED.search(value):
                return None, f"invalid UTF-8 in column {name!r}"
            if "\0" in value:
                return None, f"a NUL byte (a binary file, or UTF-16) in column {name!r}"
        return dict(zip(header, fields, strict=True)), None

    def _header(self, file: DataFile) -> tuple[list[str], Position]:
        """The column names ([] for an empty file), and the position after them. Raises SourceError."""
        for record in _records(file, None, self._longest):
            where = f"{file.name}:{record.position['line']}"
            if record.fields is None:
                raise SourceError(self._too_long(record.size), where=where)
            if not record.fields:
                continue
            if isinstance(record.fields, str):
                raise SourceError(f"the header: {record.fields}", where=where, fix="correct the file")
            twice = [name for n, name in enumerate(record.fields) if name in record.fields[:n]]
            if twice:
                raise SourceError(f"the header names {twice[0]!r} twice", where=where, fix="rename one of the columns")
            return record.fields, record.after
        return [], {"offset": 0, "line": 1}


class _Record(NamedTuple):
    """A record's fields as text, or what is wrong with it; None if it was too long to keep.

    ``position`` is where it begins, ``after`` where the next one does; ``done``: stored bytes before it.
    """

    fields: list[str] | str | None
    position: Position
    after: Position
    done: int
    size: int


class _TooLong(Exception):
    """The record that is being read has more bytes than may be kept."""


class _Feed:
    """Gives the csv module just the lines that a record needs, so that positions are exact."""

    def __init__(self, file: DataFile, at: Position | None, longest: int) -> None:
        self._lines, self._longest = read_lines(file, at, longest=longest, universal=True), longest
        self.after: Position = at or {"offset": 0, "line": 1}
        self.begin()

    def begin(self) -> None:
        """A record begins here."""
        self.position, self.size, self._quotes = self.after, 0, 0
        self.done: int | None = None

    def __iter__(self) -> Iterator[str]:
        while (line := self._next()) is not None:
            if line.content is None or self.size > self._longest:
                raise _TooLong
            # Bytes that are no UTF-8 become lone surrogates, so that only the row that holds them is bad.
            yield line.content.decode("utf-8", "surrogateescape")

    def skip(self) -> None:
        """Move behind the record that was too long: its last line is the one after which its quotes are even."""
        while self._quotes % 2 and self._next() is not None:
            pass

    def _next(self) -> Line | None:
        line = next(self._lines, None)
        if line is not None:
            self.after = {"offset": line.end, "line": line.number + 1}
            self.done = line.done if self.done is None else self.done
            self.size += line.end - line.offset
            self._quotes += line.quotes if line.content is None else line.content.count(b'"')
        return line


def _records(file: DataFile, at: Position | None, longest: int) -> Iterator[_Record]:
    """Records from a position on."""
    csv.field_size_limit(LONGEST_FIELD)
    feed = _Feed(file, at, longest)

    def reader() -> Any:
        return csv.reader(iter(feed), delimiter="\t" if file.extension == ".tsv" else ",", strict=True)

    records = reader()
    while True:
        feed.begin()
        fields: list[str] | str | None
        try:
            fields = next(records, None)
            if fields is None:
                return
        except csv.Error as e:
            fields = f"broken CSV: {e}"
        except _TooLong:
            feed.skip()
            fields, records = None, reader()
        yield _Record(fields, feed.position, feed.after, feed.done or 0, feed.size)
