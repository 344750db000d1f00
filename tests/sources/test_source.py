"""Sources: every format, spans and seeks, splits, globs, URLs, saved and Hub datasets, and what bad input gets."""

from __future__ import annotations

import contextlib
import csv
import functools
import gzip
import hashlib
import http.server
import json
import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from entrodrop_prep.errors import ConfigError, EntrodropError, SourceError
from entrodrop_prep.sources.rows import Source, SourceRow
from entrodrop_prep.sources.source import open_source
from helpers.hub import READER, Hub
from helpers.warm import CLIENT

ROWS = [{"text": f"row {n} " + "ä\n\"'," * (n % 4), "n": n} for n in range(1000)]
FORMATS = ["jsonl", "jsonl.gz", "jsonl.zst", "ndjson", "json", "array.json", "array.json.gz", "csv", "csv.gz", "tsv"]
FORMATS += ["parquet", "arrow", "stream.arrow", "txt", "text.gz", "txt.zst"]


def opened(source: str | Path, **options: Any) -> Source:
    usual = {"split": "train", "split_given": False, "config": None, "limit": None, "text_rows": "line"}
    given_options = {**usual, **options}
    return open_source(str(source), **given_options)


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Rows in the format of the file's name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    name = path.name.removesuffix(".gz").removesuffix(".zst")
    if name.endswith(".parquet"):
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=70)
    elif name.endswith(".arrow"):
        table = pa.Table.from_pylist(rows)
        new = pa.ipc.new_stream if name.endswith("stream.arrow") else pa.ipc.new_file
        with new(str(path), table.schema) as writer:
            writer.write_table(table, max_chunksize=300)
    else:
        if name.endswith("array.json"):
            content = json.dumps(rows, indent=1)
        elif name.endswith((".jsonl", ".ndjson", ".json")):
            content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        elif name.endswith((".txt", ".text")):
            content = "".join(row["text"].replace("\n", " ") + "\n" for row in rows)
        else:
            dialect = "excel-tab" if name.endswith(".tsv") else "excel"
            with open(path, "w", newline="", encoding="utf-8") as f:
                writer = csv.DictWriter(f, rows[0], dialect=dialect)
                writer.writeheader()
                writer.writerows(rows)
            content = path.read_bytes().decode()
        path.write_bytes(compressed(path.name, content.encode()))
    return path


def compressed(name: str, content: bytes) -> bytes:
    if name.endswith(".gz"):
        return gzip.compress(content)
    return pa.compress(content, codec="zstd", asbytes=True) if name.endswith(".zst") else content


def expected(name: str, rows: list[dict[str, Any]] = ROWS) -> list[dict[str, Any]]:
    if "csv" in name or "tsv" in name:
        return [{key: str(value) for key, value in row.items()} for row in rows]
    if "txt" in name or "text" in name:
        return [{"text": row["text"].replace("\n", " ")} for row in rows]
    return rows


def everything(source: Source, span: int = 10**9, columns: list[str] | None = None) -> list[SourceRow]:
    rows: list[SourceRow] = []
    position: dict[str, Any] | None = None
    while True:
        chunk = source.read(len(rows), span, position, columns)
        rows += chunk.rows
        if chunk.next is None:
            return rows
        position = json.loads(json.dumps(chunk.next))


def values(rows: list[SourceRow]) -> list[dict[str, Any] | None]:
    assert [row.row_id for row in rows] == list(range(rows[0].row_id, rows[0].row_id + len(rows)))
    return [row.values for row in rows]


@pytest.mark.parametrize("extension", FORMATS)
def test_every_format_gives_its_rows_in_any_spans(tmp_path: Path, extension: str) -> None:
    path = write(tmp_path / f"data.{extension}", ROWS)
    source = opened(path)
    rows = everything(source)
    assert values(rows) == expected(extension)
    assert source.columns == list(expected(extension)[0])
    assert source.name == path.name
    assert source.total_rows == (1000 if "parquet" in extension or "arrow" in extension else None)
    assert source.size_bytes == path.stat().st_size
    for span in (1, 7, 128, 500, 1000, 1001):
        assert everything(opened(path), span) == rows
    chunks = [source.read(first, 300, None) for first in (0, 300, 600, 900)]
    assert sum(chunk.bytes_read for chunk in chunks) == source.size_bytes
    assert [row for chunk in chunks for row in chunk.rows] == rows
    assert source.read(1000, 5, None) == source.read(2000, 5, None)


