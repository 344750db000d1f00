"""Bounds of an entropy from the top k: that they hold, are stored as bounds, and are taken only where asked for."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from test_verify import check_refused, edited, resealed

from entrodrop_prep import cli
from entrodrop_prep.backends.bounds import _even, _few, entropy_bounds, rounded
from entrodrop_prep.config import MaterializeConfig, ScoreConfig
from entrodrop_prep.config.settings import settings as declared
from entrodrop_prep.engine.reduce import entropy_and_logprob
from entrodrop_prep.errors import ConfigError, MismatchError, ScoreError
from entrodrop_prep.export.materialize import materialize
from entrodrop_prep.export.plan import masked_identity
from entrodrop_prep.sample.mask import Rows
from entrodrop_prep.scoring.finish import finish
from entrodrop_prep.scoring.plan import make_plan
from entrodrop_prep.scoring.span import read_span, span_table
from entrodrop_prep.store.json_schemas import schemas
from entrodrop_prep.store.schema import RESERVED, SCORED, SCORED_BOUNDS, score_columns, scored_schema
from entrodrop_prep.store.scored import ScoredDataset, stored_scores
from entrodrop_prep.store.shards import write_shard
from entrodrop_prep.verification.run import verify
from helpers.models import markov_model, random_rows, run_score, settings_for, write_rows
from helpers.scored import FIRST_PLAIN_ID, copy, rewrite_manifest, some_rows, upper_bounds, write_scored

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "entrodrop_prep" / "demo" / "model"
ROUNDING = 2e-6
"""What hi may be above ln V, as a share of 1 + ln V."""


def known(logits: torch.Tensor, actual: torch.Tensor, k: int) -> np.ndarray[Any, Any]:
    """[n, k + 1] what a server tells of float32 logits [n, V]: the top k and the actual token, once, then -inf."""
    logprobs = logits.log_softmax(-1, dtype=torch.float32)
    top, ids = logprobs.topk(min(k, logits.shape[1]))
    own = logprobs.gather(1, actual[:, None])
    own[(ids == actual[:, None]).any(1)] = -torch.inf
    return torch.cat([top, own], 1).double().numpy()


def check(logits: Any, actual: Any, k: int) -> tuple[Any, Any, Any]:
    """The bounds hold of the exact entropy in float64 and in float32; returns lo, hi and that of float64."""
    logits, actual = torch.as_tensor(np.asarray(logits, np.float32)), torch.as_tensor(np.asarray(actual, np.int64))
    vocab_size = logits.shape[1]
    lo, hi = entropy_bounds(known(logits, actual, k), k, vocab_size)
    p = logits.double().softmax(-1)
    exact = -torch.special.xlogy(p, p).sum(-1).numpy()
    assert lo.dtype == hi.dtype == np.float32
    for h in (exact, entropy_and_logprob(logits, actual)[0].numpy()):
        assert (lo <= h).all(), (lo - h).max()
        assert (h <= hi).all(), (h - hi).max()
    assert (lo >= 0).all()
    assert (hi <= math.log(vocab_size) + ROUNDING * (1 + math.log(vocab_size))).all()
    return lo, hi, exact


# The bounds hold.


@st.composite
def distributions(draw: st.DrawFn) -> tuple[Any, Any]:
    """Logits [n, V] float32 and actual tokens [n]: flat, peaked, with ties, of tiny and not so tiny vocabularies."""
    vocab_size, n = draw(st.integers(1, 60) | st.integers(61, 3000)), draw(st.integers(1, 4))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    logits = rng.standard_normal((n, vocab_size)) * draw(st.sampled_from([0, 0.1, 1, 3, 10, 40]))
    if draw(st.booleans()):
        logits = np.round(logits / 2) * 2
    if draw(st.booleans()):
        logits[:, rng.integers(vocab_size)] += draw(st.floats(0, 30))
    if draw(st.booleans()):
        logits[:, : vocab_size // 2] = draw(st.floats(-20, 5, width=32))
    logits += draw(st.sampled_from([0, 20, -100]))
    actual = logits.argmin(1) if draw(st.booleans()) else rng.integers(0, vocab_size, n)
    return logits, actual


@settings(max_examples=400, deadline=None)
@given(distributions(), st.integers(1, 25))
def test_bounds_hold(distribution: tuple[Any, Any], k: int) -> None:
    check(*distribution, k)


@settings(max_examples=200, deadline=None)
@given(
    npst.arrays(np.float32, st.tuples(st.integers(1, 3), st.integers(1, 9)), elements=st.floats(-30, 30, width=32)),
    st.integers(1, 10),
    st.integers(0, 8),
)
def test_bounds_hold_of_any_few_logits(logits: Any, k: int, actual: int) -> None:
    check(logits, np.full(len(logits), actual % logits.shape[1]), k)


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 5), st.integers(1, 12))
def test_bounds_hold_of_every_way_to_go_on(seed: int, k: int, others: int) -> None:
    """Rows that differ in what is not told only: one pair of bounds, which holds for all of them."""
    rng = np.random.default_rng(seed)
    top = np.sort(rng.random(k) * 10.0 ** -rng.integers(0, 4))[::-1] + 1e-6
    mass = top[-1] * others * rng.random()
    packed = np.clip(mass - top[-1] * np.arange(others), 0, top[-1])
    shares = rng.dirichlet(np.full(6, 10.0 ** rng.integers(-2, 2)), 50)
    rest = sum(share[:, None] * np.stack([rng.permutation(packed) for _ in range(50)]) for share in shares.T)
    p = np.concatenate([np.tile(top, (50, 1)), rest], 1) / (top.sum() + mass)
    lo, hi = entropy_bounds(np.log(p[:1, :k]), k, k + others)
    exact = -np.where(p > 0, p * np.log(np.where(p > 0, p, 1)), 0).sum(1)
    assert (lo[0] <= exact).all()
    assert (exact <= hi[0]).all()


@pytest.mark.parametrize("peak", [10.0, 14.0, 16.5, 16.7, 18.0, 25.0])
def test_bounds_hold_where_a_cpu_loses_the_small_terms_of_its_sum(peak: float) -> None:
    """A flat tail of 150,000 tokens, each below or just above half a unit in the last place of the sum."""
    logits = np.zeros((2, 152_064), np.float32)
    logits[:, 7] = peak
    lo, hi, _ = check(logits, [7, 8], 20)
    total = np.exp(torch.as_tensor(logits).log_softmax(-1, dtype=torch.float32).double().numpy()).sum(1)
    if peak == 16.7:
        assert (np.abs(total - 1) > 1e-4).all()  # else this shows nothing
    assert (hi - lo < 0.04).all()


@pytest.mark.parametrize("vocab_size", [3, 7, 5000])
def test_bounds_hold_where_float32_gives_more_than_there_can_be(vocab_size: int) -> None:
    logits = torch.randn(64, vocab_size, generator=torch.Generator().manual_seed(1)) * 1e-4
    assert (entropy_and_logprob(logits, torch.zeros(64).long())[0].double() > math.log(vocab_size)).any()
    check(logits.numpy(), np.zeros(64), 1)


@settings(max_examples=300, deadline=None)
@given(st.floats(1e-3, 1), st.floats(0, 3), st.floats(0, 3), st.integers(1, 12))
def test_the_rest_is_looked_for_between_the_ends_too(cap: float, a: float, b: float, others: int) -> None:
    """Neither entropy of a mass grows with the mass everywhere."""
    ends = np.sort(np.minimum([a, b], cap * others))
    grid = np.concatenate([np.linspace(*ends, 500), np.clip(np.arange(1, 13) * cap, *ends)])
    low = _few(*(np.array([x]) for x in (*ends, cap)))
    high = _even(*(np.array([x]) for x in ends), np.array([others]))
    for mass in grid.tolist():
        parts = [cap] * int(mass / cap + 1e-12)
        parts.append(max(0.0, mass - sum(parts)))
        packed = -sum(x * math.log(x) for x in parts if x)
        even = mass * (math.log(others) - math.log(mass)) if mass else 0.0
        assert low[0] <= packed + 1e-9
        assert even <= high[0] + 1e-9


@pytest.mark.parametrize("spread", [1.0, 4.0, 8.0])
def test_bounds_hold_of_a_large_vocabulary(spread: float) -> None:
    rng = np.random.default_rng(3)
    check(rng.standard_normal((4, 152_064)) * spread, rng.integers(0, 152_064, 4), 20)


# And are as tight as what is told allows.


def test_the_docs_say_how_wide_they_are() -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(str(MODEL), dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(str(MODEL))
    parts = []
    for line in (ROOT / "examples" / "rows.jsonl").read_text(encoding="utf-8").splitlines():
        ids = torch.tensor([*tokenizer(json.loads(line)["text"]).input_ids, tokenizer.eos_token_id])
        with torch.inference_mode():
            logits = model(ids[None]).logits[0, :-1]
        parts.append([*check(logits, ids[1:], 20), ids[1:].numpy()])
    lo, hi, exact, ids = (np.concatenate(x) for x in zip(*parts, strict=True))
    text = (ROOT / "docs" / "bounds.md").read_text(encoding="utf-8")
    assert f"{len(exact):,} positions" in text
    rows = re.findall(r"^\| ([\d.]+) to ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|$", text, re.MULTILINE)
    assert len(rows) == 6
    for first, stop, median, most in (map(float, row) for row in rows):
        width = (hi - lo)[(first <= exact) & (exact < stop)]
        assert np.median(width) == pytest.approx(median, abs=6e-4)
        assert np.quantile(width, 0.9) == pytest.approx(most, abs=6e-4)
    for bound, words in ((lo, "lower bounds leaves {:.0%} open"), (hi, "upper bounds {:.0%}.")):
        tau = np.sort(bound)[math.ceil(len(bound) / 2) - 1]
        share = (((lo <= tau) != (hi <= tau)) & (ids != tokenizer.eos_token_id)).mean()
        assert words.format(share) in text


def test_bounds_are_reached() -> None:
    even = np.array([[0.4, 0.2, *[0.4 / 100] * 100]])
    packed = np.array([[0.3, 0.15, 0.15, 0.15, 0.15, 0.1, *[0.0] * 96]])
    for p, at_most in ((even, True), (packed, False)):
        with np.errstate(divide="ignore"):
            lo, hi = entropy_bounds(np.log(p[:, :2]), 2, p.shape[1])
        exact = -(p[p > 0] * np.log(p[p > 0])).sum()
        assert lo[0] < hi[0] - 0.5
        assert abs((hi if at_most else lo)[0] - exact) < 2e-2 * at_most + 2e-2


def test_all_known_is_exact() -> None:
    logits = np.random.default_rng(0).standard_normal((50, 8)) * 3
    for k in (8, 20):
        lo, hi, exact = check(logits, np.zeros(50), k)
        assert (hi - lo < 1e-4).all()
        assert np.abs(lo - exact).max() < 1e-4


def test_a_sharp_distribution_has_tight_bounds() -> None:
    logits = np.random.default_rng(0).standard_normal((40, 150_000)) * 2.5
    logits[:, 100] = 22
    lo, hi, exact = check(logits, np.full(40, 100), 20)
    assert (exact < 0.03).all()
    assert (hi - lo < 0.02).all()


def test_the_actual_token_bounds_nothing() -> None:
    """Outside the top k it is improbable; what is left may still lie in tokens as probable as the k-th."""
    row = np.log(np.array([[0.5, 0.2, 1e-6]]))
    with_it, without = entropy_bounds(row, 2, 1000), entropy_bounds(row[:, :2], 2, 1000)
    assert abs(with_it[0][0] - without[0][0]) < 1e-3
    p = np.array([0.5, 0.2, 0.2, 0.1])
    assert abs(with_it[0][0] + (p * np.log(p)).sum()) < 1e-3


def test_no_token_else() -> None:
    lo, hi = entropy_bounds(np.array([[0.0, -np.inf], [0.0, -9999.0]]), 1, 1)
    assert (lo == 0).all()
    assert (hi < 2e-5).all()
    for vocab_size in (2, 1000):  # a probability of 0 caps all that follow
        lo, hi = entropy_bounds(np.array([[0.0, -9999.0]]), 2, vocab_size)
        assert lo[0] == 0
        assert hi[0] < 2e-5


def test_rows_of_different_lengths_do_not_touch_each_other() -> None:
    rows = np.log(np.array([[0.5, 0.2, 0.01], [0.9, 0.05, 0.0001], [0.4, 0.3, 0.0]]) + 1e-300)
    rows[2, 2] = -np.inf
    together = np.stack(entropy_bounds(rows, 2, 50))
    alone = np.stack([np.concatenate(x) for x in zip(*(entropy_bounds(r[None], 2, 50) for r in rows), strict=True)])
    np.testing.assert_array_equal(together, alone)
    np.testing.assert_array_equal(np.stack(entropy_bounds(rows[:, ::-1], 2, 50)), together)


def test_what_is_no_number_stays_none() -> None:
    lo, hi = entropy_bounds(np.array([[-0.1, np.nan], [-0.1, -3.0]]), 2, 50)
    assert np.isnan([lo[0], hi[0]]).all()
    assert np.isfinite([lo[1], hi[1]]).all()


@pytest.mark.parametrize(
    ("rows", "k", "words"),
    [
        ([[-1.0, -2.0, -np.inf]], 3, ["2 log-probabilities, 3 were asked for", "--top-k"]),
        ([[-1.0, -2.0], [18.0, 900.0]], 2, ["add up to", "raw_logprobs"]),
        ([[-0.1, -0.5]], 2, ["add up to 1.5"]),
    ],
)
def test_what_cannot_be_log_probabilities_is_refused(rows: Any, k: int, words: list[str]) -> None:
    with pytest.raises(ScoreError) as error:
        entropy_bounds(np.array(rows), k, 50)
    for word in words:
        assert word in str(error.value)


@given(npst.arrays(np.float64, 20, elements=st.floats(0, 30)))
def test_rounding_goes_outward(values: Any) -> None:
    for dtype in (np.float16, np.float32):
        down, up = rounded(values, dtype, up=False), rounded(values, dtype, up=True)
        assert down.dtype == up.dtype == dtype
        assert (down <= values).all()
        assert (values <= up).all()
        assert (up <= np.nextafter(down, dtype(np.inf))).all()


# Declared.


def test_columns_and_versions() -> None:
    assert score_columns("exact") == ("entropy", "logprob")
    assert score_columns("exact", logprob=False) == ("entropy",)
    assert score_columns("topk") == ("entropy_lo", "entropy_hi", "logprob")
    assert score_columns("topk", logprob=False) == ("entropy_lo", "entropy_hi")
    exact, topk = scored_schema("float32"), scored_schema("float32", estimator="topk")
    assert (exact.metadata[b"schema"], topk.metadata[b"schema"]) == (b"scored/1", b"scored-bounds/1")
    assert "entropy" not in topk.names
    assert {"entropy", "entropy_lo", "entropy_hi", "logprob", "labels"} <= set(RESERVED)


def test_what_speaks_of_bounds_says_that_they_are_experimental() -> None:
    columns = schemas()["scored-bounds.json"]["properties"]
    assert all("experimental" in columns[name]["description"] for name in ("entropy_lo", "entropy_hi"))
    for cls, name in ((ScoreConfig, "estimator"), (ScoreConfig, "top_k"), (MaterializeConfig, "bounds")):
        assert "experimental" in declared(cls)[name][1].help


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"estimator": "topk"}, ["--estimator topk", "--backend is auto", "add --backend server"]),
        ({"estimator": "topk", "backend": "transformers"}, ["--estimator topk", "--backend server"]),
        ({"top_k": 5}, ["--top-k", "--estimator topk"]),
        ({"top_k": 0}, ["--top-k"]),
        ({"estimator": "top"}, ["--estimator"]),
    ],
)
def test_settings_that_do_not_fit(values: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        ScoreConfig(source="s", model="m", out="o", **values)
    for word in words:
        assert word in str(error.value)


def test_the_identity_of_exact_directories_is_what_it_was(tmp_path: Path) -> None:
    at = write_scored(tmp_path / "scored", some_rows(9))
    identity = masked_identity(ScoredDataset(at), MaterializeConfig(scored=str(at), out="out", epochs=2))
    assert "bounds" not in identity
    bounds = write_scored(tmp_path / "bounds", some_rows(9), estimator="topk")
    config = MaterializeConfig(scored=str(bounds), out="out", epochs=2, bounds="hi")
    other = masked_identity(ScoredDataset(bounds, "hi"), config)
    assert other == {**identity, "scored": other["scored"], "bounds": "hi"}


# Scored with a real model.


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return markov_model(tmp_path_factory.mktemp("model"))


def bounds_of(plan: Any, index: int, logprob: Any) -> tuple[Any, Any]:
    """A span and the scores that a server's top k would give it, the model being ``logprob`` [V, V]."""
    span, scores = read_span(plan, index, None), []
    for ids in span.sequences:
        table = torch.from_numpy(logprob[ids[:-1]]).float()
        lo, hi = entropy_bounds(
            known(table, torch.from_numpy(ids[1:]).long(), plan.config.top_k), plan.config.top_k, 40
        )
        scores.append((lo, hi, table.gather(1, torch.from_numpy(ids[1:]).long()[:, None])[:, 0].numpy()))
    return span, scores


