"""Scoring a source into shards: what is missing is made, what is there is kept."""

from __future__ import annotations

import logging
import os
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from entrodrop_prep.backends import choose, load_backend
from entrodrop_prep.backends.prefetch import PrefetchQueue
from entrodrop_prep.config import ScoreConfig
from entrodrop_prep.config.names import user_path
from entrodrop_prep.config.workers import worker_of
from entrodrop_prep.errors import MismatchError, OutputError
from entrodrop_prep.scoring.described import described
from entrodrop_prep.scoring.finish import CONTENTS, finish
from entrodrop_prep.scoring.plan import Plan, make_plan
from entrodrop_prep.scoring.span import ShardInput, source_digest, span_table
from entrodrop_prep.scoring.spans import claimed_spans, missing_spans, own_footer, shard_path, shards_of
from entrodrop_prep.scoring.unique import UniqueIds
from entrodrop_prep.scoring.writer import Writer
from entrodrop_prep.sources.files import matches
from entrodrop_prep.store import manifest
from entrodrop_prep.store.disk import check_regular, writing
from entrodrop_prep.store.environment import host_environment
from entrodrop_prep.store.layout import REJECTED, TOKENIZER
from entrodrop_prep.store.locks import locked
from entrodrop_prep.store.ownership import Owned, remove_files, remove_leftovers
from entrodrop_prep.store.ray_workers import WORK, on_ray
from entrodrop_prep.store.schema import SCORED
from entrodrop_prep.store.shards import local_directory, read_footer, write_shard
from entrodrop_prep.store.workers import Workers, busy, joined
from entrodrop_prep.terminal.preemption import Preemption, preemptible
from entrodrop_prep.terminal.progress import Progress

if TYPE_CHECKING:
    from entrodrop_prep.backends import Scores

log = logging.getLogger(__name__)

ENVIRONMENT_KEYS = (
    *("device", "backend", "torch", "transformers", "tokenizers", "head", "layers", "entrodrop_prep"),
    *("vllm", "tensor_parallel", "engine_args"),
)


@dataclass(frozen=True)
class ScoreSummary:
    """What a finished scored directory holds."""

    directory: Path
    counts: dict[str, int]
    seconds: float
    scored_tokens: int
    already_complete: bool


def score(config: ScoreConfig) -> ScoreSummary:
    """Score a source into ``config.out``, continuing whatever an earlier run of the same settings finished.

    Args:
        config: the settings, those of ``entrodrop score``.

    Returns:
        Where the scored directory is, what it holds, and how many tokens this run scored.

    Raises:
        EntrodropError: see ``entrodrop_prep.errors``; finished shards stay.
        ValueError: for ``dry_run``.
    """
    if config.dry_run:
        raise ValueError("dry_run is for entrodrop_prep.scoring.estimate")
    out = local_directory(config.out)
    check_place(config.source, out)
    manifest.check_usable(out, "scored")
    if config.ray is not None:
        done = on_ray(score, config, out, "scored")
        return replace(done.summary, directory=out, seconds=done.seconds, scored_tokens=done.tokens)
    if config.worker is None:
        with locked(out):
            manifest.check_usable(out, "scored")
            remove_leftovers(out, CONTENTS)
            return _run(_plan(config, out), out)
    with preemptible() as preemption, joined(out, CONTENTS, config.claim_timeout) as workers:
        return _run(_plan(config, out), out, workers, preemption)


def _plan(config: ScoreConfig, out: Path) -> Plan:
    state = manifest.read_state(out) or {}
    over = config.overwrite or manifest.being_cleaned(out)
    begun = None if over else state.get("identity") or manifest.identity_of_shards(out, "scored")
    return make_plan(config, state.get("model"), begun)


def _run(plan: Plan, out: Path, workers: Workers | None = None, preemption: Preemption | None = None) -> ScoreSummary:
    """Set the directory up, make what is missing, publish it; of workers, one at a time does the first and the last."""
    with workers.setting_up() if workers else nullcontext(True) as alone:
        done = _set_up(plan, out, alone)
    if done:
        return ScoreSummary(out, done["counts"], 0.0, 0, already_complete=True)
    with preemption.finishing(workers.stopped) if workers and preemption else nullcontext():
        seconds, tokens = _make_missing(plan, out, workers)
    with workers.section() if workers else nullcontext():
        return ScoreSummary(out, _published(plan, out, workers)["counts"], seconds, tokens, already_complete=False)


