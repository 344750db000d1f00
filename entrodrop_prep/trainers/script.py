"""What the Python scripts of several recipes have in common."""

from __future__ import annotations

import json

from entrodrop_prep.losses import COLUMN
from entrodrop_prep.schema import masked_schema
from entrodrop_prep.trainers import notes
from entrodrop_prep.trainers.facts import Facts
from entrodrop_prep.trainers.template import fill, text

CHECKED = 100  # batches that are compared with the files before training


def script(facts: Facts, what: str, template: str, batch: int, accumulate: int = 1) -> str:
    """A whole script: its notes, and the template with the dataset's values in it.

    Lines of the template may depend on ``divides`` (the loss is divided by the trainable tokens before dropping) and on
    ``validates`` (there is a split ``validation``).

    Args:
        facts: of the dataset.
        what: paragraph on the trainer and on how to run the script.
        template: the code: see ``template.fill``.
        batch: rows in a batch.
        accumulate: batches in an optimizer step.
    """
    steps, epochs = facts.steps(batch, accumulate), len(facts.epochs)
    divides = COLUMN in facts.columns and facts.drops_labels
    usual = masked_schema().names
    columns = [*usual, *([COLUMN] if divides else [])]
    values: dict[str, str | int] = {
        "masked": text(facts.directory),
        "model": text(facts.model),
        "digest": facts.short_digest,
        "batch": batch,
        "accumulate": accumulate,
        "save_steps": max(1, steps // (10 * epochs)),
        "eval_steps": max(1, steps // epochs),
        "checked": CHECKED,
        "columns": f".select_columns({json.dumps(columns)})" if facts.columns else "",
        "held_out_columns": f".select_columns({json.dumps(usual)})" if facts.columns else "",
    }
    holds = {"divides": divides, "validates": facts.validation_rows is not None}
    return f"{notes.head(facts, what, batch, accumulate, divides=True)}\n{fill(template, values, holds)}"
