"""``entrodrop`` with a fault at one system call: ``faulty.py FAULT COMMAND...``, in a process that has loaded faults.c.

FAULT is JSON, the arguments of ``fault_arm``; ``seen`` names a file for the number of calls that were counted. The
command ``load`` opens the rows of a scored directory for training, by way of a cache, and prints their digest.
"""

from __future__ import annotations

import atexit
import ctypes
import hashlib
import json
import signal
import sys
from pathlib import Path

from entrodrop_prep import cli
from entrodrop_prep.errors import EntrodropError


def digest_of_rows(scored: str, cache: str) -> str:
    """Of all masked rows of two epochs."""
    import numpy as np

    from entrodrop_prep.training.rows import MaskedRows

    rows = MaskedRows.open(scored, epochs=2, quantile=0.7, cache_dir=cache)
    return hashlib.sha256(json.dumps(rows.take(np.arange(len(rows)))).encode()).hexdigest()


def main(fault: str, command: list[str]) -> None:
    """Arm the fault and run the command."""
    given, shim = json.loads(fault), ctypes.CDLL(None)
    shim.fault_seen.restype = ctypes.c_long
    atexit.register(lambda: Path(given["seen"]).write_text(str(shim.fault_seen())))
    sys.argv = ["entrodrop", *command]
    signal.signal(signal.SIGINT, signal.default_int_handler)  # whoever started the tests may ignore it
    shim.fault_arm(
        *(given["below"].encode(), given["struck"].encode(), given["kinds"], ctypes.c_long(given["at"])),
        *(given["action"], given["value"], given["sticky"]),
    )
    if command[0] != "load":
        cli.main()
    try:
        print(digest_of_rows(*command[1:]))
    except EntrodropError as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
