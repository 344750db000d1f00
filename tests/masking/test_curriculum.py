"""The drop rates: every schedule against its formula, both kinds of progress, and the horizon."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from entrodrop_prep.config import Recipe
from entrodrop_prep.masking.curriculum import epoch_rates, horizon, rate, row_rates
from helpers.contract import naive_rate

SIGMOID_BITS = ["0x1.2d2b42765b514p-6", "0x1.6cdf3553a4d78p-3", "0x1.3e61cc44b063cp-1", "0x1.90303f85e6bf1p-1"]
COSINE_BITS = ["0x1.514f7d920ec78p-4", "0x1.3fdb2df8f5e68p-2", "0x1.4678cf69eb732p-1", "0x1.bc3c76b4248d9p-1"]
SCHEDULES = ["sigmoid", "linear", "cosine", "constant", "step"]
progress = st.floats(0, 1)


@settings(max_examples=300, deadline=None)
@given(
    st.sampled_from(SCHEDULES),
    st.lists(progress, min_size=2, max_size=2).map(sorted),
    st.floats(1e-3, 1e6) | st.just(1e300),
    progress,
    st.lists(progress, min_size=1, max_size=20),
)
def test_rates_follow_their_formula(
    schedule: Any, bounds: list[float], steepness: float, midpoint: float, places: list[float]
) -> None:
    recipe = Recipe(
        epochs=1, schedule=schedule, min_rate=bounds[0], max_rate=bounds[1], steepness=steepness, midpoint=midpoint
    )
    found = rate(recipe, np.array(places))
    assert found.dtype == np.float64
    assert ((found >= bounds[0]) & (found <= bounds[1])).all()
    for p, r in zip(places, found, strict=True):
        assert r == pytest.approx(naive_rate(recipe, p), abs=1e-13)
        assert rate(recipe, np.array([p]))[0] == r  # the same bits alone as among others


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_rates_rise_and_stay_at_the_end(schedule: Any) -> None:
    recipe = Recipe(epochs=1, schedule=schedule, min_rate=0.1, max_rate=0.7)
    found = rate(recipe, np.linspace(0, 1, 1001))
    assert (np.diff(found) >= -1e-15).all()
    assert (rate(recipe, np.array([1.0, 1.5, 3.0])) == found[-1]).all()


def test_rates_have_the_same_bits_everywhere() -> None:
    """These very bits, on every machine: they decide published masks."""
    sigmoid, cosine = Recipe(epochs=4), Recipe(epochs=4, schedule="cosine", min_rate=0.05, max_rate=0.9)
    assert [r.hex() for r in epoch_rates(sigmoid)] == SIGMOID_BITS
    assert [r.hex() for r in epoch_rates(cosine)] == COSINE_BITS


def test_defaults_are_the_documented_ones() -> None:
    expected = [0.8 / (1 + math.exp(-10 * ((e + 0.5) / 4 - 0.5))) for e in range(4)]
    assert epoch_rates(Recipe(epochs=4)) == pytest.approx(expected, abs=1e-15)


def test_given_rates_are_taken_as_they_are() -> None:
    recipe = Recipe(epochs=4, rates=(0, 0.1, 0.4, 0.8))
    assert epoch_rates(recipe).tolist() == [0, 0.1, 0.4, 0.8]
    assert row_rates(recipe, 2, 5, 3, 10).tolist() == [0.4] * 3
    shorter = Recipe(epochs=2, horizon=4, rates=(0, 0.1, 0.4, 0.8))
    assert epoch_rates(shorter).tolist() == [0, 0.1]


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("progress", ["epoch", "row"])
def test_more_epochs_with_the_same_horizon_change_no_earlier_one(schedule: Any, progress: Any) -> None:
    few = Recipe(epochs=2, horizon=6, schedule=schedule, progress=progress)
    many = Recipe(epochs=8, horizon=6, schedule=schedule, progress=progress)
    assert horizon(few) == horizon(many) == 6
    assert (epoch_rates(few) == epoch_rates(many)[:2]).all()
    for epoch in range(2):
        assert (row_rates(few, epoch, 0, 50, 50) == row_rates(many, epoch, 0, 50, 50)).all()
    assert (row_rates(many, 7, 0, 50, 50) == rate(many, np.ones(1))).all() or progress == "epoch"


def test_progress_by_epoch_is_one_rate() -> None:
    recipe = Recipe(epochs=3, schedule="linear")
    assert horizon(recipe) == 3
    assert row_rates(recipe, 1, 40, 4, 100).tolist() == [epoch_rates(recipe)[1]] * 4
    assert row_rates(recipe, 1, 0, 0, 0).tolist() == []


@settings(max_examples=50, deadline=None)
@given(st.sampled_from(SCHEDULES), st.integers(1, 60), st.lists(st.integers(0, 60), max_size=4))
def test_progress_by_row_is_the_same_however_rows_are_grouped(schedule: Any, total: int, cuts: list[int]) -> None:
    recipe = Recipe(epochs=3, horizon=4, schedule=schedule, progress="row")
    whole = row_rates(recipe, 2, 0, total, total)
    assert whole == pytest.approx([naive_rate(recipe, (2 + (i + 0.5) / total) / 4) for i in range(total)], abs=1e-13)
    edges = sorted({0, total, *(min(c, total) for c in cuts)})
    pieces = [row_rates(recipe, 2, a, b - a, total) for a, b in pairwise(edges)]
    assert np.concatenate(pieces).tolist() == whole.tolist()


def test_epochs_and_places_that_there_are_not_are_refused() -> None:
    recipe = Recipe(epochs=3)
    for epoch in (-1, 3):
        with pytest.raises(ValueError, match="epoch"):
            row_rates(recipe, epoch, 0, 1, 1)
    for first, n in ((-1, 1), (5, 6), (0, -1)):
        with pytest.raises(ValueError, match="inside 10 rows"):
            row_rates(recipe, 0, first, n, 10)
