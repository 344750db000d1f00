"""Faults at exact system calls of real commands, and what must hold after each of them.

A job is a command whose result is known. A fault is made in a process of its own by tests/programs/faults.c. Whatever
it does, nothing wrong has a final name, and the same command afterwards gives the result of a run without faults.
"""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from helpers.runs import being_written, check_final_names
from helpers.warm import MODEL_MODULES, READ, Warm

ROOT = Path(__file__).resolve().parents[2]
PROGRAMS = ROOT / "tests" / "programs"
KINDS = {"open": 1, "write": 2, "fsync": 4, "rename": 8, "remove": 16, "mkdir": 32, "send": 64}
CHANGES = sum(KINDS.values()) - KINDS["send"]
FAIL, SIGNAL, CLOCK, BUDGET = 1, 2, 3, 4
NEVER = 1 << 40
REPORT = "report.html"
FINAL = (REPORT, "manifest.json")
"""Names that are given last."""


@dataclass(frozen=True)
class Fault:
    """What goes wrong in a job: ``what`` at a point ``at`` of its calls of a kind, from 0 (first) to 1 (last)."""

    job: str
    what: str
    at: float
    calls: str = "any"

    def __str__(self) -> str:
        return f"{self.job}: {self.what} at {self.at:.3f} of its calls ({self.calls})"


@dataclass
class Job:
    """A command, and what it gives.

    Attributes:
        arguments: of ``entrodrop``, for a directory to write to.
        again: runs the same to its end and says whether the result is that of a run without faults.
        changed: files that a fault may change while it runs; they are put back.
    """

    arguments: Callable[[Path], list[str]]
    again: Callable[[Path], bool]
    expected: dict[str, bytes] = field(default_factory=dict)
    changed: list[Path] = field(default_factory=list)
    environment: dict[str, str] = field(default_factory=dict)
    calls: dict[str, int] = field(default_factory=dict)
    worker: bool = False
    sockets: bool = False


