"""Runs of ``score``: what is written, what a rerun leaves alone, what a continued run must not mix up."""

from __future__ import annotations

import datetime
import decimal
import fcntl
import hashlib
import json
import os
import shutil
import socket
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import AutoTokenizer

from entrodrop_prep.errors import (
    ConfigError,
    EntrodropError,
    IntegrityError,
    MismatchError,
    OutputError,
    RowError,
    SourceError,
)
from entrodrop_prep.scoring import plan as plan_module
from entrodrop_prep.scoring import run as run_module
from entrodrop_prep.scoring.extra_columns import misfits
from entrodrop_prep.store import manifest
from entrodrop_prep.store import shards as shard_files
from entrodrop_prep.store.locks import locked
from entrodrop_prep.store.schema import SCORED
from entrodrop_prep.store.shards import read_footer, write_shard
from entrodrop_prep.verification.run import verify
from helpers.models import (
    EOS,
    random_rows,
    rows_of,
    run_score,
    save_model,
    settings_for,
    shards,
    tiny_llama,
    word_tokenizer,
    words,
    write_rows,
)
from helpers.warm import OFFLINE

V = 61


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """25 rows of token ids; with 10 rows a shard they make three."""
    return write_rows(tmp_path / "data" / "rows.jsonl", [{"input_ids": ids} for ids in random_rows(25, V)])


def snapshot(directory: Path) -> dict[str, tuple[int, bytes]]:
    """Time and bytes of every file."""
    files = (p for p in sorted(directory.rglob("*")) if p.is_file())
    return {p.relative_to(directory).as_posix(): (p.stat().st_mtime_ns, p.read_bytes()) for p in files}


def contents(directory: Path) -> dict[str, bytes]:
    """Bytes of what a finished directory consists of; its notes and its lock are no part of it."""
    return {name: data for name, (_, data) in snapshot(directory).items() if not name.startswith(".")}


def read_manifest(directory: Path) -> dict[str, Any]:
    return manifest.read(directory, SCORED)


def holds(directory: Path) -> bool:
    findings = verify(str(directory), None).findings
    assert findings == []
    return not findings


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading a model ends the test."""

    def refuse(*args: Any) -> Any:
        pytest.fail("the model was loaded")

    monkeypatch.setattr(run_module, "load_backend", refuse)


def test_a_shard_holds_its_rows(tmp_path: Path, source: Path, model: Path) -> None:
    summary = run_score(source, model, tmp_path / "out", rows_per_shard=10, max_length=16)
    assert [p.name for p in shards(tmp_path / "out")] == [f"shard-0000{i}.parquet" for i in range(3)]
    for i, path in enumerate(shards(tmp_path / "out")):
        table = pq.read_table(path)
        assert sorted(set(table["row_id"].to_pylist())) == list(range(10 * i, min(10 * i + 10, 25)))
        order = list(zip(table["row_id"].to_pylist(), table["window"].to_pylist(), strict=True))
        assert order == sorted(order)
    found = rows_of(tmp_path / "out")
    assert summary.counts["rows"] == summary.counts["rows_read"] == 25
    assert summary.counts["windows"] == len(found) > 25
    assert summary.counts["tokens"] == summary.scored_tokens == sum(len(row["input_ids"]) for row in found)
    assert summary.counts["trainable_tokens"] == sum(sum(row["loss_mask"]) for row in found)
    assert holds(tmp_path / "out")


def test_a_finished_run_is_left_alone(
    tmp_path: Path, source: Path, model: Path, request: pytest.FixtureRequest
) -> None:
    run_score(source, model, tmp_path / "out", rows_per_shard=10)
    before = snapshot(tmp_path / "out")
    request.getfixturevalue("no_model")
    again = run_score(source, model, tmp_path / "out", rows_per_shard=10)
    assert again.already_complete
    assert again.scored_tokens == 0
    assert again.counts["rows"] == 25
    assert snapshot(tmp_path / "out") == before


@pytest.mark.parametrize("lost", [[0], [1], [2], [0, 1], [1, 2], [0, 2], [0, 1, 2]])
def test_what_is_lost_is_made_again(tmp_path: Path, source: Path, model: Path, lost: list[int]) -> None:
    settings: dict[str, Any] = {"rows_per_shard": 10, "max_length": 16, "overlap": 3}
    run_score(source, model, tmp_path / "out", **settings)
    before = contents(tmp_path / "out")
    for i in lost:
        shards(tmp_path / "out")[i - 3].unlink() if len(lost) == 1 else None
    if len(lost) > 1:
        for path in [shards(tmp_path / "out")[i] for i in lost]:
            path.unlink()
    (tmp_path / "out" / manifest.NAME).unlink()
    summary = run_score(source, model, tmp_path / "out", **settings)
    assert not summary.already_complete
    assert contents(tmp_path / "out") == before


@pytest.mark.parametrize("name", ["unigram.npy", "tokenizer/tokenizer.json", "rejected.jsonl", "shard-00001.parquet"])
def test_a_missing_file_beside_a_manifest_is_made_again(tmp_path: Path, model: Path, name: str) -> None:
    rows = [{"input_ids": ids} for ids in random_rows(12, V)] + [{"input_ids": "no"}]
    source = write_rows(tmp_path / "rows.jsonl", rows)
    settings: dict[str, Any] = {"rows_per_shard": 5, "on_bad_row": "skip"}
    run_score(source, model, tmp_path / "out", **settings)
    before = contents(tmp_path / "out")
    (tmp_path / "out" / name).unlink()
    assert verify(str(tmp_path / "out"), None).findings
    run_score(source, model, tmp_path / "out", **settings)
    assert contents(tmp_path / "out") == before


def test_the_model_is_not_loaded_where_no_shard_is_missing(
    tmp_path: Path, source: Path, model: Path, request: pytest.FixtureRequest
) -> None:
    run_score(source, model, tmp_path / "out")
    before = contents(tmp_path / "out")
    (tmp_path / "out" / manifest.NAME).unlink()
    request.getfixturevalue("no_model")
    run_score(source, model, tmp_path / "out")
    assert contents(tmp_path / "out") == before


def mismatch(*arguments: Any, **settings: Any) -> str:
    with pytest.raises(MismatchError) as caught:
        run_score(*arguments, **settings)
    return str(caught.value)


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"max_length": 20}, "max_length was 128, now 20"),
        ({"overlap": 2}, "overlap was 0, now 2"),
        ({"rows_per_shard": 11}, "rows_per_shard was 10, now 11"),
        ({"score_dtype": "float16"}, 'score_dtype was "float32", now "float16"'),
        (
            {"dtype": "bfloat16"},
            'dtype was "float32", now "bfloat16"; score_dtype was "float32", now "float16"',
        ),
        ({"dtype": "bfloat16", "score_dtype": "float32"}, 'dtype was "float32", now "bfloat16"'),
        ({"logprob": False}, "logprob was true, now false"),
        ({"limit": 24}, "limit was null, now 24"),
        ({"long_documents": "drop", "overlap": 1}, 'long_documents was "split", now "drop"; overlap was 0, now 1'),
    ],
)
@pytest.mark.parametrize("finished", [True, False])
def test_other_settings_are_refused_by_name(
    tmp_path: Path, source: Path, model: Path, changed: dict[str, Any], says: str, finished: bool
) -> None:
    run_score(source, model, tmp_path / "out", rows_per_shard=10)
    if not finished:
        (tmp_path / "out" / manifest.NAME).unlink()
        shards(tmp_path / "out")[-1].unlink()
    before = snapshot(tmp_path / "out")
    message = mismatch(source, model, tmp_path / "out", **{"rows_per_shard": 10, **changed})
    assert f"it was made with other settings: {says}; use the settings" in message
    assert snapshot(tmp_path / "out") == before
    assert run_score(source, model, tmp_path / "out", rows_per_shard=10).already_complete == finished


def stored_as(out: Path) -> str:
    """The number format of the scores by the first shard's schema and by the manifest, which agree."""
    schema = pq.read_schema(shards(out)[0])
    found = {str(schema.field(name).type.value_type) for name in ("entropy", "logprob")}
    assert found == {{"float16": "halffloat", "float32": "float"}[read_manifest(out)["identity"]["score_dtype"]]}
    return str(read_manifest(out)["identity"]["score_dtype"])


