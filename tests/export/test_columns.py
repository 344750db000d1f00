"""``--add-columns`` and ``--rows-multiple``: what is added and left out, and that nothing else changes by them."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import datasets
import jsonschema
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from entrodrop_prep import cli
from entrodrop_prep.config import EXTRA_COLUMNS, Recipe
from entrodrop_prep.errors import ConfigError, MismatchError
from entrodrop_prep.export.materialize import MaterializeSummary
from entrodrop_prep.store import digest, manifest
from entrodrop_prep.store.json_schemas import schemas
from entrodrop_prep.store.schema import masked_schema
from entrodrop_prep.store.shards import read_footer, write_shard
from entrodrop_prep.verification.run import verify
from helpers.mixtures import SOURCES, Given, Row, naive_mixture, rows_in, run_materialize
from helpers.scored import all_bytes, copy, manifest_of, rewrite_manifest

TRAIN, MORE, HELD = SOURCES.values()
SIZES = (16, 7, 1)


def run(made: Path, out: Path, **settings: Any) -> MaterializeSummary:
    return run_materialize(made / "train", out, **{"rows_per_shard": 20, **settings})


def mixed(made: Path) -> dict[str, Any]:
    return {"scored": (f"a={made / 'train'}:2", f"b={made / 'more'}")}


NAIVE = {"one": {"source": Given(TRAIN)}, "mixture": {"a": Given(TRAIN, 2), "b": Given(MORE)}}


@pytest.mark.parametrize("kind", ["one", "mixture"])
def test_columns_are_what_the_contract_says(kind: str, made: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    settings = mixed(made) if kind == "mixture" else {}
    more = {"add_columns": EXTRA_COLUMNS, "shuffle": "once", "eval": str(made / "held"), "plain_config": True}
    run(made, out, **settings, **more)
    whole, _ = naive_mixture(NAIVE[kind], Recipe(epochs=2, shuffle="once"), None)
    trainable = [sum(label != -100 for label in labels) for _, _, labels in whole]
    for epoch in range(2):
        expected, _ = naive_mixture(NAIVE[kind], Recipe(epochs=2, shuffle="once"), epoch)
        rows = rows_in(out / f"epoch_{epoch:03d}")
        assert [row[:3] for row in rows] == expected
        assert [row[3:] for row in rows] == [
            (n, list(range(len(ids))), [len(ids)]) for (ids, _, _), n in zip(expected, trainable, strict=True)
        ]
    for folder in ("plain", "validation"):
        for ids, _, labels, n, positions, lengths in rows_in(out / folder):
            assert (n, positions, lengths) == (sum(x != -100 for x in labels), list(range(len(ids))), [len(ids)])
    files = sorted(out.rglob("*.parquet"))
    assert {tuple(pq.read_schema(f).names) for f in files} == {tuple(masked_schema(EXTRA_COLUMNS).names)}
    validator = jsonschema.Draft202012Validator(schemas()["masked.json"])
    for file in files:
        for row in pq.read_table(file).to_pylist():
            validator.validate(row)
    assert ", with `n_trainable`, `position_ids`, `seq_lengths`" in (out / "README.md").read_text()
    given = [f"a={made / 'train'}", f"b={made / 'more'}"] if kind == "mixture" else [str(made / "train")]
    assert not verify(str(out), [*given, f"eval={made / 'held'}"]).findings
    loaded = datasets.load_dataset(str(out), "epoch_001", split="train", cache_dir=str(tmp_path / "cache"))
    assert loaded.column_names == masked_schema(EXTRA_COLUMNS).names


def test_one_column_alone_and_any_order(made: Path, tmp_path: Path) -> None:
    run(made, tmp_path / "one", add_columns="position_ids")
    (table,) = (pq.read_table(f) for f in sorted((tmp_path / "one").glob("epoch_000/*-00000-*")))
    assert table.column_names == [*masked_schema().names, "position_ids"]
    assert not verify(str(tmp_path / "one"), str(made / "train")).findings
    run(made, tmp_path / "two", add_columns="seq_lengths,n_trainable")
    before = all_bytes(tmp_path / "two")
    assert run(made, tmp_path / "two", add_columns=("n_trainable", "seq_lengths")).already_complete
    assert all_bytes(tmp_path / "two") == before
    assert manifest_of(tmp_path / "two")["identity"]["add_columns"] == ["n_trainable", "seq_lengths"]


def test_columns_are_identity_only_where_there_are_some(made: Path, tmp_path: Path) -> None:
    run(made, tmp_path / "plain")
    identity = manifest_of(tmp_path / "plain")["identity"]
    assert not {"add_columns", "rows_multiple"} & set(identity)
    with pytest.raises(MismatchError, match="add_columns was null, now"):
        run(made, tmp_path / "plain", add_columns="n_trainable")
    with pytest.raises(MismatchError, match="rows_multiple was null, now 4"):
        run(made, tmp_path / "plain", rows_multiple=4)


def test_a_directory_without_them_is_what_it_was_before_there_were_any(made: Path, tmp_path: Path) -> None:
    """Digests of the rows and of the identity, as an earlier version wrote them: such directories can be continued."""
    run(made, tmp_path / "out")
    described = manifest_of(tmp_path / "out")
    assert described["content_digest"] == "c57cc179b813265d993c9368e237d6ee955aa8e3669ca4697a6a24c0f42fc292"
    assert digest.of_json(described["identity"]) == "130e9e758f3cce19fa1b3300b4da0d7885114a2ca934881f4a36c0c9ec69fdb9"


def test_derived_layouts_follow(made: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(made, out, add_columns=EXTRA_COLUMNS, layout=("concatenated", "jsonl"), rows_multiple=4)
    every = [row for e in range(2) for row in rows_in(out / f"epoch_{e:03d}")]
    assert rows_in(out / "all") == every
    saved = datasets.load_from_disk(str(out / "all_hf"))["train"]
    assert saved.column_names == masked_schema().names
    assert list(zip(*(saved[name][:] for name in saved.column_names), strict=True)) == [row[:3] for row in every]
    first = json.loads((out / "jsonl" / "epoch_000.jsonl").read_text().splitlines()[0])
    assert list(first) == masked_schema(EXTRA_COLUMNS).names
    assert not verify(str(out)).findings


def test_wrong_columns(made: Path, tmp_path: Path, capfd: Any) -> None:
    arguments = ["materialize", str(made / "train"), "--out", str(tmp_path / "out"), "--epochs", "2"]
    for wrong in ("--add-columns=labels", "--rows-multiple=0", "--rows-multiple=100000"):
        assert cli.run([*arguments, wrong]) == 2
        error = capfd.readouterr().err
        assert wrong.partition("=")[0] in error
        assert error.count("\n") == 1
    assert not list((tmp_path / "out").glob("epoch_*")) if (tmp_path / "out").exists() else True


NONSENSE = {
    "n_trainable cannot be right": ("n_trainable", lambda rows: rows.__setitem__(0, 10_000)),
    "its n_trainable cannot": ("n_trainable", lambda rows: rows.__setitem__(0, 0)),
    "position_ids do not count": ("position_ids", lambda rows: rows[0].__setitem__(-1, 7_000)),
    "seq_lengths do not add up": ("seq_lengths", lambda rows: rows[0].__setitem__(0, rows[0][0] - 1)),
    "the first token of a document has a label": ("both", lambda rows: None),
    "describe different documents": ("seq_lengths", lambda rows: rows.__setitem__(0, [1, rows[0][0] - 1])),
}


@pytest.mark.parametrize("finding", NONSENSE)
def test_nonsense_is_found(finding: str, made: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(made, out, add_columns=EXTRA_COLUMNS, rates=(0.0, 0.0))
    file = out / "epoch_000" / "train-00000-of-00003.parquet"
    column, change = NONSENSE[finding]
    schema, footer, columns = masked_schema(EXTRA_COLUMNS), read_footer(file), pq.read_table(file).to_pydict()
    if column == "both":  # cut in two where the second half begins with a label
        row, at = next(
            (i, t) for i, labels in enumerate(columns["labels"]) for t, x in enumerate(labels) if t and x != -100
        )
        n = len(columns["labels"][row])
        columns["seq_lengths"][row], columns["position_ids"][row] = [at, n - at], [*range(at), *range(n - at)]
    else:
        change(columns[column])
    told = {k: v for k, v in footer.info.items() if k not in ("rows", "content_digest")}
    write_shard(file, schema, [pa.table(columns, schema=schema)], told)
    described = manifest_of(out)
    files = [
        {**e, **manifest.file_entry(out, file), "content_digest": read_footer(file).content_digest}
        if out / e["file"] == file
        else e
        for e in described["files"]
    ]
    rewrite_manifest(out, files=files)
    found = verify(str(out)).findings
    assert any(finding in f and str(file) in f for f in found), found


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", ["one", "mixture"])
def test_the_last_rows_are_left_out(kind: str, size: int, made: Path, tmp_path: Path) -> None:
    settings = {**(mixed(made) if kind == "mixture" else {}), "progress": "row", "plain_config": True}
    run(made, tmp_path / "whole", **settings)
    summary = run(made, tmp_path / "out", rows_multiple=size, **settings)
    for epoch in (*range(2), None):
        name = "plain" if epoch is None else f"epoch_{epoch:03d}"
        whole, rows = rows_in(tmp_path / "whole" / name), rows_in(tmp_path / "out" / name)
        assert len(rows) == len(whole) // size * size
        assert rows == whole[: len(rows)]
        if epoch is not None:
            told = summary.epochs[epoch]
            assert (told["rows"], told["rows_left_out"]) == (len(rows), len(whole) - len(rows))
            assert told["labels_left"] == sum(x != -100 for _, _, labels in rows for x in labels)
    given = [f"a={made / 'train'}", f"b={made / 'more'}"] if kind == "mixture" else str(made / "train")
    assert not verify(str(tmp_path / "out"), given).findings


def test_validation_rows_are_all_kept(made: Path, tmp_path: Path) -> None:
    run(made, tmp_path / "whole", eval=str(made / "held"))
    run(made, tmp_path / "out", eval=str(made / "held"), rows_multiple=16)
    rows: list[Row] = rows_in(tmp_path / "out" / "validation")
    assert rows == rows_in(tmp_path / "whole" / "validation")
    assert len(rows) % 16


def test_a_multiple_as_large_as_the_epoch_and_one_above(made: Path, tmp_path: Path) -> None:
    rows = run(made, tmp_path / "whole").epochs[0]["rows"]
    assert run(made, tmp_path / "all", rows_multiple=rows).epochs[0]["rows"] == rows
    with pytest.raises(ConfigError, match=f"--rows-multiple {rows + 1} is more than the {rows} rows of epoch_000"):
        run(made, tmp_path / "more", rows_multiple=rows + 1)
    assert not list((tmp_path / "more").glob("epoch_*"))


@pytest.mark.parametrize("shuffle", ["epoch", "once", "none"])
def test_the_same_rows_left_out_each_time_is_warned_of(
    shuffle: str, made: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: Any
) -> None:
    run(made, tmp_path / "out", shuffle=shuffle, rows_multiple=16)
    warned = [r for r in caplog.records if r.levelno == logging.WARNING and "--rows-multiple 16" in r.getMessage()]
    assert len(warned) == (shuffle != "epoch")
    left = manifest_of(tmp_path / "out")["epochs"][0]["rows_left_out"]
    assert left
    assert f"(--rows-multiple): {left}, {left}" in (tmp_path / "out" / "README.md").read_text()
    assert cli.run(["inspect", str(tmp_path / "out")]) == 0
    assert f"(--rows-multiple): {left}, {left}" in capfd.readouterr().out


def test_a_wrong_count_of_rows_left_out_is_found(made: Path, tmp_path: Path) -> None:
    run(made, tmp_path / "whole", rows_multiple=16)
    out = copy(tmp_path / "whole", tmp_path / "out")
    epochs = manifest_of(out)["epochs"]
    epochs[1]["rows_left_out"] += 1
    rewrite_manifest(out, epochs=epochs)
    found = verify(str(out), str(made / "train")).findings
    assert any("epoch 1" in f and "rows_left_out" in f for f in found), found
