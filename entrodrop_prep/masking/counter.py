"""Counter-based random numbers: each is a function of (seed, stream, source, row, window, token, epoch), with no state.

The generator is Philox4x32-10 (Salmon, Moraes, Dror, Shaw: "Parallel random numbers: as easy as 1, 2, 3", SC 2011). It
maps a 128-bit counter to 128 random bits under a 64-bit key:

    key       64 bits of BLAKE2b over (FORMAT_VERSION, seed, stream, source name): neighbouring seeds share nothing
    counter   lane 0: block of tokens · lane 1: window · lane 2: row, low 32 bits · lane 3: epoch << 16 | row >> 32

A uniform number in [0, 1) is ``word * 2**-32``. Published masks rest on every bit of this file: whatever changes a
number needs a new FORMAT_VERSION.
"""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

FORMAT_VERSION = 1

DROP, REPLACE, ORDER, CHOOSE, HOLD_OUT = "drop", "replace", "order", "choose", "hold-out"
"""The streams: which tokens are dropped, what replaces them, how the rows are ordered, which rows a weight chooses,
which rows are held out for validation."""

MAX_ROW_ID = 2**48 - 1
MAX_EPOCH = 2**16 - 1

_MULTIPLIERS = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_WEYL = 0x9E3779B9, 0xBB67AE85
_LOW, _HALF = np.uint64(0xFFFFFFFF), np.uint64(32)
_CHUNK = 12288  # blocks worked on at a time: six lanes of 96 KiB stay in the processor's second cache


def philox4x32(counter: NDArray[np.uint32], key: int) -> NDArray[np.uint32]:
    """Philox4x32-10 (Salmon et al. 2011, section 3): ``counter`` [n, 4] uint32, ``key`` 64 bits -> [n, 4] uint32.

    Lane 0 of the key is its low half. Row i of the result depends on row i of ``counter`` alone.
    Raises ValueError for another shape of ``counter``, or a key that is not 64 bits.
    """
    if counter.ndim != 2 or counter.shape[1] != 4:
        raise ValueError(f"counter has shape {counter.shape}, not [n, 4]")
    if not 0 <= key < 2**64:
        raise ValueError(f"key {key} is not an unsigned 64-bit number")
    out = np.empty(counter.shape, np.uint32)
    for start in range(0, len(counter), _CHUNK):
        piece = slice(start, start + _CHUNK)
        for lane, values in enumerate(_philox(*counter[piece].T.astype(np.uint64), key=key)):
            out[piece, lane] = values
    return out


def _philox(
    c0: NDArray[np.uint64], c1: NDArray[np.uint64], c2: NDArray[np.uint64], c3: NDArray[np.uint64], *, key: int
) -> tuple[NDArray[np.uint64], NDArray[np.uint64], NDArray[np.uint64], NDArray[np.uint64]]:
    """Ten rounds over four lanes, each a uint64 [n] array of 32-bit values; overwrites the arrays it is given."""
    k0, k1 = key & 0xFFFFFFFF, key >> 32
    a, b = np.empty_like(c0), np.empty_like(c0)
    for _ in range(10):
        np.multiply(c0, _MULTIPLIERS[0], out=a)
        np.multiply(c2, _MULTIPLIERS[1], out=b)
        np.right_shift(b, _HALF, out=c0)
        c0 ^= c1
        c0 ^= np.uint64(k0)
        np.right_shift(a, _HALF, out=c2)
        c2 ^= c3
        c2 ^= np.uint64(k1)
        np.bitwise_and(b, _LOW, out=c1)
        np.bitwise_and(a, _LOW, out=c3)
        k0, k1 = (k0 + _WEYL[0]) & 0xFFFFFFFF, (k1 + _WEYL[1]) & 0xFFFFFFFF
    return c0, c1, c2, c3


def stream_key(seed: int, stream: str, source: str) -> int:
    """The 64-bit key of one stream of one source: BLAKE2b-64 over version, seed and both length-prefixed names.

    ``stream`` is one of those above; ``source`` is the name of the dataset that the rows belong to. Raises
    ValueError for a seed that is not an unsigned 64-bit number.
    """
    if not 0 <= seed < 2**64:
        raise ValueError(f"seed {seed} is not an unsigned 64-bit number")
    hashed = hashlib.blake2b(digest_size=8, person=b"entrodrop")
    hashed.update(FORMAT_VERSION.to_bytes(4, "little") + seed.to_bytes(8, "little"))
    for name in (stream, source):
        encoded = name.encode("utf-8", "surrogatepass")
        hashed.update(len(encoded).to_bytes(8, "little") + encoded)
    return int.from_bytes(hashed.digest(), "little")


def token_words(
    key: int, row_id: NDArray[np.int64], window: NDArray[np.int32], lengths: NDArray[np.int64], epoch: int
) -> NDArray[np.uint32]:
    """One 32-bit word for each token of R rows: uint32 [sum(lengths)], the rows one after the other.

    Token t of row r is lane t % 4 of block t // 4 of (``row_id[r]``, ``window[r]``, ``epoch``). ``row_id`` [R] int64 in
    [0, 2**48), ``window`` [R] int32 in [0, 2**31), ``lengths`` [R] int64 tokens, ``epoch`` in [0, 2**16). Raises
    ValueError for a number outside its range.
    """
    return _ragged(key, row_id, window, lengths, epoch)


