"""Selections by surprisal and by excess, and uniform replacement: from scored directories to files and back."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from entrodrop_prep import MaskedRows
from entrodrop_prep.config import MaterializeConfig, Recipe
from entrodrop_prep.errors import ConfigError, IntegrityError
from entrodrop_prep.export.job import open_job
from entrodrop_prep.export.materialize import materialize
from entrodrop_prep.masking import columns
from entrodrop_prep.store.rows import Rows
from entrodrop_prep.verification.inspect import show
from entrodrop_prep.verification.report import report
from entrodrop_prep.verification.run import verify
from helpers.contract import naive_selection, naive_tau
from helpers.scored import FIRST_PLAIN_ID, VOCABULARY, all_bytes, manifest_of, some_rows, write_scored
from helpers.tokenizers import byte_bpe

ALL = {"schedule": "constant", "max_rate": 1.0, "shuffle": "none", "protect": "none", "epochs": 1}
"""Every eligible token is dropped, in the source's order."""


def other_scores(rows: Rows, seed: int, dtype: Any = np.float32) -> Rows:
    """The same rows with the log-probabilities of another model."""
    drawn = -4 * np.random.default_rng(seed).random(len(rows.input_ids))
    return replace(rows, logprob=np.where(np.isnan(rows.logprob), np.nan, drawn).astype(dtype),
                   entropy=rows.entropy.astype(dtype))  # fmt: skip


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Rows, Rows]:
    """Two scored directories of the same rows, in shards of other sizes and in other number formats."""
    folder = tmp_path_factory.mktemp("selections")
    rows = some_rows(60)
    two = other_scores(rows, 1, np.float16)
    one, other = write_scored(folder / "one", rows, rows_per_shard=17), write_scored(folder / "two", two)
    return one, other, rows, two


def expected_labels(rows: Rows, score: np.ndarray, eligible: Any) -> list[list[int]]:
    """Labels of every row with something to train on where each eligible token is dropped, a token at a time."""
    result = []
    for a, b in zip(rows.offsets[:-1].tolist(), rows.offsets[1:].tolist(), strict=True):
        trainable = [t for t in range(a, b) if rows.loss_mask[t] and t > a]
        if not trainable:
            continue
        left = [t for t in trainable if not eligible(float(score[t]))]
        left = left or [max(trainable, key=lambda t: (float(rows.entropy[t]), -t))]
        result.append([int(rows.input_ids[t]) if t in left else -100 for t in range(a, b)])
    return result


@pytest.mark.parametrize("side", ["low", "high"])
@pytest.mark.parametrize("name", ["surprisal", "excess"])
@pytest.mark.parametrize("given", [{"quantile": 0.3}, {"threshold": 0.916}], ids=str)
def test_a_selection_is_what_its_formula_says(both: Any, tmp_path: Path, side: str, name: str, given: Any) -> None:
    one, two, rows, other = both
    score = -rows.logprob
    if name == "excess":
        score = other.logprob.astype(np.float32) - rows.logprob
    more = {"against_scores": two} if name == "excess" else {}
    made = MaskedRows.open(one, select=f"{side}-{name}", cache_dir=tmp_path, **more, **given, **ALL)
    selects = naive_selection(Recipe(epochs=1, select=f"{side}-{name}", **given), score[rows.trainable].tolist())  # type: ignore[arg-type]
    wanted = expected_labels(rows, score, selects)
    assert [row["labels"] for row in made] == wanted
    assert any(-100 in labels[1:] for labels in wanted)


