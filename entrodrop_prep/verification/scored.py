"""Proving that a scored directory is what its manifest says: rows, counts, and what the shards' footers say."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from entrodrop_prep.errors import ModelError
from entrodrop_prep.store import manifest
from entrodrop_prep.store.digest import ContentDigest
from entrodrop_prep.store.layout import TOKENIZER, UNIGRAM
from entrodrop_prep.store.parallel import in_order
from entrodrop_prep.store.rows import stored_scores, to_rows, token_counts
from entrodrop_prep.store.schema import SCORED
from entrodrop_prep.store.scored import ScoredDataset, rows_per_batch
from entrodrop_prep.store.scored_footers import disagreements, wrong_counts
from entrodrop_prep.store.shards import check_file_schema, read_batches, read_footer

_COUNTED = ("rows", "windows", "tokens", "trainable_tokens")


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
    footers = [read_footer(path / e["file"]) for e in scored.files]
    of_footers = disagreements(path, described, footers, notes)
    yield from dict.fromkeys([*wrong_counts(path, described, totals), *of_footers])
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
            self.unigram += token_counts(rows, len(self.unigram))
            found = (int((rows.window == 0).sum()), len(rows.row_id), len(rows.input_ids), int(rows.loss_mask.sum()))
            for name, value in zip(_COUNTED, found, strict=True):
                self.counts[name] += value
        return self.problem


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
