"""The reduction in Triton against float64, and when it is used; the head of models in half precision."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from entrodrop_prep.backends.model import inspect_model
from entrodrop_prep.backends.prefetch import score_all
from entrodrop_prep.backends.transformers import TransformersBackend
from entrodrop_prep.vllm_plugin.head import give_float32, tf32
from entrodrop_prep.vllm_plugin.reduce import entropy_and_logprob
from helpers.models import save_model, settings_for, tiny_llama
from helpers.warm import OFFLINE

ROOT = Path(__file__).resolve().parents[2]
TOLERANCE = 1e-5
COMPILE = """
import sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from entrodrop_prep.vllm_plugin import fused

arguments = {"targets": "*i64", "entropy": "*fp32", "logprob": "*fp32", "V": "i32", "row_stride": "i64"}
fixed = {"column_stride": 1, "COLUMNS": fused.COLUMNS}
older, newer = ((GPUTarget("cuda", version, 32), fused.WARPS, "cubin") for version in (80, 90))
amd = (GPUTarget("hip", "gfx942", 64), 16, "hsaco")
for kind, targets in {"*fp32": [newer], "*bf16": [older, newer, amd], "*fp16": [amd]}.items():
    signature = {"logits": kind, **arguments, **dict.fromkeys(fixed, "constexpr")}
    source = ASTSource(fused._kernel, signature=signature, constexprs=fixed)
    for target, warps, code in targets:
        print(kind, target.arch, len(triton.compile(source, target=target, options={"num_warps": warps}).asm[code]))
