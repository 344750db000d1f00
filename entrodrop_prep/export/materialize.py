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
    SCHEMA,
    SHARD_FILES,
    EpochReader,
    Layout,
    ShardCounts,
    check_content,
    folder,
)
from entrodrop_prep.export.order import Order, payload_bytes
from entrodrop_prep.export.plan import (
    Corpus,
    mask_plan,
    masked_identity,
    open_share,
    recipe_values,
    survey,
    warn_if_flat,
)
from entrodrop_prep.export.space import check_space
from entrodrop_prep.progress import Progress
from entrodrop_prep.sample.curriculum import horizon
from entrodrop_prep.sample.mask import MaskPlan
from entrodrop_prep.schema import MASKED
from entrodrop_prep.scored import ScoredDataset
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
    scored = ScoredDataset(local_directory(config.scored), config.bounds)
    if scored.estimator != "exact":
        log.info("taking %s for the entropy: bounds are experimental", scored.score)
    if out.resolve() == scored.directory.resolve() or scored.directory.resolve() in out.resolve().parents:
        raise OutputError(
            "the masked dataset cannot lie inside the scored one", where=str(out), fix="choose another --out"
        )
    manifest.check_usable(out, "masked")
    with locked(out):
        manifest.check_usable(out, "masked")
        with writing(out):
            remove_leftovers(out)
        identity = masked_identity(scored, config)
        finished, begun = (None, set()) if config.overwrite else _earlier(out, identity)
        wanted = set(config.epochs_to_write()) | begun
        config = replace(config, horizon=horizon(config), epochs=max(config.epochs, max(wanted) + 1))
        if finished and _holds(out, finished, wanted):
            if not (out / CARD).exists():
                write_card(out, finished)
            return MaterializeSummary(out, finished["epochs"], 0.0, 0, already_complete=True)
        scored.check()
        corpus = survey(scored, config)
        if not corpus.rows:
            raise SourceError(
                "no row has anything to train on", where=str(scored.directory), fix="check its loss masks"
            )
        warn_if_flat(config, corpus.rows)
        plan = mask_plan(scored, config, corpus)
        undecided = open_share(scored, plan)
        if undecided is not None:
            log.info("the bounds leave open whether %.1f%% of the trainable tokens may be dropped", 100 * undecided)
        layout = Layout.of(corpus, config.rows_per_shard)
        if config.overwrite:
            missing = {e: list(range(layout.shards)) for e in sorted(wanted)}
        else:
            missing = {e: _missing(out, layout, e, identity, finished) for e in sorted(wanted)}
        check_space(out, scored, corpus, layout, missing, config)
        if config.overwrite:
            _remove_earlier(out)
        manifest.write_state(out, {"schema": MASKED, "identity": identity})
        with writing(out):
            (out / manifest.NAME).unlink(missing_ok=True)
        seconds, tokens = _write(out, scored, plan, corpus, layout, missing, identity, config.compression)
        described = _finish(out, scored, plan, corpus, layout, sorted(wanted), identity, undecided)
        return MaterializeSummary(out, described["epochs"], seconds, tokens, already_complete=False)


def make_order(scored: ScoredDataset, plan: MaskPlan, corpus: Corpus, tmp: Path) -> Order:
    """The row order that a recipe asks for."""
    return Order(
        scored,
        shuffle=plan.recipe.shuffle,
        seed=plan.recipe.seed,
        source=plan.source,
        tmp=tmp,
        total_bytes=payload_bytes(scored, corpus.tokens),
    )