def test_files_loader_and_proof_agree(both: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, two, *_ = both
    settings: dict[str, Any] = {"select": "low-excess", "quantile": 0.6, "epochs": 3, "target": "both"}
    config = MaterializeConfig(scored=str(one), out=str(tmp_path / "masked"), against_scores=(str(two),), **settings)
    materialize(config)
    masked, described = tmp_path / "masked", manifest_of(tmp_path / "masked")
    digest = manifest_of(two)["content_digest"]
    assert described["identity"]["against_scores"] == described["scored"]["against_scores"]["content_digest"] == digest
    assert f"scores: content digest `{digest}`" in (masked / "README.md").read_text()
    assert "--against-scores SCORED2" in (masked / "README.md").read_text()
    assert any("select low-excess" in line for line in show(str(masked)))

    held = verify(str(masked), [str(one)], against_scores=[str(two)])
    assert not held.findings
    assert any("masks made again" in note for note in held.notes)
    assert "--against-scores" in verify(str(masked), [str(one)]).findings[0]
    assert "content digests differ" in verify(str(masked), [str(one)], against_scores=[str(one)]).findings[0]

    rows = MaskedRows.like(masked, one, against_scores=two, cache_dir=tmp_path / "cache")
    opened = MaskedRows.open(one, against_scores=two, cache_dir=tmp_path / "cache", **settings)
    assert list(rows) == list(opened)
    with pytest.raises(ConfigError, match="compared with source, not nothing"):
        MaskedRows.like(masked, one, cache_dir=tmp_path / "cache")
    with pytest.raises(IntegrityError, match="was not compared with it"):
        MaskedRows.like(masked, one, against_scores=one, cache_dir=tmp_path / "cache")
    report(masked, tmp_path / "page.html", against=[str(one)], against_scores=[str(two)], rows=2)
    assert "low-excess, quantile 0.6" in (tmp_path / "page.html").read_text()

    again = replace(config, out=str(tmp_path / "again"))
    monkeypatch.setattr("entrodrop_prep.store.scored.BATCH_TOKENS", 50)  # rows are read some at a time
    materialize(again)
    assert all_bytes(tmp_path / "again", without=("README.md",)) == all_bytes(masked, without=("README.md",))


def test_in_a_mixture_each_masked_source_has_scores_to_compare_with(both: Any, tmp_path: Path) -> None:
    one, two, rows, other = both
    third = write_scored(tmp_path / "third", (more := some_rows(20, seed=5)))
    fourth = write_scored(tmp_path / "fourth", other_scores(more, 2))
    named = (f"a={two}", f"b={fourth}")
    settings: dict[str, Any] = {"scored": (f"a={one}", f"b={third}"), "plain": (f"c={third}",), "select": "high-excess"}
    config = MaterializeConfig(out=str(tmp_path / "masked"), against_scores=named, epochs=2, scope="source", **settings)
    materialize(config)
    against = [f"a={one}", f"b={third}", f"c={third}"]
    assert not verify(str(tmp_path / "masked"), against, against_scores=named).findings
    assert verify(str(tmp_path / "masked"), against, against_scores=named[::-1]).findings == []
    wrong = verify(str(tmp_path / "masked"), against, against_scores=[f"a={two}", f"b={two}"]).findings
    assert "content digests differ" in wrong[0]
    taus = manifest_of(tmp_path / "masked")["tau_nats"]
    score = other.logprob.astype(np.float32) - rows.logprob
    assert taus["a"] == naive_tau(0.5, score[rows.trainable].tolist(), high=True)
    with pytest.raises(ConfigError, match="2 sources are masked"):
        open_job(replace(config, against_scores=named[:1]))


def test_other_rows_are_refused(both: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, _, rows, other = both
    ids = other.input_ids.copy()
    ids[other.offsets[40] + 1] ^= 1
    changed = write_scored(tmp_path / "changed", replace(other, input_ids=ids), rows_per_shard=11)
    shorter = write_scored(tmp_path / "shorter", some_rows(59))
    silent = write_scored(tmp_path / "silent", rows, logprob=False)
    moved = write_scored(tmp_path / "moved", replace(other, row_id=other.row_id + (other.row_id > 30)))

    def opened(other: Path) -> None:
        MaskedRows.open(one, select="low-excess", against_scores=other, cache_dir=tmp_path / "cache", epochs=1)

    monkeypatch.setattr(columns, "CHUNK_TOKENS", 100)
    with pytest.raises(ConfigError, match=f"differ first at row {rows.row_id[40]}"):
        opened(changed)
    with pytest.raises(ConfigError, match="differ first at row 31"):
        opened(moved)
    with pytest.raises(ConfigError, match=r"--against-scores has \d+ windows"):
        opened(shorter)
    with pytest.raises(ConfigError, match="the excess needs log-probabilities"):
        opened(silent)
    with pytest.raises(ConfigError, match="--select high-surprisal needs log-probabilities"):
        MaskedRows.open(silent, select="high-surprisal", cache_dir=tmp_path / "cache", epochs=1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"select": "low-excess"}, "compares two scored directories"),
        ({"against_scores": ("x",)}, "--against-scores has no use with --select low-entropy"),
        ({"select": "low-surprisal", "threshold": -0.5}, "is below 0, and surprisal never is"),
        ({"threshold": -0.5}, "is below 0, and entropy never is"),
    ],
)
def test_settings_that_do_not_go_together(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        MaterializeConfig(scored="scored", out="masked", epochs=1, **settings)


def test_an_excess_may_be_negative(both: Any, tmp_path: Path) -> None:
    one, two, rows, other = both
    score = other.logprob.astype(np.float32) - rows.logprob
    settings: dict[str, Any] = {"select": "low-excess", "against_scores": two, "threshold": -0.5, **ALL}
    assert [r["labels"] for r in MaskedRows.open(one, cache_dir=tmp_path, **settings)] == expected_labels(
        rows, score, lambda x: x <= -0.5
    )


def test_uniform_draws_each_token_as_often_as_any_other(both: Any, tmp_path: Path) -> None:
    """Over the whole vocabulary of the tokenizer, those that the corpus never has among them, but no special one."""
    one = both[0]
    made = MaskedRows.open(
        one,
        select="random",
        quantile=1,
        target="inputs",
        drop_token="uniform",
        cache_dir=tmp_path,
        **{**ALL, "epochs": 9},
    )
    found = np.concatenate([np.array(r["input_ids"])[1:][np.array(r["labels"][1:]) != -100] for r in made])
    size = len(byte_bpe())
    counts = np.bincount(found, minlength=VOCABULARY)
    assert not counts[:FIRST_PLAIN_ID].any()
    assert not counts[size:].any()
    mean = len(found) / (size - FIRST_PLAIN_ID)
    chi = float(((counts[FIRST_PLAIN_ID:size] - mean) ** 2 / mean).sum())
    freedom = size - FIRST_PLAIN_ID - 1
    assert abs(chi - freedom) < 5 * math.sqrt(2 * freedom)
