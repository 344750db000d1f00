"""Ids that masks must not touch: special tokens, and whatever a model stops with, flagged special or not."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from typing import Any

from entrodrop_prep.backends.model import find_file
from entrodrop_prep.errors import ModelError
from entrodrop_prep.hub.loading import loading

log = logging.getLogger(__name__)

FILES = ("config.json", "generation_config.json")
_TEXT_CONFIGS = ("text_config", "llm_config", "language_config")


def stop_ids(name_or_path: str, commit: str | None, vocab_size: int) -> list[int]:
    """Ids with which generation stops: each ``eos_token_id`` of a model's config.json and generation_config.json.

    Args:
        name_or_path: a local directory or a Hub id.
        commit: the revision on the Hub; None for a directory.
        vocab_size: ids are below it; others are left out, which is warned of.

    Returns:
        The ids, ascending; none where the model says nothing.

    Raises:
        ModelError: a file is not JSON, or not an object; or the Hub refuses.
    """
    found: set[int] = set()
    for file in FILES:
        for key, value in _values(name_or_path, commit, file):
            for entry in value if isinstance(value, list) else [value]:
                if entry is None:
                    continue
                if isinstance(entry, int) and not isinstance(entry, bool) and 0 <= entry < vocab_size:
                    found.add(entry)
                else:
                    log.warning(
                        "%s: %s of %s holds %r, which is no id from 0 to %d: left out of the protected tokens",
                        name_or_path,
                        key,
                        file,
                        entry,
                        vocab_size - 1,
                    )
    return sorted(found)


def _values(name: str, commit: str | None, file: str) -> Iterator[tuple[str, Any]]:
    """``eos_token_id`` wherever in a file a model has it: the key, and what it holds."""
    with loading(name, "model"):
        found = find_file(name, file, commit)
    if found is None:
        return
    try:
        config = json.loads(found.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as e:
        raise ModelError(f"{file} is not JSON", where=name, fix="fetch it again, or repair it") from e
    if not isinstance(config, dict):
        raise ModelError(f"{file} holds no JSON object", where=name, fix="fetch it again, or repair it")
    yield "eos_token_id", config.get("eos_token_id")
    for part in _TEXT_CONFIGS:
        if isinstance(config.get(part), dict):
            yield f"{part}.eos_token_id", config[part].get("eos_token_id")
