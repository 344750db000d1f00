"""What a directory holds, and its rows token by token, as plain JSON values and as lines of text."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from entrodrop_prep.errors import ConfigError
from entrodrop_prep.export.card import aligned, epoch_table, left_out, source_table
from entrodrop_prep.export.card.tables import WIDTH, in_force
from entrodrop_prep.store import manifest
from entrodrop_prep.store.disk import scratch
from entrodrop_prep.store.layout import OTHER_FILES
from entrodrop_prep.store.locks import reading_lock
from entrodrop_prep.store.rows import to_rows
from entrodrop_prep.store.schema import MASKED, family
from entrodrop_prep.store.scored import ScoredDataset
from entrodrop_prep.store.shards import local_directory
from entrodrop_prep.terminal.output import styled
from entrodrop_prep.verification.inspect_rows import (
    Line,
    made_rows,
    made_text,
    scored_rows,
    scored_table,
    scored_text,
    stored_ids,
    stored_rows,
)
from entrodrop_prep.verification.masks import masks_of
from entrodrop_prep.verification.run import kind_of

SHARES = (0.05, 0.25, 0.5, 0.75, 0.95)
_SUMMED = ("rows", "tokens", "trainable", "dropped", "labels_left")


@dataclass(frozen=True)
class Inspected:
    """What was found. Iterating over it gives the lines as plain text.

    Attributes:
        found: plain JSON values: what ``inspect --json`` prints.
        lines: each a text, or spans of text with their style (``terminal.output.STYLES``).
    """

    found: dict[str, Any]
    lines: list[Line]

    def __iter__(self) -> Iterator[str]:
        return (styled(line, colour=False) for line in self.lines)


def show(
    directory: str,
    row: int | None = None,
    *,
    row_id: int | None = None,
    name: str | None = None,
    epoch: int | None = None,
    ids: bool = False,
    against: str | Sequence[str] | None = None,
    against_scores: Sequence[str] = (),
) -> Inspected:
    """What a scored or masked directory holds, or one row of it.

    Args:
        directory: a scored or masked directory.
        row: of a scored directory the ``row_id``; of a masked one the position in each epoch's order. None, as the two
            below: a summary.
        row_id: the row's position in the source.
        name: the row's name in the column that was given as ``--id-column``.
        epoch: of a masked directory the epoch to show; None: all of them.
        ids: of a scored directory a table of its tokens, of a masked one ``input id -> label``, in place of text.
        against: of a masked directory what it was made from, ``SCORED`` or ``NAME=SCORED``: its rows are shown as text
            then, dropped tokens marked, with their replacement if they have one.
        against_scores: the scores that these were compared with, ``SCORED2`` or ``NAME=SCORED2``.

    Returns:
        Values and lines. Entropies and log-probabilities are in nats.

    Raises:
        IntegrityError: the directory is neither.
        ConfigError: the row is not there; settings that do not go together.
    """
    path = local_directory(directory)
    if sum(given is not None for given in (row, row_id, name)) > 1:
        raise ConfigError("--row, --row-id and --id exclude each other", fix="give one of them")
    whole = row is None and row_id is None and name is None
    if whole and (ids or epoch is not None):
        raise ConfigError("--ids and --epoch are of one row", fix="give --row, --row-id or --id too")
    with reading_lock(path):
        if family(kind_of(path)) == "scored":
            scored = ScoredDataset(path)
            scored.look()
            if against or epoch is not None:
                raise ConfigError("--against and --epoch are for masked directories", fix="leave them out")
            found = _of_scored(directory, scored)
            if whole:
                return Inspected(found, [*_scored(scored, found)])
            found["rows"] = scored_rows(scored, row if row_id is None else row_id, name)
            return Inspected(found, [*(scored_table if ids else scored_text)(found["rows"])])
        described = manifest.read(path, MASKED)
        manifest.look(path, described)
        found = _of_masked(directory, described)
        if whole:
            return Inspected(found, [*_masked(described, found)])
        epochs = [e["epoch"] for e in described["epochs"] if epoch in (None, e["epoch"])]
        if not epochs:
            there = ", ".join(str(e["epoch"]) for e in described["epochs"])
            raise ConfigError(f"--epoch {epoch}: it is not there", fix=f"it has epochs {there}")
        most = max(e["rows"] for e in described["epochs"])
        if row is not None and row >= most:
            raise ConfigError(f"--row {row}: an epoch has rows 0 to {most - 1}", fix="give one of them")
        if row is not None and (ids or not against):
            found["rows"] = stored_rows(path, described, row, epochs)
            hint = [] if ids else ["to see text: --against SCORED, what it was made from"]
            return Inspected(found, [*stored_ids(found["rows"]), *hint])
        if ids:
            raise ConfigError("--ids shows a row of the files", fix="choose it with --row")
        with scratch() as cache:
            rows = masks_of(path, against, against_scores, cache)[1].epoch_rows
            found["rows"] = made_rows(rows, epochs, row, row_id, name)
        return Inspected(found, [*made_text(found["rows"])])


def _of_scored(directory: str, scored: ScoredDataset) -> dict[str, Any]:
    """What is printed as JSON of a scored directory."""
    m, quantiles, tokens = scored.manifest, None, 0
    some = next(scored.batches(), None)  # the first 260,000 tokens or so
    if some is not None:
        rows = to_rows(some)
        values = rows.entropy[rows.trainable].astype(np.float64)
        tokens = len(values)
        quantiles = dict(zip(map(str, SHARES), np.quantile(values, SHARES).tolist(), strict=True)) if tokens else None
    return {
        "directory": directory,
        **{"schema": m["schema"], "content_digest": scored.content_digest, "settings": m["identity"]},
        **{"source": m["source"]["name"], "model": m["model"]["name"], "counts": m["counts"]},
        "entropy": {"tokens": tokens, "quantiles": quantiles},
        **{"tau_nats": None, "epochs": [], "plain": None, "validation": None, "rows": []},
    }


def _scored(scored: ScoredDataset, found: dict[str, Any]) -> Iterator[str]:
    identity, counts, entropy = found["settings"], found["counts"], found["entropy"]
    yield f"{found['schema']}  {scored.directory}"
    yield f"source     {found['source']} ({identity['row_format']})"
    yield f"model      {found['model']}, vocabulary {scored.vocab_size:,}, {identity['dtype']}"
    yield f"rows       {counts['rows']:,} of {counts['rows_read']:,}, in {counts['windows']:,} windows"
    yield f"tokens     {counts['tokens']:,}, {counts['trainable_tokens']:,} trainable"
    yield f"digest     {found['content_digest']}"
    if entropy["quantiles"]:
        shares = "  ".join(f"{float(q):.0%} {v:.3f}" for q, v in entropy["quantiles"].items())
        yield f"entropy    {shares}"
        yield f"           (nats, of the first {entropy['tokens']:,} trainable tokens)"


def _of_masked(directory: str, described: dict[str, Any]) -> dict[str, Any]:
    """What is printed as JSON of a masked directory."""
    scored, epochs = described["scored"], described["epochs"]
    sources = scored if isinstance(scored, list) else [scored]
    return {
        "directory": directory,
        **{"schema": MASKED, "content_digest": described["content_digest"], "settings": in_force(described)},
        "source": ", ".join(s["source"]["name"] for s in sources),
        "model": ", ".join(dict.fromkeys(s["model"]["name"] for s in sources)),
        "counts": {n: sum(e[n] for e in epochs) for n in _SUMMED}
        | {"rows_without_loss": described["rows_without_loss"]},
        **{"entropy": None, "tau_nats": described["tau_nats"], "epochs": epochs},
        **{name: described.get(name) for name in OTHER_FILES},
        "rows": [],
    }


def _masked(described: dict[str, Any], found: dict[str, Any]) -> Iterator[str]:
    scored = described["scored"]
    if isinstance(scored, list):
        yield f"{MASKED}  from {len(scored)} source{'s' if len(scored) > 1 else ''}"
        for s in scored:
            text = f"{s['source']['name']}, scored by {s['model']['name']}, weight {s['weight']:g}"
            yield f"source     {s['name']}: {text}{', never masked' if s['plain'] else ''}"
    else:
        yield f"{MASKED}  from {found['source']}, scored by {found['model']}"
    recipe = ", ".join(f"{k} {v}" for k, v in found["settings"].items())
    yield from textwrap.wrap(recipe, WIDTH, initial_indent="recipe     ", subsequent_indent=" " * 11)
    if found["tau_nats"] is not None:
        yield f"threshold  {_thresholds(found['tau_nats'])}"
    yield f"digest     {found['content_digest']}"
    yield from aligned(epoch_table(found["epochs"]))
    yield from left_out(found["epochs"])
    if any("sources" in e for e in found["epochs"]):
        yield from aligned(source_table(found["epochs"]), keys=2)
    for name in OTHER_FILES:
        if found[name]:
            text = found[name]
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
