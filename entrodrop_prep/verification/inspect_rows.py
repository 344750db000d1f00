"""Single rows of a directory: what is known of each token, and the same as lines of text."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from entrodrop_prep.errors import ConfigError
from entrodrop_prep.masking.epoch_rows import EpochRows
from entrodrop_prep.masking.mask import IGNORE
from entrodrop_prep.store.rows import to_rows
from entrodrop_prep.store.schema import masked_schema
from entrodrop_prep.store.scored import ScoredDataset
from entrodrop_prep.store.shards import check_file_schema, read_batches
from entrodrop_prep.terminal.output import STYLES, Span
from entrodrop_prep.verification.pieces import pieces

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Row = dict[str, Any]
"""Plain JSON values; ``tokens`` has one object a token."""
Line = str | list[Span]
QUARTERS = ("lowest", "low", "high", "highest")
"""Styles of tokens by the quarter that their entropy is in."""


# Of a scored directory.


def scored_rows(scored: ScoredDataset, row_id: int | None, name: str | None) -> list[Row]:
    """The windows of the row with this ``row_id``, or this name. Raises ConfigError where there is none."""
    if name is not None and "id" not in scored.schema.names:
        raise ConfigError("--id: the rows were scored without --id-column", fix="choose one with --row")
    tokenizer, found = scored.tokenizer(), []
    for batch in scored.batches():
        number = batch.column("row_id").to_numpy()
        part = batch.filter(pa.array(number == row_id) if name is None else pc.equal(batch.column("id"), name))
        rows = to_rows(part)
        for r in range(part.num_rows):
            span = slice(int(rows.offsets[r]), int(rows.offsets[r + 1]))
            ids = rows.input_ids[span].tolist()
            logprob = [None] * len(ids) if rows.logprob is None else _numbers(rows.logprob[span])
            values = (ids, pieces(tokenizer, ids), _numbers(rows.entropy[span]), logprob, rows.loss_mask[span].tolist())
            names = ("id", "text", "entropy", "logprob", "loss_mask")
            tokens = [dict(zip(names, token, strict=True)) for token in zip(*values, strict=True)]
            found.append({"row_id": int(rows.row_id[r]), "window": int(rows.window[r]), "tokens": tokens})
    if not found:
        raise ConfigError(
            f"{f'--row {row_id}' if name is None else f'--id {name!r}'}: no such row, or it was left out",
            fix=f"the source has rows 0 to {scored.manifest['counts']['rows_read'] - 1}",
        )
    return found


def _numbers(values: Any) -> list[float | None]:
    return [None if np.isnan(value) else float(value) for value in values]


def scored_table(rows: list[Row]) -> Iterator[str]:
    """A line a token."""
    yield f"{'window':>6} {'t':>5} {'id':>7} {'entropy':>8} {'logprob':>8} loss  token"
    for row in rows:
        for t, token in enumerate(row["tokens"]):
            scores = ["-" if token[n] is None else f"{token[n]:.4f}" for n in ("entropy", "logprob")]
            yield (
                f"{row['window']:>6} {t:>5} {token['id']:>7} {scores[0]:>8} {scores[1]:>8} "
                f"{'yes' if token['loss_mask'] else '-':>4}  {token['text']!r}"
            )


def scored_text(rows: list[Row]) -> Iterator[Line]:
    """The text, each trainable token in the style of its quarter of the row's entropies."""
    for row in rows:
        entropies = [token["entropy"] for token in row["tokens"] if token["loss_mask"] and token["entropy"] is not None]
        edges = np.quantile(entropies, (0.25, 0.5, 0.75)).tolist() if entropies else [0.0, 0.0, 0.0]
        window = f", window {row['window']}" if row["window"] else ""
        yield f"-- row_id {row['row_id']}{window}: {len(row['tokens']):,} tokens, {len(entropies):,} trainable"
        yield from _text(
            (token["text"], _quarter(token["entropy"], edges) if token["loss_mask"] else "context")
            for token in row["tokens"]
        )
        shares = ", ".join(f"{edge:.3f}" for edge in edges)
        yield [
            (f"-- entropy in quarters, at {shares} nats: ", ""),
            *(span for name in QUARTERS for span in ((name, name), (" ", ""))),
        ]


def _quarter(entropy: float | None, edges: Sequence[float]) -> str:
    return "context" if entropy is None else QUARTERS[sum(entropy > edge for edge in edges)]


# Of a masked directory, as its files have them.


def stored_rows(path: Path, described: dict[str, Any], position: int, epochs: Sequence[int]) -> list[Row]:
    """The row at a position of each epoch that has so many, from the files."""
    found, schema = [], masked_schema(described["identity"].get("add_columns", ()))
    for epoch in epochs:
        at = position
        for entry in (e for e in described["files"] if e.get("epoch") == epoch):
            if at < entry["rows"]:
                check_file_schema(path / entry["file"], schema)
                tokens = _stored_tokens(path / entry["file"], entry["content_digest"], at)
                found.append({"epoch": epoch, "position": position, "tokens": tokens})
                break
            at -= entry["rows"]
    return found


