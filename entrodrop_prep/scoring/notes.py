"""Warnings that concern rows: counted where rows are read, said once at the end of ``score``.

A note is a key of ``NOTES``, or ``KEY:DETAIL`` where its text has a ``{detail}``. Rows carry keys (``Encoded.notes``),
shards count them (``Span.notes``, in the footer), and the manifest holds the sums.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Mapping

log = logging.getLogger(__name__)

NOTES: dict[str, str] = {}
"""Key -> text with ``{rows}``, the number of rows, and where the key has a detail ``{detail}``."""


def note_text(key: str, rows: int) -> str:
    """The line for people; of a key of another version just the key and the count."""
    name, _, detail = key.partition(":")
    return NOTES.get(name, f"{name}: {{rows}}").format(rows=f"{rows:,} {'row' if rows == 1 else 'rows'}", detail=detail)


def note_counts(shards: Iterable[Mapping[str, int]]) -> dict[str, int]:
    """The counts of all shards together, keys in order; empty where there is nothing to say."""
    total: Counter[str] = Counter()
    for counts in shards:
        total.update(counts)
    return dict(sorted(total.items()))


def say(counts: Mapping[str, int]) -> None:
    """Log each note as a warning, with its number of rows."""
    for key, rows in counts.items():
        log.warning("%s", note_text(key, rows))
