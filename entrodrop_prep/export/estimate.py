"""What writing masked epochs will take, before it: ``materialize --dry-run``."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from entrodrop_prep.config import MaterializeConfig
from entrodrop_prep.export import derived
from entrodrop_prep.export.card.tables import aligned
from entrodrop_prep.export.epoch import GROUP_TOKENS, Part, ShardCounts
from entrodrop_prep.export.job import Job, open_job
from entrodrop_prep.export.materialize import check_job, check_rows, earlier, footer_of
from entrodrop_prep.export.space import DIRECTORY_BYTES, check_cache, derived_bytes, plain_bytes
from entrodrop_prep.masking.curriculum import horizon
from entrodrop_prep.store import manifest
from entrodrop_prep.store.disk import scratch
from entrodrop_prep.store.locks import LOCK, reading_lock
from entrodrop_prep.store.parallel import in_order
from entrodrop_prep.store.schema import MASKED
from entrodrop_prep.store.shards import column_bytes, local_directory, write_shard
from entrodrop_prep.terminal.amounts import NOISE, Amount, peak_memory, size_text, time_text

MOST_TOKENS = 1 << 24
"""Tokens that are masked and written to see what they take, about; a row group of each epoch is in any case."""
SAMPLED = 0.05
"""Of labels and bytes where only some row groups were made."""


@dataclass(frozen=True)
class PartEstimate:
    """A folder: its rows are certain; the rest is as in the row groups that were made of it.

    ``missing`` of its ``files`` are not there yet.
    """

    folder: str
    rows: int
    tokens: Amount
    trainable: Amount
    dropped: Amount
    files: int
    missing: int
    disk: Amount


@dataclass(frozen=True)
class MaterializeEstimate:
    """What ``materialize`` takes: ``seconds`` and ``disk`` of what an earlier run has left to do.

    Attributes:
        parts: the epochs, then the plain rows and the validation rows.
        disk: bytes that are written, those of ``--layout`` among them.
        cache_bytes: temporary ones beside them while it runs.
        memory_bytes: the most that this process took so far, with as many threads.
        start: seconds until the first file is written: sources checked, scores read, thresholds.
        writing: seconds from then on.
        speed: tokens written a second.
    """

    parts: list[PartEstimate]
    disk: Amount
    cache_bytes: int
    memory_bytes: float
    start: float
    writing: Amount
    speed: float

    @property
    def lines(self) -> Iterator[str]:
        """The estimate as lines of text."""
        head = ["", "rows", "tokens", "trainable", "dropped", "share", "files", "bytes"]
        table = [head]
        for p in self.parts:
            about = "about " if p.dropped.error else ""
            labels = [f"{about}{p.trainable.value:,.0f}", f"{about}{p.dropped.value:,.0f}"]
            share = f"{p.dropped.value / max(1, p.trainable.value):.1%}"
            files = [f"{p.files:,}", size_text(p.disk.value)]
            table.append([p.folder, f"{p.rows:,}", f"{p.tokens.value:,.0f}", *labels, share, *files])
        yield from aligned(table)
        there = sum(p.files - p.missing for p in self.parts)
        if there:
            yield f"finished: {there:,} files are there"
        yield f"disk: {self.disk.text(size_text)}, and {size_text(self.cache_bytes)} while it runs"
        yield f"memory: about {size_text(self.memory_bytes)}"
        yield f"time: {self.writing.text(time_text)} at {self.speed:,.0f} tokens/s, after {time_text(self.start)}"


def estimate(config: MaterializeConfig) -> MaterializeEstimate:
    """What ``materialize`` with these settings takes. Nothing is written but temporary files, in TMPDIR.

    Args:
        config: the settings, those of ``entrodrop materialize``.

    Returns:
        The estimate. The scores are read once, as by the run; then row groups of each epoch, chosen by a fixed seed,
        are made, written and thrown away: all of them where they are few.

    Raises:
        EntrodropError: as ``materialize``.
    """
    begun = time.monotonic()
    out = local_directory(config.out)
    job = open_job(config)
    check_job(out, job)
    manifest.check_usable(out, "masked")
    locks = [scored.directory for scored in job.directories if (scored.directory / LOCK).exists()]  # none is made
    with reading_lock(*locks):
        fresh = config.overwrite or not out.is_dir() or manifest.being_cleaned(out)
        begun_epochs = set() if fresh else earlier(out, job.identity, config.epochs)[1]
        wanted = sorted({*config.epochs_to_write(), *begun_epochs})
        job.config = replace(config, horizon=horizon(config), epochs=max(config.epochs, wanted[-1] + 1))
        for scored in job.directories:
            scored.check()
        job.plan(wanted)
        with scratch() as tmp:
            check_cache(tmp, job.cache_bytes)
            job.open(tmp / "columns")
            parts = job.parts(wanted)
            check_rows(job, parts)
            start = time.monotonic() - begun
            made, seconds = _made(job, parts, tmp)
    estimates = [_part(part, made[part.folder], _missing(out, part, fresh)) for part in parts]
    left = [e.tokens.value * e.missing / max(1, e.files) for e in estimates]
    speed = sum(one.counts.values["tokens"] for one in made.values()) / max(1e-9, seconds)
    stored = sum(e.disk.value * e.missing / max(1, e.files) for e in estimates)
    error = max(e.disk.error for e in estimates)
    tokens = sum(e.tokens.value for e in estimates)
    per_token = sum(e.disk.value for e in estimates) / max(1, tokens)
    layouts: list[str] = [name for name in derived.FOLDERS if name in config.layout]
    more = tokens * derived_bytes(out, layouts, per_token, plain_bytes(config))
    return MaterializeEstimate(
        parts=estimates,
        disk=Amount(stored + more + DIRECTORY_BYTES, max(0.02, error)),
        cache_bytes=job.cache_bytes,
        memory_bytes=peak_memory(),
        start=start,
        writing=Amount(sum(left) / speed, NOISE + error),
        speed=speed,
    )


@dataclass
class _Made:
    """Row groups of a part that were made: what masking did, bytes of rows, and those of a file that says of them.

    ``empty`` is the size of a file without a row.
    """

    counts: ShardCounts
    empty: int = 0
    stored: int = 0
    beside: int = 0
    groups: int = 0


def _made(job: Job, parts: list[Part], tmp: Path) -> tuple[dict[str, _Made], float]:
    """Some row groups of each part, made as the run makes them, by as many threads; and seconds."""
    rng = np.random.Generator(np.random.Philox(key=0))
    budget = MOST_TOKENS // len(parts)
    chosen: list[tuple[Part, int, int]] = []
    for part in parts:
        layout = part.layout
        count = min(layout.shards, max(1, math.ceil(layout.shards * budget / max(1, layout.tokens))))
        every = math.ceil(layout.tokens * count / layout.shards / max(budget, GROUP_TOKENS))
        chosen += [(part, int(n), every) for n in np.sort(rng.choice(layout.shards, count, replace=False))]

    def write(part: Part, shard: int, tables: Callable[[ShardCounts], Iterable[pa.Table]]) -> _Made:
        counts, path = job.counts(part), tmp / f"{part.folder}-{shard}.parquet"
        info = {"schema": MASKED, **part.label, "shard": shard, **footer_of(job)}
        compression = job.config.compression
        write_shard(path, job.schema, tables(counts), lambda: info | counts.info(), compression=compression)
        size = int(manifest.file_entry(tmp, path)["bytes"])
        found = pq.read_metadata(path)
        path.unlink()
        stored = column_bytes(found)
        return _Made(counts, 0, stored, size - stored, found.num_row_groups)

    def one(wanted: tuple[Part, int, int]) -> tuple[Part, _Made]:
        part, shard, every = wanted
        return part, write(part, shard, lambda counts: job.tables(part, shard, counts, every))

    made = {part.folder: _Made(job.counts(part), write(part, 0, lambda counts: []).beside) for part in parts}
    begun = time.monotonic()
    for part, found in in_order(one, chosen, job.jobs):
        sums = made[part.folder]
        sums.counts.merge(found.counts)
        sums.stored, sums.groups = sums.stored + found.stored, sums.groups + found.groups
        sums.beside += found.beside - sums.empty
    return made, time.monotonic() - begun


def _missing(out: Path, part: Part, fresh: bool) -> int:
    return part.layout.shards if fresh else sum(not (out / part.name(n)).exists() for n in range(part.layout.shards))


def _part(part: Part, made: _Made, missing: int) -> PartEstimate:
    """A part, from the row groups that were made of it."""
    layout = part.layout
    more = layout.rows / max(1, made.counts.rows)
    error = 0.0 if made.counts.rows == layout.rows else SAMPLED
    groups = sum(len(list(layout.groups(shard))) for shard in range(layout.shards))
    values = made.counts.values
    return PartEstimate(
        folder=part.folder,
        rows=layout.rows,
        tokens=Amount(values["tokens"] * more, error) if layout.left_out else Amount(layout.tokens),
        trainable=Amount(values["trainable"] * more, error),
        dropped=Amount(values["dropped"] * more, error),
        files=layout.shards,
        missing=missing,
        disk=Amount(made.stored * more + layout.shards * made.empty + groups * made.beside / made.groups, error),
    )