@pytest.mark.parametrize("extension", FORMATS)
def test_another_process_goes_on_from_a_position(tmp_path: Path, extension: str) -> None:
    for part in range(3):
        write(tmp_path / "d" / f"part-{part}.{extension}", ROWS[part * 330 : part * 330 + 330])
    rows = everything(opened(tmp_path / "d"))
    assert values(rows) == expected(extension, ROWS[:990])
    for first in (329, 330, 500):
        position = json.loads(json.dumps(opened(tmp_path / "d").read(0, first, None).next))
        assert opened(tmp_path / "d").read(first, 200, position).rows == rows[first : first + 200]
    assert opened(tmp_path / "d").read(500, 200, None).rows == rows[500:700]


@pytest.mark.parametrize("extension", ["jsonl", "txt", "csv", "parquet"])
def test_a_position_spares_the_start_of_the_file(tmp_path: Path, extension: str) -> None:
    path = write(tmp_path / f"data.{extension}", ROWS)
    rows, later = everything(opened(path)), opened(path)
    position = opened(path).read(0, 900, None).next
    content = path.read_bytes()
    kept = content.index(b"\n") + 1 if extension == "csv" else 4  # the header is read again; so is Parquet's magic
    with open(path, "r+b") as f:
        f.seek(kept)
        f.write(b"\xff" * (len(content) // 2 - kept))
    assert later.read(900, 100, position).rows == rows[900:]


def test_reading_on_does_not_start_over(tmp_path: Path) -> None:
    """Once the file is gone from the disk, an open reader still continues; one that would start over cannot."""
    for extension in ("jsonl.gz", "csv", "txt.zst", "jsonl", "parquet"):
        path = write(tmp_path / f"data.{extension}", ROWS)
        source = opened(path)
        first = source.read(0, 400, None)
        path.unlink()
        assert values(first.rows + source.read(400, 600, first.next).rows) == expected(extension)
        with pytest.raises(SourceError, match="no such file"):
            source.read(0, 1, None)


def test_a_position_of_another_row_is_a_bug(tmp_path: Path) -> None:
    source = opened(write(tmp_path / "a.jsonl", ROWS))
    position = source.read(0, 10, None).next
    with pytest.raises(ValueError, match="row 10, not of row 11"):
        source.read(11, 10, position)


@pytest.mark.parametrize("extension", ["jsonl", "parquet", "csv.gz", "array.json", "arrow"])
def test_limit(tmp_path: Path, extension: str) -> None:
    write(tmp_path / f"a.{extension}", ROWS[:10])
    write(tmp_path / f"b.{extension}", ROWS[10:20])
    for limit in (1, 9, 10, 11, 20, 30):
        source = opened(tmp_path, limit=limit)
        assert values(everything(source, 4)) == expected(extension, ROWS[: min(limit, 20)])
        assert source.total_rows in (None, min(limit, 20))
    source = opened(tmp_path, limit=8)
    assert source.read(0, 8, None).next is None
    assert source.read(8, 8, None).rows == []


@settings(max_examples=60, deadline=None)
@given(
    lines=st.lists(
        st.sampled_from([b'{"a": 1}', b"", b"  \t", b"\xff", b'{"a": "\xc3\xa4"}\r', b"[1]", b'{"b"']), max_size=12
    ),
    ended=st.booleans(),
    span=st.integers(1, 5),
)
def test_jsonl_lines_are_counted_as_an_editor_counts(
    tmp_path_factory: pytest.TempPathFactory, lines: list[bytes], ended: bool, span: int
) -> None:
    path = tmp_path_factory.mktemp("lines") / "x.jsonl"
    path.write_bytes(b"\n".join(lines) + (b"\n" if ended else b""))
    wanted = [n for n, line in enumerate(lines, start=1) if line.strip()]
    if not any(lines[n - 1].startswith(b'{"a"') for n in wanted):
        with pytest.raises(SourceError, match="is a JSON object|is no JSON object" if wanted else "holds no rows"):
            opened(path)
        return
    rows = everything(opened(path), span)
    assert [row.where for row in rows] == [f"x.jsonl:{n}" for n in wanted]
    good = [lines[n - 1].startswith((b'{"a"',)) for n in wanted]
    assert [row.values is not None for row in rows] == good
    assert [row.problem is None for row in rows] == good


def test_jsonl_keeps_every_row_as_it_is(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {
            "messages": [{"role": "user", "content": "x"}],
            "tools": [{"name": "f", "parameters": {"a": {"type": "string"}}}],
        },
        {"messages": [{"role": "assistant", "content": None, "tool_calls": [{"arguments": {"b": None}}]}]},
        {"tools": [{"name": "g", "parameters": {"c": 1}}, {"name": "h"}], "extra": 2.50},
        {"tools": "[]", "emoji": "\N{GRINNING FACE}", "big": 10**30},
    ]
    source = opened(write(tmp_path / "x.jsonl", rows))
    assert values(everything(source)) == rows
    assert source.columns == ["messages", "tools", "extra", "emoji", "big"]
    (tmp_path / "y.jsonl").write_bytes(b'\xef\xbb\xbf{"a": 2}\n{"a": NaN, "e": "\\ud83d\\ude00"}')
    first, second = everything(opened(tmp_path / "y.jsonl"))
    assert first.values == {"a": 2}
    assert str(second.values) == "{'a': nan, 'e': '\N{GRINNING FACE}'}"


def test_columns_are_those_of_the_first_hundred_rows(tmp_path: Path) -> None:
    rows = [{"b": 1}] * 50 + [{"a": 1}] * 50 + [{"late": 1}]
    assert opened(write(tmp_path / "x.jsonl", rows)).columns == ["b", "a"]
    assert opened(write(tmp_path / "x.jsonl", rows), limit=50).columns == ["b"]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (b'{"a": 1,, }', "broken JSON: Expecting property name enclosed in double quotes at column 9"),
        (b'{"a": "\xc3\xa4\xff"}', "invalid UTF-8: byte 0xff at column 9"),
        (b"[1, 2]", "not a JSON object but an array"),
        (b"null", "not a JSON object but null"),
        (b"3.5", "not a JSON object but a number"),
        (b'{"a": "\\ud800"}', "half of a surrogate pair"),
        (b'{"b": [{"a": 1, "c": 2, "a": 1}]}', "an object has the key 'a' twice"),
        (b"[" * 100_000, "JSON nested more than 500 levels deep"),
        (b'{"a": ' + b"1" * 5000 + b"}", "JSON with a number of more than 4,300 digits"),
    ],
)
@pytest.mark.parametrize("name", ["x.jsonl", "x.jsonl.gz"])
def test_a_bad_line_is_a_row_with_a_problem(tmp_path: Path, name: str, line: bytes, problem: str) -> None:
    content = b'{"a": 0}\n\n' + line + b'\n{"a": 3}\n'
    (tmp_path / name).write_bytes(compressed(name, content))
    good, bad, last = everything(opened(tmp_path / name), 1)
    assert (good.values, last.values, last.row_id) == ({"a": 0}, {"a": 3}, 2)
    assert (bad.row_id, bad.where, bad.values) == (1, f"{name}:3", None)
    assert bad.problem is not None
    assert problem in bad.problem
    assert "\n" not in bad.problem


