"""``schemas/`` is made from the code, and real directories fit it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pyarrow.parquet as pq
import pytest

from entrodrop_prep import MaterializeConfig, materialize
from entrodrop_prep.store.json_schemas import schemas, write_schemas
from helpers.models import run_score, write_rows

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "entrodrop_prep" / "demo" / "model"


def test_the_schemas_are_in_sync(tmp_path: Path) -> None:
    made = {p.name: p.read_bytes() for p in write_schemas(str(tmp_path))}
    kept = {p.name: p.read_bytes() for p in (ROOT / "schemas").iterdir()}
    assert made == kept, "run `make docs`"


@pytest.mark.parametrize("name", sorted(schemas()))
def test_they_are_json_schemas(name: str) -> None:
    jsonschema.Draft202012Validator.check_schema(schemas()[name])


VALIDATORS = {name: jsonschema.Draft202012Validator(schema) for name, schema in schemas().items()}


def check(name: str, value: Any) -> None:
    VALIDATORS[name].validate(json.loads(json.dumps(value)))


@pytest.fixture(scope="module")
def scored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two shards with ids, a kept column, a split document and a rejected row."""
    folder = tmp_path_factory.mktemp("schemas")
    texts = [json.loads(line)["text"] for line in (ROOT / "examples" / "rows.jsonl").read_text().splitlines()]
    rows = [{"name": f"doc {i}", "text": text, "stars": i} for i, text in enumerate([*texts[:5], None])]
    source = write_rows(folder / "rows.jsonl", rows)
    settings = {"max_length": 64, "rows_per_shard": 3, "id_column": "name", "keep_columns": ("stars",)}
    summary = run_score(source, MODEL, folder / "scored", **settings, on_bad_row="skip")
    assert summary.counts["bad_rows"] == 1
    assert summary.counts["windows"] > summary.counts["rows"]
    return summary.directory


def test_a_scored_directory_fits(scored: Path) -> None:
    described = json.loads((scored / "manifest.json").read_text())
    check("manifest.json", described)
    shards = sorted(scored.glob("shard-*.parquet"))
    assert len(shards) == 2
    for shard in shards:
        for row in pq.read_table(shard).to_pylist():
            check("scored.json", row)
            assert set(row) == {"row_id", "id", "window", "input_ids", "entropy", "logprob", "loss_mask", "stars"}


@pytest.mark.parametrize(
    "recipe",
    [
        {},
        {"target": "inputs", "rates": (0.0, 1.0), "protect": "special,5"},
        {"target": "both", "select": "random", "progress": "row", "drop_token": "7", "shuffle": "none"},
        {"threshold": 6.0, "keep_surprising": 9.0, "horizon": 5, "only_epochs": "1"},
        {"quantile": 0.0, "select": "high-entropy"},
        {"add_columns": ("n_trainable", "position_ids", "seq_lengths"), "rows_multiple": 2},
        {"add_columns": ("position_ids",), "pack": 64, "layout": ("concatenated", "jsonl")},
    ],
)
def test_a_masked_directory_fits(scored: Path, tmp_path: Path, recipe: dict[str, Any]) -> None:
    summary = materialize(MaterializeConfig(scored=str(scored), out=str(tmp_path / "masked"), epochs=2, **recipe))
    described = json.loads((summary.directory / "manifest.json").read_text())
    check("manifest.json", described)
    check("recipe.json", described["recipe"])
    for file in sorted(summary.directory.glob("epoch_*/*.parquet")):
        for row in pq.read_table(file).to_pylist():
            check("masked.json", row)


def test_a_recipe_file_that_fits_is_taken(tmp_path: Path) -> None:
    recipe = {"epochs": 3, "target": "inputs", "quantile": 0.25, "rates": [0.0, 0.1, 0.4], "seed": 5}
    check("recipe.json", recipe)
    (tmp_path / "recipe.json").write_text(json.dumps(recipe))
    config = MaterializeConfig.load(str(tmp_path / "recipe.json"), scored="scored", out="masked", seed=6)
    assert (config.epochs, config.target, config.rates, config.seed) == (3, "inputs", (0.0, 0.1, 0.4), 6)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("recipe.json", {"quantil": 0.5}),
        ("recipe.json", {"quantile": 2}),
        ("recipe.json", {"target": "label"}),
        ("recipe.json", {"out": "masked"}),
        ("masked.json", {"input_ids": [1], "attention_mask": [1], "labels": [-100], "token_type_ids": [0]}),
        ("masked.json", {"input_ids": [1], "labels": [-100]}),
        ("scored.json", {"row_id": 0, "window": 0, "input_ids": [1], "entropy": ["x"], "loss_mask": [False]}),
        ("manifest.json", {"schema": "scored/2"}),
    ],
)
def test_what_does_not_fit_is_refused(name: str, value: dict[str, Any]) -> None:
    with pytest.raises(jsonschema.ValidationError):
        check(name, value)