@pytest.mark.parametrize(
    ("dtype", "asked", "wanted"),
    [
        ("float32", "auto", "float32"),
        ("bfloat16", "auto", "float16"),
        ("float16", "auto", "float16"),
        ("float32", "float16", "float16"),
        ("bfloat16", "float32", "float32"),
    ],
)
def test_scores_have_as_many_digits_as_the_model_gives(
    tmp_path: Path, source: Path, model: Path, dtype: str, asked: str, wanted: str
) -> None:
    run_score(source, model, tmp_path / "out", dtype=dtype, score_dtype=asked)
    assert stored_as(tmp_path / "out") == wanted
    assert holds(tmp_path / "out")


def test_a_directory_keeps_the_digits_it_was_begun_with(tmp_path: Path, source: Path, model: Path) -> None:
    """As of a version whose default was float32 whatever the model ran in."""
    half: dict[str, Any] = {"rows_per_shard": 10, "dtype": "bfloat16"}
    run_score(source, model, tmp_path / "out", score_dtype="float32", **half)
    before = contents(tmp_path / "out")
    assert run_score(source, model, tmp_path / "out", **half).already_complete
    for without_note in (False, True):
        (tmp_path / "out" / manifest.NAME).unlink()
        shards(tmp_path / "out")[1].unlink()
        if without_note:
            (tmp_path / "out" / manifest.STATE).unlink()
        message = mismatch(source, model, tmp_path / "out", score_dtype="float16", **half)
        assert 'it was made with other settings: score_dtype was "float32", now "float16"; use' in message
        assert not run_score(source, model, tmp_path / "out", **half).already_complete
        assert contents(tmp_path / "out") == before
    run_score(source, model, tmp_path / "out", overwrite=True, **half)
    assert stored_as(tmp_path / "out") == "float16"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_scores_and_ids_are_split_by_byte(tmp_path: Path, source: Path, model: Path, dtype: str) -> None:
    run_score(source, model, tmp_path / "out", dtype=dtype)
    group = pq.read_metadata(shards(tmp_path / "out")[0]).row_group(0)
    found = {c.path_in_schema.split(".")[0]: c for c in map(group.column, range(group.num_columns))}
    split = {name for name, c in found.items() if "BYTE_STREAM_SPLIT" in c.encodings}
    assert split == {"input_ids", "entropy", "logprob"}
    assert not any(c.has_dictionary_page for c in found.values())
    assert all(c.compression == "ZSTD" and c.has_offset_index and c.has_column_index for c in found.values())


