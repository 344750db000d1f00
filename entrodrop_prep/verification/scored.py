"""Proving that a scored directory is what its manifest says: rows, counts, and what the shards' footers say."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from entrodrop_prep.errors import ModelError
from entrodrop_prep.store import digest, manifest
from entrodrop_prep.store.digest import ContentDigest
from entrodrop_prep.store.layout import REJECTED, TOKENIZER, UNIGRAM
from entrodrop_prep.store.parallel import in_order
from entrodrop_prep.store.rows import stored_scores, to_rows
from entrodrop_prep.store.schema import SCORED
from entrodrop_prep.store.scored import ScoredDataset, rows_per_batch
from entrodrop_prep.store.shards import Footer, check_file_schema, read_batches, read_footer

_IN_FILES = ("tokens", "trainable_tokens")
_COUNTED = ("rows", "windows", "tokens", "trainable_tokens")
_TOLD = ("rows_read", "rows_without_loss", "short_rows", "truncated_rows", "dropped_long_rows", "bad_rows")
"""Counts that no row shows, but each shard's footer has."""


def scored_findings(path: Path, notes: list[str]) -> Iterator[str]:
    """What does not hold of a scored directory; a line of what was looked at is added to ``notes``."""
    described = manifest.read(path, SCORED)
    broken = [str(e) for e in manifest.changed_files(path, described)]
    yield from broken
    if broken:
        return
    scored = ScoredDataset(path)
    stored = scored.unigram
    unigram = np.zeros(scored.vocab_size, np.int64)
    size = described["identity"]["rows_per_shard"]
    totals = dict.fromkeys(_COUNTED, 0)
    shards = [_Shard(scored, path / e["file"], e, i * size, (i + 1) * size) for i, e in enumerate(scored.files)]
    for shard, findings in zip(shards, in_order(_Shard.findings, shards), strict=True):
        yield from findings
        if shard.problem:
            return
        unigram += shard.unigram
        for name in _COUNTED:
            totals[name] += shard.counts[name]
    if not np.array_equal(unigram, stored):
        yield f"{path / UNIGRAM}: it does not count the shards' tokens"
    yield from _wrong_counts(path, described, totals)
    content = {"identity": described["identity"], "shards": [e["content_digest"] for e in scored.files]}
    if digest.of_json(content) != described["content_digest"]:
        yield f"{path}: the content digest is not that of the shards"
    footers = [read_footer(path / e["file"]) for e in scored.files]
    yield from _footers(path, described, scored.files, footers)
    yield from _described(path, described, footers, notes)
    yield from tokenizer_findings(scored, notes, known=any("described" in f.info for f in footers))
    notes.append(f"scored dataset: {len(scored.files)} shards, {totals['tokens']:,} tokens")


class _Shard:
    """What is found in the rows of one shard, which are those from ``first`` to ``stop - 1`` of the source."""

    def __init__(self, scored: ScoredDataset, file: Path, entry: dict[str, Any], first: int, stop: int) -> None:
        self._scored, self._file, self._entry, self._range = scored, file, entry, (first, stop)
        self._last = (-1, -1)
        self.problem = ""

    def findings(self) -> list[str]:
        """What does not hold; where its rows hold, ``counts`` and ``unigram`` are filled."""
        self.counts, self.unigram = dict.fromkeys(_COUNTED, 0), np.zeros(self._scored.vocab_size, np.int64)
        found = list(shard_findings(self._file, self._entry, self._scored.schema, self._look))
        for name in ("tokens", "trainable_tokens") if not self.problem else ():
            if self._entry.get(name) != self.counts[name]:
                says = f"the manifest says {self._entry.get(name)}"
                found.append(f"{self._file}: it holds {self.counts[name]} {name}, {says}")
        return found

    def _look(self, batch: pa.RecordBatch) -> str:
        self.problem, self._last = _batch(batch, self._scored, *self._range, self._last)
        if not self.problem:
            rows = to_rows(batch)
            new = ~np.isnan(rows.entropy)
            new[rows.offsets[:-1][rows.window == 0]] = True
            self.unigram += np.bincount(rows.input_ids[new], minlength=len(self.unigram))
            found = (int((rows.window == 0).sum()), len(rows.row_id), len(rows.input_ids), int(rows.loss_mask.sum()))
            for name, value in zip(_COUNTED, found, strict=True):
                self.counts[name] += value
        return self.problem


def _footers(
    path: Path, described: dict[str, Any], files: list[dict[str, Any]], footers: list[Footer]
) -> Iterator[str]:
    """What the manifest says and no row shows, against the footers, as far as these have it."""
    infos = [footer.info for footer in footers]
    for index, info in enumerate(infos):
        file = path / files[index]["file"]
        if info.get("shard", index) != index:
            yield f"{file}: by its footer it is shard {info['shard']}"
        if info.get("identity", described["identity"]) != described["identity"]:
            yield f"{path}: the identity is not that of shard {index}"
        if info.get("fingerprint", wanted := digest.of_json(described["identity"])) != wanted:
            yield f"{file}: the fingerprint in its footer is not that of the identity"
    if not all({"counts", "source", "environment"} <= info.keys() for info in infos):
        return
    for entry, info in zip(files, infos, strict=True):
        wrong = [n for n in _IN_FILES if info["counts"].get(n) != entry[n]]
        if wrong:
            yield f"{path / entry['file']}: the manifest's {' and '.join(wrong)} are not those of its footer"
    yield from _wrong_counts(path, described, {n: sum(info["counts"].get(n, 0) for info in infos) for n in _TOLD})
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
    lines = [json.dumps(e, sort_keys=True, ensure_ascii=False) + "\n" for info in infos for e in info["rejected"]]
    listed = {e["file"]: e["sha256"] for e in described["files"]}.get(REJECTED)
    if listed != (hashlib.sha256("".join(lines).encode("utf-8", "backslashreplace")).hexdigest() if lines else None):
        yield f"{path / REJECTED}: its rows are not those that the shards say were left out"


