"""The columns of a masked file: made from flat arrays, and checked row by row."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from entrodrop_prep.masking.assembly import MaskedColumns, positions
from entrodrop_prep.masking.mask import IGNORE


def table_of(stored: MaskedColumns, schema: pa.Schema) -> pa.Table:
    """The columns of ``schema`` (see ``schema.masked_schema``); nothing is copied."""
    return pa.table([_column(stored, field) for field in schema], schema=schema)


def _column(stored: MaskedColumns, field: pa.Field) -> pa.Array:
    if field.name == "n_trainable":
        return pa.array(stored.trainable.astype(np.int32))
    offsets = stored.documents if field.name == "seq_lengths" else stored.offsets
    values: dict[str, Callable[[], NDArray[Any]]] = {
        "input_ids": lambda: stored.input_ids,
        "attention_mask": lambda: np.ones(len(stored.input_ids), np.int8),
        "labels": lambda: stored.labels,
        "position_ids": lambda: positions(stored.lengths).astype(np.int32),
        "seq_lengths": lambda: stored.lengths.astype(np.int32),
    }
    return pa.ListArray.from_arrays(pa.array(offsets.astype(np.int32)), pa.array(values[field.name]()), type=field.type)


def check_rows(batch: pa.RecordBatch, vocab_size: int, target: str, limit: int | None = None) -> tuple[str, int]:
    """What is wrong with some rows of a masked file of at most ``limit`` tokens each, and how many labels they hold."""
    names = ("input_ids", "attention_mask", "labels", "position_ids")
    columns = [batch.column(n) for n in names if n in batch.schema.names]
    lengths = [pc.list_value_length(c) for c in columns]
    if any(not x.equals(lengths[0]) for x in lengths):
        return "its columns are of different lengths in one row", 0
    ids, attention, labels = (c.flatten().to_numpy() for c in columns[:3])
    sizes = lengths[0].to_numpy().astype(np.int64)
    ends = np.cumsum(sizes)
    starts = ends - sizes
    kept = labels != IGNORE
    if (ids < 0).any() or (ids >= vocab_size).any() or (kept & ((labels < 0) | (labels >= vocab_size))).any():
        return "it holds a token outside the vocabulary", 0
    if (attention != 1).any():
        return "its attention_mask is not 1 everywhere", 0
    if limit is not None and (sizes > limit).any():
        return f"a row is longer than {limit} tokens", 0
    if (labels[starts] != IGNORE).any():
        return "a first token has a label", 0
    if target == "labels" and (labels[kept] != ids[kept]).any():
        return "a label is not its token", 0
    running = np.concatenate([[0], np.cumsum(kept)])
    left = running[ends] - running[starts]
    if (left == 0).any():
        return "a row has no label", 0
    return _check_extra(batch, starts, sizes, labels, left), int(kept.sum())


def first_tokens(batch: pa.RecordBatch) -> tuple[str, NDArray[np.int64] | None]:
    """What is wrong with the documents that ``position_ids`` and ``seq_lengths`` give, and where each begins.

    The latter is [D] among the batch's tokens, None where no such column is stored.
    """
    found: NDArray[np.int64] | None = None
    sizes = pc.list_value_length(batch.column("input_ids")).to_numpy().astype(np.int64)
    if "position_ids" in batch.schema.names:
        position_ids = batch.column("position_ids").flatten().to_numpy()
        found = np.flatnonzero(position_ids == 0)
        rows = np.cumsum(sizes) - sizes
        if not np.isin(rows, found).all() or not np.array_equal(
            position_ids, positions(np.diff([*found, len(position_ids)]))
        ):
            return "its position_ids do not count from 0 in each document", None
    if "seq_lengths" in batch.schema.names:
        lengths = batch.column("seq_lengths").flatten().to_numpy().astype(np.int64)
        row = np.repeat(np.arange(len(sizes)), pc.list_value_length(batch.column("seq_lengths")).to_numpy())
        if (lengths < 1).any() or not np.array_equal(np.bincount(row, lengths, len(sizes)), sizes):
            return "its seq_lengths do not add up to its rows", None
        starts = np.cumsum(lengths) - lengths
        if found is not None and not np.array_equal(found, starts):
            return "its position_ids and seq_lengths describe different documents", None
        found = starts
    return "", found


def _check_extra(
    batch: pa.RecordBatch,
    starts: NDArray[np.int64],
    sizes: NDArray[np.int64],
    labels: NDArray[np.int32],
    left: NDArray[np.int64],
) -> str:
    """What is wrong with the columns of ``--add-columns``."""
    problem, first = first_tokens(batch)
    if problem:
        return problem
    if first is not None and (labels[first] != IGNORE).any():
        return "the first token of a document has a label"
    if "n_trainable" in batch.schema.names:
        trainable = batch.column("n_trainable").to_numpy()
        documents = np.searchsorted(first, starts + sizes) - np.searchsorted(first, starts) if first is not None else 1
        if (trainable < left).any() or (trainable > sizes - documents).any():
            return "its n_trainable cannot be right"
    return ""
