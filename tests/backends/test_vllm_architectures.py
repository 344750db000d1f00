"""Every architecture that is called proven, in the vLLM engine and in transformers, on small random models.

Rows are shorter and longer than a step of the engine.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as tf

from entrodrop_prep.backends.architectures import DIFFERING, PROVEN, is_proven, variant_of
from entrodrop_prep.backends.engines import engine_environment
from entrodrop_prep.backends.model import ModelInfo, inspect_model
from entrodrop_prep.backends.plugin_response import problem_of, split_scores
from entrodrop_prep.backends.prefetch import PrefetchQueue, score_all
from entrodrop_prep.backends.vllm import VllmBackend
from entrodrop_prep.config import ScoreConfig
from entrodrop_prep.errors import ScoreError
from entrodrop_prep.vllm_plugin import leftovers
from helpers.architectures import (
    BANDS,
    CONFIGS,
    CONTEXT,
    GROUPED,
    HALF,
    LONGROPE,
    RECURRENT,
    ROPE,
    SCALED,
    TIED,
    UNTIED,
    VOCABULARY,
)
from helpers.models import save_model, settings_for
from helpers.vllm import VLLM, all_gone, descendants, engines, until
from programs import vllm_many_models
from programs.vllm_many_models import Job, ids_of

pytestmark = [pytest.mark.vllm, pytest.mark.usefixtures("quick")]

TOLERANCE = 1e-4
STEP = 40
LENGTHS = (2, 3, 17, 50, CONTEXT, 70)
HALF_TOLERANCE = (0.02, 0.1)
"""Largest mean difference in nats, of entropies and of log-probabilities, of an engine in bfloat16 from float32."""


def usually_tied(name: str) -> bool:
    """Whether the head is the embeddings: as vLLM has it always, or as configurations of this kind have it."""
    return name in TIED or (name not in UNTIED and bool(CONFIGS[name]().tie_word_embeddings))


OTHERWISE = [name for name in PROVEN if name not in (*TIED, *UNTIED)]
"""Which have heads of both kinds."""

FORMS: dict[str, tuple[Callable[[], tf.PretrainedConfig], int]] = {
    "llama3 rope": (
        lambda: CONFIGS["LlamaForCausalLM"](rope_parameters={"rope_type": "llama3", **ROPE, **BANDS}),
        CONTEXT,
    ),
    "yarn rope": (lambda: CONFIGS["Qwen3ForCausalLM"](rope_parameters={"rope_type": "yarn", **ROPE}), CONTEXT),
    "longrope": (lambda: CONFIGS["Phi3ForCausalLM"](**LONGROPE), 24),
    "biases": (lambda: CONFIGS["LlamaForCausalLM"](attention_bias=True, mlp_bias=True), CONTEXT),
    "all layers sliding": (
        lambda: CONFIGS["Qwen3ForCausalLM"](use_sliding_window=True, sliding_window=24, max_window_layers=0),
        CONTEXT,
    ),
    "expert weights that add up to one": (lambda: CONFIGS["Qwen3MoeForCausalLM"](norm_topk_prob=True), CONTEXT),
    "head size 64": (lambda: CONFIGS["LlamaForCausalLM"](head_dim=64), CONTEXT),
    "a chunk of attention": (lambda: CONFIGS["Llama4ForCausalLM"](max_position_embeddings=300), 300),
}
"""Settings of a configuration that change what is computed, and the longest row."""

REFUSED: dict[str, tuple[Callable[[], tf.PretrainedConfig], int, str]] = {
    "a head that vLLM leaves out": (
        lambda: CONFIGS["CohereForCausalLM"](tie_word_embeddings=False),
        CONTEXT,
        "takes the embeddings for the head",
    ),
    "a head that vLLM makes up": (
        lambda: CONFIGS["OlmoeForCausalLM"](tie_word_embeddings=True),
        CONTEXT,
        "has a head of its own",
    ),
    "longrope": (lambda: CONFIGS["Phi3ForCausalLM"](**LONGROPE), 25, "give --max-length 24"),
    "queries scaled by their position": (
        lambda: CONFIGS["Ministral3ForCausalLM"](rope_parameters={**SCALED, "original_max_position_embeddings": 24}),
        25,
        "give --max-length 24",
    ),
}
"""What vLLM runs but scores otherwise than transformers: configuration, longest row, why it is refused."""


@functools.cache
def logits_of(model: Path, lengths: tuple[int, ...], **changes: Any) -> list[torch.Tensor]:
    """[T, V] float32 of each row by itself, from transformers in float32 with plain attention."""
    config = tf.AutoConfig.from_pretrained(model, **changes)
    kind = inspect_model(ScoreConfig(source="-", model=str(model), out="-", dtype="float32")).auto_class
    lm: Any = getattr(tf, kind).from_pretrained(model, config=config, dtype=torch.float32, attn_implementation="eager")
    lm.eval()
    with torch.inference_mode():
        rows = [torch.from_numpy(ids_of(length, VOCABULARY).astype(np.int64))[None] for length in lengths]
        return [lm(input_ids=row, use_cache=False).logits[0] for row in rows]


def reference(model: Path, lengths: tuple[int, ...], **changes: Any) -> np.ndarray[Any, np.dtype[np.float64]]:
    """[sum of lengths, 2] as the plugin answers it, from transformers: float32, plain attention, reduced in float64."""
    parts = []
    for length, logits in zip(lengths, logits_of(model, lengths, **changes), strict=True):
        ids = torch.from_numpy(ids_of(length, VOCABULARY).astype(np.int64))
        logprobs = logits.double().log_softmax(-1)
        part = np.full((length, 2), float(VOCABULARY))
        part[:, 0] = -(logprobs.exp() * logprobs).sum(-1)
        part[:-1, 1] = logprobs[:-1].gather(1, ids[1:, None])[:, 0]
        parts.append(part)
    return np.concatenate(parts)


@dataclasses.dataclass(frozen=True)
class Answers:
    """What the engine answered to each job, and where its model is."""

    found: dict[str, Any]
    models: dict[str, Path]

    def of(self, key: str) -> np.ndarray[Any, Any]:
        answer: np.ndarray[Any, Any] = self.found[key]
        assert answer.ndim == 2, str(answer)
        return answer

    def error(self, key: str) -> str:
        answer = self.found[key]
        assert answer.ndim == 0, "it was not refused"
        return str(answer)


def lengths_below(longest: int) -> tuple[int, ...]:
    return tuple(min(n, longest) for n in LENGTHS) if longest <= CONTEXT else (*LENGTHS, longest)


class Models:
    """Small models, scored one after the other in one process."""

    def __init__(self, home: Path) -> None:
        self._home, self._jobs = home, list[Job]()
        self._models: dict[str, Path] = {}

    def add(self, key: str, config: Any, longest: int = CONTEXT, architecture: str | None = None, **more: Any) -> None:
        """Make a model of a configuration, to be scored."""
        folder = self._home / f"model-{len(self._models)}"
        self._models[key] = save_model(folder, config, seed=len(self._models), scale=8.0, architecture=architecture)
        usual = {"lengths": lengths_below(longest), "max_length": longest, "batch_tokens": STEP}
        self._jobs.append(Job(key, str(folder), **{**usual, **more}))

    def add_proven(self, name: str, tied: bool) -> None:
        """Make one of an architecture."""
        dtype = "bfloat16" if name in HALF else "float32"
        self.add(name, CONFIGS[name](tie_word_embeddings=tied), architecture=name, dtype=dtype)

    def add_again(self, name: str, key: str, **changes: Any) -> None:
        """The model of an architecture once more, in another way."""
        job = next(job for job in self._jobs if job.key == name)
        self._jobs.append(dataclasses.replace(job, key=key, **changes))
        self._models[key] = Path(job.model)

    def score(self) -> Answers:
        """Answers of vLLM to all of them."""
        home = self._home
        (home / "plan.json").write_text(json.dumps([dataclasses.asdict(job) for job in self._jobs]))
        environment = {**engine_environment(None, None, cpu=True), "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
        with (home / "log").open("wb") as log:
            done = VLLM.run(
                [sys.executable, Path(vllm_many_models.__file__), home / "plan.json", home / "out.npz"],
                env=environment,
                stdout=log,
                stderr=log,
                check=False,
            )
        assert done.returncode == 0, (home / "log").read_text(errors="replace")[-3000:]
        with np.load(home / "out.npz") as found:
            return Answers(dict(found), self._models)


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> Answers:
    """Each architecture, and what else is scored."""
    models = Models(tmp_path_factory.mktemp("models"))
    for name in PROVEN:
        models.add_proven(name, usually_tied(name))
    for name in RECURRENT:
        models.add_again(name, f"whole: {name}", batch_tokens=512)
    for key, (make, longest) in FORMS.items():
        models.add(f"form: {key}", make(), longest)
    for key, (make, longest, _) in REFUSED.items():
        models.add(f"refused: {key}", make(), longest)
    models.add("small budget", CONFIGS["LlamaForCausalLM"](), batch_tokens=512, logits_mib=1)
    models.add(
        "little cache",
        CONFIGS["LlamaForCausalLM"]().__class__(**{**GROUPED, "max_position_embeddings": 512}),
        512,
        lengths=(500, 512, 400, 501, 300, 2, 511),
        options=("num_gpu_blocks_override=6", "long_prefill_token_threshold=16"),
    )
    return models.score()


@pytest.fixture(scope="module")
def with_other_heads(tmp_path_factory: pytest.TempPathFactory) -> Answers:
    """Each architecture that may be tied or not, as it usually is not."""
    models = Models(tmp_path_factory.mktemp("others"))
    for name in OTHERWISE:
        models.add_proven(name, not usually_tied(name))
    return models.score()


def check(answer: np.ndarray[Any, Any], model: Path, lengths: tuple[int, ...], *, half: bool = False) -> None:
    """Every score of every row; in half precision, their means."""
    wanted = reference(model, lengths)
    assert problem_of(answer, lengths, VOCABULARY) is None
    assert np.abs(np.diff(wanted[: -lengths[-1], 0])).max() > 50 * TOLERANCE  # a score in the wrong place would show
    if half:
        beside = np.abs(np.diff(wanted, axis=0)).mean(0)
        assert (beside > 5 * np.array(HALF_TOLERANCE)).all()  # also in the mean
        assert (np.abs(answer - wanted).mean(0) <= HALF_TOLERANCE).all(), np.abs(answer - wanted).mean(0)
    else:
        np.testing.assert_allclose(answer, wanted, rtol=0, atol=TOLERANCE)


def check_proven(answers: Answers, name: str, tied: bool) -> None:
    config = json.loads((answers.models[name] / "config.json").read_text())
    assert config["architectures"] == [name]
    assert config["tie_word_embeddings"] == tied
    check(answers.of(name), answers.models[name], LENGTHS, half=name in HALF)


@pytest.mark.parametrize("name", PROVEN)
def test_it_scores_as_transformers_does(answers: Answers, name: str) -> None:
    check_proven(answers, name, usually_tied(name))


@pytest.mark.heavy
@pytest.mark.parametrize("name", OTHERWISE)
def test_with_the_other_head_it_does_too(with_other_heads: Answers, name: str) -> None:
    check_proven(with_other_heads, name, not usually_tied(name))


@pytest.mark.parametrize("name", RECURRENT)
def test_a_state_survives_where_a_row_is_cut(answers: Answers, name: str) -> None:
    """The same model with rows in one piece, beside rows that steps of the engine cut in up to four."""
    whole, cut = answers.of(f"whole: {name}"), answers.of(name)
    check(whole, answers.models[f"whole: {name}"], LENGTHS, half=name in HALF)
    if name not in HALF:
        np.testing.assert_allclose(whole, cut, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("form", FORMS)
def test_other_forms_of_proven_architectures(answers: Answers, form: str) -> None:
    key = f"form: {form}"
    check(answers.of(key), answers.models[key], lengths_below(FORMS[form][1]))


@pytest.mark.parametrize("form", REFUSED)
def test_what_vllm_would_score_otherwise_is_refused(answers: Answers, form: str) -> None:
    assert REFUSED[form][2] in answers.error(f"refused: {form}")


@pytest.mark.parametrize("cap", ["attn_logit_softcapping", "final_logit_softcapping"])
def test_soft_caps_matter(answers: Answers, cap: str) -> None:
    key = "Gemma2ForCausalLM"
    without = reference(answers.models[key], LENGTHS, **{cap: None})
    assert np.abs(answers.of(key) - without).max() > 100 * TOLERANCE


def test_the_bias_of_a_head_and_the_scale_of_logits_matter(answers: Answers) -> None:
    from safetensors.torch import load_file

    weights = load_file(answers.models["PhiForCausalLM"] / "model.safetensors")
    assert weights["lm_head.bias"].abs().max() > 0.1
    key = "CohereForCausalLM"
    without = reference(answers.models[key], LENGTHS, logit_scale=1.0)
    assert np.abs(answers.of(key) - without).max() > 100 * TOLERANCE


def test_logits_are_made_in_pieces_of_the_budget(answers: Answers) -> None:
    assert sum(LENGTHS) > (1 << 20) // (16 * VOCABULARY)  # several pieces in one step
    check(answers.of("small budget"), answers.models["small budget"], LENGTHS)


def test_rows_that_are_put_back_are_whole(answers: Answers) -> None:
    assert answers.found["preempted little cache"] > 0
    check(answers.of("little cache"), answers.models["little cache"], (500, 512, 400, 501, 300, 2, 511))


def test_what_is_proven() -> None:
    assert len(set(PROVEN)) == len(PROVEN)
    assert all(is_proven(name) and variant_of(name) for name in PROVEN)
    assert not set(PROVEN) & DIFFERING.keys()
    assert not is_proven("BertForMaskedLM")
    assert variant_of("BertForMaskedLM") is None


TENSOR_PARALLEL = "Qwen3MoeForCausalLM"
HEAVY_TENSOR_PARALLEL = (
    *("LlamaForCausalLM", "Gemma2ForCausalLM", "CohereForCausalLM"),
    *("PhiForCausalLM", "GPT2LMHeadModel", "Qwen3ForCausalLM"),
)
"""Soft caps, a scale of the logits, a head's bias, heads tied to the embeddings: each beside another split."""


