"""The unit of work: rows [i*R, (i+1)*R) of the source become shard i."""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from entrodrop_prep.backends.plugin_response import ROUNDING
from entrodrop_prep.errors import OutputError, RowError, ScoreError
from entrodrop_prep.scoring.extra_columns import misfits
from entrodrop_prep.scoring.messages import kind_of
from entrodrop_prep.scoring.plan import READ_BYTES, Plan
from entrodrop_prep.scoring.tokenize import Encoded
from entrodrop_prep.scoring.tokenizer import check_ids
from entrodrop_prep.scoring.windows import Window, cut
from entrodrop_prep.sources.rows import Chunk, SourceRow

if TYPE_CHECKING:
    from entrodrop_prep.backends import Scores

log = logging.getLogger(__name__)

FLOAT16_MAX = 65504.0
COUNTS = (
    "rows_read",
    "rows",
    "windows",
    "tokens",
    "trainable_tokens",
    "rows_without_loss",
    "short_rows",
    "truncated_rows",
    "dropped_long_rows",
    "bad_rows",
)


@dataclass
class ShardInput:
    """A shard's rows, read and tokenized, waiting for scores; of index -1 a sample, whose rows have other numbers."""

    index: int
    windows: list[Window] = field(default_factory=list)
    wheres: dict[int, str] = field(default_factory=dict)
    ids: dict[int, str] = field(default_factory=dict)
    kept: dict[int, Mapping[str, Any]] = field(default_factory=dict)
    rejected: list[dict[str, Any]] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(COUNTS, 0))
    notes: Counter[str] = field(default_factory=Counter)
    source_digest: str = ""
    next: dict[str, Any] | None = None
    units: float = 0

    @property
    def sequences(self) -> list[np.ndarray[Any, Any]]:
        """What the model reads: ``input_ids [T] int32`` of each window."""
        return [w.input_ids for w in self.windows]

    @property
    def tokens(self) -> int:
        """Tokens to score, context included."""
        return sum(len(w.input_ids) for w in self.windows)


def read_span(plan: Plan, index: int, position: dict[str, Any] | None) -> ShardInput:
    """Read, tokenize, check and cut the rows of shard ``index``.

    Raises RowError at a bad row, unless bad rows are skipped.
    """
    size = plan.config.rows_per_shard
    span, h = ShardInput(index), hashlib.sha256()
    for chunk in _chunks(plan, index * size, size, position):
        _add_rows(h, chunk.rows)
        span.next = chunk.next
        span.units += float(chunk.bytes_read if plan.source.total_rows is None else len(chunk.rows))
        take_rows(plan, span, chunk.rows)
    span.source_digest = h.hexdigest()
    return span


def source_digest(plan: Plan, index: int, position: dict[str, Any] | None) -> tuple[str, dict[str, Any] | None]:
    """SHA-256 of the rows of shard ``index`` as the source has them now, and the position behind them."""
    h, size = hashlib.sha256(), plan.config.rows_per_shard
    for chunk in _chunks(plan, index * size, size, position):
        _add_rows(h, chunk.rows)
        position = chunk.next
    return h.hexdigest(), position


def _chunks(plan: Plan, first: int, count: int, position: dict[str, Any] | None) -> Iterator[Chunk]:
    """The rows from ``first`` on, ``READ_BYTES`` at a time: a shard of long documents is never in memory as text."""
    while True:
        chunk = plan.source.read(first, count, position, plan.columns, READ_BYTES)
        yield chunk
        first, count, position = first + len(chunk.rows), count - len(chunk.rows), chunk.next
        if not count or position is None:
            return


