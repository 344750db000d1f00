"""The Triton kernel in Triton's interpreter, and the choice between it and torch. ``... fused_reduction.py OUT``

Triton reads TRITON_INTERPRET when it is imported, so this is a process of its own. Writes what was found as JSON.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"

import torch

from entrodrop_prep.vllm_plugin import reduce

CPU = torch.device("cpu")
LEFT_OUT = -torch.inf


def padded(n: int, vocabulary: int, dtype: torch.dtype) -> torch.Tensor:
    """Logits [n, vocabulary] that are columns of a wider tensor, with numbers beyond that would count for much."""
    wide = torch.randn((n, vocabulary + 61)).mul_(4).to(dtype)
    wide[:, vocabulary:] = 1e3
    return wide[:, :vocabulary]


def with_holes(logits: torch.Tensor) -> torch.Tensor:
    """Most tokens of the first rows impossible, as far as whole blocks of columns."""
    logits[0, 1:] = LEFT_OUT
    logits[1, : logits.shape[1] // 2] = LEFT_OUT
    logits[2, ::3] = LEFT_OUT
    return logits


CASES: dict[str, Callable[[torch.dtype], torch.Tensor]] = {
    "one token": lambda dtype: torch.randn((3, 1)).to(dtype),
    "one block": lambda dtype: torch.randn((4, 4096)).mul_(4).to(dtype),
    "does not divide": lambda dtype: torch.randn((5, 9001)).mul_(4).to(dtype),
    "no rows": lambda dtype: torch.randn((0, 5)).to(dtype),
    "padded": lambda dtype: padded(3, 5003, dtype),
    "columns apart": lambda dtype: torch.randn((5003, 3)).mul_(4).to(dtype).t(),
    "every second row and column": lambda dtype: torch.randn((6, 2 * 1009)).mul_(4).to(dtype)[::2, ::2],
    "impossible tokens": lambda dtype: with_holes(torch.randn((4, 9001)).mul_(4).to(dtype)),
    "sharp": lambda dtype: torch.randn((4, 5003)).mul_(300).to(dtype),
    "far from zero": lambda dtype: torch.randn((4, 5003)).add_(1000).to(dtype),
    "lowest numbers": lambda dtype: torch.full((2, 77), torch.finfo(dtype).min, dtype=dtype),
}


def differences(fused: Any, make: Callable[[torch.dtype], torch.Tensor], dtype: torch.dtype) -> dict[str, Any]:
    """From float64: the largest differences of entropies and log-probabilities; the first target is absent."""
    torch.manual_seed(0)
    logits = make(dtype)
    before = logits.clone()
    n, vocabulary = logits.shape
    targets = torch.randint(vocabulary, (2 * n,))[::2]
    targets[:1] = -1
    entropy, logprob = fused(logits, targets)
    exact = logits.double().log_softmax(-1)
    wanted = -(exact.exp() * exact).nan_to_num(0.0).sum(-1)
    chosen = exact.gather(1, targets.clamp_min(0)[:, None])[:, 0]
    apart = torch.where(logprob == chosen, 0.0, (logprob - chosen).abs())
    return {
        "entropy": float((entropy - wanted).abs().amax()) if n else 0.0,
        "logprob": float(apart[1:].amax()) if n > 1 else 0.0,
        "absent": bool(logprob[:1].isnan().all()),
        "dtypes": sorted({str(entropy.dtype), str(logprob.dtype)}),
        "shapes": [list(entropy.shape) == [n], list(logprob.shape) == [n]],
        "untouched": bool(torch.equal(logits, before)),
        "torch": float((torch.stack(reduce.entropy_and_logprob(before, targets))[0] - wanted).abs().amax())
        if n
        else 0.0,
    }


def main(out: Path) -> None:
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("entrodrop_prep").addHandler(handler)
    found: dict[str, Any] = {"before": "triton" in sys.modules}
    found["cpu"] = [reduce.choose_reduction(CPU, 100, torch.bfloat16)[1], list(said), "triton" in sys.modules]

    from triton.errors import TritonError

    from entrodrop_prep.vllm_plugin import fused

    ours = fused.entropy_and_logprob
    found["cases"] = {
        f"{name}, {str(dtype).removeprefix('torch.')}": differences(ours, make, dtype)
        for name, make in CASES.items()
        for dtype in (torch.float32, torch.bfloat16, torch.float16)
    }
    broken = [[torch.nan, 0.0], [torch.inf, 0.0], [LEFT_OUT, LEFT_OUT]]
    found["broken"] = [x.isnan().all().item() for x in ours(torch.tensor(broken), torch.tensor([1, 1, 1]))]

    # The probe, its tensors on the CPU: what it takes for a GPU is none here.
    real = reduce._disagreement
    reduce._disagreement = lambda f, device, *more: real(f, CPU, *more)

    def choose(kernel: Any) -> list[Any]:
        fused.entropy_and_logprob = kernel
        said.clear()
        reduction, name = reduce.choose_reduction(torch.device("cuda"), 5003, torch.bfloat16)
        return [name, reduction is kernel, reduction is reduce.entropy_and_logprob, list(said)]

    def fails(error: Exception) -> Any:
        def kernel(logits: Any, targets: Any) -> Any:
            raise error

        return kernel

    def off(by: float, at: int) -> Any:
        def kernel(logits: Any, targets: Any) -> Any:
            pair = ours(logits, targets)
            pair[at][-1] += by
            return pair

        return kernel

    found["choice"] = {
        "it agrees": choose(ours),
        "entropy off": choose(off(1e-3, 0)),
        "logprob off": choose(off(1e-3, 1)),
        "not a number": choose(off(float("nan"), 1)),
        "absent target kept": choose(lambda z, t: tuple(x.nan_to_num(0.0) for x in ours(z, t))),
        "no compiler": choose(fails(RuntimeError("Failed to find C compiler.\nPlease specify via CC"))),
        "compilation": choose(fails(TritonError("at 2:12:\n    logits: Any,\n            ^\nNameError('Any')"))),
        "no file": choose(fails(FileNotFoundError("ptxas"))),
    }
    reduce._disagreement = real
    found["choice"]["no such device"] = choose(ours)
    out.write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