def test_json_array_rows(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text('\ufeff\n\n  [{"a": [1, {"b": null}]}, 5, {"c": "\\ud800"}]')
    good, number, half = everything(opened(path), 1)
    assert (good.where, good.values) == ("x.json row 0", {"a": [1, {"b": None}]})
    assert number.problem == "not a JSON object but a number"
    assert half.problem is not None
    path.write_text('[{"a": 1},\n{"b": 2},,\n{"c": 3}]')
    with pytest.raises(SourceError, match=r"x\.json:2: broken JSON array: an item is empty"):
        opened(path)
    path.write_text('{\n "a": 1\n}\n')
    with pytest.raises(SourceError, match="one JSON object over several lines"):
        opened(path)
    path.write_text("[]")
    with pytest.raises(SourceError, match="holds no rows"):
        opened(path)


def test_csv_rows(tmp_path: Path) -> None:
    long = "y" * 300_000
    body = f'text,n\r\n"two\r\nlines, ""quoted""",1\r\n\r\n{long},2\nlone,3,4\n\xff,5\n"a"b,6\nlast,7'
    (tmp_path / "x.csv").write_bytes(b"\xef\xbb\xbf" + body.encode("latin-1"))
    rows = everything(opened(tmp_path / "x.csv"), 1)
    assert [row.where for row in rows] == [f"x.csv:{n}" for n in (2, 5, 6, 7, 8, 9)]
    assert [row.values for row in rows] == [
        {"text": 'two\r\nlines, "quoted"', "n": "1"},
        {"text": long, "n": "2"},
        None,
        None,
        None,
        {"text": "last", "n": "7"},
    ]
    assert rows[2].problem == "3 fields where the header has 2"
    assert rows[3].problem == "invalid UTF-8 in column 'text'"
    assert str(rows[4].problem).startswith("broken CSV: ")
    (tmp_path / "x.csv").write_text('a,b\n1,2\n"never closed,3\n4,5\n')
    assert [row.problem for row in everything(opened(tmp_path / "x.csv"))] == [
        None,
        "broken CSV: unexpected end of data",
    ]
    for content, message in (("a,a\n1,2\n", "names 'a' twice"), ("a,b\n", "holds no rows"), ("", "holds no rows")):
        (tmp_path / "x.csv").write_text(content)
        with pytest.raises(SourceError, match=message):
            opened(tmp_path / "x.csv")


def test_text_rows_are_those_of_datasets(tmp_path: Path) -> None:
    path = tmp_path / "x.txt"
    path.write_bytes("one\n\ntwo\r\nthree\rfour\u2028still\x0cfour\r\r\n  five ".encode())
    loaded = datasets.load_dataset("text", data_files=str(path), split="train", cache_dir=str(tmp_path / "cache"))
    rows = everything(opened(path), 1)
    assert values(rows) == loaded.to_list()
    assert [row.where for row in rows] == [f"x.txt:{n + 1}" for n in range(len(rows))]
    path.write_bytes(b"good\nb\xe9d\n")
    assert everything(opened(path))[1].problem == "invalid UTF-8: byte 0xe9 at column 2"


def test_parquet_gives_nulls_and_reads_the_columns_asked_for(tmp_path: Path) -> None:
    rows = [{"a.b": 1, "a": "x", "c": {"d": None}}, {"a.b": None, "a": None, "c": None}]
    source = opened(write(tmp_path / "x.parquet", rows))
    assert source.columns == ["a.b", "a", "c"]
    assert values(everything(source)) == rows
    assert values(everything(source, 1, ["a", "missing"])) == [{"a": "x"}, {"a": None}]
    assert values(source.read(0, 2, None, ["missing"]).rows) == [{}, {}]
    assert values(source.read(0, 2, None).rows) == rows
    source = opened(write(tmp_path / "x.arrow", rows))
    assert values(everything(source, 1, ["a", "missing"])) == [{"a": "x"}, {"a": None}]


def test_columns_not_asked_for_are_not_read(tmp_path: Path) -> None:
    table = pa.table({"a": list(range(500)), "b": [hashlib.sha256(bytes([n % 256])).hexdigest() for n in range(500)]})
    pq.write_table(table, tmp_path / "x.parquet", compression="none", use_dictionary=False)
    chunk = pq.ParquetFile(tmp_path / "x.parquet").metadata.row_group(0).column(1)
    with open(tmp_path / "x.parquet", "r+b") as f:
        f.seek(chunk.data_page_offset)
        f.write(b"\xff" * chunk.total_compressed_size)
    source = opened(tmp_path / "x.parquet")
    assert values(everything(source, 100, ["a"])) == [{"a": n} for n in range(500)]
    with pytest.raises(SourceError, match=r"x\.parquet: cannot be read"):
        source.read(0, 500, None, ["b"])


def test_a_bad_value_in_parquet_is_a_row_with_a_problem(tmp_path: Path) -> None:
    broken = pa.array([b"ok", b"b\xffd", b"fine"]).view(pa.string())
    pq.write_table(pa.table({"text": broken}), tmp_path / "x.parquet")
    good, bad, last = everything(opened(tmp_path / "x.parquet"))
    assert (good.values, bad.values, last.values) == ({"text": "ok"}, None, {"text": "fine"})
    assert bad.problem == "invalid UTF-8: byte 0xff"
    assert bad.where == "x.parquet row 1"


def tool_dataset() -> tuple[Any, list[dict[str, Any]]]:
    rows: list[dict[str, Any]] = [
        {"text": "a", "tools": [{"f": {"x": None, "y": 1}}, {"g": []}], "more": {"k": [1, "two"]}},
        {"text": "b", "tools": [{"other": {"z": "s"}}], "more": None},
        {"text": "c", "tools": [], "more": {}},
    ]
    features = datasets.Features(
        {"text": datasets.Value("string"), "tools": datasets.List(datasets.Json()), "more": datasets.Json()}
    )
    return datasets.Dataset.from_list(rows, features=features), rows


def test_json_columns_of_datasets_come_back_as_objects(tmp_path: Path) -> None:
    dataset, rows = tool_dataset()
    dataset.to_parquet(str(tmp_path / "x.parquet"))
    dataset.save_to_disk(str(tmp_path / "saved"))
    arrow = next((tmp_path / "saved").glob("*.arrow"))
    for source in (tmp_path / "x.parquet", tmp_path / "saved", arrow):
        assert values(everything(opened(source), 2)) == rows
        assert values(everything(opened(source), 2, ["tools"])) == [{"tools": row["tools"]} for row in rows]


def test_save_to_disk(tmp_path: Path) -> None:
    dataset = datasets.Dataset.from_list(ROWS).select(range(0, 1000, 2))
    dataset.save_to_disk(str(tmp_path / "one"), num_shards=3)
    source = opened(tmp_path / "one")
    assert values(everything(source, 77)) == ROWS[::2]
    assert (source.total_rows, source.columns, source.name) == (500, ["text", "n"], "one")
    assert source.read(499, 1, {"row": 499}).rows[0].where == "one row 499"
    assert values(everything(opened(tmp_path / "one", limit=9), 4)) == ROWS[:18:2]
    with pytest.raises(ConfigError, match="--split test"):
        opened(tmp_path / "one", split="test", split_given=True)
    parts = datasets.DatasetDict({"train": dataset, "held_out": dataset.select(range(5))})
    parts.save_to_disk(str(tmp_path / "both"))
    source = opened(tmp_path / "both", split="held_out", split_given=True)
    assert values(everything(source)) == ROWS[:10:2]
    assert source.read(0, 1, None).rows[0].where == "both[held_out] row 0"
    assert str(tmp_path) not in json.dumps([source.identity(), source.stat()])
    with pytest.raises(SourceError, match="no split 'test', only train, held_out"):
        opened(tmp_path / "both", split="test")
    with pytest.raises(ConfigError, match="--config x"):
        opened(tmp_path / "both", config="x")
    shard = next((tmp_path / "one").glob("*.arrow"))
    shard.write_bytes(shard.read_bytes()[:3000])
    with pytest.raises(SourceError, match="saved dataset cannot be read"):
        opened(tmp_path / "one")


def test_a_saved_dataset_that_is_empty_or_damaged_is_refused(tmp_path: Path) -> None:
    datasets.Dataset.from_dict({"text": []}).save_to_disk(tmp_path / "saved")
    with pytest.raises(SourceError, match="holds no rows"):
        opened(tmp_path / "saved")
    for content in ("[]", "{", '{"splits": 3}'):
        (tmp_path / "saved" / "dataset_dict.json").write_text(content)
        with pytest.raises(SourceError, match="the saved dataset cannot be read"):
            opened(tmp_path / "saved")


@pytest.mark.parametrize(
    ("names", "by_split"),
    [
        (["train.jsonl", "test.jsonl", "extra.jsonl"], {"train": ["train.jsonl"], "test": ["test.jsonl"]}),
        (["data/train/b.jsonl", "data/train/a.jsonl", "data/dev/c.jsonl"],
         {"train": ["data/train/a.jsonl", "data/train/b.jsonl"], "validation": ["data/dev/c.jsonl"]}),
        (["data/train-00000-of-00002.jsonl", "data/train-00001-of-00002.jsonl", "data/odd-00000-of-00001.jsonl"],
         {"train": ["data/train-00000-of-00002.jsonl", "data/train-00001-of-00002.jsonl"],
          "odd": ["data/odd-00000-of-00001.jsonl"]}),
        (["b.jsonl", "sub/a.jsonl", "sub/contest.jsonl"], {"train": ["b.jsonl", "sub/a.jsonl", "sub/contest.jsonl"]}),
        (["only-test.jsonl"], {"test": ["only-test.jsonl"]}),
    ],
)  # fmt: skip
def test_splits_of_a_directory(tmp_path: Path, names: list[str], by_split: dict[str, list[str]]) -> None:
    root = tmp_path / "test [x]" / "src"
    for name in names:
        write(root / name, [{"text": name}])
    for name in (".hidden/train.jsonl", "_tmp/test.jsonl", "__pycache__/x.jsonl", "_success.jsonl", ".x.jsonl"):
        write(root / name, [{"text": "no"}])
    for name in ("README.md", "README.txt", "LICENSE.txt", "test_notes.md", "task.toml", "config.json", "train.bin"):
        (root / name).write_text("not data")
    for split, wanted in by_split.items():
        source = opened(root, split=split, split_given=True)
        assert values(everything(source)) == [{"text": name} for name in wanted]
        assert source.name == "src"
        assert source.identity() == {
            "kind": "files", "format": "json", "split": split,
            "files": [{"name": name, "size": (root / name).stat().st_size} for name in wanted],
        }  # fmt: skip
        assert str(tmp_path) not in json.dumps(source.stat())
    listed = ", ".join(by_split)
    with pytest.raises(SourceError, match=f"no split 'absent', only {listed}"):
        opened(root, split="absent", split_given=True)
    if "train" not in by_split:
        with pytest.raises(SourceError, match="no split 'train'"):
            opened(root)


def test_a_file_of_two_splits_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "train-test.jsonl", ROWS)
    with pytest.raises(SourceError, match=r"train-test\.jsonl belongs to the splits train and test"):
        opened(tmp_path)


