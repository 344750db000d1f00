"""vLLM's server in a process that ends with the one that started it: ``... engine.server FD MODULE ARGUMENTS``.

FD is the reading end of a pipe whose other end the parent holds. When the parent is gone, so is this process.
"""

from __future__ import annotations

import os
import runpy
import signal
import sys
import threading
import time

STOP_SECONDS = 15.0


def main(descriptor: int, module: str, arguments: list[str]) -> None:
    """Run ``python -m module arguments``."""
    threading.Thread(target=_watch, args=(descriptor,), daemon=True).start()
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def _watch(descriptor: int) -> None:
    """Wait for the end of the pipe, then ask vLLM to stop as a terminal would; kill it if it does not."""
    os.read(descriptor, 1)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(STOP_SECONDS)
    os.killpg(os.getpid(), signal.SIGKILL)  # it leads a session of its own


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], sys.argv[3:])
