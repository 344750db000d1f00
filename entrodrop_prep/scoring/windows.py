"""Cutting a long document into windows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Window:
    """One row of a scored shard before it has scores.

    Attributes:
        row_id: position in the source.
        number: 0, or the number of this window of a split document.
        input_ids: [T] int32.
        loss_mask: [T] bool, true = may be trained on; false at 0 and on context.
        context: how many tokens at the front are context without scores: BOS, where windows begin with it, and what
            repeats the window before.
    """

    row_id: int
    number: int
    input_ids: np.ndarray[Any, np.dtype[np.int32]]
    loss_mask: np.ndarray[Any, np.dtype[np.bool_]]
    context: int


def new_tokens(max_length: int, overlap: int, start: Sequence[int] = ()) -> int:
    """How many tokens a window after the first has that the one before has not; below 1, a document cannot be cut."""
    return max_length - len(start) - max(1, overlap)


def cut(
    row_id: int,
    input_ids: np.ndarray[Any, Any],
    loss_mask: np.ndarray[Any, Any],
    max_length: int,
    overlap: int,
    start: Sequence[int] = (),
) -> Iterator[Window]:
    """Windows of at most ``max_length`` tokens.

    Each after the first begins with ``start`` and repeats the last max(1, overlap) tokens of the one before, all of it
    context. So each token of the document but its first is trainable in exactly one window, with at least that much
    context.

    Args:
        row_id: position in the source.
        input_ids: [T] int32, the document.
        loss_mask: [T] bool, true = may be trained on.
        max_length: longest window in tokens; ``new_tokens`` must be at least 1.
        overlap: tokens of the window before that are repeated; at least one always is.
        start: ids that a window after the first begins with: BOS where the document does, else none.
    """
    yield Window(row_id, 0, input_ids[:max_length], _trainable(loss_mask[:max_length], 1), 0)
    stop, number = max_length, 0
    lead = np.asarray(start, input_ids.dtype)
    repeat = max(1, overlap)
    context = len(lead) + repeat
    while stop < len(input_ids):
        first, stop, number = stop - repeat, stop - repeat + max_length - len(lead), number + 1
        ids = np.concatenate([lead, input_ids[first:stop]])
        mask = np.concatenate([np.zeros(len(lead), np.bool_), loss_mask[first:stop]])
        yield Window(row_id, number, ids, _trainable(mask, context), context)


def _trainable(mask: np.ndarray[Any, Any], context: int) -> np.ndarray[Any, Any]:
    mask = mask.copy()
    mask[:context] = False
    return mask
