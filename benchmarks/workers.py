"""How much more two workers that share a directory score than one, on two cores; with --ray, what Ray costs one worker.

    python benchmarks/workers.py [--tokens 400000] [--workers 2] [--rounds 3] [--rows-per-shard 20] [--ray]

Each worker computes in one thread, so that what it does is bound by one core. One worker and several take turns.
Their speed is that of the time in which all of them score: from the moment when each has written its first shard to
the last shard. With --ray the whole command counts, from its start to its end: one worker by itself and one on a Ray
that is started for it. Prints a table, and a JSON line of the medians and their ratio.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pyarrow.parquet as pq

from scoring import DEMO_MODEL, make_corpus

WANTED = 0.9
"""Of the number of workers: how many times as fast as one they should be."""
RAY_WANTED = 1.15
"""How many times as long as one worker by itself one on Ray may take, of a run of two minutes."""
ONE_THREAD = {"OMP_NUM_THREADS": "1", "RAYON_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}


def command_of(rows: Path, out: Path, rows_per_shard: int) -> list[str]:
    """One worker's command, without its number."""
    command = [sys.executable, "-m", "entrodrop_prep", "score", str(rows), "--model", str(DEMO_MODEL)]
    command += ["--out", str(out), "--backend", "transformers", "--dtype", "float32", "--device", "cpu"]
    return [*command, "--rows-per-shard", str(rows_per_shard)]


def ray_costs(rows: Path, folder: Path, given: argparse.Namespace) -> None:
    """One worker by itself and one on Ray, in turn: seconds of the whole command."""
    seconds: dict[str, list[float]] = {"--worker 0/1": [], "--ray --workers 1": []}
    for number in range(given.rounds):
        for flags, found in seconds.items():
            command = [*command_of(rows, folder / f"{number}{len(flags)}", given.rows_per_shard), *flags.split()]
            begun = time.monotonic()
            subprocess.run(command, env={**os.environ, **ONE_THREAD}, stdout=subprocess.DEVNULL, check=True)
            found.append(time.monotonic() - begun)
    alone, on_ray = seconds.values()
    ratios = [many / one for one, many in zip(alone, on_ray, strict=True)]
    print(f"{'command':<18} {'seconds':>8} {'of one':>8}")
    for (flags, found), ratio in zip(seconds.items(), (1.0, statistics.median(ratios)), strict=True):
        print(f"{flags:<18} {statistics.median(found):>8.1f} {ratio:>8.2f}")
    print(f"wanted: {RAY_WANTED:.2f} at most, of two minutes")
    print(
        json.dumps(
            {
                "benchmark": "workers on Ray",
                "cores": os.cpu_count(),
                "load": round(os.getloadavg()[0], 1),
                "rounds": given.rounds,
                "tokens": given.tokens,
                "seconds": {flags: [round(s, 1) for s in found] for flags, found in seconds.items()},
                "ratios": [round(ratio, 3) for ratio in ratios],
                "ratio": round(statistics.median(ratios), 3),
            }
        )
    )


def run(rows: Path, out: Path, workers: int, rows_per_shard: int) -> float:
    """Rows a second of so many workers."""
    command = command_of(rows, out, rows_per_shard)
    started = [
        subprocess.Popen(
            [*command, "--worker", f"{i}/{workers}"], env={**os.environ, **ONE_THREAD}, stdout=subprocess.DEVNULL
        )
        for i in range(workers)
    ]
    if sum(process.wait() for process in started):
        raise SystemExit("a worker failed")
    shards = sorted(out.glob("shard-*.parquet"))
    times = [shard.stat().st_mtime for shard in shards]
    begun, ended = max(times[:workers]), max(times)
    counted = [shard for shard, time in zip(shards, times, strict=True) if time > begun]
    return sum(pq.read_metadata(shard).num_rows for shard in counted) / (ended - begun)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=400_000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rows-per-shard", type=int, default=20)
    parser.add_argument("--ray", action="store_true", help="measure what Ray costs one worker")
    given = parser.parse_args()
    speeds: dict[int, list[float]] = {1: [], given.workers: []}
    with tempfile.TemporaryDirectory() as folder:
        rows, _ = make_corpus(Path(folder), given.tokens)
        if given.ray:
            ray_costs(rows, Path(folder), given)
            return
        for number in range(given.rounds):
            for workers, found in speeds.items():
                found.append(run(rows, Path(folder) / f"{workers}-{number}", workers, given.rows_per_shard))
    ratios = [many / one for one, many in zip(*speeds.values(), strict=True)]
    print(f"{'workers':>8} {'rows/s':>10} {'of one':>8}")
    for workers, found in speeds.items():
        ratio = statistics.median(ratios) if workers > 1 else 1.0
        print(f"{workers:>8} {statistics.median(found):>10,.1f} {ratio:>8.2f}")
    print(f"wanted: {WANTED * given.workers:.2f}")
    print(
        json.dumps(
            {
                "benchmark": "workers",
                "cores": os.cpu_count(),
                "load": round(os.getloadavg()[0], 1),
                "rounds": given.rounds,
                "tokens": given.tokens,
                "rows_per_second": {str(n): round(statistics.median(found), 1) for n, found in speeds.items()},
                "ratios": [round(ratio, 3) for ratio in ratios],
                "ratio": round(statistics.median(ratios), 3),
            }
        )
    )


if __name__ == "__main__":
    main()
