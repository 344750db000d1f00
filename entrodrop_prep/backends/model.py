"""What is known of a reference model before it is loaded: context, vocabulary, number format, identity."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from entrodrop_prep.backends.config_file import check_config
from entrodrop_prep.backends.weight_files import weight_files
from entrodrop_prep.config.names import only_a_path, user_path
from entrodrop_prep.errors import ModelError
from entrodrop_prep.hub.loading import loading

DEFAULT_CONTEXT = 4096
_CONTEXT_NAMES = ("max_position_embeddings", "max_seq_len", "n_positions", "seq_length")
IDENTITY, DTYPE = "entrodrop:", "entrodrop-dtype:"
"""Names under which a server that `entrodrop serve` started serves its model too: its weights', its number format."""
CAUSAL, WITH_IMAGES = "AutoModelForCausalLM", "AutoModelForImageTextToText"
DECODERS = ("ForCausalLM", "LMHeadModel")
"""Endings of the names of classes that are decoders, also where their configuration is an encoder-decoder's."""


class ModelSettings(Protocol):
    """Which model, and what of it may be used: see ``entrodrop_prep.config``."""

    @property
    def model(self) -> str: ...

    @property
    def revision(self) -> str | None: ...

    @property
    def dtype(self) -> str: ...

    @property
    def trust_remote_code(self) -> bool: ...

    @property
    def allow_pickle(self) -> bool: ...


@dataclass(frozen=True)
class ModelInfo:
    """A reference model as its configuration describes it.

    Attributes:
        name: directory name or Hub id, for people.
        vocab_size: columns of the logits, the text config's ``vocab_size``.
        context: longest input in tokens, or None where the configuration does not say.
        dtype: ``float32``, ``bfloat16`` or ``float16``: what it will run in.
        architecture: name of its class, as its configuration gives it, such as ``LlamaForCausalLM``.
        commit: the resolved revision of a model on the Hub; None for a local one.
        identity: of its weights, as a server names it; empty until it is asked for.
        auto_class: the class of transformers that loads it.
        multimodal: whether it is a language model within a model of images or sound, of which its text side is scored.
        quantization: how its configuration says that its weights are quantized; empty where they are not.
    """

    name: str
    vocab_size: int
    context: int | None
    dtype: str
    architecture: str = ""
    commit: str | None = None
    identity: str = ""
    auto_class: str = CAUSAL
    multimodal: bool = False
    quantization: str = ""

    def max_length(self, asked: int | None) -> int:
        """Longest row in tokens: what was asked for, else the context but at most 4096. Raises ModelError."""
        if asked is None:
            return min(self.context or DEFAULT_CONTEXT, DEFAULT_CONTEXT)
        if self.context is not None and asked > self.context:
            raise ModelError(
                f"--max-length {asked} is over the model's context of {self.context} tokens",
                where=self.name,
                fix=f"use at most {self.context}",
            )
        return asked


def inspect_model(config: ModelSettings) -> ModelInfo:
    """Look at a model without loading it: it exists, is open to us, is a causal LM, and has weights.

    Raises:
        ModelError: missing, gated, without usable weights, or not a causal language model.
    """
    import torch
    from transformers import AutoConfig

    if not config.model.strip():
        raise ModelError("the model's name is empty", fix="give a model directory or a Hub id")
    path = user_path(config.model)
    local = os.path.isdir(path)
    if not local and only_a_path(config.model):
        raise ModelError("no such directory", where=config.model, fix="give a model directory or a Hub id")
    with loading(config.model, "model"):
        if local:
            _check_local(config, path)
        commit = None if local else commit_of(config.model, "config.json", config.revision)
        file = find_file(config.model, "config.json", commit or config.revision)
        if file is not None:
            check_config(file, config.model)
        hf = AutoConfig.from_pretrained(
            str(path) if local else config.model,
            revision=commit or config.revision,
            trust_remote_code=config.trust_remote_code,
        )
    kind = _check_kind(config, hf)
    text = hf.get_text_config()
    if not isinstance(getattr(text, "vocab_size", None), int):
        raise ModelError(
            "its config.json names no vocab_size for text", where=config.model, fix="give a causal language model"
        )
    dtype: str = config.dtype
    if dtype == "auto":
        stored = getattr(hf, "dtype", None) or getattr(text, "dtype", None) or torch.float32
        dtype = str(stored).removeprefix("torch.")
        if dtype not in ("float32", "bfloat16", "float16"):
            raise ModelError(
                f"its checkpoint is {dtype}",
                where=config.model,
                fix="name the number format to run in: --dtype bfloat16, say",
            )
    context = next((c for c in (getattr(text, name, None) for name in _CONTEXT_NAMES) if c is not None), None)
    return ModelInfo(
        name=path.resolve().name if local else config.model,
        architecture=_architecture(hf),
        commit=commit,
        vocab_size=int(text.vocab_size),
        context=int(context) if isinstance(context, int) and context > 0 else None,
        dtype=dtype,
        auto_class=kind,
        multimodal=type(text) is not type(hf),
        quantization=_quantization(hf, text),
    )


