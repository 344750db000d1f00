"""The token-entropy variants of vLLM's models, each made when it is asked for by name."""

from __future__ import annotations

from typing import Any

from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.models.interfaces_base import VllmModelForPooling
from vllm.model_executor.models.registry import ModelRegistry

from entrodrop_prep.engine.plugin import PREFIX, VERSION_MARK
from entrodrop_prep.engine.pooler import EntropyPooler


def __getattr__(name: str) -> Any:
    if not name.startswith(PREFIX):
        raise AttributeError(name)
    variant = _variant(name, name.removeprefix(PREFIX).partition(VERSION_MARK)[0])
    globals()[name] = variant
    return variant


def _variant(name: str, architecture: str) -> Any:
    """vLLM's own class for ``architecture``, its head kept, and the entropy pooler beside it."""
    base: Any = ModelRegistry._try_load_model_cls(architecture)
    if base is None:
        raise AttributeError(f"this vLLM cannot load {architecture}")

    def __init__(self: Any, *, vllm_config: Any, prefix: str = "", **more: Any) -> None:
        base.__init__(self, vllm_config=vllm_config, prefix=prefix, **more)
        config = vllm_config.model_config
        _check_rope(config.hf_text_config, config.max_model_len)
        if vllm_config.parallel_config.pipeline_parallel_size == 1:
            _check_head(self, config.hf_text_config, architecture)
        self.pooler = EntropyPooler(self, config.get_vocab_size())

    body = {"is_pooling_model": True, "__init__": __init__, "__module__": __name__, "__qualname__": name}
    return type(name, (base, VllmModelForPooling), body)


def _check_rope(config: Any, longest: int) -> None:
    """Raise ValueError where vLLM would choose the frequencies of all rows by the longest row allowed.

    transformers chooses them by each row's own length.
    """
    rope = getattr(config, "rope_parameters", None) or {}
    limit = rope.get("original_max_position_embeddings") or getattr(config, "original_max_position_embeddings", None)
    if rope.get("rope_type") == "longrope" and limit and longest > limit:
        raise ValueError(f"its longrope is not supported for rows over {limit} tokens: give --max-length {limit}")


def _check_head(model: Any, config: Any, architecture: str) -> None:
    """Raise ValueError where vLLM would not use the head that the configuration means.

    Some of its architectures do not look at ``tie_word_embeddings``: they leave out the checkpoint's head without a
    word, or keep one that no checkpoint fills.
    """
    wanted = getattr(config, "tie_word_embeddings", None)
    layers = [module for module in model.modules() if isinstance(module, VocabParallelEmbedding)]
    tables = {id(getattr(layer, "weight", layer)) for layer in layers if not isinstance(layer, ParallelLMHead)}
    heads = {id(getattr(layer, "weight", layer)) for layer in layers if isinstance(layer, ParallelLMHead)}
    tied = heads <= tables
    if wanted is not None and tied != wanted:
        raise ValueError(
            f"{architecture} is not supported with tie_word_embeddings={wanted}: vLLM's "
            f"{'takes the embeddings for the head' if tied else 'has a head of its own'} regardless"
        )
