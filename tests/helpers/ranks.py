"""Two training processes that talk over gloo, started as torchrun starts them but warm."""

from __future__ import annotations

import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from helpers.servers import free_port
from helpers.warm import MODEL_MODULES, Warm

ROOT = Path(__file__).resolve().parents[2]
TRAINING = Warm(*MODEL_MODULES, "accelerate", "lightning", "trl", HF_HUB_OFFLINE="1")
"""For programs that train."""


def run_ranks(script: Path, *arguments: object, count: int = 2) -> None:
    """Run a script in some processes; all must end well."""
    shared = {
        **os.environ,
        **{"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "TORCHELASTIC_RUN_ID": "tests"},
        **{"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "GROUP_RANK": "0"},
    }

    def run(rank: int) -> None:
        environment = {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        command = [sys.executable, script, *map(str, arguments)]
        done = TRAINING.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-4000:]

    with ThreadPoolExecutor(count) as pool:
        for one in [pool.submit(run, rank) for rank in range(count)]:
            one.result()
