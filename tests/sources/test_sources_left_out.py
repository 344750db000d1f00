"""Nothing of a source is left out silently: files, columns, compressions; what is no data is said to be that."""

from __future__ import annotations

import bz2
import gzip
import json
import logging
import lzma
import os
import socket
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from entrodrop_prep.errors import RowError, SourceError
from entrodrop_prep.sources.rows import Source
from entrodrop_prep.sources.source import open_source
from helpers.models import run_score, write_rows

Log = pytest.LogCaptureFixture


def opened(source: str | Path, **options: Any) -> Source:
    return open_source(
        str(source), **{"split": "train", "split_given": False, "config": None, "limit": None, **options}
    )


def texts(source: Source) -> list[Any]:
    return [row.problem if row.values is None else row.values.get("text") for row in source.read(0, 10**6, None).rows]


def lines(*given: str) -> bytes:
    return b"".join(json.dumps({"text": text}).encode() + b"\n" for text in given)


@pytest.mark.parametrize("ending", ["bz2", "xz", "lzma", "gz", "gzip", "GZ", "zst", "zstd", "Bz2"])
def test_every_compression_is_read_and_continued(tmp_path: Path, ending: str) -> None:
    content = lines(*(f"row {n}" for n in range(300)))
    pack = {
        "b": bz2.compress,
        "x": lzma.compress,
        "l": lambda c: lzma.compress(c, lzma.FORMAT_ALONE),
        "g": gzip.compress,
    }
    packed = pack.get(ending[0].lower(), lambda c: pa.compress(c, codec="zstd", asbytes=True))(content)
    if ending == "zstd":  # pzstd begins with a frame that says how long the next one is
        packed = b"\x50\x2a\x4d\x18\x04\x00\x00\x00" + len(packed).to_bytes(4, "little") + packed
    (tmp_path / f"a.jsonl.{ending}").write_bytes(packed)
    source = opened(tmp_path)
    assert texts(source) == [f"row {n}" for n in range(300)]
    position = source.read(0, 200, None).next
    assert opened(tmp_path).read(200, 1, position).rows[0].values == {"text": "row 200"}
    (tmp_path / f"a.jsonl.{ending}").write_bytes(packed[: len(packed) // 2])
    with pytest.raises(SourceError, match=r"a\.jsonl\..*: cannot be read"):
        opened(tmp_path).read(0, 500, None)


@pytest.mark.parametrize("ending", ["bz2", "xz", "gz"])
def test_streams_one_after_the_other_are_read_to_the_end(tmp_path: Path, ending: str) -> None:
    pack = {"bz2": bz2.compress, "xz": lzma.compress, "gz": gzip.compress}[ending]
    file, first, second = tmp_path / f"a.jsonl.{ending}", pack(lines("a", "b")), pack(lines("c"))
    for between in (b"", bytes(4), bytes(1 << 18)):
        file.write_bytes(first + between + second + between)
        assert texts(opened(file)) == ["a", "b", "c"]
    for behind in (b"not packed", b"\xff" + second[1:], second[:-1]):
        file.write_bytes(first + behind)
        with pytest.raises(SourceError, match=r"a\.jsonl\..*: cannot be read"):
            texts(opened(file))


def test_files_of_a_directory_that_are_not_read_are_named(tmp_path: Path, caplog: Log) -> None:
    unread = ["b.jsonl.lz4", "c.partial", "d.jsonl.tmp", "e", "_f.jsonl", ".g.csv", ".cache/h.jsonl", "README.jsonl"]
    silent = ["README.md", "LICENSE", ".gitattributes", "_SUCCESS"]
    for name in ["a.jsonl", *unread, *silent]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(lines(name))
    (tmp_path / "z.jsonl").touch()
    assert texts(opened(tmp_path)) == ["a.jsonl"]
    (told,) = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert "3 hidden or beginning with _ (.cache/h.jsonl, .g.csv, _f.jsonl)" in told
    assert "4 of no known format (b.jsonl.lz4, c.partial, d.jsonl.tmp and 1 more)" in told
    assert "1 a readme or metadata by its name (README.jsonl)" in told
    assert "1 empty (z.jsonl)" in told
    assert not any(name in told for name in silent)


def test_a_glob_names_what_it_finds_and_does_not_read(tmp_path: Path, caplog: Log) -> None:
    for name in ("a.jsonl", "b.bin", "sub/c.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(lines(name))
    assert texts(opened(f"{tmp_path}/*")) == ["a.jsonl"]
    assert "1 of no known format (b.bin), 1 folders, which a glob does not enter without ** (sub)" in caplog.text
    caplog.clear()
    assert texts(opened(f"{tmp_path}/**/*.jsonl")) == ["a.jsonl", "sub/c.jsonl"]
    assert texts(opened(f"file://{tmp_path}/*.jsonl")) == ["a.jsonl"]
    assert not [r for r in caplog.records if r.levelno == logging.WARNING]
    with pytest.raises(SourceError, match=r"no data file matches; not read: 1 of no known format \(b\.bin\)"):
        opened(f"{tmp_path}/b*")
    import fsspec

    for name in ("a.jsonl", "b.bin", "_c.jsonl"):
        fsspec.filesystem("memory").pipe(f"/left/{name}", lines(name))
    caplog.clear()
    assert texts(opened("memory://left")) == ["a.jsonl"]
    assert "1 hidden or beginning with _ (_c.jsonl), 1 of no known format (b.bin)" in caplog.text


@pytest.mark.parametrize(
    ("names", "unread", "other"),
    [
        (["data-train-1.jsonl", "data-2.jsonl"], "data-2.jsonl", ""),
        (["train/a.jsonl", "b.jsonl"], "b.jsonl", ""),
        (["x.jsonl", "dev.jsonl", "train.jsonl", "test.jsonl"], "x.jsonl", "validation (1 file), test (1 file)"),
    ],
)
def test_names_without_a_split_beside_names_with_one(
    tmp_path: Path, caplog: Log, names: list[str], unread: str, other: str
) -> None:
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(lines(name))
    with caplog.at_level(logging.INFO):
        assert len(texts(opened(tmp_path))) == 1
    assert f"1 whose names carry no split where others do ({unread})" in caplog.text
    assert f"other splits: {other}" in caplog.text if other else "other splits" not in caplog.text


def test_columns_are_those_of_every_file(tmp_path: Path) -> None:
    for n, row in enumerate([{"text": "a"}, {"text": "b", "labels": [1]}, {"extra": 1, "text": "c"}]):
        pq.write_table(pa.Table.from_pylist([row]), tmp_path / f"{n}.parquet")
    source = opened(tmp_path)
    assert source.columns == ["text", "labels", "extra"]
    rows = source.read(0, 9, None, ["text", "labels"]).rows
    assert [row.values for row in rows] == [{"text": "a"}, {"text": "b", "labels": [1]}, {"text": "c"}]
    for n, head in enumerate(["text", "n,text", "text,tag"]):
        (tmp_path / "csv").mkdir(exist_ok=True)
        (tmp_path / "csv" / f"{n}.csv").write_text(f"{head}\n{','.join('x' for _ in head.split(','))}\n")
    assert opened(tmp_path / "csv").columns == ["text", "n", "tag"]


@pytest.mark.parametrize("ending", ["parquet", "arrow"])
def test_types_of_a_column_in_use_must_go_together(tmp_path: Path, ending: str) -> None:
    def write(name: str, **columns: Any) -> None:
        table = pa.table(columns)
        if ending == "parquet":
            pq.write_table(table, tmp_path / f"{name}.{ending}")
        else:
            with pa.ipc.new_file(str(tmp_path / f"{name}.{ending}"), table.schema) as writer:
                writer.write_table(table)

    write("a", text=["x"], n=[1])
    write("b", text=pa.array(["y"], pa.large_string()), n=["one"])
    write("c", text=pa.nulls(1), n=[2.5])
    opened(tmp_path).check(["text"])
    with pytest.raises(SourceError, match=rf"column 'n' is int64 in a\.{ending} and string in b\.{ending}; "):
        opened(tmp_path).check(["text", "n"])
    one, two = [{"role": "user"}], [{"role": "user", "content": "x", "tool_calls": None}]
    write("a", text=pa.array([one]))
    write("b", text=pa.array([two]))
    write("c", text=pa.array([two], pa.large_list(pa.struct({"content": pa.large_string(), "role": pa.string()}))))
    opened(tmp_path).check(["text"])
    write("c", text=pa.array([[{"role": 1}]]))
    with pytest.raises(SourceError, match="column 'text' is list"):
        opened(tmp_path).check(["text"])


def test_a_text_file_is_one_document(tmp_path: Path, caplog: Log) -> None:
    (tmp_path / "b.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo\n\n")
    (tmp_path / "a.text.gz").write_bytes(gzip.compress("\u00e4\n".encode()))
    (tmp_path / "c.txt").touch()
    (tmp_path / "d.txt.xz").write_bytes(lzma.compress(b""))
    (tmp_path / "e.txt").write_bytes(b"fine\n\xc3\xa4\xff")
    with caplog.at_level(logging.INFO):
        source = opened(tmp_path)
    assert texts(source) == ["\u00e4\n", "one\ntwo\n\n", "invalid UTF-8: byte 0xff in line 2 at column 2"]
    assert source.total_rows == 3
    assert "5 text files, each one document" in caplog.text
    assert "2 empty (c.txt, d.txt.xz)" in caplog.text
    for first in range(3):
        position = opened(tmp_path).read(0, first, None).next if first else None
        assert opened(tmp_path).read(first, 5, position).rows == source.read(0, 5, None).rows[first:]
    assert opened(tmp_path).identity()["text_rows"] == "document"
    by_line = opened(tmp_path / "b.txt", text_rows="line")
    assert texts(by_line) == ["one", "two", ""]
    assert "text_rows" not in by_line.identity()


@pytest.mark.parametrize(
    ("name", "content", "text_rows", "wanted"),
    [
        ("a.txt", "\u00e4b\nc".encode("utf-16-le"), "document", ["invalid UTF-8: byte 0xe4 in line 1 at column 1"]),
        (
            "a.txt",
            b"\n" + "bc".encode("utf-16-be"),
            "document",
            ["a NUL byte (a binary file, or UTF-16) in line 2 at column 1"],
        ),
        ("a.txt", b"one\nt\0w\n", "line", ["one", "a NUL byte (a binary file, or UTF-16) at column 2"]),
        (
            "a.csv",
            b"text,n\none,1\nt\0w,2\n",
            "document",
            ["one", "a NUL byte (a binary file, or UTF-16) in column 'text'"],
        ),
    ],
)
def test_what_is_no_text_or_utf16_without_a_mark_is_bad(
    tmp_path: Path, name: str, content: bytes, text_rows: str, wanted: list[str]
) -> None:
    (tmp_path / name).write_bytes(content)
    assert texts(opened(tmp_path / name, text_rows=text_rows)) == wanted


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.jsonl", b"plain text\n", "its first row is no JSON object: broken JSON"),
        ("a.jsonl", b"plain\ntext\n", "none of its first 2 rows is a JSON object: broken JSON"),
        ("a.json", b"PAR1" + bytes(90), "its name says JSON lines (.json), but it is a Parquet file"),
        ("a.csv", b"PK\x03\x04", "its name says CSV (.csv), but it is a zip archive"),
        ("a.txt", "text".encode("utf-16"), "its name says text (.txt), but it is UTF-16 text"),
        ("a.jsonl.xz", bz2.compress(b"{}"), "its name says xz, but it is bzip2 data"),
        ("a.parquet", b"version https://git-lfs.github.com/spec/v1\n", "but it is a Git LFS pointer"),
        ("a.jsonl.zst", b"version https://git-lfs.github.com/spec/v1\n", "but it is a Git LFS pointer"),
    ],
)
def test_a_file_that_is_not_what_its_name_says(tmp_path: Path, name: str, content: bytes, said: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(SourceError) as caught:
        opened(tmp_path / name)
    assert said in str(caught.value)
    assert str(caught.value).startswith(name)


def test_what_cannot_be_read_twice_is_refused_at_once(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines("a"))
    os.mkfifo(tmp_path / "b.jsonl")
    for source in (tmp_path, tmp_path / "b.jsonl", f"{tmp_path}/*", f"file://{tmp_path}/b.jsonl"):
        with pytest.raises(SourceError, match=r"b\.jsonl: is a FIFO, not a regular file"):
            opened(source)
    (tmp_path / "b.jsonl").unlink()
    with socket.socket(socket.AF_UNIX) as s:
        s.bind(os.path.relpath(tmp_path / "agent"))
        with pytest.raises(SourceError, match="agent: is a socket"):
            opened(tmp_path)
    with pytest.raises(SourceError, match="/dev/null: is a device"):
        opened("/dev/null")


def test_names_that_a_manifest_could_not_keep_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / os.fsdecode(b"bad-\xff")
    folder.mkdir()
    (folder / "a.jsonl").write_bytes(lines("a"))
    with pytest.raises(SourceError, match="its name is not UTF-8") as caught:
        opened(folder)
    assert "bad-\\xff" in str(caught.value)
    assert texts(opened(folder / "a.jsonl")) == ["a"]  # of what lies above nothing is kept
    (folder / os.fsdecode(b"\xe4.jsonl")).write_bytes(lines("b"))
    for source in (folder, folder / os.fsdecode(b"\xe4.jsonl"), f"{folder}/*.jsonl"):
        with pytest.raises(SourceError, match="its name is not UTF-8"):
            opened(source)
    (tmp_path / "new\nline\x1b[2J.jsonl").write_bytes(b"no JSON\n")
    with pytest.raises(SourceError) as caught:
        opened(tmp_path / "new\nline\x1b[2J.jsonl")
    assert str(caught.value).startswith("new\\nline\\x1b[2J.jsonl:1: ")


def test_a_directory_of_plain_and_compressed_files_is_read_whole(tmp_path: Path) -> None:
    (tmp_path / "part-0.jsonl").write_bytes(lines("a", "b", "c"))
    (tmp_path / "part-1.jsonl.bz2").write_bytes(bz2.compress(lines("d", "e", "f")))
    (tmp_path / "part-2.jsonl.gzip").write_bytes(gzip.compress(lines("g", "h", "i")))
    assert texts(opened(tmp_path)) == list("abcdefghi")


@pytest.mark.parametrize("as_strings", [True, False])
def test_rows_whose_dictionaries_repeat_are_read_few_at_a_time(tmp_path: Path, as_strings: bool) -> None:
    """128 rows of 4 MB in a file of some kB: neither the rows together nor a dictionary counts against one row."""
    content = "a " * (2 << 20)
    strings = pa.DictionaryArray.from_arrays(pa.array([0, 1] * 128, pa.int32()), pa.array(["x", content]))
    names = pa.DictionaryArray.from_arrays(pa.array([0] * 256, pa.int32()), pa.array(["user"]))
    struct = pa.StructArray.from_arrays([names, strings], ["role", "content"])
    table = pa.table({"messages": pa.ListArray.from_arrays(pa.array(range(0, 257, 2), pa.int32()), struct)})
    pq.write_table(table, tmp_path / "a.parquet", store_schema=not as_strings)
    assert (tmp_path / "a.parquet").stat().st_size < 10**6
    source = opened(tmp_path / "a.parquet")
    chunk = source.read(0, 128, None, at_most=10 << 20)
    assert len(chunk.rows) == 3
    assert chunk.rows[2].values == {
        "messages": [{"role": "user", "content": "x"}, {"role": "user", "content": content}]
    }
    last = source.read(127, 1, {"row": 127, "file": 0, "at": {"row": 127}}).rows[0]
    assert last.values == chunk.rows[0].values
    assert pa.default_memory_pool().max_memory() < 300 << 20
    small = opened(tmp_path / "a.parquet", max_row_bytes=1 << 20).read(0, 1, None).rows[0]
    assert "over the limit of 1,048,576: raise --max-row-bytes" in str(small.problem)
    tags = pa.array([f"tag {n} " * 1000 for n in range(1000)]).dictionary_encode()
    pq.write_table(pa.table({"text": tags}), tmp_path / "b.parquet")
    rows = opened(tmp_path / "b.parquet", max_row_bytes=1 << 20).read(0, 1000, None).rows
    assert all(row.values is not None for row in rows)


@pytest.mark.parametrize(
    ("row", "late"),
    [
        ({"input_ids": [4, 5, 6]}, {"labels": [-100, 5, 6]}),
        ({"input_ids": [4, 5, 6]}, {"attention_mask": [1, 1, 0]}),
        ({"input_ids": [4, 5, 6]}, {"completion_mask": [0, 0, 1]}),
        ({"prompt": "w4", "completion": "w5"}, {"tools": [{"name": "f"}]}),
        ({"instruction": "w4", "output": "w5"}, {"input": "w6"}),
    ],
)
def test_a_later_row_with_a_column_that_matters_is_bad(
    model: Path, tmp_path: Path, caplog: Log, row: dict[str, Any], late: dict[str, Any]
) -> None:
    rows = [row] * 101 + [{**row, **late}] * 10 + [{**row, **dict.fromkeys(late), "other": 1}]
    source = write_rows(tmp_path / "a.jsonl", rows)
    column = next(iter(late))
    with pytest.raises(RowError, match=rf"a\.jsonl:102: row 101: it has a column '{column}', which none of the first"):
        run_score(source, model, tmp_path / "out")
    counts = run_score(source, model, tmp_path / "out", on_bad_row="skip").counts
    assert (counts["rows"], counts["bad_rows"]) == (102, 10)
    assert "a.jsonl: 8.9% of the rows are lost, 10 of 112: 10 bad" in caplog.text


def test_few_lost_rows_are_no_warning(model: Path, tmp_path: Path, caplog: Log) -> None:
    rows = [{"text": "w4 w5 w6"}] * 95 + [{"text": ""}] * 5
    assert run_score(write_rows(tmp_path / "a.jsonl", rows), model, tmp_path / "a").counts["short_rows"] == 5
    assert "are lost" not in caplog.text
    run_score(write_rows(tmp_path / "b.jsonl", [*rows, {"text": ""}]), model, tmp_path / "b")
    assert "b.jsonl: 5.9% of the rows are lost, 6 of 101: 6 of fewer than two tokens" in caplog.text
