"""GPT-2 for M models at once: each parameter has a leading dimension M, so that a GPU trains many runs together.

``tests/study`` compares its logits and its steps with those of transformers.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

Weights = dict[str, Tensor]
Network = Callable[[Weights, Tensor, Tensor | None], Tensor]
"""What gives logits [M, B, T, V] as ``logits`` does."""
HEAD = 32
"""Width of a head."""


def repeated(start: Weights, models: int, device: str) -> Weights:
    """Weights [M, ...] of so many models that all begin with ``start``."""
    return {name: w.to(device).float().expand(models, *w.shape).clone().requires_grad_() for name, w in start.items()}


def logits(weights: Weights, ids: Tensor, dropout: Tensor | None = None) -> Tensor:
    """Logits [M, B, T, V] of ids [M, B, T]; ``dropout`` [M] is the share of hidden units zeroed, None for none."""
    models, batch, length = ids.shape
    table = weights["transformer.wte.weight"]
    x = torch.gather(table, 1, ids.reshape(models, -1, 1).expand(-1, -1, table.shape[2])).view(
        models, batch, length, -1
    )
    x = _dropped(x + weights["transformer.wpe.weight"][:, None, :length], dropout)
    layers = 1 + max(int(name.split(".")[2]) for name in weights if ".h." in name)
    for layer in range(layers):
        at = f"transformer.h.{layer}."
        y = _linear(_norm(x, weights, f"{at}ln_1"), weights, f"{at}attn.c_attn")
        q, k, v = (part.view(models, batch, length, -1, HEAD).transpose(2, 3) for part in y.chunk(3, -1))
        merged = (part.reshape(-1, *part.shape[2:]) for part in (q, k, v))
        y = F.scaled_dot_product_attention(*merged, is_causal=True).view(models, batch, -1, length, HEAD)
        y = _linear(y.transpose(2, 3).reshape(models, batch, length, -1), weights, f"{at}attn.c_proj")
        x = x + _dropped(y, dropout)
        y = _linear(_norm(x, weights, f"{at}ln_2"), weights, f"{at}mlp.c_fc")
        y = _linear(F.gelu(y, approximate="tanh"), weights, f"{at}mlp.c_proj")
        x = x + _dropped(y, dropout)
    x = _norm(x, weights, "transformer.ln_f")
    return torch.bmm(x.view(models, batch * length, -1), table.transpose(1, 2)).view(models, batch, length, -1)


def _linear(x: Tensor, weights: Weights, name: str) -> Tensor:
    models = x.shape[0]
    flat = x.reshape(models, -1, x.shape[-1])
    y = torch.baddbmm(weights[f"{name}.bias"][:, None], flat, weights[f"{name}.weight"])
    return y.view(*x.shape[:-1], -1)


def _norm(x: Tensor, weights: Weights, name: str) -> Tensor:
    scale, shift = (weights[f"{name}.{part}"][:, None, None] for part in ("weight", "bias"))
    return F.layer_norm(x, x.shape[-1:], eps=1e-5) * scale + shift


def _dropped(x: Tensor, share: Tensor | None) -> Tensor:
    if share is None:
        return x
    kept = 1 - share.view(-1, *[1] * (x.dim() - 1))
    return x * (torch.rand_like(x) < kept) / kept


def of_transformers(directory: Path, device: str) -> tuple[Network, Weights]:
    """Any causal model of transformers as a network without dropout, in bfloat16 on a GPU, and its float32 weights."""
    from torch.func import functional_call
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).to(device).eval()

    def network(weights: Weights, ids: Tensor, dropout: Tensor | None = None) -> Tensor:
        if dropout is not None:
            raise ValueError("dropout is an arm of the study's own network only")
        with torch.autocast("cuda", torch.bfloat16, enabled=device == "cuda"):
            found = [
                functional_call(model, {n: w[i] for n, w in weights.items()}, (one,), {"use_cache": False}).logits
                for i, one in enumerate(ids)
            ]
        return torch.stack(found).float()

    return network, {n: w.detach() for n, w in model.named_parameters()}
