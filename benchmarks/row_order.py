"""Memory, speed and uniformity of the row order, at ten million short rows.

    python benchmarks/row_order.py [--rows 10000000] [--tmp DIR]

Writes a scored directory of rows of 2 to 6 tokens with made-up scores, then walks one epoch's order and writes one
epoch, each in a process of its own that tells its own peak memory (VmHWM, Linux). Prints a table, and a JSON line; exit
code 1 where the order takes more memory than docs/architecture.md says, or its chi-square tells it from a uniform one.

The chi-square is over a table of CELLS x CELLS: rows by where they stand in the source and where in the epoch.
"""

from __future__ import annotations

import argparse
import io
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from entrodrop_prep.config import MaterializeConfig
from entrodrop_prep.export.job import SOURCE
from entrodrop_prep.export.materialize import materialize
from entrodrop_prep.export.order import ORDER_BYTES, Order, payload_bytes, trainable_batches
from entrodrop_prep.store import digest, manifest
from entrodrop_prep.store.schema import SCORED, scored_schema
from entrodrop_prep.store.scored import ScoredDataset
from entrodrop_prep.store.shards import write_bytes, write_shard

ROWS_PER_SHARD = 250_000
VOCABULARY = 2048
CELLS = 32
SIGMAS = 5.2
"""A uniform order is beyond it about once in five million runs."""


def write_scored(directory: Path, rows: int) -> Path:
    """A finished scored directory of ``rows`` rows of 2 to 6 tokens, drawn anew for each shard."""
    schema = scored_schema("float32", logprob=True, with_id=False)
    identity: dict[str, Any] = {
        **{"schema": SCORED, "score_dtype": "float32", "logprob": True, "id_column": None, "dtype": "float32"},
        **{"rows_per_shard": ROWS_PER_SHARD, "row_format": "made-up rows", "model": {"digest": "0" * 64}},
    }
    counts, files = dict.fromkeys(("rows", "windows", "tokens", "trainable_tokens"), 0), []
    unigram = np.zeros(VOCABULARY, np.int64)
    for index, first in enumerate(range(0, rows, ROWS_PER_SHARD)):
        table = made_up(schema, first, min(first + ROWS_PER_SHARD, rows))
        path = directory / f"shard-{index:05d}.parquet"
        footer = write_shard(path, schema, [table], {"schema": SCORED, "shard": index})
        ids = table["input_ids"].combine_chunks().flatten().to_numpy()
        unigram += np.bincount(ids, minlength=VOCABULARY)
        told = {"tokens": len(ids), "trainable_tokens": len(ids) - len(table)}
        for name, value in {"rows": len(table), "windows": len(table), **told}.items():
            counts[name] += value
        files.append(
            manifest.file_entry(directory, path, rows=len(table), content_digest=footer.content_digest, **told)
        )
    stored = io.BytesIO()
    np.save(stored, unigram)
    write_bytes(directory / "unigram.npy", stored.getvalue())
    content = {"identity": identity, "shards": [f["content_digest"] for f in files]}
    described = {
        "schema": SCORED,
        "generator": Path(__file__).name,
        "identity": identity,
        "source": {"name": "made-up rows", "digest": "0" * 64},
        "model": {"name": "none", "context": 64, "vocab_size": VOCABULARY},
        "tokenizer": {"digest": "0" * 64, "special_ids": [0], "eos_id": 0, "pad_id": 0},
        "counts": {**counts, "rows_read": rows},
        "content_digest": digest.of_json(content),
        "files": [*files, manifest.file_entry(directory, directory / "unigram.npy")],
    }
    manifest.write(directory, described)
    return directory


def made_up(schema: pa.Schema, first: int, stop: int) -> pa.Table:
    """Rows ``first`` to ``stop`` - 1."""
    rng = np.random.default_rng(first)
    lengths = rng.integers(2, 7, stop - first)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    n, begins = int(offsets[-1]), np.zeros(int(offsets[-1]), bool)
    begins[offsets[:-1]] = True
    values = {
        "input_ids": pa.array(rng.integers(1, VOCABULARY, n, np.int32)),
        "entropy": pa.array(rng.random(n, np.float32) * np.float32(4), mask=begins),
        "logprob": pa.array(-rng.random(n, np.float32), mask=begins),
        "loss_mask": pa.array(~begins),
    }
    plain = {"row_id": pa.array(np.arange(first, stop)), "window": pa.array(np.zeros(stop - first, np.int32))}
    columns = [
        pa.ListArray.from_arrays(pa.array(offsets), values[f.name], type=f.type) if f.name in values else plain[f.name]
        for f in schema
    ]
    return pa.table(columns, schema=schema)


