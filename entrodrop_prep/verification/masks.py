"""The masks of a masked directory, made again from its scores."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from entrodrop_prep.errors import ConfigError
from entrodrop_prep.store import manifest
from entrodrop_prep.store.schema import MASKED
from entrodrop_prep.training.rows import MaskedRows
from entrodrop_prep.verification.run import given_compared, given_sources


def masks_of(
    path: Path, against: str | Sequence[str] | None, against_scores: Sequence[str], cache: Path
) -> tuple[dict[str, Any], MaskedRows]:
    """The manifest of a masked directory, and its rows as its recipe makes them from the scores.

    Args:
        path: the masked directory.
        against: the scored ones it was made from, ``SCORED`` or ``NAME=SCORED``.
        against_scores: the scores that these were compared with, ``SCORED2`` or ``NAME=SCORED2``.
        cache: directory for the columns that are mapped into memory.

    Raises:
        ConfigError: nothing is given to ``against``.
        IntegrityError: the directory is damaged, or was not made from these scores.
    """
    if not against:
        raise ConfigError(
            "a masked directory holds no scores",
            where=str(path),
            fix="name what it was made from: --against SCORED, or --against NAME=SCORED for each source",
        )
    described = manifest.read(path, MASKED)
    given, _ = given_sources(path, described, [against] if isinstance(against, str) else list(against))
    sources: str | dict[str, str] = given if "sources" in described["identity"] else next(iter(given.values()))
    others = given_compared(path, described["identity"], against_scores)
    return described, MaskedRows.like(path, sources, against_scores=others, cache_dir=cache)
