"""The random numbers: Philox against its published answers, the layout of counters, independence of streams."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from entrodrop_prep.masking.counter import (
    DROP,
    ORDER,
    REPLACE,
    order_keys,
    philox4x32,
    rate_limit,
    stream_key,
    token_words,
    token_words64,
)

# Known answers of Philox4x32-10 as published with Random123 (tests/kat_vectors): counter, key, result.
KNOWN_ANSWERS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]

row_ids = st.integers(0, 2**48 - 1)
windows = st.integers(0, 2**31 - 1)
epochs = st.integers(0, 2**16 - 1)
keys = st.integers(0, 2**64 - 1)


def words_of(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


def block(key: int, number: int, row_id: int, window: int, epoch: int) -> list[int]:
    """The four lanes of one block, its counter spelled out."""
    counter = [number, window, row_id % 2**32, epoch * 2**16 + row_id // 2**32]
    return philox4x32(np.array([counter], np.uint32), key)[0].tolist()


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN_ANSWERS)
def test_philox_gives_its_published_answers(counter: str, key: str, answer: str) -> None:
    low, high = words_of(key)
    result = philox4x32(np.array([words_of(counter)], np.uint32), high << 32 | low)
    assert result.dtype == np.uint32
    assert result[0].tolist() == words_of(answer)


def test_philox_works_on_each_counter_by_itself() -> None:
    counters = np.random.default_rng(0).integers(0, 2**32, (20_000, 4), dtype=np.uint32)
    before = counters.copy()
    together = philox4x32(counters, 12345678901234567890)
    assert (counters == before).all()
    assert (philox4x32(counters[::-1], 12345678901234567890) == together[::-1]).all()
    for i in (0, 8191, 8192, 19_999):
        assert (philox4x32(counters[i : i + 1], 12345678901234567890)[0] == together[i]).all()
    assert len(np.unique(together, axis=0)) == len(together)
    assert philox4x32(np.zeros((0, 4), np.uint32), 1).shape == (0, 4)


def test_philox_refuses_what_it_cannot_use() -> None:
    with pytest.raises(ValueError, match="shape"):
        philox4x32(np.zeros((4, 3), np.uint32), 0)
    with pytest.raises(ValueError, match="64-bit"):
        philox4x32(np.zeros((1, 4), np.uint32), 2**64)


@settings(max_examples=60, deadline=None)
@given(keys, st.lists(st.tuples(row_ids, windows, st.integers(0, 11)), max_size=6), epochs)
def test_words_stand_where_the_layout_says(key: int, rows: list[tuple[int, int, int]], epoch: int) -> None:
    row_id = np.array([r for r, _, _ in rows], np.int64)
    window = np.array([w for _, w, _ in rows], np.int32)
    lengths = np.array([n for _, _, n in rows], np.int64)
    words = token_words(key, row_id, window, lengths, epoch)
    wide = token_words64(key, row_id, window, lengths, epoch)
    assert (words.dtype, wide.dtype) == (np.uint32, np.uint64)
    assert words.tolist() == [block(key, t // 4, r, w, epoch)[t % 4] for r, w, n in rows for t in range(n)]
    expected = []
    for r, w, n in rows:
        for t in range(n):
            lanes = block(key, t // 2, r, w, epoch)
            expected.append(lanes[2 * (t % 2)] + lanes[2 * (t % 2) + 1] * 2**32)
    assert wide.tolist() == expected


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**63 - 1), epochs, row_ids, windows)
def test_order_keys_come_from_their_own_stream(seed: int, epoch: int, row_id: int, window: int) -> None:
    result = order_keys(seed, "corpus", epoch, np.array([row_id]), np.array([window], np.int32))
    lanes = block(stream_key(seed, ORDER, "corpus"), 0, row_id, window, epoch)
    assert result.dtype == np.uint64
    assert result.tolist() == [lanes[0] + lanes[1] * 2**32]


@pytest.mark.parametrize(
    ("row_id", "window", "length", "epoch", "named"),
    [
        (2**48, 0, 3, 0, "row_id"),
        (-1, 0, 3, 0, "row_id"),
        (0, -1, 3, 0, "window"),
        (0, 0, -1, 0, "length"),
        (0, 0, 3, 2**16, "epoch"),
        (0, 0, 3, -1, "epoch"),
    ],
)
def test_numbers_outside_the_counter_are_refused(row_id: int, window: int, length: int, epoch: int, named: str) -> None:
    arrays = np.array([row_id]), np.array([window], np.int32), np.array([length])
    for words in (token_words, token_words64):
        with pytest.raises(ValueError, match=named):
            words(1, *arrays, epoch)
    if length >= 0:
        with pytest.raises(ValueError, match=named):
            order_keys(1, "corpus", epoch, *arrays[:2])


def test_arrays_of_different_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match="2 row ids, 1 windows and 2 lengths"):
        token_words(1, np.arange(2), np.zeros(1, np.int32), np.ones(2, np.int64), 0)


def test_stream_keys_differ_in_every_part_and_cannot_be_confused() -> None:
    parts = [(s, t, n) for s in range(50) for t in (DROP, REPLACE, ORDER) for n in ("a", "b", "ab", "", "ä", "\udcc3")]
    parts += [(0, "dro", "pa"), (0, "dropa", ""), (0, "", "dropa"), (2**63 - 1, DROP, "a")]
    found = {stream_key(*part) for part in parts}
    assert len(found) == len(parts)
    assert all(0 <= key < 2**64 for key in found)
    for seed in (-1, 2**64):
        with pytest.raises(ValueError, match="seed"):
            stream_key(seed, DROP, "a")


def test_words_are_uniform() -> None:
    n = 400_000
    words = token_words(stream_key(0, DROP, "corpus"), np.arange(n // 400), np.zeros(n // 400, np.int32),
                        np.full(n // 400, 400), 0)  # fmt: skip
    for bits in (words >> 24, words & 255):
        counts = np.bincount(bits.astype(np.int64), minlength=256)
        chi_square = float(((counts - n / 256) ** 2 / (n / 256)).sum())
        assert abs(chi_square - 255) < 6 * np.sqrt(2 * 255)


def agreement(a: np.ndarray, b: np.ndarray) -> float:
    """Standard deviations by which two streams' top 4 bits agree more often than independent ones would."""
    n = len(a)
    return float(((a >> 28 == b >> 28).sum() - n / 16) / np.sqrt(n * 15 / 256))