def take_rows(plan: Plan, span: ShardInput, rows: Sequence[SourceRow]) -> None:
    """Add rows to a shard: as windows, or counted as what they are."""
    span.counts["rows_read"] += len(rows)
    span.wheres |= {row.row_id: row.where for row in rows}
    readable = {row.row_id: row.values for row in rows if row.values is not None}
    bad = {row.row_id: row.problem or "it cannot be read" for row in rows if row.values is None}
    kept = [plan.schema.field(name) for name in plan.config.keep_columns]
    unfit, numbers = misfits(kept, list(readable.values())), list(readable)
    bad |= {numbers[i]: reason for i, reason in unfit.items()}
    decisive = plan.late_columns
    for n, values in readable.items():
        for name in decisive:
            if values.get(name) is not None:
                bad[n] = f"it has a column {name!r}, which none of the first rows has: it would be ignored"
    good = [n for n in numbers if n not in bad]
    encoded = dict(zip(good, plan.encoder.encode([readable[n] for n in good]), strict=True))
    for row in rows:  # only now, so that the first bad row is reported, whatever is wrong with it
        _take(plan, span, row, readable.get(row.row_id, {}), bad.get(row.row_id) or encoded[row.row_id])


def _add_rows(h: Any, rows: Sequence[SourceRow]) -> None:
    """Hash what was read: the columns in use, or what is wrong with the row."""
    for row in rows:
        what = row.problem if row.values is None else row.values
        text = json.dumps([row.row_id, what], sort_keys=True, default=repr, ensure_ascii=False)
        h.update(text.encode("utf-8", "surrogatepass") + b"\n")


def _take(plan: Plan, span: ShardInput, row: SourceRow, values: Mapping[str, Any], result: Encoded | str) -> None:
    """One row becomes windows, or is set aside and counted."""
    if isinstance(result, str):
        return _reject(plan, span, row, result)
    ids, mask = result.input_ids, result.loss_mask
    name = values.get(plan.config.id_column) if plan.config.id_column else None
    if plan.config.id_column and (name is None or name != name or str(name) == ""):
        return _reject(plan, span, row, f"column {plan.config.id_column!r} is empty")
    if isinstance(name, (bool, list, dict)):
        what = f"column {plan.config.id_column!r} holds {kind_of(name)}, not a string or a number"
        return _reject(plan, span, row, what)
    if len(ids) and int(ids.max()) >= plan.info.vocab_size:
        t = int(ids.argmax())
        return _reject(
            plan,
            span,
            row,
            f"token id {ids[t]} at position {t} is out of the vocabulary of {plan.info.vocab_size} tokens",
        )
    check_ids(ids, plan.disagreement)
    if len(ids) < 2:
        span.counts["short_rows"] += 1
        return None
    if len(ids) > plan.max_length:
        count = f"{'' if result.whole else 'more than '}{len(ids)} tokens, over --max-length {plan.max_length}"
        if plan.long_documents == "error":
            return _reject(plan, span, row, f"it has {count}")
        if plan.long_documents == "drop":
            span.counts["dropped_long_rows"] += 1
            span.rejected.append(_entry(plan, row, "long", count))
            return None
        if plan.long_documents == "truncate":
            span.counts["truncated_rows"] += 1
            ids, mask = ids[: plan.max_length], mask[: plan.max_length]
    start = plan.window_start if ids[: len(plan.window_start)].tolist() == list(plan.window_start) else ()
    windows = list(cut(row.row_id, ids, mask, plan.max_length, plan.config.overlap, start))
    trainable = sum(int(w.loss_mask.sum()) for w in windows)
    span.notes.update(result.notes)
    span.windows += windows
    span.counts["rows"] += 1
    span.counts["windows"] += len(windows)
    span.counts["tokens"] += sum(len(w.input_ids) for w in windows)
    span.counts["trainable_tokens"] += trainable
    span.counts["rows_without_loss"] += trainable == 0
    if plan.config.id_column:
        span.ids[row.row_id] = str(name)
    if plan.config.keep_columns:
        span.kept[row.row_id] = {name: values.get(name) for name in plan.config.keep_columns}
    return None


def _reject(plan: Plan, span: ShardInput, row: SourceRow, reason: str) -> None:
    if plan.config.on_bad_row == "stop":
        raise RowError(
            f"row {row.row_id}: {reason}",
            where=row.where,
            fix="correct it, or skip such rows with --on-bad-row skip",
        )
    if not span.counts["bad_rows"] and span.index >= 0:
        log.warning(
            "%s: row %d: %s; skipped (further ones of this shard are only listed)", row.where, row.row_id, reason
        )
    span.counts["bad_rows"] += 1
    span.rejected.append(_entry(plan, row, "bad", reason))


