"""The options of a vLLM engine that scores: ours, the user's, and what they mean for continuing a run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from entrodrop_prep.backends.architectures import DIFFERING, variant_of
from entrodrop_prep.errors import ConfigError, ModelError

if TYPE_CHECKING:
    from entrodrop_prep.backends.model import ModelInfo

OWNED = {
    "model": "the model is named on its own",
    "tokenizer": "token ids go in, no text",
    "skip_tokenizer_init": "token ids go in, no text",
    "runner": "the plugin needs the pooling runner",
    "convert": "the plugin needs the model as it is",
    "dtype": "use --dtype",
    "revision": "use --revision",
    "max_model_len": "use --max-length",
    "trust_remote_code": "use --trust-remote-code",
    "enable_prefix_caching": "a token found in the cache is never scored, so it stays off",
    "pooler_config": "the plugin brings its own pooler",
    "served_model_name": "it says to a client which model answers",
    "pipeline_parallel_size": "use tensor_parallel_size: pipelines fail with a pooler in vLLM up to 0.32",
    "data_parallel_size": "use --replicas, or several servers",
    "language_model_only": "only text is scored, so it is set for every multimodal model",
    "enable_lora": "merge the adapter into the weights first: a frozen model is scored as it is",
}
"""Options that are set here, and why the user cannot."""

HARMLESS = frozenset(
    (
        "tensor_parallel_size",
        "gpu_memory_utilization",
        "max_num_batched_tokens",
        "max_num_seqs",
        "max_num_partial_prefills",
        "max_long_partial_prefills",
        "long_prefill_token_threshold",
        "max_num_queued_reqs",
        "enable_chunked_prefill",
        "enforce_eager",
        "distributed_executor_backend",
        "block_size",
        "kv_cache_memory_bytes",
        "cpu_offload_gb",
        "swap_space",
        "download_dir",
        "async_scheduling",
        "disable_log_stats",
        "compilation_config",
        "seed",
    )
)
"""Options that change scores in their last digits at most; any other is part of the environment."""

SAFE_FORMATS = ("safetensors", "fastsafetensors", "runai_streamer")
"""Values of ``load_format`` that read safetensors files and nothing else."""

COUNTS = frozenset(("max_num_batched_tokens", "tensor_parallel_size"))
"""Options that are reckoned with here."""


def parse(options: Sequence[str]) -> dict[str, Any]:
    """``max-num-seqs=64`` and the like as vLLM's own names and values; a value is JSON where it can be, else text.

    Raises ConfigError for an option that is not KEY=VALUE, that is set here, or that breaks the scores.
    """
    found: dict[str, Any] = {}
    for option in options:
        key, sign, text = option.partition("=")
        name = key.strip().lstrip("-").replace("-", "_")
        if not sign or not name.isidentifier():
            raise ConfigError(f"--engine-arg {option!r} is not understood", fix="write it as KEY=VALUE")
        if name in found:
            raise ConfigError(f"--engine-arg gives {name} twice", fix="give it once")
        value = _value(text.strip())
        if name in OWNED and not (name == "enable_prefix_caching" and value is False):
            raise ConfigError(f"--engine-arg {name} cannot be set", fix=OWNED[name])
        if (name, value) == ("load_format", "dummy"):
            raise ConfigError("--engine-arg load_format=dummy gives random weights", fix="leave it out")
        if name == "load_format" and value not in SAFE_FORMATS:
            raise ConfigError(
                f"--engine-arg load_format={value} may load pickles, which can run code",
                fix=f"leave it out, or use one of: {', '.join(SAFE_FORMATS)}",
            )
        if name == "hf_overrides" and (not isinstance(value, dict) or "architectures" in value):
            raise ConfigError(
                "--engine-arg hf_overrides must be a JSON object without architectures",
                fix="""write it as hf_overrides='{"head_dtype": "model"}'""",
            )
        found[name] = value
    found.pop("enable_prefix_caching", None)
    return found


def _value(text: str) -> Any:
    if text in ("True", "False", "None"):
        return {"True": True, "False": False, "None": None}[text]
    try:
        return json.loads(text)
    except ValueError:
        return text


def engine_options(
    model: str,
    info: ModelInfo,
    *,
    max_length: int,
    batch_tokens: int,
    cpu: bool,
    trust_remote_code: bool,
    allow_pickle: bool,
    options: Sequence[str],
) -> dict[str, Any]:
    """Keyword arguments of vLLM's ``LLM``: what scoring needs, with the user's options beside it.

    Raises ConfigError for an option that cannot be set, ModelError for an architecture that has no variant.
    """
    variant, differing = variant_of(info.architecture), DIFFERING.get(info.architecture)
    if variant is None:
        raise ModelError(
            f"vLLM's engine does not score {info.architecture or 'a model without an architecture in its config.json'}"
            + (f" as transformers does (difference: {differing})" if differing else ""),
            where=info.name,
            fix="use --backend transformers"
            if differing
            else "only text-only causal language models have a token-entropy variant; use --backend transformers",
        )
    given = parse(options)
    for name in COUNTS & given.keys():
        if type(given[name]) is not int or given[name] < 1:
            raise ConfigError(
                f"--engine-arg {name}={given[name]} is not understood", fix="give a whole number of at least 1"
            )
    if cpu and "kv_cache_memory_bytes" in given:
        raise ConfigError(
            "--engine-arg kv_cache_memory_bytes has no effect on a CPU", fix="set VLLM_CPU_KVCACHE_SPACE, in GiB"
        )
    overrides = {**given.pop("hf_overrides", {}), "architectures": [variant]}
    ours: dict[str, Any] = {
        "model": str(Path(model).expanduser().resolve()) if info.commit is None else model,
        "runner": "pooling",
        "hf_overrides": overrides,
        "dtype": info.dtype,
        "max_model_len": max_length,
        "max_num_batched_tokens": batch_tokens,
        "enable_prefix_caching": False,
        "enable_chunked_prefill": True,
        "skip_tokenizer_init": True,
        "disable_log_stats": True,
        "load_format": "auto" if allow_pickle else "safetensors",
    }
    if info.multimodal:
        ours |= {"language_model_only": True, "skip_tokenizer_init": False}  # its processor is made with a tokenizer
    if info.commit is not None:
        ours["revision"] = info.commit
    if trust_remote_code:
        ours["trust_remote_code"] = True
    if cpu:
        ours["enforce_eager"] = True  # compiling takes longer than it saves
    return {**ours, **given}


def scores_depend_on(options: Sequence[str]) -> dict[str, Any]:
    """Those of the user's options that may change scores by more than their last digits."""
    return {name: value for name, value in parse(options).items() if name not in HARMLESS}