def streams(n: int) -> dict[str, np.ndarray]:
    """Words of neighbouring seeds, epochs, rows, windows, sources and streams, 1000 tokens a row."""

    def words(seed: int = 7, stream: str = DROP, source: str = "corpus", epoch: int = 3, row: int = 0, window: int = 0):
        rows = np.arange(row, row + n // 1000)
        return token_words(stream_key(seed, stream, source), rows, np.full(len(rows), window, np.int32),
                           np.full(len(rows), 1000), epoch)  # fmt: skip

    return {
        "base": words(),
        "next seed": words(seed=8),
        "next epoch": words(epoch=4),
        "next rows": words(row=n // 1000),
        "high rows": words(row=2**32),
        "next window": words(window=1),
        "other source": words(source="corpus2"),
        "other stream": words(stream=REPLACE),
    }


def test_streams_agree_no_more_than_independent_ones_at_any_shift() -> None:
    found = streams(100_000)
    names = list(found)
    for i, first in enumerate(names):
        for second in names[i + 1 :]:
            for shift in (0, 1, 2, 3, 4, 8, 16, 999, 1000, 1001, 4000):
                a, b = found[first], found[second]
                for x, y in ((a[shift:], b[: len(b) - shift]), (b[shift:], a[: len(a) - shift])):
                    assert abs(agreement(x, y)) < 6, f"{first} and {second} agree when shifted by {shift}"


def test_neighbouring_seeds_share_no_stretch_of_words() -> None:
    """A stream shifted by any amount at all would have four-word blocks in common."""
    found = streams(100_000)
    blocks = np.concatenate([words.reshape(-1, 4) for words in found.values()])
    assert len(np.unique(blocks, axis=0)) == len(blocks)


@given(st.floats(0, 1), st.integers(-2, 2))
def test_the_limit_of_a_rate_is_exact(rate: float, near: int) -> None:
    limit = int(rate_limit(np.array([rate]))[0])
    assert 0 <= limit <= 2**32
    word = min(max(limit + near, 0), 2**32 - 1)
    assert (word < limit) == (word * 2.0**-32 < rate)


def test_rates_outside_zero_and_one_are_refused() -> None:
    assert rate_limit(np.array([0.0, 1.0, 0.5])).tolist() == [0, 2**32, 2**31]
    for rate in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="between 0 and 1"):
            rate_limit(np.array([rate]))
