"""What a run removes and writes is this program's, in the directory that it began in, and durable before it counts."""

from __future__ import annotations

import errno
import io
import os
import resource
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from entrodrop_prep.config import MaterializeConfig
from entrodrop_prep.errors import DiskSpaceError, OutputError
from entrodrop_prep.export import derived
from entrodrop_prep.export.materialize import materialize
from entrodrop_prep.store import disk, manifest
from entrodrop_prep.store.ownership import Owned
from entrodrop_prep.store.schema import MASKED
from entrodrop_prep.verification.run import verify
from helpers.models import random_rows, run_score, save_model, tiny_llama, write_rows
from helpers.scored import all_bytes, some_rows, write_scored

V = 61
Run = Callable[..., Any]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, rows, scores of them, and a masked dataset with every layout."""
    home = tmp_path_factory.mktemp("place")
    save_model(home / "model", tiny_llama(V))
    write_rows(home / "rows.jsonl", [{"input_ids": ids} for ids in random_rows(20, V)])
    run_score(home / "rows.jsonl", home / "model", home / "score", rows_per_shard=5)
    write_scored(home / "scored", some_rows(40))
    mask(home, home / "materialize", layout=("concatenated", "jsonl"))
    return home


def score(home: Path, out: Path, **settings: Any) -> None:
    run_score(home / "rows.jsonl", home / "model", out, **{"rows_per_shard": 5, **settings})


def mask(home: Path, out: Path, **settings: Any) -> None:
    usual = {"scored": str(home / "scored"), "epochs": 3, "rows_per_shard": 20}
    materialize(MaterializeConfig(**{**usual, "out": str(out), **settings}))


RUNS: dict[str, Run] = {"score": score, "materialize": mask}


def tree(directory: Path) -> dict[str, Any]:
    """Name -> bytes of a file, target of a link, None of a folder; but the lock."""
    found: dict[str, Any] = {}
    for path in sorted(directory.rglob("*")):
        name = path.relative_to(directory).as_posix()
        if path.is_symlink():
            found[name] = os.readlink(path)
        elif name != ".lock":
            found[name] = path.read_bytes() if path.is_file() else None
    return found


def user_parquet(path: Path) -> None:
    path.unlink(missing_ok=True)
    pq.write_table(pa.table({"mine": [1, 2, 3]}), path)


def user_file(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.write_text("mine")


def user_folder(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.mkdir()
    (path / "mine.txt").write_text("mine")


def link_outside(path: Path) -> None:
    outside = path.parent.parent / "outside" / path.name
    outside.parent.mkdir(exist_ok=True)
    shutil.move(path, outside)
    path.symlink_to(outside)


def dangling_link(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.symlink_to("nowhere")


BESIDE = {
    "score": ["notes.txt", "shard-notes.parquet", ".tmp-notes", "epoch_000/mine.parquet", "shard-1.parquet", "x/y"],
    "materialize": ["epoch_stats/mine.parquet", "epoch_001/mine.parquet", "epoch_001/.tmp-x.part", ".tmp-y", "plain/z"],
}


@pytest.mark.parametrize("command", ["score", "materialize"])
def test_files_of_the_users_stay(command: str, place: Path, tmp_path: Path) -> None:
    out, outside = tmp_path / "out", tmp_path / "outside"
    shutil.copytree(place / command, out)
    outside.mkdir()
    user_file(outside / "a.parquet")
    user_file(outside / "train-00000-of-00001.parquet")
    (out / "epoch_777").symlink_to(outside)
    (out / ".tmp-mine").symlink_to(outside)
    for name in BESIDE[command]:
        (out / name).parent.mkdir(exist_ok=True)
        (user_parquet if name.endswith("parquet") else user_file)(out / name)
    before = {name: (out / name).read_bytes() for name in BESIDE[command]}
    RUNS[command](place, out, overwrite=True, rows_per_shard=10)
    assert {name: (out / name).read_bytes() for name in BESIDE[command]} == before
    assert sorted(p.name for p in outside.iterdir()) == ["a.parquet", "train-00000-of-00001.parquet"]
    assert (out / "epoch_777").is_symlink()
    assert (out / ".tmp-mine").is_symlink()
    RUNS[command](place, tmp_path / "fresh", rows_per_shard=10)
    fresh = all_bytes(tmp_path / "fresh", without=("README.md",))
    assert {name: (out / name).read_bytes() for name in fresh} == fresh
    assert not (out / "all").exists()


IN_THE_WAY = [
    ("score", "shard-00003.parquet", user_parquet),
    ("score", "shard-00007.parquet", user_file),
    ("score", "shard-00001.parquet", link_outside),
    ("score", "shard-00001.parquet", user_folder),
    ("score", "tokenizer/notes.txt", user_file),
    ("score", "tokenizer/tokenizer.json", user_file),
    ("score", "tokenizer", link_outside),
    ("score", "rejected.jsonl", user_file),
    ("score", "unigram.npy", dangling_link),
    ("materialize", "epoch_001/train-00000-of-00003.parquet", user_parquet),
    ("materialize", "epoch_001/train-00001-of-00003.parquet", link_outside),
    ("materialize", "epoch_001", link_outside),
    ("materialize", "jsonl/mine.jsonl", user_file),
    ("materialize", "jsonl/epoch_002.jsonl", user_file),
    ("materialize", "all/train-00001-of-00009.parquet", link_outside),
    ("materialize", "all_hf/train", link_outside),
    ("materialize", "README.md", dangling_link),
    ("materialize", "entropy.svg", user_folder),
]


@pytest.mark.parametrize("overwrite", [True, False])
@pytest.mark.parametrize(("command", "name", "put"), IN_THE_WAY)
def test_what_is_in_the_way_is_named_and_nothing_is_removed(
    command: str, name: str, put: Callable[[Path], None], overwrite: bool, place: Path, tmp_path: Path
) -> None:
    """Also for a run that has something left to do: without its manifest a directory is unfinished."""
    out = tmp_path / "out"
    shutil.copytree(place / command, out)
    if not overwrite:
        (out / manifest.NAME).unlink()
    put(out / name)
    before = tree(tmp_path)
    more = {"overwrite": True, "rows_per_shard": 10} if overwrite else {}
    with pytest.raises((OutputError, manifest.IntegrityError), match=str(out / name)) as e:
        RUNS[command](place, out, **more)
    assert "\n" not in str(e.value)
    assert tree(tmp_path) | {f"out/{manifest.STATE}": None} == before | {f"out/{manifest.STATE}": None}


@pytest.mark.parametrize("command", ["score", "materialize"])
def test_killed_while_it_removes_it_goes_on_as_carefully(
    command: str, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, unlink = tmp_path / "out", os.unlink
    shutil.copytree(place / command, out)
    gone: list[str] = []

    def killed(path: Any, **more: Any) -> None:
        if more.get("dir_fd") is not None:
            if len(gone) == 3:
                raise KeyboardInterrupt
            gone.append(path)
        unlink(path, **more)

    monkeypatch.setattr(os, "unlink", killed)
    with pytest.raises(KeyboardInterrupt):
        RUNS[command](place, out, overwrite=True, rows_per_shard=10)
    monkeypatch.undo()
    assert gone[0] == manifest.NAME
    mine = ["shard-notes.parquet", "epoch_001/mine.parquet", "mine.txt"]
    for name in mine:
        (out / name).parent.mkdir(exist_ok=True)
        user_file(out / name)
    RUNS[command](place, out, rows_per_shard=10)
    RUNS[command](place, tmp_path / "fresh", rows_per_shard=10)
    left = all_bytes(out, without=("README.md",))
    assert {name: left.pop(name) for name in mine} == dict.fromkeys(mine, b"mine")
    assert left == all_bytes(tmp_path / "fresh", without=("README.md",))


def test_begun_by_an_earlier_version_it_is_finished(place: Path, tmp_path: Path) -> None:
    """Killed just before its manifest, with a note that lists no files: the same is made, so nothing is lost."""
    for command in RUNS:
        out = tmp_path / command
        shutil.copytree(place / command, out)
        expected = tree(out)
        state = manifest.read_state(out) or {}
        del state["files"]
        manifest.write_state(out, state)
        (out / manifest.NAME).unlink()
        RUNS[command](place, out)
        assert tree(out) == expected
    assert not verify(str(tmp_path / "materialize"), str(place / "scored")).findings
    (out / manifest.NAME).unlink()
    manifest.write_state(out, state)
    user_file(out / "jsonl" / "epoch_001.jsonl")
    with pytest.raises(OutputError, match=r"jsonl/epoch_001\.jsonl: this is in the way"):
        mask(place, out)


# A directory that is lost on the way.


@pytest.mark.parametrize("name", ["", ".", "..", "/", "jsonl", "jsonl/", "jsonl/\0", "jsonl/../scored", "jsonl//x"])
def test_a_note_names_no_file_that_is_not_ours(name: str, tmp_path: Path) -> None:
    manifest.write_state(tmp_path, {"schema": MASKED, "files": [[name, "0" * 64]]})
    assert name not in Owned(tmp_path, derived.CONTENTS)._proved


@pytest.mark.parametrize("how", ["removed", "replaced"])
@pytest.mark.parametrize("command", ["score", "materialize", "derive"])
def test_a_lost_directory_is_not_made_again(
    command: str, how: str, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, calls = tmp_path / "deep" / "out", []
    before = disk.check_held

    def lose(path: Path) -> None:
        calls.append(path)
        there = path.parent == out / ".tmp-all_hf" or path == out / "all_hf" if command == "derive" else None
        if there or (there is None and len(calls) == 12):
            shutil.move(out, tmp_path / "lost")
            if how == "replaced":
                out.mkdir()
        before(path)

    monkeypatch.setattr(disk, "check_held", lose)
    monkeypatch.setattr(derived, "check_held", lose)
    runs: dict[str, Callable[[], Any]] = {
        "score": lambda: score(place, out, rows_per_shard=2),
        "materialize": lambda: mask(
            place, out, rows_per_shard=7, jobs="1"
        ),  # another thread may check before, and make after
        "derive": lambda: mask(place, out, layout=("concatenated",)),
    }
    with pytest.raises(OutputError, match=r"deep/out: the directory was removed, renamed, replaced or unmounted"):
        runs[command]()
    assert out.exists() == (how == "replaced")
    assert how == "removed" or list(out.iterdir()) == []
    monkeypatch.undo()
    if how == "replaced":
        out.rmdir()
    shutil.move(tmp_path / "lost", out)
    runs[command]()
    assert not verify(str(out)).findings


def test_a_directory_that_is_lost_between_a_file_and_its_entry(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, entry = tmp_path / "out", manifest.file_entry

    def lose(directory: Path, path: Path, **more: Any) -> dict[str, Any]:
        if out.exists():
            shutil.move(out, tmp_path / "lost")
        return entry(directory, path, **more)

    monkeypatch.setattr(manifest, "file_entry", lose)
    with pytest.raises(OutputError, match=r"out: the directory was removed, renamed, replaced or unmounted"):
        mask(place, out)


# Durable.


@pytest.mark.parametrize("command", ["score", "materialize"])
def test_every_name_is_durable_before_the_manifest(
    command: str, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each file is flushed before it is renamed, each folder after it got a name; the manifest comes last."""
    out, log = tmp_path / "new" / "deep" / "out", list[tuple[str, str]]()
    real = {name: getattr(os, name) for name in ("fsync", "rename", "mkdir")}

    def fsync(fd: int) -> None:
        log.append(("fsync", os.readlink(f"/proc/self/fd/{fd}")))
        real["fsync"](fd)

    def rename(a: Any, b: Any) -> None:
        log.append(("rename", f"{a}>{b}"))
        real["rename"](a, b)

    def mkdir(path: Any, *more: Any) -> None:
        log.append(("mkdir", str(path)))
        real["mkdir"](path, *more)

    for name, replacement in (("fsync", fsync), ("rename", rename), ("mkdir", mkdir)):
        monkeypatch.setattr(os, name, replacement)
    RUNS[command](place, out, **({"layout": ("jsonl",)} if command == "materialize" else {}))
    monkeypatch.undo()
    published = next(i for i, (c, w) in enumerate(log) if c == "rename" and w.endswith(f">{out / manifest.NAME}"))
    for i, (call, what) in enumerate(log):
        later = [w for c, w in log[i + 1 : published if i < published else None] if c == "fsync"]
        earlier = [w for c, w in log[:i] if c == "fsync"]
        if call == "rename":
            old, new = what.split(">")
            assert old in earlier, what
            assert str(Path(new).parent) in later, what
            for file in Path(new).rglob("*") if Path(new).is_dir() else ():
                assert str(Path(old) / file.relative_to(new)) in earlier, file
        if call == "mkdir" and ".tmp-" not in what and str(tmp_path) in what:
            assert str(Path(what).parent) in later, what
    made = [w for c, w in log if c == "mkdir"]
    assert {str(tmp_path / "new"), str(tmp_path / "new" / "deep"), str(out)} <= set(made)
    named = [w.split(">")[1] for c, w in log if c == "rename"]
    assert named[-1] == str(out / manifest.NAME)
    assert log[-1] == ("fsync", str(out))


