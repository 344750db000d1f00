"""How much disk a masked dataset needs, told and checked before its first byte."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

from entrodrop_prep.config import MaterializeConfig
from entrodrop_prep.errors import DiskSpaceError
from entrodrop_prep.export import derived
from entrodrop_prep.export.epoch import Part
from entrodrop_prep.terminal.amounts import size_text

log = logging.getLogger(__name__)

# Stored bytes over plain ones, from text corpora; on the safe side.
STORED_SHARE = {"zstd": 0.75, "snappy": 0.9, "none": 1.05}
PLAIN_BYTES = 9
FILE_BYTES, DIRECTORY_BYTES = 4500, 12_000
"""A file without a row, with what the manifest says of it; the rest of the manifest, the card and its picture."""
LINE_BYTES = 16
"""Of a token in a JSONL file: two ids of up to six digits, a 1, three commas."""


def check_cache(out: Path, need: int) -> None:
    """Say how much the scored rows take while masked ones are made of them; raises DiskSpaceError without room."""
    _check_room(out, need, "for the scored rows while it runs", "make room there")


def check_space(
    out: Path,
    missing: dict[Part, list[int]],
    config: MaterializeConfig,
    all_tokens: int,
    layouts: list[str],
    freed: int = 0,
) -> None:
    """Say what is about to be written; raises DiskSpaceError where the disk cannot hold it.

    ``missing`` are the shards to write of each part, ``layouts`` what is derived from all the ``all_tokens`` in the
    end, ``freed`` the bytes that are removed first.
    """
    tokens = 0.0
    for part, shards in missing.items():
        rows = sum(stop - first for first, stop in map(part.layout.positions, shards))
        tokens += rows / max(1, part.layout.rows) * part.layout.tokens
    plain = plain_bytes(config)
    need = int(tokens * plain * STORED_SHARE[config.compression])
    need += FILE_BYTES * sum(map(len, missing.values())) + DIRECTORY_BYTES
    need += int(all_tokens * derived_bytes(out, layouts, plain * STORED_SHARE[config.compression], plain))
    _check_room(out, need, "to write", "make room, or write fewer epochs (--only-epochs)", freed)


def _check_room(out: Path, need: int, what: str, fix: str, freed: int = 0) -> None:
    free = shutil.disk_usage(out).free + freed
    log.info("about %s %s", size_text(need), what)
    if need > free:
        said = f"about {size_text(need)} {what}, but only {size_text(free)} are free"
        raise DiskSpaceError(said, where=str(out), fix=fix)


def plain_bytes(config: MaterializeConfig) -> int:
    """Of a token, not compressed."""
    return PLAIN_BYTES + 4 * ("position_ids" in config.add_columns)


def derived_bytes(out: Path, layouts: list[str], stored: float, plain: int) -> float:
    """Of a token. What ``datasets`` saves is on the disk twice while it is made."""
    need = 0.0
    if derived.CONCATENATED in layouts:
        need += 2 * PLAIN_BYTES + (0 if derived.can_link(out) else stored)
    return need + (LINE_BYTES + plain - PLAIN_BYTES if derived.JSONL in layouts else 0)
