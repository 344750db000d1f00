"""A model whose distributions are known in closed form: each stored score is what it must be, where it must be."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from helpers.closed_form import ABSOLUTE, LONG, check, shifted
from helpers.models import EOS, Markov, markov_model, random_rows, rows_of, run_score, words, write_rows


@pytest.fixture(scope="module")
def markov(tmp_path_factory: pytest.TempPathFactory) -> Markov:
    return markov_model(tmp_path_factory.mktemp("markov"), context=LONG)


def documents(markov: Markov, *lengths: int) -> list[list[int]]:
    """Rows of mixed lengths, and of the ones asked for, on ids that are words."""
    rng = np.random.default_rng(len(lengths))
    given_lengths = [rng.integers(3, len(markov.entropy), n).tolist() for n in lengths]
    return random_rows(14, len(markov.entropy), longest=40, seed=5) + given_lengths


def test_the_model_is_sharp_enough_to_show_a_shift(markov: Markov) -> None:
    gaps = np.diff(np.sort(markov.entropy[3:]))
    assert np.median(gaps) > 10 * ABSOLUTE["float32"]
    assert np.exp(markov.logprob).sum(1) == pytest.approx(np.ones(len(markov.entropy)))


@pytest.mark.parametrize("score_dtype", ["float32", "float16"])
@pytest.mark.parametrize("overlap", [0, 1, 5])
@pytest.mark.parametrize("max_length", [6, 17, LONG])
def test_windows_and_overlaps(tmp_path: Path, markov: Markov, score_dtype: str, overlap: int, max_length: int) -> None:
    # ends at, before and after the edge of a window, and just long enough for one more token
    step = max_length - max(1, overlap)
    edges = (max_length, max_length + 1, max_length + step, max_length + step + 1) if max_length < LONG else (LONG,)
    rows = documents(markov, *edges)
    source = write_rows(tmp_path / "rows.jsonl", [{"input_ids": ids} for ids in rows])
    run_score(
        source,
        markov.directory,
        tmp_path / "out",
        max_length=max_length,
        overlap=overlap,
        score_dtype=score_dtype,
        rows_per_shard=7,
        batch_tokens=64,
    )
    check(rows_of(tmp_path / "out"), rows, markov, max_length=max_length, overlap=overlap, score_dtype=score_dtype)


@pytest.mark.parametrize("batch_tokens", [1, 37, 100_000])
@pytest.mark.parametrize("rows_per_shard", [1, 2000])
def test_batch_sizes(tmp_path: Path, markov: Markov, batch_tokens: int, rows_per_shard: int) -> None:
    rows = documents(markov, 2, 100, 100, 3)
    source = write_rows(tmp_path / "rows.parquet", [{"input_ids": ids} for ids in rows])
    run_score(source, markov.directory, tmp_path / "out", batch_tokens=batch_tokens, rows_per_shard=rows_per_shard)
    check(rows_of(tmp_path / "out"), rows, markov)


def test_plain_text_and_its_end(tmp_path: Path, markov: Markov) -> None:
    rows = documents(markov)
    source = write_rows(tmp_path / "rows.jsonl", [{"text": words(ids)} for ids in rows])
    run_score(source, markov.directory, tmp_path / "out", max_length=11, overlap=2)
    check(rows_of(tmp_path / "out"), [[*ids, EOS] for ids in rows], markov, max_length=11, overlap=2)
    run_score(source, markov.directory, tmp_path / "bare", max_length=11, overlap=2, append_eos=False)
    check(rows_of(tmp_path / "bare"), rows, markov, max_length=11, overlap=2)


@pytest.mark.parametrize("max_length", [9, LONG])
def test_masks_of_the_source_are_kept(tmp_path: Path, markov: Markov, max_length: int) -> None:
    rows = documents(markov, 9, 10, 31)
    rng = np.random.default_rng(1)
    masks = [rng.integers(0, 2, len(ids)).tolist() for ids in rows]
    masks[3] = [0] * len(rows[3])
    table = [{"input_ids": ids, "completion_mask": mask} for ids, mask in zip(rows, masks, strict=True)]
    source = write_rows(tmp_path / "rows.parquet", table)
    summary = run_score(source, markov.directory, tmp_path / "out", max_length=max_length)
    check(rows_of(tmp_path / "out"), rows, markov, max_length=max_length, masks=masks)
    assert summary.counts["trainable_tokens"] == sum(sum(mask[1:]) for mask in masks)
    assert summary.counts["rows_without_loss"] == sum(not any(mask[1:]) for mask in masks) >= 1


def test_no_logprob(tmp_path: Path, markov: Markov) -> None:
    rows = documents(markov, 60)
    source = write_rows(tmp_path / "rows.jsonl", [{"input_ids": ids} for ids in rows])
    run_score(source, markov.directory, tmp_path / "out", max_length=12, logprob=False)
    found = rows_of(tmp_path / "out")
    assert all("logprob" not in row for row in found)
    check(found, rows, markov, max_length=12, columns=("entropy",))


def test_truncated_and_short_rows(tmp_path: Path, markov: Markov) -> None:
    rows = [[5], *documents(markov, 30), []]
    source = write_rows(tmp_path / "rows.jsonl", [{"input_ids": ids} for ids in rows])
    summary = run_score(source, markov.directory, tmp_path / "out", max_length=8, long_documents="truncate")
    check(rows_of(tmp_path / "out"), [ids[:8] for ids in rows], markov, max_length=8)
    assert summary.counts["short_rows"] == 2
    assert summary.counts["truncated_rows"] == sum(len(ids) > 8 for ids in rows)


def test_bfloat16_is_near(tmp_path: Path, markov: Markov) -> None:
    rows = documents(markov)
    source = write_rows(tmp_path / "rows.jsonl", [{"input_ids": ids} for ids in rows])
    run_score(source, markov.directory, tmp_path / "out", dtype="bfloat16")
    pairs = [
        (value, markov.entropy[v])
        for row in rows_of(tmp_path / "out")
        for v, value in zip(row["input_ids"], row["entropy"][1:], strict=False)
    ]
    found, exact = np.array(pairs).T
    assert np.abs(found - exact).max() < 0.1


@pytest.mark.parametrize("name", ["entropy", "logprob"])
@pytest.mark.parametrize("by", [1, -1])
def test_a_shift_by_one_would_fail(tmp_path: Path, markov: Markov, name: str, by: int) -> None:
    rows = documents(markov)
    source = write_rows(tmp_path / "rows.jsonl", [{"input_ids": ids} for ids in rows])
    run_score(source, markov.directory, tmp_path / "out")
    found = rows_of(tmp_path / "out")
    check(found, rows, markov)
    with pytest.raises(AssertionError):
        check([{**row, name: shifted(row[name], by)} for row in found], rows, markov)
    for row in found:
        row[name] = [*row[name][1:], None]  # beside the token before
    with pytest.raises(AssertionError):
        check(found, rows, markov)
