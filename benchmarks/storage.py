"""How many bytes a token takes in scored and masked files, and how long it takes to write and to read it.

    python benchmarks/storage.py [--tokens 1000000] [--rounds 5] [--tmp DIR]

Every column is written by itself with each encoding of Parquet, as ``write_shard`` would (zstd, page checksums, a page
index), to memory: bytes of the column chunk and processor time of this thread, the best of the rounds. The scores are
those of the demo's corpus by the demo's model. Ids and labels are made up: a Zipf distribution over 151,936 ids, in
which nothing repeats, and the words of the standard library, numbered by frequency, in which as much repeats as in
text; 40% of the labels are -100. Then whole shards, as they are written and as version 0.1.0 wrote them. Then what a
second push to a Hub sends, by its client's store: after rows were inserted, and of another epoch in the same order.
Prints tables, and a JSON line.
"""

from __future__ import annotations

import argparse
import collections
import io
import json
import os
import re
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]  # the tests have a content store as the Hub's

VOCABULARY = 151_936
BEFORE = {"use_dictionary": ["input_ids.list.element", "labels.list.element"], "write_page_index": False}
"""How 0.1.0 wrote its columns."""
ENCODINGS = ("dictionary", "PLAIN", "BYTE_STREAM_SPLIT", "DELTA_BINARY_PACKED")
CODECS = ("zstd", "snappy", "none")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=1_000_000, help="of the made-up ids")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tmp", type=Path, default=None)
    given = parser.parse_args()
    line: dict[str, Any] = {"benchmark": "storage", "tokens": given.tokens, "rounds": given.rounds}
    line |= {"cores": os.cpu_count(), "pyarrow": pa.__version__}
    with tempfile.TemporaryDirectory(dir=given.tmp) as tmp:
        scored = demo_scores(Path(tmp))
        ids = {"Zipf": zipf(given.tokens), "words": words(given.tokens)}
        line["columns"] = columns(scored, ids, given.rounds)
        line["shards"] = shards(scored, ids, given.rounds)
        line["push"] = pushes(Path(tmp), ids["words"])
    print(json.dumps(line))


def demo_scores(folder: Path) -> pa.Table:
    """The demo's corpus, scored in float32 as `score` does by itself, in one shard."""
    from transformers import AutoTokenizer

    from entrodrop_prep.config import ScoreConfig
    from entrodrop_prep.demo.corpus import write_corpus
    from entrodrop_prep.demo.run import MAX_TOKENS, MODEL
    from entrodrop_prep.scoring.run import score

    write_corpus(folder / "corpus.jsonl", AutoTokenizer.from_pretrained(MODEL), MAX_TOKENS)
    corpus, out = str(folder / "corpus.jsonl"), folder / "scored"
    score(ScoreConfig(source=corpus, model=str(MODEL), out=str(out), backend="transformers", dtype="float32"))
    return pq.read_table(out / "shard-00000.parquet").combine_chunks()


def zipf(count: int) -> np.ndarray[Any, np.dtype[np.int32]]:
    """Ids that are as frequent as words are, in no order."""
    share = 1 / (np.arange(VOCABULARY) + 2.7)
    return np.random.default_rng(0).choice(VOCABULARY, count, p=share / share.sum()).astype(np.int32)


def words(count: int) -> np.ndarray[Any, np.dtype[np.int32]]:
    """The words, spaces and signs of Python's own library, numbered by frequency."""
    found: list[str] = []
    for path in sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py")):
        if len(found) < count and "site-packages" not in path.parts:
            found += re.findall(r"\w+| +|\n+|[^\w\s]", path.read_text(encoding="utf-8", errors="replace"))
    number = {word: i for i, (word, _) in enumerate(collections.Counter(found).most_common(VOCABULARY))}
    return np.array([number.get(word, 0) for word in found[:count]], np.int32)


