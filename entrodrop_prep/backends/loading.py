"""Loading a model with transformers, so that every weight is what its checkpoint means."""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING, Any

from entrodrop_prep.backends.model import ModelInfo
from entrodrop_prep.backends.weights import check_left_over, check_stored, stored_weights
from entrodrop_prep.config.names import user_path
from entrodrop_prep.errors import ModelError
from entrodrop_prep.hub.loading import loading

if TYPE_CHECKING:
    from entrodrop_prep.config import ScoreConfig

log = logging.getLogger(__name__)


def load_model(config: ScoreConfig, info: ModelInfo) -> Any:
    """The model with every weight from its checkpoint. Raises ModelError."""
    import torch
    import transformers
    from transformers.utils import logging as hf_logging

    hf_logging.disable_progress_bar()
    path = user_path(config.model)
    stored = stored_weights(config, info)
    if not _is_unpacked(info):
        check_stored(stored, info, "transformers")
    with loading(config.model, "model"):
        loaded: Any = getattr(transformers, info.auto_class).from_pretrained(
            str(path) if os.path.isdir(path) else config.model,
            revision=info.commit or config.revision,
            dtype=getattr(torch, info.dtype),
            trust_remote_code=config.trust_remote_code,
            use_safetensors=None if config.allow_pickle else True,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    model, report = loaded
    missing = sorted(report["missing_keys"])
    if missing:  # transformers fills them with random numbers
        raise ModelError(
            f"its weights lack {missing[0]}" + (f" and {len(missing) - 1} more" if missing[1:] else ""),
            where=config.model,
            fix="give a complete causal language model; a bare body has no head to predict with",
        )
    for name, stored, wanted in sorted(report["mismatched_keys"]):
        raise ModelError(
            f"its weight {name} is {list(stored)}, its configuration makes it {list(wanted)}",
            where=config.model,
            fix="correct the model's config.json",
        )
    unused = sorted(report["unexpected_keys"])
    check_left_over(unused, stored, info, "transformers", quantized=getattr(model, "hf_quantizer", None) is not None)
    if unused:
        log.warning(
            "%s: %d weights of the checkpoint have no place in its configuration, %s among them: check config.json",
            info.name,
            len(unused),
            unused[0],
        )
    if getattr(model.config.get_text_config(), "attn_logit_softcapping", None):
        model.set_attn_implementation("eager")  # the others leave the soft cap out silently
    _warn_of_dynamic_rope(info, model.config.get_text_config(), info.max_length(config.max_length))
    return model


def _is_unpacked(info: ModelInfo) -> bool:
    """Whether transformers has a quantizer for what the model's configuration says of its weights."""
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

    return info.quantization in (*AUTO_QUANTIZATION_CONFIG_MAPPING, "bitsandbytes")


def _warn_of_dynamic_rope(info: ModelInfo, config: Any, longest: int) -> None:
    """Some rotary embeddings take their frequencies from the longest row of a batch, once it is over a limit."""
    rope = getattr(config, "rope_parameters", None) or {}
    limit = rope.get("original_max_position_embeddings") or getattr(config, "original_max_position_embeddings", None)
    if rope.get("rope_type") in ("longrope", "dynamic") and limit and longest > limit:
        log.warning(
            "%s: scores of rows depend on the longest row of their batch where that is over %d tokens: "
            "give --max-length %d",
            info.name,
            limit,
            limit,
        )