def test_shards_of_other_encodings_are_verified_and_continued(
    tmp_path: Path, source: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As version 0.1.0 wrote them."""
    with monkeypatch.context() as earlier:
        earlier.setattr(shard_files, "encodings", lambda schema, compression: {"use_dictionary": ["input_ids"]})
        run_score(source, model, tmp_path / "out", rows_per_shard=10)
    digest, before = read_manifest(tmp_path / "out")["content_digest"], contents(tmp_path / "out")
    assert run_score(source, model, tmp_path / "out", rows_per_shard=10).already_complete
    (tmp_path / "out" / manifest.NAME).unlink()
    shards(tmp_path / "out")[1].unlink()
    assert not run_score(source, model, tmp_path / "out", rows_per_shard=10).already_complete
    after = contents(tmp_path / "out")
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {"shard-00001.parquet", manifest.NAME}
    assert read_manifest(tmp_path / "out")["content_digest"] == digest
    assert holds(tmp_path / "out")


def test_a_run_that_left_no_shard_binds_nobody(tmp_path: Path, model: Path) -> None:
    rows: list[dict[str, Any]] = [{"input_ids": ids} for ids in random_rows(6, V)]
    source = write_rows(tmp_path / "rows.jsonl", [*rows, {"input_ids": None}])
    with pytest.raises(RowError):
        run_score(source, model, tmp_path / "out")
    write_rows(source, rows)  # corrected: another size
    assert run_score(source, model, tmp_path / "out", max_length=20, dtype="bfloat16").counts["rows"] == 6
    assert stored_as(tmp_path / "out") == "float16"
    assert holds(tmp_path / "out")


def test_weights_changed_in_place_are_seen(tmp_path: Path, source: Path, model: Path) -> None:
    mine = shutil.copytree(model, tmp_path / "model")
    run_score(source, mine, tmp_path / "out")
    os.utime(mine / "model.safetensors")
    assert run_score(source, mine, tmp_path / "out").already_complete
    save_model(mine, tiny_llama(V), seed=1)  # as many bytes
    assert "model.digest was" in mismatch(source, mine, tmp_path / "out")


def test_a_model_by_another_path_is_the_same(tmp_path: Path, source: Path, model: Path) -> None:
    run_score(source, model, tmp_path / "out")
    mine = shutil.copytree(model, tmp_path / "elsewhere" / "model")
    assert run_score(source, mine, tmp_path / "out").already_complete


def test_another_tokenizer_or_template_is_refused(tmp_path: Path, model: Path) -> None:
    rows = [{"text": words(ids)} for ids in random_rows(5, V)]
    source = write_rows(tmp_path / "rows.jsonl", rows)
    run_score(source, model, tmp_path / "out")
    other = word_tokenizer(V)
    other.add_special_tokens({"additional_special_tokens": ["w60"]})
    other.save_pretrained(tmp_path / "tokenizer")
    message = mismatch(source, model, tmp_path / "out", tokenizer=str(tmp_path / "tokenizer"))
    assert "tokenizer was" in message
    (tmp_path / "chat.jinja").write_text("{{ messages }}")
    message = mismatch(source, model, tmp_path / "out", chat_template=str(tmp_path / "chat.jinja"))
    assert "tokenizer was" in message
    word_tokenizer(V).save_pretrained(tmp_path / "same")
    assert run_score(source, model, tmp_path / "out", tokenizer=str(tmp_path / "same")).already_complete


@pytest.mark.parametrize("finished", [True, False])
def test_a_touched_source_goes_on_and_a_changed_one_does_not(
    tmp_path: Path, source: Path, model: Path, finished: bool
) -> None:
    run_score(source, model, tmp_path / "out", rows_per_shard=10)
    expected = contents(tmp_path / "out")
    if not finished:  # a gap in the middle
        (tmp_path / "out" / manifest.NAME).unlink()
        shards(tmp_path / "out")[1].unlink()
    os.utime(source, ns=(1, 1))
    assert run_score(source, model, tmp_path / "out", rows_per_shard=10).already_complete == finished
    assert contents(tmp_path / "out") == expected
    lines = source.read_text().splitlines()
    lines[22] = lines[22].replace(lines[22][-3], "4" if lines[22][-3] != "4" else "5")  # one digit, as many bytes
    source.write_text("\n".join(lines) + "\n")
    message = mismatch(source, model, tmp_path / "out", rows_per_shard=10)
    assert "the source changed: rows 20 to 29 are not those that shard-00002.parquet was made from" in message
    assert contents(tmp_path / "out") == expected


def test_more_rows_are_another_source(tmp_path: Path, source: Path, model: Path) -> None:
    run_score(source, model, tmp_path / "out")
    with source.open("a") as f:
        f.write('{"input_ids": [5, 6]}\n')
    assert "source.files was" in mismatch(source, model, tmp_path / "out")


def test_operations_may_differ(tmp_path: Path, model: Path) -> None:
    rows: list[dict[str, Any]] = [{"input_ids": ids} for ids in random_rows(20, V)]
    rows[15] = {"input_ids": [1.5]}
    source = write_rows(tmp_path / "rows.jsonl", rows)
    run_score(source, model, tmp_path / "whole", rows_per_shard=5, on_bad_row="skip", batch_tokens=64)
    with pytest.raises(RowError, match=r"rows\.jsonl:16: row 15: .* entry 0 is 1\.5"):
        run_score(source, model, tmp_path / "out", rows_per_shard=5, batch_tokens=4000)
    assert len(shards(tmp_path / "out")) == 3
    run_score(source, model, tmp_path / "out", rows_per_shard=5, on_bad_row="skip", batch_tokens=64)
    whole, out = rows_of(tmp_path / "whole"), rows_of(tmp_path / "out")
    for a, b in zip(whole, out, strict=True):
        assert a["input_ids"] == b["input_ids"]
        assert a["entropy"][1:] == pytest.approx(b["entropy"][1:], abs=1e-5)
    assert read_manifest(tmp_path / "whole")["identity"] == read_manifest(tmp_path / "out")["identity"]


def test_another_environment_must_be_accepted(
    tmp_path: Path, source: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_score(source, model, tmp_path / "out", rows_per_shard=10)
    expected = contents(tmp_path / "out")
    (tmp_path / "out" / manifest.NAME).unlink()
    shards(tmp_path / "out")[2].unlink()
    first = shards(tmp_path / "out")[0]
    footer = read_footer(first)
    table = pq.read_table(first)
    info = {
        **footer.info,
        "environment": {**footer.info["environment"], "torch": "1.0", "python": "2.7", "reduction": "triton 3.6"},
    }
    write_shard(first, table.schema, [table], info)
    message = mismatch(source, model, tmp_path / "out", rows_per_shard=10)
    assert 'it was begun in another environment: torch was "1.0", now "' in message
    assert "python was" not in message  # recorded, but no score depends on it
    assert "reduction was" not in message
    assert "--accept-environment-change" in message
    run_score(source, model, tmp_path / "out", rows_per_shard=10, accept_environment_change=True)
    listed = read_manifest(tmp_path / "out")["environments"]
    assert [entry["shards"] for entry in listed] == [[0], [1, 2]]
    assert [entry["environment"]["torch"] == "1.0" for entry in listed] == [True, False]
    assert holds(tmp_path / "out")
    same = [name for name, data in contents(tmp_path / "out").items() if expected[name] == data]
    assert {"shard-00001.parquet", "shard-00002.parquet", "unigram.npy"} <= set(same)


def test_the_environment_of_every_shard_is_recorded(tmp_path: Path, source: Path, model: Path) -> None:
    run_score(source, model, tmp_path / "out", rows_per_shard=10)
    (entry,) = read_manifest(tmp_path / "out")["environments"]
    assert entry["shards"] == [0, 1, 2]
    wanted = {"backend", "device", "head", "torch", "transformers", "tokenizers", "entrodrop_prep", "python"}
    assert wanted | {"reduction"} <= set(entry["environment"])
    assert entry["environment"]["head"] == "chunked"


@pytest.mark.parametrize("limit", [1, 10, 17, 25, 400])
def test_limit(tmp_path: Path, source: Path, model: Path, limit: int) -> None:
    summary = run_score(source, model, tmp_path / "out", limit=limit, rows_per_shard=10)
    assert summary.counts["rows_read"] == min(limit, 25)
    assert [row["row_id"] for row in rows_of(tmp_path / "out")] == list(range(min(limit, 25)))
    assert len(shards(tmp_path / "out")) == -(-min(limit, 25) // 10)


def named(rows: list[list[int]], names: list[Any]) -> list[dict[str, Any]]:
    return [{"input_ids": ids, "key": name} for ids, name in zip(rows, names, strict=True)]


def test_a_system_column_that_no_row_has_a_place_for_is_said(
    tmp_path: Path, model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    row = {"system": "w5", "prompt": "w6 w7", "completion": "w8"}
    run_score(write_rows(tmp_path / "rows.jsonl", [row]), model, tmp_path / "scored")
    assert "column 'system' is not read" in caplog.text


def test_a_mask_that_is_not_read_is_said(tmp_path: Path, model: Path, caplog: pytest.LogCaptureFixture) -> None:
    ids = [5, 6, 7, 8]
    row = {"input_ids": ids, "loss_mask": [0, 0, 1, 1], "labels": [-100, 6, 7, -100], "completion_mask": [0, 0, 0, 1]}
    run_score(write_rows(tmp_path / "rows.jsonl", [{**row, "position_ids": [0, 1, 0, 1]}]), model, tmp_path / "scored")
    assert "that are not read: loss_mask, completion_mask, position_ids; what" in caplog.text
    assert rows_of(tmp_path / "scored")[0]["loss_mask"] == [False, True, True, False]


def test_id_column(tmp_path: Path, model: Path) -> None:
    rows = random_rows(12, V)
    rows[4] = [5]  # too short: its shard of one has no rows
    names = [f"doc/{i}" if i % 2 else i for i in range(12)]
    source = write_rows(tmp_path / "rows.jsonl", named(rows, names))
    settings: dict[str, Any] = {"id_column": "key", "rows_per_shard": 1, "max_length": 16}
    run_score(source, model, tmp_path / "out", **settings)
    found = rows_of(tmp_path / "out")
    assert {row["row_id"]: row["id"] for row in found} == {i: str(n) for i, n in enumerate(names) if i != 4}
    assert pq.read_table(shards(tmp_path / "out")[4]).num_rows == 0
    before = contents(tmp_path / "out")
    (tmp_path / "out" / manifest.NAME).unlink()
    shards(tmp_path / "out")[6].unlink()
    run_score(source, model, tmp_path / "out", **settings)
    assert contents(tmp_path / "out") == before


@pytest.mark.parametrize("first", [1, 4])
def test_an_id_that_comes_twice(tmp_path: Path, model: Path, first: int) -> None:
    names = [f"n{i}" for i in range(6)]
    names[5] = names[first]
    source = write_rows(tmp_path / "rows.jsonl", named(random_rows(6, V), names))
    for _ in range(2):  # from memory, then from the shards
        with pytest.raises(
            RowError, match=rf"rows\.jsonl:6: row 5: the id 'n{first}' in column 'key' was there before"
        ):
            run_score(source, model, tmp_path / "out", id_column="key", rows_per_shard=3)
        assert len(shards(tmp_path / "out")) == 1


@pytest.mark.parametrize("name", [None, ""])
def test_an_id_that_is_not_there(tmp_path: Path, model: Path, name: str | None) -> None:
    source = write_rows(tmp_path / "rows.jsonl", named(random_rows(3, V), ["a", name, "c"]))
    with pytest.raises(RowError, match=r"rows\.jsonl:2: row 1: column 'key' is empty"):
        run_score(source, model, tmp_path / "out", id_column="key")
    run_score(source, model, tmp_path / "out", id_column="key", on_bad_row="skip")
    assert [row["id"] for row in rows_of(tmp_path / "out")] == ["a", "c"]


def test_kept_columns_keep_their_values(tmp_path: Path, model: Path) -> None:
    kept = {
        "name": ["a", None, "ü\n"],
        "count": [1, None, -(2**62)],
        "share": [0.5, None, float("inf")],
        "flag": [True, None, False],
        "tags": [["x", "y"], None, []],
        "meta": [{"lang": "de", "n": 1}, None, {"lang": None, "n": 2}],
        "day": [datetime.date(2024, 2, 29), None, datetime.date(1, 1, 1)],
        "at": [datetime.datetime(2024, 1, 2, 3, 4, 5, 6, tzinfo=datetime.UTC), None, None],
        "price": [decimal.Decimal("12.50"), None, decimal.Decimal("0.01")],
        "raw": [b"\x00\xff", None, b""],
        "nothing": [None, None, None],
    }
    table = pa.table({"input_ids": random_rows(3, V), **{name: pa.array(values) for name, values in kept.items()}})
    pq.write_table(table, tmp_path / "rows.parquet")
    run_score(tmp_path / "rows.parquet", model, tmp_path / "out", keep_columns=tuple(kept), max_length=12)
    found = rows_of(tmp_path / "out")
    assert len(found) > 3  # split documents carry them in every window
    for name, values in kept.items():
        assert [row[name] for row in found] == [values[row["row_id"]] for row in found], name
    assert list(found[0])[-len(kept) :] == list(kept)
    assert holds(tmp_path / "out")


@pytest.mark.parametrize("name", ["entropy", "labels", "window", "row_id", "id", "attention_mask"])
def test_names_of_our_own_cannot_be_kept(tmp_path: Path, model: Path, name: str) -> None:
    source = write_rows(tmp_path / "rows.jsonl", [{"text": "w5 w6", name: 1}])
    with pytest.raises(ConfigError, match=f"cannot keep a column called '{name}'"):
        run_score(source, model, tmp_path / "out", keep_columns=(name,))


@pytest.mark.parametrize("values", [[{}, {}], [{"a": {}}], [None, {"a": 1}, 5]])
def test_a_column_that_cannot_be_stored_cannot_be_kept(tmp_path: Path, model: Path, values: list[Any]) -> None:
    source = write_rows(tmp_path / "rows.jsonl", [{"input_ids": [5, 6], "x": v} for v in values])
    with pytest.raises(SourceError, match=r"column 'x' has no one type that can be stored: .*; leave it out"):
        run_score(source, model, tmp_path / "out", keep_columns=("x",))


@pytest.mark.parametrize(("values", "row"), [([1, "a"], 1), ([[1], ["a"]], 1), ([2**70, 1], 0), ([1, True], 1)])
def test_columns_of_no_one_type_cannot_be_kept(tmp_path: Path, model: Path, values: list[Any], row: int) -> None:
    source = write_rows(tmp_path / "rows.jsonl", [{"input_ids": [5, 6], "x": v} for v in values])
    with pytest.raises(RowError, match=f"row {row}: column 'x', to be kept, is no .* as in the first rows"):
        run_score(source, model, tmp_path / "out", keep_columns=("x",))


def test_the_first_row_whose_type_was_not_seen(tmp_path: Path, model: Path) -> None:
    values = [*range(plan_module.TYPE_SAMPLE_ROWS), "six"]
    assert len(values) == 1001
    source = write_rows(tmp_path / "rows.jsonl", [{"input_ids": [5, 6], "x": v} for v in values])
    with pytest.raises(RowError, match=r"rows\.jsonl:1001: row 1000: column 'x', to be kept, is no int64 as in"):
        run_score(source, model, tmp_path / "out", keep_columns=("x",))


def test_a_later_row_that_does_not_fit_a_kept_column(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan_module, "TYPE_SAMPLE_ROWS", 2)
    source = write_rows(tmp_path / "rows.jsonl", [{"input_ids": [5, 6], "x": v} for v in [1, 2, 3, 4.5, 5, "six"]])
    with pytest.raises(RowError, match=r"rows\.jsonl:4: row 3: column 'x', to be kept, is no int64 as in"):
        run_score(source, model, tmp_path / "out", keep_columns=("x",))
    run_score(source, model, tmp_path / "out", keep_columns=("x",), on_bad_row="skip")
    assert [row["x"] for row in rows_of(tmp_path / "out")] == [1, 2, 3, 5]
    assert [entry["row_id"] for entry in rejected(tmp_path / "out")] == [3, 5]


@pytest.mark.parametrize(
    ("kind", "fit", "do_not"),
    [
        (pa.int64(), [1, None], [2.0, 2**70, "1", True]),
        (pa.float64(), [1, 2.5, None], ["x", True]),
        (pa.string(), ["x", None], [1, b"x", "\ud800"]),
        (pa.list_(pa.float64()), [[], [1], [0.5, None]], [["x"], 1.0]),
        (pa.struct([("a", pa.int64())]), [{"a": 1}, {}, None], [{"a": 1, "b": 2}, {"a": "x"}, [1]]),
        (pa.timestamp("us"), [datetime.datetime(2024, 1, 1)], ["2024", 5]),
        (pa.date32(), [datetime.date(2024, 1, 1)], [5, "2024-01-01"]),
    ],
)
def test_what_fits_a_kept_column(kind: pa.DataType, fit: list[Any], do_not: list[Any]) -> None:
    rows = [{"x": value} for value in [*fit, *do_not]]
    assert sorted(misfits([pa.field("x", kind)], rows)) == list(range(len(fit), len(rows)))
    assert misfits([pa.field("x", kind)], [{}]) == {}


def rejected(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "rejected.jsonl").read_text(encoding="utf-8").splitlines()]


def test_what_is_left_out_is_counted_and_listed(tmp_path: Path, model: Path) -> None:
    lines = [
        '{"input_ids": [5, 6, 7], "key": "a"}',
        '{"input_ids": [5], "key": "b"}',
        '{"input_ids": null, "key": "c"}',
        "{broken",
        '{"input_ids": [5, 6, 7, 8, 9, 10], "key": "e"}',
        '{"input_ids": [], "key": "f"}',
        '{"input_ids": [5, 61], "key": "g"}',
        '{"input_ids": [5, -1], "key": "h"}',
        '{"input_ids": [5, 6], "labels": [5, 6], "key": "i"}',
        '{"input_ids": [7, 8], "key": "j"}',
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    settings: dict[str, Any] = {"on_bad_row": "skip", "max_length": 5, "long_documents": "drop", "id_column": "key"}
    write_rows(tmp_path / "rows.jsonl", [])
    (tmp_path / "rows.jsonl").write_text("\n".join(line for line in lines if "labels" not in line) + "\n")
    summary = run_score(tmp_path / "rows.jsonl", model, tmp_path / "out", rows_per_shard=4, **settings)
    assert summary.counts == {
        "rows_read": 9,
        "rows": 2,
        "windows": 2,
        "tokens": 5,
        "trainable_tokens": 3,
        "rows_without_loss": 0,
        "short_rows": 2,
        "truncated_rows": 0,
        "dropped_long_rows": 1,
        "bad_rows": 4,
    }
    entries = rejected(tmp_path / "out")
    assert [(e["row_id"], e["kind"], e.get("id"), e["where"]) for e in entries] == [
        (2, "bad", "c", "rows.jsonl:3"),
        (3, "bad", None, "rows.jsonl:4"),
        (4, "long", "e", "rows.jsonl:5"),
        (6, "bad", "g", "rows.jsonl:7"),
        (7, "bad", "h", "rows.jsonl:8"),
    ]
    assert "6 tokens, over --max-length 5" in entries[2]["reason"]
    assert "token id 61 at position 1 is out of the vocabulary of 61 tokens" in entries[3]["reason"]
    assert all("\n" not in entry["reason"] for entry in entries)
    assert read_manifest(tmp_path / "out")["counts"] == summary.counts
    assert holds(tmp_path / "out")


def test_nothing_is_listed_where_nothing_is_left_out(tmp_path: Path, source: Path, model: Path) -> None:
    run_score(source, model, tmp_path / "out")
    assert not (tmp_path / "out" / "rejected.jsonl").exists()


@pytest.mark.parametrize("overlap", [0, 7])
def test_unigram_counts_each_token_of_a_document_once(tmp_path: Path, model: Path, overlap: int) -> None:
    rows = random_rows(30, V, longest=70)
    source = write_rows(tmp_path / "rows.jsonl", [{"text": words(ids)} for ids in rows])
    run_score(source, model, tmp_path / "out", max_length=9, overlap=overlap, rows_per_shard=8)
    counts = np.load(tmp_path / "out" / "unigram.npy")
    expected = np.bincount([i for ids in rows for i in [*ids, EOS]], minlength=V)
    assert counts.dtype == np.int64
    assert counts.tolist() == expected.tolist()


def test_nothing_of_the_machine_is_in_the_result(tmp_path: Path, source: Path, model: Path) -> None:
    run_score(source, model, tmp_path / "out", rows_per_shard=10)
    year = str(datetime.datetime.now().year)
    for name, data in contents(tmp_path / "out").items():
        for word in (str(tmp_path), str(model.parent), str(Path.home()), os.sep + "tmp"):
            assert word.encode() not in data, (name, word)
        shard = name.endswith(".parquet")
        said = json.dumps(read_footer(tmp_path / "out" / name).info).encode() if shard else data
        assert socket.gethostname().encode() not in said, name  # compressed bytes may happen to hold a short name
        if name.endswith(".json"):
            assert f'"{year}-' not in data.decode()
    time.sleep(0.01)
    run_score(source, model, tmp_path / "later", rows_per_shard=10)
    assert contents(tmp_path / "later") == contents(tmp_path / "out")


def test_a_moved_directory_still_holds(tmp_path: Path, source: Path, model: Path) -> None:
    run_score(source, model, tmp_path / "out", rows_per_shard=10)
    moved = tmp_path / "far" / "away"
    moved.parent.mkdir()
    shutil.copytree(tmp_path / "out", moved)
    shutil.rmtree(tmp_path / "out")
    assert holds(moved)
    assert run_score(source, model, moved, rows_per_shard=10).already_complete
    (moved / manifest.STATE).unlink()
    (moved / ".lock").unlink()
    assert holds(moved)
    assert run_score(source, model, moved, rows_per_shard=10).already_complete
    assert read_manifest(moved)["content_digest"]


def test_the_content_digest_is_of_the_scores(tmp_path: Path, source: Path, model: Path) -> None:
    digests = set()
    for name, settings in {
        "a": {},
        "b": {"score_dtype": "float16"},
        "c": {"max_length": 9},
        "d": {"limit": 24},
    }.items():
        run_score(source, model, tmp_path / name, **settings)
        digests.add(read_manifest(tmp_path / name)["content_digest"])
    assert len(digests) == 4


def test_manifest_describes_every_file(tmp_path: Path, source: Path, model: Path) -> None:
    run_score(source, model, tmp_path / "out", rows_per_shard=10)
    described = read_manifest(tmp_path / "out")
    files = {entry["file"]: entry for entry in described["files"]}
    there = contents(tmp_path / "out")
    assert set(files) == set(there) - {manifest.NAME}
    for name, entry in files.items():
        assert entry["bytes"] == len(there[name])
        assert entry["sha256"] == hashlib.sha256(there[name]).hexdigest()
    parts = [entry for name, entry in files.items() if name.startswith("shard-")]
    assert sum(entry["tokens"] for entry in parts) == described["counts"]["tokens"]
    assert sum(entry["trainable_tokens"] for entry in parts) == described["counts"]["trainable_tokens"]
    assert sum(entry["rows"] for entry in parts) == described["counts"]["windows"]
    assert described["source"]["name"] == "rows.jsonl"
    assert described["tokenizer"]["eos_id"] == EOS
    assert described["tokenizer"]["special_ids"] == [0, 1, 2]


def test_the_tokenizer_is_kept(tmp_path: Path, source: Path, model: Path) -> None:
    run_score(source, model, tmp_path / "out")
    stored = AutoTokenizer.from_pretrained(tmp_path / "out" / "tokenizer")
    assert stored("w5 w7")["input_ids"] == [5, 7]
    assert stored.eos_token_id == EOS


def test_a_second_run_at_the_same_time_is_refused(tmp_path: Path, source: Path, model: Path) -> None:
    with locked(tmp_path / "out"):
        command = [sys.executable, "-m", "entrodrop_prep", "score"]
        flags = ["--model", str(model), "--out", str(tmp_path / "out"), "--backend", "transformers"]
        done = OFFLINE.run([*command, str(source), *flags], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.strip() == (
        f"error: {tmp_path / 'out'}: another run is writing here; wait for it, or choose another --out"
    )
    run_score(source, model, tmp_path / "out")  # the lock went with its holder
    with (tmp_path / "out" / ".lock").open() as f:
        fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        with pytest.raises(OutputError, match="another run is writing here"):
            run_score(source, model, tmp_path / "out")


def test_overwrite(tmp_path: Path, source: Path, model: Path) -> None:
    run_score(source, model, tmp_path / "out", rows_per_shard=5)
    run_score(source, model, tmp_path / "out", rows_per_shard=10, max_length=20, overwrite=True)
    run_score(source, model, tmp_path / "fresh", rows_per_shard=10, max_length=20)
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")
    (tmp_path / "out" / manifest.NAME).write_text("{damaged")
    with pytest.raises(IntegrityError, match="the manifest is damaged"):
        run_score(source, model, tmp_path / "out", rows_per_shard=10, max_length=20)
    run_score(source, model, tmp_path / "out", rows_per_shard=10, max_length=20, overwrite=True)
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")


def test_overwrite_with_settings_that_do_not_work_keeps_what_is_there(
    tmp_path: Path, source: Path, model: Path
) -> None:
    run_score(source, model, tmp_path / "out")
    before = snapshot(tmp_path / "out")
    for wrong in ({"max_length": 1000}, {"tokenizer": str(tmp_path)}, {"text_column": "absent"}):
        with pytest.raises(EntrodropError):
            run_score(source, model, tmp_path / "out", overwrite=True, **wrong)
    with pytest.raises(EntrodropError):
        run_score(tmp_path / "missing.jsonl", model, tmp_path / "out", overwrite=True)
    assert snapshot(tmp_path / "out") == before


FOREIGN = [
    ("notes.txt", "mine"),
    ("manifest.json", '{"manifest_version": 3, "name": "a browser extension"}'),
    ("manifest.json", "[1, 2]"),
    (".state.json", "{}"),
    ("shard-00000.parquet", "PAR1"),
]


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize(("name", "text"), FOREIGN)
def test_a_directory_that_holds_something_else(
    tmp_path: Path, source: Path, model: Path, name: str, text: str, overwrite: bool
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).write_text(text)
    with pytest.raises((OutputError, IntegrityError)):
        run_score(source, model, tmp_path / "out", overwrite=overwrite)
    assert [p.name for p in (tmp_path / "out").iterdir()] == [name]
    assert (tmp_path / "out" / name).read_text() == text


def test_files_beside_a_scored_dataset_stay(tmp_path: Path, source: Path, model: Path) -> None:
    run_score(source, model, tmp_path / "out")
    (tmp_path / "out" / "README.md").write_text("mine")
    run_score(source, model, tmp_path / "out", max_length=20, overwrite=True)
    assert (tmp_path / "out" / "README.md").read_text() == "mine"
    assert holds(tmp_path / "out")


def test_leftovers_are_removed(tmp_path: Path, source: Path, model: Path) -> None:
    out = tmp_path / "out"
    (out / ".tmp-tokenizer").mkdir(parents=True)
    (out / ".tmp-tokenizer" / "tokenizer.json").write_text("{")
    (out / ".tmp-shard-00000.parquet.part").write_text("PAR1")
    run_score(source, model, out)
    assert not list(out.rglob(".tmp-*"))
    (out / ".tmp-shard-00007.parquet.part").write_text("PAR1")
    assert run_score(source, model, out).already_complete
    assert not list(out.rglob(".tmp-*"))


def test_what_is_no_leftover_stays(tmp_path: Path, source: Path, model: Path) -> None:
    out, mine = tmp_path / "out", tmp_path / "mine"
    run_score(source, model, out)
    for folder in (mine, out / "mine"):
        folder.mkdir()
        (folder / ".tmp-notes").write_text("mine")
    (out / ".tmp-link").symlink_to(mine)
    (out / ".tmp-gone").symlink_to(tmp_path / "gone")
    (out / ".tmp-notes").write_text("mine")
    assert run_score(source, model, out).already_complete
    assert {p.name for p in out.glob(".tmp-*")} == {".tmp-link", ".tmp-gone", ".tmp-notes"}
    for folder in (mine, out / "mine", out):
        assert (folder / ".tmp-notes").read_text() == "mine"


@pytest.mark.parametrize("how", ["truncated", "flipped", "swapped", "empty", "foreign"])
def test_a_damaged_shard_is_found_before_a_manifest_is_written(
    tmp_path: Path, source: Path, model: Path, how: str
) -> None:
    out = tmp_path / "out"
    run_score(source, model, out, rows_per_shard=10)
    expected = contents(out)
    (out / manifest.NAME).unlink()
    path = shards(out)[1]
    data = bytearray(path.read_bytes())
    if how == "truncated":
        path.write_bytes(data[:-20])
    elif how == "flipped":
        data[len(data) // 3] ^= 4
        path.write_bytes(data)
    elif how == "swapped":
        path.write_bytes(shards(out)[2].read_bytes())
    elif how == "empty":
        path.write_bytes(b"")
    else:
        pq.write_table(pa.table({"x": [1]}), path)
    with pytest.raises(IntegrityError, match=r"shard-00001\.parquet"):
        run_score(source, model, out, rows_per_shard=10)
    assert not (out / manifest.NAME).exists()
    path.unlink()
    run_score(source, model, out, rows_per_shard=10)
    assert contents(out) == expected


def test_a_row_group_is_a_shard_and_metadata_say_what_is_in_it(tmp_path: Path, source: Path, model: Path) -> None:
    run_score(source, model, tmp_path / "out", rows_per_shard=10)
    schema = pq.read_schema(shards(tmp_path / "out")[0])
    assert schema.metadata[b"schema"] == b"scored/1"
    assert schema.metadata[b"score_unit"] == b"nats"
    assert b"token t" in schema.metadata[b"alignment"]
    assert schema.names == ["row_id", "window", "input_ids", "entropy", "logprob", "loss_mask"]
    assert schema.field("input_ids").type.value_type == pa.int32()
    assert schema.field("entropy").type.value_type == pa.float32()


def test_shards_beyond_99999_stay_in_order(tmp_path: Path) -> None:
    for i in (100_000, 5, 99_999, 100_001):
        run_module.shard_path(tmp_path, i).touch()
    names = [p.name for p in run_module.shards_of(tmp_path)]
    assert names == [f"shard-{i:05d}.parquet" for i in (5, 99_999, 100_000, 100_001)]


def test_settings_of_the_library_are_those_of_the_command(tmp_path: Path, source: Path, model: Path) -> None:
    config = settings_for(source, model, tmp_path / "out", keep_columns=("a", "b"))
    assert config.keep_columns == ("a", "b")
    with pytest.raises(ConfigError, match="there is no column 'a'"):
        run_score(source, model, tmp_path / "out", keep_columns=("a", "b"))


def test_an_overwriting_run_that_was_killed_while_cleaning_goes_on(
    tmp_path: Path, source: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed before each of the removals in turn; the first ones are of what a run does before it."""
    rows = [{"input_ids": ids} for ids in random_rows(12, V)] + [{"input_ids": "no"}]
    write_rows(source, rows)
    settings: dict[str, Any] = {"rows_per_shard": 5, "on_bad_row": "skip"}
    run_score(source, model, tmp_path / "old", max_length=20, **settings)
    run_score(source, model, tmp_path / "whole", **settings)
    unlink, rmdir = os.unlink, os.rmdir

    class Killed(BaseException):
        """Nothing catches it."""

    for moment in range(20):
        out, left = shutil.copytree(tmp_path / "old", tmp_path / f"out-{moment}"), iter(range(moment))

        def counted(call: Any, *arguments: Any, left: Any = left, **options: Any) -> None:
            if next(left, None) is None:
                raise Killed
            call(*arguments, **options)

        with monkeypatch.context() as patched:
            patched.setattr(os, "unlink", lambda *a, **k: counted(unlink, *a, **k))
            patched.setattr(os, "rmdir", lambda *a, **k: counted(rmdir, *a, **k))
            patched.setattr(run_module, "_make_missing", lambda *a: counted(lambda: pytest.fail("not killed")))
            try:
                run_score(source, model, out, overwrite=True, **settings)
            except Killed:
                pass
            except pytest.fail.Exception:
                break
        cleaning = "identity" not in json.loads((out / manifest.STATE).read_bytes())
        run_score(source, model, out, overwrite=not cleaning, **settings)
        assert contents(out) == contents(tmp_path / "whole")
    assert 5 < moment < 19


def test_a_wrong_command_does_not_spoil_an_unfinished_directory(tmp_path: Path, source: Path, model: Path) -> None:
    out = tmp_path / "out"
    run_score(source, model, out, rows_per_shard=10)
    expected = contents(out)
    for name in (manifest.NAME, manifest.STATE, "shard-00001.parquet"):
        (out / name).unlink()
    assert "rows_per_shard was 10, now 20" in mismatch(source, model, out, rows_per_shard=20)
    run_score(source, model, out, rows_per_shard=10)
    assert contents(out) == expected
