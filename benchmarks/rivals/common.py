"""What the rivals share: the same token lists, the same settings of the engine."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path


def read_tokens(path: str) -> list[list[int]]:
    """Token lists, one JSON array a line."""
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def engine_environment() -> None:
    """As the program sets it for an engine on a CPU; starts this process again, as some of it counts from the start."""
    from entrodrop_prep.backends.engines import engine_environment as ours

    wanted = {**ours(None, None, True), "HF_HUB_OFFLINE": "1"}
    if wanted != dict(os.environ):
        os.execve(sys.executable, [sys.executable, *sys.argv], wanted)
