"""What ``--layout`` derives from the epochs: the same rows in the same order, in other forms, byte for byte again."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import datasets
import jsonschema
import pyarrow.parquet as pq
import pytest

from entrodrop_prep import cli
from entrodrop_prep.config import MaterializeConfig
from entrodrop_prep.errors import ConfigError, DiskSpaceError, OutputError
from entrodrop_prep.export import derived, space
from entrodrop_prep.export.materialize import MaterializeSummary, materialize
from entrodrop_prep.store import manifest
from entrodrop_prep.store.json_schemas import schemas
from entrodrop_prep.verification.run import verify
from helpers.mixtures import rows_in, run_materialize
from helpers.scored import all_bytes, copy, rewrite_manifest

BOTH = ("concatenated", "jsonl")
COLUMNS = ["input_ids", "attention_mask", "labels"]


def run(made: Path, out: Path, **settings: Any) -> MaterializeSummary:
    return run_materialize(made / "train", out, **{"epochs": 3, "rows_per_shard": 20, **settings})


def epoch_rows(out: Path) -> list[Any]:
    return [row for folder in sorted(out.glob("epoch_*")) for row in rows_in(folder)]


def saved_rows(out: Path, split: str = "train") -> list[Any]:
    found = datasets.load_from_disk(str(out / "all_hf"))
    assert found[split].column_names == COLUMNS
    return list(zip(*(found[split][name][:] for name in COLUMNS), strict=True))


def line_rows(file: Path) -> list[Any]:
    return [tuple(json.loads(line)[name] for name in COLUMNS) for line in file.read_text().splitlines()]


def check_derived(out: Path) -> None:
    """Every form holds the epochs' rows in order."""
    every = epoch_rows(out)
    assert rows_in(out / "all") == every
    assert saved_rows(out) == every
    files = sorted((out / "jsonl").glob("epoch_*.jsonl"))
    assert [f.stem for f in files] == [f.name for f in sorted(out.glob("epoch_*"))]
    assert [row for f in files for row in line_rows(f)] == every


def mixed(made: Path) -> dict[str, Any]:
    return {"scored": (f"a={made / 'train'}:1.5", f"b={made / 'more'}"), "scope": "source"}


@pytest.mark.parametrize("kind", ["one", "mixture"])
def test_every_form_holds_the_epochs_rows(kind: str, made: Path, tmp_path: Path) -> None:
    settings = mixed(made) if kind == "mixture" else {}
    plain = run(made, tmp_path / "plain", **settings)
    summary = run(made, tmp_path / "out", layout=BOTH, **settings)
    assert summary.epochs == plain.epochs
    check_derived(tmp_path / "out")
    files = sorted((tmp_path / "out").glob("epoch_*/*.parquet"))
    copies = sorted((tmp_path / "out" / "all").iterdir())
    assert [f.name for f in copies] == [f"train-{i:05d}-of-{len(files):05d}.parquet" for i in range(len(files))]
    assert [f.read_bytes() for f in copies] == [f.read_bytes() for f in files]
    assert all(os.path.samefile(a, b) for a, b in zip(copies, files, strict=True))
    told = [json.loads((tmp_path / name / "manifest.json").read_bytes()) for name in ("plain", "out")]
    jsonschema.validate(told[1], schemas()["manifest.json"])
    assert {e["layout"] for e in told[1].pop("derived")} == set(BOTH)
    for one in told:
        del one["manifest_digest"]
    assert told[0] == told[1]
    assert not verify(str(tmp_path / "out")).findings


def test_copies_where_the_file_system_has_no_links(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any) -> None:
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    run(made, tmp_path / "out", layout=("concatenated",))
    assert not derived.can_link(tmp_path / "out")
    files = sorted((tmp_path / "out").glob("epoch_*/*.parquet"))
    copies = sorted((tmp_path / "out" / "all").iterdir())
    assert not any(os.path.samefile(a, b) for a, b in zip(copies, files, strict=True))
    assert rows_in(tmp_path / "out" / "all") == epoch_rows(tmp_path / "out")
    assert not verify(str(tmp_path / "out")).findings


