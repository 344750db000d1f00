"""Whether the body of a request for scores may reach the engine."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

MOST_BYTES = 64 << 20
"""Of a body."""
MOST_SEQUENCES = 1024
"""Of one request. Each becomes a request of its own in the engine, with some kilobytes of its own."""
TASK = "token_classify"
FIELDS = ("model", "input", "task", "encoding_format", "embed_dtype", "endianness", "add_special_tokens", "user")
"""All fields of a request. What else vLLM knows truncates, pads, reorders or renders, none of which is scoring."""


@dataclass(frozen=True)
class Limits:
    """What the engine takes.

    Attributes:
        vocab_size: ids are below it.
        longest: tokens of a sequence, at most.
    """

    vocab_size: int
    longest: int


def problem_of(body: bytes, limits: Limits) -> str | None:
    """What is wrong with the JSON of a request for scores, in a few words; None if nothing is.

    Args:
        body: as it came. vLLM reads it with the same parser afterwards.
        limits: of the model that is served.
    """
    try:
        asked = json.loads(body)
    except (ValueError, RecursionError):
        return "the request is not JSON"
    if not isinstance(asked, dict):
        return "the request is not a JSON object"
    other = next((name for name in asked if name not in FIELDS), None)
    if other is not None:
        return f"the request has a field {other[:40]!r}; it may have {', '.join(FIELDS)}"
    if asked.get("task") not in (TASK, None):
        return f"task is not {TASK!r}"
    if not isinstance(asked.get("add_special_tokens", False), bool):
        return "add_special_tokens is not true or false"
    for name in ("model", "encoding_format", "embed_dtype", "endianness", "user"):
        if not isinstance(asked.get(name), (str, type(None))):
            return f"{name} is not a string"
    return _problem_of_input(asked.get("input"), limits)


def _problem_of_input(given: Any, limits: Limits) -> str | None:
    """Of ``input``: token ids of one sequence, or of each of several."""
    if not isinstance(given, list) or not given:
        return "input is not a list of token ids, or of such lists"
    several = isinstance(given[0], list)
    sequences = given if several else [given]
    if len(sequences) > MOST_SEQUENCES:
        return f"input has {len(sequences):,} sequences, more than {MOST_SEQUENCES:,}"
    for number, ids in enumerate(sequences):
        where = f"input[{number}]" if several else "input"
        if not isinstance(ids, list):
            return f"{where} is not a list of token ids"
        if not 1 <= len(ids) <= limits.longest:
            return f"{where} has {len(ids):,} tokens, not 1 to {limits.longest:,}"
        if not set(map(type, ids)) <= {int}:  # a bool is none, and JSON's other numbers are floats
            return f"{where} has a token id that is not an integer"
        if min(ids) < 0 or max(ids) >= limits.vocab_size:
            return f"{where} has a token id that is not in 0 to {limits.vocab_size - 1}"
    return None
