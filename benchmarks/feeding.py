"""How fast ``score`` is without a model: reading, tokenizing and writing, beside an engine that answers at once.

    python benchmarks/feeding.py [--tokens 4000000] [--rounds 3] [--rows text|chat|pairs|ids] [--profile]

The rows are Python's own standard library in pieces of uneven length, tokenized with the demo's tokenizer. Prints
a line a round, and a JSON line of the medians.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import os
import pstats
import resource
import statistics
import sysconfig
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from entrodrop_prep import backends
from entrodrop_prep.config import ScoreConfig
from entrodrop_prep.scoring.run import score

DEMO_MODEL = Path(__file__).resolve().parent.parent / "entrodrop_prep" / "demo" / "model"
WANTED = 400_000


class InstantBackend:
    """Answers with numbers that lie ready, about as hard to compress as scores are."""

    step_tokens = 8192

    def __init__(self, config: Any, info: Any) -> None:
        self._numbers = np.random.default_rng(0).gamma(1.0, 1.5, 1 << 20).clip(0, np.log(info.vocab_size))
        self._numbers = self._numbers.astype(np.float32)

    def environment(self) -> dict[str, str]:
        """As little as a footer needs."""
        return {"backend": "instant", "device": "none"}

    def score(self, jobs: Any, done: Any) -> Any:
        """Each job at once."""
        while (job := jobs.take()) is not None:
            done(job, sum(len(s) for s in job.sequences))
            yield job, [(self._numbers[: len(s) - 1], -self._numbers[1 : len(s)]) for s in job.sequences]

    def close(self) -> None:
        """Nothing was started."""


def make_rows(path: Path, tokens: int, kind: str) -> Path:
    """Rows of pieces of 30 to 1,500 characters, about ``tokens`` tokens in all, as JSON Lines."""
    generator, left = np.random.default_rng(0), int(tokens * 2.9)
    pieces = []
    for file in sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py")):
        text, start = file.read_text(encoding="utf-8", errors="replace"), 0
        while start < len(text) and left > 0:
            size = int(np.clip(generator.lognormal(5.8, 0.8), 30, 1500))
            pieces.append(text[start : start + size])
            start, left = start + size, left - size
    roles = ("user", "assistant")
    if kind == "chat":
        groups = [pieces[i : i + 2] for i in range(0, len(pieces) - 1, 2)]
        rows = [{"messages": [{"role": roles[i % 2], "content": p} for i, p in enumerate(g)]} for g in groups]
    elif kind == "pairs":
        rows = [{"prompt": p, "completion": c} for p, c in zip(pieces[::2], pieces[1::2], strict=False)]
    elif kind == "ids":
        from transformers import AutoTokenizer

        rows = [{"input_ids": ids} for ids in AutoTokenizer.from_pretrained(DEMO_MODEL)(pieces)["input_ids"]]
    else:
        rows = [{"text": piece} for piece in pieces]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def processor_seconds() -> float:
    """Of this process and those it waited for."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in used)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=4_000_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rows", choices=("text", "chat", "pairs", "ids"), default="text")
    parser.add_argument("--profile", action="store_true", help="print where the first round's time went")
    options = parser.parse_args()
    backends.BACKENDS["transformers"] = f"{__name__}:InstantBackend"
    speeds, busy = [], []
    with tempfile.TemporaryDirectory() as name:
        source = make_rows(Path(name) / "rows.jsonl", options.tokens, options.rows)
        for n in range(options.rounds):
            config = ScoreConfig(
                source=str(source),
                model=str(DEMO_MODEL),
                out=str(Path(name) / f"out-{n}"),
                backend="transformers",
                chat_template="chatml" if options.rows == "chat" else None,
            )
            profile = cProfile.Profile() if options.profile and not n else None
            started, used = time.perf_counter(), processor_seconds()
            if profile:
                profile.enable()
            summary = score(config)
            if profile:
                profile.disable()
                pstats.Stats(profile).sort_stats("cumulative").print_stats(40)
            wall, used = time.perf_counter() - started, processor_seconds() - used
            speeds.append(summary.scored_tokens / wall)
            busy.append(used / summary.scored_tokens * 1e9)
            print(
                f"{summary.scored_tokens:,} tokens in {wall:.1f} s: "
                f"{speeds[-1]:,.0f} tokens/s, {busy[-1]:.0f} ns of a processor for a token"
            )
    figures = {
        "benchmark": "feeding",
        "rows": options.rows,
        "cores": os.cpu_count(),
        "tokens_per_second": round(statistics.median(speeds)),
        "processor_ns_a_token": round(statistics.median(busy)),
        "wanted": WANTED,
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
