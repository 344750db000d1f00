"""The end of a run: what the finished shards' footers say becomes the manifest and the card."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from entrodrop_prep import __version__
from entrodrop_prep.export import derived
from entrodrop_prep.export.card import PICTURE, write_card
from entrodrop_prep.export.epoch import Part, add_counts
from entrodrop_prep.export.identity import recipe_values
from entrodrop_prep.export.job import Job
from entrodrop_prep.export.provenance import source_summary, summary_of
from entrodrop_prep.masking.histogram import histogram_summary
from entrodrop_prep.store import digest, manifest
from entrodrop_prep.store.disk import flush_folder, writing
from entrodrop_prep.store.layout import VALIDATION
from entrodrop_prep.store.ownership import Owned
from entrodrop_prep.store.schema import MASKED
from entrodrop_prep.store.shards import Footer, read_footer

log = logging.getLogger(__name__)

Written = tuple[Footer, dict[str, Any]]
"""A file's footer, and what ``manifest.file_entry`` says of it."""


def finish(
    out: Path,
    job: Job,
    parts: list[Part],
    identity: dict[str, Any],
    layouts: list[str],
    used: list[dict[str, str]],
    made: Mapping[str, Written],
) -> dict[str, Any]:
    """Gather the shards' footers into the manifest, derive the ``layouts``, and write the card.

    ``made`` are the files of this run by name, so that they are not read again.
    """
    with writing(out):
        for part in parts:
            flush_folder(out / part.folder)
    files: list[dict[str, Any]] = []
    gathered = {part: _gathered(out, part, files, job, made) for part in parts}
    table = [figures for part, figures in gathered.items() if part.epoch is not None]
    others = {part.folder: figures for part, figures in gathered.items() if part.epoch is None}
    absent = [
        s.name for s in job.sources.all if job.sources.named and not any(s.name in e.get("sources", {}) for e in table)
    ]
    if absent:
        log.warning(
            "no epoch has a row of %s: its weight is too small, or its rows have nothing to train on", ", ".join(absent)
        )
    if job.validation_rows:
        others[VALIDATION]["rows_without_loss"] = job.validation_rows.rows_without_loss
    if job.eval:
        summary = summary_of(job.eval)
        others[VALIDATION] |= {"scored": summary.pop("content_digest"), **summary}
    described = {
        "schema": MASKED,
        "generator": f"entrodrop-prep {__version__}",
        "identity": identity,
        "recipe": recipe_values(job.config) | {"epochs": max(e["epoch"] for e in table) + 1},
        "scored": [source_summary(s, named=True) for s in job.sources.all]
        if job.sources.named
        else source_summary(job.sources.all[0], named=False),
        "tau_nats": job.rows.threshold_summary,
        "entropy_histogram": histogram_summary(job.rows.columns.facts["spread"]),
        "environments": used,
        "rows_without_loss": job.rows.rows_without_loss,
        "epochs": table,
        **others,
        "content_digest": digest.of_json([f["content_digest"] for f in files]),
        "files": files,
    }
    if layouts:
        described["derived"] = derived.make(out, described, layouts)
    return publish(out, described)


def publish(out: Path, described: dict[str, Any]) -> dict[str, Any]:
    """Write the card, its picture, and then the manifest, which lists the picture; returns it as written."""
    write_card(out, described)
    files = [e for e in described["files"] if e["file"] != PICTURE]
    if "entropy_histogram" in described:  # what it is drawn from, which earlier versions did not count
        files.append(manifest.file_entry(out, out / PICTURE))
    Owned(out, derived.CONTENTS).settle({**described, "files": files})
    return manifest.write(out, {**described, "files": files})


def _gathered(
    out: Path, part: Part, files: list[dict[str, Any]], job: Job, made: Mapping[str, Written]
) -> dict[str, Any]:
    """A part's figures, from the footers of its files, which are added to ``files``."""
    sums: dict[str, int] = {}
    rates, rows = [1.0, 0.0], 0
    sources: dict[str, dict[str, int]] = {}
    for shard in range(part.layout.shards):
        name = part.name(shard)
        footer, entry = made[name] if name in made else (read_footer(out / name), manifest.file_entry(out, out / name))
        counts = footer.info["counts"]
        rows += footer.rows
        add_counts(sums, counts)
        rates = [min(rates[0], footer.info["rates"][0]), max(rates[1], footer.info["rates"][1])]
        for name, figures in footer.info.get("sources", {}).items():
            add_counts(sources.setdefault(name, {}), figures)
        more = {"rows": footer.rows, "tokens": counts["tokens"], **part.label, "content_digest": footer.content_digest}
        files.append(entry | more)
    by_source = {"sources": sources} if sources else {}
    beside = job.beside(part, rows, sums["tokens"])
    if part.epoch is None:
        some = {n: v for n, v in sums.items() if n in ("documents", "tokens", "labels_left")}
        return {"rows": rows, **some, **beside, **by_source}
    trainable = max(1, sums["trainable"])
    return {
        "epoch": part.epoch,
        "folder": part.folder,
        "rows": rows,
        **beside,
        **sums,
        "rate_min": rates[0],
        "rate_max": rates[1],
        "eligible_share": sums["eligible"] / trainable,
        "dropped_share": sums["dropped"] / trainable,
        **by_source,
    }
