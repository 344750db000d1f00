"""``--eval-fraction``: rows that the seed holds out of all epochs become the split ``validation``."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest

from entrodrop_prep import MaskedRows, cli
from entrodrop_prep.config import MaterializeConfig, Recipe
from entrodrop_prep.errors import ConfigError, MismatchError
from entrodrop_prep.export.estimate import estimate
from entrodrop_prep.export.materialize import materialize
from entrodrop_prep.masking.counter import held_out, philox4x32, stream_key
from entrodrop_prep.store.json_schemas import schemas
from entrodrop_prep.store.rows import Rows
from entrodrop_prep.verification.report import report
from entrodrop_prep.verification.run import verify
from helpers.contract import plain_rows
from helpers.mixtures import Given, naive_mixture, rows_in, whole_rows
from helpers.scored import all_bytes, manifest_of, rewrite_manifest, some_rows, take, write_scored

FRACTION = 0.3
ONE, TWO, REPLAY = some_rows(60), some_rows(40, seed=7), some_rows(20, seed=8)
STEEP: dict[str, Any] = {"epochs": 2, "schedule": "linear", "max_rate": 1}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Scored directories; never written to by a test."""
    folder = tmp_path_factory.mktemp("held-out")
    for name, rows in (("one", ONE), ("two", TWO), ("replay", REPLAY)):
        write_scored(folder / name, rows, with_id=True)
    return folder


