"""Configurations of small models of the families that are compared in vLLM and in transformers.

The vocabulary is no multiple of 64, so that rows an engine pads with show. Keys that transformers does not know are in
published configurations, and vLLM reads them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import transformers as tf

from entrodrop_prep.backends.architectures import BFLOAT16_ON_CPU

VOCABULARY, CONTEXT = 331, 96
SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": CONTEXT,
    "bos_token_id": 1,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
GROUPED = {**SHAPE, "num_key_value_heads": 1}
HEAD = {"head_dim": 32}
EXPERTS = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
SLIDING = {"sliding_window": 24}
MIXED = {**SLIDING, "layer_types": ["sliding_attention", "full_attention"]}
GPT2 = {"vocab_size": VOCABULARY, "n_embd": 64, "n_layer": 2, "n_head": 2, "n_positions": CONTEXT}
CAPS = {"attn_logit_softcapping": 3.0, "final_logit_softcapping": 5.0, "query_pre_attn_scalar": 32}
FACTORS = {"embedding_multiplier": 3.0, "residual_multiplier": 0.5, "attention_multiplier": 0.1, "logits_scaling": 0.5}
ROUTED = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 48,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 1.5,
    "num_nextn_predict_layers": 0,
}
LATENT = {
    "kv_lora_rank": 512,
    "q_lora_rank": 48,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 32,
    "v_head_dim": 32,
    "n_group": 2,
    "topk_group": 1,
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
}
DELTA = {  # the gated delta rule of vLLM's CPU engine takes heads of 128 alone
    "linear_num_key_heads": 1,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "layer_types": ["linear_attention", "full_attention"],
}
SHARED = {**EXPERTS, "shared_expert_intermediate_size": 48}
MAMBA = {
    "layer_types": ["mamba", "attention"],
    "mamba_n_heads": 4,
    "mamba_d_state": 32,
    "mamba_d_head": 32,
    "mamba_chunk_size": 16,
    "position_embedding_type": "rope",
    "shared_intermediate_size": 96,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
}
LLAMA4 = {"intermediate_size_mlp": 96, "num_local_experts": 4, "num_experts_per_tok": 1}
SIGLIP = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 32,
}
QWEN_EYES = {
    "depth": 1,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_heads": 2,
    "out_hidden_size": 64,
    "patch_size": 16,
}
PIXTRAL = {**SIGLIP, "patch_size": 16, "head_dim": 16}
MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [4, 6, 6]}}
PARTIAL = {
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 10_000.0,
        "mrope_section": [2, 1, 1],
        "mrope_interleaved": True,
        "partial_rotary_factor": 0.25,
    }
}
IMAGE = {"image_token_id": 312, "video_token_id": 313, "vision_start_token_id": 314, "vision_end_token_id": 316}
GEMMA_IMAGE = {"image_token_id": 312, "boi_token_id": 314, "eoi_token_id": 316}
SCALED = {
    "rope_type": "yarn",
    "rope_theta": 10_000.0,
    "factor": 4.0,
    "original_max_position_embeddings": CONTEXT,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale_all_dim": 1.0,
    "mscale": 1.0,
    "llama_4_scaling_beta": 0.1,
}
ROPE = {"rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": 24}
LONGROPE = {
    "original_max_position_embeddings": 24,
    "rope_parameters": {"rope_type": "longrope", **ROPE, "short_factor": [1.5] * 16, "long_factor": [4.0] * 16},
}
BANDS = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}

CONFIGS: dict[str, Callable[..., Any]] = {
    "ApertusForCausalLM": lambda **k: tf.ApertusConfig(**GROUPED, **k),
    "CohereForCausalLM": lambda **k: tf.CohereConfig(**GROUPED, logit_scale=0.6, **k),
    "DeepseekV3ForCausalLM": lambda **k: tf.DeepseekV3Config(**SHAPE, num_key_value_heads=2, **ROUTED, **LATENT, **k),
    "Ernie4_5ForCausalLM": lambda **k: tf.Ernie4_5Config(**GROUPED, **HEAD, **k),
    "Exaone4ForCausalLM": lambda **k: tf.Exaone4Config(**GROUPED, **MIXED, sliding_window_pattern=2, **k),
    "GemmaForCausalLM": lambda **k: tf.GemmaConfig(**GROUPED, **HEAD, **k),
    "Gemma2ForCausalLM": lambda **k: tf.Gemma2Config(**GROUPED, **HEAD, **SLIDING, **CAPS, **k),
    "Gemma3ForCausalLM": lambda **k: tf.Gemma3TextConfig(**GROUPED, **HEAD, **MIXED, **k),
    "Gemma3ForConditionalGeneration": lambda **k: tf.Gemma3Config(
        text_config={**GROUPED, **HEAD, **MIXED},
        vision_config={**SIGLIP, "patch_size": 8},
        mm_tokens_per_image=4,
        **GEMMA_IMAGE,
        **k,
    ),
    "Gemma4ForCausalLM": lambda **k: tf.Gemma4TextConfig(
        **GROUPED,
        **HEAD,
        **MIXED,
        vocab_size_per_layer_input=VOCABULARY,
        hidden_size_per_layer_input=16,
        global_head_dim=64,
        **k,
    ),
    "Gemma4ForConditionalGeneration": lambda **k: tf.Gemma4Config(
        text_config={
            **GROUPED,
            **HEAD,
            **MIXED,
            "vocab_size_per_layer_input": VOCABULARY,
            "hidden_size_per_layer_input": 16,
            "global_head_dim": 64,
        },
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "patch_size": 8,
        },
        audio_config=None,
        **GEMMA_IMAGE,
        **k,
    ),
    "Glm4ForCausalLM": lambda **k: tf.Glm4Config(**GROUPED, **HEAD, **k),
    "Glm4MoeForCausalLM": lambda **k: tf.Glm4MoeConfig(**GROUPED, **ROUTED, head_dim=32, use_qk_norm=True, **k),
    "GPT2LMHeadModel": lambda **k: tf.GPT2Config(**GPT2, bos_token_id=1, eos_token_id=1, **k),
    "GptOssForCausalLM": lambda **k: tf.GptOssConfig(
        **GROUPED, **HEAD, **MIXED, num_local_experts=4, num_experts_per_tok=2, **k
    ),
    "GraniteForCausalLM": lambda **k: tf.GraniteConfig(**GROUPED, **FACTORS, **k),
    "GraniteMoeHybridForCausalLM": lambda **k: tf.GraniteMoeHybridConfig(**GROUPED, **FACTORS, **MAMBA, **k),
    "Lfm2ForCausalLM": lambda **k: tf.Lfm2Config(
        **GROUPED, conv_dim=64, block_dim=64, layer_types=["conv", "full_attention"], **k
    ),
    "LlamaForCausalLM": lambda **k: tf.LlamaConfig(**GROUPED, **k),
    "Llama4ForCausalLM": lambda **k: tf.Llama4TextConfig(
        **{**GROUPED, **HEAD, **LLAMA4, **k}, attention_chunk_size=128, no_rope_layers=[1, 0]
    ),
    "Ministral3ForCausalLM": lambda **k: tf.Ministral3Config(**{**GROUPED, **HEAD, "rope_parameters": {**SCALED}, **k}),
    "MistralForCausalLM": lambda **k: tf.MistralConfig(**GROUPED, **HEAD, **SLIDING, **k),
    "Mistral3ForConditionalGeneration": lambda **k: tf.Mistral3Config(
        text_config={**GROUPED, **HEAD, "model_type": "mistral", "sliding_window": None},
        vision_config=PIXTRAL,
        image_token_index=312,
        **k,
    ),
    "MixtralForCausalLM": lambda **k: tf.MixtralConfig(**GROUPED, **SLIDING, num_local_experts=4, **k),
    "NemotronHForCausalLM": lambda **k: tf.NemotronHConfig(
        **{n: v for n, v in GROUPED.items() if n != "num_hidden_layers"},
        **HEAD,
        layers_block_type=["linear_attention", "full_attention", "mlp"],
        ssm_state_size=32,
        mamba_num_heads=4,
        mamba_head_dim=32,
        n_groups=1,
        chunk_size=16,
        **k,
    ),
    "OlmoeForCausalLM": lambda **k: tf.OlmoeConfig(**GROUPED, num_experts=4, num_experts_per_tok=2, **k),
    "Olmo2ForCausalLM": lambda **k: tf.Olmo2Config(**GROUPED, **k),
    "Olmo3ForCausalLM": lambda **k: tf.Olmo3Config(**GROUPED, **MIXED, **k),
    "PhiForCausalLM": lambda **k: tf.PhiConfig(**SHAPE, **k),
    "Phi3ForCausalLM": lambda **k: tf.Phi3Config(**GROUPED, **SLIDING, **k),
    "Qwen2ForCausalLM": lambda **k: tf.Qwen2Config(**GROUPED, **k),
    "Qwen2_5_VLForConditionalGeneration": lambda **k: tf.Qwen2_5_VLConfig(
        text_config={**GROUPED, **MROPE}, vision_config={**QWEN_EYES, "fullatt_block_indexes": [0]}, **IMAGE, **k
    ),
    "Qwen3ForCausalLM": lambda **k: tf.Qwen3Config(**GROUPED, **HEAD, **k),
    "Qwen3MoeForCausalLM": lambda **k: tf.Qwen3MoeConfig(**GROUPED, **HEAD, **EXPERTS, **k),
    "Qwen3NextForCausalLM": lambda **k: tf.Qwen3NextConfig(**GROUPED, **HEAD, **SHARED, **DELTA, **k),
    "Qwen3VLForConditionalGeneration": lambda **k: tf.Qwen3VLConfig(
        text_config={**GROUPED, **HEAD, **MROPE},
        vision_config={**QWEN_EYES, "deepstack_visual_indexes": [0], "num_position_embeddings": 16},
        **IMAGE,
        **k,
    ),
    "Qwen3_5ForCausalLM": lambda **k: tf.Qwen3_5TextConfig(**GROUPED, **HEAD, **DELTA, **PARTIAL, **k),
    "Qwen3_5MoeForCausalLM": lambda **k: tf.Qwen3_5MoeTextConfig(
        **{**GROUPED, **HEAD, **DELTA, **SHARED, **PARTIAL, **k}
    ),
    "Qwen3_5ForConditionalGeneration": lambda **k: tf.Qwen3_5Config(
        text_config={**GROUPED, **HEAD, **DELTA, **PARTIAL, **k},
        vision_config={**QWEN_EYES, "num_position_embeddings": 16},
        **IMAGE,
        **k,
    ),
    "SeedOssForCausalLM": lambda **k: tf.SeedOssConfig(
        **GROUPED, **HEAD, attention_dropout=0.0, residual_dropout=0.0, **k
    ),
    "SmolLM3ForCausalLM": lambda **k: tf.SmolLM3Config(**GROUPED, no_rope_layers=[1, 0], **k),
    "StableLmForCausalLM": lambda **k: tf.StableLmConfig(**GROUPED, **k),
    "Starcoder2ForCausalLM": lambda **k: tf.Starcoder2Config(**GROUPED, **SLIDING, **k),
}

TIED = ("CohereForCausalLM", "Gemma2ForCausalLM", "Lfm2ForCausalLM")
"""vLLM's have no head of their own."""
UNTIED = (
    "DeepseekV3ForCausalLM",
    "Glm4MoeForCausalLM",
    "GptOssForCausalLM",
    "Qwen3NextForCausalLM",
)
"""vLLM's have one always."""
HALF = BFLOAT16_ON_CPU
RECURRENT = (
    "GraniteMoeHybridForCausalLM",
    "Lfm2ForCausalLM",
    "Qwen3NextForCausalLM",
    "Qwen3_5ForCausalLM",
)
"""Their layers hand a state from step to step of the engine."""
