"""Writing masked datasets: what is missing is made, what is there is kept."""

from __future__ import annotations

import logging
import threading
from collections.abc import Generator, Iterable
from contextlib import closing, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from entrodrop_prep.config import MaterializeConfig
from entrodrop_prep.config.workers import worker_of
from entrodrop_prep.errors import ConfigError, IntegrityError, MismatchError, OutputError, SourceError
from entrodrop_prep.export import derived
from entrodrop_prep.export.card import NAME as CARD
from entrodrop_prep.export.epoch import Part, ShardCounts, check_content, misplaced
from entrodrop_prep.export.finish import Written, finish, publish
from entrodrop_prep.export.job import Job, no_rows, open_job
from entrodrop_prep.export.provenance import environments, stamp
from entrodrop_prep.export.space import check_cache, check_space
from entrodrop_prep.masking.curriculum import horizon
from entrodrop_prep.masking.plan import warn_if_flat
from entrodrop_prep.store import digest, inside, manifest
from entrodrop_prep.store.disk import TMP, check_folder, check_regular, remove_tree, writing
from entrodrop_prep.store.environment import host_environment
from entrodrop_prep.store.layout import VALIDATION
from entrodrop_prep.store.locks import locked, reading_lock
from entrodrop_prep.store.ownership import Owned, remove_files, remove_leftovers
from entrodrop_prep.store.parallel import in_order, unless
from entrodrop_prep.store.ray_workers import WORK, on_ray
from entrodrop_prep.store.schema import MASKED
from entrodrop_prep.store.shards import local_directory, read_footer, shard_names, write_shard
from entrodrop_prep.store.workers import Workers, busy, joined
from entrodrop_prep.terminal.preemption import Preemption, preemptible
from entrodrop_prep.terminal.progress import Progress

if TYPE_CHECKING:
    from entrodrop_prep.publish.push import PushSummary

log = logging.getLogger(__name__)

COLUMNS = f"{TMP}columns"
"""Folder of the scored rows that masked ones are made from, one for all workers; removed at the end."""


@dataclass(frozen=True)
class MaterializeSummary:
    """What a masked directory holds: ``epochs`` has one table row an epoch, as in the manifest."""

    directory: Path
    epochs: list[dict[str, Any]]
    seconds: float
    written_tokens: int
    already_complete: bool
    pushed: PushSummary | None = None


def materialize(config: MaterializeConfig) -> MaterializeSummary:
    """Write the masked dataset of each epoch into ``config.out``, continuing whatever an earlier run finished.

    Args:
        config: the settings. ``publish.materialize`` is for those with ``push_to_hub``.

    Returns:
        What the directory holds, and how many tokens this run wrote.

    Raises:
        EntrodropError: see ``entrodrop_prep.errors``; finished files stay.
        ValueError: for ``push_to_hub`` and ``dry_run``.
    """
    if config.push_to_hub is not None:
        raise ValueError("push_to_hub is for entrodrop_prep.publish.materialize")
    if config.dry_run:
        raise ValueError("dry_run is for entrodrop_prep.export.estimate")
    out = local_directory(config.out)
    job = open_job(config)
    check_job(out, job)
    manifest.check_usable(out, "masked")
    if config.ray is not None:
        done = on_ray(materialize, config, out, "masked")
        return replace(done.summary, directory=out, seconds=done.seconds, written_tokens=done.tokens)
    with reading_lock(*(scored.directory for scored in job.directories)):
        if config.worker is None:
            with locked(out):
                manifest.check_usable(out, "masked")
                remove_leftovers(out, derived.CONTENTS)
                try:
                    return _run(job, out)
                finally:
                    with writing(out):
                        remove_tree(out / COLUMNS)
        with preemptible() as preemption, joined(out, derived.CONTENTS, config.claim_timeout) as workers:
            return _run(job, out, workers, preemption)


def _run(
    job: Job, out: Path, workers: Workers | None = None, preemption: Preemption | None = None
) -> MaterializeSummary:
    """Set the directory up, make what is missing, publish it; of workers, one at a time does the first and the last."""
    with workers.setting_up() if workers else nullcontext(True) as alone:
        task = _set_up(job, out, alone, workers)
    if isinstance(task, MaterializeSummary):
        return task
    with preemption.finishing(workers.stopped) if workers and preemption else nullcontext():
        made, seconds = _write(out, job, task, workers, preemption)
    with workers.section() if workers else nullcontext():
        if workers and (out / manifest.NAME).exists():
            described = manifest.read(out, MASKED)
        else:
            used = (manifest.read_state(out) or {})["environments"]
            described = finish(out, job, task.parts, job.identity, task.layouts, used, made)
    tokens = sum(footer.info["counts"]["tokens"] for footer, _ in made.values())
    return MaterializeSummary(out, described["epochs"], seconds, tokens, already_complete=False)


