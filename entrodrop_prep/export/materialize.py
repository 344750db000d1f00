"""Writing masked datasets: what is missing is made, what is there is kept."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from entrodrop_prep import __version__, digest, manifest
from entrodrop_prep.config import MaterializeConfig
from entrodrop_prep.errors import IntegrityError, OutputError, SourceError
from entrodrop_prep.export.card import NAME as CARD
from entrodrop_prep.export.card import write_card
from entrodrop_prep.export.epoch import (
    COUNTS,
    OTHER_FILES,
    PLAIN,
    SCHEMA,
    SHARD_FILES,
    VALIDATION,
    Part,
    add_counts,
    check_content,
)
from entrodrop_prep.export.job import Job, Single
from entrodrop_prep.export.mixture import Mixture
from entrodrop_prep.export.plan import recipe_values, warn_if_flat
from entrodrop_prep.export.sources import Source, open_eval, open_sources
from entrodrop_prep.export.space import check_space
from entrodrop_prep.progress import Progress
from entrodrop_prep.sample.curriculum import horizon
from entrodrop_prep.schema import MASKED
from entrodrop_prep.shards import local_directory, locked, read_footer, remove_leftovers, write_shard, writing

log = logging.getLogger(__name__)

ORDER_TMP = ".tmp-order"


@dataclass(frozen=True)
class MaterializeSummary:
    """What a masked directory holds: ``epochs`` has one table row an epoch, as in the manifest."""

    directory: Path
    epochs: list[dict[str, Any]]
    seconds: float
    written_tokens: int
    already_complete: bool


def materialize(config: MaterializeConfig) -> MaterializeSummary:
    """Write the masked dataset of each epoch into ``config.out``, continuing whatever an earlier run finished.

    Raises:
        EntrodropError: see ``entrodrop_prep.errors``; finished files stay.
    """
    out = local_directory(config.out)
    job = open_job(config)
    some = job.sources.masked[0].scored
    if some.estimator != "exact":
        log.info("taking %s for the entropy: bounds are experimental", some.score)
    for scored in job.directories:
        if out.resolve() == scored.directory.resolve() or scored.directory.resolve() in out.resolve().parents:
            raise OutputError(
                "the masked dataset cannot lie inside the scored one", where=str(out), fix="choose another --out"
            )
    manifest.check_usable(out, "masked")
    with locked(out):
        manifest.check_usable(out, "masked")
        with writing(out):
            remove_leftovers(out)
        identity = job.identity
        finished, begun = (None, set()) if config.overwrite else _earlier(out, identity)
        wanted = set(config.epochs_to_write()) | begun
        config = replace(config, horizon=horizon(config), epochs=max(config.epochs, max(wanted) + 1))
        job.config = config
        if finished and _holds(out, finished, wanted):
            if not (out / CARD).exists():
                write_card(out, finished)
            return MaterializeSummary(out, finished["epochs"], 0.0, 0, already_complete=True)
        for scored in job.directories:
            scored.check()
        job.survey(wanted)
        parts = job.parts(sorted(wanted))
        _check_rows(job, parts)
        warn_if_flat(config, parts[0].layout.rows)
        undecided = job.open_share
        if undecided is not None:
            log.info("the bounds leave open whether %.1f%% of the trainable tokens may be dropped", 100 * undecided)
        if config.overwrite:
            missing = {part: list(range(part.layout.shards)) for part in parts}
        else:
            missing = {part: _missing(out, part, identity, finished) for part in parts}
        check_space(out, missing, job.sorting_bytes, config)
        if config.overwrite:
            _remove_earlier(out)
        manifest.write_state(out, {"schema": MASKED, "identity": identity})
        with writing(out):
            (out / manifest.NAME).unlink(missing_ok=True)
        seconds, tokens = _write(out, job, missing, identity)
        described = _finish(out, job, parts, identity, undecided)
        return MaterializeSummary(out, described["epochs"], seconds, tokens, already_complete=False)


def open_job(config: MaterializeConfig) -> Job:
    """Open the scored directories that ``config`` names. Raises ConfigError for what does not go together."""
    sources = open_sources(config)
    kind = Mixture if sources.named or config.scope_column else Single
    return kind(sources, config, open_eval(config, sources))


def _check_rows(job: Job, parts: list[Part]) -> None:
    for part in parts:
        if not part.layout.rows:
            where = [job.validation] if part.folder == VALIDATION else [s.scored for s in job.sources.all]
            raise SourceError(
                "no row has anything to train on",
                where=", ".join(str(scored.directory) for scored in where if scored),
                fix="check its loss masks" if not job.sources.named else "check their loss masks and weights",
            )


def _write(out: Path, job: Job, missing: dict[Part, list[int]], identity: dict[str, Any]) -> tuple[float, int]:
    """Write the missing shards; returns seconds and tokens."""
    rows = sum(stop - first for part, shards in missing.items() for first, stop in map(part.layout.places, shards))
    order = job.order(out / ORDER_TMP)
    fingerprint, tokens = digest.of_json(identity), 0
    with Progress("materializing", rows, "rows") as progress:
        try:
            for part, shards in missing.items():
                reader = job.reader(part, order, shards)
                for shard in shards:
                    counts = job.counts(part)
                    info: dict[str, Any] = {
                        "schema": MASKED,
                        **part.label,
                        "shard": shard,
                        "fingerprint": fingerprint,
                        **counts.info(),
                    }
                    write_shard(
                        out / part.name(shard),
                        SCHEMA,
                        reader.shard(shard, counts),
                        info,
                        compression=job.config.compression,
                    )
                    progress.add(counts.rows, counts.values["tokens"])
                    tokens += counts.values["tokens"]
        finally:
            order.close()
        return progress.seconds, tokens


def _earlier(out: Path, identity: dict[str, Any]) -> tuple[dict[str, Any] | None, set[int]]:
    """What an earlier run left: its manifest if it finished, and the epochs it began, which are to be finished.

    Raises MismatchError if it was a run of other settings.
    """
    finished = manifest.read(out, MASKED) if (out / manifest.NAME).exists() else None
    before = finished["identity"] if finished else (manifest.read_state(out) or {}).get("identity")
    if before is not None:
        manifest.check_identity(out, before, identity)
    numbers = (path.parent.name.removeprefix("epoch_") for path in out.glob(SHARD_FILES))
    return finished, {int(number) for number in numbers if number.isdecimal()}


def _missing(out: Path, part: Part, identity: dict[str, Any], finished: dict[str, Any] | None) -> list[int]:
    """Shards of a part that are not there; those that are, are read and checked.

    Raises IntegrityError for a file in their place that is not ours, or no longer holds what was written.
    """
    fingerprint = digest.of_json(identity)
    listed = {entry["file"]: entry for entry in finished["files"]} if finished else {}
    missing = []
    for shard in range(part.layout.shards):
        path = out / part.name(shard)
        if not path.exists():
            missing.append(shard)
        elif read_footer(path).info.get("fingerprint") != fingerprint:
            raise IntegrityError(
                "it was made with other settings than its directory", where=str(path), fix="remove it and run again"
            )
        elif part.name(shard) in listed:
            manifest.check_file(out, listed[part.name(shard)])
        else:
            check_content(path)
    return missing


def _holds(out: Path, finished: dict[str, Any], wanted: set[int]) -> bool:
    """Whether a finished directory has all that is wanted (sizes only: ``verify`` reads the bytes)."""
    if not wanted <= {e["epoch"] for e in finished["epochs"]}:
        return False
    return all(
        (out / e["file"]).is_file() and (out / e["file"]).stat().st_size == e["bytes"] for e in finished["files"]
    )


def _finish(
    out: Path, job: Job, parts: list[Part], identity: dict[str, Any], undecided: float | None
) -> dict[str, Any]:
    """Gather the shards' footers into the manifest, and write the card."""
    files: list[dict[str, Any]] = []
    told = {part: _gathered(out, part, files) for part in parts}
    table = [figures for part, figures in told.items() if part.epoch is not None]
    others = {part.folder: figures for part, figures in told.items() if part.epoch is None}
    if job.validation and job.validation_count:
        others[VALIDATION] |= {
            "rows_without_loss": job.validation_count.rows_without_loss,
            "scored": job.validation.content_digest,
            "source": job.validation.manifest["source"],
        }
    described = {
        "schema": MASKED,
        "generator": f"entrodrop-prep {__version__}",
        "identity": identity,
        "recipe": recipe_values(job.config) | {"epochs": max(e["epoch"] for e in table) + 1},
        "scored": [_told(s, named=True) for s in job.sources.all]
        if job.sources.named
        else _told(job.sources.all[0], named=False),
        "tau_nats": job.told_tau,
        **({} if undecided is None else {"open_share": undecided}),
        "rows_without_loss": job.rows_without_loss,
        "epochs": table,
        **others,
        "content_digest": digest.of_json([f["content_digest"] for f in files]),
        "files": files,
    }
    write_card(out, described)
    return manifest.write(out, described)


