"""What every recipe says beside its settings, as lines of comments; ``#`` begins one in Python and in YAML."""

from __future__ import annotations

import textwrap

from entrodrop_prep.export.card import aligned
from entrodrop_prep.terminal.text import printable
from entrodrop_prep.trainers.facts import PLACEHOLDER, Facts
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


def head(facts: Facts, what: str, batch: int, accumulate: int = 1, *, divides: bool, apart: bool = False) -> str:
    """The comment a recipe begins with: what is trained on, how many steps that takes, and what to know of it.

    Args:
        facts: of the dataset.
        what: the trainer, and what to do with this file.
        batch: rows in a batch.
        accumulate: batches in an optimizer step.
        divides: whether the recipe can divide the loss by the trainable tokens before dropping.
        apart: whether it keeps the documents of a packed row apart.
    """
    return comment(
        what,
        *placeholder(facts),
        "",
        *(f"note: {note}" for note in facts.notes),
        *table(facts),
        *steps(facts, batch, accumulate),
        *weight(facts, divides=divides),
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


def steps(facts: Facts, batch: int, accumulate: int = 1) -> list[str]:
    """How many optimizer steps one pass takes, and whether one holds the rows of two epochs."""
    per_step = batch * accumulate
    product = f"{batch} x {accumulate} = {per_step}" if accumulate > 1 else str(batch)
    said = [
        f"{facts.rows:,} rows, {product} in an optimizer step of one process: {facts.rows:,} / {per_step}, rounded "
        f"up, = {facts.steps(batch, accumulate):,} steps. With P processes a step holds P times as many rows."
    ]
    if any(e.rows % per_step for e in facts.epochs[:-1]):
        said.append(
            f"An epoch's rows are no multiple of {per_step}: a step may hold the end of one and the start of the next."
        )
        if min(e.rows for e in facts.epochs) >= per_step:
            said[-1] += f" `materialize --rows-multiple {per_step}`, with a new --out, makes them a multiple."
    return said


def weight(facts: Facts, *, divides: bool = True) -> list[str]:
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
