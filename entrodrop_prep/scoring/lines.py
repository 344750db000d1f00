"""Files as lines, plain or compressed, and what a reader of a format is; the text format.

A row's place in such a file is ``{"offset": byte offset, "line": line number from 1}``. Plain files seek to the offset.
Compressed ones are decompressed up to it; nothing before it is parsed.
"""

from __future__ import annotations

import gzip
import io
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, BinaryIO, NamedTuple, cast

from entrodrop_prep.scoring.files import BUFFER, DataFile

BOM = b"\xef\xbb\xbf"
Place = dict[str, int]
Parsed = tuple[dict[str, Any] | None, str | None]
_PIECES = re.compile(rb"[^\r\n]*(?:\r\n|\r|\n)|[^\r\n]+")


class Raw(NamedTuple):
    """A row not parsed yet. ``at``: place in the file; ``done``: stored bytes before it; ``where``: for messages."""

    at: Place
    done: int
    where: str
    payload: Any


class Reader(ABC):
    """Reads the files of one format. ``rows`` finds rows without parsing them, so that skipping is cheap."""

    def count(self, file: DataFile) -> int | None:
        """Number of rows, None where only reading would tell. With a count, ``{"row": n}`` is a place in the file."""
        return None

    @abstractmethod
    def columns(self, file: DataFile) -> list[str] | None:
        """Declared columns; None where the format declares none."""

    @abstractmethod
    def rows(self, file: DataFile, at: Place | None, columns: Sequence[str] | None) -> Iterator[Raw]:
        """The rows from the place ``at`` on, from the start for None."""

    @abstractmethod
    def parse(self, payload: Any) -> Parsed:
        """(values, None) or (None, what is wrong with the row)."""


class TextReader(Reader):
    """One row a line, without its end (``\\n``, ``\\r\\n`` or ``\\r``); empty lines are rows, as in ``datasets``."""

    def columns(self, file: DataFile) -> list[str] | None:
        return ["text"]

    def rows(self, file: DataFile, at: Place | None, columns: Sequence[str] | None) -> Iterator[Raw]:
        for line in read_lines(file, at, universal=True):
            yield Raw(line.place, line.done, f"{file.name}:{line.number}", line.content.rstrip(b"\r\n"))

    def parse(self, payload: Any) -> Parsed:
        text, problem = decode(payload)
        return (None, problem) if text is None else ({"text": text}, None)


class Line(NamedTuple):
    """A line with its end. ``offset`` and ``end``: bytes (after decompression); ``done``: stored bytes before it."""

    offset: int
    end: int
    number: int
    done: int
    content: bytes

    @property
    def place(self) -> Place:
        return {"offset": self.offset, "line": self.number}


def read_lines(file: DataFile, at: Place | None, *, universal: bool = False) -> Iterator[Line]:
    """The lines from a place on, without a byte order mark. ``universal``: a lone ``\\r`` ends a line too.

    Raises OSError, EOFError or zlib.error for a file that is cut off or damaged.
    """
    offset, number = (at["offset"], at["line"]) if at else (0, 1)
    with decompressed(file) as (stream, stored):
        _move_to(stream, offset)
        done = stored.tell() if file.compression else offset
        for whole in stream:
            for content in _PIECES.findall(whole) if universal and b"\r" in whole else (whole,):
                end = offset + len(content)
                yield Line(offset, end, number, done, content.removeprefix(BOM) if offset == 0 else content)
                offset, number = end, number + 1
                done = stored.tell() if file.compression else end


@contextmanager
def decompressed(file: DataFile) -> Iterator[tuple[BinaryIO, BinaryIO]]:
    """(stream of the content, stream of the stored bytes under it); the same one for a plain file."""
    with file.open() as stored:
        if file.compression == ".gz":
            with gzip.GzipFile(fileobj=stored) as unzipped:
                yield cast(BinaryIO, unzipped), stored
        elif file.compression == ".zst":
            import pyarrow as pa

            with io.BufferedReader(pa.CompressedInputStream(stored, "zstd"), BUFFER) as unzipped:
                yield cast(BinaryIO, unzipped), stored
        else:
            yield stored, stored


def decode(content: bytes) -> tuple[str | None, str | None]:
    """(text, None), or (None, where the UTF-8 is broken); columns count characters from 1."""
    try:
        return content.decode("utf-8"), None
    except UnicodeDecodeError as e:
        column = len(content[: e.start].decode("utf-8")) + 1
        return None, f"invalid UTF-8: byte 0x{content[e.start]:02x} at column {column}"


def _move_to(stream: BinaryIO, offset: int) -> None:
    """Seek where the stream can; else read up to there (compressed streams, servers that send no ranges)."""
    if offset == 0:
        return
    try:
        stream.seek(offset)
    except (ValueError, io.UnsupportedOperation):
        while offset > 0 and (piece := stream.read(min(offset, BUFFER))):
            offset -= len(piece)
