"""Warnings that concern rows: counted where rows are read, said once at the end of ``score``.

A note is a key of ``NOTES``, or ``KEY:DETAIL`` where its text has a ``{detail}``. Rows carry keys (``Encoded.notes``),
shards count them (``Span.notes``, in the footer), and the manifest holds the sums.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Mapping

from entrodrop_prep.terminal.text import printable

log = logging.getLogger(__name__)

NOTES: dict[str, str] = {
    "double_bos": "BOS appears twice at the start of {rows}: the text writes it and the tokenizer adds it; "
    "take it out of the texts",
    "double_eos": "EOS appears twice at the end of {rows}: the text writes it and the tokenizer adds it; "
    "take it out of the texts",
    "left_out": "{rows}: the chat template does not print the text of the {detail} messages",
    "left_out_calls": "{rows}: the chat template does not print the assistant's tool calls",
    "left_out_earlier_thoughts": (
        "{rows}: the chat template does not print the assistant's thoughts before the last question, as many do "
        "by design"
    ),
    "left_out_thoughts": (
        "{rows}: the chat template does not print the thoughts of the last answer, so they are not trained on; it may "
        "look for them under another key (reasoning_content, reasoning, thinking)"
    ),
    "left_out_tools": "{rows}: the chat template does not print the tools that the row offers",
    "no_content": "{rows}: a message has neither content nor a tool call; its text is taken to be empty",
    "trained_role": (
        "{rows}: train: true or weight: 1 is set on a message that is not the assistant's; only the assistant's "
        "messages are trained on"
    ),
    "unclosed_turns": (
        "{rows}: what is trained on does not end with a token that ends a turn, so a model trained on it may not learn "
        "to stop; use a chat template that ends assistant turns, inside its {{% generation %}} markers where it has any"
    ),
}
"""Key -> text with ``{rows}``, the number of rows, and where the key has a detail ``{detail}``."""


def note_text(key: str, rows: int) -> str:
    """The line for people; of a key of another version just the key and the count."""
    name, _, detail = key.partition(":")
    return NOTES.get(name, f"{name}: {{rows}}").format(
        rows=f"{rows:,} {'row' if rows == 1 else 'rows'}", detail=printable(detail)
    )


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
