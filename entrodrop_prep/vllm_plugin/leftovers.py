"""What vLLM's processes leave where they are killed: shared memory, sockets and files in a folder of their own."""

from __future__ import annotations

import os
import re
import shutil
import signal
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

SHARED = Path("/dev/shm")
_NAMES = re.compile(rf"{SHARED}/((?:psm_|sem\.mp-|vllm_dist_)\S+)")
"""Of shared memory and semaphores, in what ``/proc`` says of a process."""


def clean(folder: Path, shared: Iterable[str] = ()) -> None:
    """Remove the files in ``folder``, which was the processes' TMPDIR, and shared memory: that of these names, and
    that of tensor-parallel ranks, which is named as a file in the folder is."""
    ranks = [p.name for file in folder.glob("vllm_dist_*") for p in SHARED.glob(f"{file.name}-*")]
    for name in (*shared, *ranks):
        with suppress(OSError):
            (SHARED / name).unlink()
    shutil.rmtree(folder, ignore_errors=True)


def kill(group: int, folder: Path, patience: float = 0.0) -> None:
    """Kill a group of processes and remove what is theirs.

    Args:
        group: the processes' group.
        folder: their TMPDIR.
        patience: seconds in which they may end by themselves.
    """
    until = time.monotonic() + patience
    with suppress(ProcessLookupError):
        while time.monotonic() < until:
            os.killpg(group, 0)
            time.sleep(0.02)
    clean(folder, _shared_by(group))
    with suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)


def _shared_by(group: int) -> set[str]:
    """Names of what the processes of a group have in ``/dev/shm``."""
    found: set[str] = set()
    for maps in Path("/proc").glob("[0-9]*/maps"):
        with suppress(OSError):
            if os.getpgid(int(maps.parent.name)) == group:
                found |= set(_NAMES.findall(maps.read_text(errors="replace")))
    return found
