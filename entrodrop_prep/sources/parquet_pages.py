"""Sizes of the pages of a Parquet file, from the pages' headers.

A page is what a reader decompresses as a whole. Its header is a ``PageHeader`` of parquet.thrift in Thrift's compact
protocol: fields 1 to 3 are its type, its uncompressed and its compressed size, and its content follows the header.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, BinaryIO

from entrodrop_prep.sources.files import DataFile

DICTIONARY = 2
"""The type of a page with a dictionary."""
_STOP, _TRUE, _FALSE, _BYTE, _I32, _DOUBLE, _BINARY, _STRUCT = 0, 1, 2, 3, 5, 7, 8, 12
_INTEGERS = (4, _I32, 6)
_DEEPEST = 8


class _NoHeaderError(Exception):
    """There is no page header here."""


def page_sizes(file: DataFile, chunk: Any) -> Iterator[tuple[str, int]]:
    """("dictionary" or "page", uncompressed bytes) of each page of a column chunk.

    Args:
        file: the file.
        chunk: the ``ColumnChunkMetaData`` of a column chunk in it.

    Yields:
        The pages in order, up to a header that cannot be read: who reads the rows says what is wrong there.
    """
    offset = chunk.data_page_offset
    if chunk.has_dictionary_page and chunk.dictionary_page_offset is not None:
        offset = min(offset, chunk.dictionary_page_offset)
    end = offset + chunk.total_compressed_size
    try:
        with file.open() as stream:
            while 0 <= offset < end:
                stream.seek(offset)
                kind, size, stored = _header(stream)
                yield "dictionary" if kind == DICTIONARY else "page", size
                offset = stream.tell() + stored
    except _NoHeaderError:
        return


def _header(stream: BinaryIO) -> tuple[int, int, int]:
    """(type, uncompressed bytes, compressed bytes) of a page; the stream is then at its content."""
    found, number = dict[int, int](), 0
    while (byte := _read(stream, 1)[0]) != _STOP:
        number = number + (byte >> 4) if byte >> 4 else _zigzag(stream)
        if byte & 15 == _I32 and number <= 3:
            found[number] = _zigzag(stream)
        else:
            _skip(stream, byte & 15, 0)
    if found.keys() != {1, 2, 3} or min(found.values()) < 0:
        raise _NoHeaderError
    return found[1], found[2], found[3]


def _skip(stream: BinaryIO, kind: int, depth: int) -> None:
    """Pass over a value of a field; page headers have no lists or maps."""
    if depth > _DEEPEST:
        raise _NoHeaderError
    if kind in _INTEGERS:
        _varint(stream)
    elif kind in (_BYTE, _DOUBLE):
        _read(stream, 1 if kind == _BYTE else 8)
    elif kind == _BINARY:
        stream.seek(_varint(stream), 1)
    elif kind == _STRUCT:
        while (byte := _read(stream, 1)[0]) != _STOP:
            if not byte >> 4:
                _varint(stream)
            _skip(stream, byte & 15, depth + 1)
    elif kind not in (_TRUE, _FALSE):
        raise _NoHeaderError


def _zigzag(stream: BinaryIO) -> int:
    value = _varint(stream)
    return (value >> 1) ^ -(value & 1)


def _varint(stream: BinaryIO) -> int:
    value = 0
    for shift in range(0, 35, 7):  # no size in a header has more than 32 bits
        byte = _read(stream, 1)[0]
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value
    raise _NoHeaderError


def _read(stream: BinaryIO, count: int) -> bytes:
    data = stream.read(count)
    if len(data) < count:
        raise _NoHeaderError
    return data
