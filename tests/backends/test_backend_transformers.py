"""The transformers backend against a plain log_softmax in float64, many architectures, both ways."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AutoModelForCausalLM,
    BartConfig,
    BertConfig,
    BloomConfig,
    CohereConfig,
    Gemma2Config,
    GPT2Config,
    LlamaForCausalLM,
    LlamaModel,
    MistralConfig,
    OPTConfig,
    PhiConfig,
    ProphetNetConfig,
    Qwen3Config,
    Qwen3MoeConfig,
    T5Gemma2Config,
    WhisperConfig,
)

from entrodrop_prep.backends import devices, load_backend
from entrodrop_prep.backends import transformers as backend_module
from entrodrop_prep.backends.model import inspect_model
from entrodrop_prep.backends.prefetch import score_all
from entrodrop_prep.backends.transformers import FAILURES, TransformersBackend
from entrodrop_prep.errors import ConfigError, ModelError, ScoreError
from entrodrop_prep.vllm_plugin.reduce import entropy_and_logprob
from helpers.architectures import CONFIGS, VOCABULARY
from helpers.models import random_rows, run_score, save_model, settings_for, shards, tiny_llama, write_rows

V = 97
TINY = {
    "vocab_size": V,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}
GROUPED = {**TINY, "num_key_value_heads": 2, "head_dim": 8}
FAMILIES: dict[str, Callable[[], Any]] = {
    "llama": lambda: tiny_llama(V),
    "llama, tied": lambda: tiny_llama(V, tie_word_embeddings=True),
    "mistral, sliding window": lambda: MistralConfig(**GROUPED, sliding_window=7),
    "qwen3": lambda: Qwen3Config(**GROUPED, tie_word_embeddings=False),
    "qwen3, tied": lambda: Qwen3Config(**GROUPED, tie_word_embeddings=True),
    "qwen3 moe": lambda: Qwen3MoeConfig(**GROUPED, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16),
    "gemma2, soft cap": lambda: Gemma2Config(**GROUPED, final_logit_softcapping=4.0, sliding_window=7),
    "cohere, logit scale": lambda: CohereConfig(**TINY, num_key_value_heads=2, logit_scale=3.0),
    "phi, head bias": lambda: PhiConfig(**TINY),
    "gpt2": lambda: GPT2Config(vocab_size=V, n_embd=32, n_layer=2, n_head=4, n_positions=128),
    "gpt2, untied": lambda: GPT2Config(
        vocab_size=V, n_embd=32, n_layer=2, n_head=4, n_positions=128, tie_word_embeddings=False
    ),
    "opt, projected": lambda: OPTConfig(
        vocab_size=V,
        hidden_size=32,
        ffn_dim=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
        word_embed_proj_dim=16,
    ),
    "bloom, alibi": lambda: BloomConfig(vocab_size=V, hidden_size=32, n_layer=2, n_head=4),
}


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The model of a family, saved once."""
    saved: dict[str, Path] = {}

    def directory(name: str) -> Path:
        if name not in saved:
            saved[name] = save_model(tmp_path_factory.mktemp("model"), FAMILIES[name](), scale=8.0)
        return saved[name]

    return directory


def started(directory: Path, **settings: Any) -> TransformersBackend:
    config = settings_for("unused.jsonl", directory, directory / "out", **settings)
    backend = load_backend("transformers", config, inspect_model(config))
    assert isinstance(backend, TransformersBackend)
    return backend


def ragged(count: int = 12, longest: int = 60, vocabulary: int = V) -> list[np.ndarray[Any, Any]]:
    rows = random_rows(count, vocabulary, longest=longest, seed=3)
    rng = np.random.default_rng(4)
    rows += [[5, 6], rng.integers(0, vocabulary, longest).tolist(), rng.integers(0, vocabulary, 17).tolist()]
    return [np.array(row, np.int32) for row in rows]


def scored(backend: TransformersBackend, rows: Sequence[np.ndarray[Any, Any]]) -> list[Any]:
    done: list[int] = []
    scores = score_all(backend, rows, lambda job, n: done.append(n))
    assert sum(done) == sum(map(len, rows))
    for row, (entropy, logprob) in zip(rows, scores, strict=True):
        assert entropy.shape == logprob.shape == (len(row) - 1,)
        assert entropy.dtype == logprob.dtype == np.float32
    return scores


