"""The items of a JSON array, one after the other: neither the file nor an item that is too long is held whole."""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

from entrodrop_prep.errors import SourceError
from entrodrop_prep.sources.lines import BLOCK

_OUTSIDE = re.compile(r'["\[\]{},]')
_INSIDE = re.compile(r'["\\]')
_FIX = "correct the file, or give one object a line"


class Item(NamedTuple):
    """``text``: the item as it is in the file; None for one of more bytes than may be kept. ``size``: its bytes."""

    text: str | None
    size: int


def array_items(stream: BinaryIO, name: str, longest: int) -> Iterator[Item]:
    """The items of the array that a stream of UTF-8 holds, as text.

    Only brackets and quotes decide where an item ends; what is between them is for the parser.

    Args:
        stream: the file's content, from its start.
        name: for messages.
        longest: an item of more bytes is not kept.

    Raises:
        SourceError: text that is not UTF-8, an empty item, no end of the array, something after it.
    """
    scan = _Scan(stream, name, longest)
    scan.space()
    scan.expect("[")
    scan.space()
    if scan.here() == "]":
        scan.at += 1
    else:
        while True:
            yield scan.item()
            if scan.here() == "]":
                scan.at += 1
                break
            scan.expect(",")
    scan.space()
    if scan.here():
        raise scan.broken("something follows the array")


class _Scan:
    """A position in a text that is read block by block; what is before it is thrown away."""

    def __init__(self, stream: BinaryIO, name: str, longest: int) -> None:
        self._stream, self._name, self._longest = stream, name, longest
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self._block, self.at, self._line, self._ended = "", 0, 1, False

    def here(self) -> str:
        """The character here; "" at the end."""
        while self.at >= len(self._block):
            if not self._more():
                return ""
        return self._block[self.at]

    def space(self) -> None:
        while (c := self.here()) and c in " \t\r\n":
            self.at += 1

    def expect(self, wanted: str) -> None:
        if self.here() != wanted:
            raise self.broken(f"there is no {wanted!r}" if self.here() else "it ends inside the array")
        self.at += 1

    def broken(self, what: str) -> SourceError:
        line = self._line + self._block.count("\n", 0, self.at)
        return SourceError(f"broken JSON array: {what}", where=f"{self._name}:{line}", fix=_FIX)

    def item(self) -> Item:
        """The text up to the comma or bracket that ends the item, which is left standing."""
        parts: list[str] = []
        depth = size = 0
        inside = escaped = False
        while True:
            if not self.here():
                raise self.broken("it ends inside the array")
            block, start, at, end = self._block, self.at, self.at, -1
            if escaped:
                at, escaped = at + 1, False
            while end < 0 and (found := (_INSIDE if inside else _OUTSIDE).search(block, at)):
                at, c = found.end(), found[0]
                if inside:
                    if c == '"':
                        inside = False
                    elif at == len(block):
                        escaped = True
                    else:
                        at += 1
                elif c == '"':
                    inside = True
                elif c in "[{":
                    depth += 1
                elif depth == 0:
                    end = at - 1
                elif c != ",":
                    depth -= 1
            piece = block[start : end if end >= 0 else len(block)]
            self.at = start + len(piece)
            size += len(piece) if piece.isascii() else len(piece.encode("utf-8", "surrogatepass"))
            if size <= self._longest:
                parts.append(piece)
            else:
                parts.clear()
            if end >= 0:
                text = "".join(parts).strip() if size <= self._longest else None
                if text == "":
                    raise self.broken("an item is empty")
                return Item(text, size)

    def _more(self) -> bool:
        if self._ended:
            return False
        stored = self._stream.read(BLOCK)
        self._line += self._block.count("\n")
        try:
            self._block, self.at = self._decoder.decode(stored, final=not stored), 0
        except UnicodeDecodeError as e:
            raise SourceError(f"invalid UTF-8: byte 0x{e.object[e.start]:02x}", where=self._name, fix=_FIX) from e
        self._ended = not stored
        return True
