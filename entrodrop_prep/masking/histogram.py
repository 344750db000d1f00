"""How the entropies of the trainable tokens are spread: what the card's picture shows."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

PER_NAT = 8
"""Bins in a nat: a power of two, so that a score's bin is exact in float16 and float32."""
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
        bins = np.clip(entropy * entropy.dtype.type(PER_NAT), 0, BINS - 1)
        self._counts += np.bincount(bins.astype(np.int64), minlength=BINS)

    def merge(self, other: EntropyHistogram) -> None:
        """Add what another counted."""
        self._counts += other._counts

    def told(self) -> dict[str, Any]:
        """As the manifest has it, the empty bins above the highest left out."""
        filled = np.flatnonzero(self._counts)
        return told_bins(self._counts[: int(filled[-1]) + 1 if len(filled) else 0].tolist())


def told_bins(counts: list[int]) -> dict[str, Any]:
    """Counts by bin as the manifest has them."""
    return {"bins_per_nat": PER_NAT, "counts": counts}
