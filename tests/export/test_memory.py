"""Memory: ten times the rows take at most 1.1 times the memory, both corpora being larger than the buffers.

Each run is a process of its own, which tells its own peak (VmHWM) when it has finished.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from entrodrop_prep.export.order import BUCKET_BYTES, ORDER_BYTES
from entrodrop_prep.export.packing import BLOCK_TOKENS
from entrodrop_prep.store.rows import Rows
from entrodrop_prep.store.scored import BATCH_TOKENS
from helpers.scored import VOCABULARY, some_rows, write_shards
from helpers.tokenizers import byte_bpe

pytestmark = pytest.mark.heavy
SMALL, MEDIUM, BIG = 4_000_000, 12_000_000, 40_000_000
BYTES_PER_TOKEN = 13
ROWS_PER_SHARD = 250
BENCHMARK = Path(__file__).resolve().parents[2] / "benchmarks" / "row_order.py"


def peak_of(kind: str, settings: dict[str, Any]) -> int:
    """Bytes of memory that a process which runs it had at its peak."""
    command = [sys.executable, __file__, kind, json.dumps(settings)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
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
    assert SMALL * BYTES_PER_TOKEN > 1.5 * BUCKET_BYTES
    assert SMALL > 3 * BATCH_TOKENS
    folder = tmp_path_factory.mktemp("memory")
    return {n: write_shards(folder / str(n), shards_of(n), ROWS_PER_SHARD) for n in (SMALL, MEDIUM, BIG)}


@pytest.mark.parametrize("settings", [{"target": "both"}, {"shuffle": "none", "scope": "row"}], ids=str)
def test_materialize(settings: dict[str, Any], scored: dict[int, Path], tmp_path: Path) -> None:
    peaks, more = {}, {"epochs": 1, **settings}
    for n in (SMALL, BIG):
        peaks[n] = min(
            peak_of("materialize", {"scored": str(scored[n]), "out": str(tmp_path / f"{n}-{run}"), **more})
            for run in range(2)
        )
    assert peaks[BIG] < 0.9 * BIG * BYTES_PER_TOKEN
    assert peaks[BIG] <= 1.1 * peaks[SMALL], peaks


def test_the_order_of_short_rows(tmp_path: Path) -> None:
    """The benchmark's bounds, with fewer rows; they are more than one bucket."""
    command = [sys.executable, str(BENCHMARK), "--rows", "1000000", "--tmp", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["order"]["rows"] == told["materialize"]["rows"] == 1_000_000
    assert 0 < told["order"]["order_bytes"] <= ORDER_BYTES


def test_packed(scored: dict[int, Path], tmp_path: Path) -> None:
    """Both corpora are larger than a block of rows that are packed together."""
    assert MEDIUM > 2 * BLOCK_TOKENS
    peaks = {}
    for n in (MEDIUM, BIG):
        settings = {"scored": str(scored[n]), "epochs": 1, "pack": 1000, "add_columns": ["position_ids"]}
        peaks[n] = min(peak_of("materialize", {**settings, "out": str(tmp_path / f"{n}-{run}")}) for run in range(2))
    assert peaks[BIG] < 0.9 * BIG * BYTES_PER_TOKEN
    assert peaks[BIG] <= 1.1 * peaks[MEDIUM], peaks


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