def _set_up(plan: Plan, out: Path, alone: bool) -> dict[str, Any] | None:
    """Check what is there and note what will be; the manifest of a directory that is finished.

    ``alone``: no worker is at work and nobody reads.
    """
    manifest.check_usable(out, "scored")
    state = manifest.read_state(out) or {}
    owned = Owned(out, CONTENTS)
    # Only now: settings that do not work must not cost what is there.
    if plan.config.overwrite or manifest.being_cleaned(out):
        if not alone:
            raise busy(out)
        owned.remove(owned.check(shards=True), {"schema": plan.identity["schema"]})
        state = {}
    finished = manifest.read(out, SCORED) if (out / manifest.NAME).exists() else None
    before = finished["identity"] if finished else manifest.identity_of_shards(out, "scored")
    if before is None and not alone:
        before = state.get("identity")
    if before is not None:
        manifest.check_identity(out, before, plan.identity)
        if state.get("source") != plan.source.stat():
            _check_source_unchanged(plan, out)
    note = {
        "schema": plan.identity["schema"],
        "identity": plan.identity,
        "source": plan.source.stat(),
        "model": plan.weights.files,
    }
    if not owned.unsure:
        note["files"] = owned.noted
    if note != state:
        manifest.write_state(out, note)
    if finished and all((out / e["file"]).exists() for e in finished["files"]):
        manifest.look(out, finished)
        return finished
    if not alone:
        if finished:
            raise busy(out)
        return None
    owned.check(shards=False)
    for path in shards_of(out):
        check_regular(path)
        own_footer(path, plan)
    with writing(out):
        remove_files(out, [manifest.NAME])
    return None


def _published(plan: Plan, out: Path, workers: Workers | None) -> dict[str, Any]:
    """The manifest, written now unless another worker was faster."""
    if workers and (out / manifest.NAME).exists():
        return manifest.read(out, SCORED)
    plan.weights.check_unchanged()
    if not plan.source.check_unchanged(remote=True):
        _check_source_unchanged(plan, out)
    shards = [(path, own_footer(path, plan)) for path in shards_of(out)]
    if workers:
        seen_ids = UniqueIds(plan.config.id_column)
        for path, _ in shards:
            seen_ids.add_shard(path)
    return finish(plan, out, shards)


def check_place(source: str, out: Path) -> None:
    """Raises OutputError where what is written would be read as part of the source: a folder, or a glob."""
    path = user_path(source)
    if os.path.isdir(path):
        inside = bool(source.strip()) and path.resolve() in (out.resolve(), *out.resolve().parents)
    else:
        files = (shard_path(out, 0), *(out / name for name in (manifest.NAME, REJECTED, f"{TOKENIZER}/tokenizer.json")))
        inside = any(matches(source, str(file)) for file in files)
    if inside:
        raise OutputError(
            "the scored dataset cannot be inside its source, where it would be read as part of it",
            where=str(out),
            fix="choose another --out",
        )


def _make_missing(plan: Plan, out: Path, workers: Workers | None) -> tuple[float, int]:
    """Make every shard that is not there; returns seconds and tokens scored. Loads the model only if one is missing.

    A thread reads and tokenizes ahead, another writes behind: the backend waits for neither.
    """
    total, unit = (
        (plan.source.total_rows, "rows") if plan.source.total_rows is not None else (plan.source.size_bytes, "bytes")
    )
    seconds, tokens = 0.0, 0
    with Progress("scoring", total, unit) as progress:
        if workers and plan.config.worker:
            workers.write(WORK, {"total": total, "unit": unit, "folders": [""]})
            spans = claimed_spans(plan, out, progress, worker_of(plan.config.worker), workers)
            feed = PrefetchQueue(spans, ahead=1)  # what is read ahead, no other worker can take
        else:
            feed = PrefetchQueue(missing_spans(plan, out, progress))
        try:
            if feed.any():
                seconds, tokens = _score(plan, out, feed, progress, workers)
        finally:
            if workers:
                workers.stopped.set()
            feed.close()
        if feed.error is not None:
            raise feed.error
        return seconds, tokens


