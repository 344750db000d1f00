"""Which positions of a model a loss trains, by its gradient: once, or in every batch of a training run."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch


@contextlib.contextmanager
def gradients_recorded(model: Any) -> Iterator[list[torch.Tensor]]:
    """For every forward pass that trains, in order, [B, T] bool: as ``trained_positions``, of the trainer's own loss.

    A pass without a backward pass stays an empty tensor.
    """
    noted: list[torch.Tensor] = []

    def hold(module: Any, args: Any, output: Any) -> None:
        state = output.last_hidden_state
        if not torch.is_grad_enabled():
            return
        place = len(noted)
        noted.append(torch.empty(0, dtype=torch.bool))

        def note(gradient: torch.Tensor) -> None:
            noted[place] = gradient.abs().sum(-1) > 0

        state.register_hook(note)

    hook = model.base_model.register_forward_hook(hold)
    try:
        yield noted
    finally:
        hook.remove()


def check_trained(batches: list[dict[str, Any]], trained: list[torch.Tensor]) -> int:
    """Assert of every batch that exactly the positions before a label were trained; returns how many."""
    assert len(batches) == len(trained)
    for number, (batch, positions) in enumerate(zip(batches, trained, strict=True)):
        labels = torch.as_tensor(batch["labels"])
        assert positions.shape == labels.shape, f"batch {number} was not trained on"
        assert torch.equal(positions[:, :-1], labels[:, 1:] != -100), f"batch {number}"
        assert not positions[:, -1].any(), f"batch {number}"
    return sum(int(positions.sum()) for positions in trained)


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