@pytest.mark.heavy
@pytest.mark.parametrize("name", HEAVY_TENSOR_PARALLEL)
def test_tensor_parallel_of_every_kind(answers: Answers, name: str) -> None:
    backend = in_halves(answers, name)
    try:
        check_halves(answers, backend, name)
    finally:
        backend.close()


def in_halves(answers: Answers, name: str) -> VllmBackend:
    """An engine of two processes."""
    settings = {"backend": "vllm", "batch_tokens": STEP, "engine_arg": ("tensor_parallel_size=2",)}
    config = settings_for("-", answers.models[name], Path("-"), **settings)
    return VllmBackend(config, inspect_model(config))


def check_halves(answers: Answers, backend: VllmBackend, name: str) -> None:
    assert backend.environment()["tensor_parallel"] == "2"
    scores = score_all(backend, [ids_of(n, VOCABULARY) for n in LENGTHS])
    wanted = np.split(reference(answers.models[name], LENGTHS), np.cumsum(LENGTHS)[:-1])
    for (entropy, logprob), row in zip(scores, wanted, strict=True):
        np.testing.assert_allclose(entropy, row[:-1, 0], rtol=0, atol=TOLERANCE)
        np.testing.assert_allclose(logprob, row[:-1, 1], rtol=0, atol=TOLERANCE)


