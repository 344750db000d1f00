"""From the facts of a dataset to a recipe: notes as a comment, and the trainer's template with the values in it."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from entrodrop_prep.errors import ConfigError
from entrodrop_prep.export.derived import CONCATENATED, SAVED
from entrodrop_prep.store.schema import masked_schema
from entrodrop_prep.trainers import notes
from entrodrop_prep.trainers.facts import Facts
from entrodrop_prep.trainers.quote import literal
from entrodrop_prep.trainers.table import TRAINERS, Trainer
from entrodrop_prep.training.losses import COLUMN

TEMPLATES = Path(__file__).parent / "templates"
POSITIONS = "position_ids"
CHECKED = 100
"""Batches that are compared with the files before training."""


def render(name: str, facts: Facts) -> str:
    """The recipe for a trainer of ``TRAINERS``.

    Raises ConfigError where the copy of the rows that it reads is missing, and for a setting that it has not.
    """
    trainer = TRAINERS[name]
    if facts.training.lora and trainer.no_lora:
        raise ConfigError(f"--lora: {trainer.no_lora}", fix="leave it out, or take another trainer")
    values = _values(name, trainer, facts)
    head = notes.head(facts, trainer, values["batch"], values["accumulate"], apart=values["apart"])
    return f"{head}\n{fill(f'{name}.{trainer.form}.j2', values)}"


def fill(template: str, values: dict[str, Any]) -> str:
    """A file of ``TEMPLATES`` with ``values`` in it, each quoted in the form that the file's name says."""
    import jinja2

    form = template.split(".")[-2]
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        finalize=partial(literal, form=form),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template(template).render(values)


def _values(name: str, trainer: Trainer, facts: Facts) -> dict[str, Any]:
    """What templates may name.

    ``divides``: the loss is divided by the trainable tokens before dropping. ``apart``: rows are packed, and the
    documents of one are kept apart. ``columns`` and ``held_out_columns``: those to select of either split, where there
    are more than the usual. The others that are not names of settings are numbers of steps.
    """
    apart = trainer.keeps_apart and facts.packed is not None and POSITIONS in facts.columns
    batch, accumulate = (1, trainer.batch * trainer.accumulate) if apart else (trainer.batch, trainer.accumulate)
    batch, accumulate = facts.training.batch_size or batch, facts.training.grad_accum or accumulate
    steps, epochs = facts.steps(batch, accumulate), len(facts.epochs)
    divides = trainer.divides and COLUMN in facts.columns and facts.drops_labels
    usual = ["input_ids", "labels", POSITIONS] if apart else masked_schema().names
    return {
        "masked": facts.directory,
        "saved": _saved(facts, trainer.reads_saved) if trainer.reads_saved else None,
        "model": facts.model,
        "trained": facts.out_of(name, ""),
        "out": facts.out_of(name, facts.model),
        "longest": 1 << 17 if facts.longest is None else facts.longest,  # a limit that cuts no row
        "batch": batch,
        "accumulate": accumulate,
        "lr": facts.training.lr,
        "lora": facts.training.lora,
        "dtype": facts.training.dtype,
        "epoch_steps": max(1, steps // epochs),
        "run_tenth": -(-steps // 10),
        "run_twentieth": max(1, steps // 20),
        "checked": CHECKED,
        "columns": [*usual, *([COLUMN] if divides else [])] if facts.columns else None,
        "held_out_columns": usual if facts.columns else None,
        "divides": divides,
        "apart": apart,
        "validates": facts.validation_rows is not None,
    }


def _saved(facts: Facts, trainer: str) -> str:
    """Path of the copy that ``save_to_disk`` made. Raises ConfigError where there is none."""
    if CONCATENATED not in facts.layouts:
        raise ConfigError(
            f"there is no {SAVED}, the copy that {trainer} reads",
            where=facts.directory,
            fix=f"run the same `entrodrop materialize` again with --layout {CONCATENATED} added",
        )
    return f"{facts.directory.rstrip('/')}/{SAVED}"
