"""Real text, scored with vLLM and with transformers: the same rows, and the same scores to 1e-4."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

import entrodrop_prep
from entrodrop_prep.demo.corpus import write_corpus
from entrodrop_prep.store.manifest import read
from entrodrop_prep.store.schema import SCORED
from entrodrop_prep.verification.run import verify
from helpers.models import rows_of, run_score, shards
from helpers.vllm import engines, quick_engines

pytestmark = pytest.mark.vllm

MODEL = Path(entrodrop_prep.__file__).parent / "demo" / "model"
TOKENS = 30_000


@pytest.fixture(scope="module", autouse=True)
def quick() -> Iterator[None]:
    with quick_engines():
        yield


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The demo's corpus, less of it, by each backend."""
    home = tmp_path_factory.mktemp("corpus")
    taken = write_corpus(home / "corpus.jsonl", AutoTokenizer.from_pretrained(MODEL), TOKENS)
    assert taken["tokens"] > 0.9 * TOKENS
    settings: dict[str, Any] = {"max_length": 256, "overlap": 32, "rows_per_shard": 4, "id_column": "name"}
    for backend in ("transformers", "vllm"):
        run_score(home / "corpus.jsonl", MODEL, home / backend, backend=backend, **settings)
    return {backend: home / backend for backend in ("transformers", "vllm")}


def test_rows_ids_and_masks_are_the_same(both: dict[str, Path]) -> None:
    one, other = (rows_of(out) for out in both.values())
    assert len(one) > 100
    assert max(row["window"] for row in one) > 3
    for row, same in zip(one, other, strict=True):
        for name in ("row_id", "id", "window", "input_ids", "loss_mask"):
            assert row[name] == same[name]
        for name in ("entropy", "logprob"):
            assert [value is None for value in row[name]] == [value is None for value in same[name]]
    assert [path.name for path in shards(both["vllm"])] == [path.name for path in shards(both["transformers"])]


@pytest.mark.parametrize("name", ["entropy", "logprob"])
def test_scores_are_the_same(both: dict[str, Path], name: str) -> None:
    one, other = (
        np.array([value for row in rows_of(out) for value in row[name] if value is not None]) for out in both.values()
    )
    assert len(one) > 0.9 * TOKENS
    assert one.std() > 1
    np.testing.assert_allclose(one, other, rtol=0, atol=1e-4)


def test_both_are_one_dataset_but_for_the_environment(both: dict[str, Path]) -> None:
    one, other = (read(out, SCORED) for out in both.values())
    assert one["identity"] == other["identity"]
    assert one["counts"] == other["counts"]
    assert [verify(str(out)).findings for out in both.values()] == [[], []]
    assert not engines()
