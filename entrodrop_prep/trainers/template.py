"""Scripts and settings with places for values and lines that stand only where something holds."""

from __future__ import annotations

import re
import string

_MARK = re.compile(r"[ \t]*#\? (!?)(\w+)$")


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