def auto_class(model_type: str, auto_map: Mapping[str, Any]) -> str | None:
    """The class of transformers that loads models of a type with their head, by name; None where none does.

    Multimodal models that are no causal language models by themselves are loaded whole, and given text.
    """
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    )

    if model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or CAUSAL in auto_map:
        return CAUSAL
    return WITH_IMAGES if model_type in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES else None


def _check_kind(config: ModelSettings, hf: Any) -> str:
    """The class that loads it.

    Raises ModelError for what does not predict the next token of a text, or brings code that was not allowed.
    """
    auto_map = getattr(hf, "auto_map", None) or {}
    architecture = _architecture(hf)
    kind = auto_class(hf.model_type, auto_map)
    if kind is None:
        raise ModelError(
            f"{hf.model_type} is not a causal language model",
            where=config.model,
            fix="the reference model must predict the next token (AutoModelForCausalLM or AutoModelForImageTextToText)",
        )
    encodes = any(getattr(c, "is_encoder_decoder", False) for c in (hf, hf.get_text_config()))
    if encodes and not architecture.endswith(DECODERS):
        raise ModelError(
            f"{architecture or hf.model_type} is an encoder-decoder",
            where=config.model,
            fix="the reference model must predict the next token from those before it alone",
        )
    if CAUSAL in auto_map and not config.trust_remote_code and auto_class(hf.model_type, {}) is None:
        raise ModelError(
            "it brings its own Python code", where=config.model, fix="read that code, then add --trust-remote-code"
        )
    return kind


def _quantization(*configs: Any) -> str:
    """The ``quant_method`` of a configuration, or of that of its text side."""
    for config in configs:
        for name in ("quantization_config", "compression_config"):
            if method := (getattr(config, name, None) or {}):
                return str(method.get("quant_method", "?") if isinstance(method, dict) else method.quant_method)
    return ""


def _architecture(hf: Any) -> str:
    return str((getattr(hf, "architectures", None) or [""])[0])


def commit_of(name: str, file: str, revision: str | None) -> str:
    """The commit that a revision of a Hub model is, or offline was when it was fetched: the cache folder of a file."""
    from huggingface_hub import hf_hub_download

    return Path(hf_hub_download(name, file, revision=revision)).parent.name


def find_file(name: str, file: str, revision: str | None) -> Path | None:
    """A file of a directory or of a repository on the Hub; None where it is not there or the Hub cannot be reached."""
    from transformers.utils.hub import cached_file

    path = user_path(name)
    if os.path.isdir(path):
        return path / file if (path / file).is_file() else None
    quiet = {f"_raise_exceptions_for_{what}": False for what in ("missing_entries", "connection_errors")}
    found = cached_file(name, file, revision=revision, **quiet)
    return None if found is None else Path(found)


def _check_local(config: ModelSettings, path: Path) -> None:
    if not (path / "config.json").is_file():
        raise ModelError(
            "the directory has no config.json, so it is no model",
            where=str(path),
            fix="give a directory made by save_pretrained, or a Hub id",
        )
    weight_files(config, path)
