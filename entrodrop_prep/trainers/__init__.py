"""Ready configurations of trainers for a masked dataset: a table of them, and a template for each."""

from __future__ import annotations

import difflib

from entrodrop_prep.errors import ConfigError
from entrodrop_prep.trainers.facts import Facts, read_facts
from entrodrop_prep.trainers.rendering import render
from entrodrop_prep.trainers.table import TRAINERS


def recipe(trainer: str, directory: str, train_model: str | None = None) -> str:
    """What makes a trainer read a masked directory as it was written: a script, or a file of settings.

    Args:
        trainer: one of ``TRAINERS``.
        directory: what ``materialize`` wrote.
        train_model: the model to train, a directory or a Hub id; compared with what the rows were made for. Without it
            the recipe names ``base-model``.

    Returns:
        The text of the script or file of settings.

    Raises:
        ConfigError: the trainer is not known, or the model's vocabulary lacks ids of the rows.
        ModelError: the model cannot be read.
        IntegrityError: the directory is not what was written.
    """
    check_trainer(trainer)
    return recipe_of(trainer, read_facts(directory, train_model))


def recipe_of(trainer: str, facts: Facts) -> str:
    """As ``recipe``, of facts that are known already. Raises ConfigError for a trainer that is not known."""
    check_trainer(trainer)
    return render(trainer, facts)


def check_trainer(trainer: str) -> None:
    """Raises ConfigError for a trainer that is not known."""
    if trainer not in TRAINERS:
        near = difflib.get_close_matches(trainer, TRAINERS, n=1)
        fix = f"did you mean {near[0]}?" if near else f"there are: {', '.join(TRAINERS)}"
        raise ConfigError(f"unknown trainer {trainer!r}", fix=fix)
