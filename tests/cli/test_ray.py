"""``--ray``: workers on a real Ray; `make test-heavy` has one of two nodes, of which one is lost while they work."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import entrodrop_prep
from entrodrop_prep import cli
from entrodrop_prep.errors import EngineError, OutputError, RowError
from entrodrop_prep.store import ray_workers
from entrodrop_prep.store.disk import WORKERS
from entrodrop_prep.terminal.preemption import EXIT_CODE
from helpers.models import write_rows
from helpers.runs import being_written, finish, names, starter, tables
from helpers.scored import all_bytes, some_rows, write_scored

PACKAGE = Path(entrodrop_prep.__file__).parent
SCORE = ["score", "rows.jsonl", "--model", "m", "--out", "o"]
NODE = {"num_cpus": 1, "object_store_memory": 80 << 20, "include_dashboard": False}


def until(true: Callable[[], Any], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.02)


def owners(out: Path) -> set[int]:
    """The processes that have claimed something."""
    found = set()
    for claim in (out / WORKERS).glob("claim-*"):
        with contextlib.suppress(FileNotFoundError, json.JSONDecodeError):  # just given back, or not yet signed
            found.add(json.loads(claim.read_text())[1])
    return found


def freeze(pid: int, out: Path) -> None:
    """Stop a worker where it keeps nobody waiting."""
    while True:
        os.kill(pid, signal.SIGSTOP)
        with open(out / WORKERS / "lock", "rb") as lock, contextlib.suppress(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        os.kill(pid, signal.SIGCONT)
        time.sleep(0.01)


def parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


class Nodes:
    """A Ray of this machine alone, whose nodes may be added and killed; the first has so many processors."""

    def __init__(self, processors: int) -> None:
        from ray.cluster_utils import Cluster

        soon = {"health_check_period_ms": 500, "health_check_failure_threshold": 8}
        first = {**NODE, "num_cpus": processors, "_system_config": soon}
        self.cluster = Cluster(initialize_head=True, head_node_args=first)

    def run(self, *command: str, folder: Path) -> subprocess.Popen[str]:
        """The command with two workers, started in a folder."""
        words = [sys.executable, "-m", "entrodrop_prep", *command, "--ray", self.cluster.address, "--workers", "2"]
        return subprocess.Popen(words, cwd=folder, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    def lose_one(self, out: Path) -> int:
        """Kill a node without a word once both workers are at work. Gives the worker that is left, frozen."""
        until(lambda: any(name.endswith(".parquet") and name[:5] in ("shard", "train") for name in names(out)))
        until(lambda: owners(out))
        freeze(owners(out).pop(), out)  # the other one may take long to start
        until(lambda: len(owners(out)) == 2)
        raylet = self.last.all_processes["raylet"][0].process.pid
        lost, left = sorted(owners(out), key=lambda pid: parent(pid) != raylet)
        assert parent(lost) == raylet != parent(left)
        freeze(left, out)
        for pid in (raylet, lost):  # without its raylet a worker works on
            os.kill(pid, signal.SIGKILL)
        self.cluster.remove_node(self.last, allow_graceful=False)
        return left

    def add_one(self) -> None:
        self.last = self.cluster.add_node(**NODE)


@contextlib.contextmanager
def ray(processors: int) -> Iterator[Nodes]:
    folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")  # sockets have short names
    with pytest.MonkeyPatch.context() as patched:
        environment = {"RAY_TMPDIR": folder, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        for name, value in {**environment, "PYTHONPATH": str(PACKAGE.parent)}.items():
            patched.setenv(name, value)
        patched.delenv("RAY_ADDRESS", raising=False)
        handler = signal.getsignal(signal.SIGTERM)  # Ray sets its own
        started = Nodes(processors)
        try:
            yield started
        finally:
            started.cluster.shutdown()
            signal.signal(signal.SIGTERM, handler)
            shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def node() -> Iterator[Nodes]:
    """A node for two workers."""
    with ray(2) as started:
        yield started


@pytest.fixture
def nodes() -> Iterator[Nodes]:
    """Two, each for one worker."""
    with ray(1) as started:
        started.add_one()
        yield started


@pytest.mark.heavy
@pytest.mark.network
def test_a_node_is_lost_while_rows_are_scored(nodes: Nodes, tmp_path: Path) -> None:
    """Then the run is asked to end, and run again: the result is one process's. A bad row is one line."""
    text = Path(json.__file__).read_text()
    rows = [{"text": text[37 * i : 37 * i + 2500], "name": f"row {i}"} for i in range(100)]
    write_rows(tmp_path / "rows.jsonl", rows)
    given = {"source": str(tmp_path / "rows.jsonl"), "model": str(PACKAGE / "demo" / "model"), "rows_per_shard": 4}
    one = starter()("score", {**given, "out": str(tmp_path / "one"), "device": "cpu"})
    command = ["score", "rows.jsonl", "--model", given["model"], "--out", "out", "--rows-per-shard", "4"]
    command += ["--backend", "transformers", "--device", "cpu"]
    out = tmp_path / "out"
    asked = nodes.run(*command, folder=tmp_path)
    left = nodes.lose_one(out)
    before = owners(out)
    nodes.add_one()
    until(lambda: owners(out) - before)  # the lost worker was started again on the new node
    os.kill(left, signal.SIGCONT)
    asked.terminate()
    _, said = asked.communicate()
    assert (asked.returncode, said.splitlines()[-1][:19]) == (EXIT_CODE, "stopped by SIGTERM:")
    assert not being_written(out)
    assert 0 < len(tables(out)) < 25
    again = nodes.run(*command, folder=tmp_path)
    said, _ = again.communicate()
    assert again.returncode == 0
    assert "100 of 100 rows" in said
    finish(one)
    assert tables(out) == tables(tmp_path / "one")
    assert (out / "manifest.json").read_bytes() == (tmp_path / "one" / "manifest.json").read_bytes()
    assert not being_written(out)


