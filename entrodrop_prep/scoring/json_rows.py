"""JSON lines, and JSON files that are one array."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from typing import Any, cast

from entrodrop_prep.errors import SourceError
from entrodrop_prep.scoring.files import DataFile
from entrodrop_prep.scoring.lines import BOM, Parsed, Place, Raw, Reader, decode, decompressed, read_lines

DEEPEST = 500
"""Levels of a row. What Python can read depends on who calls, and on its version: so that is no measure."""
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


class JsonReader(Reader):
    """One object a line; blank lines are no rows. A ``.json`` file that begins with ``[`` is one array, loaded whole.

    Each row is parsed on its own: objects keep exactly their keys, of a key given twice the last wins, NaN and Infinity
    are taken as Python's json does.
    """

    def __init__(self) -> None:
        self._array: tuple[DataFile, list[Any], bool] | None = None

    def columns(self, file: DataFile) -> list[str] | None:
        return None

    def rows(self, file: DataFile, at: Place | None, columns: Sequence[str] | None) -> Iterator[Raw]:
        start = _first_line(file) if file.extension == ".json" else b""
        if start.strip() == b"{":
            what = "one JSON object over several lines"
            raise SourceError(what, where=file.name, fix="give one object a line, or an array of objects")
        if start.startswith(b"["):
            items, surrogates = self._load(file)
            for n in range(at["item"] if at else 0, len(items)):
                done = file.size * n // len(items)
                yield Raw({"item": n}, done, f"{file.name} row {n}", (items[n], surrogates))
            return
        for line in read_lines(file, at):
            if not line.content.isspace():
                yield Raw(line.place, line.done, f"{file.name}:{line.number}", line.content)

    def parse(self, payload: Any) -> Parsed:
        if isinstance(payload, tuple):
            item, surrogates = payload
            return _object(item, surrogates, _is_deep(item))
        text, problem = decode(payload)
        if text is None:
            return None, problem
        try:
            value = json.loads(text)
        except json.JSONDecodeError as e:
            return None, f"broken JSON: {e.msg} at column {e.colno}"
        except (ValueError, RecursionError) as e:
            return None, f"JSON that cannot be read: {e}"
        deep = text.count("[") + text.count("{") > DEEPEST and _is_deep(value)
        return _object(value, _SURROGATE.search(text) is not None, deep)

    def _load(self, file: DataFile) -> tuple[list[Any], bool]:
        """The array's items, and whether some text in it may hold surrogates. The last file stays loaded."""
        if self._array is None or self._array[0] != file:
            self._array = None
            with decompressed(file) as (stream, _):
                stored = stream.read()
            try:
                text = stored.decode("utf-8-sig")
                items = cast(list[Any], json.loads(text))
            except json.JSONDecodeError as e:
                what = f"broken JSON array: {e.msg} at column {e.colno}"
                raise SourceError(what, where=f"{file.name}:{e.lineno}", fix="mend the file") from e
            except (ValueError, RecursionError) as e:
                raise SourceError(f"JSON array that cannot be read: {e}", where=file.name, fix="mend the file") from e
            self._array = file, items, _SURROGATE.search(text) is not None
        return self._array[1], self._array[2]


def _first_line(file: DataFile) -> bytes:
    """The first line that is not blank, from its first character on; b"" where there is none."""
    with decompressed(file) as (stream, _):
        for n, line in enumerate(stream):
            text = (line.removeprefix(BOM) if n == 0 else line).lstrip()
            if text:
                return text
    return b""


def _is_deep(value: Any) -> bool:
    """Whether lists and objects stand in one another deeper than ``DEEPEST``."""
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