def _stored_tokens(file: Path, content_digest: str, position: int) -> list[dict[str, int]]:
    for batch in read_batches(file, content_digest=content_digest):
        if position < batch.num_rows:
            ids, labels = (batch.column(n)[position].as_py() for n in ("input_ids", "labels"))
            return [{"input_id": i, "label": label} for i, label in zip(ids, labels, strict=True)]
        position -= batch.num_rows
    return []


def stored_ids(rows: list[Row]) -> Iterator[str]:
    """The ids and labels of each epoch, in a line."""
    for row in rows:
        yield f"epoch {row['epoch']}, row {row['position']}: input id -> label (- = no loss)"
        labels = ["-" if token["label"] == IGNORE else token["label"] for token in row["tokens"]]
        yield " ".join(f"{token['input_id']}->{label}" for token, label in zip(row["tokens"], labels, strict=True))


# Of a masked directory, made again from its scores.


def made_rows(
    rows: EpochRows, epochs: Sequence[int], position: int | None, row_id: int | None, name: str | None
) -> list[Row]:
    """A row in each of the epochs, with its text. Raises ConfigError where it is in none of them."""
    if position is not None and rows.config.pack:
        raise ConfigError("a packed row holds several documents", fix="choose one with --row-id or --id, or give --ids")
    arrays, found = rows.columns.arrays, []
    keys = None if position is not None else _keys(rows, row_id, name)
    tokenizers: dict[int, PreTrainedTokenizerBase] = {}
    for epoch in epochs:
        index = rows.order(epoch).index
        if keys is None:
            positions = np.array([position] if position is not None and position < len(index) else [], np.int64)
        else:
            mine = np.flatnonzero(np.isin(arrays["row_id"][index], [k[1] for k in keys]))
            of = zip(arrays["source"][index[mine]].tolist(), arrays["row_id"][index[mine]].tolist(), strict=True)
            positions = mine[[key in keys for key in of]]
        for some, scored, made, _, number in rows.masked(epoch, positions):
            source = rows.sources.all[number]
            if number not in tokenizers:
                tokenizers[number] = source.scored.tokenizer()
            for r, at in enumerate(some.tolist()):
                span = slice(int(scored.offsets[r]), int(scored.offsets[r + 1]))
                ids = scored.input_ids[span].tolist()
                flags = (
                    array[span].tolist() for array in (scored.trainable, made.dropped, made.input_ids, made.labels)
                )
                columns = (ids, pieces(tokenizers[number], ids), *flags)
                names = ("id", "text", "trainable", "dropped", "input_id", "label")
                tokens = [dict(zip(names, token, strict=True)) for token in zip(*columns, strict=True)]
                for token in tokens:
                    if token["input_id"] != token["id"]:
                        token["replacement"] = str(tokenizers[number].decode([token["input_id"]]))
                found.append(
                    {
                        **{"epoch": epoch, "position": int(positions[at]), "row_id": int(scored.row_id[r])},
                        "source": source.name if rows.sources.named else None,
                        **{"window": int(scored.window[r]), "tokens": tokens},
                    }
                )
    if not found:
        wanted = (
            f"--row {position}" if position is not None else f"--row-id {row_id}" if name is None else f"--id {name!r}"
        )
        raise ConfigError(f"{wanted}: no such row, or it was left out", fix=f"there are {len(rows.columns):,} rows")
    return found


def _keys(rows: EpochRows, row_id: int | None, name: str | None) -> set[tuple[int, int]]:
    """The source's number and ``row_id`` of each row that is meant: several where sources have the same ones."""
    if name is None:
        return {(number, int(row_id or 0)) for number in range(len(rows.sources.all))}
    with_names = [(n, s) for n, s in enumerate(rows.sources.all) if "id" in s.scored.schema.names]
    if not with_names:
        raise ConfigError("--id: the rows were scored without --id-column", fix="choose one with --row-id")
    return {
        (number, row)
        for number, source in with_names
        for batch in source.scored.batches()
        for row in batch.filter(pc.equal(batch.column("id"), name)).column("row_id").to_pylist()
    }


def made_text(rows: list[Row]) -> Iterator[Line]:
    """The text of each epoch, dropped tokens in their style, with what replaces them."""
    for row in rows:
        label = f"{row['source']} " * bool(row["source"]) + f"row_id {row['row_id']}"
        window = f", window {row['window']}" if row["window"] else ""
        trained, dropped = (sum(token[n] for token in row["tokens"]) for n in ("trainable", "dropped"))
        share = f"{dropped:,} of {trained:,} trainable tokens dropped"
        yield f"-- epoch {row['epoch']}, row {row['position']}: {label}{window}, {share}"
        yield from _text(
            (token["text"], "dropped" if token["dropped"] else "", token.get("replacement", ""))
            for token in row["tokens"]
        )


def _text(tokens: Iterable[tuple[str, ...]]) -> list[list[Span]]:
    """Lines of (text, style[, replacement]); where a style has marks, a line's end that it has is shown, too."""
    lines: list[list[Span]] = [[]]
    for text, style, *new in tokens:
        end = "⏎" if STYLES[style][1] else ""
        first, *others = text.split("\n")
        lines[-1].append((first, style))
        for other in others:
            lines[-1].append((end, style))
            lines.append([(other, style)])
        if new and new[0]:
            lines[-1].append((f"→{new[0]}".replace("\n", "⏎"), style))
    return lines
