"""Proving that a masked directory is what its manifest says, without the scores: rows, figures, footers, provenance."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa

from entrodrop_prep.export import derived
from entrodrop_prep.export.columns import check_rows
from entrodrop_prep.export.epoch import COUNTS, add_counts, misplaced
from entrodrop_prep.export.identity import config_of, identity_of, recipe_values
from entrodrop_prep.export.provenance import stamped
from entrodrop_prep.masking.sources import AGAINST, SOURCE, compared_with
from entrodrop_prep.store import digest, manifest
from entrodrop_prep.store.layout import OTHER_FILES, VALIDATION
from entrodrop_prep.store.parallel import in_order
from entrodrop_prep.store.schema import MASKED, masked_schema
from entrodrop_prep.store.shards import read_footer
from entrodrop_prep.verification.scored import shard_findings

_FOOTER = {"fingerprint", "identity", "counts", "rates"}
_NOT_SUMMED = ("rows", "documents", "tokens", "labels_left")


def masked_findings(path: Path, notes: list[str]) -> Iterator[str]:
    """What does not hold of a masked directory; lines of what was looked at, and what was not, go to ``notes``."""
    described = manifest.read(path, MASKED)
    broken = [str(e) for e in manifest.changed_files(path, described)]
    yield from broken
    if broken:
        return
    files = [e for e in described["files"] if "rows" in e]
    for findings in in_order(lambda entry: list(_rows(path, described, entry)), files):
        yield from findings
    yield from footer_findings(path, described, notes)
    yield from derived.findings(path, described, masked_schema(described["identity"].get("add_columns", ())))
    tokens = sum(e["tokens"] for e in files if "epoch" in e)
    notes.append(f"masked dataset: {len(described['epochs'])} epochs, {tokens:,} tokens")


def footer_findings(path: Path, described: dict[str, Any], notes: list[str]) -> Iterator[str]:
    """What the manifest says, against the footers of its files and against itself: no row is read.

    Args:
        path: the directory.
        described: its manifest.
        notes: what files of an earlier version do not say is added to it.
    """
    files = [e for e in described["files"] if "rows" in e]
    infos = [read_footer(path / e["file"]).info for e in files]
    for entry, info in zip(files, infos, strict=True):
        yield from _footer(path / entry["file"], described, entry, info)
    if all(map(_is_complete, infos)):
        yield from _figures(path, described, files, infos)
    if digest.of_json([e["content_digest"] for e in files]) != described["content_digest"]:
        yield f"{path}: the content digest is not that of the files"
    yield from _recipe(path, described)
    yield from _environments(path, described, infos)
    yield from _provenance(path, described, infos, notes)


def _is_complete(info: dict[str, Any]) -> bool:
    return info.keys() >= _FOOTER and info["counts"].keys() >= set(COUNTS)


def _rows(path: Path, described: dict[str, Any], entry: dict[str, Any]) -> Iterator[str]:
    """All rows of a file, against its entry and its footer."""
    identity, schema = described["identity"], masked_schema(described["identity"].get("add_columns", ()))
    scored = described["scored"][0] if isinstance(described["scored"], list) else described["scored"]
    file, part = path / entry["file"], Path(entry["file"]).parent.name
    target = "labels" if part in OTHER_FILES else described["recipe"]["target"]
    limit = None if part == VALIDATION else identity.get("pack")
    problem, tokens, labels = "", 0, 0

    def look(batch: pa.RecordBatch) -> str:
        nonlocal problem, tokens, labels
        problem, kept = check_rows(batch, scored["model"]["vocab_size"], target, limit)
        labels += kept
        tokens += 0 if problem else len(batch.column("input_ids").flatten())
        return problem

    yield from shard_findings(file, entry, schema, look)
    info = read_footer(file).info
    counts = [info["counts"][n] for n in ("tokens", "labels_left")] if _is_complete(info) else [tokens, labels]
    if not problem and [tokens, labels] != counts:
        yield f"{file}: the tokens and labels in its footer are not those of its rows"


def _footer(file: Path, described: dict[str, Any], entry: dict[str, Any], info: dict[str, Any]) -> Iterator[str]:
    """A file's entry against its footer."""
    identity, wrong = described["identity"], misplaced(entry["file"], info)
    if wrong:
        yield f"{file}: {wrong}"
    if not _is_complete(info):
        yield f"{file}: its footer is not complete"
        return
    if info["identity"] != identity or info["fingerprint"] != digest.of_json(identity):
        yield f"{file}: it was made with other settings than the manifest says"
    if [entry.get(n) for n in ("epoch", "part")] != [info.get(n) for n in ("epoch", "part")]:
        yield f"{file}: the manifest's epoch of it is not that of its footer"
    if entry["tokens"] != info["counts"]["tokens"]:
        yield f"{file}: the manifest's tokens of it are not those of its footer"


