"""Files as lines, plain or compressed, and what a reader of a format is; the text formats.

A row's position in such a file is ``{"offset": byte offset, "line": line number from 1}``. Plain files seek to the
offset. Compressed ones are decompressed up to it; nothing before it is parsed.
"""

from __future__ import annotations

import io
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, BinaryIO, NamedTuple, cast

from entrodrop_prep.sources.files import BUFFER, DataFile

BOM = b"\xef\xbb\xbf"
MAX_ROW_BYTES = 32 << 20
BLOCK = 1 << 17
Position = dict[str, int]
Parsed = tuple[dict[str, Any] | None, str | None]
Columns = dict[str, Any]
"""Column name -> its Arrow type where the format stores types, else None."""


class Raw(NamedTuple):
    """A row not parsed yet. ``at``: position in the file; ``done``: stored bytes before it; ``where``: for messages.

    ``problem``: why it was not kept. ``size``: about how many bytes it has.
    """

    at: Position
    done: int
    where: str
    payload: Any
    problem: str | None = None
    size: int = 0


class Reader(ABC):
    """Reads the files of one format. ``rows`` finds rows without parsing them, so that skipping is cheap.

    A row of more than ``max_row_bytes`` is not kept in memory; it comes with a ``problem``.
    """

    def __init__(self, max_row_bytes: int = MAX_ROW_BYTES) -> None:
        self._longest = max_row_bytes

    def look(self, file: DataFile) -> tuple[int | None, Columns | None]:
        """(number of rows, columns); None for what only reading would show.

        With a number of rows, ``{"row": n}`` is a position in the file.
        """
        return None, None

    def check(self, file: DataFile, columns: Sequence[str]) -> None:
        """Raises SourceError for a file of which a row of these columns cannot be read in bounded memory."""
        return None

    @abstractmethod
    def rows(self, file: DataFile, at: Position | None, columns: Sequence[str] | None) -> Iterator[Raw]:
        """The rows from the position ``at`` on, from the start for None."""

    @abstractmethod
    def parse(self, payload: Any) -> Parsed:
        """(values, None) or (None, what is wrong with the row)."""

    def _too_long(self, size: int) -> str:
        return too_long(size, self._longest)


def too_long(size: int, most: int) -> str:
    """What is wrong with a row of ``size`` bytes where ``most`` are allowed."""
    return f"row of {size:,} bytes, over the limit of {most:,}: raise --max-row-bytes to read it"


class LineReader(Reader):
    """One row a line, without its end (``\\n``, ``\\r\\n`` or ``\\r``); empty lines are rows, as in ``datasets``."""

    def look(self, file: DataFile) -> tuple[int | None, Columns | None]:
        return None, {"text": None}

    def rows(self, file: DataFile, at: Position | None, columns: Sequence[str] | None) -> Iterator[Raw]:
        for line in read_lines(file, at, longest=self._longest, universal=True):
            where, size = f"{file.name}:{line.number}", line.end - line.offset
            if line.content is None:
                yield Raw(line.position, line.done, where, None, self._too_long(size))
            else:
                yield Raw(line.position, line.done, where, line.content.rstrip(b"\r\n"), size=size)

    def parse(self, payload: Any) -> Parsed:
        text, problem = decode(payload)
        return (None, problem) if text is None else ({"text": text}, None)


class DocumentReader(Reader):
    """One row a file: its text, line ends as ``\\n``, as ``datasets`` gives it with ``sample_by="document"``.

    An empty file has no row. The position of the row is ``{"row": 0}``.
    """

    def look(self, file: DataFile) -> tuple[int | None, Columns | None]:
        return int(not is_empty(file)), {"text": None}

    def rows(self, file: DataFile, at: Position | None, columns: Sequence[str] | None) -> Iterator[Raw]:
        if at and at["row"]:
            return
        with decompressed(file) as (stream, _):
            content = stream.read(self._longest + 1)
            if len(content) > self._longest:
                size = len(content)
                while piece := stream.read(BUFFER):
                    size += len(piece)
                yield Raw({"row": 0}, 0, file.name, None, self._too_long(size))
            elif content:
                yield Raw({"row": 0}, 0, file.name, content.removeprefix(BOM), size=len(content))

    def parse(self, payload: Any) -> Parsed:
        text, problem = decode(payload, lines=True)
        if text is None:
            return None, problem
        return {"text": text.replace("\r\n", "\n").replace("\r", "\n") if "\r" in text else text}, None


def is_empty(file: DataFile) -> bool:
    """Whether a file has no content, decompressed if it is compressed. Raises what reading raises."""
    if file.compression is None or file.size > 128:  # what compresses nothing is shorter
        return file.size == 0 and file.fs is None
    return not head(file, 1)


def head(file: DataFile, count: int) -> bytes:
    """The first bytes of a file's content."""
    with decompressed(file) as (stream, _):
        return stream.read(count)


class Line(NamedTuple):
    """A line with its end. ``offset`` and ``end``: bytes (after decompression); ``done``: stored bytes before it.

    ``content`` is None for a line that is too long; ``quotes`` is how many ``"`` were in such a one.
    """

    offset: int
    end: int
    number: int
    done: int
    content: bytes | None
    quotes: int = 0

    @property
    def position(self) -> Position:
        return {"offset": self.offset, "line": self.number}


