"""Claims, and who cleans up: what several workers in one directory settle among each other."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import islice
from pathlib import Path

import pyarrow as pa
import pytest

from entrodrop_prep.config.workers import Worker
from entrodrop_prep.errors import ConfigError, OutputError
from entrodrop_prep.scoring.finish import CONTENTS
from entrodrop_prep.store import disk
from entrodrop_prep.store.disk import WORKERS, held, renamed_file, write_bytes
from entrodrop_prep.store.locks import reading_lock
from entrodrop_prep.store.shards import write_shard
from entrodrop_prep.store.workers import Workers, in_turn, joined
from entrodrop_prep.terminal.preemption import Preempted
from entrodrop_prep.terminal.progress import Progress

ELSEWHERE = json.dumps([["another boot", 1], 1]).encode()


@contextmanager
def worker(out: Path, timeout: float = 60.0) -> Iterator[Workers]:
    with joined(out, CONTENTS, timeout) as workers:
        with workers.setting_up():
            pass
        yield workers


def claim_of(out: Path, name: str, who: bytes, age: float) -> Path:
    """A claim of another worker, last touched so many seconds ago."""
    path = out / WORKERS / f"claim-{name.removesuffix('.parquet')}"
    path.write_bytes(who)
    now = path.stat().st_mtime
    os.utime(path, (now - age, now - age))
    return path


def test_one_worker_has_a_claim(tmp_path: Path) -> None:
    with worker(tmp_path / "out") as one, worker(tmp_path / "out") as other:
        assert one.take("a")
        assert not other.take("a")
        assert not one.take("a")
        assert other.take("b")
        one.give_back("a")
        assert other.take("a")
        one.give_back("a")  # not its own any more
        assert not one.take("a")
        assert (len(one._claims), len(other._claims)) == (0, 2)


TORN = {"zeros": bytes(60), "cut": b'[["boot", 1], 1', "other": b"7", "no text": b"\xff\xfe"}
"""What a machine may leave that lost its power."""


def test_a_claim_is_taken_over_when_its_time_is_over(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with worker(out, 60.0) as one:
        claim_of(out, "old", ELSEWHERE, 61)
        claim_of(out, "new", ELSEWHERE, 55)
        claim_of(out, "of one killed while it made it", b"", 11)
        claim_of(out, "of one that is making it", b"", 9)
        for name, data in TORN.items():
            claim_of(out, name, data, 11)
        assert one.take("old")
        assert not one.take("new")
        assert one.take("of one killed while it made it")
        assert not one.take("of one that is making it")
        assert all(map(one.take, TORN))


def test_a_claim_of_a_process_that_ended_here_is_taken_over_at_once(tmp_path: Path) -> None:
    out = tmp_path / "out"
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    with worker(out) as one:
        assert one.take("a")
        place, _ = json.loads((out / WORKERS / "claim-a").read_bytes())
        claim_of(out, "ended", json.dumps([place, ended.pid]).encode(), 0)
        claim_of(out, "alive", json.dumps([place, os.getpid()]).encode(), 0)
        claim_of(out, "elsewhere", json.dumps([["another boot", 1], ended.pid]).encode(), 0)
        assert one.take("ended")
        assert not one.take("alive")
        assert not one.take("elsewhere")


def test_a_worker_that_lives_keeps_its_claims(tmp_path: Path) -> None:
    """It touches them more often than they time out; one that was taken over stays the other's."""
    out = tmp_path / "out"
    with worker(out, 0.8) as one, worker(out, 0.8) as other:
        assert one.take("a")
        end = time.monotonic() + 2.0
        while time.monotonic() < end:
            assert not other.take("a")
            time.sleep(0.05)
        (out / WORKERS / "claim-a").unlink()
        assert other.take("a")
        one.give_back("a")
        assert (out / WORKERS / "claim-a").exists()


def test_what_is_made_is_not_claimed(tmp_path: Path) -> None:
    with worker(tmp_path / "out") as one:
        (tmp_path / "out" / "x").touch()
        assert not one.take("x", tmp_path / "out" / "x")
        assert not one._claims
        assert one.take("y", tmp_path / "out" / "y")


def test_what_others_have_is_waited_for_and_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """And made here when they are gone."""
    monkeypatch.setattr("entrodrop_prep.terminal.progress.LOG_EVERY", 0)
    out, name = tmp_path / "out", "shard-00000.parquet"
    with worker(out, 4.0) as one, Progress("scoring", 10, "rows") as progress:
        begun = time.monotonic()
        claim_of(out, name, ELSEWHERE, 2)
        assert list(islice(one.claimed(Worker(0, 2), lambda: ([name], True), progress, lambda _: 1), 1)) == [name]
        assert 1 < time.monotonic() - begun < 60
    assert capfd.readouterr().err.startswith("scoring: 0% of the rows, waiting: files with other workers: 1\n")


