"""Sizes, times and estimates as people read them."""

from __future__ import annotations

import resource
import sys
from collections.abc import Callable
from dataclasses import dataclass

NOISE = 0.1
"""Of a speed, between one time and another on the same machine."""


@dataclass(frozen=True)
class Amount:
    """An estimate: ``value``, and the half-width of its range as a share of it; 0 for what is certain."""

    value: float
    error: float = 0.0

    @property
    def ends(self) -> tuple[float, float]:
        """The least and the most that is to be expected."""
        return self.value * max(0.0, 1 - self.error), self.value * (1 + self.error)

    def text(self, form: Callable[[float], str] = "{:,.0f}".format) -> str:
        """``about 1,200 (1,100 to 1,300)``, or the number alone where it is certain."""
        if not self.error:
            return form(self.value)
        low, high = self.ends
        return f"about {form(self.value)} ({form(low)} to {form(high)})"


def peak_memory() -> float:
    """Bytes: the peak of this process and of the largest that it started."""
    unit = 1.0 if sys.platform == "darwin" else 1024.0
    return unit * sum(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))


def size_text(n: float) -> str:
    """Bytes: ``1.5 MB``."""
    for unit in ("B", "kB", "MB", "GB"):
        if n < 1000:
            return f"{n:.0f} {unit}" if unit == "B" else f"{n:.1f} {unit}"
        n /= 1000
    return f"{n:.1f} TB"


def time_text(seconds: float) -> str:
    """``12 s``, ``3 min 20 s``, ``5 h 10 min``, ``3 d 4 h``."""
    for unit, size, below, less in (("d", 86400, "h", 3600), ("h", 3600, "min", 60), ("min", 60, "s", 1)):
        pieces = round(seconds / less)
        if pieces * less >= size:
            whole, rest = divmod(pieces, size // less)
            return f"{whole} {unit}" + (f" {rest} {below}" if rest else "")
    return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