@pytest.mark.network
@pytest.mark.parametrize("lost", [False, pytest.param(True, marks=pytest.mark.heavy)])
def test_masked_rows_are_written(lost: bool, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """Where a node is lost, no other takes its place: the workers that are left do it all."""
    nodes: Nodes = request.getfixturevalue("nodes" if lost else "node")
    write_scored(tmp_path / "scored", some_rows(3000 if lost else 100, lengths=(2, 60)), rows_per_shard=500)
    given = {"epochs": 4, "rows_per_shard": 30, "jobs": "1"}
    one = starter()("materialize", {**given, "scored": str(tmp_path / "scored"), "out": str(tmp_path / "one" / "out")})
    command = ["materialize", "scored", "--out", "many/out"]
    command += [word for name, value in given.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    out = tmp_path / "many" / "out"
    run = nodes.run(*command, folder=tmp_path)
    if lost:
        os.kill(nodes.lose_one(out), signal.SIGCONT)
    said, _ = run.communicate()
    assert run.returncode == 0
    assert "into many/out" in said
    finish(one)
    whole, made = ({n: d for n, d in all_bytes(p).items() if n[0] != "."} for p in (tmp_path / "one" / "out", out))
    assert made == whole
    assert not being_written(out)


@pytest.mark.network
def test_a_mistake_is_one_line_and_not_tried_again(node: Nodes, tmp_path: Path) -> None:
    write_rows(tmp_path / "rows.jsonl", [*({"text": f"row {i}"} for i in range(20)), {"text": 5}])
    command = ["score", "rows.jsonl", "--model", str(PACKAGE / "demo" / "model"), "--out", "out"]
    run = node.run(*command, "--backend", "transformers", "--rows-per-shard", "5", folder=tmp_path)
    _, said = run.communicate()
    assert run.returncode == 2
    assert [line for line in said.splitlines() if "row 20: column 'text' holds a number" in line] == [
        "error: rows.jsonl:21: row 20: column 'text' holds a number, not a string; correct it, or skip such rows with "
        "--on-bad-row skip"
    ]
    assert "Traceback" not in said
    assert not being_written(tmp_path / "out")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--workers", "2"], "--workers is for --ray; add --ray, or start each worker yourself, with --worker I/N"),
        (["--gpus-per-worker", "1"], "--gpus-per-worker is for --ray; "),
        (["--ray"], "--ray needs --workers; say how many: --workers N"),
        (["--ray", "--workers", "0"], "--workers '0': input should be greater than or equal to 1"),
        (["--ray", "--workers", "2", "--worker", "0/2"], "--ray and --worker exclude each other; "),
        (["--workers", "2", "--overwrite", "--ray"], "--overwrite and --ray exclude each other: "),
        (["--workers", "2", "--ray", "127.0.0.1:1"], "--ray 127.0.0.1:1: Ray cannot be reached: "),
    ],
)
def test_what_is_refused(
    flags: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "rows.jsonl", [{"text": "a"}])
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.json").write_text("{}")
    assert cli.run([*SCORE, *flags]) == 2
    assert capfd.readouterr().err.startswith(f"error: {message}")
    assert sorted(names(tmp_path)) == ["config.json", "m", "rows.jsonl"]


def test_the_package_that_is_missing_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    write_scored(tmp_path / "scored", some_rows(5))
    command = ["materialize", str(tmp_path / "scored"), "--out", str(tmp_path / "out"), "--epochs", "1"]
    assert cli.run([*command, "--workers", "2", "--ray"]) == 2
    assert capfd.readouterr().err == "error: --ray needs the package ray; in the checkout: pip install '.[ray]'\n"
    assert not (tmp_path / "out").exists()


def work_that_raises(error: Exception) -> Callable[[Any], Any]:
    def work(config: Any) -> None:
        raise error

    return work


class Settings:
    def __init__(self, out: Path) -> None:
        self.out = str(out)


def test_what_a_task_gives_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine that ended ends its process, which Ray starts again; a mistake is a result; a bug has its traceback."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ray_workers.progress, "LOG_EVERY", 1)
    settings, mistake = Settings(tmp_path), RowError("bad", where="a.jsonl", fix="correct it")
    assert ray_workers._work(work_that_raises(mistake), settings, ".") is mistake
    with pytest.raises(ZeroDivisionError):
        ray_workers._work(work_that_raises(ZeroDivisionError()), settings, ".")
    pid = os.fork()
    if not pid:
        ray_workers._work(work_that_raises(EngineError("every engine has ended")), settings, ".")
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 1
    absent = ray_workers._work(work_that_raises(mistake), Settings(tmp_path / "none"), "/nowhere")
    assert isinstance(absent, OutputError)
    assert "it is not there on the node" in str(absent)


def test_a_run_that_ends_between_two_looks_is_counted(tmp_path: Path) -> None:
    """The note of how much there was to do is gone by then."""
    (tmp_path / "out").mkdir()
    watch = ray_workers._Watch(tmp_path / "out", "masked")
    scored = write_scored(tmp_path / "scored", some_rows(20))
    settings = {"scored": str(scored), "out": str(tmp_path / "out"), "epochs": 2, "rows_per_shard": 9}
    written = entrodrop_prep.materialize(entrodrop_prep.MaterializeConfig(**settings)).written_tokens
    watch.look()
    assert watch.tokens == 0
    watch.look(ended=True)
    assert watch.tokens == written > 0
