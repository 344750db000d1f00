"""What a directory holds, and one of its rows token by token, as lines of text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow.compute as pc
from numpy.typing import NDArray

from entrodrop_prep.errors import ConfigError
from entrodrop_prep.export.card import aligned, epoch_table, left_out, source_table
from entrodrop_prep.export.card.tables import in_force
from entrodrop_prep.masking.epoch_rows import EpochRows
from entrodrop_prep.masking.mask import IGNORE
from entrodrop_prep.store import manifest
from entrodrop_prep.store.disk import scratch
from entrodrop_prep.store.locks import reading_lock
from entrodrop_prep.store.rows import to_rows
from entrodrop_prep.store.schema import MASKED, family, masked_schema
from entrodrop_prep.store.scored import ScoredDataset
from entrodrop_prep.store.shards import check_file_schema, local_directory, read_batches
from entrodrop_prep.verification.masks import masks_of
from entrodrop_prep.verification.pieces import pieces
from entrodrop_prep.verification.run import kind_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DROPPED = ("⟦", "⟧")
"""Before and after dropped tokens that are shown as text."""
SHARES = (0.05, 0.25, 0.5, 0.75, 0.95)


def show(
    directory: str,
    row: int | None = None,
    *,
    row_id: int | None = None,
    name: str | None = None,
    epoch: int | None = None,
    ids: bool = False,
    against: list[str] | None = None,
    against_scores: Sequence[str] = (),
) -> Iterator[str]:
    """Lines that describe a scored or masked directory, or one row of it.

    Args:
        directory: a scored or masked directory.
        row: of a scored directory the ``row_id``; of a masked one the position in each epoch's order. None, as the two
            below: a summary.
        row_id: the row's position in the source.
        name: the row's name in the column that was given as ``--id-column``.
        epoch: of a masked directory the epoch to show; None: all of them.
        ids: of a masked directory ``input id -> label`` in place of text.
        against: of a masked directory what it was made from, ``SCORED`` or ``NAME=SCORED``: its rows are shown as text
            then, each token that is dropped between ``DROPPED``, with its replacement if it has one.
        against_scores: the scores that these were compared with, ``SCORED2`` or ``NAME=SCORED2``.

    Yields:
        Lines of text. Entropies and log-probabilities are in nats.

    Raises:
        IntegrityError: the directory is neither.
        ConfigError: the row is not there; settings that do not go together.
    """
    path = local_directory(directory)
    if sum(given is not None for given in (row, row_id, name)) > 1:
        raise ConfigError("--row, --row-id and --id exclude each other", fix="give one of them")
    one = next((given for given in (row, row_id, name) if given is not None), None)
    if one is None and (ids or epoch is not None):
        raise ConfigError("--ids and --epoch are of one row", fix="give --row, --row-id or --id too")
    with reading_lock(path):
        if family(kind_of(path)) == "scored":
            scored = ScoredDataset(path)
            scored.look()
            if against or epoch is not None or ids:
                raise ConfigError("--against, --epoch and --ids are for masked directories", fix="leave them out")
            return iter(
                [*(_scored(scored) if one is None else _scored_row(scored, row if row_id is None else row_id, name))]
            )
        described = manifest.read(path, MASKED)
        manifest.look(path, described)
        if one is None:
            return iter([*_masked(described)])
        if epoch is not None and epoch not in [e["epoch"] for e in described["epochs"]]:
            raise ConfigError(f"--epoch {epoch}: it is not there", fix=f"it has {_named(described)}")
        epochs = [e["epoch"] for e in described["epochs"] if epoch in (None, e["epoch"])]
        if row is not None and (ids or not against):
            return iter([*_masked_row(path, described, row, epochs, hint=not ids)])
        if ids:
            raise ConfigError("--ids shows a row of the files", fix="choose it with --row")
        with scratch() as cache:
            rows = masks_of(path, against, against_scores, cache)[1].epoch_rows
            return iter([*_texts(rows, epochs, row, row_id, name)])


def _named(described: dict[str, Any]) -> str:
    return "epochs " + ", ".join(str(e["epoch"]) for e in described["epochs"])


def _texts(
    rows: EpochRows, epochs: Sequence[int], row: int | None, row_id: int | None, name: str | None
) -> Iterator[str]:
    """A row in each of the epochs as text. Raises ConfigError where it is in none of them."""
    if row is not None and rows.config.pack:
        raise ConfigError("a packed row holds several documents", fix="choose one with --row-id or --id, or give --ids")
    arrays, found = rows.columns.arrays, False
    keys = None if row is not None else _keys(rows, row_id, name)
    tokenizers: dict[int, PreTrainedTokenizerBase] = {}
    for epoch in epochs:
        index = rows.order(epoch).index
        if keys is None:
            positions = np.array([row] if row is not None and row < len(index) else [], np.int64)
        else:
            mine = np.flatnonzero(np.isin(arrays["row_id"][index], [k[1] for k in keys]))
            source = arrays["source"][index[mine]]
            positions = mine[
                [(s, r) in keys for s, r in zip(source.tolist(), arrays["row_id"][index[mine]].tolist(), strict=True)]
            ]
        for some, scored, made, _, number in rows.masked(epoch, positions):
            source_of = rows.sources.all[number]
            if number not in tokenizers:
                tokenizers[number] = source_of.scored.tokenizer()
            for r, at in enumerate(some.tolist()):
                found = True
                span = slice(int(scored.offsets[r]), int(scored.offsets[r + 1]))
                trained, dropped = scored.trainable[span], made.dropped[span]
                label = f"{source_of.name} " * rows.sources.named + f"row_id {scored.row_id[r]}"
                window = f", window {scored.window[r]}" if scored.window[r] else ""
                share = f"{int(dropped.sum()):,} of {int(trained.sum()):,} trainable tokens dropped"
                yield f"-- epoch {epoch}, row {positions[at]}: {label}{window}, {share}"
                yield from _marked(tokenizers[number], scored.input_ids[span], made.input_ids[span], dropped).split(
                    "\n"
                )
    if not found:
        wanted = f"--row {row}" if row is not None else f"--row-id {row_id}" if name is None else f"--id {name!r}"
        raise ConfigError(f"{wanted}: no such row, or it was left out", fix=f"there are {len(rows.columns):,} rows")


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


def _marked(
    tokenizer: PreTrainedTokenizerBase, ids: NDArray[np.int32], fed: NDArray[np.int32], dropped: NDArray[np.bool_]
) -> str:
    """The text of tokens [T], those dropped [T] between ``DROPPED``; ``fed`` [T] are the ids after replacing."""
    begin, end = DROPPED
    text = ""
    for piece, was, now, gone in zip(pieces(tokenizer, ids.tolist()), ids.tolist(), fed.tolist(), dropped, strict=True):
        piece = piece.replace(begin, "[").replace(end, "]")
        if not gone:
            text += piece
            continue
        new = "" if now == was else f"→{tokenizer.decode([now])!s}".replace(begin, "[").replace(end, "]")
        first, *others = piece.split("\n")
        new = new.replace("\n", "⏎")
        text += f"⏎{end}\n{begin}".join([begin + first, *others]) + new + end
    return text.replace(end + begin, "").replace(begin + end, "")


def _scored(scored: ScoredDataset) -> Iterator[str]:
    m = scored.manifest
    yield f"{m['schema']}  {scored.directory}"
    yield f"source     {m['source']['name']} ({m['identity']['row_format']})"
    yield f"model      {m['model']['name']}, vocabulary {scored.vocab_size:,}, {m['identity']['dtype']}"
    yield f"rows       {m['counts']['rows']:,} of {m['counts']['rows_read']:,}, in {m['counts']['windows']:,} windows"
    yield f"tokens     {m['counts']['tokens']:,}, {m['counts']['trainable_tokens']:,} trainable"
    yield f"digest     {scored.content_digest}"
    some = next(scored.batches(), None)  # the first 260,000 tokens or so
    if some is None:
        return
    rows = to_rows(some)
    values = rows.entropy[rows.trainable].astype(np.float64)
    if len(values):
        shares = "  ".join(f"{q:.0%} {v:.3f}" for q, v in zip(SHARES, np.quantile(values, SHARES), strict=True))
        yield f"entropy    {shares}  (nats, of the first {len(values):,} trainable tokens)"


def _scored_row(scored: ScoredDataset, row: int | None, name: str | None) -> Iterator[str]:
    tokenizer = scored.tokenizer()
    found = False
    if name is not None and "id" not in scored.schema.names:
        raise ConfigError("--id: the rows were scored without --id-column", fix="choose one with --row")
    for batch in scored.batches():
        is_it = pc.equal(batch.column("row_id"), row) if name is None else pc.equal(batch.column("id"), name)
        part = batch.filter(is_it)
        if part.num_rows and not found:
            found = True
            yield f"{'window':>6} {'t':>5} {'id':>7} {'entropy':>8} {'logprob':>8} loss  token"
        rows = to_rows(part)
        for r in range(part.num_rows):
            for t in range(int(rows.lengths[r])):
                i = int(rows.offsets[r]) + t
                entropy, logprob = _number(rows.entropy[i]), "-" if rows.logprob is None else _number(rows.logprob[i])
                text = tokenizer.decode([int(rows.input_ids[i])])
                yield (
                    f"{rows.window[r]:>6} {t:>5} {rows.input_ids[i]:>7} {entropy:>8} {logprob:>8} "
                    f"{'yes' if rows.loss_mask[i] else '-':>4}  {text!r}"
                )
    if not found:
        raise ConfigError(
            f"{f'--row {row}' if name is None else f'--id {name!r}'}: no such row, or it was left out",
            fix=f"the source has rows 0 to {scored.manifest['counts']['rows_read'] - 1}",
        )


def _number(value: Any) -> str:
    return "-" if np.isnan(value) else f"{float(value):.4f}"


def _masked(described: dict[str, Any]) -> Iterator[str]:
    scored = described["scored"]
    if isinstance(scored, list):
        yield f"{MASKED}  from {len(scored)} source{'s' if len(scored) > 1 else ''}"
        for s in scored:
            text = f"{s['source']['name']}, scored by {s['model']['name']}, weight {s['weight']:g}"
            yield f"source     {s['name']}: {text}{', never masked' if s['plain'] else ''}"
    else:
        yield f"{MASKED}  from {scored['source']['name']}, scored by {scored['model']['name']}"
    yield "recipe     " + ", ".join(f"{k} {v}" for k, v in in_force(described).items())
    if described["tau_nats"] is not None:
        yield f"threshold  {_thresholds(described['tau_nats'])}"
    yield f"digest     {described['content_digest']}"
    yield from aligned(epoch_table(described["epochs"]))
    yield from left_out(described["epochs"])
    if any("sources" in e for e in described["epochs"]):
        yield from aligned(source_table(described["epochs"]), keys=2)
    for name in ("plain", "validation"):
        if name in described:
            text = described[name]
            yield f"{name:<10} {text['rows']:,} rows, {text['tokens']:,} tokens, {text['labels_left']:,} labels"


def _thresholds(tau: Any) -> str:
    """One threshold, those of each source, or the range of those of a column's values."""
    if isinstance(tau, dict) and "values" in tau:
        numbers = [t for _, t in tau["values"] if not isinstance(t, str)]
        ends = f", {min(numbers):g} to {max(numbers):g} nats" if numbers else ""
        return f"of {len(tau['values']):,} values of {tau['column']}{ends}"
    if isinstance(tau, dict):
        return ", ".join(f"{name} {_thresholds(t)}" for name, t in tau.items())
    return tau if isinstance(tau, str) else f"{tau:g} nats"


