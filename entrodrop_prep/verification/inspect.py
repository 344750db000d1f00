"""What a directory holds, and one of its rows token by token, as lines of text."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc

from entrodrop_prep.errors import ConfigError
from entrodrop_prep.export.card import aligned, epoch_table, left_out, source_table
from entrodrop_prep.export.card.tables import in_force
from entrodrop_prep.masking.mask import IGNORE
from entrodrop_prep.store import manifest
from entrodrop_prep.store.locks import reading_lock
from entrodrop_prep.store.rows import to_rows
from entrodrop_prep.store.schema import MASKED, family, masked_schema
from entrodrop_prep.store.scored import ScoredDataset
from entrodrop_prep.store.shards import check_file_schema, local_directory, read_batches
from entrodrop_prep.verification.run import kind_of

SHARES = (0.05, 0.25, 0.5, 0.75, 0.95)


def show(directory: str, row: int | None = None) -> Iterator[str]:
    """Lines that describe a scored or masked directory, or row ``row`` of it.

    Args:
        directory: a scored or masked directory.
        row: of a scored directory the ``row_id``; of a masked one the position in each epoch's order. None: a summary.

    Yields:
        Lines of text. Entropies and log-probabilities are in nats.

    Raises:
        IntegrityError: the directory is neither.
        ConfigError: the row is not there.
    """
    path = local_directory(directory)
    with reading_lock(path):
        return iter([*_lines(path, row)])


def _lines(path: Path, row: int | None) -> Iterator[str]:
    if family(kind_of(path)) == "scored":
        scored = ScoredDataset(path)
        scored.look()
        return _scored(scored) if row is None else _scored_row(scored, row)
    described = manifest.read(path, MASKED)
    manifest.look(path, described)
    return _masked(described) if row is None else _masked_row(path, described, row)


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


def _scored_row(scored: ScoredDataset, row: int) -> Iterator[str]:
    tokenizer = scored.tokenizer()
    found = False
    for batch in scored.batches():
        part = batch.filter(pc.equal(batch.column("row_id"), row))
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
            f"--row {row}: no such row, or it was left out",
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


def _masked_row(path: Path, described: dict[str, Any], row: int) -> Iterator[str]:
    rows = max(e["rows"] for e in described["epochs"])
    if row >= rows:
        raise ConfigError(f"--row {row}: an epoch has rows 0 to {rows - 1}", fix="give one of them")
    for epoch in described["epochs"]:
        position = row
        for entry in (e for e in described["files"] if e.get("epoch") == epoch["epoch"]):
            if position < entry["rows"]:
                yield f"epoch {epoch['epoch']}, row {row}: input id -> label (- = no loss)"
                schema = masked_schema(described["identity"].get("add_columns", ()))
                check_file_schema(path / entry["file"], schema)
                yield _masked_tokens(path / entry["file"], entry["content_digest"], position)
                break
            position -= entry["rows"]


def _masked_tokens(file: Path, content_digest: str, position: int) -> str:
    for batch in read_batches(file, content_digest=content_digest):
        if position < batch.num_rows:
            ids, labels = (batch.column(n)[position].as_py() for n in ("input_ids", "labels"))
            return " ".join(f"{i}->{'-' if label == IGNORE else label}" for i, label in zip(ids, labels, strict=True))
        position -= batch.num_rows
    return ""
