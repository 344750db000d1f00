"""How fast ``score`` is, beside the bare engine and other ways to the same numbers, on one machine.

    python benchmarks/scoring.py vllm|transformers [--tokens 400000] [--rounds 3] [--vocabulary V]

Every way scores the same token lists: Python's own standard library, in pieces of uneven length. Each is a process of
its own, and starting it (imports, weights, a first small batch) is timed apart from scoring. The ways take turns, so
that what else the machine does hits all of them. Prints a table, and a JSON line of the medians and the ratios.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
DEMO_MODEL = ROOT / "entrodrop_prep" / "demo" / "model"
RIVALS = Path(__file__).resolve().parent / "rivals"
WANTED = {
    "vllm": {"bare engine": 0.93, "transformers loop": 1.5, "prompt_logprobs=20": 1.8},
    "transformers": {"transformers loop": 1.3, "plain loop": 2.0},
}
"""How many times as fast as them each backend should be; beside these, others stand for comparison."""
SAMPLE_ROWS = 12


def make_model(directory: Path, vocabulary: int | None) -> Path:
    """The demo's model, or one of its shape with random weights and another vocabulary."""
    shutil.copytree(DEMO_MODEL, directory)
    if vocabulary:
        from transformers import AutoConfig, AutoModelForCausalLM

        config = AutoConfig.from_pretrained(directory)
        config.vocab_size = vocabulary
        AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    return directory


def make_corpus(directory: Path, tokens: int) -> tuple[Path, Path]:
    """Rows of 30 to 3,000 characters as text, and the same rows as the program tokenizes them."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(DEMO_MODEL)
    generator = np.random.default_rng(0)
    texts: list[str] = []
    lists: list[list[int]] = []
    count = 0
    for file in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        text, start = file.read_text(encoding="utf-8", errors="replace"), 0
        while start < len(text) and count < tokens:
            size = int(np.clip(generator.lognormal(6.6, 0.8), 30, 3000))
            ids = [*tokenizer(text[start : start + size])["input_ids"], tokenizer.eos_token_id]
            if 2 <= len(ids) <= 1024:
                texts.append(text[start : start + size])
                lists.append(ids)
                count += len(ids)
            start += size
    order = generator.permutation(len(texts))
    rows, ids_file = directory / "rows.jsonl", directory / "tokens.jsonl"
    rows.write_text("".join(json.dumps({"text": texts[i]}) + "\n" for i in order))
    ids_file.write_text("".join(json.dumps(lists[i]) + "\n" for i in order))
    return rows, ids_file


def run_rival(script: str, *arguments: str) -> dict[str, float]:
    """The JSON line that a rival prints last."""
    done = subprocess.run(
        [sys.executable, str(RIVALS / script), *arguments], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"{script} failed:\n{done.stderr[-3000:]}")
    return dict(json.loads(done.stdout.strip().splitlines()[-1]))


def run_ours(backend: str, rows: Path, model: Path, out: Path) -> dict[str, float]:
    """The whole command: read, tokenize, score, write."""
    command = [sys.executable, "-m", "entrodrop_prep", "score", str(rows), "--model", str(model), "--out", str(out)]
    shards = "100" if backend == "vllm" else "1000"
    begun = time.monotonic()
    done = subprocess.run(
        [*command, "--backend", backend, "--dtype", "float32", "--overwrite", "--rows-per-shard", shards],
        capture_output=True,
        text=True,
        check=False,
    )
    whole = time.monotonic() - begun
    said = re.search(r"scored ([\d,]+) tokens in ([\d.]+) s", done.stdout)
    if done.returncode or said is None:
        raise SystemExit(f"score failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    seconds = float(said[2])
    return {"tokens": int(said[1].replace(",", "")), "seconds": seconds, "start": whole - seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("backend", choices=tuple(WANTED))
    parser.add_argument("--tokens", type=int, default=400_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--vocabulary", type=int, default=None, help="random weights with so many tokens")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as tmp:
        model = make_model(Path(tmp) / "model", options.vocabulary)
        rows, tokens = make_corpus(Path(tmp), options.tokens)

        def rival(script: str, *arguments: str) -> Callable[[], dict[str, float]]:
            return lambda: run_rival(script, str(model), str(tokens), *arguments)

        ways = {
            "score": lambda: run_ours(options.backend, rows, model, Path(tmp) / "scored"),
            "transformers loop": rival("transformers_loop.py"),
            "transformers backend": rival("transformers_backend.py"),
        }
        if options.backend == "vllm":
            ways |= {"bare engine": rival("bare_engine.py"), "prompt_logprobs=20": rival("top_k.py", "20")}
        else:
            ways |= {"plain loop": rival("plain_loop.py")}
        runs: dict[str, list[dict[str, float]]] = {name: [] for name in ways}
        for _ in range(options.rounds):
            for name, way in ways.items():
                runs[name].append(way())
        if options.backend == "vllm":
            runs["prompt_logprobs=-1"] = [rival("top_k.py", "-1", str(SAMPLE_ROWS))()]
    report(options.backend, runs, model_of(options.vocabulary), options.rounds)


def model_of(vocabulary: int | None) -> str:
    """What was scored with, in words."""
    return f"the demo model's shape with {vocabulary} tokens" if vocabulary else "the demo model (2,048 tokens)"


def report(backend: str, runs: dict[str, list[dict[str, float]]], model: str, rounds: int) -> None:
    """The table and the JSON line."""
    import os

    import torch

    speeds = {name: statistics.median(r["tokens"] / r["seconds"] for r in found) for name, found in runs.items()}
    peaks = {name: round(max(r["mib"] for r in found)) for name, found in runs.items() if "mib" in found[0]}
    wanted = WANTED[backend]
    print(f"{'':24} {'tokens':>10} {'seconds':>8} {'tokens/s':>9} {'start s':>8} {'MiB':>7} {'ours is':>8}  wanted")
    for name, found in runs.items():
        seconds = statistics.median(r["seconds"] for r in found)
        start = statistics.median(r["start"] for r in found)
        ratio = speeds["score"] / speeds[name]
        bound = f"{wanted[name]:.2f}" if name in wanted else ""
        print(
            f"{name:24} {found[0]['tokens']:>10,} {seconds:>8.1f} {speeds[name]:>9,.0f} {start:>8.1f} "
            f"{peaks.get(name, ''):>7} {ratio:>8.2f}  {bound}"
        )
    line: dict[str, Any] = {
        "benchmark": f"score --backend {backend}",
        "model": model,
        "rounds": rounds,
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "tokens": runs["transformers loop"][0]["tokens"],
        "tokens_per_second": {name: round(speed) for name, speed in speeds.items()},
        "peak_mib": peaks,
        "ratios": {name: round(speeds["score"] / speed, 3) for name, speed in speeds.items() if name != "score"},
    }
    print(json.dumps(line))


if __name__ == "__main__":
    main()
