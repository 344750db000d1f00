"""Cutting a long document into windows."""

from __future__ import annotations

from collections.abc import Iterator
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
        loss_mask: [T] bool, true = may be trained on; false at 0 and on repeated context.
        context: how many tokens at the front repeat the window before; they carry no scores.
    """

    row_id: int
    number: int
    input_ids: np.ndarray[Any, np.dtype[np.int32]]
    loss_mask: np.ndarray[Any, np.dtype[np.bool_]]
    context: int


def cut(
    row_id: int, input_ids: np.ndarray[Any, Any], loss_mask: np.ndarray[Any, Any], max_length: int, overlap: int
) -> Iterator[Window]:
    """Windows of at most ``max_length`` tokens.

    Each after the first repeats the last max(1, overlap) tokens of the one before. So each token of the document but
    its first is trainable in exactly one window, with at least that much context.
    """
    repeat = max(1, overlap)
    start, number = 0, 0
    while True:
        stop = min(start + max_length, len(input_ids))
        context = repeat if number else 0
        mask = loss_mask[start:stop].copy()
        mask[: max(1, context)] = False
        yield Window(row_id, number, input_ids[start:stop], mask, context)
        if stop == len(input_ids):
            return
        start, number = stop - repeat, number + 1
