"""Scored rows as flat arrays, as masks are made from them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray


@dataclass(frozen=True)
class Rows:
    """R scored rows of N tokens in all, one after the other: row r is ``offsets[r]:offsets[r + 1]`` of each [N] array.

    Index i of each [N] array is the same token: its id, and the scores of predicting it. Raises ValueError for arrays
    whose lengths do not fit together.
    """

    row_id: NDArray[np.int64]
    """[R] position in the source."""
    window: NDArray[np.int32]
    """[R] window of a split document, else 0."""
    offsets: NDArray[np.int64]
    """[R + 1] from 0 to N."""
    input_ids: NDArray[np.int32]
    """[N] token ids."""
    entropy: Any
    """[N] float16 or float32, nats; NaN where it is null. Or what gives these at indices [n] of tokens."""
    logprob: NDArray[Any] | None
    """[N] as ``entropy``; None where none was stored."""
    loss_mask: NDArray[np.bool_]
    """[N] true where a token may be trained on."""
    group: NDArray[np.int32] | None = None
    """[R] which of ``MaskPlan.taus`` is each row's threshold; None where the plan has none."""
    eligible: NDArray[np.bool_] | None = None
    """[N] ``eligible_tokens`` of these rows, where that is known."""
    excess: NDArray[np.float32] | None = None
    """[N] nats, surprisal minus that in the scores compared with; NaN where it is null; None where there are none."""

    def __post_init__(self) -> None:
        n, rows = len(self.input_ids), len(self.row_id)
        if len(self.window) != rows or len(self.offsets) != rows + 1:
            raise ValueError(f"{rows} row ids, {len(self.window)} windows and {len(self.offsets)} offsets")
        if self.offsets[0] != 0 or self.offsets[-1] != n or (np.diff(self.offsets) < 0).any():
            raise ValueError(f"the offsets do not rise from 0 to {n}")
        if not len(self.entropy) == len(self.loss_mask) == n or (self.logprob is not None and len(self.logprob) != n):
            raise ValueError(f"not every column has {n} tokens")

    @cached_property
    def lengths(self) -> NDArray[np.int64]:
        """[R] tokens of each row."""
        return np.diff(self.offsets)

    @property
    def surprisal(self) -> NDArray[Any]:
        """[N] -logprob, exact, in its number format: nats, NaN where it is null. Raises ValueError without logprob."""
        if self.logprob is None:
            raise ValueError("the rows have no log-probabilities")
        surprisal: NDArray[Any] = np.subtract(0, self.logprob)  # never -0.0
        return surprisal

    @cached_property
    def trainable(self) -> NDArray[np.bool_]:
        """[N] tokens that carry a label: ``loss_mask``, never position 0, which no model predicts."""
        result = self.loss_mask.copy()
        result[self.offsets[:-1][self.lengths > 0]] = False
        return result

    def per_row(self, flags: NDArray[np.bool_]) -> NDArray[np.int64]:
        """[R] number of true values of ``flags`` [N] in each row."""
        return np.diff(np.searchsorted(np.flatnonzero(flags), self.offsets))


def to_rows(batch: pa.RecordBatch | pa.Table) -> Rows:
    """Columns of a scored batch as the flat arrays that masks are made from (no copy where Arrow allows it)."""
    if isinstance(batch, pa.Table):
        batch = batch.combine_chunks()
    ids = _column(batch, "input_ids")
    offsets = ids.offsets.to_numpy().astype(np.int64)
    return Rows(
        row_id=_column(batch, "row_id").to_numpy(),
        window=_column(batch, "window").to_numpy(),
        offsets=offsets - offsets[0],
        input_ids=ids.flatten().to_numpy(),
        entropy=stored_scores(batch, "entropy"),
        logprob=stored_scores(batch, "logprob") if "logprob" in batch.schema.names else None,
        loss_mask=_column(batch, "loss_mask").flatten().to_numpy(zero_copy_only=False),
    )


def stored_scores(batch: pa.RecordBatch | pa.Table, name: str) -> np.ndarray[Any, Any]:
    """[N] scores of one column with NaN for null."""
    flat = _column(batch, name).flatten()
    kind = flat.type.to_pandas_dtype()
    values = (
        np.frombuffer(flat.buffers()[1], kind)[flat.offset : flat.offset + len(flat)]
        if len(flat)
        else (np.zeros(0, kind))
    )
    if flat.null_count:
        values = values.copy()
        values[pc.is_null(flat).to_numpy(zero_copy_only=False)] = np.nan
    return values


def _column(batch: pa.RecordBatch | pa.Table, name: str) -> pa.Array:
    column = batch.column(name)
    if isinstance(column, pa.ChunkedArray):
        column = column.combine_chunks()
        if isinstance(column, pa.ChunkedArray):
            column = column.chunk(0)
    return column


def token_counts(rows: Rows, vocab_size: int) -> NDArray[np.int64]:
    """[V] how often each id occurs, every token of a document once: not again where a window repeats it."""
    new = ~np.isnan(rows.entropy)
    new[rows.offsets[:-1][rows.window == 0]] = True
    return np.bincount(rows.input_ids[new], minlength=vocab_size)
