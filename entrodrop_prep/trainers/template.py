"""Scripts and settings with places for values and lines that stand only where something holds."""

from __future__ import annotations

import json
import re
import string

_MARK = re.compile(r"[ \t]*#\? (!?)(\w+)$")


def text(value: str) -> str:
    """A string as Python and YAML both read it. Other letters stay: of an escaped emoji Python makes two surrogates."""
    return json.dumps(value, ensure_ascii=False)


def fill(template: str, values: dict[str, str | int], holds: dict[str, bool]) -> str:
    """A template with ``$name`` exchanged for values. A line that ends in ``#? name`` stands only where ``name`` holds,
    one that ends in ``#? !name`` only where it does not.
    """
    lines = []
    for line in template.splitlines():
        mark = _MARK.search(line)
        if mark is None or holds[mark[2]] != bool(mark[1]):
            lines.append(line[: mark.start()] if mark else line)
    return string.Template("\n".join(lines) + "\n").substitute(values)