def lengths_of(count: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Offsets of rows of 100 to 700 tokens."""
    ends = np.cumsum(np.random.default_rng(1).integers(100, 700, count // 100))
    return np.concatenate([[0], ends[ends < count], [count]])


def masked_table(ids: np.ndarray[Any, Any]) -> pa.Table:
    """Masked rows of these ids; 40% of the labels are dropped."""
    from entrodrop_prep.store.schema import masked_schema

    offsets, schema = lengths_of(len(ids)), masked_schema()
    labels = np.where(np.random.default_rng(2).random(len(ids)) < 0.4, -100, ids).astype(np.int32)
    labels[offsets[:-1]] = -100
    flat = {"input_ids": ids, "attention_mask": np.ones(len(ids), np.int8), "labels": labels}
    starts = pa.array(offsets, pa.int32())
    lists = [pa.ListArray.from_arrays(starts, pa.array(flat[f.name]), type=f.type) for f in schema]
    return pa.table(lists, schema=schema)


def with_type(table: pa.Table, name: str, kind: pa.DataType) -> pa.Table:
    """A column of lists as lists of another number."""
    field = table.schema.field(name)
    wanted = pa.field(name, pa.list_(pa.field("element", kind, nullable=True)), nullable=field.nullable)
    return table.set_column(table.schema.get_field_index(name), wanted, table.column(name).cast(wanted.type))


def half(table: pa.Table) -> pa.Table:
    """Scored rows with scores in float16."""
    for name in ("entropy", "logprob"):
        table = with_type(table, name, pa.float16())
    return table


def tokens_of(table: pa.Table) -> int:
    lists = next(name for name in ("input_ids", *table.schema.names) if name in table.schema.names)
    return len(table.column(lists).combine_chunks().flatten())


def best(call: Callable[[], Any], rounds: int) -> float:
    """Processor seconds of this thread."""
    seconds = []
    for _ in range(rounds):
        begun = time.thread_time()
        call()
        seconds.append(time.thread_time() - begun)
    return min(seconds)


def measured(table: pa.Table, rounds: int, *, groups_rows: int | None = None, **options: Any) -> dict[str, float]:
    """Bytes, and nanoseconds to write and to read, a token."""
    data = io.BytesIO()

    def write() -> None:
        data.seek(0)
        data.truncate()
        with pq.ParquetWriter(data, table.schema, write_page_checksum=True, **options) as writer:
            writer.write_table(table, row_group_size=groups_rows or max(1, table.num_rows))

    def read() -> None:
        with pq.ParquetFile(pa.BufferReader(data.getbuffer()), page_checksum_verification=True, pre_buffer=False) as f:
            for _ in f.iter_batches(batch_size=512, use_threads=False):
                pass

    tokens = tokens_of(table)
    written, was_read = best(write, rounds), best(read, rounds)
    found = pq.read_metadata(io.BytesIO(data.getvalue()))
    groups = [found.row_group(g) for g in range(found.num_row_groups)]
    stored = sum(g.column(c).total_compressed_size for g in groups for c in range(g.num_columns))
    return {
        "bytes": round(stored / tokens, 3),
        "write_ns": round(written / tokens * 1e9, 1),
        "read_ns": round(was_read / tokens * 1e9, 1),
    }


def columns(
    scored: pa.Table, ids: dict[str, np.ndarray[Any, Any]], rounds: int
) -> dict[str, dict[str, dict[str, float]]]:
    """Each column with each encoding that it can have; the ids also with the other codecs."""
    cases = {
        **{f"{name} float16": half(scored).select([name]) for name in ("entropy", "logprob")},
        **{f"{name} float32": scored.select([name]) for name in ("entropy", "logprob")},
        "input_ids, demo": scored.select(["input_ids"]),
        **{f"input_ids, {name}": masked_table(i).select(["input_ids"]) for name, i in ids.items()},
        **{f"labels, {name}": masked_table(i).select(["labels"]) for name, i in ids.items()},
        "attention_mask": masked_table(ids["Zipf"]).select(["attention_mask"]),
    }
    print(f"{'column':24}{'codec':8}{'encoding':24}{'bytes a token':>14}{'write ns':>10}{'read ns':>10}")
    found: dict[str, dict[str, dict[str, float]]] = {}
    for case, table in cases.items():
        (name,) = table.schema.names
        kind = table.schema.field(name).type.value_type
        codecs = CODECS if case.startswith(("input_ids, w", "labels, w")) else ("zstd",)
        for codec in codecs:
            for encoding in ENCODINGS:
                if encoding == "DELTA_BINARY_PACKED" and kind != pa.int32():
                    continue
                if encoding == "BYTE_STREAM_SPLIT" and kind == pa.int8():
                    continue
                tabled = encoding == "dictionary"
                options: dict[str, Any] = {"compression": codec, "use_dictionary": tabled, "write_page_index": True}
                if not tabled:
                    options["column_encoding"] = {f"{name}.list.element": encoding}
                one = measured(table, rounds, **options)
                found.setdefault(f"{case}, {codec}", {})[encoding] = one
                print(
                    f"{case:24}{codec:8}{encoding:24}{one['bytes']:14.3f}{one['write_ns']:10.1f}{one['read_ns']:10.1f}"
                )
    return found


def shards(scored: pa.Table, ids: dict[str, np.ndarray[Any, Any]], rounds: int) -> dict[str, dict[str, Any]]:
    """Whole tables as ``write_shard`` writes them now, and as it did."""
    from entrodrop_prep.export.epoch import GROUP_TOKENS
    from entrodrop_prep.store.shards import encodings

    cases = {"scored float16": half(scored), "scored float32": scored}
    cases |= {f"masked, {name}": masked_table(i) for name, i in ids.items()}
    print(f"\n{'shard, zstd':24}{'':8}{'':24}{'bytes a token':>14}{'write ns':>10}{'read ns':>10}")
    found: dict[str, dict[str, Any]] = {}
    for case, table in cases.items():
        group = GROUP_TOKENS * table.num_rows // tokens_of(table) if case.startswith("masked") else None
        now = {"write_page_index": True, **encodings(table.schema, "zstd")}
        for way, options in (("0.1.0", BEFORE), ("now", now)):
            one = measured(table, rounds, groups_rows=group, compression="zstd", **options)
            found.setdefault(case, {})[way] = one
            print(f"{case:24}{way:32}{one['bytes']:14.3f}{one['write_ns']:10.1f}{one['read_ns']:10.1f}")
    return found


def pushes(tmp: Path, ids: np.ndarray[Any, Any]) -> dict[str, float]:
    """Shares of files' bytes that the Hub's client sends when it has sent others like them before."""
    from entrodrop_prep.store.shards import encodings

    table = masked_table(ids)
    more = table.slice(0, 1)
    middle = table.num_rows // 2
    inserted = {
        "one row at the front": pa.concat_tables([more, table]),
        "five rows inserted": pa.concat_tables([p for i in range(5) for p in (more, fifth(table, i))]),
        "twenty rows at the end": pa.concat_tables([table, table.slice(middle, 20)]),
    }
    dropped = np.random.default_rng(3).random(len(ids)) < 0.4
    other = np.where(dropped, -100, ids).astype(np.int32)
    lists = table.column("labels").combine_chunks()
    labels = pa.ListArray.from_arrays(lists.offsets, pa.array(other), type=lists.type)
    epoch = table.set_column(2, table.schema.field("labels"), labels)
    mean = tokens_of(table) / table.num_rows
    found: dict[str, float] = {}

    def share(name: str, first: pa.Table, second: pa.Table, group: float, **options: Any) -> None:
        paths = []
        for i, rows in enumerate((first, second)):
            paths.append(tmp / f"{len(found)}-{i}.parquet")
            options = {**options, "compression": "zstd", "write_page_index": True, **encodings(rows.schema, "zstd")}
            with pq.ParquetWriter(paths[-1], rows.schema, write_page_checksum=True, **options) as writer:
                writer.write_table(rows, row_group_size=int(group / mean))
        sent(tmp / f"store-{len(found)}", paths[:1])
        found[name] = round(sent(tmp / f"store-{len(found)}", paths[1:]) / paths[1].stat().st_size, 3)
        print(f"{name:64}{found[name]:14.3f}{paths[1].stat().st_size / tokens_of(second):20.3f}")

    print(f"\n{'second push':64}{'share sent':>14}{'bytes a token':>20}")
    for chunks in (False, True):
        for what, rows in inserted.items():
            name = f"{what}, {'content-defined chunks' if chunks else 'pages of 1 MiB'}"
            share(name, table, rows, 1 << 40, use_content_defined_chunking=chunks)
    for bits in (18, 20):
        share(f"another epoch in the same order, row groups of {1 << bits:,} tokens", table, epoch, 1 << bits)
    return found


def fifth(table: pa.Table, number: int) -> pa.Table:
    return table.slice(number * table.num_rows // 5, (number + 1) * table.num_rows // 5 - number * table.num_rows // 5)


def sent(folder: Path, files: Sequence[Path]) -> int:
    """Bytes by which the Hub's content store, kept in ``folder`` by its own client, grows with these files."""
    import hf_xet

    from helpers.xet import XetStore

    store = XetStore(folder)
    before = store.stored_bytes()
    with hf_xet.XetSession().new_upload_commit(
        endpoint=store.address, token="none", token_expiry_unix_secs=int(time.time()) + 3600
    ) as commit:
        for file in files:
            commit.start_upload_file(str(file))
    return store.stored_bytes() - before


if __name__ == "__main__":
    main()
