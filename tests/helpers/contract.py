"""The contract of the masks, read literally: one Python number at a time."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

from entrodrop_prep.config import Recipe
from entrodrop_prep.store.rows import Rows
from helpers.scored import FIRST_PLAIN_ID

SPECIAL = set(range(FIRST_PLAIN_ID))


def plain_rows(rows: Rows) -> list[dict[str, Any]]:
    """Each window by itself, as Python numbers; a null score is None."""
    result = []
    for i, (a, b) in enumerate(pairwise(rows.offsets.tolist())):
        scores = {
            name: [None if math.isnan(x) else float(x) for x in values[a:b]]
            for name, values in (("entropy", rows.entropy), ("logprob", rows.logprob))
        }
        loss = rows.loss_mask[a:b].tolist()
        row = {"row_id": int(rows.row_id[i]), "window": int(rows.window[i]), "ids": rows.input_ids[a:b].tolist()}
        result.append({**row, **scores, "trainable": [t >= 1 and loss[t] for t in range(b - a)]})
    return result


def naive_rate(recipe: Recipe, p: float) -> float:
    low, high = recipe.min_rate, recipe.max_rate
    return {
        "sigmoid": lambda: low + (high - low) * (1 + math.tanh(recipe.steepness * (p - recipe.midpoint) / 2)) / 2,
        "linear": lambda: low + (high - low) * p,
        "cosine": lambda: low + (high - low) * (1 - math.cos(math.pi * p)) / 2,
        "constant": lambda: high,
        "step": lambda: high if p >= recipe.midpoint else low,
    }[recipe.schedule]()


def naive_tau(q: float, scores: list[float], *, high: bool) -> float:
    """sorted[ceil(q n) - 1], or sorted[n - ceil(q n)] from above; a number that selects none where ceil(q n) is 0."""
    ordered, count = sorted(scores), math.ceil(q * len(scores))
    if count == 0:
        return math.inf if high else -math.inf
    return ordered[len(ordered) - count] if high else ordered[count - 1]


def naive_selection(recipe: Recipe, scores: list[float]) -> Any:
    """Whether a score may be dropped, given those that the quantile is taken over."""
    if recipe.select == "random":
        return lambda score: True
    high, tau = recipe.select.startswith("high"), recipe.threshold
    if tau is None:
        tau = naive_tau(0.5 if recipe.quantile is None else recipe.quantile, scores, high=high)
    return (lambda score: score >= tau) if high else (lambda score: score <= tau)


def drawn(unigram: list[int], word: int) -> int:
    place, running = math.floor((word >> 11) / 2**53 * sum(unigram)), 0
    for token, count in enumerate(unigram):
        running += count
        if place < running:
            return token
    raise AssertionError("the draw lies outside the counts")