def _score(
    plan: Plan, out: Path, feed: PrefetchQueue, progress: Progress, workers: Workers | None
) -> tuple[float, int]:
    """Score what the feed gives and write it; returns seconds and tokens."""
    name, why = choose(plan.config, plan.info)
    if plan.config.backend == "auto":
        log.info("backend: %s (%s)", name, why)
    pa.array(
        np.zeros(1)
    )  # with its first array pyarrow imports pandas: now, not when everyone waits for the last shard
    backend = load_backend(name, plan.config, plan.info)
    try:
        checked = {"self_check": "passed" if plan.config.self_check else "off"} if name != "transformers" else {}
        environment = {**host_environment(), **backend.environment(), **checked}
        _check_environment(plan, out, environment, workers)
        made = {"environment": environment, "described": described(plan)}
        where = "" if name == "server" else f" on {environment['device']}"
        log.info("scoring with %s%s (%s)", environment["backend"], where, plan.info.dtype)
        progress.begin()
        tokens = 0

        def done(job: Any, count: int) -> None:
            progress.add(count * job.units / max(1, job.tokens), count)

        with Writer() as writer:
            for span, scores in backend.score(feed, done):
                if not span.tokens:
                    progress.add(span.units, 0)
                tokens += span.tokens
                writer.submit(_write_span, plan, span, scores, shard_path(out, span.index), made, workers)
        return progress.seconds, tokens
    finally:
        backend.close()


def _write_span(
    plan: Plan,
    span: ShardInput,
    scores: list[Scores],
    path: Path,
    made: dict[str, Any],
    workers: Workers | None = None,
) -> None:
    """Write one shard, of the model's weights and the source's files as they were when the run began.

    ``made`` says with what, and from what, as every footer does.
    """
    info = {
        "schema": plan.schema.metadata[b"schema"].decode(),
        "shard": span.index,
        "fingerprint": plan.fingerprint,
        "identity": plan.identity,
        **made,
        "counts": span.counts,
        "rejected": span.rejected,
        **({"notes": dict(sorted(span.notes.items()))} if span.notes else {}),
        "source": {"digest": span.source_digest, "next": span.next, "units": span.units if plan.exact_units else 0},
    }
    with workers.finishing(path.name) if workers else nullcontext():
        plan.weights.check_unchanged()
        plan.source.check_unchanged()
        write_shard(path, plan.schema, [span_table(plan, span, scores)], info, keep=workers is not None)


def _check_environment(plan: Plan, out: Path, environment: dict[str, str], workers: Workers | None) -> None:
    """Shards that are there were made in this environment, or the change is accepted. Raises MismatchError."""
    found = [read_footer(path).info["environment"] for path in shards_of(out)]
    if workers:
        with workers.section():
            found.append(workers.agreed("environment", environment))
    for before in found:
        changed = [d for d in manifest.differences(before, environment) if d.split(" ")[0] in ENVIRONMENT_KEYS]
        if changed and not plan.config.accept_environment_change:
            raise MismatchError(
                f"it was begun in another environment: {'; '.join(changed)}",
                where=str(out),
                fix="go back to that one, or add --accept-environment-change: scores may then differ "
                "in the last digits, and the manifest lists both",
            )


def _check_source_unchanged(plan: Plan, out: Path) -> None:
    """Files whose times changed are read again and compared with what the finished shards were made from."""
    shards = shards_of(out)
    if shards:
        log.info("the source's times changed: comparing it with what was scored")
    position, following, size = None, 0, plan.config.rows_per_shard
    for path in shards:
        footer = read_footer(path)
        index = footer.info["shard"]
        found, after = source_digest(plan, index, position if index == following else None)
        if found != footer.info["source"]["digest"]:
            raise MismatchError(
                f"the source changed: rows {index * size} to {(index + 1) * size - 1} are not those "
                f"that {path.name} was made from",
                where=str(out),
                fix="restore the source, choose another --out, or add --overwrite",
            )
        position, following = after, index + 1
