"""Order statistics: equal to those of a full sort, ties and both widths included, at bounded memory."""

from __future__ import annotations

import math
import tracemalloc
from collections.abc import Callable, Iterable, Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from entrodrop_prep import config
from entrodrop_prep.masking.histogram import BINS, PER_NAT, EntropyHistogram
from entrodrop_prep.masking.quantile import (
    DEFAULT_QUANTILE,
    Histogram,
    _find,
    high_rank,
    low_rank,
    quantile_of,
    row_thresholds,
    threshold,
)

DTYPES = [np.float16, np.float32]
shares = st.floats(0, 1) | st.sampled_from([0.0, 0.1, 0.25, 0.5, 1.0])


def scores(dtype: Any, size: Any) -> Any:
    """Any numbers at all, and numbers with many ties."""
    anything = npst.arrays(dtype, size, elements=st.floats(width=np.dtype(dtype).itemsize * 8, allow_nan=False))
    ties = npst.arrays(dtype, size, elements=st.sampled_from([0.0, -0.0, 0.5, 1.0, 1.25, -1.0]))
    return anything | ties


both_widths = st.sampled_from(DTYPES).flatmap(lambda dtype: scores(dtype, st.integers(1, 60)))


def order_statistic(chunks: Callable[[], Iterable[np.ndarray]], dtype: Any, rank: int) -> float:
    histogram = Histogram(dtype)
    for chunk in chunks():
        histogram.add(chunk)
    return _find(histogram, rank, chunks)


def split(values: np.ndarray, cuts: list[int]) -> list[np.ndarray]:
    return np.split(values, sorted(min(c, len(values)) for c in cuts))


@settings(max_examples=150, deadline=None)
@given(both_widths, st.lists(st.integers(0, 60), max_size=4), st.data())
def test_an_order_statistic_is_that_of_a_full_sort(values: np.ndarray, cuts: list[int], data: Any) -> None:
    rank = data.draw(st.integers(0, len(values) - 1))
    passes = []

    def chunks() -> Iterator[np.ndarray]:
        passes.append(1)
        yield from split(values, cuts)

    assert order_statistic(chunks, values.dtype, rank) == float(np.sort(values)[rank])
    assert len(passes) == (1 if values.dtype == np.float16 else 2)


