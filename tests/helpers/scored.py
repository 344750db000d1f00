"""Scored directories written without a model: the package's own writers, the tokenizer of the tests, chosen scores."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from entrodrop_prep.store import digest, manifest
from entrodrop_prep.store.disk import write_bytes
from entrodrop_prep.store.rows import Rows
from entrodrop_prep.store.schema import SCORED, scored_schema
from entrodrop_prep.store.shards import WITHOUT_DIGEST, read_footer, write_shard
from helpers.tokenizers import byte_bpe

VOCABULARY = 440
"""Columns of the logits of the model that did not make these scores: some more than the tokenizer has tokens."""
FIRST_PLAIN_ID = 14
"""Below it the test tokenizer has its special tokens."""


def some_rows(
    count: int,
    *,
    seed: int = 0,
    lengths: tuple[int, int] = (2, 40),
    first_row: int = 0,
    dtype: Any = np.float32,
    distinct: int | None = 25,
) -> Rows:
    """Rows of plain, prompted, unlabelled and split documents.

    Args:
        count: source rows; every seventh is a document of three windows, every eleventh has nothing to train on.
        seed: of everything that is drawn.
        lengths: least and greatest number of tokens of a row.
        first_row: row_id of the first.
        dtype: float16 or float32.
        distinct: number of different entropies, so that there are ties; None for as many as there are tokens.
    """
    rng = np.random.default_rng(seed)
    row_ids = np.arange(first_row, first_row + count)
    windows = np.where(row_ids % 7 == 3, 3, 1)
    row_id = np.repeat(row_ids, windows)
    window = np.arange(len(row_id)) - np.repeat(np.cumsum(windows) - windows, windows)
    sizes = rng.integers(lengths[0], lengths[1] + 1, len(row_id))
    offsets = np.concatenate([[0], np.cumsum(sizes)])
    n = int(offsets[-1])
    ids = rng.integers(0, VOCABULARY - 20, n).astype(np.int32)
    entropy = rng.random(n) * 4 if distinct is None else rng.integers(0, distinct, n) * 4.0 / distinct
    place = np.arange(n) - np.repeat(offsets[:-1], sizes)
    context = np.repeat(np.where(window > 0, np.minimum(3, sizes - 1), 1), sizes)
    prompt = np.repeat(rng.integers(0, lengths[0], len(row_id)) * (row_id % 3 == 1), sizes)
    null = place < context
    loss = ~null & (place >= prompt) & np.repeat(row_id % 11 != 5, sizes)
    return Rows(
        row_id=row_id,
        window=window.astype(np.int32),
        offsets=offsets,
        input_ids=ids,
        entropy=np.where(null, np.nan, entropy).astype(dtype),
        logprob=np.where(null, np.nan, -4 * rng.random(n)).astype(dtype),
        loss_mask=loss,
    )


def take(rows: Rows, chosen: Any) -> Rows:
    """The chosen windows, by their numbers and in that order."""
    tokens = np.concatenate([np.arange(*rows.offsets[r : r + 2]) for r in chosen] or [np.zeros(0, np.int64)])
    return Rows(
        row_id=rows.row_id[chosen],
        window=rows.window[chosen],
        offsets=np.concatenate((np.zeros(1, np.int64), np.cumsum(rows.lengths[chosen], dtype=np.int64))),
        input_ids=rows.input_ids[tokens],
        entropy=rows.entropy[tokens],
        logprob=None if rows.logprob is None else rows.logprob[tokens],
        loss_mask=rows.loss_mask[tokens],
        excess=None if rows.excess is None else rows.excess[tokens],
    )


def by_shard(rows: Rows, rows_per_shard: int) -> Iterator[Rows]:
    """The windows of source rows [i*R, (i+1)*R), for each i."""
    shards = int(rows.row_id.max()) // rows_per_shard + 1
    edges = np.searchsorted(rows.row_id, np.arange(shards + 1) * rows_per_shard)
    for first, stop in pairwise(edges):
        yield take(rows, np.arange(first, stop))


def table_of(rows: Rows, schema: pa.Schema) -> pa.Table:
    """Rows as a scored shard has them; NaN becomes null."""
    offsets = pa.array(rows.offsets.astype(np.int32))

    def lists(name: str, values: pa.Array) -> pa.Array:
        return pa.ListArray.from_arrays(offsets, values, type=schema.field(name).type)

    columns = {
        "row_id": pa.array(rows.row_id),
        "id": pa.array([f"doc-{r}" for r in rows.row_id]) if "id" in schema.names else None,
        "window": pa.array(rows.window),
        "input_ids": lists("input_ids", pa.array(rows.input_ids)),
        "loss_mask": lists("loss_mask", pa.array(rows.loss_mask)),
    }
    for name, values in (("entropy", rows.entropy), ("logprob", rows.logprob)):
        if name in schema.names:
            columns[name] = lists(name, pa.array(values, mask=np.isnan(values)))
    return pa.table([columns[n] for n in schema.names], schema=schema)


def write_scored(
    directory: Path,
    rows: Rows,
    *,
    rows_per_shard: int = 8,
    logprob: bool = True,
    with_id: bool = False,
) -> Path:
    """A finished scored directory that holds ``rows``; scores are stored in their dtype."""
    shards = by_shard(rows, rows_per_shard)
    return write_shards(directory, shards, rows_per_shard, rows.entropy.dtype, logprob, with_id)


def write_shards(
    directory: Path,
    shards: Iterable[Rows],
    rows_per_shard: int,
    dtype: Any = np.float32,
    logprob: bool = True,
    with_id: bool = False,
) -> Path:
    """As ``write_scored``, shard after shard, for what does not fit in memory."""
    score_dtype = np.dtype(dtype).name
    schema = scored_schema(score_dtype, logprob=logprob, with_id=with_id)
    identity: dict[str, Any] = {
        "schema": SCORED,
        "score_dtype": score_dtype,
        "logprob": logprob,
        "id_column": "name" if with_id else None,
        "rows_per_shard": rows_per_shard,
        "row_format": "text in 'text'",
        "model": {"digest": "0" * 64},
        "dtype": "float32",
    }
    totals = dict.fromkeys(("rows", "windows", "tokens", "trainable_tokens"), 0)
    unigram, files = np.zeros(VOCABULARY, np.int64), []
    for index, rows in enumerate(shards):
        path = directory / f"shard-{index:05d}.parquet"
        footer = write_shard(path, schema, [table_of(rows, schema)], {"schema": SCORED, "shard": index})
        new = ~np.isnan(rows.entropy)
        new[rows.offsets[:-1][rows.window == 0]] = True
        unigram += np.bincount(rows.input_ids[new], minlength=VOCABULARY)
        counts = {"tokens": len(rows.input_ids), "trainable_tokens": int(rows.loss_mask.sum())}
        totals["rows"] += int((rows.window == 0).sum())
        totals["windows"] += len(rows.row_id)
        totals["tokens"] += counts["tokens"]
        totals["trainable_tokens"] += counts["trainable_tokens"]
        digests = {"content_digest": footer.content_digest}
        files.append(manifest.file_entry(directory, path, rows=footer.rows, **counts, **digests))
    buffer = io.BytesIO()
    np.save(buffer, unigram)
    write_bytes(directory / "unigram.npy", buffer.getvalue())
    tokenizer = byte_bpe()
    tokenizer.save_pretrained(str(directory / "tokenizer"))
    extra = [directory / "unigram.npy", *sorted((directory / "tokenizer").iterdir())]
    manifest.write(
        directory,
        {
            "schema": SCORED,
            "generator": "tests",
            "identity": identity,
            "source": {"name": "made-up.jsonl", "digest": "0" * 64},
            "model": {"name": "made-up", "context": 64, "vocab_size": VOCABULARY},
            "tokenizer": {
                "digest": "0" * 64,
                "special_ids": list(range(FIRST_PLAIN_ID)),
                "eos_id": tokenizer.eos_token_id,
                "pad_id": tokenizer.pad_token_id,
            },
            "counts": {**totals, "rows_read": totals["rows"]},
            "content_digest": digest.of_json({"identity": identity, "shards": [f["content_digest"] for f in files]}),
            "files": files + [manifest.file_entry(directory, p) for p in extra],
        },
    )
    return directory


def rewrite_manifest(directory: Path, **changes: Any) -> None:
    """A manifest that says something else and whose own digest is right."""
    manifest.write(directory, {**manifest_of(directory), **changes})


def reseal(directory: Path, name: str, table: pa.Table) -> None:
    """Another content for a shard, with every digest made new."""
    old = read_footer(directory / name).info
    kept = {k: v for k, v in table.schema.metadata.items() if k != b"entrodrop"}
    info = {k: v for k, v in old.items() if k not in ("rows", "content_digest")}
    write_shard(directory / name, table.schema.with_metadata(kept), [table.replace_schema_metadata(kept)], info)
    seal(directory, name)


def seal(directory: Path, *names: str) -> None:
    """Digests and row counts of some shards made new in the manifest."""
    described = manifest_of(directory)
    shards = [e for e in described["files"] if "rows" in e]
    for entry in shards:
        if entry["file"] in names:
            footer = read_footer(directory / entry["file"])
            new = {"rows": footer.rows, "content_digest": footer.content_digest}
            entry |= manifest.file_entry(directory, directory / entry["file"], **new)
    contents: Any = [e["content_digest"] for e in shards]
    if described["schema"] == SCORED:
        contents = {"identity": described["identity"], "shards": contents}
    rewrite_manifest(directory, files=described["files"], content_digest=digest.of_json(contents))


def all_bytes(directory: Path, *, without: tuple[str, ...] = ()) -> dict[str, bytes]:
    """Path -> bytes of every file below ``directory`` but the lock and what is named."""
    return {
        path.relative_to(directory).as_posix(): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file() and path.name not in (".lock", *without)
    }


def copy(source: Path, target: Path) -> Path:
    """A copy of a directory."""
    shutil.copytree(source, target)
    return target


def without_digests(source: Path, target: Path) -> Path:
    """A copy of a scored directory as 0.1.0 wrote it: footers without a digest of theirs and without names."""
    copy(source, target)
    described = manifest_of(target)
    for entry in described["files"]:
        if "rows" in entry:
            rewrite_footer(target / entry["file"], lambda info: None)
            entry |= manifest.file_entry(target, target / entry["file"])
    manifest.write(target, described)
    return target


def rewrite_footer(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """The same rows with a footer as 0.1.0 wrote it, without a digest, and then changed."""
    table, metadata = pq.read_table(path), pq.read_metadata(path).metadata
    info = {k: v for k, v in json.loads(metadata[b"entrodrop"]).items() if k in WITHOUT_DIGEST}
    change(info)
    with pq.ParquetWriter(path, table.schema, write_page_checksum=True) as writer:
        writer.write_table(table)
        writer.add_key_value_metadata({"entrodrop": json.dumps(info)})


def manifest_of(directory: Path) -> dict[str, Any]:
    """A directory's manifest as it is written."""
    return dict(json.loads((directory / "manifest.json").read_bytes()))
