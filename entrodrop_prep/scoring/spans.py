"""Which shards are to be made, and by whom: all that are missing, or, among several workers, those nobody else has."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from entrodrop_prep.config.workers import Worker
from entrodrop_prep.errors import IntegrityError
from entrodrop_prep.scoring.finish import shard_name
from entrodrop_prep.scoring.plan import Plan
from entrodrop_prep.scoring.span import ShardInput, read_span
from entrodrop_prep.scoring.unique import UniqueIds
from entrodrop_prep.store import manifest
from entrodrop_prep.store.shards import Footer, read_footer, shard_names
from entrodrop_prep.store.workers import Workers
from entrodrop_prep.terminal.progress import Progress

POSITIONS = "positions"
"""The note of workers, and the claim on making it, of where each shard begins in the source."""
NOTE_EVERY = 10.0
"""Seconds between two notes of positions."""


def shard_path(out: Path, index: int) -> Path:
    """``shard-00000.parquet`` and so on."""
    return out / shard_name(index)


def own_footer(path: Path, plan: Plan) -> Footer:
    """A finished shard's footer, checked to be of this run. Raises IntegrityError or MismatchError."""
    footer = read_footer(path)
    if footer.info.get("fingerprint") != plan.fingerprint:
        manifest.check_identity(path.parent, footer.info.get("identity", {}), plan.identity)
        raise IntegrityError(
            "its fingerprint is not that of its settings", where=str(path), fix="remove it and run again"
        )
    return footer


def shards_of(out: Path) -> list[Path]:
    """In order; from 100,000 on a number has more digits."""
    return [out / name for name in shard_names(out, "scored")]


def missing_spans(plan: Plan, out: Path, progress: Progress) -> Iterator[ShardInput]:
    """Read and tokenize the rows of every shard that is not there, in order."""
    position: dict[str, Any] | None = None
    seen_ids = UniqueIds(plan.config.id_column)
    for index in itertools.count():
        path = shard_path(out, index)
        if path.exists():
            footer = own_footer(path, plan)
            seen_ids.add_shard(path)
            position = footer.info["source"]["next"]
            progress.skip(footer.info["source"]["units"])
        else:
            span = read_span(plan, index, position)
            seen_ids.add(span)
            position = span.next
            yield span
        if position is None:
            return


def claimed_spans(plan: Plan, out: Path, progress: Progress, worker: Worker, workers: Workers) -> Iterator[ShardInput]:
    """Read and tokenize the rows of the shards that this worker claims; the claim of one ends when it is written."""
    starts = _Starts(plan, workers)

    def files() -> tuple[list[str], bool]:
        count, whole = starts.look()
        return [shard_name(index) for index in range(count)], whole

    def units(name: str) -> float:
        return float(own_footer(out / name, plan).info["source"]["units"])

    for name in workers.claimed(worker, files, progress, units):
        index = int(name.removeprefix("shard-").removesuffix(".parquet"))
        yield read_span(plan, index, starts.of(index))


class _Starts:
    """Where each shard begins in the source, as one worker finds out for all of them, and how many there are."""

    def __init__(self, plan: Plan, workers: Workers) -> None:
        self._plan, self._workers = plan, workers
        self._size = plan.config.rows_per_shard
        self._note = {"fingerprint": plan.fingerprint, "source": plan.source.stat()}
        self._found: list[dict[str, Any]] = []
        self._whole = False

    def of(self, index: int) -> dict[str, Any] | None:
        """For ``Source.read``."""
        return self._found[index - 1] if index and not self._plan.source.direct else None

    def look(self) -> tuple[int, bool]:
        """How many shards are known, and whether these are all; finds the others unless another worker does."""
        total = self._plan.source.total_rows
        if self._plan.source.direct and total is not None:
            return -(-total // self._size), True
        if not self._whole:
            self._read()
        if not self._whole and self._workers.take(POSITIONS):
            try:
                self._read()
                self._find()
            finally:
                self._workers.give_back(POSITIONS)
        return len(self._found) + 1, self._whole

    def _read(self) -> None:
        noted = self._workers.read(POSITIONS)
        if noted and {name: noted[name] for name in self._note} == self._note:
            self._found, self._whole = noted["positions"], noted["whole"]

    def _find(self) -> None:
        """Note positions as they are found: the others begin with the first ones."""
        noted = time.monotonic()
        for position in self._plan.source.positions(self._size, self._found[-1] if self._found else None):
            self._found.append(position)
            if self._workers.stopped.is_set():
                break
            if time.monotonic() - noted > NOTE_EVERY:
                self._write()
                noted = time.monotonic()
        else:
            self._whole = True
        self._write()

    def _write(self) -> None:
        self._workers.write(POSITIONS, {**self._note, "positions": self._found, "whole": self._whole})