def _masked_row(path: Path, described: dict[str, Any], row: int, epochs: Sequence[int], hint: bool) -> Iterator[str]:
    rows = max(e["rows"] for e in described["epochs"])
    if row >= rows:
        raise ConfigError(f"--row {row}: an epoch has rows 0 to {rows - 1}", fix="give one of them")
    for epoch in (e for e in described["epochs"] if e["epoch"] in epochs):
        position = row
        for entry in (e for e in described["files"] if e.get("epoch") == epoch["epoch"]):
            if position < entry["rows"]:
                yield f"epoch {epoch['epoch']}, row {row}: input id -> label (- = no loss)"
                schema = masked_schema(described["identity"].get("add_columns", ()))
                check_file_schema(path / entry["file"], schema)
                yield _masked_tokens(path / entry["file"], entry["content_digest"], position)
                break
            position -= entry["rows"]
    if hint:
        yield "to see text: --against SCORED, what it was made from"


def _masked_tokens(file: Path, content_digest: str, position: int) -> str:
    for batch in read_batches(file, content_digest=content_digest):
        if position < batch.num_rows:
            ids, labels = (batch.column(n)[position].as_py() for n in ("input_ids", "labels"))
            return " ".join(f"{i}->{'-' if label == IGNORE else label}" for i, label in zip(ids, labels, strict=True))
        position -= batch.num_rows
    return ""