def _write(
    out: Path,
    scored: ScoredDataset,
    plan: MaskPlan,
    corpus: Corpus,
    layout: Layout,
    missing: dict[int, list[int]],
    identity: dict[str, Any],
    compression: str,
) -> tuple[float, int]:
    """Write the missing shards; returns seconds and tokens."""
    rows = sum(stop - first for shards in missing.values() for first, stop in map(layout.places, shards))
    order = make_order(scored, plan, corpus, out / ORDER_TMP)
    fingerprint, tokens = digest.of_json(identity), 0
    with Progress("materializing", rows, "rows") as progress:
        try:
            for epoch, shards in missing.items():
                reader = EpochReader(plan, order, layout, epoch, shards)
                for shard in shards:
                    counts = ShardCounts()
                    info: dict[str, Any] = {
                        "schema": MASKED,
                        "epoch": epoch,
                        "shard": shard,
                        "fingerprint": fingerprint,
                        **counts.info(),
                    }
                    write_shard(
                        out / layout.name(epoch, shard),
                        SCHEMA,
                        reader.shard(shard, counts),
                        info,
                        compression=compression,
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


def _missing(
    out: Path, layout: Layout, epoch: int, identity: dict[str, Any], finished: dict[str, Any] | None
) -> list[int]:
    """Shards of an epoch that are not there; those that are, are read and checked.

    Raises IntegrityError for a file in their place that is not ours, or no longer holds what was written.
    """
    fingerprint = digest.of_json(identity)
    listed = {entry["file"]: entry for entry in finished["files"]} if finished else {}
    missing = []
    for shard in range(layout.shards):
        path = out / layout.name(epoch, shard)
        if not path.exists():
            missing.append(shard)
        elif read_footer(path).info.get("fingerprint") != fingerprint:
            raise IntegrityError(
                "it was made with other settings than its directory", where=str(path), fix="remove it and run again"
            )
        elif layout.name(epoch, shard) in listed:
            manifest.check_file(out, listed[layout.name(epoch, shard)])
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
    out: Path,
    scored: ScoredDataset,
    plan: MaskPlan,
    corpus: Corpus,
    layout: Layout,
    epochs: list[int],
    identity: dict[str, Any],
    undecided: float | None,
) -> dict[str, Any]:
    """Gather the shards' footers into the manifest, and write the card."""
    files, table = [], []
    for epoch in epochs:
        sums, rates, rows = dict.fromkeys(COUNTS, 0), [1.0, 0.0], 0
        for shard in range(layout.shards):
            path = out / layout.name(epoch, shard)
            footer = read_footer(path)
            counts = footer.info["counts"]
            rows += footer.rows
            sums = {k: sums[k] + counts[k] for k in COUNTS}
            rates = [min(rates[0], footer.info["rates"][0]), max(rates[1], footer.info["rates"][1])]
            files.append(
                manifest.file_entry(
                    out,
                    path,
                    rows=footer.rows,
                    tokens=counts["tokens"],
                    epoch=epoch,
                    content_digest=footer.content_digest,
                )
            )
        trainable = max(1, sums["trainable"])
        table.append(
            {
                "epoch": epoch,
                "folder": folder(epoch),
                "rows": rows,
                **sums,
                "rate_min": rates[0],
                "rate_max": rates[1],
                "eligible_share": sums["eligible"] / trainable,
                "dropped_share": sums["dropped"] / trainable,
            }
        )
    described = {
        "schema": MASKED,
        "generator": f"entrodrop-prep {__version__}",
        "identity": identity,
        "recipe": recipe_values(plan.recipe) | {"epochs": max(epochs) + 1},
        "scored": {
            "content_digest": scored.content_digest,
            "model": scored.manifest["model"],
            "model_identity": scored.manifest["identity"]["model"],
            "source": scored.manifest["source"],
            "tokenizer": scored.manifest["tokenizer"],
        },
        "tau_nats": _json_float(corpus.tau),
        **({} if undecided is None else {"open_share": undecided}),
        "rows_without_loss": corpus.rows_without_loss,
        "epochs": table,
        "content_digest": digest.of_json([f["content_digest"] for f in files]),
        "files": files,
    }
    write_card(out, described)
    return manifest.write(out, described)


def _json_float(value: float | None) -> float | str | None:
    """Infinity has no JSON number; a threshold that selects none is told in words."""
    return value if value is None or abs(value) != float("inf") else "selects none"


def _remove_earlier(out: Path) -> None:
    """Remove what an earlier run wrote, but not README.md, which is the user's. The directory stays known as ours."""
    manifest.write_state(out, {"schema": MASKED})
    with writing(out):
        (out / manifest.NAME).unlink(missing_ok=True)
        for path in out.glob(SHARD_FILES):
            path.unlink()
        for path in sorted(out.glob("epoch_*")):
            if path.is_dir() and not any(path.iterdir()):
                path.rmdir()
