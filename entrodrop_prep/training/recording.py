"""Batches as they reach a model: noted while a trainer runs, and taken apart into rows."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from entrodrop_prep.errors import ArrivalError
from entrodrop_prep.masking.mask import IGNORE

if TYPE_CHECKING:
    import torch

Batch = Mapping[str, Any]
"""``input_ids`` and ``labels``, [B, T] or [T]; of the same shape ``attention_mask`` and ``position_ids``, if any."""

_COLUMNS = ("input_ids", "labels", "attention_mask", "position_ids")


@dataclass(frozen=True)
class Piece:
    """One row as it came.

    Attributes:
        batch: number of the batch, from 0.
        input_ids: [T] token ids.
        labels: [T] unshifted, -100 = no loss.
        hidden: whether an ``attention_mask`` marks padding, which is left out here; if not, it may be at the end.
        trained: whether a label is in it, or after it in the same line of the batch.
    """

    batch: int
    input_ids: np.ndarray[Any, Any]
    labels: np.ndarray[Any, Any]
    hidden: bool
    trained: bool


@contextlib.contextmanager
def recording(model: torch.nn.Module) -> Iterator[list[dict[str, Any]]]:
    """Note every batch that ``model`` is called with to train; a list that grows while the block runs.

    For trainers that hide their batches. Calls without gradients, as evaluation makes them, are left out.

    Args:
        model: the model that the trainer was given.

    Yields:
        The batches so far, as ``check_batches`` takes them: for each call ``input_ids`` and ``labels`` [B, T] and,
        where they were given, ``attention_mask`` and ``position_ids``; copies on the CPU, about 32 bytes a token.
    """
    import torch

    noted: list[dict[str, Any]] = []

    def note(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not torch.is_grad_enabled():
            return
        given = dict(inspect.signature(module.forward).bind_partial(*args).arguments) | kwargs
        noted.append({n: np.array(_numpy(given[n])) for n in _COLUMNS if given.get(n) is not None})

    hook = model.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield noted
    finally:
        hook.remove()


def pieces(batches: Iterable[Batch]) -> Iterator[Piece]:
    """The rows of batches in order, padding that an ``attention_mask`` marks left out.

    A line of a batch holds one row, or, with ``position_ids``, several: one begins where positions do not rise by one.
    Raises ArrivalError for a batch without ids or labels, and for a label on padding.
    """
    for number, batch in enumerate(batches):
        where = f"batch {number}"
        ids, labels = _lines(batch, "input_ids", where), _lines(batch, "labels", where)
        mask, positions = (
            _lines(batch, name, where) if batch.get(name) is not None else None
            for name in ("attention_mask", "position_ids")
        )
        if positions is not None and len(positions) == 1:
            positions = np.broadcast_to(positions, (len(ids), positions.shape[1]))
        for name, other in (("labels", labels), ("attention_mask", mask), ("position_ids", positions)):
            if other is not None and other.shape != ids.shape:
                raise ArrivalError(f"{name} are {other.shape}, input_ids are {ids.shape}", where=where)
        for line in range(len(ids)):
            seen = np.ones(ids.shape[1], bool) if mask is None else mask[line] != 0
            _check_padding(labels[line], seen, f"{where}, line {line}")
            steps = np.ones(0) if positions is None else np.diff(positions[line][seen])
            borders = np.flatnonzero(steps != 1) + 1
            parts = [np.split(x[line][seen], borders) for x in (ids, labels)]
            last = max((i for i, part in enumerate(parts[1]) if (part != IGNORE).any()), default=-1)
            for i, (row, kept) in enumerate(zip(*parts, strict=True)):
                if len(row):
                    yield Piece(number, row, kept, hidden=mask is not None, trained=i <= last)


def _check_padding(labels: np.ndarray[Any, Any], seen: np.ndarray[Any, Any], where: str) -> None:
    wrong = np.flatnonzero(~seen & (labels != IGNORE))
    if len(wrong):
        raise ArrivalError(
            f"attention_mask is 0 and the label is {labels[wrong[0]]}, not {IGNORE}",
            where=f"{where}, position {wrong[0]}",
            fix=f"pad labels with {IGNORE}, and take attention_mask from the files, not from the id used for padding",
        )


def _lines(batch: Batch, name: str, where: str) -> np.ndarray[Any, Any]:
    """A column of a batch as [B, T]."""
    if batch.get(name) is None:
        raise ArrivalError(f"it has no {name}", where=where, fix="the trainer or its collator must keep the column")
    try:
        array = np.asarray(_numpy(batch[name]))
    except ValueError as e:
        raise ArrivalError(f"{name} is ragged", where=where, fix="give batches as they reach the model") from e
    if array.dtype.kind not in "iub" or array.ndim not in (1, 2):
        raise ArrivalError(
            f"{name} is {array.dtype} of shape {array.shape}", where=where, fix="needed: integers [B, T]"
        )
    return np.atleast_2d(array)


def _numpy(value: Any) -> Any:
    return value.detach().cpu().numpy() if hasattr(value, "detach") else value
