"""Common readers of Parquet give the rows that pyarrow gives: types, nulls and order are not special to one of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import duckdb
import pandas
import polars
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from entrodrop_prep.config import MaterializeConfig
from entrodrop_prep.export.materialize import materialize
from helpers.scored import some_rows, write_scored

COLUMNS = ["input_ids", "attention_mask", "labels"]
Rows = list[dict[str, Any]]
PARTS = ["epoch_000", "epoch_001", "epoch_002", "epoch_003", "validation"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``scored`` with ids, and ``masked``: four epochs of two files each, a validation split, all of it as one."""
    made = tmp_path_factory.mktemp("readers")
    write_scored(made / "scored", some_rows(40, lengths=(2, 20)), rows_per_shard=16, with_id=True)
    write_scored(made / "held", some_rows(15, seed=7), rows_per_shard=16)
    settings = {"epochs": 4, "rows_per_shard": 30, "schedule": "linear", "max_rate": 1, "target": "both"}
    paths = {"scored": str(made / "scored"), "eval": str(made / "held"), "out": str(made / "masked")}
    materialize(MaterializeConfig(**paths, **settings, layout=("concatenated",)))
    return made


@pytest.fixture
def cache(tmp_path: Path) -> dict[str, str]:
    return {"cache_dir": str(tmp_path / "cache")}


def rows_in(*folders: Path) -> Rows:
    """What pyarrow reads, file by file."""
    files = [file for folder in folders for file in sorted(folder.glob("*.parquet"))]
    assert files
    return [row for file in files for row in pq.read_table(file).to_pylist()]


def by_pandas(folder: Path) -> Rows:
    frames = [pandas.read_parquet(file) for file in sorted(folder.glob("*.parquet"))]
    return pa.Table.from_pandas(pandas.concat(frames), preserve_index=False).to_pylist()


def by_pandas_at_once(folder: Path) -> Rows:
    return pa.Table.from_pandas(pandas.read_parquet(sorted(folder.glob("*.parquet")))).to_pylist()


def by_polars(folder: Path) -> Rows:
    return list(polars.read_parquet(folder / "*.parquet").to_dicts())


def by_lazy_polars(folder: Path) -> Rows:
    return list(polars.scan_parquet(folder / "*.parquet").collect().to_dicts())


def by_duckdb(folder: Path) -> Rows:
    with duckdb.connect() as connection:
        found = connection.execute("SELECT * FROM read_parquet(?)", [f"{folder}/*.parquet"])
        names = [column[0] for column in found.description]
        return [dict(zip(names, row, strict=True)) for row in found.fetchall()]


READERS = [by_pandas, by_pandas_at_once, by_polars, by_lazy_polars, by_duckdb]


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("part", PARTS)
def test_masked_rows(reader: Callable[[Path], Rows], part: str, folder: Path) -> None:
    found = reader(folder / "masked" / part)
    assert list(found[0]) == COLUMNS
    assert found == rows_in(folder / "masked" / part)


@pytest.mark.parametrize("reader", READERS)
def test_scored_rows(reader: Callable[[Path], Rows], folder: Path) -> None:
    found, expected = reader(folder / "scored"), rows_in(folder / "scored")
    assert len(expected) == len(found) > 40
    assert [row["row_id"] for row in found] == sorted(row["row_id"] for row in found)
    assert found == expected
    assert all(row["entropy"][0] is None for row in found)


def test_types_in_other_readers(folder: Path) -> None:
    kinds = {"input_ids": polars.Int32, "attention_mask": polars.Int8, "labels": polars.Int32}
    assert polars.read_parquet_schema(next((folder / "masked" / "epoch_000").iterdir())) == {
        name: polars.List(kind) for name, kind in kinds.items()
    }
    with duckdb.connect() as connection:
        told = connection.execute("DESCRIBE SELECT * FROM read_parquet(?)", [f"{folder}/scored/*.parquet"]).fetchall()
    assert {row[0]: row[1] for row in told} == {
        **{"row_id": "BIGINT", "id": "VARCHAR", "window": "INTEGER", "input_ids": "INTEGER[]"},
        **{"entropy": "FLOAT[]", "logprob": "FLOAT[]", "loss_mask": "BOOLEAN[]"},
    }


def test_datasets_by_configuration(folder: Path, cache: dict[str, str]) -> None:
    masked = folder / "masked"
    held = rows_in(masked / "validation")
    for name in PARTS[:-1]:
        loaded = datasets.load_dataset(str(masked), name, **cache)
        assert sorted(loaded) == ["train", "validation"]
        assert loaded["train"].to_list() == rows_in(masked / name)
        assert loaded["validation"].to_list() == held
    assert datasets.load_dataset(str(masked), "epoch_003", split="validation", **cache).to_list() == held


def test_datasets_as_a_whole(folder: Path, cache: dict[str, str]) -> None:
    masked = folder / "masked"
    every = rows_in(*(masked / name for name in PARTS[:-1]))
    loaded = datasets.load_dataset(str(masked), **cache)
    assert {name: split.to_list() for name, split in loaded.items()} == {
        "train": every,
        "validation": rows_in(masked / "validation"),
    }
    saved = datasets.load_from_disk(str(masked / "all_hf"))
    assert {name: split.to_list() for name, split in saved.items()} == {n: s.to_list() for n, s in loaded.items()}
    assert saved["train"].features == loaded["train"].features
