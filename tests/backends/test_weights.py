"""Weights in a format that nothing unpacks are an error before they are scores."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from entrodrop_prep.backends.loading import load_model
from entrodrop_prep.backends.model import ModelInfo, inspect_model
from entrodrop_prep.backends.serve import command_line
from entrodrop_prep.backends.vllm import VllmBackend
from entrodrop_prep.backends.weights import check_left_over, is_scale, stored_in
from entrodrop_prep.config import ServeConfig
from entrodrop_prep.errors import ModelError
from helpers.models import save_model, settings_for, tiny_llama

Tensors = dict[str, torch.Tensor]
PROJECTION = "model.layers.0.mlp.down_proj"
WEIGHT = f"{PROJECTION}.weight"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"), tiny_llama())


def eight_bits(weights: Tensors) -> Tensors:
    weights[WEIGHT] = (weights[WEIGHT] * 100).to(torch.float8_e4m3fn)
    return {**weights, f"{PROJECTION}.weight_scale": torch.tensor(0.01), f"{PROJECTION}.input_scale": torch.tensor(1.0)}


def without_a_scale(weights: Tensors) -> Tensors:
    weights[WEIGHT] = (weights[WEIGHT] * 100).to(torch.float8_e5m2)
    return weights


def integers(weights: Tensors) -> Tensors:
    weights[WEIGHT] = (weights[WEIGHT] * 100).to(torch.int8)
    return {**weights, f"{PROJECTION}.SCB": torch.ones(32)}


def packed(weights: Tensors) -> Tensors:
    rows, columns = weights.pop(WEIGHT).shape
    more = {"qweight": torch.zeros(columns // 8, rows), "qzeros": torch.zeros(1, rows // 8)}
    return {**weights, **{f"{PROJECTION}.{name}": value.int() for name, value in more.items()}}


def four_bits(weights: Tensors) -> Tensors:
    weights[WEIGHT] = torch.zeros(weights[WEIGHT].numel() // 2, 1, dtype=torch.uint8)
    return {**weights, f"{WEIGHT}.absmax": torch.ones(24)}


def scales_alone(weights: Tensors) -> Tensors:
    return {**weights, f"{PROJECTION}.weight_scale_inv": torch.ones(1, 1)}


BROKEN = [
    (eight_bits, f"its weight {WEIGHT} is stored as F8_E4M3"),
    (without_a_scale, f"its weight {WEIGHT} is stored as F8_E5M2"),
    (integers, f"its weight {WEIGHT} is stored as I8"),
    (packed, f"its weight {PROJECTION}.qweight is stored as I32"),
    (four_bits, f"its weight {WEIGHT} is stored as U8"),
    (scales_alone, f"its weights have scales, such as {PROJECTION}.weight_scale_inv"),
]


def changed(model: Path, folder: Path, change: Callable[[Tensors], Tensors], **config: Any) -> Path:
    folder.mkdir()
    for file in model.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    save_file(change(load_file(model / "model.safetensors")), folder / "model.safetensors", metadata={"format": "pt"})
    described = json.loads((model / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**described, **config}))
    return folder


@pytest.mark.parametrize(("change", "says"), BROKEN, ids=lambda value: getattr(value, "__name__", ""))
def test_weights_that_nothing_unpacks(
    model: Path, tmp_path: Path, change: Callable[[Tensors], Tensors], says: str
) -> None:
    """By transformers, by vLLM on this machine, and by a server; the engine is not even started."""
    folder = changed(model, tmp_path / "m", change)
    config = settings_for("-", folder, tmp_path / "out")
    info = inspect_model(config)
    for engine, start in (
        ("transformers", lambda: load_model(config, info)),
        ("vLLM", lambda: VllmBackend(config, info)),
        ("vLLM", lambda: command_line(ServeConfig(model=str(folder)))),
    ):
        with pytest.raises(ModelError) as e:
            start()
        assert str(e.value).startswith(f"m: {says}, which {engine} does not unpack; give the checkpoint in bfloat16")


def test_scales_that_a_quantizer_left_over() -> None:
    info = ModelInfo("m", 97, 128, "float32", quantization="fp8")
    left = [f"{PROJECTION}.input_scale", "model.layers.0.self_attn.k_scale"]
    check_left_over(left, {}, info, "transformers", quantized=True)
    for names, quantized in ((left, False), ([*left, f"{PROJECTION}.weight_scale_inv"], True)):
        with pytest.raises(ModelError, match="its weights have scales that were not used"):
            check_left_over(names, {}, info, "transformers", quantized=quantized)


def test_a_quantization_that_transformers_does_not_know(model: Path, tmp_path: Path) -> None:
    quantized = {"quantization_config": {"quant_method": "modelopt", "quant_algo": "FP8"}}
    config = settings_for("-", changed(model, tmp_path / "m", eight_bits, **quantized), tmp_path / "out")
    with pytest.raises(ModelError, match=r"which transformers does not unpack \(its config.json says modelopt\)"):
        load_model(config, inspect_model(config))


def test_one_that_transformers_unpacks(tmp_path: Path, model: Path) -> None:
    """Blocks in 8 bits with a scale each, as DeepSeek and Qwen publish them."""

    def blocks(weights: Tensors) -> Tensors:
        for name in [name for name in weights if "proj" in name]:
            weights[f"{name}_scale_inv"] = torch.full((1, 1), 0.01)
            weights[name] = (weights[name] * 100).to(torch.float8_e4m3fn)
        return weights

    quantized = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128], "dequantize": True}}
    config = settings_for("-", changed(model, tmp_path / "m", blocks, **quantized), tmp_path / "out")
    loaded, whole = (
        load_model(c, inspect_model(c)).model.layers[0].mlp.down_proj.weight
        for c in (config, settings_for("-", model, tmp_path / "out"))
    )
    torch.testing.assert_close(loaded, whole, rtol=0.1, atol=0.01)


def test_what_is_no_weight_may_be_of_integers(model: Path, tmp_path: Path) -> None:
    """Masks and positions in old checkpoints, a layer's own scale, and the scales of a cache in 8 bits."""
    more = {
        "model.layers.0.attn.bias": torch.ones(1, 1, 4, 4, dtype=torch.uint8),
        "model.position_ids": torch.zeros(1, 9, dtype=torch.int32),
        "model.layers.0.self_attn.k_proj.k_scale": torch.tensor(1.0),
        "logit_scale": torch.tensor(1.0),
    }
    config = settings_for("-", changed(model, tmp_path / "m", lambda weights: {**weights, **more}), tmp_path / "out")
    load_model(config, inspect_model(config))