def tokens_below(
    key: int,
    row_id: NDArray[np.int64],
    window: NDArray[np.int32],
    lengths: NDArray[np.int64],
    epoch: int,
    limit: NDArray[np.uint64],
) -> NDArray[np.bool_]:
    """Whether the word of each token (``token_words``) is below the ``limit`` [R] of its row: bool [sum(lengths)]."""
    return _ragged(key, row_id, window, lengths, epoch, limit)


def token_words64(
    key: int, row_id: NDArray[np.int64], window: NDArray[np.int32], lengths: NDArray[np.int64], epoch: int
) -> NDArray[np.uint64]:
    """As ``token_words``, with 64 bits a token: uint64 [sum(lengths)].

    Token t has lanes 2 * (t % 2) (its low half) and 2 * (t % 2) + 1 (its high half) of block t // 2.
    """
    words = _ragged(key, row_id, window, 2 * lengths, epoch).astype(np.uint64)
    return words[0::2] | words[1::2] << _HALF


def order_keys(
    seed: int, source: str, epoch: int, row_id: NDArray[np.int64], window: NDArray[np.int32]
) -> NDArray[np.uint64]:
    """The 64-bit sort key of each of R rows in ``epoch``: uint64 [R], lanes 0 (low half) and 1 of the row's block 0.

    Rows are in ascending order of (key, row_id, window). Ranges and errors are those of ``token_words``.
    """
    words = _ragged(stream_key(seed, ORDER, source), row_id, window, np.full(len(row_id), 2, np.int64), epoch)
    halves = words.astype(np.uint64)
    return halves[0::2] | halves[1::2] << _HALF


def held_out(seed: int, source: str, fraction: float, row_id: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Which of R rows are held out for validation: bool [R], each with the probability ``fraction``.

    The word of row r is lane 0 of block 0 of (``row_id[r]``, window 0, epoch 0) in the stream HOLD_OUT: all windows of
    a document go the same way, whatever else there is. Raises ValueError for a number outside its range.
    """
    one, none = np.ones(len(row_id), np.int64), np.zeros(len(row_id), np.int32)
    limit = np.repeat(rate_limit(np.array([fraction])), len(row_id))
    return _ragged(stream_key(seed, HOLD_OUT, source), row_id, none, one, 0, limit)


def rate_limit(rate: NDArray[np.float64]) -> NDArray[np.uint64]:
    """The integer L [same shape] uint64 for which ``word < L`` is exactly ``word * 2**-32 < rate``: ceil(rate * 2**32).

    Scaling by a power of two is exact, so is the comparison: rate 0 takes no word, rate 1 takes each. Raises ValueError
    for a rate outside [0, 1].
    """
    if not ((rate >= 0) & (rate <= 1)).all():
        raise ValueError("a drop rate lies between 0 and 1")
    return np.ceil(rate * 2.0**32).astype(np.uint64)


def _ragged(
    key: int,
    row_id: NDArray[np.int64],
    window: NDArray[np.int32],
    lengths: NDArray[np.int64],
    epoch: int,
    limit: NDArray[np.uint64] | None = None,
) -> NDArray[Any]:
    """``lengths[r]`` words of each row: word j of a row is lane j % 4 of its block j // 4; or if it is lower."""
    if not len(row_id) == len(window) == len(lengths):
        raise ValueError(f"{len(row_id)} row ids, {len(window)} windows and {len(lengths)} lengths")
    _check_range("row_id", row_id, MAX_ROW_ID)
    _check_range("window", window, 2**31 - 1)
    _check_range("length", lengths, 2**34)
    if not 0 <= epoch <= MAX_EPOCH:
        raise ValueError(f"epoch {epoch} is outside 0 to {MAX_EPOCH}")

    blocks = -(-lengths // 4)
    ends = np.cumsum(blocks)
    words: NDArray[Any] = np.empty((int(ends[-1]) if len(ends) else 0, 4), np.uint32 if limit is None else np.bool_)
    one: Any = limit[0] if limit is not None and len(limit) and (limit == limit[0]).all() else None
    first = at = 0
    while first < len(blocks):  # whole rows, about a chunk of blocks at a time
        stop = max(first + 1, int(np.searchsorted(ends, at + _CHUNK, "right")))
        some, n = slice(first, stop), blocks[first:stop]
        block = np.arange(int(ends[stop - 1]) - at, dtype=np.uint64)
        block -= np.repeat((ends[some] - n - at).astype(np.uint64), n)
        lanes = (window[some], row_id[some] & 0xFFFFFFFF, epoch << 16 | row_id[some] >> 32)
        made = _philox(block, *(np.repeat(lane.astype(np.uint64), n) for lane in lanes), key=key)
        below = np.repeat(limit[some], n) if limit is not None and one is None else one
        for lane, values in enumerate(made):
            if limit is None:
                words[at : at + len(block), lane] = values
            else:
                np.less(values, below, out=words[at : at + len(block), lane])
        first, at = stop, at + len(block)
    flat: NDArray[Any] = words.reshape(-1)
    if len(flat) == lengths.sum():
        return flat
    wanted = np.ones(len(flat), np.bool_)
    for more in range(1, 4):
        wanted[4 * ends[4 * blocks - lengths >= more] - more] = False
    return flat[wanted]


def _check_range(name: str, values: NDArray[np.int64] | NDArray[np.int32], top: int) -> None:
    if len(values) and (values.min() < 0 or values.max() > top):
        raise ValueError(f"{name} {int(values.min())} to {int(values.max())} is outside 0 to {top}")
