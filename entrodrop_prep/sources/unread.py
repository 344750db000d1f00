"""What is in a source and is not read, so that it can be said in one line."""

from __future__ import annotations

from entrodrop_prep.sources.formats import why_passed_over

SHOWN = 3


class Unread:
    """Names of files that are not read, by reason."""

    def __init__(self) -> None:
        self._names: dict[str, list[str]] = {}

    def add(self, reason: str, name: str) -> None:
        self._names.setdefault(reason, []).append(name)

    def takes(self, name: str) -> bool:
        """Whether a file of a directory is read; if not, it is noted, unless nobody takes it for data."""
        reason = why_passed_over(name)
        if reason:
            self.add(reason, name)
        return reason is None

    def __bool__(self) -> bool:
        return bool(self._names)

    def __str__(self) -> str:
        """``3 files of no known format (a.lz4, b.lz4, c.lz4), 1 file empty (d.txt)``."""
        parts = []
        for reason, names in self._names.items():
            some = ", ".join(names[:SHOWN])
            more = f" and {len(names) - SHOWN:,} more" if len(names) > SHOWN else ""
            parts.append(f"{len(names):,} {reason} ({some}{more})")
        return ", ".join(parts)