@pytest.fixture(scope="module", params=["float32", "float16"])
def scored_with(request: pytest.FixtureRequest, model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an exact and a bounds directory of the same rows, split into windows."""
    folder = tmp_path_factory.mktemp("both")
    source = write_rows(folder / "rows.jsonl", [{"input_ids": ids} for ids in random_rows(12, 40)])
    usual: dict[str, Any] = {"rows_per_shard": 6, "max_length": 16, "overlap": 3, "score_dtype": request.param}
    run_score(source, model.directory, folder / "exact", **usual)
    out = folder / "bounds"
    topk = {"estimator": "topk", "top_k": 3, "backend": "server", "server": ("http://127.0.0.1:1",)}
    plan = make_plan(settings_for(source, model.directory, out, **usual, **topk), None)
    shards = []
    for index in range(2):
        span, scores = bounds_of(plan, index, model.logprob)
        info = {
            "schema": plan.identity["schema"],
            "shard": index,
            "fingerprint": plan.fingerprint,
            "identity": plan.identity,
            "environment": {},
            "counts": span.counts,
            "rejected": span.rejected,
            "source": {"digest": span.source_digest, "next": span.next, "units": 0},
        }
        path = out / f"shard-{index:05d}.parquet"
        shards.append((path, write_shard(path, plan.schema, [span_table(plan, span, scores)], info)))
    finish(plan, out, shards)
    return folder


def test_a_directory_of_bounds_holds_and_holds_the_entropy(scored_with: Path) -> None:
    report = verify(str(scored_with / "bounds"))
    assert not report.findings
    exact, bounds = (ScoredDataset(scored_with / name) for name in ("exact", "bounds"))
    assert (exact.manifest["schema"], bounds.manifest["schema"]) == (SCORED, SCORED_BOUNDS)
    assert bounds.manifest["counts"] == exact.manifest["counts"]
    np.testing.assert_array_equal(bounds.unigram, exact.unigram)
    assert bounds.score_dtype == exact.score_dtype
    half = exact.score_dtype == np.float16
    wide = 0
    for a, b in zip(exact.batches(), bounds.batches(), strict=True):
        assert b.schema.names == [
            n for x in a.schema.names for n in (["entropy_lo", "entropy_hi"] if x == "entropy" else [x])
        ]
        h, lo, hi = (
            t.column(n).flatten().to_pylist() for t, n in ((a, "entropy"), (b, "entropy_lo"), (b, "entropy_hi"))
        )
        assert [x is None for x in h] == [x is None for x in lo] == [x is None for x in hi]
        for x, low, high in zip(h, lo, hi, strict=True):
            if x is not None:
                near = x * 5e-4 * half  # the exact one was rounded to the nearest
                assert low - near <= x <= high + near
                wide += high - low > 0.01
    assert wide


def test_bounds_are_stored_as_they_are_or_rounded_outward(scored_with: Path, model: Any) -> None:
    stored = ScoredDataset(scored_with / "bounds")
    moved = 0
    for batch in stored.batches():
        ids = batch.column("input_ids").flatten().to_numpy().copy()
        told = known(torch.from_numpy(model.logprob[ids[:-1]]).float(), torch.from_numpy(ids[1:]).long(), 3)
        lo, hi = entropy_bounds(told, 3, 40)
        low, high = (stored_scores(batch, name)[1:].astype(np.float64) for name in ("entropy_lo", "entropy_hi"))
        there = ~np.isnan(low)
        assert (low[there] <= lo[there]).all()
        assert (hi[there] <= high[there]).all()
        np.testing.assert_allclose(low[there], lo[there], rtol=1e-3, atol=1e-6)
        np.testing.assert_allclose(high[there], hi[there], rtol=1e-3, atol=1e-6)
        moved += int((low != lo)[there].sum())
    assert (moved > 0) == (stored.score_dtype == np.float16)


def test_the_identity_says_how_it_was_scored(scored_with: Path) -> None:
    exact, bounds = (ScoredDataset(scored_with / name).manifest["identity"] for name in ("exact", "bounds"))
    assert (exact["schema"], exact["estimator"]) == (SCORED, "exact")
    assert "top_k" not in exact
    assert bounds == {**exact, "schema": SCORED_BOUNDS, "estimator": "topk", "top_k": 3}


def test_rows_and_manifests_fit_their_schemas(scored_with: Path, tmp_path: Path) -> None:
    out = copy(scored_with, tmp_path / "both") / "bounds"
    materialize(MaterializeConfig(scored=str(out), out=str(tmp_path / "masked"), epochs=2, bounds="lo"))
    for directory in (out, tmp_path / "masked"):
        described = json.loads((directory / "manifest.json").read_text())
        jsonschema.Draft202012Validator(schemas()["manifest.json"]).validate(described)
    assert described["open_share"] > 0
    row = jsonschema.Draft202012Validator(schemas()["scored-bounds.json"])
    for batch in ScoredDataset(out).batches():
        for values in batch.to_pylist():
            row.validate(values)
            with pytest.raises(jsonschema.ValidationError):
                jsonschema.Draft202012Validator(schemas()["scored.json"]).validate(values)


def test_an_exact_run_does_not_go_on_in_a_directory_of_bounds(scored_with: Path, model: Any, tmp_path: Path) -> None:
    both = copy(scored_with, tmp_path / "both")
    dtype = ScoredDataset(both / "bounds").score_dtype.name
    usual = {"rows_per_shard": 6, "max_length": 16, "overlap": 3, "score_dtype": dtype}
    with pytest.raises(MismatchError, match='estimator was "topk", now "exact"'):
        run_score(both / "rows.jsonl", model.directory, both / "bounds", **usual)


# Masks from bounds.


ROWS = some_rows(40)
UPPER = Rows(**{**ROWS.__dict__, "entropy": upper_bounds(ROWS)})


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a directory of bounds, and two exact ones that hold the lower and the upper for the entropy."""
    folder = tmp_path_factory.mktemp("directories")
    write_scored(folder / "bounds", ROWS, estimator="topk")
    write_scored(folder / "lo", ROWS)
    write_scored(folder / "hi", UPPER)
    return folder


def tables(out: Path) -> dict[str, pa.Table]:
    return {p.relative_to(out).as_posix(): pq.read_table(p) for p in sorted(out.glob("epoch_*/*.parquet"))}


def naive_open_share(settings_: dict[str, Any], bound: str) -> float | None:
    """Read literally: the share of trainable tokens that are eligible by one bound and not by the other."""
    select, q = settings_.get("select", "low-entropy"), settings_.get("quantile", 0.5)
    if select == "random":
        return None
    taken = ROWS if bound == "lo" else UPPER
    trainable = ROWS.trainable
    row = np.repeat(np.arange(len(ROWS.row_id)), ROWS.lengths)

    def tau(inside: Any) -> float:
        values = sorted(taken.entropy[inside & trainable].tolist())
        count = math.ceil(q * len(values))
        if not count:
            return math.inf if select == "high-entropy" else -math.inf
        return float(values[len(values) - count] if select == "high-entropy" else values[count - 1])

    if settings_.get("scope") == "row":
        taus = np.array([tau(row == r) for r in range(len(ROWS.row_id))])[row]
    else:
        taus = np.full(len(row), settings_.get("threshold", tau(np.ones(len(row), bool))))
    may = [x >= taus if select == "high-entropy" else x <= taus for x in (ROWS.entropy, UPPER.entropy)]
    allowed = trainable & (ROWS.input_ids >= FIRST_PLAIN_ID)
    if "keep_surprising" in settings_ and ROWS.logprob is not None:
        allowed &= ~(-ROWS.logprob > settings_["keep_surprising"])
    return float((allowed & (may[0] != may[1])).sum() / trainable.sum())


@pytest.mark.parametrize("bound", ["lo", "hi"])
@pytest.mark.parametrize(
    "recipe",
    [
        {},
        {"scope": "row", "quantile": 0.3},
        {"threshold": 1.5, "shuffle": "none"},
        {"select": "high-entropy", "target": "both"},
        {"select": "high-entropy", "scope": "row", "shuffle": "once"},
        {"select": "random", "target": "inputs"},
        {"quantile": 1.0, "max_rate": 1.0, "min_rate": 1.0, "schedule": "constant"},  # all is dropped but the rescued
        {"keep_surprising": 2.0, "progress": "row"},
        {"quantile": 0.0},
    ],
    ids=str,
)
def test_the_bound_that_is_taken_is_the_entropy(
    recipe: dict[str, Any], bound: str, directories: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    usual = {"epochs": 2, "rows_per_shard": 25, **recipe}
    materialize(MaterializeConfig(scored=str(directories / bound), out=str(tmp_path / "exact"), **usual))
    caplog.set_level("INFO")
    materialize(
        MaterializeConfig(scored=str(directories / "bounds"), out=str(tmp_path / "masked"), bounds=bound, **usual)
    )
    exact, taken = tables(tmp_path / "exact"), tables(tmp_path / "masked")
    assert list(exact) == list(taken)
    assert all(a.equals(b) for a, b in zip(exact.values(), taken.values(), strict=True))
    described = json.loads((tmp_path / "masked" / "manifest.json").read_text())
    share = naive_open_share(recipe, bound)
    assert described.get("open_share") == share
    assert "open_share" not in json.loads((tmp_path / "exact" / "manifest.json").read_text())
    card = (tmp_path / "masked" / "README.md").read_text()
    assert f"its {'lower' if bound == 'lo' else 'upper'} bound" in card
    assert "experimental" in card
    assert f"bounds {bound}" in card
    assert sum("leave open" in record.message for record in caplog.records) == (share is not None)
    if share is not None:
        assert f"whether {share:.1%} of the trainable tokens" in card
        assert f"whether {share:.1%} of the trainable tokens" in caplog.text
    for against in (None, str(directories / "bounds")):
        assert not verify(str(tmp_path / "masked"), against).findings


def test_bounds_differ_where_they_should(directories: Path, tmp_path: Path) -> None:
    found = []
    for bound in ("lo", "hi"):
        out = tmp_path / bound
        config = MaterializeConfig(
            scored=str(directories / "bounds"), out=str(out), epochs=1, bounds=bound, threshold=1.0, max_rate=1
        )
        found.append(materialize(config).epochs[0]["eligible"])
    assert found[0] > found[1]


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_half_precision_bounds_without_logprob(dtype: Any, tmp_path: Path) -> None:
    rows = some_rows(20, dtype=dtype)
    at = write_scored(tmp_path / "scored", rows, logprob=False, with_id=True, estimator="topk")
    assert not verify(str(at)).findings
    materialize(MaterializeConfig(scored=str(at), out=str(tmp_path / "masked"), epochs=2, bounds="hi"))
    assert not verify(str(tmp_path / "masked"), str(at)).findings


def test_one_bound_or_the_other_has_to_be_chosen(directories: Path, tmp_path: Path, capfd: Any) -> None:
    out = str(tmp_path / "masked")
    for name, options, words in (
        ("bounds", [], ["bounds of the entropy (experimental)", "add --bounds lo or --bounds hi"]),
        ("bounds", ["--select", "random"], ["add --bounds lo or --bounds hi"]),
        ("bounds", ["--bounds", "mid"], ["--bounds"]),
        ("lo", ["--bounds", "lo"], ["--bounds lo", "exact entropy", "leave out --bounds"]),
    ):
        capfd.readouterr()
        assert cli.run(["materialize", str(directories / name), "--out", out, "--epochs", "2", *options]) == 2
        printed = capfd.readouterr()
        assert len(printed.err.splitlines()) == 1
        for word in words:
            assert word in printed.err
    assert not Path(out).exists()


def test_another_bound_is_another_dataset(directories: Path, tmp_path: Path) -> None:
    usual: dict[str, Any] = {"scored": str(directories / "bounds"), "out": str(tmp_path / "masked"), "epochs": 1}
    materialize(MaterializeConfig(**usual, bounds="lo"))
    assert materialize(MaterializeConfig(**usual, bounds="lo")).already_complete
    with pytest.raises(MismatchError, match='bounds was "lo", now "hi"'):
        materialize(MaterializeConfig(**usual, bounds="hi"))


def test_a_recipe_file_may_name_the_bound(directories: Path, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("epochs: 1\nbounds: hi\n")
    config = MaterializeConfig.load(
        str(tmp_path / "recipe.yaml"), scored=str(directories / "bounds"), out=str(tmp_path / "masked")
    )
    materialize(config)
    recipe = json.loads((tmp_path / "masked" / "manifest.json").read_text())["recipe"]
    assert recipe["bounds"] == "hi"
    jsonschema.Draft202012Validator(schemas()["recipe.json"]).validate(recipe)


# Verify and inspect.


def upside_down(values: list[list[Any]]) -> None:
    values[0][1] += 4.0


def alone(values: list[list[Any]]) -> None:
    row = next(v for v in values if len(v) > 2 and v[2] is not None and v[1] is not None)
    row[1] = None


@pytest.mark.parametrize(
    ("column", "change", "finding"),
    [
        ("entropy_lo", upside_down, "the lower is above the upper"),
        ("entropy_hi", lambda v: v[0].__setitem__(1, -3.0), "its entropy_hi holds a value that is none"),
        ("entropy_lo", lambda v: v[0].__setitem__(1, math.nan), "its entropy_lo holds a value that is none"),
        ("entropy_hi", lambda v: v[0].__setitem__(0, 1.0), "its entropy_hi is null where it may not be"),
        ("entropy_lo", alone, "its entropy_lo is null where it may not be"),
    ],
)
def test_nonsense_is_found(
    column: str, change: Any, finding: str, directories: Path, tmp_path: Path, capfd: Any
) -> None:
    at = copy(directories / "bounds", tmp_path / "scored")
    name = "shard-00000.parquet"
    resealed(at, name, edited(pq.read_table(at / name), column, change), scored=True)
    check_refused(at, capfd, name, finding)


def test_a_null_in_one_bound_alone_is_found(directories: Path, tmp_path: Path, capfd: Any) -> None:
    """Where repeated context ends is told by the nulls; here the two bounds tell different things."""
    at, name = copy(directories / "bounds", tmp_path / "scored"), "shard-00000.parquet"
    table = pq.read_table(at / name)
    w = next(i for i, row in enumerate(table.to_pylist()) if row["window"] == 1 and len(row["input_ids"]) > 4)

    def change(values: list[list[Any]]) -> None:
        values[w][2] = 1.0

    resealed(at, name, edited(table, "entropy_hi", change), scored=True)
    check_refused(at, capfd, name, "one alone is null")


def test_a_wrong_open_share_is_found_against_the_scores(directories: Path, tmp_path: Path, capfd: Any) -> None:
    out = tmp_path / "masked"
    materialize(MaterializeConfig(scored=str(directories / "bounds"), out=str(out), epochs=1, bounds="lo"))
    rewrite_manifest(out, open_share=0.0)
    assert not verify(str(out)).findings
    check_refused(out, capfd, "open_share", against=directories / "bounds")


def test_another_bound_in_the_recipe_is_found_against_the_scores(directories: Path, tmp_path: Path, capfd: Any) -> None:
    out = tmp_path / "masked"
    materialize(MaterializeConfig(scored=str(directories / "bounds"), out=str(out), epochs=1, bounds="lo"))
    recipe = json.loads((out / "manifest.json").read_text())["recipe"]
    for bound in ("hi", None):
        rewrite_manifest(out, recipe={**recipe, "bounds": bound})
        check_refused(out, capfd, "bounds was", against=directories / "bounds")


def test_masks_of_bounds_are_not_proved_from_an_exact_directory(directories: Path, tmp_path: Path, capfd: Any) -> None:
    out = tmp_path / "masked"
    materialize(MaterializeConfig(scored=str(directories / "bounds"), out=str(out), epochs=1, bounds="lo"))
    check_refused(out, capfd, "it was not made from", against=directories / "lo")


def test_inspect_shows_both_bounds(directories: Path, tmp_path: Path, capfd: Any) -> None:
    assert cli.run(["inspect", str(directories / "bounds")]) == 0
    printed = capfd.readouterr().out
    assert printed.startswith("scored-bounds/1")
    assert "bounds from the top 20 (experimental)" in printed
    for name, rows in (("entropy_lo", ROWS), ("entropy_hi", UPPER)):
        line = next(x for x in printed.splitlines() if x.startswith(name))
        first = rows.trainable & np.repeat(rows.row_id < 8, rows.lengths)  # of the first shard
        assert f"50% {np.median(rows.entropy[first].astype(np.float64)):.3f}" in line
    assert cli.run(["inspect", str(directories / "bounds"), "--row", "2"]) == 0
    head, first, second, *_ = capfd.readouterr().out.splitlines()
    assert head.split() == ["window", "t", "id", "entropy_lo", "entropy_hi", "logprob", "loss", "token"]
    assert first.split()[3:6] == ["-", "-", "-"]
    i = int(ROWS.offsets[np.flatnonzero(ROWS.row_id == 2)[0]]) + 1
    assert second.split()[3:5] == [f"{ROWS.entropy[i]:.4f}", f"{UPPER.entropy[i]:.4f}"]
    materialize(MaterializeConfig(scored=str(directories / "bounds"), out=str(tmp_path / "m"), epochs=1, bounds="lo"))
    capfd.readouterr()
    assert cli.run(["inspect", str(tmp_path / "m")]) == 0
    assert "left open  " in capfd.readouterr().out
