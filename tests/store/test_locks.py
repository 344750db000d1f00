"""One run writes or several read, and no result is made of the rows of two runs."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from entrodrop_prep import cli
from entrodrop_prep.config import MaterializeConfig, PushConfig
from entrodrop_prep.errors import DiskSpaceError, IntegrityError, OutputError
from entrodrop_prep.export.materialize import materialize
from entrodrop_prep.publish.push import push
from entrodrop_prep.store.locks import locked, reading_lock
from entrodrop_prep.store.scored import ScoredDataset
from entrodrop_prep.training.rows import MaskedRows
from entrodrop_prep.verification.inspect import show
from entrodrop_prep.verification.run import verify
from helpers.scored import all_bytes, some_rows, write_scored


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """Two scored directories with the same rows and other scores, and a masked one of the first."""
    for seed, name in enumerate(("scored", "other")):
        rows = some_rows(40, lengths=(3, 30))
        rows.entropy[:] = (rows.entropy * (1 + seed)).astype(rows.entropy.dtype)
        write_scored(tmp_path / name, rows)
    mask(tmp_path, "masked")
    return tmp_path


def mask(place: Path, out: str, **settings: Any) -> None:
    materialize(MaterializeConfig(scored=str(place / "scored"), out=str(place / out), epochs=2, **settings))


READERS: dict[str, Callable[[Path], Any]] = {
    "scored: materialize": lambda place: mask(place, "new"),
    "scored: verify": lambda place: verify(str(place / "scored")),
    "scored: verify --against": lambda place: verify(str(place / "masked"), str(place / "scored")),
    "scored: inspect": lambda place: list(show(str(place / "scored"))),
    "scored: load": lambda place: MaskedRows.open(place / "scored", epochs=2, cache_dir=place / "cache"),
    "masked: verify": lambda place: verify(str(place / "masked")),
    "masked: inspect": lambda place: list(show(str(place / "masked"), 3)),
    "masked: push": lambda place: push(PushConfig(directory=str(place / "masked"), repo="user/name")),
}


def test_a_pipe_in_the_place_of_a_lock_stops_nobody(place: Path) -> None:
    for directory in (place / "scored", place / "masked"):
        (directory / ".lock").unlink(missing_ok=True)
        os.mkfifo(directory / ".lock")
    assert verify(str(place / "masked"), str(place / "scored")).findings == []
    with pytest.raises(OutputError, match="no regular file, and in the way"):
        mask(place, "masked")


@pytest.mark.parametrize("reader", READERS)
def test_what_is_being_written_is_not_read(reader: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_" + "x" * 34)
    directory = place / reader.split(":")[0]
    with locked(directory), pytest.raises(OutputError, match=f"{directory}: another run is writing here; wait for it"):
        READERS[reader](place)
    if "push" not in reader:
        READERS[reader](place)


HOLD = """
import sys, time
from pathlib import Path
from entrodrop_prep.store import locks
with locks.{lock}(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("lock", ["reading_lock", "locked"])
def test_a_killed_run_leaves_no_lock(lock: str, place: Path) -> None:
    scored = place / "scored"
    process = subprocess.Popen([sys.executable, "-c", HOLD.format(lock=lock), scored], stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == b"held\n"
        with pytest.raises(OutputError, match="another run is"), locked(scored):
            pytest.fail("two at once")
    finally:
        process.kill()
        process.wait()
    with locked(scored):
        pass
    assert not verify(str(scored)).findings


def test_what_is_being_read_is_not_written(place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with reading_lock(place / "scored"), reading_lock(place / "scored", place / "masked"):
        verify(str(place / "masked"), str(place / "scored"))
        command = ["materialize", str(place / "scored"), "--out", str(place / "masked"), "--epochs", "2", "--overwrite"]
        assert cli.run(command) == 2
        assert capfd.readouterr().err == (
            f"error: {place}/masked: another run is reading here; wait for it, or choose another --out\n"
        )
        mask(place, "beside")
        with pytest.raises(OutputError, match="another run is reading here"), locked(place / "scored"):
            pytest.fail("two at once")
    mask(place, "masked", overwrite=True)


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES])
def test_where_no_lock_can_be_had_reading_goes_without(
    number: int, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = all_bytes(place / "scored")
    for name in ("scored", "masked"):
        (place / name / ".lock").unlink()
    real = os.open

    def refusing(path: Any, flags: int, *more: Any, **named: Any) -> int:
        if flags & os.O_CREAT and str(path).endswith(("scored/.lock", "masked/.lock")):
            raise OSError(number, os.strerror(number))
        return real(path, flags, *more, **named)

    monkeypatch.setattr(os, "open", refusing)
    assert not verify(str(place / "masked"), str(place / "scored")).findings
    mask(place, "new")
    assert all_bytes(place / "scored") == before
    assert not (place / "scored" / ".lock").exists()
    monkeypatch.undo()
    assert not verify(str(place / "scored")).findings
    assert (place / "scored" / ".lock").exists()


@pytest.mark.parametrize("name", ["shard-00002.parquet", "shard-00004.parquet"])
def test_rows_of_two_runs_are_never_mixed(name: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where locks do not hold another run off, as on some network file systems: a shard is renamed over this one."""
    check = ScoredDataset.check

    def then_replaced(self: ScoredDataset) -> None:
        check(self)
        shutil.copy(place / "other" / name, place / "scored" / ".tmp-new")
        os.rename(place / "scored" / ".tmp-new", place / "scored" / name)

    monkeypatch.setattr(ScoredDataset, "check", then_replaced)
    for reader in ("scored: materialize", "scored: load"):
        shutil.copy(place / "other" / name, place / "scored" / "kept")
        with pytest.raises(IntegrityError, match=f"scored/{name}: it is not the shard that the manifest lists"):
            READERS[reader](place)
        monkeypatch.undo()
        shutil.rmtree(place / "scored")
        rows = some_rows(40, lengths=(3, 30))
        write_scored(place / "scored", rows)
        monkeypatch.setattr(ScoredDataset, "check", then_replaced)
    assert not list((place / "new").glob("epoch_*/*.parquet"))


def test_a_manifest_that_changed_since_it_was_opened(place: Path) -> None:
    opened = ScoredDataset(place / "scored")
    shutil.copytree(place / "other", place / "scored", dirs_exist_ok=True)
    with pytest.raises(IntegrityError, match="another run rewrote it"):
        opened.check()


def test_a_full_tmpdir_is_not_a_finding(place: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    """On a small file system; where none can be mounted, a limit on the size of files does for one."""
    small = place / "small"
    small.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4k", "tmpfs", small]
    mounted = not subprocess.run(mount, capture_output=True).returncode
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    monkeypatch.setattr(tempfile, "tempdir", str(small))
    try:
        if not mounted:
            resource.setrlimit(resource.RLIMIT_FSIZE, (200, limits[1]))
        with pytest.raises(DiskSpaceError) as e:
            verify(str(place / "masked"), str(place / "scored"))
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert str(e.value).startswith(f"{small}: no room for temporary files: no space left")
        assert str(e.value).endswith("make room there, or set TMPDIR to another folder")
        monkeypatch.setattr(tempfile, "tempdir", str(place / "gone"))
        with pytest.raises(OutputError, match="gone: no room for temporary files"):
            verify(str(place / "masked"), str(place / "scored"))
        monkeypatch.setattr(tempfile, "tempdir", str(place))
        assert not verify(str(place / "masked"), str(place / "scored")).findings
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        if mounted:
            subprocess.run(["umount", "-l", small], check=True)
