"""A model's config.json before any library builds something from it: numbers that no model has are refused at once."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from entrodrop_prep.errors import ModelError

MOST_BYTES = 1 << 24
MOST_TOKENS = 1 << 24
"""Of a vocabulary; the largest that are in use have about a million."""
LIMITS = (
    (re.compile(r"(num_)?vocab_size"), MOST_TOKENS),
    (re.compile(r".*layers|n_layer"), 10_000),
    (re.compile(r"num_labels"), 1 << 20),
    (re.compile(r".*heads|n_head|.*experts.*"), 1 << 16),
    (re.compile(r".*_size|.*_dim|.*_rank|d_model|d_ff|n_embd|n_inner|dim"), 1 << 24),
)
"""The largest number that each name may have."""
FIX = "fetch the model again, or correct the file"


def check_config(path: Path, where: str) -> None:
    """Raise ModelError for a config.json that is no table, or has numbers of which no memory could hold a model.

    Args:
        path: of the file.
        where: the model's name, for messages.
    """
    if path.stat().st_size > MOST_BYTES:
        raise ModelError(f"its config.json has more than {MOST_BYTES >> 20} MiB", where=where, fix=FIX)
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as e:
        reason = "it is nested too deeply" if isinstance(e, RecursionError) else str(e)
        raise ModelError(f"its config.json cannot be read: {reason}", where=where, fix=FIX) from e
    if not isinstance(config, dict):
        raise ModelError("its config.json is no table", where=where, fix=FIX)
    for name, value in _numbers(config):
        most = next((most for names, most in LIMITS if names.fullmatch(name)), None)
        if most is not None and abs(value) > most:
            said = f"{value:,}" if abs(value) < 10**30 else "a number of over 30 digits"
            raise ModelError(
                f"its config.json has {name[:80]} {said}, which no model has (at most {most:,})", where=where, fix=FIX
            )
        if name == "vocab_size" and value < 1:
            raise ModelError(f"its config.json has a vocab_size of {value:,}", where=where, fix=FIX)


def _numbers(value: Any) -> Iterator[tuple[str, float]]:
    """Every number of a table and of the tables in it, with its name."""
    for name, item in value.items():
        if isinstance(item, dict):
            yield from _numbers(item)
        for number in item if isinstance(item, list) else [item]:
            if isinstance(number, (int, float)) and not isinstance(number, bool):
                yield name, number
