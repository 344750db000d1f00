"""The token-entropy variants of vLLM's models, each made when it is asked for by name."""

from __future__ import annotations

import functools
from typing import Any

from vllm.model_executor.layers.activation import XIELU
from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbeddingBase
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.models.interfaces_base import VllmModelForPooling
from vllm.model_executor.models.registry import ModelRegistry
from vllm.platforms import current_platform

from entrodrop_prep.vllm_plugin.plugin import PREFIX, VERSION_MARK
from entrodrop_prep.vllm_plugin.pooler import EntropyPooler


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
        _keep_activations_in(self, config.dtype)
        _turn_heads_as_rows(self)
        _check_rope(config.hf_text_config, config.max_model_len)
        if vllm_config.parallel_config.pipeline_parallel_size == 1:
            _check_head(self, config.hf_config, architecture)
        self.pooler = EntropyPooler(self, config.get_vocab_size(), config.dtype)

    body = {"is_pooling_model": True, "__init__": __init__, "__module__": __name__, "__qualname__": name}
    return type(name, (base, VllmModelForPooling), body)


def _keep_activations_in(model: Any, dtype: Any) -> None:
    """Move the learned parameters of xIELU (Apertus) to the model's dtype: vLLM keeps them in bfloat16, always."""
    for module in model.modules():
        if isinstance(module, XIELU):
            module.to(dtype)


def _turn_heads_as_rows(model: Any) -> None:
    """Give vLLM's rotary kernel for CPUs [n, heads * size]: it takes the heads of [n, heads, size] for positions."""
    if current_platform.device_type != "cpu":
        return
    for module in model.modules():
        if isinstance(module, RotaryEmbeddingBase):
            module._forward_method = functools.partial(_turned, module._forward_method)


def _turned(rotate: Any, positions: Any, query: Any, key: Any = None, *more: Any, **named: Any) -> Any:
    flat = (x if x is None or x.ndim < 3 else x.flatten(-2) for x in (query, key))
    turned = rotate(positions, *flat, *more, **named)
    return tuple(x if x is None else x.view(y.shape) for x, y in zip(turned, (query, key), strict=True))


def _check_rope(config: Any, longest: int) -> None:
    """Raise ValueError where vLLM would choose the frequencies of all rows by the longest row allowed.

    transformers chooses them by each row's own length.
    """
    rope = getattr(config, "rope_parameters", None) or {}
    limit = rope.get("original_max_position_embeddings") or getattr(config, "original_max_position_embeddings", None)
    if rope.get("llama_4_scaling_beta") and not getattr(config, "llama_4_scaling", None) and limit and longest > limit:
        raise ValueError(f"vLLM leaves out its scaling of rows over {limit} tokens: give --max-length {limit}")
    if rope.get("rope_type") == "longrope" and limit and longest > limit:
        raise ValueError(f"its longrope is not supported for rows over {limit} tokens: give --max-length {limit}")


def _check_head(model: Any, config: Any, architecture: str) -> None:
    """Raise ValueError where vLLM would not use the head that the configuration means.

    Some of its architectures do not look at ``tie_word_embeddings``: they silently leave out the checkpoint's head,
    or keep one that no checkpoint fills. Of a multimodal model the outer configuration says it, as in
    transformers.
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
