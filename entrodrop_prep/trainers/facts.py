"""What a recipe needs to know of a masked dataset, and of the model to train on it."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import pyarrow.parquet as pq

from entrodrop_prep.config import TrainingConfig
from entrodrop_prep.errors import IntegrityError
from entrodrop_prep.store import manifest
from entrodrop_prep.store.schema import MASKED
from entrodrop_prep.store.shards import local_directory, read_batches, reading

log = logging.getLogger(__name__)

PLACEHOLDER = "base-model"


@dataclass(frozen=True)
class Epoch:
    """One epoch's figures.

    Attributes:
        folder: its folder and configuration, such as ``epoch_000``.
        rows: rows in it.
        tokens: tokens in it, padding aside.
        trainable: labels it would have if nothing were dropped.
        labels_left: labels that are not -100.
        dropped_share: share of the trainable tokens that was dropped; with ``--target inputs`` they keep their label.
    """

    folder: str
    rows: int
    tokens: int
    trainable: int
    labels_left: int
    dropped_share: float

    @property
    def kept_share(self) -> float:
        """Share of the trainable tokens that has its label."""
        return self.labels_left / max(1, self.trainable)


@dataclass(frozen=True)
class Facts:
    """A masked dataset and the model to train, as recipes describe them.

    Attributes:
        directory: path of the dataset as the user gave it, or USER/NAME on the Hub.
        epochs: in training order.
        target: ``labels``, ``inputs`` or ``both``: what a dropped token loses.
        drop_token: what replaces a dropped input: ``random``, an id or a token.
        select: which tokens are eligible.
        validation_rows: rows of the split ``validation``; None without one.
        plain: whether there is a configuration ``plain``, with nothing dropped.
        columns: columns beside ``input_ids``, ``attention_mask`` and ``labels``.
        layouts: copies of the epochs beside their files, as ``materialize --layout`` names them.
        packed: tokens in a packed row at most; None where rows are not packed.
        longest: tokens of the longest row; None where it is not known.
        model: name or path of the model to train.
        content_digest: of the rows; a run is known by it.
        notes: what the user must hear, a sentence each: where the model and the rows do not fit, say.
        training: batch, learning rate and so on.
    """

    directory: str
    epochs: tuple[Epoch, ...]
    target: str
    drop_token: str
    select: str = "low-entropy"
    validation_rows: int | None = None
    plain: bool = False
    columns: tuple[str, ...] = ()
    layouts: tuple[str, ...] = ()
    packed: int | None = None
    longest: int | None = None
    model: str = PLACEHOLDER
    content_digest: str = ""
    notes: tuple[str, ...] = ()
    training: TrainingConfig = field(default_factory=TrainingConfig)

    @property
    def rows(self) -> int:
        """Rows of all epochs."""
        return sum(e.rows for e in self.epochs)

    @property
    def short_digest(self) -> str:
        """What distinguishes these rows from others in a folder's name."""
        return self.content_digest[:8]

    def out_of(self, trainer: str, model: str) -> str:
        """Folder of the trained model. A trainer resumes from what is there, so other rows, another trainer, another
        model and other settings have another one.
        """
        given = [(f.name, getattr(self.training, f.name), f.default) for f in fields(TrainingConfig)]
        changed = "".join(f"{name.replace('_', '')}{value}-" for name, value, default in given if value != default)
        return f"trained-{self.short_digest}-{trainer}-{changed}{model.replace('/', '-')}"

    @property
    def drops_labels(self) -> bool:
        """Whether a mean over the labels left gives the survivors more weight."""
        return any(e.labels_left < e.trainable for e in self.epochs)

    def steps(self, batch: int, accumulate: int = 1, processes: int = 1, *, whole: bool = False) -> int:
        """Optimizer steps of one pass over all epochs, the last one short where the rows are no multiple.

        Args:
            batch: rows in a batch of one process.
            accumulate: batches in an optimizer step.
            processes: processes that share the rows.
            whole: count no step of fewer batches than ``accumulate``.
        """
        batches = -(-self.rows // (batch * processes))
        return batches // accumulate if whole else -(-batches // accumulate)


def facts_of(described: dict[str, Any], directory: str) -> Facts:
    """What a masked dataset's manifest says; ``longest`` stays unknown."""
    recipe, identity = described["recipe"], described["identity"]
    return Facts(
        directory=directory,
        epochs=tuple(
            Epoch(e["folder"], e["rows"], e["tokens"], e["trainable"], e["labels_left"], e["dropped_share"])
            for e in described["epochs"]
        ),
        target=recipe["target"],
        drop_token=str(recipe["drop_token"]),
        select=recipe["select"],
        validation_rows=described["validation"]["rows"] if "validation" in described else None,
        plain="plain" in described,
        columns=tuple(identity.get("add_columns") or ()),
        layouts=tuple(sorted({entry["layout"] for entry in described.get("derived", [])})),
        packed=identity.get("pack"),
        content_digest=described["content_digest"],
    )


def read_facts(directory: str, train_model: str | None = None) -> Facts:
    """The facts of a masked directory, and of the model to train where one is named.

    Raises IntegrityError, ModelError, ConfigError: see ``recipe``.
    """
    path = local_directory(directory)
    described = manifest.read(path, MASKED)
    manifest.look(path, described)
    entries = [f for f in described["files"] if "epoch" in f]
    files = [path / entry["file"] for entry in entries]
    longest = _longest(files)
    facts = replace(facts_of(described, _as_path(directory)), longest=longest)
    if train_model is None:
        return facts
    from entrodrop_prep.trainers.model import compare

    scored = described["scored"]
    tokenizer = (scored[0] if isinstance(scored, list) else scored)["tokenizer"]
    notes = compare(train_model, tokenizer, _largest(files), longest)
    for note in notes:
        log.warning("%s", note.removesuffix("."))
    return replace(facts, model=train_model, notes=tuple(notes))


def _as_path(directory: str) -> str:
    """A directory as ``load_dataset`` takes it for one: a bare ``text`` or ``json`` names a reader of files there."""
    return directory if "/" in directory else f"./{directory}"


def _longest(files: Sequence[Path]) -> int:
    """Tokens of the longest row, by its attention_mask, which takes next to no room in a file."""
    lengths = (
        pc.max(pc.list_value_length(batch.column("attention_mask"))).as_py()
        for file in files
        for batch in read_batches(file, ["attention_mask"])
    )
    return max(lengths, default=0)


def _largest(files: Sequence[Path]) -> int:
    """The largest token id of rows and labels, by the statistics in the files' footers.

    With ``--target inputs`` a token that was dropped is in the labels alone.
    """
    largest = -1
    for file in files:
        with reading(file):
            footer = pq.read_metadata(file)
        for group in range(footer.num_row_groups):
            columns = (footer.row_group(group).column(c) for c in range(footer.num_columns))
            ids = [c for c in columns if c.path_in_schema.startswith(("input_ids.", "labels."))]
            if not all(c.is_stats_set and c.statistics.has_min_max for c in ids):
                raise IntegrityError("it does not say its largest id", where=str(file), fix="make it again")
            largest = max([largest, *(c.statistics.max for c in ids)])
    return largest
