"""The headline arms on a model and rows of one's own, by the steps of the study: ``make study-gpu MODEL=... DATA=...``

    python -m study.own MODEL DATA.jsonl OUT [--epochs 12] [--rate 3e-5] [--seeds 3] [--grid]

Copies leave, a tenth of the rows each goes to dev and test by a hash, the rest is trained on. Every arm has the second
of its strengths at one learning rate; with ``--grid`` nine trials each, chosen on dev. Every model trains whole, in
float32 weights: 24 bytes of memory a parameter, beside activations.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from entrodrop_prep.config.settings import is_number
from entrodrop_prep.errors import EntrodropError, SourceError
from entrodrop_prep.sources.json_rows import JsonReader
from study import corpus, train
from study.arms import EPOCHS
from study.network import of_transformers
from study.page import figures
from study.prepare import arrays_of

SHARES = {"dev": 0.1, "test": 0.2}
"""A row goes to the first part whose number is above its hash."""


def split(data: Path, out: Path) -> dict[str, int]:
    """Write ``own-PART.jsonl`` for each part; returns their rows.

    Raises:
        SourceError: a line is no JSON object, or a part would have no row.
    """
    lines: dict[str, str] = {}
    for number, line in enumerate(data.read_bytes().split(b"\n"), start=1):
        if line.strip():
            row, problem = JsonReader().parse(line)
            if row is None:
                raise SourceError(str(problem), where=f"{data}:{number}", fix="correct it, or take it out")
            lines[line.decode()] = "\n".join(_texts(row))
    kept = corpus.without_copies(lines.items())
    parts: dict[str, list[str]] = {part: [] for part in corpus.PARTS}
    for line, _ in kept:
        part = next((p for p, share in SHARES.items() if corpus.fraction(line) < share), "train")
        parts[part].append(f"{line}\n")
    for part, some in parts.items():
        if not some:
            raise SourceError(f"no row is left for {part} of {len(lines)} rows", where=str(data), fix="give more rows")
        (out / f"own-{part}.jsonl").write_text("".join(some), encoding="utf-8")
    return {part: len(some) for part, some in parts.items()}


def _texts(value: Any) -> list[str]:
    """Every text in a row."""
    if isinstance(value, dict | list):
        return [t for v in (value.values() if isinstance(value, dict) else value) for t in _texts(v)]
    return [value] if isinstance(value, str) else []


def own(
    model: Path, data: Path, out: Path, runs: list[train.Run], *, epochs: int, max_length: int, device: str
) -> dict[str, Any]:
    """Split, score, train ``runs`` and write ``own-MODEL.json`` in ``out``; returns what it holds."""
    out.mkdir(parents=True, exist_ok=True)
    print(", ".join(f"{part} {rows:,} rows" for part, rows in split(data, out).items()), flush=True)
    size = model.resolve().name.replace("-", "_")
    arrays_of(model, out, "own", size, runs, epochs, max_length=max_length, device=device)
    other = of_transformers(model, device)
    arrays = out / f"arrays-own-{size}"
    return train.study(arrays, out / f"own-{size}.json", runs, epochs=epochs, models=1, device=device, other=other)


def _count(text: str) -> int:
    if not (is_number(text) and int(text)):
        raise argparse.ArgumentTypeError(f"{text!r} is no number from 1 on")
    return int(text)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="directory of a causal language model and its tokenizer")
    parser.add_argument("data", type=Path, help="JSON lines, in any row format of `entrodrop score`")
    parser.add_argument("out", type=Path, help="directory for rows, scores and results")
    parser.add_argument("--epochs", type=_count, default=EPOCHS, help="epochs of each run (%(default)s)")
    parser.add_argument("--max-length", type=int, default=512, help="longest row in tokens (%(default)s)")
    cuda = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=cuda, help="where to score and train (%(default)s)")
    parser.add_argument("--rate", type=float, default=3e-5, help="learning rate without --grid (%(default)s)")
    parser.add_argument(
        "--seeds", type=_count, default=3, help="training runs an arm, each with a seed of its own (%(default)s)"
    )
    parser.add_argument("--grid", action="store_true", help="nine trials an arm, learning rates 1e-5 to 1e-4")
    given = parser.parse_args()
    if not given.model.is_dir():
        parser.error(f"{given.model} is no directory of a model")
    if not given.data.is_file():
        parser.error(f"{given.data} is no file of rows")
    if given.out.exists() and not given.out.is_dir():
        parser.error(f"{given.out} is no directory")
    runs = train.headline(given.rate, given.seeds)
    if given.grid:
        runs = train.planned([r.arm for r in runs if r.seed == 1], "own")
    try:
        own(
            given.model, given.data, given.out, runs,
            epochs=given.epochs, max_length=given.max_length, device=given.device,
        )  # fmt: skip
    except EntrodropError as e:
        parser.exit(2, f"error: {e}\n")
    print(figures(sorted(given.out.glob("own-*.json"))))
