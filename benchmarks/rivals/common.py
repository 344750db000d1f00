"""What the rivals share: the same token lists, the same settings of the engine."""

from __future__ import annotations

import json
import os
from pathlib import Path


def read_tokens(path: str) -> list[list[int]]:
    """Token lists, one JSON array a line."""
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def engine_environment() -> None:
    """As the program sets it for an engine on a CPU."""
    from entrodrop_prep.backends.vllm import engine_environment as ours

    os.environ.update(ours(None, None, True))
    os.environ["HF_HUB_OFFLINE"] = "1"
