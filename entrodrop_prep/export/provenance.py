"""Where a masked dataset comes from: what its manifest and the footers of its files say, so that they stand alone."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from entrodrop_prep.masking.sources import AGAINST, Source
from entrodrop_prep.store import digest
from entrodrop_prep.store.environment import host_environment
from entrodrop_prep.store.scored import ScoredDataset

_FILES = 8
"""Names of files that a footer gives; of more it gives number and digest."""


def summary_of(scored: ScoredDataset, against: ScoredDataset | None = None) -> dict[str, Any]:
    """What the manifest says of a scored directory: what was settled before it was scored, and what scored it.

    ``against``: the scores that they were compared with.
    """
    found = scored.manifest
    environments = [e["environment"] for e in found.get("environments", [])]
    return {
        "content_digest": scored.content_digest,
        "generator": found["generator"],
        "identity": found["identity"],
        "model": found["model"],
        "model_identity": found["identity"]["model"],
        "source": found["source"],
        "tokenizer": found["tokenizer"],
        **({"environments": environments} if environments else {}),
        **({AGAINST: summary_of(against)} if against else {}),
    }


def source_summary(source: Source, *, named: bool) -> dict[str, Any]:
    """As ``summary_of``, with the source's weight in a mixture."""
    role = {"name": source.name, "weight": source.weight, "plain": source.plain} if named else {}
    return {**role, **summary_of(source.scored, source.against)}


def stamp(sources: Iterable[Source], validation: ScoredDataset | None) -> list[dict[str, Any]]:
    """What each Parquet footer says of the scores. Nothing in it depends on names of directories."""
    summary = [stamped(s.name, summary_of(s.scored, s.against)) for s in sources]
    return [*summary, *([stamped("validation", summary_of(validation))] if validation else [])]


def stamped(name: str, summary: dict[str, Any]) -> dict[str, Any]:
    """What a footer says of one scored directory, from its ``summary_of``, and the digest of that."""
    identity = summary["identity"]
    return {
        "name": name,
        "scores": summary["content_digest"],
        "source": short_source(identity.get("source", {})),
        "source_digest": summary["source"]["digest"],
        **{name: identity[name] for name in ("model", "tokenizer", "dtype", "row_format") if name in identity},
        "generator": summary["generator"],
        "environments": summary.get("environments", []),
        "described": digest.of_json(summary),
    }


def short_source(source: dict[str, Any]) -> dict[str, Any]:
    """A source's identity without a long list of files."""
    files = source.get("files", [])
    if len(files) <= _FILES:
        return source
    return {**source, "files": {"number": len(files), "digest": digest.of_json(files)}}


def environments(*before: dict[str, Any] | None) -> list[dict[str, str]]:
    """Versions that the files were written with, as an unfinished or a finished run noted them, and now; each once."""
    found = [*(e for noted in before for e in (noted or {}).get("environments", [])), host_environment()]
    return [e for i, e in enumerate(found) if e not in found[:i]]
