"""Running what ``entrodrop recipe`` prints, and noting what reaches the model meanwhile."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from entrodrop_prep import recording
from entrodrop_prep.trainers import recipe
from helpers.gradients import gradients_recorded

Batches = list[dict[str, Any]]
Trained = list[torch.Tensor]


@contextlib.contextmanager
def models_recorded() -> Iterator[tuple[Batches, Trained]]:
    """Every batch with which any model that is loaded inside is trained, and which of its positions were.

    The models stay what they are.
    """
    noted: Batches = []
    trained: Trained = []
    with contextlib.ExitStack() as stack, pytest.MonkeyPatch.context() as patch:
        load = AutoModelForCausalLM.from_pretrained
        found: list[tuple[Batches, Trained]] = []

        def loaded(*args: Any, **options: Any) -> Any:
            model = load(*args, **options)
            found.append((stack.enter_context(recording(model)), stack.enter_context(gradients_recorded(model))))
            return model

        patch.setattr(AutoModelForCausalLM, "from_pretrained", loaded)
        try:
            yield noted, trained
        finally:
            for batches, gradients in found:
                noted += batches
                trained += gradients


def watch_text(text: str, *changes: tuple[str, str]) -> tuple[dict[str, Any], Batches, Trained]:
    """Run a script, some of its text exchanged; its names, the batches that reached its model, and what was trained."""
    for old, new in changes:
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    names: dict[str, Any] = {"__name__": "script"}
    with models_recorded() as (batches, trained):
        exec(compile(text, "recipe", "exec"), names)
    return names, batches, trained


def run_text(text: str, *changes: tuple[str, str]) -> tuple[dict[str, Any], Batches]:
    """As ``watch_text``, without what was trained."""
    return watch_text(text, *changes)[:2]


def run_recipe(trainer: str, *changes: tuple[str, str]) -> tuple[dict[str, Any], Batches]:
    """As ``run_text``, of the recipe for the directory ``masked``."""
    return run_text(recipe(trainer, "masked"), *changes)
