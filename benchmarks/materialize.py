"""How fast ``materialize`` and ``verify`` are, beside pyarrow reading and writing the same columns.

    python benchmarks/materialize.py [--tokens 10000000] [--mean 400] [--rounds 3] [--jobs 2] [--times 10]
        [--rows 1000000 10000000] [--tmp DIR]

The floor: pyarrow reads the scored columns that masks are made from, and writes four epochs' tables of the same
content, with the same codec, level, encodings, page checksums and row groups, by as many threads; its tables lie
ready in an uncompressed Arrow file, so that it makes nothing. Each way is a process of its own, which does all of it
with a few rows first, so that starting is not counted, and tells seconds, processor seconds and its peak memory (VmHWM,
Linux). The ways take turns, and a ratio is of one round. Then, once each, ``materialize`` at ``--times`` as many rows,
and two epochs of ``--rows`` rows of 12 tokens, which show how many bytes of memory a row takes. Prints a table, and a
JSON line; ratios of processor seconds tell more where other programs run beside.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]  # the tests write scored directories without a model

EPOCHS = 4
WANTED = 0.8
VOCABULARY = 50_000
ROWS_PER_SCORED = 2000
SHARDS = (500, 10_000)
SHORT, ROWS_PER_SHORT = 12, 100_000
"""Mean tokens of the rows that show memory, and rows of their shards."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=10_000_000, help="of one epoch")
    parser.add_argument("--mean", type=int, default=400, help="mean tokens of a row")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--times", type=int, default=10, help="of the rows, in the last run; 0 for none")
    parser.add_argument("--rows", type=int, nargs="*", default=[1_000_000, 10_000_000], help="of 12 tokens each")
    parser.add_argument("--tmp", type=Path, default=None)
    parser.add_argument("--way", help=argparse.SUPPRESS)
    parser.add_argument("--shard", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.way:
        way = (WAYS | ONCE)[given.way]
        way(given.folder / "few", given.shard, given.jobs)
        begun, used = time.monotonic(), time.process_time()
        found = way(given.folder, given.shard, given.jobs)
        found |= {"seconds": time.monotonic() - begun, "cpu_seconds": time.process_time() - used}
        print(json.dumps(found | {"peak_bytes": peak()}))
        return
    with tempfile.TemporaryDirectory(dir=given.tmp) as tmp:
        report(given, measured(given, Path(tmp)))


def measured(given: argparse.Namespace, tmp: Path) -> dict[str, Any]:
    """Seconds and peaks by shard size and way, of each round; and one run of many rows."""
    made: dict[str, Any] = {}
    for folder, tokens in ((tmp, given.tokens), (tmp / "few", 100 * given.mean)):
        write_scored(folder / "scored", tokens, given.mean)
        for shard in SHARDS:
            materialize_it(folder, shard, given.jobs)
            write_tables(folder, shard)
    for shard in SHARDS:
        for _ in range(given.rounds):
            for way in WAYS:
                made.setdefault(str(shard), {}).setdefault(way, []).append(run(way, tmp, shard, given.jobs))
    if given.times:
        for path in (p for p in tmp.iterdir() if p.name != "few"):
            shutil.rmtree(path)
        write_scored(tmp / "scored", given.times * given.tokens, given.mean)
        made["many"] = {"materialize": [run("materialize", tmp, SHARDS[-1], given.jobs)]}
    for rows in given.rows:
        for path in (p for p in tmp.iterdir() if p.name != "few"):
            shutil.rmtree(path)
        write_scored(tmp / "scored", SHORT * rows, SHORT, ROWS_PER_SHORT)
        made.setdefault("short", {})[rows] = run("short rows", tmp, ROWS_PER_SHORT, given.jobs)
    return made


def run(way: str, folder: Path, shard: int, jobs: int) -> dict[str, Any]:
    """One process."""
    command = [sys.executable, __file__, "--way", way, "--folder", str(folder), "--shard", str(shard)]
    done = subprocess.run([*command, "--jobs", str(jobs)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    told = f"{found['seconds']:7.2f} s, {found['cpu_seconds']:7.2f} s of processors"
    print(f"{way:20} shards of {shard:>6}: {told}, {found['peak_bytes'] / 2**20:6.0f} MiB", flush=True)
    return found


def peak() -> int:
    """Peak memory of this process in bytes."""
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))


def write_scored(directory: Path, tokens: int, mean: int, rows_per_shard: int = ROWS_PER_SCORED) -> None:
    """A scored directory of rows with ids as frequent as words are, and entropies without ties."""
    from entrodrop_prep.store.rows import Rows
    from helpers import scored

    scored.VOCABULARY = VOCABULARY

    def shards() -> Any:
        rng, rows = np.random.default_rng(0), tokens // mean
        for first in range(0, rows, rows_per_shard):
            count = min(rows_per_shard, rows - first)
            lengths = rng.integers(mean // 4, 2 * mean - mean // 4, count)
            offsets = np.concatenate([[0], np.cumsum(lengths)])
            n = int(offsets[-1])
            begins = np.zeros(n, bool)
            begins[offsets[:-1]] = True
            entropy = np.where(begins, np.nan, rng.gamma(1.2, 1.5, n)).astype(np.float32)
            yield Rows(
                row_id=np.arange(first, first + count),
                window=np.zeros(count, np.int32),
                offsets=offsets,
                input_ids=np.minimum(rng.zipf(1.25, n) + 13, VOCABULARY - 1).astype(np.int32),
                entropy=entropy,
                logprob=-entropy,
                loss_mask=~begins,
            )

    scored.write_shards(directory, shards(), rows_per_shard)


def masked(folder: Path, shard: int) -> Path:
    return folder / f"masked-{shard}"


def materialize_it(folder: Path, shard: int, jobs: int, epochs: int = EPOCHS) -> dict[str, Any]:
    from entrodrop_prep.config import MaterializeConfig
    from entrodrop_prep.export.materialize import materialize

    out = masked(folder, shard)
    shutil.rmtree(out, ignore_errors=True)
    config = MaterializeConfig(
        scored=str(folder / "scored"), out=str(out), epochs=epochs, rows_per_shard=shard, jobs=str(jobs)
    )
    return {"tokens": materialize(config).written_tokens}


def short_rows(folder: Path, shard: int, jobs: int) -> dict[str, Any]:
    return materialize_it(folder, shard, jobs, epochs=2)


def verify_it(folder: Path, shard: int, jobs: int) -> dict[str, Any]:
    return _verified(folder, shard, None)


def verify_against(folder: Path, shard: int, jobs: int) -> dict[str, Any]:
    return _verified(folder, shard, str(folder / "scored"))


def _verified(folder: Path, shard: int, against: str | None) -> dict[str, Any]:
    from entrodrop_prep.verification.run import verify

    report = verify(str(masked(folder, shard)), against)
    if report.findings:
        raise SystemExit("\n".join(report.findings))
    return {}


def write_tables(folder: Path, shard: int) -> None:
    """What the floor writes: of each file the row groups, in an Arrow file that is mapped into memory."""
    for file in sorted(masked(folder, shard).rglob("*.parquet")):
        to = folder / f"tables-{shard}" / file.parent.name / f"{file.stem}.arrow"
        to.parent.mkdir(parents=True, exist_ok=True)
        with (
            pq.ParquetFile(file) as f,
            pa.OSFile(str(to), "wb") as sink,
            pa.ipc.new_file(sink, f.schema_arrow) as writer,
        ):
            for group in range(f.num_row_groups):
                writer.write_batch(f.read_row_group(group).combine_chunks().to_batches()[0])


def floor(folder: Path, shard: int, jobs: int) -> dict[str, Any]:
    """Read the scored columns once and write each table."""
    from entrodrop_prep.store.shards import encodings

    shutil.rmtree(folder / "floor", ignore_errors=True)
    files = sorted((folder / f"tables-{shard}").rglob("*.arrow"))
    scored = sorted((folder / "scored").glob("*.parquet"))

    def read(path: Path) -> None:
        names = ["row_id", "window", "input_ids", "entropy", "loss_mask"]
        with pq.ParquetFile(path, page_checksum_verification=True, pre_buffer=False) as f:
            for _ in f.iter_batches(batch_size=655, columns=names, use_threads=False):
                pass

    def write(path: Path) -> None:
        to = folder / "floor" / path.parent.name / f"{path.stem}.parquet"
        to.parent.mkdir(parents=True, exist_ok=True)
        with pa.memory_map(str(path)) as mapped, pa.ipc.open_file(mapped) as f:
            options = {"compression": "zstd", "write_page_index": True, **encodings(f.schema, "zstd")}
            with pq.ParquetWriter(to, f.schema, write_page_checksum=True, **options) as writer:
                for group in range(f.num_record_batches):
                    table = pa.Table.from_batches([f.get_batch(group)])
                    writer.write_table(table, row_group_size=max(1, table.num_rows))

    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(read, scored))
        list(pool.map(write, files))
    return {}


WAYS = {"floor": floor, "materialize": materialize_it, "verify": verify_it, "verify --against": verify_against}
ONCE = {"short rows": short_rows}


def report(given: argparse.Namespace, made: dict[str, Any]) -> None:
    """The table and the JSON line."""
    line: dict[str, Any] = {"benchmark": "materialize", "tokens": given.tokens, "mean": given.mean, "jobs": given.jobs}
    line |= {"rounds": given.rounds, "cores": os.cpu_count(), "pyarrow": pa.__version__, "numpy": np.__version__}
    print(f"\n{'':20}{'shards of':>10}{'tokens/s':>14}{'of the floor':>14}{'by processor':>14}{'peak MiB':>10}")
    for shard in map(str, SHARDS):
        found = made[shard]
        tokens = found["materialize"][0]["tokens"]
        for way, runs in found.items():
            ratios = [f["seconds"] / r["seconds"] for f, r in zip(found["floor"], runs, strict=True)]
            speed = statistics.median(tokens / r["seconds"] for r in runs)
            cpu = [f["cpu_seconds"] / r["cpu_seconds"] for f, r in zip(found["floor"], runs, strict=True)]
            most = max(r["peak_bytes"] for r in runs)
            wanted = f"   wanted: {WANTED}" if way == "materialize" else ""
            told = f"{way:20}{shard:>10}{speed:14,.0f}{statistics.median(ratios):14.2f}"
            told += f"{statistics.median(cpu):14.2f}{most / 2**20:10.0f}"
            print(told + wanted)
            line[f"{way}, {shard}"] = {"tokens_per_second": round(speed), "ratios": [round(r, 3) for r in ratios]}
            line[f"{way}, {shard}"]["cpu_ratios"] = [round(r, 3) for r in cpu]
            line[f"{way}, {shard}"]["peak_mib"] = round(most / 2**20)
    if "many" in made:
        (one,) = made["many"]["materialize"]
        speed = one["tokens"] / one["seconds"]
        few = statistics.median(r["tokens"] / r["seconds"] for r in made[str(SHARDS[-1])]["materialize"])
        name = f"{given.times} times the rows"
        print(
            f"{name:20}{SHARDS[-1]:>10}{speed:14,.0f}{'':28}{one['peak_bytes'] / 2**20:10.0f}   {speed / few:.2f} times"
        )
        line["many"] = {"tokens_per_second": round(speed), "of_few": round(speed / few, 3)}
        line["many"]["peak_mib"] = round(one["peak_bytes"] / 2**20)
    for rows, one in made.get("short", {}).items():
        speed, peaked = one["tokens"] / one["seconds"], one["peak_bytes"] / 2**20
        print(f"{f'{rows:,} short rows':20}{ROWS_PER_SHORT:>10}{speed:14,.0f}{'':28}{peaked:10.0f}")
        line[f"short, {rows}"] = {"tokens_per_second": round(speed), "peak_mib": round(peaked)}
    if len(given.rows) > 1:
        few, *_, most = sorted(given.rows)
        line["bytes_a_row"] = round(
            (made["short"][most]["peak_bytes"] - made["short"][few]["peak_bytes"]) / (most - few)
        )
        print(f"{line['bytes_a_row']} bytes of memory a row")
    print(json.dumps(line))


if __name__ == "__main__":
    main()
