"""What the rivals share: the same token lists, the same settings of the engine."""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def read_tokens(path: str) -> list[list[int]]:
    """Token lists, one JSON array a line."""
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def engine_environment() -> None:
    """As the program sets it for an engine on a CPU; starts this process again, as some of it counts from the start."""
    from entrodrop_prep.backends.engines import engine_environment as ours

    wanted = {**ours(None, None, True), "HF_HUB_OFFLINE": "1"}
    if wanted != dict(os.environ):
        os.execve(sys.executable, [sys.executable, *sys.argv], wanted)


def measure(rows: list[list[int]], load: Callable[[], Any], score: Callable[[Any, list[list[int]]], Any]) -> None:
    """Load, score some rows to warm up, score all; print what it took as JSON, ``mib`` being the process's peak."""
    begun = time.monotonic()
    model = load()
    score(model, rows[:16])
    start, begun = time.monotonic() - begun, time.monotonic()
    score(model, rows)
    seconds = time.monotonic() - begun
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"tokens": sum(map(len, rows)), "seconds": seconds, "start": start, "mib": peak}))
