"""Small causal language models on disk, with tokenizers of their own; and running ``score`` on rows with them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig, PreTrainedTokenizerFast

from entrodrop_prep.config import ScoreConfig
from entrodrop_prep.scoring.run import ScoreSummary, score

torch.set_num_threads(1)  # models this small only wait for each other's threads

EOS, UNKNOWN, FIRST_WORD = 1, 2, 3


def word_tokenizer(vocabulary: int, *, first: int = FIRST_WORD) -> PreTrainedTokenizerFast:
    """A tokenizer whose text ``w7 w9`` is the ids 7, 9. Ids below 3 are <pad>, </s> and <unk>.

    Args:
        vocabulary: number of ids.
        first: the word that id 3 stands for; with 3, each word ``wN`` has the id N.
    """
    words = {"<pad>": 0, "</s>": EOS, "<unk>": UNKNOWN}
    words |= {f"w{first + i}": FIRST_WORD + i for i in range(vocabulary - FIRST_WORD)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", pad_token="<pad>", unk_token="<unk>")


def words(ids: Sequence[int]) -> str:
    """The text that ``word_tokenizer`` makes these ids of."""
    return " ".join(f"w{i}" for i in ids)


def save_model(
    directory: Path, config: PretrainedConfig, *, seed: int = 0, scale: float = 1.0, architecture: str | None = None
) -> Path:
    """A model with random weights and a ``word_tokenizer``; ``scale`` makes its distributions sharper.

    ``architecture`` names its class, where that is not the one of AutoModelForCausalLM.
    """
    torch.manual_seed(seed)
    model: Any = (
        getattr(transformers, architecture)(config) if architecture else AutoModelForCausalLM.from_config(config)
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(scale)
            elif scale != 1.0:
                parameter.add_(torch.randn_like(parameter) * 0.1)
        for name, buffer in model.named_buffers():
            if name.endswith("correction_bias"):  # of the choice of experts
                buffer.add_(torch.randn_like(buffer) * 0.1)
    model.save_pretrained(directory)
    word_tokenizer(config.get_text_config().vocab_size).save_pretrained(directory)
    return directory


def tiny_llama(vocabulary: int = 97, *, context: int = 128, **more: Any) -> LlamaConfig:
    """A Llama of two layers."""
    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=context,
        **more,
    )


@dataclass(frozen=True)
class Markov:
    """A model on disk that predicts from the last token alone, by tables.

    Attributes:
        directory: a LlamaForCausalLM and its tokenizer.
        entropy: [V] float64, nats, of the token after token v.
        logprob: [V, V] float64, log-probability of token w after token v.
    """

    directory: Path
    entropy: np.ndarray[Any, np.dtype[np.float64]]
    logprob: np.ndarray[Any, np.dtype[np.float64]]


def markov_model(directory: Path, *, vocabulary: int = 40, context: int = 256, seed: int = 0) -> Markov:
    """A real Llama whose attention and MLP add nothing and whose head holds log p(w | v).

    Embeddings are the unit vectors, which the final RMSNorm makes 1 / sqrt(1/D + eps) long; the head is divided by it.
    Each token has an entropy of its own after it, so that a score in the wrong place shows.
    """
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=vocabulary,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=vocabulary // 4,
        max_position_embeddings=context,
        tie_word_embeddings=False,
    )
    rng = np.random.default_rng(seed)
    z = rng.normal(size=(vocabulary, vocabulary)) * np.linspace(0.2, 6, vocabulary)[:, None]
    z -= z.max(1, keepdims=True)
    logprob = z - np.log(np.exp(z).sum(1, keepdims=True))
    model: Any = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(torch.eye(vocabulary))
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        length = (1 / vocabulary + config.rms_norm_eps) ** -0.5
        model.lm_head.weight.copy_(torch.from_numpy(logprob.T / length))
    model.save_pretrained(directory)
    word_tokenizer(vocabulary).save_pretrained(directory)
    return Markov(directory, -(np.exp(logprob) * logprob).sum(1), logprob)


def random_rows(count: int, vocabulary: int, *, longest: int = 40, seed: int = 0) -> list[list[int]]:
    """Token ids of ``count`` rows of 2 to ``longest`` tokens, no special ones."""
    rng = np.random.default_rng(seed)
    return [rng.integers(FIRST_WORD, vocabulary, rng.integers(2, longest + 1)).tolist() for _ in range(count)]


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    """Rows as JSON lines or Parquet, by the file's name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(list(rows)), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def settings_for(source: Path | str, model: Path, out: Path, **settings: Any) -> ScoreConfig:
    """Settings for transformers on the CPU in float32."""
    usual = {"backend": "transformers", "dtype": "float32", "device": "cpu"}
    return ScoreConfig(**{"source": str(source), "model": str(model), "out": str(out), **usual, **settings})


def run_score(source: Path | str, model: Path, out: Path, **settings: Any) -> ScoreSummary:
    """``score`` with ``settings_for``."""
    return score(settings_for(source, model, out, **settings))


def scored_documents(folder: Path, *, rows: int = 22, longest: int = 30, held: int = 0, **model: Any) -> Path:
    """``base-model`` in a folder, rows of text ``scored`` with it, and some of them ``held`` out; gives the model."""
    saved = save_model(folder / "base-model", tiny_llama(**model))
    texts = [{"text": words(row)} for row in random_rows(rows, 97, longest=longest)]
    run_score(write_rows(folder / "docs.jsonl", texts), saved, folder / "scored")
    if held:
        run_score(write_rows(folder / "held.jsonl", texts[:held]), saved, folder / "held")
    return saved


def shards(out: Path) -> list[Path]:
    """The shard files of a scored directory, in order."""
    return sorted(out.glob("shard-*.parquet"))


def rows_of(out: Path) -> list[dict[str, Any]]:
    """All rows of a scored directory."""
    return [row for path in shards(out) for row in pq.read_table(path).to_pylist()]
