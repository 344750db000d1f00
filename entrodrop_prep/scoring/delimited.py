"""CSV and TSV files."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from entrodrop_prep.errors import SourceError
from entrodrop_prep.scoring.files import DataFile
from entrodrop_prep.scoring.lines import Parsed, Place, Raw, Reader, read_lines

LONGEST_FIELD = 2**31 - 1
_UNDECODED = re.compile("[\udc80-\udcff]")


class CsvReader(Reader):
    """Comma-separated (``.tsv``: tab-separated) with a header; values are strings, an empty field is an empty string.

    Quoted fields may span lines and be long (the csv module's limit, which the process shares, is raised for that).
    Blank lines are no rows.
    """

    def columns(self, file: DataFile) -> list[str] | None:
        return _header(file)[0]

    def rows(self, file: DataFile, at: Place | None, columns: Sequence[str] | None) -> Iterator[Raw]:
        header, start = _header(file)
        for record in _records(file, at or start):
            if record.fields:
                where = f"{file.name}:{record.place['line']}"
                yield Raw(record.place, record.done, where, (header, record.fields))

    def parse(self, payload: Any) -> Parsed:
        header, fields = payload
        if isinstance(fields, str):
            return None, fields
        if len(fields) != len(header):
            return None, f"{len(fields)} fields where the header has {len(header)}"
        for name, value in zip(header, fields, strict=True):
            if not value.isascii() and _UNDECODED.search(value):
                return None, f"invalid UTF-8 in column {name!r}"
        return dict(zip(header, fields, strict=True)), None


class _Record(NamedTuple):
    """``fields`` as text, or what is wrong; the place it begins and the one after it; stored bytes before it."""

    fields: list[str] | str
    place: Place
    after: Place
    done: int


def _header(file: DataFile) -> tuple[list[str], Place]:
    """The column names ([] for an empty file), and the place after them. Raises SourceError."""
    for record in _records(file, None):
        if not record.fields:
            continue
        where = f"{file.name}:{record.place['line']}"
        if isinstance(record.fields, str):
            raise SourceError(f"the header: {record.fields}", where=where, fix="mend the file")
        twice = [name for n, name in enumerate(record.fields) if name in record.fields[:n]]
        if twice:
            raise SourceError(f"the header names {twice[0]!r} twice", where=where, fix="rename one of the columns")
        return record.fields, record.after
    return [], {"offset": 0, "line": 1}


def _records(file: DataFile, at: Place | None) -> Iterator[_Record]:
    """Records from a place on. The csv module takes just the lines that a record needs, so places are exact."""
    csv.field_size_limit(LONGEST_FIELD)
    after = at or {"offset": 0, "line": 1}
    dones: list[int] = []

    def feed() -> Iterator[str]:
        nonlocal after
        for line in read_lines(file, at, universal=True):
            after = {"offset": line.end, "line": line.number + 1}
            dones.append(line.done)
            # Bytes that are no UTF-8 become lone surrogates, so that only the row that holds them is bad.
            yield line.content.decode("utf-8", "surrogateescape")

    records = csv.reader(feed(), delimiter="\t" if file.extension == ".tsv" else ",", strict=True)
    while True:
        place = after
        dones.clear()
        fields: list[str] | str | None
        try:
            fields = next(records, None)
        except csv.Error as e:
            fields = f"broken CSV: {e}"
        if fields is None:
            return
        yield _Record(fields, place, after, dones[0] if dones else 0)
