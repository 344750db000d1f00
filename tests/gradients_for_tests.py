"""Which positions of a model a loss trains, by its gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def trained_positions(model: Any, loss_of: Callable[[], torch.Tensor]) -> torch.Tensor:
    """[B, T] bool: whether the loss has a gradient by the last hidden state at t, which only the logits at t come from.

    The hidden state and not the logits, as some trainers never build them.
    """
    held: list[torch.Tensor] = []

    def hold(module: Any, args: Any, output: Any) -> None:
        output.last_hidden_state.retain_grad()
        held.append(output.last_hidden_state)

    hook = model.base_model.register_forward_hook(hold)
    try:
        loss_of().backward()
    finally:
        hook.remove()
    (state,) = held
    assert state.grad is not None
    return state.grad.abs().sum(-1) > 0
