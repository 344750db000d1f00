"""Memory: bounded by a constant and some bytes a row, whatever the number of tokens.

Each run is a process of its own, which tells its own peak (VmHWM) when it has finished.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from entrodrop_prep.store.rows import Rows
from entrodrop_prep.store.scored import BATCH_TOKENS
from helpers.scored import VOCABULARY, some_rows, write_shards
from helpers.tokenizers import byte_bpe

pytestmark = pytest.mark.heavy
SMALL, BIG = 4_000_000, 40_000_000
ROWS_PER_SHARD = 250
CONSTANT, PER_ROW = 700 << 20, 48
"""Bytes that materialize takes at most, and more for each row."""


def peak_of(kind: str, settings: dict[str, Any]) -> int:
    """Bytes of memory that a process which runs it had at its peak."""
    command = [sys.executable, __file__, kind, json.dumps(settings)]
    paths = os.pathsep.join([str(Path(__file__).resolve().parents[1]), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": paths}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    return int(done.stdout.split()[-1])


def main(kind: str, settings: dict[str, Any]) -> None:
    if kind == "score":
        import torch

        from entrodrop_prep.config import ScoreConfig
        from entrodrop_prep.scoring.run import score

        torch.set_num_threads(1)
        score(ScoreConfig(backend="transformers", **settings))
    else:
        from entrodrop_prep.config import MaterializeConfig
        from entrodrop_prep.export.materialize import materialize

        materialize(MaterializeConfig(**settings))
    status = Path("/proc/self/status").read_text().splitlines()
    print(next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM")))


def shards_of(tokens: int) -> Iterator[Rows]:
    """Shards of rows of 300 to 500 tokens until there are ``tokens``."""
    made = index = 0
    while made < tokens:
        rows = some_rows(
            ROWS_PER_SHARD, seed=index % 3, lengths=(300, 500), first_row=index * ROWS_PER_SHARD, distinct=None
        )
        made, index = made + len(rows.input_ids), index + 1
        yield rows


@pytest.fixture(scope="module")
def scored(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    assert SMALL > 3 * BATCH_TOKENS
    folder = tmp_path_factory.mktemp("memory")
    return {n: write_shards(folder / str(n), shards_of(n), ROWS_PER_SHARD) for n in (SMALL, BIG)}


@pytest.mark.parametrize(
    "settings",
    [
        {"target": "both"},
        {"shuffle": "none", "scope": "row"},
        {"pack": 1000, "add_columns": ["position_ids"]},
    ],
    ids=str,
)
def test_materialize(settings: dict[str, Any], scored: dict[int, Path], tmp_path: Path) -> None:
    """A constant, whatever the tokens, and a few bytes a row."""
    for n in (SMALL, BIG):
        out = str(tmp_path / str(n))
        found = peak_of("materialize", {"scored": str(scored[n]), "out": out, "epochs": 1, "jobs": "2", **settings})
        assert found <= CONSTANT + PER_ROW * n // 400, found


def test_short_rows(tmp_path: Path) -> None:
    """Ten times the rows take at most 48 bytes a row more."""
    peaks = {}
    for rows in (300_000, 3_000_000):

        def shards(rows: int = rows) -> Iterator[Rows]:
            for first in range(0, rows, 100_000):
                yield some_rows(100_000, seed=first, lengths=(2, 6), first_row=first)

        scored = write_shards(tmp_path / f"scored-{rows}", shards(), 100_000)
        peaks[rows] = peak_of("materialize", {"scored": str(scored), "out": str(tmp_path / str(rows)), "epochs": 2})
    windows = 3_000_000 * 9 // 7
    assert peaks[3_000_000] <= CONSTANT + PER_ROW * windows, peaks


def test_score(tmp_path: Path) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=256,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    byte_bpe().save_pretrained(tmp_path / "model")
    words = np.array(["The", " sky", " is", " blue", " because", " air", " scatters", " short", " waves", "\n"])
    rng, peaks = np.random.default_rng(0), []
    for rows in (8_000, 80_000):
        with (tmp_path / f"{rows}.jsonl").open("w") as f:
            for i in range(rows):
                f.write(json.dumps({"text": "".join(rng.choice(words, 4 + i % 20)), "name": f"row {i}"}) + "\n")
        settings = {"source": str(tmp_path / f"{rows}.jsonl"), "model": str(tmp_path / "model"), "device": "cpu"}
        settings |= {"out": str(tmp_path / f"scored-{rows}"), "rows_per_shard": 500, "id_column": "name"}
        peaks.append(peak_of("score", settings))
    assert peaks[1] <= 1.1 * peaks[0], peaks


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]))