def plain(directory: Path, rows: Sequence[np.ndarray[Any, Any]], vocabulary: int = V) -> list[Any]:
    """Entropy and log-probability of each row on its own, in float64 from the model's float32 logits."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    results = []
    for row in rows:
        ids = torch.from_numpy(row.astype(np.int64))[None]
        with torch.no_grad():
            logits = model(ids, use_cache=False).logits[0, :-1, :vocabulary].double()
        logp = torch.log_softmax(logits, -1)
        entropy = -(logp.exp() * logp).nan_to_num(0.0).sum(-1)
        results.append((entropy.numpy(), logp.gather(1, ids[0, 1:, None])[:, 0].numpy()))
    return results


def assert_close(found: Sequence[Any], exact: Sequence[Any], tolerance: float = 1e-4) -> None:
    for pair, wanted in zip(found, exact, strict=True):
        for a, b in zip(pair, wanted, strict=True):
            assert a.shape == b.shape
            assert np.abs(a - b).max() <= tolerance


class Largest(TorchDispatchMode):
    """Notes the most elements that a tensor of logits has, and the most that any tensor has."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.vocabulary, self.logits, self.seen = vocabulary, 0, 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for value in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(value, torch.Tensor):
                self.seen += 1
                if value.ndim and value.shape[-1] == self.vocabulary and value.ndim > 1:
                    self.logits = max(self.logits, value.numel())
        return result


@pytest.mark.parametrize("name", FAMILIES)
def test_scores_are_those_of_the_models_logits(directories: Callable[[str], Path], name: str) -> None:
    rows = ragged(5)
    exact = plain(directories(name), rows)
    assert np.std(np.concatenate([entropy for entropy, _ in exact])) > 0.05  # nothing that a wrong place would not show
    backend = started(directories(name), batch_tokens=150)
    assert backend.chunked_head
    assert backend.environment()["head"] == "chunked"
    assert_close(scored(backend, rows), exact)
    backend.rows = 7
    assert_close(scored(backend, rows), exact)
    backend.chunked_head = False
    for backend.rows in (1, 7, 1000):
        assert_close(scored(backend, rows), exact)
    backend.keeps_logits, backend.rows = False, 7  # as for a model that always makes the logits of every position
    assert_close(scored(backend, rows), exact)


@pytest.mark.parametrize("chunked", [True, False])
def test_logits_are_made_a_few_positions_at_a_time(directories: Callable[[str], Path], chunked: bool) -> None:
    rows = ragged(longest=100)
    backend = started(directories("qwen3"), batch_tokens=1500)
    backend.rows, backend.chunked_head = 16, chunked
    with Largest(V) as largest:
        scored(backend, rows)
    assert largest.seen > 100
    # The head's weights [V, D] and the embeddings have other last dimensions; what is left are logits.
    assert 0 < largest.logits <= 16 * V