@pytest.mark.parametrize(
    ("name", "scale"),
    [
        ("a.weight_scale", True),
        ("a.weight_scale_2", True),
        ("a.weight_scale_inv", True),
        ("a.input_scale", True),
        ("experts.gate_up_proj_scales", True),
        ("experts.other_scales", False),
        ("logit_scale", False),
        ("a.qzeros", True),
        ("a.g_idx", True),
        ("a.weight.absmax", True),
        ("a.weight.quant_state.bitsandbytes__nf4", True),
        ("a.weight_zero_point", True),
        ("self_attn.k_scale", False),
        ("self_attn.attn.v_scale", False),
        ("a.scaler.weight", False),
        ("a.layer_scalar", False),
        ("upscale.weight", False),
    ],
)
def test_names_of_scales(name: str, scale: bool) -> None:
    stored = dict.fromkeys(("a.weight", "self_attn.weight", "experts.gate_up_proj"), ("F32", 2))
    assert is_scale(name, stored) == scale


def test_a_damaged_file_is_the_loaders_to_refuse(model: Path, tmp_path: Path) -> None:
    for name, data in (("a", b""), ("b", b"\x05\0\0\0\0\0\0\0{}"), ("c", b"\xff" * 16), ("d", b"\x02\0\0\0\0\0\0\0[]")):
        (tmp_path / f"{name}.safetensors").write_bytes(data)
    assert stored_in(sorted(tmp_path.iterdir())) == {}
    assert stored_in([model / "model.safetensors"])[WEIGHT] == ("F32", 2)