class Processes:
    """Starts commands with a fault, forked from a process that has loaded the shim and imported what is slow."""

    def __init__(self, folder: Path) -> None:
        shim = folder / "faults.so"
        compiler = ["cc", "-shared", "-fPIC", "-O1", "-o", str(shim), str(PROGRAMS / "faults.c"), "-ldl"]
        subprocess.run(compiler, check=True)
        self._warm = Warm(*MODEL_MODULES, reread=READ, nested=True, LD_PRELOAD=str(shim))
        self._folder, self._count = folder, 0

    def start(self, job: Job, out: Path, kinds: int, at: int, action: int, value: int, sticky: bool = False) -> Any:
        """A process, and the file that is there once the fault has struck."""
        self._count += 1
        struck, seen = self._folder / f"struck-{self._count}", self._folder / f"seen-{self._count}"
        given = {"below": str(out), "struck": str(struck), "seen": str(seen), "kinds": kinds, "at": at}
        given |= {"action": action, "value": value, "sticky": int(sticky)}
        usual = {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
        usual["HF_HUB_OFFLINE"] = str(int(not job.sockets))
        process = self._warm.popen(
            [sys.executable, str(PROGRAMS / "faulty.py"), json.dumps(given), *job.arguments(out)],
            env={**os.environ, **usual, **job.environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        return process, struck, seen


def finish(process: Any) -> tuple[int, str]:
    """Exit code and stderr. A process that hangs is killed, and fails."""
    try:
        _, err = process.communicate(timeout=120)
    except subprocess.TimeoutExpired:
        os.kill(process.pid, signal.SIGKILL)
        raise
    return process.returncode, err


def kept(out: Path) -> dict[str, bytes]:
    """What is finished: a directory's shards and its manifest, or a report."""
    return {p.relative_to(out).as_posix(): p.read_bytes() for p in sorted(out.rglob("*")) if _is_result(p)}


def _is_result(path: Path) -> bool:
    return path.is_file() and (path.suffix in (".parquet", ".jsonl", ".npy") or path.name in FINAL)


def kinds_of(fault: Fault) -> int:
    """The calls that a fault may strike."""
    return CHANGES if fault.calls == "any" else KINDS[fault.calls]


def count_calls(processes: Processes, job: Job, out: Path, calls: str, kinds: int) -> int:
    """How many calls of some kinds the job makes, or bytes it writes, when nothing goes wrong."""
    if calls not in job.calls:
        process, _, seen = processes.start(job, out, kinds, NEVER, FAIL, 0)
        code, err = finish(process)
        assert code == 0, err
        job.calls[calls] = int(seen.read_text())
    return job.calls[calls]


SIGNALS = ("SIGKILL", "SIGTERM", "SIGINT")
ERRNOS = ("ENOSPC", "EDQUOT", "EIO", "EROFS", "EACCES", "ESTALE")


def strike(processes: Processes, name: str, job: Job, fault: Fault, folder: Path) -> str:
    """Make a fault, check what it left, run the command again, and compare; says how the command ended."""
    total = count_calls(processes, job, folder / "counted" / "out", fault.calls, kinds_of(fault))
    at, out = 1 + round(fault.at * (total - 1)), folder / "out"
    what, _, lasting = fault.what.partition(" ")
    act = {"kinds": kinds_of(fault), "at": at}
    if what in SIGNALS:
        act |= {"action": SIGNAL, "value": getattr(signal, what)}
    elif what in ERRNOS:
        act |= {"action": FAIL, "value": getattr(errno, what), "sticky": bool(lasting)}
    elif what == "room":
        size = sum(map(len, job.expected.values()))
        act |= {"action": BUDGET, "value": errno.ENOSPC, "at": round(fault.at * size)}
    elif what == "clock":
        act |= {"action": CLOCK, "value": int(lasting) * 86400}
    else:
        act |= {"action": SIGNAL, "value": signal.SIGSTOP}
    process, struck, _ = processes.start(job, out, **act)
    if act["value"] == signal.SIGSTOP and act["action"] == SIGNAL:
        with MEANWHILE[what](job, out, process):
            code, err = finish(process)
    else:
        code, err = finish(process)
    assert struck.exists(), "a fault that did not strike proves nothing"
    check_end(fault, job, code, err)
    check_left(job, out)
    assert job.again(out), "the rerun gives another result"
    if not job.sockets:
        assert kept(out) == job.expected
        assert not being_written(out)
    return f"exit {code}, {last_line(err)}" if code else "not noticed, nothing lost"


def check_end(fault: Fault, job: Job, code: int, err: str) -> None:
    """How a command may end after a fault."""
    assert "Traceback" not in err, err
    if fault.what == "SIGKILL":
        assert code == -signal.SIGKILL, err
    elif fault.what == "SIGTERM":
        assert code in ((75, 0) if job.worker else (-signal.SIGTERM,)), err
    elif fault.what == "SIGINT":
        assert code in (130, -signal.SIGINT), err
    elif fault.what.startswith(("clock", "another", "claims")):
        assert code == 0, err
    else:
        assert code in (0, 2), err
        assert code == 0 or err.splitlines()[-1].startswith("error: "), err


def check_left(job: Job, out: Path) -> None:
    """Nothing wrong under a final name; a manifest only where everything is there."""
    check_final_names(out)
    if any((out / name).exists() for name in FINAL):
        assert kept(out) == job.expected


def last_line(err: str) -> str:
    """What was said in the end, without the folders of this machine."""
    lines = err.strip().splitlines()
    return " ".join(w.rsplit("/", 1)[-1] if w.startswith("/") else w for w in lines[-1].split()) if lines else "silent"


def is_stopped(pid: int) -> bool:
    """Whether a process was stopped by a signal."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "T"
    except FileNotFoundError:
        return False


def wait_until_stopped(process: Any) -> None:
    """Or ended."""
    end = time.monotonic() + 60
    while process.poll() is None and not is_stopped(process.pid) and time.monotonic() < end:
        time.sleep(0.005)


def changing(change: Callable[[Path], object]) -> Callable[[Job, Path, Any], Any]:
    """A fault that changes a file of the job's input while it is stopped; put back when it has ended."""

    @contextmanager
    def meanwhile(job: Job, out: Path, process: Any) -> Iterator[None]:
        wait_until_stopped(process)
        before = {path: (path.read_bytes(), path.stat()) for path in job.changed}
        for path in job.changed:
            change(path)
        os.kill(process.pid, signal.SIGCONT)
        yield
        for path, (data, was) in before.items():
            path.unlink(missing_ok=True)
            path.write_bytes(data)
            os.utime(path, ns=(was.st_atime_ns, was.st_mtime_ns))

    return meanwhile


@contextmanager
def another_writer(job: Job, out: Path, process: Any) -> Iterator[None]:
    """The same command, and one that would begin anew, while the first is at work."""
    from entrodrop_prep import cli

    wait_until_stopped(process)
    for more in ([], ["--overwrite"]):
        assert cli.run([*job.arguments(out), *more]) == 2
    os.kill(process.pid, signal.SIGCONT)
    yield


def claims_of(when: float) -> Callable[[Job, Path, Any], Any]:
    """Claims that seem to be of another time, and another worker that sees them."""

    @contextmanager
    def meanwhile(job: Job, out: Path, process: Any) -> Iterator[None]:
        wait_until_stopped(process)
        for claim in out.rglob("claim-*"):
            os.utime(claim, (time.time() + when, time.time() + when))
        other = subprocess.Popen(
            [sys.executable, "-m", "entrodrop_prep", *job.arguments(out)],
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        time.sleep(1)
        os.kill(process.pid, signal.SIGCONT)
        yield
        code, err = finish(other)
        assert code == 0, err

    return meanwhile


def replace(path: Path) -> None:
    """Another file takes the name."""
    other = path.with_name("other")
    other.write_bytes(path.read_bytes()[::-1])
    os.rename(other, path)


def edit(path: Path) -> None:
    """One byte of it changes, and nothing else but its time."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


MEANWHILE: dict[str, Callable[[Job, Path, Any], Any]] = {
    "edited": changing(edit),
    "vanished": changing(lambda path: path.unlink()),
    "replaced": changing(replace),
    "truncated": changing(lambda path: os.truncate(path, path.stat().st_size // 2)),
    "grown": changing(lambda path: path.open("ab").write(b'{"text": "one more row of text"}\n')),
    "another": another_writer,
    "claims-past": claims_of(-86400),
    "claims-future": claims_of(86400),
}
