"""JSON that others wrote: read so that whatever it holds is a value that the rest can take, or a ValueError."""

from __future__ import annotations

import json
import math
from typing import Any

MAX_DEPTH = 64
MAX_INTEGER = 2**64
_TOO_DEEP = f"it is nested more than {MAX_DEPTH} deep"


def loads(data: bytes | str) -> Any:
    """The value of a JSON text in UTF-8.

    Raises ValueError for what is not JSON, says a key twice, is nested more than ``MAX_DEPTH`` deep, or holds a number
    that is not finite or an integer of more than 64 bits.
    """
    text = data.decode("utf-8") if isinstance(data, bytes) else data
    try:
        value = json.loads(text, object_pairs_hook=_object, parse_constant=_no_number)
    except RecursionError:
        raise ValueError(_TOO_DEEP) from None
    _check(value)
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"it says {name[:40]!r} twice")
        found[name] = value
    return found


def _no_number(name: str) -> Any:
    raise ValueError(f"it holds {name}, which is no JSON")


def _check(value: Any) -> None:
    """Depth and numbers, level by level."""
    level = [value]
    for _ in range(MAX_DEPTH):
        below: list[Any] = []
        for item in level:
            if isinstance(item, dict):
                below += item.values()
            elif isinstance(item, list):
                below += item
            elif isinstance(item, float) and not math.isfinite(item):
                raise ValueError("it holds a number that is too large")
            elif isinstance(item, int) and abs(item) >= MAX_INTEGER:
                raise ValueError("it holds an integer of more than 64 bits")
        if not below:
            return
        level = below
    raise ValueError(_TOO_DEEP)