# A disk that fails.

FAULTS = [
    ("fsync", errno.EIO, OutputError),
    ("fsync", errno.ENOSPC, DiskSpaceError),
    ("fsync", errno.EDQUOT, DiskSpaceError),
    ("rename", errno.ESTALE, OutputError),
    ("rename", errno.EROFS, OutputError),
    ("open", errno.ENOSPC, DiskSpaceError),
    ("open", errno.EIO, OutputError),
]


@pytest.mark.parametrize(("call", "number", "kind"), FAULTS)
@pytest.mark.parametrize("command", ["score", "materialize"])
def test_a_disk_that_fails_ends_a_run_with_one_line(
    command: str,
    call: str,
    number: int,
    kind: type[OutputError],
    place: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In the middle of the run: some shards are there. They stay, and the rest is made later."""
    out, real, calls = tmp_path / "out", getattr(os, call), []

    def failing(*arguments: Any, **more: Any) -> Any:
        to_write = call != "open" or arguments[1] & os.O_CREAT
        if call == "fsync" or (".parquet" in str(arguments[0]) and to_write):
            calls.append(arguments)
            if len(calls) == (12 if call == "fsync" else 3):
                raise OSError(number, os.strerror(number))
        return real(*arguments, **more)

    monkeypatch.setattr(os, call, failing)
    with pytest.raises(kind) as e:
        RUNS[command](place, out)
    monkeypatch.undo()
    assert type(e.value) is kind
    assert str(e.value).startswith(str(out))
    assert os.strerror(number) in str(e.value)
    assert "\n" not in str(e.value)
    left = {p: p.read_bytes() for p in out.rglob("*.parquet")}
    assert left
    assert not [p for p in out.rglob(".tmp-*") if p.is_file()]
    RUNS[command](place, out)
    assert {p: p.read_bytes() for p in left} == left
    RUNS[command](place, tmp_path / "whole")
    assert all_bytes(out, without=("README.md",)) == all_bytes(tmp_path / "whole", without=("README.md",))


class ClosesBadly(io.FileIO):
    """As on a network file system that finds only then what it could not keep."""

    def close(self) -> None:
        if not self.closed:
            super().close()
            raise OSError(errno.EIO, os.strerror(errno.EIO))


@pytest.mark.parametrize("name", ["shard-00001.parquet", "unigram.npy", "train-00001-of", "README.md"])
def test_a_file_that_cannot_be_closed_gets_no_name(
    name: str, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, real = tmp_path / "out", disk.create

    def create(path: Path) -> BinaryIO:
        return io.BufferedWriter(ClosesBadly(path, "xb")) if name in path.name else real(path)

    run = RUNS["score" if name in ("shard-00001.parquet", "unigram.npy") else "materialize"]
    monkeypatch.setattr(disk, "create", create)
    with pytest.raises(OutputError, match=f"{name}.*: writing failed: {os.strerror(errno.EIO)}"):
        run(place, out)
    monkeypatch.undo()
    assert not [p for p in out.rglob("*") if name in p.name]
    run(place, out)
    assert not verify(str(out)).findings


@pytest.mark.parametrize("layout", ["jsonl", "concatenated"])
def test_a_disk_that_fills_while_layouts_are_derived(
    layout: str, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a file system of its own; where none can be mounted, a limit on the size of files does for one."""
    small = tmp_path / "small"
    small.mkdir()
    mounted = not subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", small], capture_output=True
    ).returncode
    out = (small if mounted else tmp_path) / "out"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    monkeypatch.setattr("entrodrop_prep.export.materialize.check_space", lambda *_: None)
    try:
        mask(place, out)
        kept = all_bytes(out)
        if mounted:
            (small / "filler").write_bytes(bytes(max(0, shutil.disk_usage(small).free - 12_000)))
        else:
            resource.setrlimit(resource.RLIMIT_FSIZE, (8_000, limits[1]))
        with pytest.raises(DiskSpaceError, match=str(out)) as e:
            mask(place, out, layout=(layout,))
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert "no space left" in str(e.value)
        (small / "filler").unlink(missing_ok=True)
        left = all_bytes(out)
        assert {n: left[n] for n in kept if n != manifest.STATE} == {n: kept[n] for n in kept if n != manifest.STATE}
        assert not [n for n in left if n.startswith((".tmp-", "jsonl", "all_hf"))]
        mask(place, out, layout=(layout,))
        assert not verify(str(out)).findings
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        if mounted:
            subprocess.run(["umount", "-l", small], check=True)
