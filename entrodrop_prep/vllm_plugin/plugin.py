"""The vLLM plugin: makes a token-entropy variant of each language model that vLLM knows.

vLLM calls ``register`` in each of its processes, and in those of every other vLLM program in the environment. So it
does nothing but add names: a variant is made when a run asks for it (``--hf-overrides '{"architectures":
["TokenEntropyLlamaForCausalLM"]}' --runner pooling``), and no name that vLLM had is touched.
"""

from __future__ import annotations

PREFIX = "TokenEntropy"
MULTIMODAL = "ForConditionalGeneration"
"""What a multimodal model with a causal language model in it is called; encoder-decoders are too."""
ENDINGS = ("ForCausalLM", "LMHeadModel", MULTIMODAL)
VERSION_MARK = "__"


def register() -> None:
    """Add ``TokenEntropy<Architecture>`` for every language model of this vLLM; a second call does nothing."""
    from vllm import ModelRegistry, __version__
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    known = list(ModelRegistry.get_supported_archs())
    # vLLM keeps what it learns of a class in a cache keyed by the class's name and this package's file, not by its own
    # version: the name of the class, not of the architecture, carries it.
    version = "".join(c if c.isalnum() else "_" for c in __version__)
    for architecture in known:
        name = PREFIX + architecture
        if architecture.startswith(PREFIX) or not architecture.endswith(ENDINGS) or name in known:
            continue
        ModelRegistry.register_model(name, f"entrodrop_prep.vllm_plugin.models:{name}{VERSION_MARK}{version}")
        if architecture in MODELS_CONFIG_MAP:  # adjustments that vLLM looks up by the architecture's name
            MODELS_CONFIG_MAP[name] = MODELS_CONFIG_MAP[architecture]
