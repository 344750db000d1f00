"""Booby-trapped input: code that comes with a model, a tokenizer or rows is run only where that was asked for.

What is refused with a line is in the table of tests/helpers/bad_input.py; here are traps beside input that is good.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from entrodrop_prep import cli
from helpers.bad_input import Trap, config, model_code, typed
from helpers.models import save_model, tiny_llama

ROWS = ["w5 w6 w7", "w8 w9"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"), tiny_llama(61, context=32))


@pytest.fixture(autouse=True)
def here(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder with ``model`` and ``data/rows.parquet``; a trap that goes off there leaves ``sprung``."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    shutil.copytree(model, "model")
    os.mkdir("data")
    pq.write_table(pa.table({"text": ROWS}), "data/rows.parquet")


def score(*flags: str) -> int:
    given = ["score", "data", "--model", "model", "--out", "out", "--backend", "transformers", "--device", "cpu"]
    return cli.run([*given, *flags])


def pickled_weights() -> None:
    Path("model/pytorch_model.bin").write_bytes(pickle.dumps(Trap()))
    index = {"metadata": {}, "weight_map": {"lm_head.weight": "pytorch_model.bin"}}
    Path("model/pytorch_model.bin.index.json").write_text(json.dumps(index))


def script() -> None:
    Path("data/data.py").write_text("open('sprung', 'w')\n")


def metadata(**values: str) -> Callable[[], None]:
    """A Parquet file that says something else of itself."""
    return lambda: pq.write_table(pa.table({"text": ROWS}).replace_schema_metadata(values), "data/rows.parquet")


def extension(name: str) -> Callable[[], object]:
    """A column of an extension type whose parameters are a pickle."""
    return lambda: (typed(name)(), os.replace("a.parquet", "data/rows.parquet"))


@pytest.mark.parametrize(
    "set_trap",
    [
        *(model_code, pickled_weights, script),
        *map(extension, ("arrow.py_extension_type", "unheard.of")),
        metadata(pandas="{"),
        metadata(pandas='{"index_columns": ["absent"], "columns": [{"name": 7}]}'),
        metadata(huggingface='{"info": {"features": {"text": {"_type": "Image"}}}}'),
    ],
    ids=[
        *("code of a model", "pickles beside the weights", "a script beside the rows"),
        *("a pickled type", "an unknown type"),
        *("broken pandas metadata", "wrong pandas metadata", "other features"),
    ],
)
def test_a_trap_does_not_go_off(set_trap: Callable[[], object]) -> None:
    set_trap()
    assert score() == 0
    assert not Path("sprung").exists()
    found = pq.read_table("out/shard-00000.parquet")
    assert found["input_ids"].to_pylist() == [[5, 6, 7, 1], [8, 9, 1]]


def test_the_traps_work() -> None:
    """With the flags that allow them, and without the code that keeps from them."""
    model_code()
    config(model_type="unheard_of")()
    score("--trust-remote-code")
    assert Path("sprung").exists()
    os.unlink("sprung")
    pickle.loads(pickle.dumps(Trap()))
    assert Path("sprung").exists()