def _gathered(out: Path, part: Part, files: list[dict[str, Any]]) -> dict[str, Any]:
    """A part's figures, from the footers of its files, which are added to ``files``."""
    sums, rates, rows = dict.fromkeys(COUNTS, 0), [1.0, 0.0], 0
    sources: dict[str, dict[str, int]] = {}
    for shard in range(part.layout.shards):
        path = out / part.name(shard)
        footer = read_footer(path)
        counts = footer.info["counts"]
        rows += footer.rows
        add_counts(sums, counts)
        rates = [min(rates[0], footer.info["rates"][0]), max(rates[1], footer.info["rates"][1])]
        for name, figures in footer.info.get("sources", {}).items():
            add_counts(sources.setdefault(name, {}), figures)
        files.append(
            manifest.file_entry(
                out,
                path,
                rows=footer.rows,
                tokens=counts["tokens"],
                **part.label,
                content_digest=footer.content_digest,
            )
        )
    by_source = {"sources": sources} if sources else {}
    if part.epoch is None:
        return {"rows": rows, "tokens": sums["tokens"], "labels_left": sums["labels_left"], **by_source}
    trainable = max(1, sums["trainable"])
    return {
        "epoch": part.epoch,
        "folder": part.folder,
        "rows": rows,
        **sums,
        "rate_min": rates[0],
        "rate_max": rates[1],
        "eligible_share": sums["eligible"] / trainable,
        "dropped_share": sums["dropped"] / trainable,
        **by_source,
    }


