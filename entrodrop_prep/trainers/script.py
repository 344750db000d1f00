"""What the Python scripts of several recipes have in common."""

from __future__ import annotations

from entrodrop_prep.store.schema import masked_schema
from entrodrop_prep.trainers import notes
from entrodrop_prep.trainers.facts import Facts
from entrodrop_prep.trainers.template import fill, names, text
from entrodrop_prep.training.losses import COLUMN

CHECKED = 100  # batches that are compared with the files before training
POSITIONS = "position_ids"
COLLATE = '''#? !divides
def collate(rows):
    """Rows behind each other: the model keeps documents apart by position_ids, and only without attention_mask."""
    names = ("input_ids", "labels", "position_ids")
    batch = {name: torch.tensor([[x for row in rows for x in row[name]]]) for name in names}
    if "n_trainable" in rows[0]:  #? divides
        batch["n_trainable"] = torch.tensor([row["n_trainable"] for row in rows])  #? divides
    return batch


'''


def script(
    facts: Facts, what: str, template: str, batch: int, accumulate: int = 1, *, can_keep_apart: bool = False
) -> str:
    """A whole script: its notes, and the template with the dataset's values in it.

    Lines of the template may depend on ``divides`` (the loss is divided by the trainable tokens before dropping), on
    ``validates`` (there is a split ``validation``), on ``apart`` (rows are packed, and the documents of one are kept
    apart by ``$collate``), on ``selects`` (the first or the third needs a column) and on ``pads`` (the first only).

    Args:
        facts: of the dataset.
        what: paragraph on the trainer and on how to run the script.
        template: the code: see ``template.fill``.
        batch: rows in a batch.
        accumulate: batches in an optimizer step.
        can_keep_apart: whether the template has ``$collate``. A packed row is then a batch, with as many more to a
            step: the attention takes memory by the square of the tokens in a batch.
    """
    apart = can_keep_apart and facts.packed is not None and POSITIONS in facts.columns
    if apart:
        batch, accumulate = 1, batch * accumulate
    steps, epochs = facts.steps(batch, accumulate), len(facts.epochs)
    divides = COLUMN in facts.columns and facts.drops_labels
    usual = ["input_ids", "labels", POSITIONS] if apart else masked_schema().names
    columns = [*usual, *([COLUMN] if divides else [])]
    values: dict[str, str | int] = {
        "masked": text(facts.directory),
        "model": text(facts.model),
        "trained": text(facts.out_of("")),
        "batch": batch,
        "accumulate": accumulate,
        "save_steps": max(1, steps // (10 * epochs)),
        "eval_steps": max(1, steps // epochs),
        "checked": CHECKED,
        "columns": f".select_columns({names(columns)})" if facts.columns else "",
        "held_out_columns": f".select_columns({names(usual)})" if facts.columns else "",
    }
    holds = {"divides": divides, "validates": facts.validation_rows is not None, "apart": apart}
    holds |= {"selects": divides or apart, "pads": divides and not apart}
    values |= {
        "collate": fill(COLLATE, {}, holds) if apart else "",
        "seq2seq": "" if apart else "DataCollatorForSeq2Seq, ",
    }
    return f"{notes.head(facts, what, batch, accumulate, divides=True, apart=apart)}\n{fill(template, values, holds)}"
