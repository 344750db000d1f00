"""Whether two ways to the same scores agree."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from entrodrop_prep.backends import Scores

SAME = {"float32": (1e-3, 1e-3), "bfloat16": (0.25, 3.0), "float16": (0.05, 1.0)}
"""Mean and largest difference in nats, by the number format of the model. Batches differ, so the last digits may.

In half precision single tokens can be off by whole tenths when a batch has another shape; in float32 none is.
"""


def disagreement(expected: Scores, found: Scores, dtype: str) -> str | None:
    """How ``found`` differs from ``expected``, each arrays [T-1] in nats; None where both agree."""
    for name, a, b in zip(("entropy", "log-probability"), expected, found, strict=True):
        if len(a) != len(b):
            return f"{len(b)} scores where there are {len(a)}"
        with np.errstate(invalid="ignore"):
            differences = np.where(a == b, 0, np.abs(a - b))
        mean, largest = SAME[dtype]
        if not (differences.max() <= largest and differences.mean() <= mean):
            t = int(np.argmax(differences))
            return f"the {name} of token {t + 1} is {b[t]:.5f} where it is {a[t]:.5f}"
    return None