def test_a_directory_holds_one_format(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", ROWS[:2])
    write(tmp_path / "b.json.gz", ROWS[2:3])
    assert values(everything(opened(tmp_path))) == ROWS[:3]
    write(tmp_path / "c.parquet", ROWS)
    with pytest.raises(SourceError, match=r"mixed formats: json \(b\.json\.gz\), parquet \(c\.parquet\)"):
        opened(tmp_path)
    assert values(everything(opened(f"{tmp_path}/*.jsonl"))) == ROWS[:2]


def test_links_to_folders_are_followed_once(tmp_path: Path) -> None:
    write(tmp_path / "elsewhere" / "a.jsonl", ROWS[:2])
    write(tmp_path / "src" / "b.jsonl", ROWS[2:3])
    os.symlink(tmp_path / "elsewhere", tmp_path / "src" / "linked")
    os.symlink(tmp_path / "src", tmp_path / "src" / "round")
    assert values(everything(opened(tmp_path / "src"))) == [ROWS[2], *ROWS[:2]]


def test_globs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "d" / "b.jsonl", ROWS[1:2])
    write(tmp_path / "d" / "a.jsonl", ROWS[:1])
    write(tmp_path / "d" / "deep" / "test.jsonl", ROWS[2:3])
    (tmp_path / "d" / "notes.md").write_text("x")
    monkeypatch.chdir(tmp_path)
    source = opened("d/*")
    assert values(everything(source)) == ROWS[:2]
    assert [f["name"] for f in source.identity()["files"]] == ["a.jsonl", "b.jsonl"]
    assert source.name == "*"
    assert opened(tmp_path / "d" / "*").identity() == source.identity()
    assert [row.where for row in everything(opened("d/**/*.jsonl"))] == ["a.jsonl:1", "b.jsonl:1", "deep/test.jsonl:1"]
    write(tmp_path / "[odd] *.jsonl", ROWS[:5])
    assert len(everything(opened("[odd] *.jsonl"))) == 5
    with pytest.raises(SourceError, match="no data file matches"):
        opened("d/*.csv")
    with pytest.raises(ConfigError, match="--split test"):
        opened("d/*.jsonl", split="test", split_given=True)


