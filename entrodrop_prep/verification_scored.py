"""Proving that a scored directory is what its manifest says: rows, counts, and what the shards' footers tell."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from entrodrop_prep import digest, manifest
from entrodrop_prep.digest import ContentDigest
from entrodrop_prep.schema import SCORED, check_schema
from entrodrop_prep.scored import SHARD_FILES, ScoredDataset, stored_scores, to_rows
from entrodrop_prep.shards import Footer, read_batches, read_footer, reading

_COUNTED = ("rows", "windows", "tokens", "trainable_tokens")
_TOLD = ("rows_read", "rows_without_loss", "short_rows", "truncated_rows", "dropped_long_rows", "bad_rows")
"""Counts that no row shows, but each shard's footer tells."""


def scored_findings(path: Path, notes: list[str]) -> Iterator[str]:
    """What does not hold of a scored directory; a line of what was looked at is added to ``notes``."""
    described = manifest.read(path, SCORED)
    broken = [str(e) for e in manifest.changed_files(path, described, SHARD_FILES)]
    yield from broken
    if broken:
        return
    scored = ScoredDataset(path)
    unigram = np.zeros(scored.vocab_size, np.int64)
    size = described["identity"]["rows_per_shard"]
    totals = dict.fromkeys(_COUNTED, 0)
    for index, entry in enumerate(scored.files):
        file = path / entry["file"]
        yield from shard_findings(file, entry, scored.schema)
        counts, last = dict.fromkeys(_COUNTED, 0), (-1, -1)
        for batch in read_batches(file, rows=scored.rows_per_batch):
            problem, last = _batch(batch, scored, index * size, (index + 1) * size, last)
            if problem:
                yield f"{file}: {problem}"
                return
            rows = to_rows(batch, scored.score_columns[0])
            new = ~np.isnan(rows.entropy)
            new[rows.offsets[:-1][rows.window == 0]] = True
            unigram += np.bincount(rows.input_ids[new], minlength=len(unigram))
            found = (int((rows.window == 0).sum()), len(rows.row_id), len(rows.input_ids), int(rows.loss_mask.sum()))
            for name, value in zip(_COUNTED, found, strict=True):
                counts[name] += value
        for name in ("tokens", "trainable_tokens"):
            if entry.get(name) != counts[name]:
                yield f"{file}: it holds {counts[name]} {name}, the manifest says {entry.get(name)}"
        for name in _COUNTED:
            totals[name] += counts[name]
    if not np.array_equal(unigram, scored.unigram):
        yield f"{path / 'unigram.npy'}: it does not count the shards' tokens"
    yield from _wrong_counts(path, described, totals)
    content = {"identity": described["identity"], "shards": [e["content_digest"] for e in scored.files]}
    if digest.of_json(content) != described["content_digest"]:
        yield f"{path}: the content digest is not that of the shards"
    yield from _footers(path, described, [read_footer(path / e["file"]) for e in scored.files])
    notes.append(f"scored dataset: {len(scored.files)} shards, {totals['tokens']:,} tokens")


def _footers(path: Path, described: dict[str, Any], footers: list[Footer]) -> Iterator[str]:
    """What the manifest says and no row shows, against the footers, as far as these tell of it."""
    infos = [footer.info for footer in footers]
    for index, info in enumerate(infos):
        if info.get("shard", index) != index:
            yield f"{path}: in the place of shard {index} stands shard {info['shard']}"
        if info.get("identity", described["identity"]) != described["identity"]:
            yield f"{path}: the identity is not that of shard {index}"
    if not all({"counts", "source", "environment"} <= info.keys() for info in infos):
        return
    yield from _wrong_counts(path, described, {n: sum(info["counts"][n] for info in infos) for n in _TOLD})
    if described["source"]["digest"] != digest.of_json([info["source"]["digest"] for info in infos]):
        yield f"{path}: the source's digest is not that of the shards"
    notes: Counter[str] = Counter()
    for info in infos:
        notes.update(info.get("notes", {}))
    if described.get("notes", {}) != notes:
        yield f"{path}: the notes are not those of the shards"
    told = {i: entry["environment"] for entry in described["environments"] for i in entry["shards"]}
    if told != dict(enumerate(info["environment"] for info in infos)):
        yield f"{path}: the environments are not those of the shards"


def _wrong_counts(path: Path, described: dict[str, Any], found: dict[str, int]) -> Iterator[str]:
    for name, value in found.items():
        told = described["counts"].get(name)
        if told != value:
            yield f"{path}: the manifest counts {told} {name}, the shards hold {value}"


def shard_findings(file: Path, entry: dict[str, Any], schema: pa.Schema) -> Iterator[str]:
    """Schema, footer and content digest of one file."""
    with reading(file):
        check_schema(pq.read_schema(file), schema, str(file))
    footer = read_footer(file)
    content = ContentDigest(schema)
    for batch in read_batches(file):
        content.update(batch)
    if not footer.content_digest == content.hexdigest() == entry["content_digest"]:
        yield f"{file}: its rows are not those that were written"
    if footer.rows != entry["rows"]:
        yield f"{file}: it has {footer.rows} rows, the manifest says {entry['rows']}"


def _batch(
    batch: pa.RecordBatch, scored: ScoredDataset, first: int, stop: int, last: tuple[int, int]
) -> tuple[str, tuple[int, int]]:
    """What is wrong with some rows, and the (row_id, window) of the last of them."""
    lengths = [pc.list_value_length(batch.column(n)) for n in ("input_ids", *scored.score_columns, "loss_mask")]
    if any(not x.equals(lengths[0]) for x in lengths):
        return "its columns are of different lengths in one row", last
    rows = to_rows(batch, scored.score_columns[0])
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
    if scored.estimator == "topk":
        lo, hi = (stored_scores(batch, name) for name in ("entropy_lo", "entropy_hi"))
        if (np.isnan(lo) != np.isnan(hi)).any() or (lo > hi).any():
            return "its bounds do not belong together: one alone is null, or the lower is above the upper", key[-1]
    return "", key[-1]
