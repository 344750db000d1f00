"""Proving that what reaches a model is what was written: a trainer's batches, compared with the files row by row."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from entrodrop_prep.errors import ArrivalError, ConfigError
from entrodrop_prep.masking.mask import IGNORE
from entrodrop_prep.store import manifest
from entrodrop_prep.store.schema import MASKED
from entrodrop_prep.store.shards import local_directory, read_batches
from entrodrop_prep.training.recording import Batch, Piece, pieces

_OTHER_FILES = (
    "the batches come from other files: look for an older copy, a cache of the trainer's, or a step that edits rows"
)
_LIMIT = "look for a length limit of the trainer's; set it to at least `--max-length` of `entrodrop score`, or off"
_ORDER = "look for shuffling, grouping by length, packing, or several processes that share the rows"
_BEHIND = "look for an added EOS, or several rows in one line without position_ids that start again for each"
_BEFORE = "look for an added BOS, or padding without an attention_mask"
_GONE = "look for a filter, a limit of rows or steps, dropped last batches, or a resume that skips"

Ints = np.ndarray[Any, Any]


@dataclass(frozen=True)
class BatchCheck:
    """What was proved: how much reached the model as it was written.

    Attributes:
        epochs: those of which rows came, in order.
        rows: rows of all of them, packed ones where the directory is packed.
        tokens: tokens of these rows.
        labels: labels that are not -100 among them.
    """

    epochs: tuple[int, ...]
    rows: int
    tokens: int
    labels: int


@dataclass(frozen=True)
class _Row:
    """A row as written, or a document of a packed one; ``position`` counts over all epochs read."""

    position: int
    epoch: int
    row: int
    document: int
    input_ids: Ints
    labels: Ints

    @property
    def name(self) -> str:
        return f"epoch {self.epoch}, row {self.row}" + (f", document {self.document}" if self.document else "")


@dataclass(frozen=True)
class _Files:
    """For each epoch, the manifest's entries of its files, in order; ``starts`` is the column that marks documents.

    Without ``starts``, a packed row is read as one.
    """

    path: Path
    epochs: list[list[dict[str, Any]]]
    starts: str | None

    def rows(self) -> Iterator[_Row]:
        position = 0
        names = ["input_ids", "labels", *([self.starts] if self.starts else [])]
        for files in self.epochs:
            row = 0
            for entry in files:
                manifest.check_file(self.path, entry)
                for batch in read_batches(self.path / entry["file"], names):
                    columns = [batch.column(name) for name in names]
                    for i in range(batch.num_rows):
                        ids, labels, *starts = (c[i].values.to_numpy() for c in columns)
                        for number, (a, b) in enumerate(pairwise(self._edges(len(ids), *starts))):
                            yield _Row(position, entry["epoch"], row, number, ids[a:b], labels[a:b])
                            position += 1
                        row += 1

    def _edges(self, n: int, starts: Ints | None = None) -> list[int]:
        """Where documents begin, and the end of the last."""
        if starts is None:
            return [0, n]
        if self.starts == "seq_lengths":
            return [0, *np.cumsum(starts).tolist()]
        return [*np.flatnonzero(starts == 0).tolist(), n]


def check_batches(
    directory: str | Path, batches: Iterable[Batch], epochs: Sequence[int] | None = None, *, complete: bool = True
) -> BatchCheck:
    """Prove that batches hold the rows of a masked directory, in order, with their labels.

    Every id and every label is compared; padding is left aside, but must be labelled -100. The files are read one after
    the other, a few hundred rows at a time, each after its bytes were checked against the manifest.

    Args:
        directory: what ``materialize`` wrote.
        batches: as they reach the model: mappings with ``input_ids`` and ``labels``, [B, T] or [T], tensors or arrays,
            and, where the trainer has them, ``attention_mask`` (0 = padding) and ``position_ids``. Without an
            attention_mask padding may be at the end only. Rows after each other in one line need position_ids.
            Where the first batch has position_ids, and the directory is packed and stores where documents begin, the
            batches must keep the documents of a packed row apart; else a packed row is one row.
        epochs: the epochs that are trained on, in order; default all.
        complete: whether the batches hold all rows; False for the first few steps of a training run.

    Returns:
        How many rows, tokens and labels reached the model as they were written.

    Raises:
        ArrivalError: names the first difference and, where it can be found, its cause.
        IntegrityError: the files are not what was written.
        ConfigError: an epoch is not there.
    """
    path = local_directory(str(directory))
    batches = iter(batches)
    some = next(batches, None)
    files = _files(path, epochs, apart=some is not None and some.get("position_ids") is not None)
    written, came = files.rows(), pieces(batches if some is None else chain([some], batches))
    row = next(written, None)
    seen: list[int] = []
    rows = tokens = labels = 0
    for piece in came:
        if _is_padding(piece, row):
            continue
        if row is None:
            _too_many(files, piece)
        if not _equal(piece, row):
            _differ(files, row, piece, came)
        if not seen or seen[-1] != row.epoch:
            seen.append(row.epoch)
        rows, tokens = rows + (row.document == 0), tokens + len(row.labels)
        labels += int((row.labels != IGNORE).sum())
        row = next(written, None)
    if not rows:
        raise ArrivalError("no row came", where=str(directory), fix="record while the model trains")
    if complete and row is not None:
        left = 1 + sum(1 for _ in written)
        raise ArrivalError(
            f"the batches end before it; {left} rows are missing",
            where=row.name,
            fix=f"{_GONE}; complete=False checks only what came",
        )
    return BatchCheck(tuple(seen), rows, tokens, labels)


def _files(path: Path, epochs: Sequence[int] | None, *, apart: bool) -> _Files:
    """The files of some epochs; the documents of packed rows ``apart`` where the files say where they begin."""
    described = manifest.read(path, MASKED)
    there = [e["epoch"] for e in described["epochs"]]
    unknown = [e for e in epochs or () if e not in there]
    if unknown:
        raise ConfigError(f"epoch {unknown[0]} is not there", where=str(path), fix=f"it has {there}")
    asked = [[f for f in described["files"] if f.get("epoch") == e] for e in (there if epochs is None else epochs)]
    stored = described["identity"].get("add_columns", [])
    starts = next((name for name in ("seq_lengths", "position_ids") if name in stored), None)
    return _Files(path, asked, starts if apart else None)


def _is_padding(piece: Piece, row: _Row | None) -> bool:
    """Without an attention_mask, what has no label at the end of a line is padding, unless it is the row itself."""
    return not piece.hidden and not piece.trained and (row is None or not _same_ids(piece, row))


def _same_ids(piece: Piece, row: _Row) -> bool:
    """Whether the ids are the row's, and what follows them, if anything, can be padding."""
    n = len(row.input_ids)
    after = piece.input_ids[n:]
    if len(after) and (piece.hidden or (after != after[0]).any() or (piece.labels[n:] != IGNORE).any()):
        return False
    return np.array_equal(piece.input_ids[:n], row.input_ids)