@dataclass(frozen=True)
class _Task:
    """What is to be written: the parts, the files that are missing of each, and the layouts that follow from them."""

    parts: list[Part]
    missing: dict[Part, list[int]]
    layouts: list[str]


def _set_up(job: Job, out: Path, alone: bool, workers: Workers | None) -> MaterializeSummary | _Task:
    """Check what is there, and have what every file is made from; the summary of a directory that is finished.

    ``alone``: no worker is at work and nobody reads. The first one of several reads the scored rows for all.
    """
    manifest.check_usable(out, "masked")
    config, identity = job.config, job.identity
    if manifest.being_cleaned(out):
        config = replace(config, overwrite=True)
    finished, begun = (None, set()) if config.overwrite else earlier(out, identity, config.epochs)
    wanted = set(config.epochs_to_write()) | begun
    before = derived.known(out)
    layouts = [n for n in derived.FOLDERS if n in config.layout or (n in before and not config.overwrite)]
    if workers and not finished:
        wanted, layouts = _agreed(out, workers, config, wanted, layouts)
    config = replace(config, horizon=horizon(config), epochs=max(config.epochs, max(wanted) + 1))
    job.config = config
    derived.check(out, layouts, before, wanted, config.epochs)
    if finished and _holds(out, finished, wanted):
        if not alone and not (derived.holds(out, finished, layouts) and (out / CARD).exists()):
            raise busy(out)
        return _derive(out, finished, layouts, config)
    if not alone and (finished or config.overwrite):
        raise busy(out)
    if workers:
        _agreed(out, workers, config, wanted, layouts)
    owned = Owned(out, derived.CONTENTS)
    ours = owned.check(shards=config.overwrite, folders=derived.folders(before))
    for scored in job.directories:
        scored.check()
    job.plan(wanted)
    if alone:
        check_cache(out, job.cache_bytes)
    job.open(out / COLUMNS, shared=workers is not None)
    parts = job.parts(sorted(wanted))
    check_rows(job, parts)
    warn_if_flat(config, job.rows.size(min(wanted))[0])
    _warn_of_left_out(config, parts)
    if config.pack:
        _warn_of_packing(config, parts[0])
    if config.overwrite or not alone:
        missing = {part: list(range(part.layout.shards)) for part in parts}
    else:
        missing = {part: _missing(out, part, job.schema, identity, finished) for part in parts}
    if alone:
        freed = sum((out / name).stat().st_size for name in ours) if config.overwrite else 0
        check_space(out, missing, config, sum(p.layout.tokens for p in parts), layouts, freed)
    for part in parts:
        check_folder(out / part.folder)
    if config.overwrite:
        owned.remove(ours, {"schema": MASKED, "layouts": before})
    used = environments(None if config.overwrite else manifest.read_state(out), finished)
    state = {"schema": MASKED, "identity": identity, "layouts": layouts, "environments": used}
    manifest.write_state(out, {**state, **_noted(owned)})
    with writing(out):
        remove_files(out, [manifest.NAME])
    return _Task(parts, missing, layouts)


def _agreed(
    out: Path, workers: Workers, config: MaterializeConfig, wanted: set[int], layouts: list[str]
) -> tuple[set[int], list[str]]:
    """The epochs and layouts that all workers write. Raises MismatchError where the others do not write these."""
    common = workers.agreed("wanted", {"epochs": sorted(wanted), "layouts": layouts})
    more = [f"epoch {e}" for e in config.epochs_to_write() if e not in common["epochs"]]
    more += [f"--layout {name}" for name in config.layout if name in derived.FOLDERS and name not in common["layouts"]]
    if more:
        raise MismatchError(
            f"the other workers do not write {more[0]}",
            where=str(out),
            fix="give all workers the same settings, or wait for them and run again",
        )
    return set(common["epochs"]), common["layouts"]


def check_job(out: Path, job: Job) -> None:
    """What cannot be written.

    Raises OutputError where the directory would be one of its sources, or inside one; ConfigError where the validation
    rows are those that are trained on.
    """
    for scored in job.directories:
        if out.resolve() == scored.directory.resolve() or scored.directory.resolve() in out.resolve().parents:
            raise OutputError(
                "the masked dataset cannot be inside the scored one", where=str(out), fix="choose another --out"
            )
    if job.eval and job.eval.content_digest in {s.scored.content_digest for s in job.sources.all}:
        raise ConfigError(
            "--eval has the same scores as the rows that are trained on",
            where=str(job.eval.directory),
            fix="give a scored directory of other rows, or hold some of these out with --eval-fraction",
        )