def walk_order(scored: ScoredDataset, tmp: Path) -> dict[str, Any]:
    """Walk the order of epoch 0; ``order_bytes`` is what that takes above reading the rows, as every run does first."""
    rows, tokens = (sum(e[n] for e in scored.files) for n in ("rows", "tokens"))
    total = payload_bytes(rows, tokens, 2, scored.score_dtype)
    order = Order(scored, shuffle="epoch", seed=0, source=SOURCE, tmp=tmp / "order", total_bytes=total)
    table, near, last = np.zeros((CELLS, CELLS), np.int64), 0, -1
    read = sum(batch.num_rows for batch in trainable_batches(scored))
    before, begun = peak(), time.monotonic()
    for place, part in order.tables(0, lambda first, stop: True):
        row_id = part["row_id"].to_numpy()
        stands = (place + np.arange(len(row_id))) * CELLS // rows
        cell = row_id * CELLS // rows * CELLS + stands
        table += np.bincount(cell, minlength=CELLS**2).reshape(CELLS, CELLS)
        near += int((np.abs(np.diff(row_id, prepend=last)) <= 1).sum())
        last = int(row_id[-1])
    seconds = time.monotonic() - begun
    order.close()
    if table.sum() != read:
        raise SystemExit(f"the order holds {table.sum()} rows of {read}")
    expected = read / CELLS**2
    chi_square = float(((table - expected) ** 2).sum() / expected)
    return {
        "rows": read,
        "seconds": seconds,
        "order_bytes": peak() - before,
        "chi_square_sigmas": sigmas(chi_square, (CELLS - 1) ** 2),
        "neighbours_kept": near,
    }


def write_epoch(scored: ScoredDataset, tmp: Path) -> dict[str, Any]:
    """Write the first of two epochs."""
    summary = materialize(
        MaterializeConfig(
            scored=str(scored.directory), out=str(tmp / "masked"), epochs=1, horizon=2, target="both", schedule="linear"
        )
    )
    return {"rows": summary.epochs[0]["rows"], "seconds": summary.seconds}


def sigmas(chi_square: float, degrees: int) -> float:
    """How far a chi-square value is from what is expected: Wilson and Hilferty, PNAS 17 (1931)."""
    spread = 2 / (9 * degrees)
    return float(((chi_square / degrees) ** (1 / 3) - (1 - spread)) / spread**0.5)


def peak() -> int:
    """Bytes of memory that this process had at its peak."""
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))


PARTS = {"order": walk_order, "materialize": write_epoch}


def measured(part: str, directory: Path, tmp: Path) -> dict[str, Any]:
    """Run one part in a process of its own."""
    command = [sys.executable, __file__, "--part", part, "--scored", str(directory), "--tmp", str(tmp)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{part} failed")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--tmp", type=Path, help="where to write about 1 GB")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument("--scored", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part:
        found = PARTS[options.part](ScoredDataset(options.scored), options.tmp)
        print(json.dumps({**found, "peak_bytes": peak()}))
        return
    with tempfile.TemporaryDirectory(dir=options.tmp) as made:
        begun = time.monotonic()
        directory = write_scored(Path(made) / "scored", options.rows)
        size = sum(path.stat().st_size for path in directory.iterdir())
        print(f"{options.rows:,} rows, {size / 1e6:,.0f} MB, written in {time.monotonic() - begun:.0f} s")
        found = {part: measured(part, directory, Path(made)) for part in PARTS}
    raise SystemExit(report(found, size))


def report(found: dict[str, dict[str, Any]], size: int) -> int:
    """The table and the JSON line; 1 where a bound does not hold."""
    print(f"{'':12} {'rows':>12} {'seconds':>8} {'rows/s':>10} {'peak MiB':>9}")
    for part, r in found.items():
        speed = r["rows"] / r["seconds"]
        print(f"{part:12} {r['rows']:>12,} {r['seconds']:>8.1f} {speed:>10,.0f} {r['peak_bytes'] / 2**20:>9.0f}")
    order = found["order"]
    holds = order["order_bytes"] <= ORDER_BYTES and abs(order["chi_square_sigmas"]) <= SIGMAS
    print(f"the order itself: {order['order_bytes'] / 2**20:.0f} MiB, bound {ORDER_BYTES / 2**20:.0f} MiB")
    print(f"chi-square of {CELLS} x {CELLS} cells: {order['chi_square_sigmas']:+.2f} sigma, bound {SIGMAS}")
    print(f"neighbours of the source that stand side by side: {order['neighbours_kept']}, 2 expected")
    print(json.dumps({"benchmark": "row_order", "scored_bytes": size, **found, "holds": holds}))
    return 0 if holds else 1


if __name__ == "__main__":
    main()
