"""vLLM's server in a process that ends with the one that started it: ``... server FD TMPDIR MODULE ARGUMENTS``.

FD is the reading end of a pipe whose other end the parent holds. When the parent is gone, so is this process, and
TMPDIR, which is its own.
"""

from __future__ import annotations

import os
import runpy
import signal
import sys
import threading
import time
from pathlib import Path

from entrodrop_prep.vllm_plugin import leftovers

STOP_SECONDS = 15.0


def main(descriptor: int, folder: Path, module: str, arguments: list[str]) -> None:
    """Run ``python -m module arguments``."""
    threading.Thread(target=_watch, args=(descriptor, folder), daemon=True).start()
    sys.argv = [module, *arguments]
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # until vLLM has a handler of its own
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    finally:
        leftovers.clean(folder)


def _watch(descriptor: int, folder: Path) -> None:
    """Wait for the end of the pipe, then ask vLLM to stop as a terminal would; kill it if it does not."""
    os.read(descriptor, 1)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(STOP_SECONDS)
    leftovers.kill(os.getpid(), folder)  # it leads a session of its own


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], sys.argv[4:])
