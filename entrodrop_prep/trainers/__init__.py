"""Ready configurations of trainers for a masked dataset: a table of them, and a template for each."""

from __future__ import annotations

import difflib
from dataclasses import replace

from entrodrop_prep.config import TrainingConfig
from entrodrop_prep.errors import ConfigError
from entrodrop_prep.trainers.facts import Facts, read_facts
from entrodrop_prep.trainers.rendering import render
from entrodrop_prep.trainers.table import TRAINERS


def recipe(trainer: str, directory: str, train_model: str | None = None, training: TrainingConfig | None = None) -> str:
    """What makes a trainer read a masked directory as it was written: a script, or a file of settings.

    Args:
        trainer: one of ``TRAINERS``.
        directory: what ``materialize`` wrote.
        train_model: the model to train, a directory or a Hub id; compared with what the rows were made for. Without it
            the recipe names ``base-model``.
        training: batch, learning rate and so on; None for the defaults.

    Returns:
        The text of the script or file of settings.

    Raises:
        ConfigError: the trainer is not known or has no such setting, or the model's vocabulary lacks ids of the rows.
        ModelError: the model cannot be read.
        IntegrityError: the directory is not what was written.
    """
    check_trainer(trainer)
    facts = read_facts(directory, train_model)
    return recipe_of(trainer, replace(facts, training=training or TrainingConfig()))


def recipe_of(trainer: str, facts: Facts) -> str:
    """As ``recipe``, of facts that are known already."""
    check_trainer(trainer)
    return render(trainer, facts)


def check_trainer(trainer: str) -> None:
    """Raises ConfigError for a trainer that is not known."""
    if trainer not in TRAINERS:
        near = difflib.get_close_matches(trainer, TRAINERS, n=1)
        fix = f"did you mean {near[0]}?" if near else f"there are: {', '.join(TRAINERS)}"
        raise ConfigError(f"unknown trainer {trainer!r}", fix=fix)
