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
    if recipe.schedule == "sigmoid":
        return low + (high - low) / (1 + math.exp(-recipe.steepness * (p - recipe.midpoint)))
    if recipe.schedule == "linear":
        return low + (high - low) * p
    if recipe.schedule == "cosine":
        return low + (high - low) * (1 - math.cos(math.pi * p)) / 2
    if recipe.schedule == "constant":
        return high
    return high if p >= recipe.midpoint else low


def naive_selection(recipe: Recipe, trainable_entropy: list[float]) -> Any:
    """Whether an entropy may be dropped, given those that the quantile is taken over."""
    q = 0.5 if recipe.quantile is None else recipe.quantile
    if recipe.select == "random":
        return lambda h: True
    ordered, count = sorted(trainable_entropy), math.ceil(q * len(trainable_entropy))
    if recipe.threshold is None and count == 0:
        return lambda h: False
    if recipe.select == "low-entropy":
        low = ordered[count - 1] if recipe.threshold is None else recipe.threshold
        return lambda h: h <= low
    high = ordered[len(ordered) - count] if recipe.threshold is None else recipe.threshold
    return lambda h: h >= high


def drawn(unigram: list[int], word: int) -> int:
    place, running = math.floor((word >> 11) / 2**53 * sum(unigram)), 0
    for token, count in enumerate(unigram):
        running += count
        if place < running:
            return token
    raise AssertionError("the draw lies outside the counts")
