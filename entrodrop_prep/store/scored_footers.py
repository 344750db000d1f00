"""What the manifest of a scored directory says, against what the footers of its shards say: no row is read."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from entrodrop_prep.store import digest, manifest
from entrodrop_prep.store.layout import REJECTED
from entrodrop_prep.store.shards import Footer

_IN_FILES = ("tokens", "trainable_tokens")
_TOLD = ("rows_read", "rows_without_loss", "short_rows", "truncated_rows", "dropped_long_rows", "bad_rows")
_COUNTED = ("rows", "windows", *_IN_FILES)
"""Counts in each shard's footer: that no row shows, and the others."""


def disagreements(path: Path, described: dict[str, Any], footers: Sequence[Footer], notes: list[str]) -> Iterator[str]:
    """What does not agree, a line each; of what the footers of an earlier version do not say is a line in ``notes``.

    Args:
        path: the directory.
        described: its manifest.
        footers: those of all its shards, in order.
        notes: is added to.
    """
    content = {"identity": described["identity"], "shards": [footer.content_digest for footer in footers]}
    if digest.of_json(content) != described["content_digest"]:
        yield f"{path}: the content digest is not that of the shards"
    yield from _sums(path, described, footers)
    yield from wrong_facts(path, described, footers, notes)


def wrong_facts(path: Path, described: dict[str, Any], footers: Sequence[Footer], notes: list[str]) -> Iterator[str]:
    """As ``disagreements``, of what every shard says: ``footers`` are those of the first ones."""
    files = [e for e in described["files"] if "rows" in e]
    for index, info in enumerate(footer.info for footer in footers):
        file = path / files[index]["file"]
        if info.get("shard", index) != index:
            yield f"{file}: by its footer it is shard {info['shard']}"
        if info.get("identity", described["identity"]) != described["identity"]:
            yield f"{path}: the identity is not that of shard {index}"
        if info.get("fingerprint", wanted := digest.of_json(described["identity"])) != wanted:
            yield f"{file}: the fingerprint in its footer is not that of the identity"
    yield from _described(path, described, footers, notes)


def _sums(path: Path, described: dict[str, Any], footers: Sequence[Footer]) -> Iterator[str]:
    """Counts and lists, each of all shards together, as far as the footers have them."""
    infos = [footer.info for footer in footers]
    files = [e for e in described["files"] if "rows" in e]
    if not all({"counts", "source", "environment"} <= info.keys() for info in infos):
        return
    for entry, info in zip(files, infos, strict=True):
        wrong = [n for n in _IN_FILES if info["counts"].get(n) != entry[n]]
        if wrong:
            yield f"{path / entry['file']}: the manifest's {' and '.join(wrong)} are not those of its footer"
    yield from wrong_counts(
        path, described, {n: sum(info["counts"].get(n, 0) for info in infos) for n in (*_TOLD, *_COUNTED)}
    )
    if described["source"]["digest"] != digest.of_json([info["source"]["digest"] for info in infos]):
        yield f"{path}: the source's digest is not that of the shards"
    notes: Counter[str] = Counter()
    for info in infos:
        notes.update(info.get("notes", {}))
    if described.get("notes", {}) != notes:
        yield f"{path}: the notes are not those of the shards"
    recorded = [(i, entry["environment"]) for entry in described.get("environments", []) for i in entry["shards"]]
    if sorted(recorded, key=lambda one: one[0]) != list(enumerate(info["environment"] for info in infos)):
        yield f"{path}: the environments are not those of the shards"
    lines = [
        json.dumps(e, sort_keys=True, ensure_ascii=False) + "\n" for info in infos for e in info.get("rejected", [])
    ]
    listed = {e["file"]: e["sha256"] for e in described["files"]}.get(REJECTED)
    if listed != (hashlib.sha256("".join(lines).encode("utf-8", "backslashreplace")).hexdigest() if lines else None):
        yield f"{path / REJECTED}: its rows are not those that the shards say were left out"


def _described(path: Path, described: dict[str, Any], footers: Sequence[Footer], notes: list[str]) -> Iterator[str]:
    """Names, licences and special tokens, against the first footer that has them."""
    identity = described["identity"]
    for what, one, other in (
        ("model's vocabulary", described["model"]["vocab_size"], identity.get("vocab_size")),
        ("tokenizer's digest", described["tokenizer"]["digest"], identity.get("tokenizer")),
    ):
        if other is not None and one != other:
            yield f"{path}: the {what} is not that of the identity"
    recorded = next((f.info["described"] for f in footers if "described" in f.info), None)
    if recorded is None:
        made = [e["environment"].get("entrodrop_prep") for e in described.get("environments", [])]
        versions = {f"entrodrop-prep {version}" for version in made if version}
        lacking = {"name", "vocabulary", "chat_template"} - described["tokenizer"].keys()
        if lacking and any("fingerprint" in f.info for f in footers):
            yield f"{path}: the manifest does not say the tokenizer's {' and '.join(sorted(lacking))}"
        if versions and described["generator"] not in versions:
            yield f"{path}: no shard was made by its generator, {described['generator']}"
        notes.append("not checked: names of source and model, which shards of this version do not say")
        return
    source = {k: v for k, v in described["source"].items() if k != "digest"}
    tokenizer = {k: v for k, v in described["tokenizer"].items() if k != "stored"}
    now = {"generator": described["generator"], "source": source, "model": described["model"], "tokenizer": tokenizer}
    if now != recorded:
        lines = manifest.differences(recorded, now) or ["it leaves something out"]
        yield f"{path}: the manifest is not what the shards say: {'; '.join(lines)}"


def wrong_counts(path: Path, described: dict[str, Any], found: dict[str, int]) -> Iterator[str]:
    """Counts of the manifest that are not those ``found``."""
    for name, value in found.items():
        recorded = described["counts"].get(name)
        if recorded != value:
            yield f"{path}: the manifest counts {recorded} {name}, the shards hold {value}"
