"""The probe before the first shard stops every backend whose scores are wrong."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from models_for_tests import Markov, markov_model, settings_for

import entrodrop_prep.backends.self_check as module
from entrodrop_prep.backends import BACKENDS, load_backend
from entrodrop_prep.backends.feed import Feed
from entrodrop_prep.backends.model import ModelInfo, inspect_model
from entrodrop_prep.backends.self_check import self_check
from entrodrop_prep.config import ScoreConfig
from entrodrop_prep.errors import ScoreError

Pair = tuple[Any, Any]
Spoil = Callable[[np.ndarray[Any, Any], Pair, int], Pair]


class Tables:
    """A backend that knows the scores by heart. ``spoil`` makes them wrong: (ids, scores, place in the job)."""

    def __init__(self, model: Markov, spoil: Spoil = lambda ids, scores, place: scores) -> None:
        self.model, self.spoil, self.closed = model, spoil, 0

    def environment(self) -> dict[str, str]:
        return {"backend": "tables"}

    def score(self, jobs: Feed, done: Callable[[Any, int], None]) -> Iterator[tuple[Any, list[Any]]]:
        while (job := jobs.take()) is not None:
            yield job, [self.spoil(ids, self.scores(ids), place) for place, ids in enumerate(job.sequences)]

    def scores(self, ids: np.ndarray[Any, Any]) -> Pair:
        entropy, logprob = self.model.entropy[ids[:-1]], self.model.logprob[ids[:-1], ids[1:]]
        return entropy.astype(np.float32), logprob.astype(np.float32)

    def close(self) -> None:
        self.closed += 1


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
    scores[1][3] = -np.inf
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


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (shifted, "its first 128 tokens alone: the entropy of token 1 is"),
        (longer, "256 scores for 256 tokens"),
        (without_logprob, "0 scores for 256 tokens"),
        (not_a_number, "not finite"),
        (minus_infinity, "not finite"),
        (in_bits, "outside 0.0000 to 3.6889"),
        (positive, "outside -inf to 0.0000"),
        (wrong_in_a_full_batch, "copy 4 of it in one batch: the log-probability of token"),
        (lost_in_a_full_batch, "copy 2 of it in one batch: 254 scores, the probe alone has 255"),
        (depends_on_what_follows, "its first 128 tokens alone: the entropy of token"),
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
