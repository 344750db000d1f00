"""How large a value from YAML is with its aliases written out: a few lines may expand to more than any memory holds."""

from __future__ import annotations

from typing import Any

MOST_VALUES, MOST_CHARACTERS, DEEPEST = 1_000_000, 1 << 26, 500


def bounded(value: Any) -> Any:
    """A value of dictionaries, lists and scalars as it is.

    Raises ValueError where it is too large written out, or nested too deep, as a value that holds itself is.
    """
    values, characters, stack = 1, 0, [(value, 0)]
    while stack:
        item, depth = stack.pop()
        if depth > DEEPEST:
            raise ValueError(f"it is nested more than {DEEPEST} deep")
        parts: list[Any] = []
        if isinstance(item, dict):
            parts = [*item.keys(), *item.values()]
        elif isinstance(item, (list, tuple, set)):
            parts = list(item)
        elif isinstance(item, (str, bytes)):
            characters += len(item)
        values += len(parts)
        if values > MOST_VALUES or characters > MOST_CHARACTERS:
            raise ValueError(f"it has more than {MOST_VALUES:,} values or {MOST_CHARACTERS:,} characters, written out")
        stack += [(part, depth + 1) for part in parts]
    return value
