"""Uniformity of the row order, by statistics that orders which are not uniform fail.

Bounds are at 5.2 sigma, one test in five million, and nothing here is drawn again from run to run.
"""

from __future__ import annotations

from itertools import combinations
from pathlib import Path

import numpy as np
import pytest

from entrodrop_prep.config import MaterializeConfig
from entrodrop_prep.export.job import open_job
from entrodrop_prep.masking.counter import order_keys
from helpers.scored import some_rows, write_scored

SIGMAS = 5.2
CELLS = 12
Orders = np.ndarray
"""[N, R] int64: the rows, from 0, of each of N orders, in their order."""


def sigmas(chi_square: float, degrees: int) -> float:
    """How far a chi-square value is from what is expected (Wilson and Hilferty, 1931)."""
    spread = 2 / (9 * degrees)
    return float(((chi_square / degrees) ** (1 / 3) - (1 - spread)) / spread**0.5)


def places(made: Orders) -> np.ndarray:
    """[N, R] the place of each row."""
    return np.argsort(made, axis=1)


def place_sigmas(made: Orders) -> float:
    """Whether each row is in each twelfth of the places equally often: the sum of the rows' chi-squares."""
    count, rows = made.shape
    cell = places(made) * CELLS // rows
    sizes = np.bincount(cell[0], minlength=CELLS)
    found = np.bincount((np.arange(rows) * CELLS + cell).ravel(), minlength=rows * CELLS).reshape(rows, CELLS)
    expected = count * sizes / rows
    return sigmas(float(((found - expected) ** 2 / expected).sum()), rows * (CELLS - 1))


def neighbour_sigmas(made: Orders) -> float:
    """Whether rows side by side in one order are so in another: about two pairs, as of random orders."""
    rows = made.shape[1]
    pairs = [np.minimum(o[1:], o[:-1]) * rows + np.maximum(o[1:], o[:-1]) for o in made]
    shared = [len(np.intersect1d(a, b, assume_unique=True)) for a, b in combinations(pairs, 2)]
    expected = len(shared) * (rows - 1) * 2 / rows
    return float((sum(shared) - expected) / expected**0.5)


def correlation_sigmas(made: Orders) -> float:
    """The greatest of Spearman's correlations between two orders, and of an order with the source's."""
    count, rows = made.shape
    ranks = np.vstack([np.arange(rows), places(made)]).astype(float)
    found = np.corrcoef(ranks)[np.triu_indices(count + 1, 1)]
    return float(np.abs(found).max() * (rows - 1) ** 0.5)


def failed(made: Orders) -> set[str]:
    """Which statistics tell the orders from uniform, independent ones."""
    told = {"places": place_sigmas, "neighbours": neighbour_sigmas, "correlation": correlation_sigmas}
    found = {name for name, statistic in told.items() if abs(statistic(made)) > SIGMAS}
    return found | ({"repeated"} if len(np.unique(made, axis=0)) < len(made) else set())


def keyed(seeds: range, epochs: range, rows: int) -> Orders:
    """The orders that the keys alone give to rows of one window."""
    row_id, window = np.arange(rows), np.zeros(rows, np.int32)
    keys = [order_keys(s, "source", e, row_id, window) for s in seeds for e in epochs]
    return np.argsort(np.stack(keys), axis=1, kind="stable")


def test_the_order_that_rows_are_made_in(tmp_path: Path) -> None:
    scored = write_scored(tmp_path / "scored", some_rows(3000, lengths=(2, 5)), rows_per_shard=700)
    made = []
    for seed in range(6):
        job = open_job(MaterializeConfig(scored=str(scored), out="nowhere", epochs=8, seed=seed))
        job.plan(range(8))
        job.open(tmp_path / f"seed-{seed}")
        arrays = job.rows.columns.arrays
        number = arrays["row_id"] * 3 + arrays["window"]
        made += [number[job.rows.order(epoch).index] for epoch in range(8)]
    ranked = np.searchsorted(np.sort(made[0]), np.stack(made))
    assert ranked.shape[1] > 3000
    assert failed(ranked) == set()


def test_many_epochs_and_seeds() -> None:
    assert failed(keyed(range(20), range(4), 4000)) == set()
    assert failed(keyed(range(2), range(40), 4000)) == set()
    assert failed(keyed(range(2**63, 2**63 + 5), range(65_526, 65_536), 4000)) == set()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("the source's order", {"places", "neighbours", "correlation", "repeated"}),
        ("one epoch twice", {"neighbours", "correlation", "repeated"}),
        ("one epoch, begun elsewhere", {"neighbours"}),
        ("one epoch, backwards", {"neighbours", "correlation"}),
        ("a shuffle buffer of 300 rows", {"places", "neighbours", "correlation"}),
        ("blocks of 20 rows", {"neighbours"}),
        ("keys of the sum of epoch and row", {"places", "neighbours"}),
    ],
)
def test_orders_that_are_not_uniform_fail(name: str, expected: set[str]) -> None:
    count, rows = 60, 3000
    made, rng = keyed(range(1), range(count), rows), np.random.default_rng(0)
    if name == "the source's order":
        made = np.tile(np.arange(rows), (count, 1))
    elif name == "one epoch twice":
        made[1] = made[0]
    elif name == "one epoch, begun elsewhere":
        made = np.stack([np.roll(made[0], 50 * e) for e in range(count)])
    elif name == "one epoch, backwards":
        made[1] = made[0, ::-1]
    elif name == "a shuffle buffer of 300 rows":
        made = np.argsort(np.arange(rows) + 300 * rng.random((count, rows)), axis=1)
    elif name == "blocks of 20 rows":
        made = np.stack([(rng.permutation(rows // 20)[:, None] * 20 + np.arange(20)).ravel() for _ in range(count)])
    else:
        shared = order_keys(0, "source", 0, np.arange(rows + count), np.zeros(rows + count, np.int32))
        made = np.stack([np.argsort(shared[e : e + rows]) for e in range(count)])
    assert expected <= failed(made)


def test_each_row_of_few_is_everywhere_equally_often() -> None:
    rows = 10
    made = places(keyed(range(50), range(60), rows))
    for row in range(rows):
        counts = np.bincount(made[:, row], minlength=rows)
        expected = len(made) / rows
        assert sigmas(float(((counts - expected) ** 2 / expected).sum()), rows - 1) < SIGMAS


def test_all_permutations_are_equally_frequent() -> None:
    codes = keyed(range(40), range(100), 4) @ np.array([64, 16, 4, 1])
    _, counts = np.unique(codes, return_counts=True)
    assert counts.size == 24
    expected = len(codes) / 24
    assert sigmas(float(((counts - expected) ** 2 / expected).sum()), 23) < SIGMAS
