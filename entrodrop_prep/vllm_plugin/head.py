"""The product with a model's head in float32, where the model is in half precision."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    Product = Callable[[torch.Tensor], torch.Tensor]

HALF = (torch.bfloat16, torch.float16)


@contextmanager
def tf32() -> Iterator[None]:
    """Within the block CUDA multiplies float32 matrices in TF32; after it as before.

    Of factors that are bfloat16 or float16 numbers TF32 drops nothing, and it sums in float32.
    """
    matmul = torch.backends.cuda.matmul
    name, value = ("fp32_precision", "tf32") if hasattr(matmul, "fp32_precision") else ("allow_tf32", True)
    before = getattr(matmul, name)
    setattr(matmul, name, value)
    try:
        yield
    finally:
        setattr(matmul, name, before)


def give_float32(head: Any) -> None:
    """Make a head, a ``torch.nn.Linear`` whose weights are bfloat16 or float16, give float32 logits.

    On CUDA the matrix units do it, by ``torch.mm`` with a float32 result or, before torch 2.8, in TF32. Elsewhere a
    float32 copy of the weights is kept.
    """
    product = _product(head.weight)

    def forward(hidden: torch.Tensor) -> torch.Tensor:
        logits = product(hidden.flatten(0, -2)).view(*hidden.shape[:-1], -1)
        return logits if head.bias is None else logits.add_(head.bias)

    head.forward = forward


def _product(weight: torch.Tensor) -> Product:
    """What gives hidden states [n, D] times weights [V, D] as float32 [n, V]."""
    if not weight.is_cuda:
        copy = weight.detach().float()
        return lambda hidden: hidden.float() @ copy.t()

    def direct(hidden: torch.Tensor) -> torch.Tensor:
        return torch.mm(hidden, weight.t(), out_dtype=torch.float32)

    def converted(hidden: torch.Tensor) -> torch.Tensor:
        with tf32():
            return hidden.float() @ weight.float().t()

    try:
        with torch.inference_mode():
            direct(weight[:1])
    except (RuntimeError, TypeError):  # another GPU, or an older torch
        return converted
    return direct