def test_fsspec_urls(tmp_path: Path) -> None:
    write(tmp_path / "d" / "train.jsonl.gz", ROWS)
    write(tmp_path / "d" / "test.jsonl.gz", ROWS)
    url = f"file://{tmp_path}/d"
    assert values(everything(opened(f"{url}/train.jsonl.gz"))) == ROWS
    assert values(everything(opened(url))) == ROWS
    assert len(everything(opened(f"{url}/*.gz"))) == 2000
    memory = fsspec.filesystem("memory")
    for extension in FORMATS:
        for split in ("train", "test"):
            local = write(tmp_path / f"{split}.{extension}", ROWS[:300])
            memory.pipe(f"/{extension}/sub/{split}.{extension}", local.read_bytes())
        memory.pipe(f"/{extension}/README.md", b"no data")
        one = opened(f"memory://{extension}/sub/train.{extension}")
        assert values(everything(one, 70)) == expected(extension, ROWS[:300])
        assert one.name == f"train.{extension}"
        directory = opened(f"memory://{extension}")
        assert everything(directory, 299)[299].values == expected(extension, ROWS)[299]
        assert [f["name"] for f in directory.identity()["files"]] == [f"sub/train.{extension}"]
        assert directory.stat() == directory.stat()
        both = opened(f"memory://{extension}/*/*.{extension}")
        assert len(everything(both)) == 600
        position = both.read(0, 450, None).next
        resumed = opened(f"memory://{extension}/*/*.{extension}").read(450, 10, position)
        assert values(resumed.rows) == expected(extension, ROWS)[150:160]
    for url, message in (
        ("memory://absent.jsonl", "no such file"),
        ("memory://absent/*.jsonl", "no data file matches"),
        ("nonsense://x.jsonl", "cannot be opened"),
        (f"file://{tmp_path}/absent.jsonl", "no such file"),
        ("memory://jsonl/README.md", "no known data format"),
    ):
        with pytest.raises(SourceError, match=message):
            opened(url)


