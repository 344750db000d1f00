"""Protected ids: special tokens, and all that a model stops with, flagged special or not."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from entrodrop_prep.config import MaterializeConfig
from entrodrop_prep.errors import ModelError
from entrodrop_prep.export.materialize import materialize
from entrodrop_prep.scoring.protected import stop_ids
from entrodrop_prep.store import manifest
from entrodrop_prep.store.schema import MASKED, SCORED
from entrodrop_prep.verification.run import verify
from helpers.models import EOS, random_rows, run_score, shards, words, write_rows

V = 61


def files(directory: Path, config: Any, generation: Any = None) -> Path:
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    if generation is not None:
        (directory / "generation_config.json").write_text(json.dumps(generation))
    return directory


@pytest.mark.parametrize(
    ("config", "generation", "expected"),
    [
        ({}, None, []),
        ({"eos_token_id": 7}, None, [7]),
        ({"eos_token_id": [7, 9]}, None, [7, 9]),
        ({"eos_token_id": 7}, {"eos_token_id": [9, 7, 8]}, [7, 8, 9]),
        ({"eos_token_id": None}, {"eos_token_id": None}, []),
        ({"text_config": {"eos_token_id": 5}}, {}, [5]),
        ({"eos_token_id": 0, "llm_config": {"eos_token_id": [5]}}, {"eos_token_id": 6}, [0, 5, 6]),
        ({"vision_config": {"eos_token_id": 5}}, None, []),
    ],
)
def test_stop_ids(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, config: Any, generation: Any, expected: list[int]
) -> None:
    assert stop_ids(str(files(tmp_path / "m", config, generation)), None, V) == expected
    assert not caplog.records


@pytest.mark.parametrize("value", ["</s>", -1, V, 7.0, True, [7, "x"], {"a": 1}, [[7]]])
def test_what_is_no_id_is_left_out_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture, value: Any) -> None:
    found = stop_ids(str(files(tmp_path / "m", {}, {"eos_token_id": value})), None, V)
    assert found == ([7] if value == [7, "x"] else [])
    assert "eos_token_id of generation_config.json holds" in caplog.text


@pytest.mark.parametrize("content", [b"{", b"[1]", b"\xff", b"[" * 100_000])
def test_a_damaged_generation_config(tmp_path: Path, content: bytes) -> None:
    directory = files(tmp_path / "m", {})
    (directory / "generation_config.json").write_bytes(content)
    with pytest.raises(ModelError, match=r"generation_config.json (is not|holds no) JSON"):
        stop_ids(str(directory), None, V)


def test_masks_leave_what_a_model_stops_with(tmp_path: Path, model: Path) -> None:
    """Ids 7 and 9 are plain words to the tokenizer. What a scored directory lists decides, the model's files do not."""
    path = shutil.copytree(model, tmp_path / "model")
    config = json.loads((path / "config.json").read_text())
    files(path, {**config, "eos_token_id": 7}, {"eos_token_id": [EOS, 9]})
    rows = [[*ids, 7, 9, 12] for ids in random_rows(20, V, longest=20)]
    source = write_rows(tmp_path / "rows.jsonl", [{"text": words(ids)} for ids in rows])
    run_score(source, path, tmp_path / "scored")
    special = manifest.read(tmp_path / "scored", SCORED)["tokenizer"]["special_ids"]
    assert {EOS, 7, 9} <= set(special)
    assert 12 not in special
    recipe: dict[str, Any] = {"scored": str(tmp_path / "scored"), "schedule": "constant", "max_rate": 1.0}
    recipe |= {"quantile": 1.0, "epochs": 1}
    kept = {}
    for protect in ("special", "none"):
        materialize(MaterializeConfig(**recipe, out=str(tmp_path / protect), protect=protect))
        assert verify(str(tmp_path / protect), str(tmp_path / "scored")).findings == []
        labels = [
            label
            for file in manifest.read(tmp_path / protect, MASKED)["files"]
            if file["file"].endswith(".parquet")
            for row in read(tmp_path / protect / file["file"])
            for label in row
        ]
        kept[protect] = {i: labels.count(i) for i in (7, 9, 12)}
    places = [i for ids in rows for i in [*ids, EOS][1:]]
    assert kept["special"][7] == places.count(7)
    assert kept["special"][9] == places.count(9)
    assert kept["special"][12] == 0
    assert max(kept["none"].values()) < len(rows)  # a row that would lose all keeps one
    # No part of the identity: another list in the model's files changes no scored row, and is no mismatch.
    before = [path.read_bytes() for path in shards(tmp_path / "scored")]
    files(path, {**config, "eos_token_id": 7}, {"eos_token_id": 11})
    assert run_score(source, path, tmp_path / "scored").already_complete
    assert [path.read_bytes() for path in shards(tmp_path / "scored")] == before


def read(path: Path) -> list[list[int]]:
    import pyarrow.parquet as pq

    labels: list[list[int]] = pq.read_table(path).column("labels").to_pylist()
    return labels
