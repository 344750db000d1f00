"""The probe before the first shard stops every backend whose scores are wrong."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import entrodrop_prep.backends.self_check as module
from entrodrop_prep.backends import BACKENDS, load_backend
from entrodrop_prep.backends.batch import batches
from entrodrop_prep.backends.model import ModelInfo, inspect_model
from entrodrop_prep.backends.prefetch import PrefetchQueue
from entrodrop_prep.backends.self_check import crowd, self_check
from entrodrop_prep.config import ScoreConfig
from entrodrop_prep.errors import ScoreError
from helpers.models import Markov, markov_model, settings_for

Pair = tuple[Any, Any]
Spoil = Callable[[np.ndarray[Any, Any], Pair, int], Pair]


class Tables:
    """A backend that knows the scores by heart. ``spoil`` makes them wrong: (ids, scores, place in the job)."""

    def __init__(self, model: Markov, spoil: Spoil = lambda ids, scores, place: scores) -> None:
        self.model, self.spoil, self.closed, self.step_tokens = model, spoil, 0, 1000

    def environment(self) -> dict[str, str]:
        return {"backend": "tables"}

    def score(self, jobs: PrefetchQueue, done: Callable[[Any, int], None]) -> Iterator[tuple[Any, list[Any]]]:
        while (job := jobs.take()) is not None:
            yield job, [self.spoil(ids, self.scores(ids), place) for place, ids in enumerate(job.sequences)]

    def scores(self, ids: np.ndarray[Any, Any]) -> Pair:
        entropy, logprob = self.model.entropy[ids[:-1]], self.model.logprob[ids[:-1], ids[1:]]
        return entropy.astype(np.float32), logprob.astype(np.float32)

    def each(self) -> Iterator[tuple[str, Tables]]:
        yield "", self

    def close(self) -> None:
        self.closed += 1


class Several(Tables):
    """Some of them side by side."""

    def __init__(self, *members: Tables) -> None:
        super().__init__(members[0].model)
        self.members = members

    def each(self) -> Iterator[tuple[str, Tables]]:
        for number, member in enumerate(self.members):
            yield f"engine {number}", member


@pytest.fixture(scope="module")
def markov(tmp_path_factory: pytest.TempPathFactory) -> Markov:
    return markov_model(tmp_path_factory.mktemp("markov"), context=300)


@pytest.fixture(scope="module")
def config(markov: Markov) -> ScoreConfig:
    return settings_for("-", markov.directory, Path("-"), backend="vllm", batch_tokens=1000)


@pytest.fixture(scope="module")
def info(config: ScoreConfig) -> ModelInfo:
    return inspect_model(config)


def test_right_scores_pass(
    markov: Markov, config: ScoreConfig, info: ModelInfo, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="entrodrop_prep"):
        self_check(Tables(markov), config, info)
    assert [r.getMessage() for r in caplog.records if "self-check" in r.getMessage()] == [
        "self-check: the same scores whole, in chunks and cut short, and against transformers"
    ]


def test_differences_of_the_last_digits_pass(markov: Markov, config: ScoreConfig, info: ModelInfo) -> None:
    def jitter(ids: Any, scores: Pair, place: int) -> Pair:
        return scores[0] + np.float32(1e-4 * place / 10), np.minimum(scores[1] + np.float32(1e-4), 0)

    self_check(Tables(markov, jitter), config, info)


def shifted(ids: Any, scores: Pair, place: int) -> Pair:
    return np.roll(scores[0], 1), scores[1]


def longer(ids: Any, scores: Pair, place: int) -> Pair:
    return np.append(scores[0], scores[0][-1:]), scores[1]


def without_logprob(ids: Any, scores: Pair, place: int) -> Pair:
    return scores[0], scores[1][:0]


def not_a_number(ids: Any, scores: Pair, place: int) -> Pair:
    scores[0][len(scores[0]) // 2] = np.nan
    return scores


def minus_infinity(ids: Any, scores: Pair, place: int) -> Pair:
    scores[1][min(3, len(ids) - 2)] = -np.inf
    return scores


def in_bits(ids: Any, scores: Pair, place: int) -> Pair:
    return scores[0] / np.float32(np.log(2)), scores[1]


def positive(ids: Any, scores: Pair, place: int) -> Pair:
    return scores[0], -scores[1]


def wrong_in_a_full_batch(ids: Any, scores: Pair, place: int) -> Pair:
    if place == 4:
        scores[1][200:] -= 0.01  # where a step of the engine begins
    return scores


def lost_in_a_full_batch(ids: Any, scores: Pair, place: int) -> Pair:
    return (scores[0][:-1], scores[1][:-1]) if place == 2 else scores


def depends_on_what_follows(ids: Any, scores: Pair, place: int) -> Pair:
    scores[0][:10] *= np.float32(1 - len(ids) / 1000)
    return scores


def wrong_when_short(ids: Any, scores: Pair, place: int) -> Pair:
    if len(ids) == 128:
        scores[0][:10] *= np.float32(0.9)
    return scores


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (shifted, "copy 0 of it in one batch: the entropy of token 1 is"),
        (longer, "256 scores for 256 tokens"),
        (without_logprob, "0 scores for 256 tokens"),
        (not_a_number, "not finite"),
        (minus_infinity, "not finite"),
        (in_bits, "outside 0.0000 to 3.6889"),
        (positive, "outside -inf to 0.0000"),
        (wrong_in_a_full_batch, "copy 4 of it in one batch: the log-probability of token"),
        (lost_in_a_full_batch, "copy 2 of it in one batch: 254 scores where there are 255"),
        (depends_on_what_follows, "copy 0 of it in one batch: the entropy of token"),
        (wrong_when_short, "its first 128 tokens alone: the entropy of token"),
    ],
)
def test_wrong_scores_are_stopped(
    markov: Markov, config: ScoreConfig, info: ModelInfo, spoil: Spoil, says: str
) -> None:
    with pytest.raises(ScoreError) as e:
        self_check(Tables(markov, spoil), config, info)
    assert str(e.value).startswith(f"{info.name}: the self-check found ")
    assert says in str(e.value)
    assert "--no-self-check" in str(e.value)


def test_every_engine_is_checked(
    markov: Markov, config: ScoreConfig, info: ModelInfo, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="entrodrop_prep"):
        self_check(Several(Tables(markov), Tables(markov), Tables(markov)), config, info)
    assert "by 3 engines, and against transformers" in caplog.text
    with pytest.raises(ScoreError, match="found engine 1, copy 4 of it in one batch: the log-probability of token"):
        self_check(Several(Tables(markov), Tables(markov, wrong_in_a_full_batch)), config, info)
    another = Tables(markov_model(tmp_path, seed=1))
    with pytest.raises(ScoreError, match="found engine 2 and another: the entropy of token"):
        self_check(Several(Tables(markov), Tables(markov), another), config, info)


def test_single_tokens_may_differ_in_half_precision_but_not_by_whole_nats(
    markov: Markov, config: ScoreConfig, info: ModelInfo
) -> None:
    def jitter(by: float) -> Spoil:
        def spoil(ids: Any, scores: Pair, place: int) -> Pair:
            if place == 4:
                scores[1][10] -= by
            return scores

        return spoil

    half = dataclasses.replace(info, dtype="bfloat16")
    self_check(Tables(markov, jitter(0.5)), config, half)
    with pytest.raises(ScoreError, match="copy 4 of it in one batch: the log-probability of token 11 is"):
        self_check(Tables(markov, jitter(3.5)), config, half)
    with pytest.raises(ScoreError, match="copy 4 of it in one batch"):
        self_check(Tables(markov, jitter(0.5)), config, info)


@pytest.mark.parametrize("longest", [4, 5, 64, 255, 256])
@pytest.mark.parametrize("step", [16, 256, 1000, 2048, 8192, 8193, 16_384])
def test_a_step_ends_within_a_copy_of_the_probe(longest: int, step: int) -> None:
    """In the order in which they come, as many as a step takes: the last one of the first step is cut in two."""
    rows = crowd(np.arange(longest, dtype=np.int32), step)
    ends = np.cumsum([len(row) for row in rows])
    assert ends[-1] > step
    assert step not in ends
    assert len(list(batches(Probe(rows), step))) == 1  # in one piece, or the first step might go without the rest


@dataclasses.dataclass
class Probe:
    """A job that belongs to no shard."""

    sequences: list[Any]
    index: int = -1


@pytest.mark.parametrize("column", [0, 1])
def test_scores_beside_the_wrong_token_are_stopped(
    markov: Markov, config: ScoreConfig, info: ModelInfo, column: int
) -> None:
    """Scores of the token before, wherever the row is cut: only another program can tell."""

    def beside(ids: Any, scores: Pair, place: int) -> Pair:
        moved = list(scores)
        moved[column] = np.append(scores[column][-1:], scores[column][:-1])
        moved[column][0] = 0
        return moved[0], moved[1]

    with pytest.raises(ScoreError, match="differs from that of transformers") as e:
        self_check(Tables(markov, beside), config, info)
    assert ("entropy", "log-probability")[column] in str(e.value)


def test_another_model_is_stopped(
    markov: Markov, config: ScoreConfig, info: ModelInfo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = Tables(markov_model(tmp_path, seed=1))
    with pytest.raises(ScoreError, match="differs from that of transformers"):
        self_check(other, config, info)
    monkeypatch.setattr(module, "SMALL_BYTES", 1000)  # weights too big to be loaded a second time
    self_check(other, config, info)


@pytest.mark.parametrize("checked", [True, False])
def test_a_backend_that_is_stopped_is_closed(
    markov: Markov, config: ScoreConfig, info: ModelInfo, monkeypatch: pytest.MonkeyPatch, checked: bool
) -> None:
    backend = Tables(markov, not_a_number)
    monkeypatch.setattr(module, "backend_of_this_test", lambda config, info: backend, raising=False)
    monkeypatch.setitem(BACKENDS, "vllm", f"{module.__name__}:backend_of_this_test")
    settings = settings_for("-", markov.directory, Path("-"), backend="vllm", self_check=checked)
    if checked:
        with pytest.raises(ScoreError, match="not finite"):
            load_backend("vllm", settings, info)
    else:
        assert load_backend("vllm", settings, info) is backend
    assert backend.closed == checked