class PlainServer(http.server.SimpleHTTPRequestHandler):
    """Files of a folder, without ranges."""

    def log_message(self, format: str, *args: Any) -> None:
        """Keep the test's output clean."""


@contextlib.contextmanager
def served(handler: Any) -> Iterator[str]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_http(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", ROWS)
    write(tmp_path / "a.jsonl.gz", ROWS)
    with served(functools.partial(PlainServer, directory=str(tmp_path))) as url:
        for name in ("a.jsonl", "a.jsonl.gz"):
            position = opened(f"{url}/{name}").read(0, 600, None).next
            assert values(opened(f"{url}/{name}").read(600, 600, position).rows) == ROWS[600:]
        with pytest.raises(SourceError, match="no such file"):
            opened(f"{url}/b.jsonl")


class Refusing(PlainServer):
    """Answers every request with the status that its path begins with."""

    def do_GET(self) -> None:
        self.send_error(int(self.path[1:4]))

    do_HEAD = do_GET


@pytest.mark.parametrize(("status", "there"), [(401, True), (403, True), (404, False), (410, False), (500, True)])
def test_a_refusal_is_not_a_missing_file(status: int, there: bool) -> None:
    with served(Refusing) as url, pytest.raises(SourceError) as caught:
        opened(f"{url}/{status}/a.jsonl?token=S3cr3t")
    assert ("no such file" in str(caught.value)) != there
    assert not there or str(status) in str(caught.value)
    assert "S3cr3t" not in str(caught.value)


@pytest.mark.parametrize("extension", ["jsonl.gz", "txt.zst", "parquet", "arrow", "array.json.gz", "csv.zst"])
@pytest.mark.parametrize("damage", ["cut", "overwritten"])
def test_damaged_files_are_named(tmp_path: Path, extension: str, damage: str) -> None:
    rows = [{"text": hashlib.sha256(str(n).encode()).hexdigest()} for n in range(2000)]
    content = write(tmp_path / f"data.{extension}", rows).read_bytes()
    half = content[: len(content) // 2]
    (tmp_path / f"data.{extension}").write_bytes(half if damage == "cut" else b"PAR0" * (len(half) // 4))
    with pytest.raises(SourceError, match=f"^data.{extension}: "):
        everything(opened(tmp_path / f"data.{extension}"))


def test_what_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "a.jsonl", ROWS)
    for source, message in (
        ("./absent", "no such file or directory"),
        ("/absent/dir", "no such file or directory"),
        ("~/absent-dir", "no such file or directory"),
        ("a/b/c", "no such file or directory, and no Hub dataset id"),
        ("a.jsonl/b.jsonl", "no such file or directory"),
        ("json", "name of a file format"),
    ):
        with pytest.raises(SourceError, match=message):
            opened(source)


def test_no_permission(tmp_path: Path) -> None:
    """Asked as a user without rights, since root has them all."""
    write(tmp_path / "a.jsonl", ROWS)
    (tmp_path / "a.jsonl").chmod(0)
    write(tmp_path / "closed" / "b.jsonl", ROWS)
    (tmp_path / "closed").chmod(0)
    messages = []
    read_end, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read_end)
        os.chdir(tmp_path)
        if os.getuid() == 0:
            os.setuid(65534)
        for source in ("a.jsonl", "closed/b.jsonl", "closed"):
            try:
                opened(source)
                messages.append("it was read")
            except EntrodropError as e:
                messages.append(str(e))
        os.write(write_end, json.dumps(messages).encode())
        os._exit(0)
    os.close(write_end)
    with os.fdopen(read_end, "rb") as f:
        messages = json.loads(f.read())
    os.waitpid(child, 0)
    (tmp_path / "closed").chmod(0o700)
    assert [m.split(": ", 1)[1].split(";")[0] for m in messages] == ["permission denied"] * 3


def test_stat_tells_of_a_change(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", ROWS)
    source = opened(path)
    before = source.stat()
    assert before == {"a.jsonl": [path.stat().st_size, path.stat().st_mtime_ns]}
    assert source.stat() == before
    os.utime(path, ns=(1, 1))
    assert source.stat() != before


ASK = """
import json, sys
from entrodrop_prep.errors import SourceError
from entrodrop_prep.sources.source import open_source
answers = []
for source, split, config in json.loads(sys.argv[1]):
    try:
        opened = open_source(source, split=split, split_given=True, config=config, limit=3)
        rows = opened.read(1, 5, None)
        values, where = [row.values for row in rows.rows], rows.rows[0].where
        answers.append([values, where, rows.next, opened.identity(), opened.total_rows])
    except SourceError as e:
        answers.append(str(e))
print(json.dumps(answers))
"""


def test_hub_datasets(tmp_path: Path) -> None:
    asked = [
        ("org/name", "train", None), ("org/name", "absent", None), ("org/name", "train", "absent"),
        ("org/missing", "train", None), ("org/gated", "train", None),
    ]  # fmt: skip

    def ask(hub: Hub, questions: list[Any], **environment: str) -> list[Any]:
        done = CLIENT.run(
            [sys.executable, "-c", ASK, json.dumps(questions)],
            env={**hub.environment(tmp_path / "home", READER), **environment},
            capture_output=True,
            text=True,
            cwd=tmp_path,
        )
        assert done.returncode == 0, done.stderr
        return list(json.loads(done.stdout))

    with Hub(tmp_path / "hub") as hub:
        content = write(tmp_path / "rows.parquet", ROWS).read_bytes()
        files = {f"data/{name}-00000-of-00001.parquet": content for name in ("train", "test")}
        repo = hub.create("org/name", private=False, files=files)
        hub.create("org/gated", private=False).change(gated="auto")
        rows, split, config, missing, gated = ask(hub, asked)
    identity = {"kind": "hub", "dataset": "org/name", "config": "default", "split": "train", "revision": repo.head()}
    assert rows == [ROWS[1:3], "org/name[train] row 1", None, identity, 3]
    assert "absent" in split
    assert "--split" in split
    assert "'absent' not found" in config
    assert "--config" in config
    assert "check the id" in missing
    assert "HF_TOKEN" in missing
    assert "./org/missing" in missing
    assert f"accept its terms on {hub.url}/datasets/org/gated" in gated
    cached, offline = ask(hub, [asked[0], asked[3]], HF_HUB_OFFLINE="1")
    assert cached[0] == ROWS[1:3]
    assert "HF_HUB_OFFLINE" in offline