@pytest.fixture(scope="module")
def halves(answers: Answers) -> Iterator[VllmBackend]:
    backend = in_halves(answers, TENSOR_PARALLEL)
    yield backend
    backend.close()


def test_tensor_parallel(answers: Answers, halves: VllmBackend) -> None:
    check_halves(answers, halves, TENSOR_PARALLEL)


@dataclasses.dataclass(frozen=True)
class Part:
    """A shard to score."""

    index: int
    sequences: list[np.ndarray[Any, Any]]


def test_shards_that_come_slowly_and_an_empty_one(halves: VllmBackend) -> None:
    error = ValueError("the fifth row is bad")

    def slowly() -> Iterator[Part]:
        for index in range(4):
            time.sleep(0.2)
            yield Part(index, [] if index == 1 else [ids_of(n, VOCABULARY) for n in (index + 2, 60, 80)])
        raise error

    feed, tokens = PrefetchQueue(slowly()), dict.fromkeys(range(4), 0)

    def done(job: Part, count: int) -> None:
        tokens[job.index] += count

    found = {job.index: scores for job, scores in halves.score(feed, done)}
    assert {index: [len(entropy) + 1 for entropy, _ in scores] for index, scores in found.items()} == {
        0: [2, 60, 80],
        1: [],
        2: [4, 60, 80],
        3: [5, 60, 80],
    }
    assert tokens == {0: 142, 1: 0, 2: 144, 3: 145}
    assert feed.error is error  # for who started the feed to raise
    feed.close()