def test_validation_rows_are_a_split_and_a_file(made: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(made, out, layout=BOTH, eval=str(made / "held"), plain_config=True)
    check_derived(out)
    assert saved_rows(out, "validation") == line_rows(out / "jsonl" / "validation.jsonl") == rows_in(out / "validation")
    assert set(datasets.load_from_disk(str(out / "all_hf"))) == {"train", "validation"}
    assert not verify(str(out)).findings


def test_two_runs_give_the_same_bytes_wherever_they_lie(made: Path, tmp_path: Path) -> None:
    run(made, tmp_path / "one", layout=BOTH)
    (tmp_path / "elsewhere").mkdir()
    run(made, tmp_path / "elsewhere" / "two", layout=BOTH)
    one, two = (all_bytes(p, without=("README.md",)) for p in (tmp_path / "one", tmp_path / "elsewhere" / "two"))
    assert one == two
    for name, data in one.items():
        assert str(tmp_path).encode() not in data, name
    assert not list((tmp_path / "one").glob(".tmp-*"))


def test_added_later_without_touching_the_epochs(made: Path, tmp_path: Path) -> None:
    whole, out = tmp_path / "whole", tmp_path / "out"
    run(made, whole, layout=BOTH)
    run(made, out)
    stamps = {f: f.stat().st_mtime_ns for f in out.glob("epoch_*/*")}
    run(made, out, layout=("concatenated",))
    assert (out / "all").is_dir()
    assert not (out / "jsonl").exists()
    summary = run(made, out, layout=("jsonl", "epochs"))
    assert not summary.already_complete
    assert stamps == {f: f.stat().st_mtime_ns for f in out.glob("epoch_*/*")}
    assert all_bytes(out, without=("README.md",)) == all_bytes(whole, without=("README.md",))
    for settings in ({}, {"layout": BOTH}):
        before = {f: f.stat().st_mtime_ns for f in out.rglob("*") if f.is_file() and f.name != ".lock"}
        assert run(made, out, **settings).already_complete
        assert before == {f: f.stat().st_mtime_ns for f in out.rglob("*") if f.is_file() and f.name != ".lock"}


def test_more_epochs_renew_what_is_derived(made: Path, tmp_path: Path) -> None:
    whole, out = tmp_path / "whole", tmp_path / "out"
    run(made, whole, layout=BOTH, horizon=4, epochs=4)
    run(made, out, layout=BOTH, horizon=4, epochs=2)
    stale = {f.name for f in (out / "all").iterdir()}
    run(made, out, horizon=4, epochs=4)
    check_derived(out)
    assert not stale & {f.name for f in (out / "all").iterdir()}
    assert all_bytes(out, without=("README.md",)) == all_bytes(whole, without=("README.md",))


def test_a_missing_folder_is_made_again(made: Path, tmp_path: Path) -> None:
    run(made, tmp_path / "out", layout=BOTH)
    before = all_bytes(tmp_path / "out")
    for file in (tmp_path / "out" / "jsonl").iterdir():
        file.unlink()
    run(made, tmp_path / "out")
    assert all_bytes(tmp_path / "out") == before


def test_gaps_are_refused_before_any_work(made: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(ConfigError, match="needs all 3 epochs, and epoch 0 would not be there"):
        run(made, out, layout=("jsonl",), only_epochs="1-2")
    assert not out.exists()
    run(made, out, only_epochs="0-1")
    before = all_bytes(out)
    with pytest.raises(ConfigError, match="epoch 2 would not be there"):
        run(made, out, layout=("jsonl",), only_epochs="0-1")
    assert all_bytes(out) == before
    run(made, out, layout=BOTH, only_epochs="2")
    check_derived(out)


@pytest.mark.parametrize("folder", ["all", "all_hf", "jsonl"])
def test_a_folder_of_the_users_own_is_never_taken(folder: str, made: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(made, out)
    (out / folder).mkdir()
    (out / folder / "mine.txt").write_text("mine")
    before = all_bytes(out)
    for more in ({}, {"overwrite": True}):
        with pytest.raises(OutputError, match=f"{folder}/mine.txt: this is in the way.*; move it out"):
            run(made, out, layout=BOTH, **more)
        assert all_bytes(out) == before
    (out / folder / "mine.txt").rename(tmp_path / "mine.txt")
    with pytest.raises(OutputError, match="in the way"):
        run(made, out, layout=BOTH)
    (out / folder).rmdir()
    run(made, out, layout=BOTH)
    (tmp_path / "mine.txt").rename(out / folder / "mine.txt")
    with pytest.raises(OutputError, match=f"{folder}/mine.txt: this is in the way"):
        run(made, out, layout=BOTH, overwrite=True)
    assert (out / folder / "mine.txt").read_text() == "mine"
    assert any("mine.txt: the manifest does not list this file" in f for f in verify(str(out)).findings)


def test_overwrite_takes_it_away(made: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(made, out, layout=BOTH)
    run(made, out, overwrite=True, seed=3)
    assert sorted(p.name for p in out.iterdir() if p.is_dir()) == ["epoch_000", "epoch_001", "epoch_002"]
    assert "derived" not in json.loads((out / "manifest.json").read_bytes())
    assert not verify(str(out)).findings


def test_datasets_loads_every_configuration_with_the_folders_beside(made: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(made, out, layout=BOTH, eval=str(made / "held"))
    cache = str(tmp_path / "cache")

    def rows(**which: Any) -> list[Any]:
        found = datasets.load_dataset(str(out), cache_dir=cache, **which)
        assert found.column_names == COLUMNS
        return list(zip(*(found[name][:] for name in COLUMNS), strict=True))

    assert rows(split="train") == epoch_rows(out)
    for epoch in range(3):
        assert rows(name=f"epoch_{epoch:03d}", split="train") == rows_in(out / f"epoch_{epoch:03d}")
    assert rows(split="validation") == rows_in(out / "validation")
    text = (out / "README.md").read_text()
    assert "`all/` and `all_hf/`" in text
    assert "`jsonl/`" in text


FILES = [
    "all/train-00001-of-*.parquet",
    "all_hf/train/data-*.arrow",
    "all_hf/dataset_dict.json",
    "jsonl/epoch_001.jsonl",
]


@pytest.mark.parametrize("pattern", FILES)
def test_a_missing_or_changed_file_is_found(pattern: str, made: Path, tmp_path: Path) -> None:
    run(made, tmp_path / "out", layout=BOTH)
    for change in ("missing", "changed"):
        out = copy(tmp_path / "out", tmp_path / change)
        (file,) = out.glob(pattern)
        if change == "missing":
            file.unlink()
        else:
            data = bytearray(file.read_bytes())
            data[len(data) // 2] ^= 1
            file.unlink()
            file.write_bytes(data)
        found = verify(str(out)).findings
        assert any(str(file) in f for f in found), found


def test_a_layout_that_was_left_behind_is_told(made: Path, tmp_path: Path) -> None:
    """A copy from the Hub has none of them."""
    run(made, tmp_path / "out", layout=BOTH)
    for folder in ("all", "all_hf"):
        shutil.rmtree(tmp_path / "out" / folder)
    report = verify(str(tmp_path / "out"))
    assert not report.findings
    assert [n for n in report.notes if "concatenated is not here" in n]
    assert not [n for n in report.notes if "jsonl is not here" in n]


@pytest.mark.parametrize("folder", ["all", "all_hf", "jsonl"])
def test_other_rows_are_found_even_where_the_manifest_lists_them(folder: str, made: Path, tmp_path: Path) -> None:
    run(made, tmp_path / "out", layout=BOTH)
    run(made, tmp_path / "other", layout=BOTH, seed=5)
    out = tmp_path / "out"
    described = json.loads((out / "manifest.json").read_bytes())
    for entry in described["derived"]:
        if entry["file"].startswith(f"{folder}/"):
            (out / entry["file"]).unlink()
    for file in (tmp_path / "other" / folder).rglob("*"):
        if file.is_file():
            os.link(file, out / file.relative_to(tmp_path / "other"))
    kept = [e for e in described["derived"] if not e["file"].startswith(f"{folder}/")]
    new = [
        manifest.file_entry(out, f, layout="jsonl" if folder == "jsonl" else "concatenated")
        for f in sorted((out / folder).rglob("*"))
        if f.is_file()
    ]
    rewrite_manifest(out, derived=kept + new)
    found = verify(str(out)).findings
    assert found
    assert all(f"{out / folder}" in f and ("not those of" in f) for f in found), found


def test_disk_space_counts_it(made: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    told = []
    for name, layout in (("one", ()), ("two", BOTH)):
        caplog.clear()
        run(made, tmp_path / name, layout=layout, compression="none")
        told.append(next(r.getMessage() for r in caplog.records if "to write" in r.getMessage()))
    said = [float(t.split()[1]) * {"B": 1, "kB": 1e3}[t.split()[2]] for t in told]
    tokens = sum(e["tokens"] for e in json.loads((tmp_path / "two/manifest.json").read_bytes())["epochs"])
    assert said[1] - said[0] == pytest.approx(tokens * (2 * space.PLAIN_BYTES + space.LINE_BYTES), abs=200)
    stored = sum(f.stat().st_size for f in (tmp_path / "two" / "jsonl").iterdir())
    assert stored < tokens * space.LINE_BYTES + 60 * len(epoch_rows(tmp_path / "two"))


def test_too_little_space_for_what_is_derived(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(made, tmp_path / "out")
    before = all_bytes(tmp_path / "out")
    usage = space.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(space.shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(DiskSpaceError, match=r"only 1\.0 kB are free"):
        run(made, tmp_path / "out", layout=BOTH)
    assert all_bytes(tmp_path / "out") == before


def test_mistakes_on_the_command_line(made: Path, tmp_path: Path, capfd: Any) -> None:
    arguments = ["materialize", str(made / "train"), "--out", str(tmp_path / "out"), "--epochs", "2"]
    assert cli.run([*arguments, "--layout", "parquet"]) == 2
    assert "--layout" in capfd.readouterr().err
    assert cli.run([*arguments, "--layout", "concatenated,jsonl"]) == 2
    assert "give --layout once for each value" in capfd.readouterr().err
    assert cli.run([*arguments, "--layout", "concatenated", "--layout", "jsonl"]) == 0
    assert "deriving all/ and all_hf/" in capfd.readouterr().out
    check_derived(tmp_path / "out")


def _derive(scored: str, out: str) -> None:
    materialize(MaterializeConfig(scored=scored, out=out, epochs=3, rows_per_shard=20, layout=BOTH))


def test_killed_on_the_way_it_goes_on(made: Path, tmp_path: Path) -> None:
    """Killed while it derives, in a finished directory and in a new one; run again, also without --layout."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["datasets", "entrodrop_prep.export.materialize"])
    run(made, tmp_path / "whole", layout=BOTH)
    expected = all_bytes(tmp_path / "whole", without=("README.md",))
    rng, landed = random.Random(1), 0
    for story in range(30):
        out = tmp_path / f"story-{story}"
        if story % 2:
            run(made, out)
        process = context.Process(target=_derive, args=(str(made / "train"), str(out)))
        process.start()
        while process.is_alive() and not (out / ".tmp-all").exists() and not (out / "all").exists():
            time.sleep(0.0005)
        process.join(rng.uniform(0, 0.06))
        if process.is_alive():
            os.kill(process.pid, signal.SIGKILL)
        process.join()
        finished = (out / "manifest.json").exists() and "derived" in json.loads((out / "manifest.json").read_bytes())
        landed += not finished
        for path in [*(out / "all").glob("*"), *(out / "epoch_000").glob("*.parquet")]:
            pq.read_table(path)
        run(made, out)
        assert all_bytes(out, without=("README.md",)) == expected
        if landed >= 3:
            break
    assert landed >= 3
