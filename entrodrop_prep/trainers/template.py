"""Scripts and settings with places for values and lines that stand only where something holds."""

from __future__ import annotations

import json
import re
import shlex
import string

_MARK = re.compile(r"[ \t]*#\? (!?)(\w+)$")


def text(value: str) -> str:
    """A string as a literal that Python and YAML both read, in one line and without a character that cannot be seen.

    Letters stay, those outside the first plane too: of an emoji that JSON escapes Python makes two surrogates.
    """
    return "".join(c if c.isprintable() else _escaped(ord(c)) for c in json.dumps(value, ensure_ascii=False))


def _escaped(code: int) -> str:
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def names(values: list[str]) -> str:
    """A list of strings as Python reads it."""
    return f"[{', '.join(map(text, values))}]"


def word(value: str) -> str:
    """A string as one word of Bash, without a character that acts on a terminal."""
    if all(c.isprintable() or c == "\n" for c in value):
        return shlex.quote(value)
    data = value.encode("utf-8", "surrogateescape")  # a name that is not UTF-8 is its bytes
    return "$'" + "".join(chr(b) if 0x20 <= b < 0x7F and b not in b"'\\" else f"\\x{b:02x}" for b in data) + "'"


def fill(template: str, values: dict[str, str | int], holds: dict[str, bool]) -> str:
    """A template with ``$name`` exchanged for values. A line that ends in ``#? name`` stands only where ``name`` holds,
    one that ends in ``#? !name`` only where it does not. Strings among the values come from ``text``, ``names`` or
    ``word``: what is in them is data.
    """
    lines = []
    for line in template.splitlines():
        mark = _MARK.search(line)
        if mark is None or holds[mark[2]] != bool(mark[1]):
            lines.append(line[: mark.start()] if mark else line)
    return string.Template("\n".join(lines) + "\n").substitute(values)