def test_nothing_is_left_of_a_closed_engine(halves: VllmBackend) -> None:
    (started,) = engines()  # other tests' servers may run beside it
    below = [started, *descendants(started.pid)]
    assert len(below) >= 3
    shared = [leftovers.SHARED / name for name in leftovers._shared_by(started.pid)]
    assert {path.name.partition("_")[0] for path in shared} == {"psm", "vllm"}
    temporary = halves._engines[0]._folder
    assert any(path.is_socket() for path in temporary.iterdir())
    halves.close()
    halves.close()
    assert all_gone(below)
    assert until(lambda: not any(path.exists() for path in (temporary, *shared)), 10)


INFO = ModelInfo("m", VOCABULARY, CONTEXT, "float32")


def raw_answer() -> tuple[np.ndarray[Any, Any], list[int]]:
    """A right answer for rows of 3, 2 and 4 tokens."""
    lengths = [3, 2, 4]
    raw = np.random.default_rng(0).uniform(0.1, 5, (sum(lengths), 2)).astype(np.float32)
    raw[:, 1] *= -1
    raw[np.cumsum(lengths) - 1, 1] = VOCABULARY
    return raw, lengths


def test_a_right_answer_is_split_into_rows() -> None:
    raw, lengths = raw_answer()
    raw[0, 1] = -np.finfo(np.float32).max  # the plugin's stand-in for minus infinity
    assert problem_of(raw, lengths, VOCABULARY) is None
    scores = split_scores(raw, lengths, INFO, "shard 0")
    assert [len(entropy) for entropy, _ in scores] == [2, 1, 3]
    assert scores[0][1].tolist() == [-np.inf, raw[1, 1]]
    assert scores[2][0].tolist() == raw[5:8, 0].tolist()
    assert scores[2][1].tolist() == raw[5:8, 1].tolist()