def _described(path: Path, described: dict[str, Any], footers: list[Footer], notes: list[str]) -> Iterator[str]:
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


def tokenizer_findings(scored: ScoredDataset, notes: list[str], *, known: bool) -> Iterator[str]:
    """What the manifest says of the tokenizer, against the one that is stored; ``known``: by this version or later."""
    from entrodrop_prep.scoring.tokenizer import special_ids, template_digest, tokenizer_digest, vocabulary_digest

    recorded, path = scored.manifest["tokenizer"], scored.directory / TOKENIZER
    if not any(e["file"].startswith(f"{TOKENIZER}/") for e in scored.manifest["files"]):
        yield f"{path}: the manifest lists no tokenizer"
        return
    code = "stored" in recorded and recorded["stored"] is None
    try:
        found = scored.tokenizer()
    except ModelError as e:
        if known and not code:
            yield str(e)
        else:
            notes.append(f"the tokenizer was not checked: {e.what}")
        return
    if code:
        yield f"{path}: the manifest says that it cannot be loaded, and it can"
    values = {"eos_id": found.eos_token_id, "pad_id": found.pad_token_id}
    if "vocabulary" in recorded:
        values |= {"vocabulary": vocabulary_digest(found), "chat_template": template_digest(found)}
    for name, value in values.items():
        if recorded.get(name, value) != value or name not in recorded:
            yield f"{path}: its {name} is {value}, the manifest says {recorded.get(name)}"
    missing = set(special_ids(found)) - set(recorded["special_ids"])
    if missing:
        yield f"{path}: the manifest leaves out its special tokens {sorted(missing)[:5]}"
    if "vocabulary" in recorded and not code and tokenizer_digest(found) != recorded.get("stored", recorded["digest"]):
        if known and _same_versions(scored.manifest):
            yield f"{path}: it is not the tokenizer that the manifest was written for"
        else:
            notes.append("the tokenizer's digest was not checked: it was saved by other versions of its libraries")


def _same_versions(described: dict[str, Any]) -> bool:
    """Whether the libraries here, on which a tokenizer's digest depends, are those that the shards were made with."""
    from importlib.metadata import version

    recorded = [e["environment"] for e in described.get("environments", [])]
    return all(e.get(name) == version(name) for e in recorded for name in ("tokenizers", "transformers"))


def _wrong_counts(path: Path, described: dict[str, Any], found: dict[str, int]) -> Iterator[str]:
    for name, value in found.items():
        recorded = described["counts"].get(name)
        if recorded != value:
            yield f"{path}: the manifest counts {recorded} {name}, the shards hold {value}"


def shard_findings(
    file: Path, entry: dict[str, Any], schema: pa.Schema, look: Callable[[pa.RecordBatch], str]
) -> Iterator[str]:
    """Schema, footer and content digest of one file, and the first thing that ``look`` finds wrong with its rows."""
    check_file_schema(file, schema)
    footer = read_footer(file)
    content, problem = ContentDigest(schema), ""
    for batch in read_batches(file, rows=rows_per_batch([entry])):
        content.update(batch)
        problem = problem or look(batch)
    if not footer.content_digest == content.hexdigest() == entry["content_digest"]:
        yield f"{file}: its rows are not those that were written"
    if footer.rows != entry["rows"]:
        yield f"{file}: it has {footer.rows} rows, the manifest says {entry['rows']}"
    if problem:
        yield f"{file}: {problem}"


def _batch(
    batch: pa.RecordBatch, scored: ScoredDataset, first: int, stop: int, last: tuple[int, int]
) -> tuple[str, tuple[int, int]]:
    """What is wrong with some rows, and the (row_id, window) of the last of them."""
    lengths = [pc.list_value_length(batch.column(n)) for n in ("input_ids", *scored.score_columns, "loss_mask")]
    if any(not x.equals(lengths[0]) for x in lengths):
        return "its columns are of different lengths in one row", last
    rows = to_rows(batch)
    if not len(rows.row_id):
        return "", last
    key = list(zip(rows.row_id.tolist(), rows.window.tolist(), strict=True))
    if rows.row_id.min() < first or rows.row_id.max() >= stop:
        return f"it holds a row outside {first} to {stop - 1}", key[-1]
    if any(a >= b for a, b in zip([last, *key], key, strict=False)):
        return "its rows are not in order", key[-1]
    starts = rows.offsets[:-1]
    if (rows.input_ids < 0).any() or (rows.input_ids >= scored.vocab_size).any():
        return "it holds a token outside the vocabulary", key[-1]
    if rows.loss_mask[starts].any():
        return "a first token has a loss", key[-1]
    for name in scored.score_columns:
        scores, sign = stored_scores(batch, name), -1 if name == "logprob" else 1
        null = pc.is_null(batch.column(name).flatten()).to_numpy(zero_copy_only=False)
        if np.isnan(scores[~null]).any() or np.isinf(scores[~null]).any() or (sign * scores[~null] < -1e-3).any():
            return f"its {name} holds a value that is none", key[-1]
        begins = np.zeros(len(null), bool)
        begins[starts] = True
        late = null & ~begins & ~np.concatenate([[False], null[:-1]])
        context = null & np.repeat(rows.window == 0, rows.lengths) & ~begins
        if not null[starts].all() or late.any() or context.any() or (null & rows.loss_mask).any():
            return f"its {name} is null where it may not be, or not null where it must", key[-1]
    return "", key[-1]
