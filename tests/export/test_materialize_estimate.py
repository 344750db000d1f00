"""``materialize --dry-run``: what it says of a run is what the run then takes, and nothing is written."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from entrodrop_prep import cli
from entrodrop_prep.config import MaterializeConfig
from entrodrop_prep.errors import DiskSpaceError, MismatchError
from entrodrop_prep.export import epoch
from entrodrop_prep.export import estimate as estimate_module
from entrodrop_prep.export.estimate import MaterializeEstimate, estimate
from entrodrop_prep.export.materialize import materialize
from helpers.scored import some_rows, write_scored

SETTINGS: dict[str, Any] = {"epochs": 4, "rows_per_shard": 40}


@pytest.fixture(scope="module")
def scored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scored")
    write_scored(folder / "held", some_rows(30, seed=3))
    write_scored(folder / "other", some_rows(30, seed=4))
    return write_scored(folder / "one", some_rows(200, lengths=(20, 80), distinct=None), rows_per_shard=64)


def estimated(
    place: Path, out: Path, monkeypatch: pytest.MonkeyPatch, **settings: Any
) -> tuple[MaterializeEstimate, MaterializeConfig]:
    """The estimate; no file comes, goes or changes, in the directories or in TMPDIR."""
    config = MaterializeConfig(**{"scored": str(place), "out": str(out), **SETTINGS, **settings})
    before = everything(out.parent), everything(place.parent)
    with tempfile.TemporaryDirectory() as tmp, monkeypatch.context() as patched:
        patched.setattr(tempfile, "tempdir", tmp)
        found = estimate(config)
        assert os.listdir(tmp) == []
    assert (everything(out.parent), everything(place.parent)) == before
    assert all(line.isprintable() for line in found.lines)
    return found, config


def everything(folder: Path) -> dict[str, tuple[int, int]]:
    found = {str(p): p.stat() for p in sorted(folder.rglob("*"))}
    return {name: (s.st_mtime_ns, s.st_size) for name, s in found.items()}


def disk(out: Path) -> int:
    return sum(p.stat().st_size for p in out.rglob("*") if p.is_file())


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"target": "both", "compression": "none", "jobs": "1"},
        {"pack": 200, "add_columns": ["position_ids"], "compression": "snappy"},
        {"shuffle": "none", "rows_multiple": 16, "plain_config": True, "scope": "row"},
        {"only_epochs": "1-2"},
    ],
)
def test_few_files_are_told_exactly(
    scored: Path, tmp_path: Path, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    told, config = estimated(scored, tmp_path / "out", monkeypatch, **settings)
    made = materialize(config)
    parts = {p.folder: p for p in told.parts}
    for e in made.epochs:
        part = parts[e["folder"]]
        assert (part.rows, part.tokens.value) == (e["rows"], e["tokens"])
        assert part.trainable.value == e["trainable"]
        assert part.dropped.value / part.trainable.value == pytest.approx(e["dropped_share"])
        assert part.trainable.error == part.dropped.error == 0
    assert sum(p.files for p in told.parts) == len(list((tmp_path / "out").rglob("*.parquet")))
    assert abs(told.disk.value / disk(tmp_path / "out") - 1) < 0.1


@pytest.mark.parametrize("shuffle", ["epoch", "none"])
def test_row_groups_stand_for_the_others(
    scored: Path, tmp_path: Path, shuffle: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(estimate_module, "MOST_TOKENS", 16_000)
    monkeypatch.setattr(estimate_module, "GROUP_TOKENS", 1000)
    monkeypatch.setattr(epoch, "GROUP_TOKENS", 1000)
    settings: dict[str, Any] = {"rows_per_shard": 1000, "shuffle": shuffle}
    told, config = estimated(scored, tmp_path / "out", monkeypatch, **settings)
    assert all(p.dropped.error > 0 for p in told.parts)
    made = materialize(config)
    for part, e in zip(told.parts, made.epochs, strict=True):
        assert (part.rows, part.tokens.value) == (e["rows"], e["tokens"])
        assert abs(part.trainable.value / e["trainable"] - 1) < 0.1
        assert abs(part.dropped.value / part.trainable.value - e["dropped_share"]) < 0.05
    assert abs(told.disk.value / disk(tmp_path / "out") - 1) < 0.1


def test_mixtures_and_validation_rows(scored: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sources = [f"a={scored}:1.5", f"b={scored.parent / 'other'}"]
    told, config = estimated(scored, tmp_path / "out", monkeypatch, scored=sources, eval=str(scored.parent / "held"))
    made = materialize(config)
    assert [p.folder for p in told.parts] == [*(f"epoch_00{e}" for e in range(4)), "validation"]
    assert [p.rows for p in told.parts[:-1]] == [e["rows"] for e in made.epochs]
    assert abs(told.disk.value / disk(tmp_path / "out") - 1) < 0.1


def test_what_is_finished_counts(scored: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, config = estimated(scored, tmp_path / "out", monkeypatch)
    materialize(config)
    files = sorted((tmp_path / "out").rglob("*.parquet"))
    for path in files[: len(files) // 2]:
        path.unlink()
    (tmp_path / "out" / "manifest.json").unlink()
    left, _ = estimated(scored, tmp_path / "out", monkeypatch)
    assert sum(p.missing for p in left.parts) == len(files) // 2
    assert left.disk.value < 0.7 * whole.disk.value
    assert any(line == f"finished: {len(files) - len(files) // 2} files are there" for line in left.lines)
    again, _ = estimated(scored, tmp_path / "out", monkeypatch, overwrite=True)
    assert sum(p.missing for p in again.parts) == len(files)
    with pytest.raises(MismatchError, match="seed was 0, now 1"):
        estimated(scored, tmp_path / "out", monkeypatch, seed=1)


def test_no_lock_is_left_in_a_copied_directory(scored: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = tmp_path / "scored" / "one"
    shutil.copytree(scored, mine, ignore=shutil.ignore_patterns(".lock"))
    estimated(mine, tmp_path / "out", monkeypatch)
    assert not (mine / ".lock").exists()


def test_layouts_take_room_too(scored: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    less, _ = estimated(scored, tmp_path / "out", monkeypatch)
    more, _ = estimated(scored, tmp_path / "out", monkeypatch, layout=["jsonl"])
    assert more.disk.value > 2 * less.disk.value


@pytest.mark.parametrize(
    "flags",
    [["--rows-multiple", "1000"], ["--keep-surprising", "x"], ["--only-epochs", "7"], ["--drop-token", "<nope>"]],
)
def test_what_cannot_be_fails_as_in_the_run(
    scored: Path, tmp_path: Path, flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    target = ["--target", "both"] if "--drop-token" in flags else []
    command = ["materialize", str(scored), "--epochs", "2", "--out", str(tmp_path / "out"), *target, *flags]
    said = []
    for more in (["--dry-run"], []):
        assert cli.run([*command, *more]) == 2
        said.append([line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")])
        if more:
            assert not (tmp_path / "out").exists()
    assert said[0] == said[1]
    assert len(said[0]) == 1


def test_the_command_line(scored: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "recipe.json"
    recipe.write_text(json.dumps({"epochs": 3}))
    command = ["materialize", str(scored), "--recipe", str(recipe), "--out", str(tmp_path / "out")]
    assert cli.run([*command, "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[-7:]] == [
        "rows",
        *("epoch_000", "epoch_001", "epoch_002"),
        *("disk:", "memory:", "time:"),
    ]
    assert not (tmp_path / "out").exists()


def test_materialize_itself_refuses(scored: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = MaterializeConfig(scored=str(scored), out=str(tmp_path / "out"), epochs=2, dry_run=True)
    with pytest.raises(ValueError, match="dry_run is for"):
        materialize(config)
    assert not (tmp_path / "out").exists()
    real = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: real._replace(free=1000))
    with pytest.raises(DiskSpaceError):
        estimate(config)
    assert np.isfinite(real.free)
