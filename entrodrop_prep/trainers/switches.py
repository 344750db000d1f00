"""What recipes have in common that are not scripts of transformers' kind."""

from __future__ import annotations

from entrodrop_prep.errors import ConfigError
from entrodrop_prep.export.derived import CONCATENATED, SAVED
from entrodrop_prep.trainers import notes
from entrodrop_prep.trainers.facts import Facts
from entrodrop_prep.trainers.template import fill, text


def settings(facts: Facts, what: str, template: str, batch: int, accumulate: int = 1, **values: str | int) -> str:
    """Notes and a template with the dataset's values in it: ``$masked``, ``$model``, ``$trained``, ``$out``,
    ``$longest``, ``$batch``, ``$accumulate``, ``$save_steps`` (about ten checkpoints in all), and ``values``.

    Lines of the template may depend on ``validates``: there is a split ``validation``.
    """
    common: dict[str, str | int] = {
        "masked": text(facts.directory),
        "model": text(facts.model),
        "trained": text(facts.out_of("")),
        "out": text(facts.out),
        "longest": 1 << 17 if facts.longest is None else facts.longest,  # a limit that cuts no row
        "batch": batch,
        "accumulate": accumulate,
        "save_steps": max(1, facts.steps(batch, accumulate) // 10),
    }
    comment = notes.head(facts, what, batch, accumulate, divides=False)
    return f"{comment}\n{fill(template, {**common, **values}, {'validates': facts.validation_rows is not None})}"


def saved_rows(facts: Facts, trainer: str) -> str:
    """Path of the copy that ``save_to_disk`` made, for trainers that read nothing else.

    Raises ConfigError where there is none.
    """
    if CONCATENATED not in facts.layouts:
        raise ConfigError(
            f"there is no {SAVED}, the copy that {trainer} reads",
            where=facts.directory,
            fix=f"run the same `entrodrop materialize` again with --layout {CONCATENATED} added",
        )
    return f"{facts.directory.rstrip('/')}/{SAVED}"