def _told(source: Source, *, named: bool) -> dict[str, Any]:
    """What the manifest says of a source."""
    scored = source.scored
    return {
        **({"name": source.name, "weight": source.weight, "plain": source.plain} if named else {}),
        "content_digest": scored.content_digest,
        "model": scored.manifest["model"],
        "model_identity": scored.manifest["identity"]["model"],
        "source": scored.manifest["source"],
        "tokenizer": scored.manifest["tokenizer"],
    }


def _other_parts(out: Path) -> list[str]:
    """Which folders beside the epochs an earlier run wrote."""
    state = manifest.read_state(out) or {}
    identity = state.get("identity")
    if (out / manifest.NAME).exists():
        identity = manifest.read(out, MASKED)["identity"]
    known = {PLAIN: "plain_config", VALIDATION: VALIDATION}
    return sorted({*state.get("parts", []), *(part for part, key in known.items() if (identity or {}).get(key))})


def _remove_earlier(out: Path) -> None:
    """Remove what an earlier run wrote, but not README.md, which is the user's. The directory stays known as ours."""
    listed = _other_parts(out)
    manifest.write_state(out, {"schema": MASKED, "parts": listed})
    with writing(out):
        (out / manifest.NAME).unlink(missing_ok=True)
        for pattern in (SHARD_FILES, *(OTHER_FILES[name] for name in listed)):
            for path in out.glob(pattern):
                path.unlink()
        for path in sorted([*out.glob("epoch_*"), *(out / name for name in listed)]):
            if path.is_dir() and not any(path.iterdir()):
                path.rmdir()
