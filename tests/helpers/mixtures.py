"""Mixtures by the rules, read literally: one Python number at a time, nothing shared with the program but its words."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from entrodrop_prep.config import MaterializeConfig, Recipe
from entrodrop_prep.export.materialize import MaterializeSummary, materialize
from entrodrop_prep.masking.counter import DROP, ORDER, REPLACE, stream_key, token_words, token_words64
from entrodrop_prep.store.rows import Rows
from helpers.contract import SPECIAL, drawn, naive_rate, naive_selection, plain_rows
from helpers.scored import VOCABULARY, reseal, some_rows

SOURCES = {"train": some_rows(40), "more": some_rows(20, seed=8), "held": some_rows(15, seed=7)}
FIGURES = ("rows", "tokens", "trainable", "eligible", "dropped", "labels_left")
Row = tuple[list[int], list[int], list[int]]


@dataclass(frozen=True)
class Given:
    """A source; ``values`` are those of a kept column, by row_id."""

    rows: Rows
    weight: float = 1
    plain: bool = False
    values: Callable[[int], Any] = lambda row: None


def naive_mixture(
    sources: dict[str, Given], recipe: Recipe, epoch: int | None, **ids: Any
) -> tuple[list[Row], dict[str, dict[str, int]]]:
    """The rows of an epoch in order, and each source's figures; epoch 0 with nothing dropped where it is None."""
    rows = naive_rows(sources, recipe, epoch, **ids)
    figures = {name: dict.fromkeys(FIGURES, 0) for name in {r["source"] for r in rows}}
    for r in rows:
        counted = (sum(r["trainable"]), sum(r["eligible"]), sum(r["dropped"]), sum(x != -100 for x in r["labels"]))
        for name, value in zip(FIGURES, (1, len(r["ids"]), *counted), strict=True):
            figures[r["source"]][name] += value
    return [(r["inputs"], [1] * len(r["ids"]), r["labels"]) for r in rows], figures


def naive_rows(
    sources: dict[str, Given],
    recipe: Recipe,
    epoch: int | None,
    *,
    protected: set[int] = SPECIAL,
    drop_id: int | None = None,
) -> list[dict[str, Any]]:
    """As ``naive_mixture``: all that is known of each row. ``drop_id`` replaces what is dropped, else tokens drawn."""
    every = [
        {**r, "source": name, "value": sources[name].values(r["row_id"])}
        for name in sorted(sources)
        for r in plain_rows(sources[name].rows)
    ]
    masked = [r for r in every if not sources[r["source"]].plain]
    unigram = [0] * VOCABULARY
    for r in masked:
        for t, token in enumerate(r["ids"]):
            if r["entropy"][t] is not None or (t == 0 and r["window"] == 0):
                unigram[token] += token not in SPECIAL

    def scope_of(r: dict[str, Any]) -> Any:
        if recipe.scope == "row":
            return r["source"], r["row_id"], r["window"]
        return {"corpus": 0, "source": r["source"]}.get(recipe.scope, r["value"])

    pools: dict[Any, list[float]] = {}
    for r in masked:
        scores = [h for h, yes in zip(r["entropy"], r["trainable"], strict=True) if yes]
        pools.setdefault(scope_of(r), []).extend(scores)
    may = {scope: naive_selection(recipe, scores) for scope, scores in pools.items()}

    now = epoch or 0
    standing = []
    for r in every:
        name, given = r["source"], sources[r["source"]]
        one = np.array([r["row_id"]]), np.array([r["window"]], np.int32), np.array([1])
        chosen = token_words(stream_key(recipe.seed, "choose", name), *one, now)[0] / 2**32 < given.weight % 1
        times = (math.floor(given.weight) + bool(chosen)) * any(r["trainable"])
        standing += [{**r, "repeat": n, "keyed": name if n == 0 else f"{name}#{n}"} for n in range(times)]

    def place(r: dict[str, Any]) -> tuple[Any, ...]:
        e = {"epoch": now, "once": 0, "none": None}[recipe.shuffle]
        key = 0
        if e is not None:
            where = np.array([r["row_id"]]), np.array([r["window"]], np.int32), np.array([1]), e
            key = int(token_words64(stream_key(recipe.seed, ORDER, r["keyed"]), *where)[0])
        return key, r["source"], r["row_id"], r["window"], r["repeat"]

    ordered = sorted(standing, key=place)
    result = []
    for i, r in enumerate(ordered):
        progress = now + (0.5 if recipe.progress == "epoch" else (i + 0.5) / len(ordered))
        rate = naive_rate(recipe, min(1.0, progress / (recipe.horizon or recipe.epochs)))
        if recipe.rates is not None:
            rate = recipe.rates[now]
        if recipe.select == "random":
            rate *= 0.5 if recipe.quantile is None else recipe.quantile
        where = np.array([r["row_id"]]), np.array([r["window"]], np.int32), np.array([len(r["ids"])]), now
        words = token_words(stream_key(recipe.seed, DROP, r["keyed"]), *where).tolist()
        draws = token_words64(stream_key(recipe.seed, REPLACE, r["keyed"]), *where).tolist()
        whole = epoch is None or sources[r["source"]].plain
        eligible = [
            not whole
            and r["trainable"][t]
            and token not in protected
            and may[scope_of(r)](r["entropy"][t])
            and (recipe.keep_surprising is None or -r["logprob"][t] <= recipe.keep_surprising)
            for t, token in enumerate(r["ids"])
        ]
        dropped = [yes and w / 2**32 < rate for yes, w in zip(eligible, words, strict=True)]
        if recipe.target != "inputs" and dropped == r["trainable"]:
            best = max(h for h, yes in zip(r["entropy"], dropped, strict=True) if yes)
            dropped[next(t for t in range(len(dropped)) if dropped[t] and r["entropy"][t] == best)] = False
        ids, labels = list(r["ids"]), []
        for t, token in enumerate(r["ids"]):
            gone = dropped[t] and recipe.target != "inputs"
            labels.append(token if r["trainable"][t] and not gone else -100)
            if dropped[t] and recipe.target != "labels":
                ids[t] = drawn(unigram, draws[t]) if drop_id is None else drop_id
        result.append({**r, "inputs": ids, "labels": labels, "eligible": eligible, "dropped": dropped})
    return result


def whole_rows(rows: Rows) -> list[Row]:
    """Every row that has a label, with all its labels, in the source's order."""
    return [
        (r["ids"], [1] * len(r["ids"]), [i if yes else -100 for i, yes in zip(r["ids"], r["trainable"], strict=True)])
        for r in plain_rows(rows)
        if any(r["trainable"])
    ]


def run_materialize(scored: Path, out: Path, /, **settings: Any) -> MaterializeSummary:
    """``materialize`` of two epochs, or as ``settings`` say."""
    return materialize(MaterializeConfig(**{"scored": str(scored), "out": str(out), "epochs": 2, **settings}))


def rows_in(folder: Path) -> list[Row]:
    """(input_ids, attention_mask, labels) of each row of a folder in the order of its files."""
    rows: list[Row] = []
    for file in sorted(folder.glob("*.parquet")):
        rows += zip(*(c.to_pylist() for c in pq.read_table(file).columns), strict=True)
    return rows


def with_column(directory: Path, name: str, kind: pa.DataType, values: Callable[[int], Any]) -> Path:
    """Keep a column in a scored directory, with ``values`` of the row_id."""
    for path in sorted(directory.glob("shard-*.parquet")):
        table = pq.read_table(path)
        column = pa.array([values(r) for r in table["row_id"].to_pylist()], kind)
        reseal(directory, path.name, table.append_column(pa.field(name, kind), column))
    return directory
