"""Scores against a model whose distributions are known in closed form."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from helpers.models import Markov

ABSOLUTE = {"float32": 1e-4, "float16": 1e-4}


RELATIVE = {"float32": 0.0, "float16": 2.0**-11}


LONG = 256


def check(
    found: Sequence[dict[str, Any]],
    documents: Sequence[Sequence[int]],
    model: Markov,
    *,
    max_length: int = LONG,
    overlap: int = 0,
    score_dtype: str = "float32",
    masks: Sequence[Sequence[int]] | None = None,
    columns: Sequence[str] = ("entropy", "logprob"),
) -> None:
    """Scored rows against the documents and the tables, token by token, from the contract alone."""
    repeat = max(1, overlap)
    wanted = {"entropy": lambda v, w: model.entropy[v], "logprob": lambda v, w: model.logprob[v, w]}
    by_document: dict[int, list[dict[str, Any]]] = {}
    for row in found:
        by_document.setdefault(row["row_id"], []).append(row)
    assert list(by_document) == [i for i, ids in enumerate(documents) if len(ids) >= 2]
    for row_id, windows in by_document.items():
        ids, start = documents[row_id], 0
        times_trainable = np.zeros(len(ids), int)
        times_scored = np.zeros(len(ids), int)
        for number, row in enumerate(windows):
            length = len(row["input_ids"])
            assert row["window"] == number
            assert length <= max_length
            assert row["input_ids"] == list(ids[start : start + length])
            assert len(row["loss_mask"]) == length
            context = repeat if number else 1
            for name in columns:
                assert len(row[name]) == length
                for t, value in enumerate(row[name]):
                    if t < context:
                        assert value is None
                        continue
                    exact = wanted[name](ids[start + t - 1], ids[start + t])
                    assert value is not None
                    assert abs(value - exact) <= ABSOLUTE[score_dtype] + RELATIVE[score_dtype] * abs(exact)
            assert not any(row["loss_mask"][:context])
            times_trainable[start : start + length] += row["loss_mask"]
            times_scored[start + context : start + length] += 1
            if number < len(windows) - 1:
                assert length == max_length
            start += length - repeat
        assert start + repeat == len(ids)
        assert times_scored.tolist() == [0] + [1] * (len(ids) - 1)
        mask = masks[row_id] if masks is not None else [1] * len(ids)
        assert times_trainable.tolist() == [0, *mask[1:]]


def shifted(values: list[Any], by: int) -> list[Any]:
    """Scores moved along the row, the nulls where they belong."""
    there = [v for v in values if v is not None]
    return [None] * (len(values) - len(there)) + there[-by:] + there[:-by]
