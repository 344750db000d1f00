"""What every recipe says beside its settings, as lines of comments; ``#`` begins one in Python and in YAML."""

from __future__ import annotations

import textwrap

from entrodrop_prep.export.card import aligned
from entrodrop_prep.terminal.text import printable
from entrodrop_prep.trainers.facts import PLACEHOLDER, Facts
from entrodrop_prep.trainers.table import Trainer
from entrodrop_prep.training.losses import COLUMN


def comment(*paragraphs: str) -> str:
    """Paragraphs as comment lines of at most 118 characters. A paragraph that begins with two spaces is kept.

    A name in one may hold line ends, those of YAML too: nothing behind them gets out of the comment.
    """
    lines = []
    for paragraph in map(printable, paragraphs):
        kept = not paragraph or paragraph.startswith("  ")
        lines += [paragraph] if kept else textwrap.wrap(paragraph, 116, break_long_words=False, break_on_hyphens=False)
    return "".join(f"# {line}".rstrip() + "\n" for line in lines)


def head(facts: Facts, trainer: Trainer, batch: int, accumulate: int, *, apart: bool) -> str:
    """The comment a recipe begins with: what is trained on, how many steps that takes, and what to know of it.

    Args:
        facts: of the dataset, and how to train on it.
        trainer: with which the recipe trains.
        batch: rows in a batch.
        accumulate: batches in an optimizer step.
        apart: whether it keeps the documents of a packed row apart.
    """
    adapters = " peft" if facts.training.lora and trainer.peft_apart else ""
    return comment(
        f"pip install {trainer.install}{adapters}",
        trainer.what,
        *placeholder(facts),
        "",
        *(f"note: {note}" for note in facts.notes),
        *table(facts),
        *steps(facts, batch, accumulate, whole=trainer.leaves_rest),
        *rising(facts),
        *weight(facts, divides=trainer.divides),
        *precision(facts, masters=trainer.masters),
        *untrained(facts),
        *lengths(facts, apart=apart),
    )


def table(facts: Facts) -> list[str]:
    """The epochs' figures. *Kept* is the share of the trainable tokens that has its label."""
    rows = [["epoch", "rows", "tokens", "trainable", "dropped", "labels left", "kept"]]
    for e in facts.epochs:
        figures = [f"{n:,}" for n in (e.rows, e.tokens, e.trainable)]
        rows.append([e.folder, *figures, f"{e.dropped_share:.1%}", f"{e.labels_left:,}", f"{e.kept_share:.1%}"])
    return [f"  {line}" for line in aligned(rows)]


def steps(facts: Facts, batch: int, accumulate: int, *, whole: bool) -> list[str]:
    """How many optimizer steps one pass takes, and whether one holds the rows of two epochs."""
    per_step = batch * accumulate
    product = f"{batch} x {accumulate} = {per_step}" if accumulate > 1 else str(batch)
    whole = whole and accumulate > 1
    said = [
        f"{facts.rows:,} rows, {product} in an optimizer step of one process: {facts.rows:,} / {per_step}, rounded "
        f"{'down' if whole else 'up'}, = {facts.steps(batch, accumulate, whole=whole):,} steps. With P processes a "
        "step holds P times as many rows."
    ]
    if whole:
        said.append("Batches at the end that are too few for a step are not trained on.")
    if any(e.rows % per_step for e in facts.epochs[:-1]):
        said.append(
            f"An epoch's rows are no multiple of {per_step}: a step may hold the end of one and the start of the next."
        )
        if min(e.rows for e in facts.epochs) >= per_step:
            said[-1] += f" `materialize --rows-multiple {per_step}`, with a new --out, makes them a multiple."
    return said


def rising(facts: Facts) -> list[str]:
    """Why the training loss of a later epoch may be the higher one."""
    if facts.select != "low-entropy" or facts.epochs[-1].dropped_share <= facts.epochs[0].dropped_share:
        return []
    why = (
        "it is a mean over the labels left, and those that are easy to predict leave first"
        if facts.drops_labels
        else "more and more inputs are replaced, which makes what follows them harder to predict"
    )
    compare = (
        "on the split `validation`"
        if facts.validation_rows
        else "on rows that `materialize --eval-fraction 0.05` holds out"
    )
    return [
        f"The training loss may rise from epoch to epoch while the model gets better: {why}. Compare models {compare}, "
        "whose labels are all there."
    ]


def precision(facts: Facts, *, masters: bool) -> list[str]:
    """In which type weights are kept, and which of them are trained."""
    rank = facts.training.lora
    if rank:
        return [
            f"LoRA: adapters of rank {rank}, alpha {2 * rank}, in float32 are trained and saved; the frozen weights "
            "have the type that is computed in."
        ]
    if not masters and facts.training.dtype != "float32":
        return [
            "Computed in bfloat16, the weights are bfloat16 too: this trainer loads them in the type it computes in, "
            "so that small updates are rounded away. --dtype float32 keeps them, at twice the memory."
        ]
    return [
        "Weights, gradients and the optimizer's two moments are float32, 16 bytes a parameter, and so is the saved "
        "model, whatever is computed in. --lora RANK trains adapters alone."
    ]


def weight(facts: Facts, *, divides: bool) -> list[str]:
    """What a mean over the labels left does, or that it does nothing."""
    if not facts.drops_labels:
        return ["No label was dropped: a mean loss weighs a token as training on the whole data does."]
    share = min(e.kept_share for e in facts.epochs)
    said = (
        f"A mean over the labels left weighs each of them 1 / kept as much as training on the whole data does: up to "
        f"{1 / max(share, 1e-9):.2f} times."
    )
    if not divides:
        return [f"{said} This trainer computes its loss itself: dropping inputs (--target inputs) has no such effect."]
    if COLUMN in facts.columns:
        return [f"{said} The loss below divides by the trainable tokens before dropping: none weighs more."]
    return [
        f"{said} With a column {COLUMN} (`materialize --add-columns {COLUMN}`, with a new --out) the recipe divides by "
        "the trainable tokens before dropping instead."
    ]


def untrained(facts: Facts) -> list[str]:
    """That a replacement may be a token that was never trained."""
    if facts.target == "labels" or facts.drop_token == "random":
        return []
    return [
        f"Dropped inputs are the token {facts.drop_token}. If the model was never trained on it, its embedding must be "
        "trained: with LoRA, which trains none by default, name the embeddings in modules_to_save."
    ]


def lengths(facts: Facts, *, apart: bool = False) -> list[str]:
    """How long rows are, and what the documents of a packed one see."""
    longest = "as long as `--max-length` of `entrodrop score` at most"
    if facts.longest is not None:
        longest = f"up to {facts.longest:,} tokens long"
    said = [f"Rows are {longest}; a lower limit of the trainer's would cut them after they were masked."]
    if facts.packed is not None:
        said.append(
            f"Rows are packed, up to {facts.packed:,} tokens. Their documents are kept apart by position_ids and no "
            "attention_mask; docs/packing.md says for which models."
            if apart
            else f"Rows are packed, up to {facts.packed:,} tokens, and with this file the documents of a row see each "
            "other. Better are rows that are not packed (`materialize` without --pack, with a new --out), or the "
            "recipe for transformers or trl, which keeps documents apart where --add-columns position_ids marks "
            "them."
        )
    return said


def placeholder(facts: Facts) -> list[str]:
    """That the model must be named."""
    return [f'Replace "{PLACEHOLDER}" with your model.'] if facts.model == PLACEHOLDER else []