@settings(max_examples=150, deadline=None)
@given(both_widths, shares, st.booleans())
def test_a_threshold_selects_the_share_and_all_ties(values: np.ndarray, q: float, high: bool) -> None:
    histogram = Histogram(values.dtype)
    histogram.add(values)
    tau = threshold(histogram, q, high=high, again=lambda: [values])
    ordered, n, count = np.sort(values), len(values), math.ceil(q * len(values))
    if count == 0:
        assert tau == (math.inf if high else -math.inf)
    else:
        assert tau == float(ordered[n - count] if high else ordered[count - 1])
        selected = (values.astype(np.float64) >= tau) if high else (values.astype(np.float64) <= tau)
        assert selected.sum() >= count
        assert (values[selected] != tau).sum() < count  # without the ties it would be too few
    if q == 1:
        assert tau == float(ordered[0] if high else ordered[-1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("q", [0.0, 1e-6, 0.5, 0.9, 1.0])
def test_thresholds_of_realistic_scores(dtype: Any, q: float) -> None:
    values = np.random.default_rng(0).gamma(0.7, 2.0, 200_001).astype(dtype)
    ordered = np.sort(values)
    for high in (False, True):
        histogram = Histogram(dtype)
        for chunk in np.array_split(values, 7):
            histogram.add(chunk)
        tau = threshold(histogram, q, high=high, again=lambda: np.array_split(values, 3))
        count = math.ceil(q * len(values))
        expected = ordered[len(values) - count if high else count - 1] if count else (np.inf if high else -np.inf)
        assert tau == float(expected)


def test_ranks() -> None:
    assert [low_rank(q, 10) for q in (0, 0.01, 0.1, 0.11, 0.5, 1)] == [None, 0, 0, 1, 4, 9]
    assert [high_rank(q, 10) for q in (0, 0.01, 0.1, 0.11, 0.5, 1)] == [None, 9, 9, 8, 5, 0]
    assert low_rank(0.5, 0) is None
    assert high_rank(1, 0) is None


def test_the_default_quantile_is_the_one_in_the_help() -> None:
    assert config.settings(config.Recipe)["quantile"][1].default_text == str(DEFAULT_QUANTILE)
    assert quantile_of(config.Recipe(epochs=1)) == DEFAULT_QUANTILE
    assert quantile_of(config.Recipe(epochs=1, quantile=0.0)) == 0.0


def test_memory_does_not_grow_with_the_scores() -> None:
    rng = np.random.default_rng(0)
    chunk = rng.gamma(0.7, 2.0, 10_000).astype(np.float32)

    def peak(times: int) -> int:
        tracemalloc.start()
        order_statistic(lambda: (chunk for _ in range(times)), np.float32, times * 5_000)
        _, top = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return top

    assert peak(100) <= 1.1 * peak(10)


def test_histograms_refuse_what_they_cannot_count() -> None:
    with pytest.raises(ValueError, match="float64"):
        Histogram(np.float64)
    histogram = Histogram(np.float32)
    with pytest.raises(ValueError, match="float16"):
        histogram.add(np.zeros(3, np.float16))
    with pytest.raises(ValueError, match="null score"):
        histogram.add(np.array([1, np.nan], np.float32))
    assert histogram.total == 0
    histogram.add(np.array([1, 2, 3], np.float32))
    assert histogram.total == 3
    with pytest.raises(ValueError, match="narrow"):
        histogram.value(0)
    for rank in (-1, 3):
        with pytest.raises(ValueError, match="rank"):
            histogram.narrow(rank)
    with pytest.raises(ValueError, match="one value already"):
        histogram.narrow(0).narrow(0)


def naive_row_thresholds(
    values: np.ndarray, trainable: np.ndarray, offsets: np.ndarray, q: float, high: bool
) -> list[float]:
    found = []
    for a, b in pairwise(offsets):
        ordered = sorted(float(v) for v, t in zip(values[a:b], trainable[a:b], strict=True) if t)
        count = math.ceil(q * len(ordered))
        nothing = math.inf if high else -math.inf
        found.append(ordered[len(ordered) - count if high else count - 1] if count else nothing)
    return found


@settings(max_examples=150, deadline=None)
@given(st.data(), shares, st.booleans())
def test_row_thresholds_are_those_of_each_row_by_itself(data: Any, q: float, high: bool) -> None:
    lengths = data.draw(st.lists(st.integers(0, 9), max_size=8))
    offsets = np.concatenate(([0], np.cumsum(lengths, dtype=np.int64)))
    n = int(offsets[-1])
    values = data.draw(scores(data.draw(st.sampled_from(DTYPES)), n))
    trainable = data.draw(npst.arrays(np.bool_, n))
    values[~trainable] = np.nan
    found = row_thresholds(values, trainable, offsets, q, high)
    assert found.dtype == np.float64
    assert found.tolist() == naive_row_thresholds(values, trainable, offsets, q, high)


def test_row_thresholds_refuse_a_null_score() -> None:
    with pytest.raises(ValueError, match="null score"):
        row_thresholds(np.array([np.nan], np.float32), np.array([True]), np.array([0, 1]), 0.5, False)


@pytest.mark.parametrize("dtype", DTYPES)
def test_entropies_are_counted_by_bins_of_an_eighth(dtype: Any) -> None:
    edges = np.arange(0, 17, 1 / PER_NAT, dtype=dtype)
    below, some = np.nextafter(edges, dtype(0)), np.random.default_rng(0).gamma(1.2, 1.5, 5_000)
    others = np.array([-1e-3, -0.0, 6e-8, 1e4, np.inf])
    entropy = np.concatenate([edges, below, some, others]).astype(dtype)
    histogram = EntropyHistogram()
    histogram.add(entropy[:3_000])
    histogram.add(entropy[3_000:])
    bins = np.clip(np.floor(entropy.astype(np.float64) * PER_NAT), 0, BINS - 1).astype(np.int64)
    assert histogram.summary()["counts"] == np.bincount(bins, minlength=BINS).tolist()
    with pytest.raises(ValueError, match="null"):
        histogram.add(np.array([1, np.nan], dtype))