"""


def python(*arguments: str | Path, **environment: str) -> str:
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("fused") / "found.json"
    python(ROOT / "tests" / "programs" / "fused_reduction.py", out, PYTHONPATH=str(ROOT))
    said: dict[str, Any] = json.loads(out.read_text())
    return said


def test_the_kernel_is_that_of_float64(found: dict[str, Any]) -> None:
    assert len(found["cases"]) == 33
    for name, case in found["cases"].items():
        # float32 has 7 digits: a log-probability of -2,000 is known to 1e-4
        scale = 100 if "sharp" in name or "far" in name else 1
        assert case["entropy"] <= TOLERANCE, name
        assert case["logprob"] <= TOLERANCE * scale, name
        assert case["torch"] <= TOLERANCE, name
        assert case["absent"], name
        assert case["dtypes"] == ["torch.float32"], name
        assert all(case["shapes"]), name
        assert case["untouched"], name
    assert found["broken"] == [True, True]


def test_the_kernel_compiles_for_gpus(tmp_path: Path) -> None:
    """Which the interpreter does not show; no GPU is needed for it."""
    lines = python("-c", COMPILE, TRITON_CACHE_DIR=str(tmp_path), PYTHONPATH=str(ROOT)).splitlines()
    assert len(lines) == 5
    assert all(int(line.split()[-1]) > 1000 for line in lines)


def test_without_a_gpu_nothing_is_tried_and_nothing_said(found: dict[str, Any]) -> None:
    name, said, imported = found["cpu"]
    assert (name, said) == ("torch", [])
    assert imported == found["before"]


def test_a_kernel_that_agrees_is_taken(found: dict[str, Any]) -> None:
    name, is_kernel, _, said = found["choice"].pop("it agrees")
    assert name.startswith("triton 3.")
    assert is_kernel
    assert said == []


@pytest.mark.parametrize(
    ("why", "says"),
    [
        ("entropy off", "is off by 1.0e-03 nats"),
        ("logprob off", "is off by 1.0e-03 nats"),
        ("not a number", "is off by nan nats"),
        ("absent target kept", "is off by inf nats"),
        ("no compiler", "does not compile (RuntimeError: Please specify via CC)"),
        ("compilation", "does not compile (TritonError: NameError('Any'))"),
        ("no file", "does not compile (FileNotFoundError: ptxas)"),
        ("no such device", "does not compile (AssertionError: Torch not compiled with CUDA enabled)"),
    ],
)
def test_one_that_does_not_is_left_with_a_warning(found: dict[str, Any], why: str, says: str) -> None:
    name, _, is_torch, said = found["choice"][why]
    assert name == "torch"
    assert is_torch
    assert said == [f"the Triton kernel {says}: logits are reduced by torch, which is slower"]


def test_absent_targets_in_torch() -> None:
    entropy, logprob = entropy_and_logprob(torch.zeros(2, 4), torch.tensor([-1, 3]))
    assert entropy.tolist() == pytest.approx([np.log(4)] * 2)
    assert logprob.isnan().tolist() == [True, False]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [True, False])
def test_a_head_in_half_precision_gives_float32(dtype: torch.dtype, bias: bool) -> None:
    torch.manual_seed(0)
    head = torch.nn.Linear(48, 97, bias=bias, dtype=dtype)
    hidden = torch.randn((2, 5, 48)).to(dtype)
    exact = torch.nn.functional.linear(
        hidden.double(), head.weight.double(), head.bias.double() if bias else None
    ).detach()
    with torch.inference_mode():
        rounded = head(hidden)
        give_float32(head)
        logits = head(hidden)
    assert logits.dtype == torch.float32
    assert logits.shape == (2, 5, 97)
    assert float((logits - exact).abs().max()) < 1e-5
    assert float((rounded - exact).abs().max()) > 1e-4


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_scores_in_half_precision_are_of_logits_that_are_not_rounded(tmp_path: Path, dtype: str) -> None:
    config = settings_for("unused.jsonl", save_model(tmp_path, tiny_llama(97), scale=8.0), tmp_path, dtype=dtype)
    backend = TransformersBackend(config, inspect_model(config))
    assert backend.environment()["head"] == "chunked, float32"
    assert backend.environment()["reduction"] == "torch"
    row = np.arange(5, 35, dtype=np.int32)
    with torch.inference_mode():
        hidden = backend.model.model(torch.from_numpy(row.astype(np.int64))[None]).last_hidden_state[0, :-1]
        exact = (hidden.double() @ backend.model.lm_head.weight.double().t()).log_softmax(-1)
    for backend.chunked_head in (True, False):
        ((entropy, logprob),) = score_all(backend, [row])
        assert np.abs(entropy + (exact.exp() * exact).sum(-1).numpy()).max() < TOLERANCE
        assert (
            np.abs(logprob - exact.gather(1, torch.from_numpy(row[1:].astype(np.int64))[:, None])[:, 0].numpy()).max()
            < 2e-5
        )


@pytest.mark.parametrize("by_user", [None, "ieee", "tf32"])
def test_tf32_is_for_the_block_alone(by_user: str | None) -> None:
    matmul = torch.backends.cuda.matmul
    untouched = matmul.fp32_precision
    try:
        if by_user is not None:
            matmul.fp32_precision = by_user
        before = matmul.fp32_precision
        with tf32():
            assert matmul.fp32_precision == "tf32"
        assert matmul.fp32_precision == before
        with pytest.raises(ZeroDivisionError), tf32():
            raise ZeroDivisionError
        assert matmul.fp32_precision == before
    finally:
        matmul.fp32_precision = untouched


def test_the_benchmark_runs_at_toy_size() -> None:
    command, environment = [sys.executable, ROOT / "benchmarks" / "gpu.py"], {**os.environ, "PYTHONPATH": str(ROOT)}
    said = OFFLINE.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    line = json.loads(said.splitlines()[-1])
    assert {"copy", "bfloat16", "TF32", "float32"} == line["rates"].keys()
    assert all(value > 0 for value in line["rates"].values())
    assert {one["way"] for one in line["reductions"]} >= {"torch"}
    assert all(one["error"] < TOLERANCE and one["ms"] > 0 for one in line["reductions"])
    errors = {one["way"]: one["error"] for one in line["heads"]}
    assert errors["TF32"] < 1e-4 < errors["bfloat16, rounded"]
    assert line["scoring"]["chunked"]
    assert all(step["tokens_per_second"] > 0 for step in line["scoring"]["steps"])
    for title in ("bytes/s of a copy", "reduction; share", "product with the head", "scoring; share"):
        assert title in said