def missing(raw: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    raw[6, 0] = -1.0
    return raw


def another_vocabulary(raw: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    raw[raw == VOCABULARY] = 384
    return raw


def no_sentinel(raw: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    raw[4, 1] = -0.5
    return raw


def probability_over_one(raw: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    raw[1, 1] = 0.5
    return raw


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (missing, "a position was not computed"),
        (another_vocabulary, f"vocabulary is 384 tokens, the model has {VOCABULARY}"),
        (no_sentinel, "it is not from the plugin"),
        (probability_over_one, "above zero"),
        (lambda raw: raw[:-1], "8 rows for 9 tokens"),
        (lambda raw: np.concatenate([raw, raw[-1:]]), "10 rows for 9 tokens"),
        (lambda raw: np.roll(raw, 1, axis=0), "it is not from the plugin"),
    ],
)
def test_a_wrong_answer_is_refused(spoil: Callable[[np.ndarray[Any, Any]], np.ndarray[Any, Any]], says: str) -> None:
    raw, lengths = raw_answer()
    spoilt = spoil(raw)
    problem = problem_of(spoilt, lengths, VOCABULARY)
    assert problem is not None
    assert says in problem
    with pytest.raises(ScoreError, match="cannot be used") as e:
        split_scores(spoilt, lengths, INFO, "shard 7")
    assert "shard 7" in str(e.value)
    assert says in str(e.value)


def test_the_end_of_a_row_may_have_any_entropy() -> None:
    raw, lengths = raw_answer()
    raw[np.cumsum(lengths) - 1, 0] = -1.0  # of what comes after the row: nobody asks
    assert problem_of(raw, lengths, VOCABULARY) is None