def check_rows(job: Job, parts: list[Part]) -> None:
    """Raises ConfigError, SourceError for a part that has no rows."""
    for part in parts:
        if part.layout.left_out and not part.layout.rows:
            raise ConfigError(
                f"--rows-multiple {job.config.rows_multiple} is more than the {part.layout.left_out:,} rows of "
                f"{part.folder}",
                fix=f"give {part.layout.left_out} at most",
            )
        if not part.layout.rows:
            from_rows = job.validation if part.folder == VALIDATION and job.validation else job.sources
            raise no_rows(job.config, part.folder == VALIDATION) or SourceError(
                f"no row has anything to train on in {part.folder}",
                where=", ".join(str(s.scored.directory) for s in from_rows.all),
                fix="check its loss masks"
                if not job.sources.named
                else "check their loss masks, and weights so small that an epoch gets no row",
            )


def _warn_of_left_out(config: MaterializeConfig, parts: list[Part]) -> None:
    most = max(part.layout.left_out for part in parts)
    if most and config.shuffle != "epoch":
        log.warning(
            "--rows-multiple %d leaves out up to %d rows, and --shuffle %s the same ones in every epoch",
            config.rows_multiple,
            most,
            config.shuffle,
        )


def _warn_of_packing(config: MaterializeConfig, part: Part) -> None:
    if not {"position_ids", "seq_lengths"} & set(config.add_columns):
        log.warning("the documents of one row will see each other: add --add-columns position_ids to keep them apart")
    if part.packed and part.packed.rows_cut:
        log.warning(
            "%s rows are longer than --pack %d and are cut; the first token of each piece has no label, and %s pieces "
            "have nothing else to train on and are left out",
            f"{part.packed.rows_cut:,}",
            config.pack,
            f"{part.packed.pieces_left_out:,}",
        )
    if config.eval or config.eval_fraction:
        log.info("validation rows are not packed")


def footer_of(job: Job) -> dict[str, Any]:
    """What the footers of all files of a run say."""
    identity = job.identity
    return {
        "fingerprint": digest.of_json(identity),
        "identity": identity,
        "provenance": stamp(job.sources.all, job.eval),
        "environment": host_environment(),
    }


def _write(
    out: Path, job: Job, task: _Task, workers: Workers | None, preemption: Preemption | None
) -> tuple[dict[str, Written], float]:
    """Write the missing shards, several at a time; returns those made here by name, and seconds."""
    common = footer_of(job)
    stopped, slots = preemption.ended if preemption else threading.Event(), threading.Semaphore(job.jobs)

    def tables(part: Part, shard: int, counts: ShardCounts) -> Generator[pa.Table, None, None]:
        with slots:  # what flushes a file to the disk waits for it, and lets another thread work
            yield from unless(stopped, job.tables(part, shard, counts))

    def write(wanted: tuple[Part, int]) -> tuple[str, Written]:
        part, shard = wanted
        name = part.name(shard)
        counts, path = job.counts(part), out / name
        info: dict[str, Any] = {"schema": MASKED, **part.label, "shard": shard, **common}
        # Closed where writing fails, too: the error, which is kept, would keep the slot that the others wait for.
        with workers.finishing(name) if workers else nullcontext(), closing(tables(part, shard, counts)) as made:
            footer = write_shard(
                path,
                job.schema,
                made,
                lambda: info | counts.info(),
                compression=job.config.compression,
                flush_name=workers is not None,
                keep=workers is not None,
            )
            progress.add(counts.rows, counts.values["tokens"])
            with writing(path):
                return name, (footer, manifest.file_entry(out, path))

    def rows(wanted: tuple[Part, int]) -> int:
        first, stop = wanted[0].layout.positions(wanted[1])
        return stop - first

    every = {part.name(shard): (part, shard) for part, shards in task.missing.items() for shard in shards}
    with Progress("materializing", sum(map(rows, every.values())), "rows") as progress:
        items: Iterable[tuple[Part, int]] = every.values()
        if workers and job.config.worker:
            total, folders = sum(part.layout.rows for part in task.parts), [part.folder for part in task.parts]
            workers.write(WORK, {"total": total, "unit": "rows", "folders": folders})
            names = workers.claimed(
                worker_of(job.config.worker),
                lambda: (list(every), True),
                progress,
                lambda name: rows(every[name]) if name in every else 0,
            )
            items = (every[name] for name in names)
        try:
            return dict(in_order(write, items, 2 * job.jobs if job.jobs > 1 else 1)), progress.seconds
        finally:
            stopped.set()