@pytest.fixture(scope="module")
def masked(made: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A masked directory of one source; never written to by a test."""
    out = tmp_path_factory.mktemp("masked") / "masked"
    materialize(MaterializeConfig(scored=str(made / "one"), out=str(out), eval_fraction=FRACTION, **STEEP))
    return out


def held(row_id: int, fraction: float = FRACTION, *, source: str = "source", seed: int = 0) -> bool:
    """The rule, its counter spelled out: block 0, window 0, the row, epoch 0."""
    counter = np.array([[0, 0, row_id % 2**32, row_id >> 32]], np.uint32)
    return bool(philox4x32(counter, stream_key(seed, "hold-out", source))[0, 0] < fraction * 2**32)


def split(rows: Rows, source: str = "source") -> tuple[Rows, Rows]:
    """The rows that are trained on, and those that are held out."""
    out = np.array([held(row, source=source) for row in rows.row_id.tolist()])
    return take(rows, np.flatnonzero(~out)), take(rows, np.flatnonzero(out))


def test_the_rule_is_the_one_that_is_written_down() -> None:
    rows = np.array([*range(200), 2**32, 2**32 + 1, 2**48 - 1])
    for seed, source in ((0, "source"), (5, "code")):
        expected = [held(row, source=source, seed=seed) for row in rows.tolist()]
        assert held_out(seed, source, FRACTION, rows).tolist() == expected
    assert np.flatnonzero(held_out(0, "source", FRACTION, np.arange(30))).tolist() == HELD_OF_30
    fewer, more = (held_out(0, "source", x, np.arange(10_000)) for x in (0.1, 0.2))
    assert (fewer <= more).all()
    assert abs(fewer.mean() - 0.1) < 0.01


HELD_OF_30 = [0, 1, 5, 9, 11, 13, 14, 22]
"""Published datasets rest on these: they never change."""


def test_epochs_are_those_of_the_other_rows_alone(masked: Path) -> None:
    trained, out = split(ONE)
    assert rows_in(masked / "validation") == whole_rows(out)
    for epoch in range(2):
        assert (
            rows_in(masked / f"epoch_{epoch:03d}")
            == naive_mixture({"source": Given(trained)}, Recipe(**STEEP), epoch)[0]
        )
    windows = {(int(r), int(w)) for r, w in zip(out.row_id, out.window, strict=True)}
    assert any(w for _, w in windows)
    assert all(
        (r, w) in windows for r, w in zip(ONE.row_id.tolist(), ONE.window.tolist(), strict=True) if (r, 0) in windows
    )
    told = manifest_of(masked)
    assert told["identity"]["eval_fraction"] == FRACTION
    unlabelled = sum(not any(r["trainable"]) for r in plain_rows(trained))
    assert (told["rows_without_loss"], told["validation"]["rows_without_loss"]) == (
        unlabelled,
        len(out.row_id) - len(whole_rows(out)),
    )
    jsonschema.Draft202012Validator(schemas()["manifest.json"]).validate(told)


def test_nothing_else_decides_it(masked: Path, made: Path, tmp_path: Path) -> None:
    others = {"epochs": 3, "horizon": 9, "shuffle": "none", "quantile": 0.2, "rows_per_shard": 7, "plain_config": True}
    extended = {**others, "scored": str(write_scored(tmp_path / "more", some_rows(80), rows_per_shard=11))}
    for out, settings in (("others", {"scored": str(made / "one"), **others}), ("more", extended)):
        materialize(MaterializeConfig(out=str(tmp_path / f"{out}-masked"), eval_fraction=FRACTION, **settings))
    expected = rows_in(masked / "validation")
    assert rows_in(tmp_path / "others-masked" / "validation") == expected
    assert sorted(rows_in(tmp_path / "others-masked" / "plain")) == sorted(whole_rows(split(ONE)[0]))
    assert rows_in(tmp_path / "more-masked" / "validation") == whole_rows(split(some_rows(80))[1])


def test_each_masked_source_gives_its_share_and_a_plain_one_none(made: Path, tmp_path: Path) -> None:
    settings = {"scope": "source", "target": "both", **STEEP}
    given = [f"a={made / 'one'}:1.5", f"b={made / 'two'}:0.5"]
    old = f"old={made / 'replay'}"
    out = tmp_path / "out"
    config = MaterializeConfig(scored=given, plain=old, out=str(out), eval_fraction=FRACTION, pack=50, **settings)
    told = estimate(config)
    materialize(config)
    (a, held_a), (b, held_b) = split(ONE, "a"), split(TWO, "b")
    assert rows_in(out / "validation") == [*whole_rows(held_a), *whole_rows(held_b)]
    assert [p.rows for p in told.parts if p.folder == "validation"] == [
        len(whole_rows(held_a)) + len(whole_rows(held_b))
    ]
    assert not verify(str(out), [f"a={made / 'one'}", f"b={made / 'two'}", old]).findings
    loose = tmp_path / "loose"
    materialize(replace(config, out=str(loose), pack=None, target="labels"))
    mixture = {"a": Given(a, 1.5), "b": Given(b, 0.5), "old": Given(REPLAY, plain=True)}
    expected = naive_mixture(mixture, Recipe(**{**settings, "target": "labels"}), 1)[0]
    assert rows_in(loose / "epoch_001") == expected


def test_it_is_proved_and_edits_are_found(masked: Path, made: Path, tmp_path: Path) -> None:
    against = [str(made / "one")]
    found = verify(str(masked), against)
    assert not found.findings
    assert not any("not checked" in note for note in found.notes)
    other = tmp_path / "other"
    materialize(MaterializeConfig(scored=against[0], out=str(other), eval_fraction=FRACTION, seed=1, **STEEP))
    described = manifest_of(other)
    figures = {**described["validation"], "rows_without_loss": 9}
    rewrite_manifest(other, validation=figures)
    assert any("rows_without_loss of the validation" in f for f in verify(str(other), against).findings)
    for changes, words in (
        ({"identity": {**described["identity"], "eval_fraction": 0.4}}, "with other settings than the manifest says"),
        ({"identity": {k: v for k, v in described["identity"].items() if k != "eval_fraction"}}, "validation"),
        ({"identity": {**described["identity"], "validation": "0" * 64}}, "which scores its rows are from"),
    ):
        rewrite_manifest(other, **{"validation": described["validation"], **changes})
        assert any(words in f for f in verify(str(other), against).findings), words


def test_the_loader_has_both_parts(masked: Path, made: Path, tmp_path: Path) -> None:
    rows = MaskedRows.open(made / "one", eval_fraction=FRACTION, cache_dir=tmp_path, **STEEP)
    for some in (rows, MaskedRows.like(masked, made / "one", cache_dir=tmp_path)):
        for epoch, (first, stop) in enumerate(pairwise(np.cumsum([0, *some.epoch_lengths]).tolist())):
            taken = some.take(range(first, stop))
            assert list(zip(*taken.values(), strict=True)) == rows_in(masked / f"epoch_{epoch:03d}")
        out = some.held_out()
        assert list(zip(*out.take(range(len(out))).values(), strict=True)) == rows_in(masked / "validation")
        assert out.dataset()[0]["labels"] == out[0]["labels"] != some.dataset()[0]["labels"]
    for other, kept in ((None, lambda row: True), (0.6, lambda row: not held(row, 0.6))):
        more = MaskedRows.open(made / "one", eval_fraction=other, cache_dir=tmp_path, **STEEP)  # in the same cache
        keep = np.array([kept(row) for row in ONE.row_id.tolist()])
        assert more.epoch_lengths[0] == len(whole_rows(take(ONE, np.flatnonzero(keep))))
    with pytest.raises(ConfigError, match="no rows are held out"):
        MaskedRows.open(made / "one", cache_dir=tmp_path, **STEEP).held_out()


def test_card_inspect_recipe_and_report_speak_of_the_rest(
    masked: Path, made: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    told = manifest_of(masked)
    rows = told["validation"]["rows"]
    card = (masked / "README.md").read_text()
    assert f"- split `validation`: {rows} rows with all their labels" in card
    assert cli.run(["inspect", str(masked)]) == 0
    assert f"validation {rows} rows, " in capfd.readouterr().out
    assert cli.run(["recipe", "transformers", str(masked)]) == 0
    assert 'split="validation"' in capfd.readouterr().out
    page = report(masked, tmp_path / "report.html", against=[str(made / "one")]).read_text()
    trainable = sum(sum(r["trainable"]) for r in plain_rows(split(ONE)[0]))
    assert f"{trainable:,} in {told['epochs'][0]['rows']:,} rows" in page


def test_it_is_part_of_the_identity_and_continues(masked: Path, made: Path, tmp_path: Path) -> None:
    out, settings = tmp_path / "out", {"scored": str(made / "one"), **STEEP}
    materialize(MaterializeConfig(out=str(out), eval_fraction=FRACTION, **settings))
    for path in [*(out / "validation").iterdir(), *(out / "epoch_001").iterdir()]:
        path.unlink()
    (out / "manifest.json").unlink()
    materialize(MaterializeConfig(out=str(out), eval_fraction=FRACTION, **settings))
    assert all_bytes(out, without=("README.md",)) == all_bytes(masked, without=("README.md",))
    for other in (None, 0.2):
        with pytest.raises(MismatchError, match=r"eval_fraction was 0\.3"):
            materialize(MaterializeConfig(out=str(out), eval_fraction=other, **settings))


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--eval-fraction", "0"], "--eval-fraction '0': input should be greater than 0"),
        (["--eval-fraction", "1"], "--eval-fraction '1': input should be less than 1"),
        (["--eval-fraction", "0.1", "--eval", "two"], "--eval and --eval-fraction exclude each other"),
        (["--eval-fraction", "0.0001"], "--eval-fraction 0.0001 holds no row out with --seed 0"),
        (["--eval-fraction", "0.9999"], "--eval-fraction 0.9999 leaves no row to train on with --seed 0"),
    ],
)
def test_mistakes(more: list[str], words: str, made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = [str(made / "two") if word == "two" else word for word in more]
    assert cli.run(["materialize", str(made / "one"), "--epochs", "2", "--out", str(tmp_path / "out"), *given]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert words in said
    assert not (tmp_path / "out" / "manifest.json").exists()
    assert not json.dumps(said).count("Traceback")
