"""The curriculum: how likely an eligible token is dropped, as a function of training progress.

The formulas and their defaults are ours: the public description of the method names a sigmoid, not its parameters. The
exponential and the sine are evaluated with +, -, * and / only, which IEEE 754 rounds in one way: a rate, and so a mask,
has the same bits on every machine and for every grouping of rows, whatever its mathematics library.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from entrodrop_prep.config import Recipe

Floats = NDArray[np.float64]

_LN2_HIGH = float.fromhex("0x1.62e42feep-1")  # ln 2 to 32 bits: a small integer times it is exact
_LN2_LOW = float.fromhex("0x1.a39ef35793c76p-33")  # ln 2 - _LN2_HIGH


def horizon(recipe: Recipe) -> int:
    """Number of epochs that the curriculum spans."""
    return recipe.horizon or recipe.epochs


def rate(recipe: Recipe, p: Floats) -> Floats:
    """Drop rate at progress ``p``: float64, same shape, between ``min_rate`` and ``max_rate``.

    With m, x = min_rate, max_rate and K, M = steepness, midpoint (formulas ours):

        sigmoid   m + (x - m) / (1 + exp(-K (p - M)))
        linear    m + (x - m) p
        cosine    m + (x - m) (1 - cos(pi p)) / 2
        constant  x
        step      x if p >= M else m

    ``p`` is limited to [0, 1]: epochs beyond the horizon keep the rate at p = 1. ``recipe.rates`` is not looked at.
    """
    p = np.clip(np.asarray(p, np.float64), 0.0, 1.0)
    match recipe.schedule:
        case "sigmoid":
            share = _sigmoid(recipe.steepness * (p - recipe.midpoint))
        case "linear":
            share = p
        case "cosine":
            share = np.square(_sin(p * (math.pi / 2)))  # (1 - cos 2x) / 2 = sin(x)^2
        case "constant":
            share = np.ones_like(p)
        case "step":
            share = (p >= recipe.midpoint).astype(np.float64)
    low, high = recipe.min_rate, recipe.max_rate
    return np.clip(low + (high - low) * share, low, high)


def epoch_rates(recipe: Recipe) -> Floats:
    """Drop rate of each epoch: float64 [epochs]; ``recipe.rates`` if given, else the rate at progress (e + 0.5) / H.

    With ``--progress row`` it is the rate in the middle of the epoch.
    """
    if recipe.rates is not None:
        return np.array(recipe.rates[: recipe.epochs], np.float64)
    return rate(recipe, (np.arange(recipe.epochs) + 0.5) / horizon(recipe))


def row_rates(recipe: Recipe, epoch: int, first_position: int, n: int, total_rows: int) -> Floats:
    """Drop rates of ``n`` rows from ``first_position`` on in an epoch's order: float64 [n].

    ``--progress epoch``: the epoch's rate. ``--progress row``: the rate at progress (epoch + (i + 0.5) / R) / H for the
    row at position i (from 0) of R = ``total_rows``. Raises ValueError for an epoch or a position that there is not.
    """
    if not 0 <= first_position <= first_position + n <= total_rows:
        raise ValueError(f"{n} rows from position {first_position} are not inside {total_rows} rows")
    return rates_at(recipe, epoch, np.arange(first_position, first_position + n), total_rows)


def rates_at(recipe: Recipe, epoch: int, positions: NDArray[np.int64], total_rows: int) -> Floats:
    """As ``row_rates``, of the rows at ``positions`` [n]: float64 [n], each what it is in any other company."""
    if not 0 <= epoch < recipe.epochs:
        raise ValueError(f"epoch {epoch} is not one of {recipe.epochs}")
    if recipe.progress == "epoch":
        return np.full(len(positions), epoch_rates(recipe)[epoch])
    return rate(recipe, (epoch + (positions + 0.5) / total_rows) / horizon(recipe))


def _sigmoid(x: Floats) -> Floats:
    small = _exp_of_negative(-np.abs(x))
    return np.where(x >= 0, 1.0, small) / (1.0 + small)


def _exp_of_negative(x: Floats) -> Floats:
    """exp(x) for x <= 0: x = k ln 2 + r with |r| <= ln(2) / 2, and the Taylor series of exp(r) to r^13 / 13!."""
    x = np.maximum(x, -700.0)  # e^-700 counts as nothing beside 1
    k = np.rint(x / (_LN2_HIGH + _LN2_LOW))
    r = (x - k * _LN2_HIGH) - k * _LN2_LOW
    total = np.zeros_like(x)
    for power in range(13, -1, -1):
        total = total * r + 1.0 / math.factorial(power)
    return np.ldexp(total, k.astype(np.int32))


def _sin(x: Floats) -> Floats:
    """sin(x) for 0 <= x <= pi / 2: its Taylor series to x^21 / 21!."""
    square, total = x * x, np.zeros_like(x)
    for power in range(21, 0, -2):
        total = total * square + (-1.0) ** (power // 2) / math.factorial(power)
    return total * x
