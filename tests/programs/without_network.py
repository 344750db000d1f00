"""Run commands where there is no network, and count what each tries to send elsewhere. ``without_network.py PLAN OUT``

PLAN is JSON, a list of [name, command, environment]; OUT gets name -> [exit code, what was printed, attempts]. Where
ATTEMPTS names a file, a line in it is an attempt; else this is a network namespace, whose kernel counts them.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import struct
import subprocess
import sys
from pathlib import Path

from helpers.vllm import MODULES
from helpers.warm import Warm


def loopback() -> None:
    """Bring up the only interface there is."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        fcntl.ioctl(s, 0x8914, struct.pack("16sH14x", b"lo", 1))  # SIOCSIFFLAGS, IFF_UP
    assert [name for _, name in socket.if_nameindex()] == ["lo"]
    assert len(Path("/proc/net/route").read_text().splitlines()) == 1  # the heading


def attempts() -> int:
    """Of /proc/net/snmp, where a line of names stands over one of values, and snmp6, where each line has both."""
    if "ATTEMPTS" in os.environ:
        return len(Path(os.environ["ATTEMPTS"]).read_text().splitlines())
    counters = [p for p in map(Path, ("/proc/net/snmp", "/proc/net/snmp6")) if p.exists()]
    lines = [line.split() for p in counters for line in p.read_text().splitlines()]
    found = {line[0]: line[1] for line in lines if not line[0].endswith(":")}
    pairs = [line for line in lines if line[0].endswith(":")]
    for names, values in zip(pairs[::2], pairs[1::2], strict=True):
        found |= {names[0] + name: value for name, value in zip(names[1:], values[1:], strict=True)}
    # No way there; or a name server on this machine that does not answer.
    wanted = ("Ip:OutNoRoutes", "Ip6OutNoRoutes", "Udp:NoPorts", "Udp6NoPorts")
    return sum(int(found.get(name, 0)) for name in wanted)


def main(plan: Path, out: Path) -> None:
    if "ATTEMPTS" not in os.environ:
        loopback()
    offline = Warm(*MODULES, nested=True, HF_HUB_OFFLINE="1", HF_HOME=os.environ["HF_HOME"])
    found = {}
    for name, command, environment in json.loads(plan.read_text()):
        warm = environment.get("HF_HUB_OFFLINE") == "1" and "ATTEMPTS" not in os.environ
        before = attempts()
        done = (offline if warm else subprocess).run(
            [sys.executable, *command],
            env={**os.environ, **environment},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        found[name] = [done.returncode, done.stdout, attempts() - before]
    out.write_text(json.dumps(found))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