def _entry(plan: Plan, row: SourceRow, kind: str, reason: str) -> dict[str, Any]:
    entry = {"row_id": row.row_id, "where": row.where, "kind": kind, "reason": reason}
    if plan.config.id_column and row.values is not None:
        name = row.values.get(plan.config.id_column)
        entry["id"] = None if name is None else str(name)
    return entry


def span_table(plan: Plan, span: ShardInput, scores: Sequence[Scores]) -> pa.Table:
    """The shard's rows in schema order. Raises ScoreError for a score that is not finite, or cannot be one."""
    windows = span.windows
    lengths = np.array([len(w.input_ids) for w in windows], np.int64)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    if offsets[-1] >= 2**31:
        raise OutputError(
            f"shard {span.index} would hold {offsets[-1]:,} tokens, more than a Parquet list column addresses",
            fix="lower --rows-per-shard",
        )
    first, context = np.zeros(int(offsets[-1]), bool), np.zeros(int(offsets[-1]), bool)
    first[offsets[:-1]] = True
    for w, start in zip(windows, offsets, strict=False):
        context[start : start + w.context] = True
    columns: dict[str, pa.Array] = {
        "row_id": pa.array([w.row_id for w in windows], pa.int64()),
        "window": pa.array([w.number for w in windows], pa.int32()),
        "input_ids": _lists(plan.schema, "input_ids", offsets, _flat([w.input_ids for w in windows], np.int32)),
        "loss_mask": _lists(plan.schema, "loss_mask", offsets, _flat([w.loss_mask for w in windows], np.bool_)),
    }
    if plan.config.id_column:
        columns["id"] = pa.array([span.ids[w.row_id] for w in windows], pa.string())
    for i, name in enumerate(plan.score_columns):
        flat = np.zeros(int(offsets[-1]), np.float32)
        flat[~first] = _flat([s[i] for s in scores], np.float32)
        _check_scores(span, flat, offsets, name, plan.info.vocab_size)
        if plan.config.score_dtype == "float16":
            flat = np.clip(flat, -FLOAT16_MAX, FLOAT16_MAX).astype(np.float16)
        columns[name] = _lists(plan.schema, name, offsets, pa.array(flat, mask=first | context))
    for f in plan.schema:
        if f.name not in columns:
            columns[f.name] = pa.array([span.kept[w.row_id].get(f.name) for w in windows], f.type)
    return pa.table([columns[f.name] for f in plan.schema], schema=plan.schema)


def _flat(arrays: Sequence[np.ndarray[Any, Any]], dtype: Any) -> np.ndarray[Any, Any]:
    return np.concatenate(arrays) if arrays else np.zeros(0, dtype)


def _lists(schema: pa.Schema, name: str, offsets: np.ndarray[Any, Any], values: Any) -> pa.Array:
    kind = schema.field(name).type
    if not isinstance(values, pa.Array):
        values = pa.array(values, kind.value_type)
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), values, type=kind)


def _check_scores(
    span: ShardInput, flat: np.ndarray[Any, Any], offsets: np.ndarray[Any, Any], name: str, vocab_size: int
) -> None:
    """Whatever engine gave them: an entropy is 0 to the logarithm of the vocabulary, a log-probability at most 0."""
    low, high = (-math.inf, 0.0) if name == "logprob" else (0.0, math.log(vocab_size))
    bad = np.flatnonzero(~(np.isfinite(flat) & (flat >= low - ROUNDING) & (flat <= high + ROUNDING)))
    if len(bad):
        i = int(np.searchsorted(offsets, bad[0], side="right")) - 1
        w = span.windows[i]
        value = flat[bad[0]]
        outside = f", outside {low:.4g} to {high:.4g}" if np.isfinite(value) else ""
        raise ScoreError(
            f"row {w.row_id}: the {name} of token {bad[0] - offsets[i]} of window {w.number} is {value}{outside}",
            where=span.wheres[w.row_id],
            fix="try --dtype float32; if it stays, the model's weights or the engine are broken",
        )
