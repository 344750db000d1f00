"""The per-epoch figures as tables, for the card and the command line."""

from __future__ import annotations

from typing import Any

from entrodrop_prep.config import RECIPE_FIELDS
from entrodrop_prep.export.card.escape import words
from entrodrop_prep.terminal.text import printable

WIDTH = 80
"""Columns of the narrowest terminal."""


def epoch_table(epochs: list[dict[str, Any]]) -> list[list[str]]:
    """The per-epoch figures as text, header first."""
    packed = any("documents" in e for e in epochs)
    more = ["documents", "filled"] if packed else []
    rows = [["epoch", "drop rate", "rows", *more, "tokens", "trainable", "eligible", "dropped", "labels left"]]
    for e in epochs:
        low, high = f"{e['rate_min']:.3f}", f"{e['rate_max']:.3f}"
        rows.append(
            [
                str(e["epoch"]),
                low if low == high else f"{low} to {high}",
                f"{e['rows']:,}",
                *([f"{e['documents']:,}", f"{e['utilisation']:.1%}"] if packed else []),
                f"{e['tokens']:,}",
                f"{e['trainable']:,}",
                f"{e['eligible_share']:.1%}",
                f"{e['dropped_share']:.1%}",
                f"{e['labels_left']:,}",
            ]
        )
    return rows


def left_out(epochs: list[dict[str, Any]]) -> list[str]:
    """A line on the rows that ``--rows-multiple`` left out, if it was given."""
    counts = [f"{e['rows_left_out']:,}" for e in epochs if "rows_left_out" in e]
    return [f"rows left out at the end of each epoch (--rows-multiple): {', '.join(counts)}"] if counts else []


def source_table(epochs: list[dict[str, Any]]) -> list[list[str]]:
    """The figures of each source in each epoch as text, header first."""
    rows_or = "documents" if any("documents" in e for e in epochs) else "rows"
    rows = [["epoch", "source", rows_or, "tokens", "trainable", "dropped", "labels left"]]
    for e in epochs:
        for name, s in sorted(e.get("sources", {}).items()):
            figures = [f"{s[n]:,}" for n in (rows_or, "tokens", "trainable", "dropped", "labels_left")]
            rows.append([str(e["epoch"]), name, *figures])
    return rows


def in_force(manifest: dict[str, Any]) -> dict[str, Any]:
    """The settings of a masked directory's recipe, the quantile that is taken by default among them."""
    recipe = {**manifest["recipe"], "quantile": manifest["identity"].get("quantile")}
    return {name: recipe[name] for name in RECIPE_FIELDS if recipe.get(name) is not None}


def aligned(rows: list[list[str]], keys: int = 1) -> list[str]:
    """A table as lines, cells set right in columns.

    Where it is wider than ``WIDTH``, further columns follow below, beside the first ``keys`` columns again.
    """
    rows = [[printable(cell) for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    blocks = [list(range(keys))]
    for i in range(keys, len(widths)):
        if len(blocks[-1]) > keys and sum(widths[j] + 2 for j in blocks[-1]) + widths[i] > WIDTH:
            blocks.append(list(range(keys)))
        blocks[-1].append(i)
    return ["  ".join(row[i].rjust(widths[i]) for i in block) for block in blocks for row in rows]


def markdown(table: list[list[str]]) -> list[str]:
    """A table as lines of Markdown."""
    lines = [f"| {' | '.join(map(words, row))} |" for row in table]
    lines.insert(1, "|" + " ---: |" * len(table[0]))
    return lines