def _of_this_run(out: Path, path: Path, identity: dict[str, Any], epochs: int) -> bool:
    """Whether an epoch's folder, or a file, that no manifest lists is of this run: made elsewhere, and copied here."""
    shards = sorted(path.iterdir()) if path.is_dir() else [path]
    for shard in shards:
        info = read_footer(shard).info if shard.suffix == ".parquet" else {}
        name = shard.relative_to(out).as_posix()
        if info.get("identity") != identity or misplaced(name, info) or info.get("epoch", epochs) >= epochs:
            return False
    return bool(shards)


def earlier(out: Path, identity: dict[str, Any], epochs: int) -> tuple[dict[str, Any] | None, set[int]]:
    """What an earlier run left: its manifest if it finished, and the epochs it began, which are to be finished.

    Raises MismatchError if it was a run of other settings.
    """
    finished = manifest.read(out, MASKED) if (out / manifest.NAME).exists() else None
    for found in manifest.unlisted_files(out, finished) if finished else ():
        if not _of_this_run(out, Path(str(found.where)), identity, epochs):
            raise found
    before = finished["identity"] if finished else (manifest.read_state(out) or {}).get("identity")
    if before is None:
        before = manifest.identity_of_shards(out, "masked")
    if before is not None:
        manifest.check_identity(out, before, identity)
    begun = {name.split("/")[0]: out / name for name in shard_names(out, "masked") if name.startswith("epoch_")}
    for path in begun.values():
        read_footer(path)
    return finished, {int(folder.removeprefix("epoch_")) for folder in begun}


def _missing(
    out: Path, part: Part, schema: pa.Schema, identity: dict[str, Any], finished: dict[str, Any] | None
) -> list[int]:
    """Shards of a part that are not there; those that are, are read and checked.

    Raises IntegrityError for a file under their name that is not ours, or no longer holds what was written.
    """
    fingerprint = digest.of_json(identity)
    listed = {entry["file"]: entry for entry in finished["files"]} if finished else {}
    missing = []
    for shard in range(part.layout.shards):
        path = out / part.name(shard)
        if not check_regular(path):
            missing.append(shard)
            continue
        info = read_footer(path).info
        if info.get("fingerprint") != fingerprint:
            raise IntegrityError(
                "it was made with other settings than its directory", where=str(path), fix="remove it and run again"
            )
        wrong = misplaced(part.name(shard), info)
        if wrong:
            raise IntegrityError(wrong, where=str(path), fix="remove it and run again")
        if part.name(shard) in listed:
            manifest.check_file(out, listed[part.name(shard)])
        else:
            check_content(path, schema)
    return missing


def _holds(out: Path, finished: dict[str, Any], wanted: set[int]) -> bool:
    """Whether a finished directory has everything that is wanted (sizes only: ``verify`` reads the bytes)."""
    if not wanted <= {e["epoch"] for e in finished["epochs"]}:
        return False
    there = [inside.status_below(out, e["file"]).st_size for e in finished["files"] if inside.exists(out / e["file"])]
    return there == [e["bytes"] for e in finished["files"]]


def _derive(out: Path, finished: dict[str, Any], layouts: list[str], config: MaterializeConfig) -> MaterializeSummary:
    """What a finished directory still lacks: derived files, its card."""
    complete = derived.holds(out, finished, layouts)
    if not complete:
        check_space(out, {}, config, sum(e.get("tokens", 0) for e in finished["files"]), layouts)
        known = {name: finished[name] for name in ("identity", "environments")}
        owned = Owned(out, derived.CONTENTS)
        owned.check(shards=False, folders=derived.folders(derived.known(out)))
        manifest.write_state(out, {"schema": MASKED, **known, "layouts": layouts, **_noted(owned)})
        finished = {**finished, "derived": derived.make(out, finished, layouts)}
        finished = publish(out, finished)
    elif not (out / CARD).exists():
        finished = publish(out, finished)
    return MaterializeSummary(out, finished["epochs"], 0.0, 0, already_complete=complete)


def _noted(owned: Owned) -> dict[str, Any]:
    """What the private note says of files beside the shards."""
    return {} if owned.unsure else {"files": owned.noted}
