"""How fast masked rows are made on the fly, beside reading the same rows from files.

    python benchmarks/loader.py [--tokens 4000000] [--mean 400] [--rounds 3] [--workers 2] [--batch 16]

A DataLoader with transformers' DataCollatorForSeq2Seq goes once over one epoch: over ``load_dataset`` of the `plain`
configuration, which no mask was computed for, over the rows that ``materialize`` wrote, and over MaskedRows as a
dataset and as a stream. Ways take turns. The first batches are waited for before the clock starts; opening is timed
separately. Prints a table, and a JSON line of the medians, of the ratios to `plain`, and of the seconds to open.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]  # the tests write scored directories without a model

WANTED = 0.90
RECIPE: dict[str, Any] = {"epochs": 4, "only_epochs": "3"}


def make(folder: Path, tokens: int, mean: int) -> int:
    """A scored directory, epoch 3 of it, and the same rows unmasked; returns the number of rows."""
    from entrodrop_prep import MaterializeConfig, materialize
    from helpers.scored import some_rows, write_scored

    rows = some_rows(tokens // mean, lengths=(mean // 4, 2 * mean - mean // 4), distinct=None)
    write_scored(folder / "scored", rows, rows_per_shard=10_000)
    materialize(
        MaterializeConfig(scored=str(folder / "scored"), out=str(folder / "masked"), plain_config=True, **RECIPE)
    )
    return len(rows.row_id)


def ways(folder: Path, batch: int) -> dict[str, Callable[[], tuple[Any, dict[str, Any]]]]:
    """What each way opens, and what else its DataLoader is given."""
    from datasets import load_dataset

    from entrodrop_prep import MaskedRows

    def files(name: str) -> Any:
        return load_dataset(str(folder / "masked"), name, split="train", cache_dir=str(folder / "datasets"))

    def opened() -> MaskedRows:
        return MaskedRows.open(folder / "scored", epochs=RECIPE["epochs"], cache_dir=folder / "cache")

    return {
        "plain files": lambda: (files("plain"), {"shuffle": False}),
        "masked files": lambda: (files("epoch_003"), {"shuffle": False}),
        "rows.dataset(3)": lambda: (opened().dataset(3), {"shuffle": False}),
        "rows.stream(epoch=3)": lambda: (opened().stream(batch, epoch=3), {}),
    }


def once(dataset: Any, options: dict[str, Any], batch: int, workers: int) -> dict[str, float]:
    """Go over a dataset; tokens of the rows after the first batches, and seconds."""
    import torch
    from torch.utils.data import DataLoader
    from transformers import DataCollatorForSeq2Seq

    from helpers.tokenizers import byte_bpe

    torch.set_num_threads(1)
    collator = DataCollatorForSeq2Seq(byte_bpe(), label_pad_token_id=-100)
    loader = iter(DataLoader(dataset, batch, num_workers=workers, collate_fn=collator, **options))
    begun = time.monotonic()
    for _ in range(2 * max(1, workers)):
        next(loader)
    first, tokens = time.monotonic(), 0
    for made in loader:
        tokens += int(made["attention_mask"].sum())
    return {"tokens": tokens, "seconds": time.monotonic() - first, "first": first - begun}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4_000_000)
    parser.add_argument("--mean", type=int, default=400, help="mean tokens of a row")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--batch", type=int, default=16)
    given = parser.parse_args()
    speeds: dict[str, list[float]] = {}
    opening: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as tmp:
        rows = make(Path(tmp), given.tokens, given.mean)
        for _ in range(given.rounds):
            for name, way in ways(Path(tmp), given.batch).items():
                begun = time.monotonic()
                dataset, options = way()
                opening.setdefault(name, []).append(time.monotonic() - begun)
                run = once(dataset, options, given.batch, given.workers)
                speeds.setdefault(name, []).append(run["tokens"] / run["seconds"])
                opening[name][-1] += run["first"]
    report(given, rows, speeds, opening)


def report(
    given: argparse.Namespace, rows: int, speeds: dict[str, list[float]], opening: dict[str, list[float]]
) -> None:
    """The table and the JSON line."""
    import torch

    median = {name: statistics.median(values) for name, values in speeds.items()}
    print(f"\n{rows:,} rows of {given.mean} tokens on average, batches of {given.batch}, {given.workers} workers")
    print(f"{'':22}{'tokens/s':>12}{'of plain':>10}{'opened first':>14}{'again':>8}")
    ratios = {name: speed / median["plain files"] for name, speed in median.items()}
    for name, speed in median.items():
        again = statistics.median(opening[name][1:] or opening[name])
        wanted = f"  wanted: {WANTED:.2f}" if name.startswith("rows") else ""
        print(f"{name:22}{speed:12,.0f}{ratios[name]:10.2f}{opening[name][0]:12.2f} s{again:6.2f} s{wanted}")
    line = {
        "benchmark": "loader",
        "rows": rows,
        "mean_tokens": given.mean,
        "batch": given.batch,
        "workers": given.workers,
        "rounds": given.rounds,
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "tokens_per_second": {n: round(v) for n, v in median.items()},
        "ratios": {n: round(v, 3) for n, v in ratios.items()},
        "opening_seconds": {n: [round(v, 3) for v in values] for n, values in opening.items()},
    }
    print(json.dumps(line))


if __name__ == "__main__":
    main()
