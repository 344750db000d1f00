"""Running what ``entrodrop recipe`` prints, and noting what reaches the model meanwhile."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from entrodrop_prep import recording
from entrodrop_prep.trainers import recipe

Batches = list[dict[str, Any]]


@contextlib.contextmanager
def models_recorded() -> Iterator[Batches]:
    """Every batch with which any model that is loaded inside is trained; the models stay what they are."""
    noted: Batches = []
    with contextlib.ExitStack() as stack, pytest.MonkeyPatch.context() as patch:
        load = AutoModelForCausalLM.from_pretrained
        found: list[Batches] = []

        def loaded(*args: Any, **options: Any) -> Any:
            model = load(*args, **options)
            found.append(stack.enter_context(recording(model)))
            return model

        patch.setattr(AutoModelForCausalLM, "from_pretrained", loaded)
        try:
            yield noted
        finally:
            noted += [batch for batches in found for batch in batches]


def run_text(text: str, *changes: tuple[str, str]) -> tuple[dict[str, Any], Batches]:
    """Run a script, some of its text exchanged; its names, and the batches that reached its model."""
    for old, new in changes:
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    names: dict[str, Any] = {"__name__": "script"}
    with models_recorded() as batches:
        exec(compile(text, "recipe", "exec"), names)
    return names, batches


def run_recipe(trainer: str, *changes: tuple[str, str]) -> tuple[dict[str, Any], Batches]:
    """As ``run_text``, of the recipe for the directory ``masked``."""
    return run_text(recipe(trainer, "masked"), *changes)
