"""How much disk a masked dataset needs, told and checked before its first byte."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

from entrodrop_prep.config import MaterializeConfig
from entrodrop_prep.errors import DiskSpaceError
from entrodrop_prep.export.epoch import SHARD_FILES, Layout
from entrodrop_prep.export.order import payload_bytes
from entrodrop_prep.export.plan import Corpus
from entrodrop_prep.scored import ScoredDataset

log = logging.getLogger(__name__)

# Stored bytes over plain ones, from text corpora; on the safe side.
STORED_SHARE = {"zstd": 0.75, "snappy": 0.9, "none": 1.05}
PLAIN_BYTES = 9


def check_space(
    out: Path,
    scored: ScoredDataset,
    corpus: Corpus,
    layout: Layout,
    missing: dict[int, list[int]],
    config: MaterializeConfig,
) -> None:
    """Say what is about to be written; raises DiskSpaceError where the disk cannot hold it."""
    rows = sum(stop - first for shards in missing.values() for first, stop in map(layout.places, shards))
    share = rows / max(1, corpus.rows)
    need = int(share * corpus.tokens * PLAIN_BYTES * STORED_SHARE[config.compression])
    spill = payload_bytes(scored, corpus.tokens) if config.shuffle != "none" and rows else 0
    free = shutil.disk_usage(out).free
    if config.overwrite:
        free += sum(path.stat().st_size for path in out.glob(SHARD_FILES))
    log.info("about %s to write, and %s for sorting while it runs", _size(need), _size(spill))
    if need + spill > free:
        raise DiskSpaceError(
            f"about {_size(need)} to write and {_size(spill)} for sorting, but only {_size(free)} are free",
            where=str(out),
            fix="make room, write fewer epochs (--only-epochs), or use --shuffle none",
        )


def _size(n: int) -> str:
    """Bytes for people."""
    value = float(n)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} TB"
