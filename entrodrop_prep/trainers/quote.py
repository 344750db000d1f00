"""Values as literals of what a recipe is written in: what is in them is data there."""

from __future__ import annotations

import json
import shlex
from decimal import Decimal
from typing import Any


def text(value: str) -> str:
    """A string as a literal that Python and YAML both read, in one line and without a character that cannot be seen.

    Letters stay, those outside the first plane too: of an emoji that JSON escapes Python makes two surrogates.
    """
    return "".join(c if c.isprintable() else _escaped(ord(c)) for c in json.dumps(value, ensure_ascii=False))


def _escaped(code: int) -> str:
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def word(value: str) -> str:
    """A string as one word of Bash, without a character that acts on a terminal."""
    if all(c.isprintable() or c == "\n" for c in value):
        return shlex.quote(value)
    data = value.encode("utf-8", "surrogateescape")  # a name that is not UTF-8 is its bytes
    return "$'" + "".join(chr(b) if 0x20 <= b < 0x7F and b not in b"'\\" else f"\\x{b:02x}" for b in data) + "'"


def literal(value: Any, form: str) -> str:
    """A string, a number or a list of strings as a literal of ``py``, ``yaml`` or ``sh``."""
    if isinstance(value, list):
        return f"[{', '.join(literal(item, form) for item in value)}]"
    if isinstance(value, str):
        return word(value) if form == "sh" else text(value)
    if isinstance(value, bool) and form != "py":
        return str(value).lower()
    if isinstance(value, float):  # YAML takes 1e-05 for a text
        return format(Decimal(str(value)), "f")
    return str(value)
