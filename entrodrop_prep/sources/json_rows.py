"""JSON lines, and JSON files that are one array."""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from entrodrop_prep.errors import SourceError
from entrodrop_prep.sources.files import BUFFER, DataFile
from entrodrop_prep.sources.json_array import array_items
from entrodrop_prep.sources.lines import BOM, Parsed, Position, Raw, Reader, decode, decompressed, read_lines

DEEPEST = 500
"""Levels of a row. What Python can read depends on who calls, and on its version: so that is no measure."""
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


class JsonReader(Reader):
    """One object a line; blank lines are no rows. A ``.json`` file that begins with ``[`` is one array.

    Each row is parsed on its own: objects keep exactly their keys, one with a key twice makes the row bad, NaN and
    Infinity are taken as Python's json does.
    """

    def rows(self, file: DataFile, at: Position | None, columns: Sequence[str] | None) -> Iterator[Raw]:
        start = _first_line(file) if file.extension == ".json" else b""
        if start.strip() == b"{":
            what = "one JSON object over several lines"
            raise SourceError(what, where=file.name, fix="give one object a line, or an array of objects")
        if start.startswith(b"["):
            yield from self._array(file, at["item"] if at else 0)
            return
        for line in read_lines(file, at, longest=self._longest):
            where, size = f"{file.name}:{line.number}", line.end - line.offset
            if line.content is None:
                yield Raw(line.position, line.done, where, None, self._too_long(size))
            elif not line.content.isspace():
                yield Raw(line.position, line.done, where, line.content, size=size)

    def _array(self, file: DataFile, first: int) -> Iterator[Raw]:
        with decompressed(file) as (stream, stored):
            done = 0
            for n, item in enumerate(array_items(stream, file.name, self._longest)):
                if n >= first:
                    where = f"{file.name} row {n}"
                    if item.text is None:
                        yield Raw({"item": n}, done, where, None, self._too_long(item.size))
                    else:
                        yield Raw({"item": n}, done, where, item.text, size=item.size)
                done = min(file.size, stored.tell()) if file.size else 0

    def parse(self, payload: Any) -> Parsed:
        if isinstance(payload, str):
            text: str | None = payload
        else:
            text, problem = decode(payload)
            if text is None:
                return None, problem
        return parse_object(str(text))


class _KeyTwice(Exception):
    """An object has a key more than once."""


def _members(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise _KeyTwice(Counter(name for name, _ in pairs).most_common(1)[0][0])
    return found


def parse_object(text: str) -> Parsed:
    """The JSON object that a text is, or what is wrong with it."""
    try:
        value = json.loads(text, object_pairs_hook=_members)
    except _KeyTwice as e:
        return None, f"an object has the key {e.args[0][:40]!r} twice"
    except json.JSONDecodeError as e:
        return None, f"broken JSON: {e.msg.removesuffix(' at')} at column {e.colno}"
    except RecursionError:
        return None, f"JSON nested more than {DEEPEST} levels deep"
    except ValueError:
        return None, f"JSON with a number of more than {sys.get_int_max_str_digits():,} digits"
    deep = text.count("[") + text.count("{") > DEEPEST and _is_deep(value)
    return _object(value, _SURROGATE.search(text) is not None, deep)


def _first_line(file: DataFile) -> bytes:
    """What the first line that is not blank begins with; b"" where there is none."""
    with decompressed(file) as (stream, _):
        start = stream.read(BUFFER).removeprefix(BOM).lstrip()
        while not start and (block := stream.read(BUFFER)):
            start = block.lstrip()
    return start.partition(b"\n")[0]


def _is_deep(value: Any) -> bool:
    """Whether lists and objects are nested deeper than ``DEEPEST``."""
    level = [value]
    for _ in range(DEEPEST):
        lists = [item for item in level if isinstance(item, list)]
        objects = [item.values() for item in level if isinstance(item, dict)]
        level = [item for items in (*lists, *objects) for item in items if isinstance(item, (list, dict))]
        if not level:
            return False
    return True


def _object(value: Any, surrogates: bool, deep: bool) -> Parsed:
    if deep:
        return None, f"JSON nested more than {DEEPEST} levels deep"
    if not isinstance(value, dict):
        kinds = {list: "an array", str: "a string", bool: "a boolean", type(None): "null"}
        return None, f"not a JSON object but {kinds.get(type(value), 'a number')}"
    if surrogates:
        try:
            json.dumps(value, ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError:
            return None, "a string holds half of a surrogate pair (\\ud800 to \\udfff), which is no character"
    return value, None