def test_rows_at_once_follow_from_the_bytes(
    directories: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from entrodrop_prep.backends import transformers as module

    monkeypatch.setitem(module.LOGITS_BYTES, "cpu", 10 * 4 * V)
    backend = started(directories("llama"))
    assert backend.rows == 10
    assert backend.chunked_head
    with Largest(V) as largest:
        scored(backend, ragged())
    assert 0 < largest.logits <= 10 * V


def test_without_logits_to_keep_the_reduction_is_bounded(
    directories: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = started(directories("llama"))
    backend.chunked_head, backend.keeps_logits, backend.rows = False, False, 5
    seen: list[int] = []

    def noted(logits: torch.Tensor, targets: torch.Tensor) -> Any:
        seen.append(len(logits))
        return entropy_and_logprob(logits, targets)

    monkeypatch.setattr(backend, "reduce", noted)
    scored(backend, ragged())
    assert max(seen) == 5


@pytest.mark.parametrize("without", ["fails", "differs"])
def test_a_body_that_needs_the_mask_gets_it(
    directories: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, without: str
) -> None:
    assert not started(directories("llama")).masked
    exact = plain(directories("llama"), ragged())
    real = LlamaModel.forward

    def needs_it(self: Any, input_ids: Any = None, attention_mask: Any = None, **more: Any) -> Any:
        if attention_mask is None and without == "fails":
            raise TypeError("attention_mask is None")
        output = real(self, input_ids=input_ids, attention_mask=attention_mask, **more)
        if attention_mask is None:
            output.last_hidden_state = output.last_hidden_state * 1.01
        return output

    monkeypatch.setattr(LlamaModel, "forward", needs_it)
    backend = started(directories("llama"), batch_tokens=150)
    assert backend.masked
    assert backend.chunked_head
    assert_close(scored(backend, ragged()), exact)


class MixesPositions(torch.nn.Module):
    """A head whose output at a position depends on the one before too."""

    def __init__(self, head: torch.nn.Module) -> None:
        super().__init__()
        self.head = head

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        before = torch.cat([torch.zeros_like(hidden[:, :1]), hidden[:, :-1]], 1)
        return self.head(hidden + before)


class AsksForMore(LlamaForCausalLM):
    """A tail that wants something of the body that only a real run of it gives."""

    def forward(self, input_ids: Any = None, attention_mask: Any = None, **more: Any) -> Any:
        out = self.model(input_ids=input_ids, attention_mask=attention_mask, output_hidden_states=True, **more)
        hidden = out.last_hidden_state + out.hidden_states[0]
        return type("Output", (), {"logits": self.lm_head(hidden)})()


def test_another_kind_of_tail_gets_the_general_way(directories: Callable[[str], Path]) -> None:
    backend = started(directories("llama"))
    backend.model.lm_head = MixesPositions(backend.model.lm_head)
    backend.keeps_logits = False  # such a head must see all positions
    assert backend._probe() is False
    backend.chunked_head = False
    rows = ragged()
    with torch.no_grad():
        wanted = [backend.model(torch.from_numpy(row.astype(np.int64))[None]).logits[0, :-1] for row in rows]
    exact = [
        entropy_and_logprob(logits, torch.from_numpy(row[1:].astype(np.int64)))
        for logits, row in zip(wanted, rows, strict=True)
    ]
    assert_close(scored(backend, rows), [(h.numpy(), lp.numpy()) for h, lp in exact])


def test_a_tail_that_needs_the_body_gets_the_general_way(directories: Callable[[str], Path]) -> None:
    backend = started(directories("llama"))
    backend.model.__class__ = AsksForMore
    backend.keeps_logits = False
    assert backend._probe() is False
    backend.chunked_head = False
    rows = ragged()
    with torch.no_grad():
        wanted = [backend.model(torch.from_numpy(row.astype(np.int64))[None]).logits[0, :-1].double() for row in rows]
    exact = [torch.distributions.Categorical(logits=logits).entropy().numpy() for logits in wanted]
    assert_close([(h,) for h, _ in scored(backend, rows)], [(h,) for h in exact])


def limited(backend: TransformersBackend, most: int, say: Callable[[], Exception]) -> list[tuple[int, int]]:
    """Make the model's body fail above ``most`` tokens as a full device does; returns the shapes that passed."""
    passed: list[tuple[int, int]] = []

    def hook(module: Any, args: Any, kwargs: Any) -> None:
        shape = kwargs["input_ids"].shape
        if shape.numel() > most:
            raise say()
        passed.append(tuple(shape))

    backend.body.register_forward_pre_hook(hook, with_kwargs=True)
    return passed


@pytest.mark.parametrize(
    "say",
    [
        lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        lambda: RuntimeError("[enforce fail at alloc_cpu.cpp:118] DefaultCPUAllocator: can't allocate memory"),
        lambda: RuntimeError("MPS backend out of memory (MPS allocated: 8.00 GB)"),
        lambda: RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
)
def test_out_of_memory_halves_the_batch(directories: Callable[[str], Path], say: Callable[[], Exception]) -> None:
    rows = ragged(40)
    exact = plain(directories("llama"), rows)
    backend = started(directories("llama"), batch_tokens=100_000)
    backend.rows = 20  # so that calls of the tail alone are below the limit
    passed = limited(backend, 130, say)
    assert_close(scored(backend, rows), exact)
    assert all(b * t <= 130 for b, t in passed)
    assert any(b > 1 for b, _ in passed)
    assert backend.batch_tokens <= 260
    again = len(passed)
    score_all(backend, rows)
    assert len(passed) > again


def test_a_row_that_never_fits_is_an_error(directories: Callable[[str], Path]) -> None:
    backend = started(directories("llama"))
    limited(backend, 30, lambda: torch.OutOfMemoryError("CUDA out of memory"))
    with pytest.raises(ScoreError, match=r"one row of 60 tokens does not fit in memory; lower --max-length"):
        score_all(backend, ragged())


def test_another_runtime_error_is_a_bug(directories: Callable[[str], Path]) -> None:
    backend = started(directories("llama"))
    limited(backend, 30, lambda: RuntimeError("the shapes are wrong"))
    with pytest.raises(RuntimeError, match="the shapes are wrong"):
        score_all(backend, ragged())


def compiled(directory: Path, monkeypatch: pytest.MonkeyPatch, compiler: Any) -> TransformersBackend:
    """A backend as with ``--compile``, on the CPU and with a compiler of our own after torch's tracing."""
    torch.compiler.reset()
    real = devices.compile_layers
    with monkeypatch.context() as patch:
        patch.setattr(backend_module, "compile_layers", lambda model, name: real(model, name, compiler))
        patch.setattr(backend_module, "check_compiles", lambda device: None)
        return started(directory, compile=True, batch_tokens=150)


def test_compiled_layers(directories: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    traced: list[int] = []

    def compiler(graph: Any, inputs: Any) -> Any:
        traced.append(len(inputs))
        return graph.forward

    backend = compiled(directories("qwen3"), monkeypatch, compiler)
    assert backend.chunked_head
    assert backend.environment()["layers"] == "compiled"
    before = len(traced)
    assert 0 < before < 8  # layers that are alike share what is compiled
    assert_close(scored(backend, ragged()), plain(directories("qwen3"), ragged()))
    assert len(traced) <= before + 1  # for batches of any shape


def test_compiled_layers_that_differ_are_an_error(
    directories: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(graph: Any, inputs: Any) -> Any:
        return lambda *args: tuple(x * 1.5 for x in graph.forward(*args))

    with pytest.raises(ModelError, match=r"--compile changes its scores, by \d\.\de.\d\d nats on average; leave"):
        compiled(directories("llama"), monkeypatch, wrong)

    def fails(graph: Any, inputs: Any) -> Any:
        raise RuntimeError("Failed to find C compiler")

    with pytest.raises(ModelError, match=r"--compile: it does not compile, .*Failed to find C compiler.*; leave"):
        compiled(directories("llama"), monkeypatch, fails)


def test_layers_that_are_not_known_are_not_compiled(directories: Callable[[str], Path]) -> None:
    with pytest.raises(ModelError, match=r"--compile: its class does not say what its layers are; leave it out"):
        devices.compile_layers(torch.nn.Linear(2, 2), "linear")
    with pytest.raises(ModelError, match=r"--compile is for CUDA GPUs, the device is cpu; leave it out"):
        started(directories("llama"), compile=True)
    for other in ({"backend": "vllm"}, {"backend": "server", "server": ("http://127.0.0.1:1",)}):
        with pytest.raises(ConfigError, match="--compile applies to --backend transformers"):
            settings_for("unused.jsonl", "model", "out", compile=True, **other)


def test_a_model_whose_scores_change_with_padding(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    shape = {"num_decoder_layers": 2, "num_decoder_attention_heads": 4, "decoder_ffn_dim": 48, "num_encoder_layers": 1}
    config = ProphetNetConfig(vocab_size=V, hidden_size=32, encoder_ffn_dim=48, max_position_embeddings=128, **shape)
    directory = save_model(tmp_path, config, scale=8.0)
    backend = started(directory, batch_tokens=1000)
    assert backend.alone
    said = [r.getMessage() for r in caplog.records if r.name.startswith("entrodrop_prep")]
    assert [text for text in said if "its scores change with padding, by " in text and "by itself" in text]
    assert_close(scored(backend, ragged()), plain(directory, ragged()))
    backend.alone = False
    with pytest.raises(AssertionError):
        assert_close(scored(backend, ragged()), plain(directory, ragged()))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rows_share_batches_where_padding_changes_nothing(directories: Callable[[str], Path], dtype: str) -> None:
    for name in ("llama", "gemma2, soft cap", "bloom, alibi"):
        assert not started(directories(name), dtype=dtype).alone


@pytest.mark.parametrize("kind", FAILURES)
def test_a_model_that_cannot_run_is_an_error(
    directories: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, kind: type[Exception]
) -> None:
    def fails(self: Any, input_ids: Any = None, **more: Any) -> Any:
        raise kind("index out of range in self")

    monkeypatch.setattr(LlamaForCausalLM, "forward", fails)
    with pytest.raises(ModelError) as e:
        started(directories("llama"))
    assert f"its forward pass raises {kind.__name__}: " in str(e.value)
    assert "index out of range in self" in str(e.value)


def test_a_model_that_does_not_fit_is_told_from_one_that_cannot_run(
    directories: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Any, input_ids: Any = None, **more: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(LlamaForCausalLM, "forward", full)
    with pytest.raises(ModelError, match="it does not fit in the memory of cpu"):
        started(directories("llama"))


@pytest.mark.parametrize("name", [name for name in CONFIGS if name.endswith("ForConditionalGeneration")])
def test_the_text_side_of_a_multimodal_model(tmp_path: Path, name: str) -> None:
    """As its own class gives it for text alone."""
    directory = save_model(tmp_path, CONFIGS[name](), scale=8.0, architecture=name)
    backend = started(directory, batch_tokens=150)
    assert backend.info.architecture == name
    assert backend.info.multimodal
    assert backend.chunked_head
    assert not backend.alone
    model: Any = getattr(transformers, name).from_pretrained(directory, dtype=torch.float32)
    rows = ragged(vocabulary=VOCABULARY)
    exact = []
    with torch.no_grad():
        for row in rows:
            ids = torch.from_numpy(row.astype(np.int64))[None]
            logp = model.eval()(input_ids=ids).logits[0, :-1].double().log_softmax(-1)
            exact.append((-(logp.exp() * logp).sum(-1).numpy(), logp.gather(1, ids[0, 1:, None])[:, 0].numpy()))
    assert_close(scored(backend, rows), exact)
    backend.chunked_head, backend.rows = False, 7
    assert_close(scored(backend, rows), exact)


@pytest.mark.parametrize("config", [BartConfig(), WhisperConfig(), T5Gemma2Config()], ids=lambda c: c.model_type)
def test_an_encoder_decoder_is_refused(tmp_path: Path, config: Any) -> None:
    config.architectures = [type(config).__name__.removesuffix("Config") + "ForConditionalGeneration"]
    config.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(ModelError, match=f"{config.architectures[0]} is an encoder-decoder; the reference model must"):
        started(tmp_path)


def test_a_decoder_of_a_family_that_looks_ahead(tmp_path: Path) -> None:
    config = BertConfig(**TINY, initializer_range=0.5, is_decoder=True)
    backend = started(save_model(tmp_path / "decoder", config))
    assert_close(scored(backend, ragged()), plain(tmp_path / "decoder", ragged()))


def test_weights_that_are_missing_are_not_made_up(tmp_path: Path) -> None:
    directory = save_model(tmp_path / "holes", tiny_llama(V))
    weights = load_file(directory / "model.safetensors")
    kept = {name: value for name, value in weights.items() if "layers.1.mlp" not in name}
    save_file(kept, directory / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"its weights lack model\.layers\.1\.mlp\.\w+\.weight and 2 more"):
        started(directory)


def test_weights_without_a_place_are_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    directory = save_model(tmp_path, tiny_llama(V))
    started(directory)
    assert not caplog.records
    described = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**described, "num_hidden_layers": 1, "layer_types": None}))
    with caplog.at_level(logging.WARNING, logger="entrodrop_prep"):
        started(directory)
    (said,) = [r.getMessage() for r in caplog.records if r.name.startswith("entrodrop_prep")]
    assert "9 weights of the checkpoint have no place in its configuration, model.layers.1." in said


def edit_config(directory: Path, **values: Any) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_logits_narrower_than_the_configuration_says(directories: Callable[[str], Path]) -> None:
    backend = started(directories("llama"))
    backend.model.lm_head = torch.nn.Linear(32, V - 1)
    with pytest.raises(ModelError, match="its logits have 96 columns, its configuration says 97"):
        score_all(backend, ragged())


@pytest.mark.parametrize("chunked", [True, False])
def test_columns_beyond_the_vocabulary_are_left_out(directories: Callable[[str], Path], chunked: bool) -> None:
    rows = ragged()
    exact = plain(directories("llama"), rows)
    backend = started(directories("llama"))
    wide = torch.nn.Linear(32, V + 31, bias=False)
    with torch.no_grad():
        wide.weight.normal_(std=10)
        wide.weight[:V] = backend.model.lm_head.weight
    backend.model.lm_head = wide
    assert backend._probe()
    backend.chunked_head = chunked
    assert_close(scored(backend, rows), exact)


class Impossible(torch.nn.Module):
    """A head that gives some tokens no probability at all."""

    def __init__(self, head: torch.nn.Module, first: int) -> None:
        super().__init__()
        self.head, self.first = head, first

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.head(hidden)
        return logits.index_fill(-1, torch.arange(self.first, logits.shape[-1]), -torch.inf)


def test_tokens_of_no_probability_add_nothing(directories: Callable[[str], Path]) -> None:
    backend = started(directories("llama"))
    exact = plain(directories("llama"), ragged(vocabulary=80), vocabulary=80)
    backend.model.lm_head = Impossible(backend.model.lm_head, 80)
    for chunked in (True, False):
        backend.chunked_head = chunked
        assert_close(scored(backend, ragged(vocabulary=80)), exact)
    ((entropy, logprob),) = scored(backend, [np.array([5, 90, 6], np.int32)])
    assert np.isfinite(entropy).all()
    assert logprob[0] == -np.inf
    assert np.isfinite(logprob[1])


def test_the_reduction_itself() -> None:
    z = torch.tensor([[0.0, -torch.inf], [1e4, 0.0], [-1e30, -1e30], [88.0, 89.0], [torch.nan, 0.0]])
    entropy, logprob = entropy_and_logprob(z, torch.tensor([0, 1, 0, 1, 1]))
    log2 = float(np.log(2))
    assert entropy[:4].tolist() == pytest.approx([0.0, 0.0, log2, 0.582203], abs=1e-6)
    assert logprob[:4].tolist() == pytest.approx([0.0, -1e4, -log2, -0.313262], abs=1e-6)
    assert torch.isnan(entropy[4])
    assert torch.isnan(logprob[4])
    uniform, _ = entropy_and_logprob(torch.zeros(1, 152_064), torch.tensor([0]))
    assert float(uniform) == pytest.approx(np.log(152_064), abs=1e-4)
    for kind in (torch.float16, torch.bfloat16):
        few = torch.randn(5, 1000, generator=torch.Generator().manual_seed(0)).to(kind)
        found, _ = entropy_and_logprob(few, torch.zeros(5, dtype=torch.int64))
        exact = torch.distributions.Categorical(logits=few.double()).entropy()
        assert found.dtype == torch.float32
        assert float((found - exact).abs().max()) < 1e-4


def test_broken_weights_stop_the_run_and_name_the_row(tmp_path: Path) -> None:
    directory = save_model(tmp_path / "model", tiny_llama(V))
    weights = load_file(directory / "model.safetensors")
    weights["model.embed_tokens.weight"][50] = torch.nan
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    rows = [[5, 6, 7], [8, 9], [10, 11, 50, 12, 13], [14, 15, 16]]
    source = write_rows(tmp_path / "rows.jsonl", [{"input_ids": ids} for ids in rows])
    with pytest.raises(ScoreError, match=r"rows\.jsonl:3: row 2: the entropy of token \d of window 0 is nan; try"):
        run_score(source, directory, tmp_path / "out")
    assert shards(tmp_path / "out") == []


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_near(tmp_path: Path, dtype: str) -> None:
    directory = save_model(tmp_path, tiny_llama(V), scale=4.0)
    backend = started(directory, dtype=dtype)
    assert backend.chunked_head
    exact = plain(directory, ragged())
    found = scored(backend, ragged())
    error = np.concatenate(
        [np.abs(a - b) for x, y in zip(found, exact, strict=True) for a, b in zip(x, y, strict=True)]
    )
    assert np.mean(error) < (0.03 if dtype == "bfloat16" else 0.005)


def test_batching_does_not_change_scores(directories: Callable[[str], Path]) -> None:
    rows = ragged(30)
    results = [scored(started(directories("gpt2"), batch_tokens=n), rows) for n in (1, 64, 10**6)]
    for other in results[1:]:
        assert_close(other, results[0], 2e-5)


def test_nothing_to_score(directories: Callable[[str], Path]) -> None:
    assert score_all(started(directories("gpt2")), []) == []
