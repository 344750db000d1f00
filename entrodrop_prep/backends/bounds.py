"""Bounds of an entropy of which only the most probable tokens are known (experimental).

A stock vLLM server tells the log-probabilities of the top k tokens of a position and of the token that stands there.
What the others are is not known, but together they have what is left of 1, and none has more than the k-th.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from entrodrop_prep.errors import ScoreError

Array = NDArray[np.float64]

PROBABILITY_ERROR = 1e-5
"""Relative error of a probability from a float32 log-softmax, beside what its sum loses (see ``_error``)."""
ENTROPY_ERROR = 1e-6
"""Error, as a share of 1 + H, of an entropy that is reduced in float32: the bounds hold for that as well."""
MOST = 1 + 2e-3
"""No log-softmax gives probabilities that add up to more."""


def entropy_bounds(logprobs: Array, k: int, vocab_size: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Least and greatest entropy that a distribution with these log-probabilities can have.

    Let K be the tokens known, p their probabilities, H_K = -sum(p ln p) over them, r = 1 - sum(p) what is left for the
    n = V - |K| others, and c the k-th largest probability. No other token has more than c: the top k are the largest.
    (The actual token may lie outside the top k; its probability bounds nothing.) -x ln x is concave, so the entropy of
    the others is

    - greatest where r is spread evenly: ``H_K + r ln(n / r)``. The cap c only tightens it: it says that r <= n c, and
      then an even share, r / n, is below c anyway;
    - least where r is in as few tokens as c allows, m = floor(r / c) of c each and one of rho = r - m c, because moving
      mass from a smaller probability to a larger one never raises the entropy: ``H_K - m c ln c - rho ln rho``.

    The log-probabilities are those of a float32 softmax, so every p, and with them r and c, may be off. The bounds are
    the least and the greatest over all that lies within ``_error``.

    Args:
        logprobs: [n, m] float64, nats: row i has the top k and the actual token of one position, each token once, in
            any order, and -inf behind them.
        k: how many of the most probable tokens were asked for.
        vocab_size: V, columns of the model's logits.

    Returns:
        lo [n] float32 rounded down and hi [n] float32 rounded up, nats, 0 <= lo <= hi. hi exceeds ln V by no more than
        rounding. They hold for the exact entropy and for one that is reduced in float32. NaN in a row gives NaN.

    Raises:
        ScoreError: a row has fewer than the top k, or probabilities that add up to more than 1.
    """
    k = min(k, vocab_size)
    known = ~np.isneginf(logprobs)
    count = known.sum(1)
    if (count < k).any():
        raise ScoreError(
            f"one token has {int(count.min())} log-probabilities, {k} were asked for",
            fix="lower --top-k, or start the server with a higher --max-logprobs",
        )
    with np.errstate(over="ignore"):
        p = np.exp(logprobs)
    total = p.sum(1)
    if (total > MOST).any():
        raise ScoreError(
            f"the probabilities of the top {k} tokens add up to {float(np.nanmax(total)):.4g}",
            fix="start the server with --logprobs-mode raw_logprobs, its default",
        )
    rest = np.maximum(1 - total, 0)
    off = _error(rest, total, vocab_size)
    cap = np.minimum(np.partition(p, -k, axis=1)[:, -k] * (1 + off), 1)
    others = np.maximum(vocab_size - count, 0)
    least, greatest = np.maximum(rest - off, 0), np.minimum(rest + off, others * cap)
    least = np.minimum(least, greatest)
    entropy = -_xlogx(p).sum(1)
    wider = off * (entropy + total)  # |d(p ln p)| <= |dp| (1 + |ln p|)
    lo = entropy - wider + _few(least, greatest, cap)
    hi = np.minimum(entropy + wider + _even(least, greatest, others), np.log(vocab_size))
    lo, hi = lo - ENTROPY_ERROR * (1 + lo), hi + ENTROPY_ERROR * (1 + hi)
    return rounded(np.maximum(lo, 0), np.float32, up=False), rounded(hi, np.float32, up=True)


def rounded(values: NDArray[Any], dtype: DTypeLike, *, up: bool) -> NDArray[Any]:
    """``values`` in a shorter float ``dtype``, each to the nearest number that is not below it, or not above."""
    near = values.astype(dtype)
    wrong = near < values if up else near > values
    return np.where(wrong, np.nextafter(near, near.dtype.type(np.inf if up else -np.inf)), near)


def _error(rest: Array, total: Array, vocab_size: int) -> Array:
    """[n] relative error of the probabilities of each row, all of which have the same sum s below them.

    A GPU adds up s in a thousand chains or more: what counts there is the rounding of max + ln s, 2^-18 for logits
    below 128, and of ln p: together below 1e-5. A CPU adds in as few as 8 chains of V / 8 terms, and each addition is
    off by at most the term itself and by at most 2^-24 of the sum. So by no more than V / 8 * 2^-24, and by no more
    than its chain has of the small terms, r / 8 where they are spread evenly: r / 6 leaves room. (A row whose known
    probabilities exceed 1 shows its error itself.)
    """
    result: Array = PROBABILITY_ERROR + np.minimum(rest / 6, vocab_size * 2.0**-27) + np.maximum(total - 1, 0)
    return result


def _few(least: Array, greatest: Array, cap: Array) -> Array:
    """[n] least entropy of a mass between ``least`` and ``greatest`` that lies in as few tokens as ``cap`` allows.

    Concave between multiples of the cap and growing from one multiple to the next, so it is smallest at one of the ends
    or at the first multiple between them.
    """
    cap = np.where(cap > 0, cap, 1)
    corner = np.clip((np.floor(least / cap) + 1) * cap, least, greatest)
    result: Array = np.minimum.reduce([_packed(mass, cap) for mass in (least, corner, greatest)])
    return result


def _packed(mass: Array, cap: Array) -> Array:
    """[n] entropy of a mass in tokens of ``cap`` each, but for the last."""
    full = np.floor(mass / cap)
    return -full * _xlogx(cap) - _xlogx(np.clip(mass - full * cap, 0, cap))


def _even(least: Array, greatest: Array, others: NDArray[np.int64]) -> Array:
    """[n] greatest entropy of a mass between ``least`` and ``greatest``, spread over so many other tokens.

    x ln(n / x) grows up to x = n / e, which is within reach for n of one or two only.
    """
    mass = np.clip(others / np.e, least, greatest)
    result: Array = mass * np.log(np.maximum(others, 1)) - _xlogx(mass)
    return result


def _xlogx(x: Array) -> Array:
    """x ln x, 0 at 0."""
    result: Array = x * np.log(np.where(x > 0, x, 1))
    return result
