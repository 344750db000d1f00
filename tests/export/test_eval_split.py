"""What stands beside the epochs: the split `validation` in every configuration, and the configuration `plain`."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import datasets
import jsonschema
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from entrodrop_prep import cli
from entrodrop_prep.config import Recipe
from entrodrop_prep.errors import IntegrityError, MismatchError, OutputError, SourceError
from entrodrop_prep.export.materialize import MaterializeSummary
from entrodrop_prep.store.json_schemas import schemas
from entrodrop_prep.verification.run import verify
from helpers.mixtures import SOURCES, Given, Row, naive_mixture, rows_in, run_materialize, whole_rows
from helpers.scored import all_bytes, copy, manifest_of, reseal, rewrite_manifest, some_rows, write_scored

TRAIN, MORE, HELD = SOURCES.values()
SHUFFLES = ["epoch", "once", "none"]


def run(made: Path, out: Path, **settings: Any) -> MaterializeSummary:
    return run_materialize(made / "train", out, **settings)


def loaded(out: Path, name: str | None, split: str, cache: Path) -> list[Row]:
    found = datasets.load_dataset(str(out), name, split=split, cache_dir=str(cache))
    return [(r["input_ids"], r["attention_mask"], r["labels"]) for r in found]


# The split.


@pytest.mark.parametrize("settings", [{}, {"target": "both", "rows_per_shard": 7}, {"select": "random"}], ids=str)
def test_validation_rows_are_whole_and_in_order(settings: dict[str, Any], made: Path, tmp_path: Path) -> None:
    run(made, tmp_path / "out", eval=str(made / "held"), schedule="constant", max_rate=1, quantile=1, **settings)
    assert rows_in(tmp_path / "out" / "validation") == whole_rows(HELD)
    told = manifest_of(tmp_path / "out")["validation"]
    assert told["rows"] == len(whole_rows(HELD))
    assert told["tokens"] == sum(len(ids) for ids, _, _ in whole_rows(HELD))
    assert told["labels_left"] == sum(x != -100 for _, _, labels in whole_rows(HELD) for x in labels)
    assert told["rows_without_loss"] == len(HELD.row_id) - len(whole_rows(HELD)) > 0


def test_every_configuration_has_the_split(made: Path, tmp_path: Path) -> None:
    run(made, tmp_path / "out", eval=str(made / "held"), plain_config=True, rows_per_shard=9)
    assert sorted(datasets.get_dataset_config_names(str(tmp_path / "out"))) == [
        "all",
        "epoch_000",
        "epoch_001",
        "plain",
    ]
    for name in (None, "epoch_000", "epoch_001", "plain"):
        assert loaded(tmp_path / "out", name, "validation", tmp_path / "cache") == whole_rows(HELD)
    for name in ("epoch_001", "plain"):
        assert loaded(tmp_path / "out", name, "train", tmp_path / "cache") == rows_in(tmp_path / "out" / name)
    both = [row for e in ("epoch_000", "epoch_001") for row in rows_in(tmp_path / "out" / e)]
    assert loaded(tmp_path / "out", None, "train", tmp_path / "cache") == both


def test_thresholds_come_from_training_data_only(made: Path, tmp_path: Path) -> None:
    run(made, tmp_path / "with", eval=str(made / "held"), target="both")
    run(made, tmp_path / "without", target="both")
    for epoch in ("epoch_000", "epoch_001"):
        assert rows_in(tmp_path / "with" / epoch) == rows_in(tmp_path / "without" / epoch)
    assert manifest_of(tmp_path / "with")["tau_nats"] == manifest_of(tmp_path / "without")["tau_nats"]
    assert not (tmp_path / "without" / "validation").exists()


# The plain configuration.


@pytest.mark.parametrize("shuffle", SHUFFLES)
def test_plain_is_epoch_0_with_nothing_dropped(shuffle: str, made: Path, tmp_path: Path) -> None:
    settings = {"target": "both", "schedule": "constant", "max_rate": 1, "quantile": 1, "shuffle": shuffle}
    run(made, tmp_path / "out", plain_config=True, rows_per_shard=11, **settings)
    expected, figures = naive_mixture({"source": Given(TRAIN)}, Recipe(epochs=2, **settings), None)
    assert rows_in(tmp_path / "out" / "plain") == expected
    assert sorted(expected) == sorted(whole_rows(TRAIN))
    told = manifest_of(tmp_path / "out")["plain"]
    assert told == {n: figures["source"][n] for n in ("rows", "tokens", "labels_left")}


@pytest.mark.parametrize("shuffle", SHUFFLES)
def test_plain_of_a_mixture(shuffle: str, made: Path, tmp_path: Path) -> None:
    sources = [f"a={made / 'train'}:1.5", f"b={made / 'more'}:0.5"]
    run(made, tmp_path / "out", scored=sources, plain_config=True, only_epochs="1", shuffle=shuffle)
    given = {"a": Given(TRAIN, 1.5), "b": Given(MORE, 0.5)}
    expected, _ = naive_mixture(given, Recipe(epochs=2, shuffle=shuffle), None)
    assert rows_in(tmp_path / "out" / "plain") == expected
    assert rows_in(tmp_path / "out" / "epoch_001") == naive_mixture(given, Recipe(epochs=2, shuffle=shuffle), 1)[0]
    assert not verify(str(tmp_path / "out"), [f"a={made / 'train'}", f"b={made / 'more'}"]).findings


# Going on.


def settings_of(made: Path) -> dict[str, Any]:
    return {"eval": str(made / "held"), "plain_config": True, "rows_per_shard": 9, "horizon": 3}


def test_both_are_written_once(made: Path, tmp_path: Path) -> None:
    run(made, tmp_path / "whole", epochs=3, **settings_of(made))
    run(made, tmp_path / "out", epochs=3, only_epochs="2", **settings_of(made))
    before = {p: p.stat().st_mtime_ns for n in ("plain", "validation") for p in (tmp_path / "out" / n).iterdir()}
    run(made, tmp_path / "out", epochs=3, **settings_of(made))
    assert {p: p.stat().st_mtime_ns for p in before} == before
    without = ("README.md",)
    assert all_bytes(tmp_path / "out", without=without) == all_bytes(tmp_path / "whole", without=without)
    assert run(made, tmp_path / "out", epochs=3, **settings_of(made)).already_complete
    for name in ("plain", "validation"):
        sorted((tmp_path / "out" / name).iterdir())[1].unlink()
    run(made, tmp_path / "out", epochs=3, **settings_of(made))
    assert all_bytes(tmp_path / "out", without=without) == all_bytes(tmp_path / "whole", without=without)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"eval": None}, "validation was"),
        ({"eval": "more"}, "validation was"),
        ({"plain_config": False}, "plain_config"),
    ],
)
def test_another_split_is_another_dataset(change: dict[str, Any], words: str, made: Path, tmp_path: Path) -> None:
    run(made, tmp_path / "out", **settings_of(made))
    changed = {k: str(made / v) if v == "more" else v for k, v in change.items()}
    with pytest.raises(MismatchError, match=words):
        run(made, tmp_path / "out", **{**settings_of(made), **changed})


def test_overwrite_takes_away_what_was_ours(made: Path, tmp_path: Path) -> None:
    run(made, tmp_path / "out", **settings_of(made))
    (tmp_path / "out" / "validation" / "notes.txt").write_text("mine")
    run(made, tmp_path / "out", overwrite=True)
    run(made, tmp_path / "fresh")
    assert (tmp_path / "out" / "validation" / "notes.txt").read_text() == "mine"
    assert not (tmp_path / "out" / "plain").exists()
    without = ("README.md", "notes.txt")
    assert all_bytes(tmp_path / "out", without=without) == all_bytes(tmp_path / "fresh", without=without)
    (tmp_path / "fresh" / "validation").mkdir()
    mine = tmp_path / "fresh" / "validation" / "validation-mine.parquet"
    mine.write_bytes(b"mine")
    run(made, tmp_path / "fresh", overwrite=True)
    assert mine.read_bytes() == b"mine"
    assert not verify(str(tmp_path / "fresh"), str(made / "train")).findings


# The card.


def test_a_users_own_configuration_called_plain_stays(made: Path, tmp_path: Path) -> None:
    run(made, tmp_path / "out", epochs=1, horizon=3)
    card = tmp_path / "out" / "README.md"
    mine = "- config_name: plain\n  data_files: mine/*.parquet\n"
    card.write_text(card.read_text().replace("configs:\n", f"configs:\n{mine}", 1))
    run(made, tmp_path / "out", horizon=3)
    configs = yaml.safe_load(card.read_text().split("---\n")[1])["configs"]
    assert [c["data_files"] for c in configs if c["config_name"] == "plain"] == ["mine/*.parquet"]


def test_the_card_and_inspect_speak_of_both(made: Path, tmp_path: Path, capfd: Any) -> None:
    command = ["materialize", str(made / "train"), "--eval", str(made / "held"), "--plain-config", "--epochs", "2"]
    assert cli.run([*command, "--out", str(tmp_path / "out")]) == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert "configuration `plain`" in card
    assert "split `validation`" in card
    capfd.readouterr()
    assert cli.run(["inspect", str(tmp_path / "out")]) == 0
    lines = [line.split() for line in capfd.readouterr().out.splitlines()]
    for name in ("plain", "validation"):
        told = manifest_of(tmp_path / "out")[name]
        words = f"{name} {told['rows']:,} rows, {told['tokens']:,} tokens, {told['labels_left']:,} labels"
        assert words.split() in lines


# Proving it.


@pytest.fixture
def masked(made: Path, tmp_path: Path) -> Path:
    run(made, tmp_path / "masked", **settings_of(made))
    return tmp_path / "masked"


def test_it_is_proved(made: Path, masked: Path) -> None:
    train, held = str(made / "train"), f"eval={made / 'held'}"
    assert verify(str(masked)).notes[-1] == f"OK: verified {masked}"
    told = verify(str(masked), train)
    assert not told.findings
    assert any("validation rows not checked" in note for note in told.notes)
    told = verify(str(masked), [train, held])
    assert not told.findings
    assert not any("not checked" in note for note in told.notes)
    assert verify(str(masked), [train, f"eval={made / 'more'}"]).findings
    assert verify(str(masked), [held]).findings
    with pytest.raises(IntegrityError):
        verify(str(made / "train"), held)


def test_a_source_may_be_called_validation(made: Path, tmp_path: Path) -> None:
    run(made, tmp_path / "out", scored=[f"validation={made / 'train'}"], eval=str(made / "held"))
    proof = [f"validation={made / 'train'}", f"eval={made / 'held'}"]
    assert not verify(str(tmp_path / "out"), proof).findings
    assert verify(str(tmp_path / "out"), [proof[0], f"eval={made / 'train'}"]).findings


@pytest.mark.parametrize("part", ["validation", "plain"])
def test_a_tampered_part_is_found(part: str, made: Path, masked: Path) -> None:
    name = [f["file"] for f in manifest_of(masked)["files"] if f.get("part") == part][1]
    table = pq.read_table(masked / name)
    reseal(masked, name, table.take(list(range(len(table)))[::-1]))
    assert not verify(str(masked)).findings
    (finding,) = verify(str(masked), [str(made / "train"), f"eval={made / 'held'}"]).findings
    assert name in finding
    labels = table["labels"].to_pylist()
    row = next(x for x in labels if sum(y != -100 for y in x) > 1)
    row[next(t for t, y in enumerate(row) if y != -100)] = -100
    index = table.schema.get_field_index("labels")
    fewer = table.set_column(index, table.schema.field(index), pa.array(labels, table.schema.field(index).type))
    reseal(masked, name, fewer)
    (finding,) = verify(str(masked)).findings
    assert f"{name}: the tokens and labels in its footer are not those of its rows" in finding


def test_a_file_too_many_or_changed_is_found(masked: Path, tmp_path: Path) -> None:
    for name in ("validation", "plain"):
        other = copy(masked, tmp_path / name)
        first = min((other / name).iterdir())
        (first.with_name(first.name.replace("-0", "-9", 1))).write_bytes(first.read_bytes())
        assert any("does not list" in f for f in verify(str(other)).findings)
        first.unlink()
        assert any("missing" in f for f in verify(str(other)).findings)
    figures = {**manifest_of(masked)["validation"], "rows": 3}
    rewrite_manifest(masked, validation=figures)
    assert any("figures of validation" in f for f in verify(str(masked)).findings)


def test_the_manifest_fits_its_schema(made: Path, tmp_path: Path) -> None:
    settings = {**settings_of(made), "scope": "source", "plain": [f"old={made / 'more'}:0.5"]}
    run(made, tmp_path / "out", scored=[f"a={made / 'train'}"], **settings)
    jsonschema.Draft202012Validator(schemas()["manifest.json"]).validate(manifest_of(tmp_path / "out"))


# Mistakes.


def test_the_rows_that_are_trained_on_validate_nothing(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(made / "train", tmp_path / "copy")
    for held in (made / "train", tmp_path / "copy"):
        arguments = ["materialize", str(made / "train"), "--eval", str(held), "--epochs", "2"]
        assert cli.run([*arguments, "--out", str(tmp_path / "out")]) == 2
        assert capsys.readouterr().err.startswith(f"error: {held}: --eval has the same scores")
    assert not (tmp_path / "out").exists()


def test_mistakes(made: Path, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="inside the scored one"):
        run(made, made / "held" / "out", eval=str(made / "held"))
    with pytest.raises(IntegrityError, match="nowhere"):
        run(made, tmp_path / "out", eval=str(tmp_path / "nowhere"))
    rows = some_rows(5)
    rows.loss_mask[:] = False
    write_scored(tmp_path / "bare", rows)
    with pytest.raises(SourceError, match="bare: no row has anything to train on"):
        run(made, tmp_path / "out", eval=str(tmp_path / "bare"))
    assert not (tmp_path / "out" / "manifest.json").exists()
