"""How the entropies of the trainable tokens are spread: what the card's picture shows."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from numpy.typing import NDArray

PER_NAT = 8
"""Bins in a nat: a power of two, so that a score's bin is exact in float16 and float32, and
is that of its upper 16 bits."""
BINS = 16 * PER_NAT
"""Up to 16 nats, over the logarithm of any vocabulary; the last bin takes whatever is above."""


class EntropyHistogram:
    """Counts of entropies in nats: bin i holds those from i / PER_NAT on, below (i + 1) / PER_NAT."""

    def __init__(self) -> None:
        self._counts = np.zeros(BINS, np.int64)

    def add(self, entropy: NDArray[Any]) -> None:
        """Count ``entropy`` [n], float16 or float32, nats. Raises ValueError for a NaN among them."""
        if np.isnan(entropy).any():
            raise ValueError("a null score is at a trainable token")
        bits = np.ascontiguousarray(entropy).view(f"u{entropy.dtype.itemsize}") >> (8 * entropy.dtype.itemsize - 16)
        counts = np.bincount(bits, minlength=1 << 16)
        self._counts += np.bincount(_bins(entropy.dtype), counts, BINS).astype(np.int64)

    def merge(self, other: EntropyHistogram) -> None:
        """Add what another counted."""
        self._counts += other._counts

    def summary(self) -> dict[str, Any]:
        """As the manifest has it, the empty bins above the highest left out."""
        filled = np.flatnonzero(self._counts)
        return histogram_summary(self._counts[: int(filled[-1]) + 1 if len(filled) else 0].tolist())


@functools.lru_cache
def _bins(dtype: np.dtype[Any]) -> NDArray[np.int64]:
    """[65536] the bin of each upper 16 bits of a number: where bins begin, the bits below are zero in either format."""
    bits = np.arange(1 << 16).astype(f"u{dtype.itemsize}") << (8 * dtype.itemsize - 16)
    numbers = bits.view(dtype)
    nats = np.clip(np.where(np.isnan(numbers), 0, numbers), 0, BINS // PER_NAT)
    return np.minimum(nats.astype(np.float64) * PER_NAT, BINS - 1).astype(np.int64)


def histogram_summary(counts: list[int]) -> dict[str, Any]:
    """Counts by bin as the manifest has them."""
    return {"bins_per_nat": PER_NAT, "counts": counts}