def _figures(
    path: Path, described: dict[str, Any], files: list[dict[str, Any]], infos: list[dict[str, Any]]
) -> Iterator[str]:
    """The figures of each part against those of the footers of its files."""
    identity = described["identity"]
    for part, figures in figures_of(described).items():
        own = [(e, i) for e, i in zip(files, infos, strict=True) if e["file"].startswith(f"{part}/")]
        sums: dict[str, int] = {}
        sources: dict[str, dict[str, int]] = {}
        for entry, info in own:
            add_counts(sums, {"rows": entry["rows"], **info["counts"]})
            for name, counts in info.get("sources", {}).items():
                add_counts(sources.setdefault(name, {}), counts)
        found: dict[str, Any] = sums if "epoch" in figures else {n: sums[n] for n in _NOT_SUMMED if n in sums}
        if "epoch" in figures:
            trainable, rates = max(1, sums["trainable"]), [i["rates"] for _, i in own]
            found |= {"rate_min": min(r[0] for r in rates), "rate_max": max(r[1] for r in rates)}
            found |= {"eligible_share": sums["eligible"] / trainable, "dropped_share": sums["dropped"] / trainable}
        if sources or "sources" in figures:
            found["sources"] = sources
        if identity.get("pack") and part != VALIDATION:
            found["utilisation"] = sums["tokens"] / max(1, sums["rows"] * identity["pack"])
        wrong = [name for name, value in found.items() if figures.get(name) != value]
        cut = identity.get("rows_multiple") if "epoch" in figures else None
        if ("rows_left_out" in figures) != bool(cut) or (cut and not figures["rows_left_out"] < cut):
            wrong.append("rows_left_out")
        packed = bool(identity.get("pack")) and part != VALIDATION
        wrong += [n for n in ("rows_cut", "pieces_left_out", "utilisation") if (n in figures) != packed]
        if wrong:
            yield f"{path}: the manifest's figures of {title(part)} are not those of its files ({', '.join(wrong)})"


def _recipe(path: Path, described: dict[str, Any]) -> Iterator[str]:
    """The recipe gives the identity, and the thresholds that it states."""
    identity, recipe = described["identity"], described["recipe"]
    names = list(identity.get("sources", {SOURCE: None}))
    config = config_of(described, {name: name for name in names}, compared_with(identity), out=str(path))
    content = {n: identity[n] for n in ("scored", "source", "sources", AGAINST, VALIDATION) if n in identity}
    for line in manifest.differences(identity, identity_of(content, config)):
        yield f"{path}: its recipe does not give its identity: {line}"
    if recipe != recipe_values(config) or recipe["horizon"] != identity["horizon"]:
        yield f"{path}: its recipe is not one that is written"
    if recipe["epochs"] != max(e["epoch"] for e in described["epochs"]) + 1:
        yield f"{path}: its recipe is of {recipe['epochs']} epochs, which are not those that are there"
    if recipe["threshold"] is not None and described["tau_nats"] != recipe["threshold"]:
        yield f"{path}: its threshold (tau_nats) is not that of its recipe"
    pictured = any(e["file"] == "entropy.svg" for e in described["files"])
    if pictured != ("entropy_histogram" in described):
        yield f"{path}: of the card's picture and the entropies that it is drawn from, one is not there"


