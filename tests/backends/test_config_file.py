"""A config.json with numbers that no model has is one line at once, whatever a library would build from it."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from entrodrop_prep.backends.config_file import MOST_BYTES, check_config
from entrodrop_prep.backends.model import inspect_model
from entrodrop_prep.errors import ModelError
from helpers.models import save_model, settings_for, tiny_llama


@pytest.mark.parametrize(
    "changed",
    [
        *({"vocab_size": n} for n in (10**12, 2**31 - 1, 0, -5, 10**300)),
        *({"hidden_size": 10**9}, {"num_hidden_layers": 10**9}, {"n_layer": 10**6}, {"num_attention_heads": 10**9}),
        *({"intermediate_size": 10**12}, {"head_dim": -(10**12)}, {"n_embd": 1e18}, {"num_local_experts": 10**7}),
        *({"text_config": {"vocab_size": 10**10}}, {"text_config": {"a": {"num_layers": 10**6}}}),
        *({"intermediate_size": [64, 10**10]}, {"num_key_value_heads": 10**8}, {"vocab_size": float("inf")}),
    ],
)
def test_numbers_that_no_model_has(changed: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": 100, **changed}))
    with pytest.raises(ModelError, match=r"^m: its config\.json has (a )?\w+ .*; fetch the model again") as caught:
        check_config(tmp_path / "config.json", "m")
    assert len(str(caught.value)) < 250


@pytest.mark.parametrize(
    "text", ["", "[]", "5", "null", "{", "\ud83d", '{"a":' * 100_000, "[" * 100_000, '{"a": ' + "9" * 5000 + "}"]
)
def test_files_that_are_none(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(ModelError, match=r"^m: its config\.json (cannot be read|is no table)"):
        check_config(tmp_path / "config.json", "m")


def test_a_file_that_is_too_long(tmp_path: Path) -> None:
    with (tmp_path / "config.json").open("wb") as f:
        f.truncate(MOST_BYTES + 1)
    with pytest.raises(ModelError, match="more than 16 MiB"):
        check_config(tmp_path / "config.json", "m")


def test_models_that_there_are(tmp_path: Path) -> None:
    for config in (
        {"vocab_size": 262_400, "hidden_size": 16_384, "num_hidden_layers": 126, "max_position_embeddings": 10**18},
        {"vocab_size": 1, "num_key_value_heads": None, "sliding_window": -1, "num_attention_heads": [12, 20]},
        {},
    ):
        (tmp_path / "config.json").write_text(json.dumps(config))
        check_config(tmp_path / "config.json", "m")


def test_before_anything_is_built_from_it(tmp_path: Path) -> None:
    directory = save_model(tmp_path / "model", tiny_llama(64))
    whole = json.loads((directory / "config.json").read_text())
    config = settings_for("rows.jsonl", directory, tmp_path / "out")
    assert inspect_model(config).vocab_size == 64
    for changed, says in (
        ({"num_hidden_layers": 10**9}, "num_hidden_layers 1,000,000,000, which no model has"),
        ({"text_config": 5}, "names no vocab_size for text"),
        ({"num_attention_heads": 0}, "its files are not as they should be"),
        ({"vocab_size": "x"}, "its files are not as they should be"),
    ):
        (directory / "config.json").write_text(json.dumps({**whole, **changed}))
        begun = time.monotonic()
        with pytest.raises(ModelError, match=says):
            inspect_model(config)
        assert time.monotonic() - begun < 30