def _equal(piece: Piece, row: _Row) -> bool:
    return _same_ids(piece, row) and np.array_equal(piece.labels[: len(row.labels)], row.labels)


def _find(files: _Files, piece: Piece, after: int) -> _Row | None:
    """The row that came: the first after a position, else the first; with the same labels, else with other ones."""
    best: dict[tuple[bool, bool], _Row] = {}
    for row in files.rows():
        if _same_ids(piece, row):
            best.setdefault((not _equal(piece, row), row.position <= after), row)
            if (False, False) in best:
                break
    return best[min(best)] if best else None


def _too_many(files: _Files, piece: Piece) -> NoReturn:
    again = _find(files, piece, -1)
    raise ArrivalError(
        f"every row came, and then {again.name} again"
        if again
        else "every row came, and then one that was not written",
        where=f"batch {piece.batch}",
        fix="look for num_train_epochs over 1: one pass is all epochs; several processes also fill up the last batch"
        if again
        else _OTHER_FILES,
    )


def _differ(files: _Files, row: _Row, piece: Piece, came: Iterator[Piece]) -> NoReturn:
    """Say how the piece differs from the row that should have come, and why, where that shows."""
    where, same = f"{row.name} (batch {piece.batch})", _same_ids(piece, row)
    other = _find(files, piece, row.position)
    if other is not None and (not same or _equal(piece, other)):
        following = next((p for p in came if p.hidden or p.trained), None)
        then = next((r for r in files.rows() if r.position == other.position + 1), None)
        if other.position > row.position and following and then and _same_ids(following, then):
            count = other.position - row.position
            raise ArrivalError(f"{count} rows are missing: {other.name} came in its place", where=where, fix=_GONE)
        raise ArrivalError(f"rows are out of order: {other.name} came in its place", where=where, fix=_ORDER)
    if same:
        labels = piece.labels[: len(row.labels)]
        positions = np.flatnonzero(labels != row.labels)
        t = int(positions[0])
        raise ArrivalError(
            f"label {labels[t]} came, {row.labels[t]} was written",
            where=f"{row.name}, position {t} (batch {piece.batch})",
            fix=_label_cause(labels, row, positions),
        )
    what, cause = _of_ids(piece.input_ids, row.input_ids)
    raise ArrivalError(what, where=where, fix=cause)


def _label_cause(came: Ints, row: _Row, positions: Ints) -> str:
    """Why labels differ, at ``positions``, where the ids are the same."""
    if np.array_equal(came[:-1], row.labels[1:]):
        return "the labels are one position too early: they were shifted, and the model shifts them again"
    if (came == IGNORE).all():
        return "the row lost all its labels: look for a loss on completions or assistant turns alone"
    if (came[positions] == IGNORE).all():
        alone = len(positions) == 1 and (row.labels[: positions[0]] == IGNORE).all()
        return f"{'its first label is' if alone else 'labels are'} gone: look for a mask of the trainer's own"
    if ((came[positions] == row.input_ids[positions]) | (came[positions] == IGNORE)).all():
        return "the labels were made again from the input ids: use a collator that keeps them"
    return _OTHER_FILES


def _of_ids(came: Ints, ids: Ints) -> tuple[str, str]:
    """How ids that are no row's differ from the row's, and the cause."""
    m, n = len(came), len(ids)
    if m < n and np.array_equal(came, ids[:m]):
        return f"the row was cut to {m} of its {n} tokens", _LIMIT
    if m < n and np.array_equal(came, ids[n - m :]):
        return f"the row lost its first {n - m} of {n} tokens", _LIMIT
    if m > n and np.array_equal(came[:n], ids):
        return f"{m} tokens came: the row's {n}, and others behind them", _BEHIND
    if m > n and np.array_equal(came[m - n :], ids):
        return f"{m} tokens came: the row's {n}, and others before them", _BEFORE
    positions = np.flatnonzero(came[:n] != ids[:m])
    t = int(positions[0])  # neither begins with the other
    return f"position {t}: id {came[t]} came, {ids[t]} was written; {m} ids came, {n} were written", _OTHER_FILES