def _environments(path: Path, described: dict[str, Any], infos: list[dict[str, Any]]) -> Iterator[str]:
    """The versions that the files were written with, as the footers say."""
    recorded = described.get("environments", [])
    found = [info["environment"] for info in infos if "environment" in info]
    if any(e not in recorded for e in found) or any(e in recorded[:i] for i, e in enumerate(recorded)):
        yield f"{path}: the environments are not those of its files"
    versions = {f"entrodrop-prep {e.get('entrodrop_prep')}" for e in recorded}
    if recorded and described["generator"] not in versions:
        yield f"{path}: its generator, {described['generator']}, is none of the versions that wrote it"


def _provenance(path: Path, described: dict[str, Any], infos: list[dict[str, Any]], notes: list[str]) -> Iterator[str]:
    """What the manifest says of the scores, against the identity and what the footers say of them."""
    identity = described["identity"]
    recorded = sources_of(described)
    if isinstance(described["scored"], list) and len(recorded) != len(described["scored"]):
        yield f"{path}: it names a source twice"
    weights = {n: [s["content_digest"], s.get("weight"), s.get("plain")] for n, s in recorded.items()}
    wanted = {n: [s["scored"], s["weight"], s.get("plain", False)] for n, s in identity.get("sources", {}).items()}
    if {n: s[AGAINST]["content_digest"] for n, s in recorded.items() if AGAINST in s} != compared_with(identity):
        yield f"{path}: the scores it says it was compared with are not those of its identity"
    if weights != (wanted or {SOURCE: [identity.get("scored"), None, None]}):
        yield f"{path}: the scores it says it was made from are not those of its identity"
    role = ("name", "weight", "plain")
    origins = {n: {k: v for k, v in s.items() if k not in role} for n, s in recorded.items()}
    if VALIDATION in described and VALIDATION in identity:
        validation = {k: v for k, v in described[VALIDATION].items() if k in _PROVENANCE}
        origins[VALIDATION] = {**validation, "content_digest": described[VALIDATION]["scored"]}
        if described[VALIDATION]["scored"] != identity.get(VALIDATION):
            yield f"{path}: its validation rows are not from the scores of its identity"
    if (VALIDATION in described) != (VALIDATION in identity or "eval_fraction" in identity):
        yield f"{path}: the manifest's figures of validation are not what its identity asks for"
    if ("plain" in described) != identity.get("plain_config", False):
        yield f"{path}: the manifest's figures of plain are not what its identity asks for"
    stamps = {name: [s for i in infos for s in i.get("provenance", []) if s.get("name") == name] for name in origins}
    for name, one in origins.items():
        if one["model_identity"] != one["identity"]["model"]:
            yield f"{path}: the model_identity of {name} is not the one it was scored with"
        whole = stamped(name, one)
        partly = {k: v for k, v in whole.items() if k != "described"}
        if stamps[name] and not any(s == (whole if "described" in s else partly) for s in stamps[name]):
            yield f"{path}: what the manifest says of the scores of {name} is not what the files say"
        if not any("described" in s for s in stamps[name]):
            notes.append(f"not checked: names and special tokens of the scores of {name}, which its files do not say")


_PROVENANCE = ("generator", "identity", "model", "model_identity", "source", "tokenizer", "environments")


def figures_of(described: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Folder -> what a manifest says of its rows."""
    return {e["folder"]: e for e in described["epochs"]} | {n: described[n] for n in OTHER_FILES if n in described}


def sources_of(described: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Name -> what a manifest says of each scored directory that the rows are from."""
    scored = described["scored"]
    return {s["name"]: s for s in scored} if isinstance(scored, list) else {SOURCE: scored}


def title(part: str) -> str:
    """``epoch 3`` for the folder ``epoch_003``."""
    number = part.removeprefix("epoch_")
    return f"epoch {int(number)}" if number.isdecimal() else part