def read_lines(file: DataFile, at: Position | None, *, longest: int, universal: bool = False) -> Iterator[Line]:
    """The lines from a position on, without a byte order mark. ``universal``: a lone ``\\r`` ends a line too.

    Of a line of more than ``longest`` bytes nothing is kept. Raises OSError, EOFError, zlib.error or lzma.LZMAError for
    a file that is cut off or damaged.
    """
    offset, number = (at["offset"], at["line"]) if at else (0, 1)
    with decompressed(file) as (stream, stored):
        _move_to(stream, offset)
        done = stored.tell() if file.compression else offset
        parts: list[bytes] = []
        size = quotes = 0
        for piece in _pieces(stream, universal):
            size += len(piece)
            if size <= longest:
                parts.append(piece)
            else:
                quotes += piece.count(b'"') + sum(part.count(b'"') for part in parts)
                parts.clear()
            if not piece.endswith((b"\n", b"\r") if universal else b"\n"):
                continue
            yield _line(offset, number, done, parts, size, quotes)
            offset, number = offset + size, number + 1
            done = stored.tell() if file.compression else offset
            parts, size, quotes = [], 0, 0
        if size:
            yield _line(offset, number, done, parts, size, quotes)


def _line(offset: int, number: int, done: int, parts: list[bytes], size: int, quotes: int) -> Line:
    if not parts:
        return Line(offset, offset + size, number, done, None, quotes)
    content = parts[0] if len(parts) == 1 else b"".join(parts)
    return Line(offset, offset + size, number, done, content.removeprefix(BOM) if offset == 0 else content)


def _pieces(stream: BinaryIO, universal: bool) -> Iterator[bytes]:
    """Lines with their ends; one that reaches over blocks comes in several pieces, of which the last has the end."""
    while block := stream.read(BLOCK):
        while universal and block.endswith(b"\r") and (following := stream.read(1)):
            block += following
        if universal:
            yield from block.splitlines(keepends=True)
        else:
            start = 0
            while (end := block.find(b"\n", start) + 1) > 0:
                yield block[start:end]
                start = end
            if start < len(block):
                yield block[start:]


@contextmanager
def decompressed(file: DataFile) -> Iterator[tuple[BinaryIO, BinaryIO]]:
    """(stream of the content, stream of the stored bytes under it); the same one for a plain file."""
    with file.open() as stored:
        if file.compression is None:
            yield stored, stored
            return
        with _decompressor(stored, file.compression) as stream:
            yield cast(BinaryIO, stream), stored


def _decompressor(stored: BinaryIO, compression: str) -> Any:
    if compression == "gzip":
        import gzip

        return gzip.GzipFile(fileobj=stored)
    if compression == "zstd":
        import pyarrow as pa

        return io.BufferedReader(pa.CompressedInputStream(stored, "zstd"), BUFFER)
    import bz2
    import lzma

    return io.BufferedReader(_Streams(stored, bz2.BZ2Decompressor if compression == "bzip2" else lzma.LZMADecompressor))


class _Streams(io.RawIOBase):
    """Compressed streams one after the other, with nothing but zeros between and behind them.

    ``bz2`` and ``lzma`` take what they do not know behind a stream for its end, so that a damaged byte there hides all
    that follows.
    """

    def __init__(self, stored: BinaryIO, new: Callable[[], Any]) -> None:
        self._stored, self._new, self._stream = stored, new, new()

    def readable(self) -> bool:
        return True

    def readinto(self, target: Any) -> int:
        """Raises EOFError, OSError or lzma.LZMAError for a file that is cut off or damaged."""
        while True:
            given = b""
            if self._stream.eof:
                given = self._stream.unused_data.lstrip(b"\0")
                while not given and (given := self._stored.read(BLOCK)):
                    given = given.lstrip(b"\0")
                if not given:
                    return 0
                self._stream = self._new()
            elif self._stream.needs_input and not (given := self._stored.read(BLOCK)):
                raise EOFError("Compressed file ended before the end-of-stream marker was reached")
            if content := self._stream.decompress(given, len(target)):
                target[: len(content)] = content
                return len(content)


def decode(content: bytes, *, lines: bool = False) -> tuple[str | None, str | None]:
    """(text, None), or (None, where it is no text): columns count characters from 1, behind a line if ``lines``.

    A NUL is a character of UTF-8, but what has one is a binary file or UTF-16.
    """
    try:
        at, text = content.find(b"\0"), content.decode("utf-8")
    except UnicodeDecodeError as e:
        at, what = e.start, f"invalid UTF-8: byte 0x{content[e.start]:02x}"
    else:
        if at < 0:
            return text, None
        what = "a NUL byte (a binary file, or UTF-16)"
    before = content[:at].split(b"\n")
    line = f" in line {len(before)}" if lines else ""
    return None, f"{what}{line} at column {len(before[-1].decode('utf-8')) + 1}"


def _move_to(stream: BinaryIO, offset: int) -> None:
    """Seek where the stream can; else read up to there (compressed streams, servers that send no ranges)."""
    if offset == 0:
        return
    try:
        stream.seek(offset)
    except (ValueError, io.UnsupportedOperation):
        while offset > 0 and (piece := stream.read(min(offset, BUFFER))):
            offset -= len(piece)