def test_only_the_last_one_cleans_up(tmp_path: Path) -> None:
    """And leaves what is not this program's."""
    out = tmp_path / "out"
    with ExitStack() as stack:
        with worker(out) as one:
            stack.enter_context(worker(out))
            assert one.take("a")
            for name in (".tmp-0123abcd-shard-00001.parquet.part", ".tmp-shard-00002.parquet.part", ".tmp-mine"):
                (out / name).touch()
            (out / ".tmp-89abcdef-tokenizer").mkdir()
        assert (out / WORKERS).is_dir()
        assert not list((out / WORKERS).glob("claim-*"))
        assert (out / ".tmp-0123abcd-shard-00001.parquet.part").exists()
    assert sorted(p.name for p in out.iterdir()) == [".lock", ".tmp-mine"]


def test_a_directory_of_which_nothing_came_is_removed_only_after_a_mistake(tmp_path: Path) -> None:
    """One that was asked to end is continued, and others may just have come."""
    out = tmp_path / "new" / "out"
    with pytest.raises(ConfigError), worker(out):
        raise ConfigError("a mistake")
    assert not (tmp_path / "new").exists()
    with pytest.raises(Preempted), worker(out):
        raise Preempted("SIGTERM")
    assert [p.name for p in out.iterdir()] == [".lock"]


def test_a_worker_that_is_alone_begins_with_a_clean_folder(tmp_path: Path) -> None:
    out = tmp_path / "out"
    (out / WORKERS).mkdir(parents=True)
    claim_of(out, "a", ELSEWHERE, 0)
    (out / WORKERS / "positions.json").write_text("{}")
    with worker(out) as one:
        assert one.read("positions") is None
        assert one.take("a")


def test_a_reader_is_not_disturbed(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "manifest.json").touch()
    with reading_lock(out), joined(out, CONTENTS, 60) as one, one.setting_up() as alone:
        assert not alone


def test_sections_exclude_each_other(tmp_path: Path) -> None:
    out, inside = tmp_path / "out", []

    def enter(one: Workers) -> None:
        for _ in range(20):
            with one.section():
                inside.append(1)
                assert len(inside) == 1
                time.sleep(0.001)
                inside.pop()

    with worker(out) as one, worker(out) as other:
        threads = [threading.Thread(target=enter, args=(w,)) for w in (one, other)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        with one.section(), pytest.raises(TimeoutError), other.section(0.1):
            pytest.fail("two at once")


def test_without_locks_nothing_is_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*given: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(OutputError, match="the file system has no locks"), worker(tmp_path / "out"):
        pytest.fail("it begins")


def test_the_first_note_stays(tmp_path: Path) -> None:
    with worker(tmp_path / "out") as one, worker(tmp_path / "out") as other:
        with one.section():
            assert one.agreed("x", {"a": 1}) == {"a": 1}
        with other.section():
            assert other.agreed("x", {"a": 2}) == {"a": 1}


@pytest.mark.parametrize("linked", [True, False])
def test_a_file_that_another_worker_finished_stays(
    linked: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where a file system gives a file no second name."""
    if not linked:

        def refuse(*given: object) -> None:
            raise PermissionError(1, "Operation not permitted")

        monkeypatch.setattr(os, "link", refuse)
    path = tmp_path / "out" / "x"
    with held(tmp_path / "out", "0123abcd"):
        with renamed_file(path, keep=True) as f:
            f.write(b"one")
            assert (tmp_path / "out" / ".tmp-0123abcd-x.part").exists()
        with renamed_file(path, keep=True) as f:
            f.write(b"other")
        assert path.read_bytes() == b"one"
        assert os.listdir(tmp_path / "out") == ["x"]
        write_bytes(path, b"new")  # what only one writes at a time is replaced
        assert path.read_bytes() == b"new"
    assert disk.temporary(path).name == ".tmp-x"


def test_two_workers_may_write_one_shard_at_once(tmp_path: Path) -> None:
    """The file of the one that finishes first stays, whole."""
    out, schema = tmp_path / "out", pa.schema([("a", pa.int64())])
    with held(out, "00000001"):
        with renamed_file(out / "shard-00000.parquet", keep=True) as slow:
            slow.write(b"half")
            disk._tags[out] = "00000002-"
            write_shard(out / "shard-00000.parquet", schema, [pa.table({"a": [1]}, schema)], {}, keep=True)
            whole = (out / "shard-00000.parquet").read_bytes()
        assert (out / "shard-00000.parquet").read_bytes() == whole
        assert os.listdir(out) == ["shard-00000.parquet"]


def test_each_looks_for_its_own_first() -> None:
    items = list(range(8))
    assert in_turn(items, Worker(0, 3)) == [0, 3, 6, 1, 4, 7, 2, 5]
    assert in_turn(items, Worker(1, 3)) == [1, 4, 7, 2, 5, 0, 3, 6]
    assert in_turn(items, Worker(2, 3)) == [2, 5, 0, 3, 6, 1, 4, 7]
    assert in_turn(items[:1], Worker(2, 3)) == [0]
    assert in_turn(items, Worker(0, 1)) == items
