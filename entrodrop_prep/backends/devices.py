"""What depends on the device that a model runs on: memory, waiting, attention, compiling."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from entrodrop_prep.errors import ModelError

if TYPE_CHECKING:
    from entrodrop_prep.backends import Scores


def pick_device(name: str) -> torch.device:
    """The device that ``--device`` means. Raises ModelError where it is not there."""
    have = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        name = next(d for d in ("cuda", "mps", "cpu") if have[d])
    if not have[name]:
        raise ModelError(
            f"--device {name}: torch {torch.__version__} sees none here",
            fix=f"use one of: {', '.join(d for d, there in have.items() if there)}",
        )
    return torch.device(name)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory ran out, on any device."""
    text = str(error).lower()
    signs = ("out of memory", "can't allocate memory", "cublas_status_alloc_failed")
    return isinstance(error, torch.OutOfMemoryError) or any(sign in text for sign in signs)


class Computing:
    """Scores of a batch that a device may still be computing.

    Args:
        scores: [2, N] float32, entropy and log-probability of the rows one after the other.
        lengths: [B], tokens of the rows: N is their sum less B.
    """

    def __init__(self, scores: torch.Tensor, lengths: np.ndarray[Any, Any]) -> None:
        self._ends = np.cumsum(lengths - 1)[:-1]
        self._copied: Any = None
        if scores.is_cuda:
            scores = torch.empty_like(scores, device="cpu", pin_memory=True).copy_(scores, non_blocking=True)
            self._copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._copied.record()
        self._host = scores

    def scores(self) -> list[Scores]:
        """Wait for them; those of each row."""
        if self._copied is not None:
            self._copied.synchronize()
        entropy, logprob = self._host.numpy().copy()
        return list(zip(np.split(entropy, self._ends), np.split(logprob, self._ends), strict=True))


def without_cudnn_attention(chunks: Iterator[Any]) -> Iterator[Any]:
    """What ``chunks`` gives, made without cuDNN's attention: it plans longer for each shape than it runs."""
    before = torch.backends.cuda.cudnn_sdp_enabled()  # type: ignore[no-untyped-call]
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield from chunks
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


def check_compiles(device: torch.device) -> None:
    """Raises ModelError for a device for which layers are not compiled."""
    if device.type != "cuda":
        raise ModelError(f"--compile is for CUDA GPUs, the device is {device.type}", fix="leave it out")


def compile_layers(model: Any, name: str, backend: Any = "inductor") -> None:
    """Have torch compile the layers of a model when they are first called, once for all that are alike.

    For any number of rows and columns, and without choices by timing, so that a run that is resumed computes the same.
    Raises ModelError for a model whose class does not say what its layers are.
    """
    names = getattr(model, "_no_split_modules", None) or ()
    layers = [module for module in model.modules() if type(module).__name__ in names]
    if not layers:
        raise ModelError("--compile: its class does not say what its layers are", where=name, fix="leave it out")
    from torch._inductor import config as inductor

    options = {"deterministic": True} if backend == "inductor" and hasattr(inductor, "deterministic") else None
    for layer in layers:
        layer.compile(dynamic=True, backend=backend, options=options)
