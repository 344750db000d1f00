"""Rows that are large, and sources that change while they are read."""

from __future__ import annotations

import gzip
import json
import os
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from entrodrop_prep.config import ScoreConfig
from entrodrop_prep.errors import EntrodropError, SourceError
from entrodrop_prep.scoring import run as run_module
from entrodrop_prep.scoring.tokenize import Encoder, RowFormat
from entrodrop_prep.sources.files import DataFile
from entrodrop_prep.sources.parquet_pages import page_sizes
from entrodrop_prep.sources.source import open_source
from helpers.models import run_score, shards, write_rows

DEMO = Path(__file__).resolve().parents[2] / "entrodrop_prep" / "demo" / "model"
LONG, LIMIT = 3 << 20, 1 << 20
CHAT = (
    "{% for m in messages %}the {{ m.role }} {{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}the assistant {% endif %}"
)
LONG_TEXT = "the cat sat on the mat\n" * 1_000


def rows_of(path: Path, **options: Any) -> list[str]:
    usual: dict[str, Any] = {"split": "train", "split_given": False, "config": None, "limit": None}
    rows = open_source(str(path), **usual, max_row_bytes=LIMIT, **options).read(0, 99, None).rows
    return [str(row.problem)[:60] if row.values is None else row.values["text"] for row in rows]


def said(size: int) -> str:
    return f"row of {size:,} bytes, over the limit of {LIMIT:,}: raise --max-row-bytes"[:60]


def test_a_row_that_is_too_large_is_bad_and_the_next_one_is_read(tmp_path: Path) -> None:
    long = "x" * LONG
    line = json.dumps({"text": long}) + "\n"
    content = '{"text": "a"}\n' + line + '{"text": "b"}\n' + line.strip()
    wanted = ["a", said(len(line)), "b", said(len(line) - 1)]
    for name in ("a.jsonl", "a.jsonl.gz"):
        data = content.encode()
        (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
        assert rows_of(tmp_path / name) == wanted
    items = [{"text": "a"}, {"text": f'[{long}"\\'}, {"text": "b"}]
    (tmp_path / "a.json").write_text(json.dumps(items))
    assert rows_of(tmp_path / "a.json") == ["a", said(len(json.dumps(items[1])) + 1), "b"]
    records = ["a", f'"{long}"', "b", f'"one\n""{long}""\n', 'two"', "c"]
    (tmp_path / "a.csv").write_text("text\n" + "\n".join(records) + "\n")
    sizes = [len(records[1]) + 1, len(records[3]) + len(records[4]) + 2]
    assert rows_of(tmp_path / "a.csv") == ["a", said(sizes[0]), "b", said(sizes[1]), "c"]
    pq.write_table(pa.table({"text": ["a", long, "b"]}), tmp_path / "a.parquet")
    assert [row.split(" bytes")[0][:6] for row in rows_of(tmp_path / "a.parquet")] == ["a", "row of", "b"]
    (tmp_path / "a.txt").write_text(f"a\n{long}\nb")
    assert rows_of(tmp_path / "a.txt") == [said(LONG + 4)]
    assert rows_of(tmp_path / "a.txt", text_rows="line") == ["a", said(LONG + 1), "b"]


def metaspace() -> PreTrainedTokenizerFast:
    """As Llama 2's: no word is cut from the next before the merges."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<unk>", "</s>"])
    tokenizer.train_from_iterator(["the cat sat on the mat and the dog ate that "] * 20, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>")


def unigram() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=60, special_tokens=["<unk>", "</s>"], unk_token="<unk>")
    tokenizer.train_from_iterator(["the cat sat on the mat and the dog ate that "] * 20, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>")


def demo() -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast.from_pretrained(DEMO)


@pytest.mark.parametrize("make", [metaspace, unigram, demo])
@pytest.mark.parametrize(
    "text", ["the cat sat on the mat\n", "thecatsatonthemat", " " * 90 + "the ", "\u732b\u304c\u3002", "ab"]
)
def test_a_text_that_is_cut_off_has_the_tokens_of_the_whole(make: Callable[[], Any], text: str) -> None:
    compare(make(), RowFormat("text", ("text",)), {"text": text * (60_000 // len(text))})


@pytest.mark.parametrize("make", [metaspace, unigram, demo])
@pytest.mark.parametrize(("first", "second"), [("the cat ", LONG_TEXT), (LONG_TEXT, "the dog"), (LONG_TEXT, LONG_TEXT)])
def test_so_have_a_completion_and_a_chat_and_their_masks(make: Callable[[], Any], first: str, second: str) -> None:
    tokenizer = make()
    compare(
        tokenizer, RowFormat("prompt_completion", ("prompt", "completion")), {"prompt": first, "completion": second}
    )
    tokenizer.chat_template = CHAT
    messages = [{"role": "user", "content": first}, {"role": "assistant", "content": second}]
    compare(tokenizer, RowFormat("messages", ("messages",)), {"messages": messages})
    compare(tokenizer, RowFormat("messages", ("messages",)), {"messages": [*turns("a"), *turns("b"), *messages]})


def compare(tokenizer: Any, form: RowFormat, row: dict[str, Any]) -> None:
    """The tokens in use of a row that is cut off, and what of them is trained on, with those of the whole row."""
    settings: dict[str, Any] = {"append_eos": True, "chat_template_kwargs": None}
    (all_of_it,) = Encoder(tokenizer, form, **settings).encode([row])
    (cut,) = Encoder(tokenizer, form, **settings, cut_to=60).encode([row])
    assert not isinstance(all_of_it, str)
    assert not isinstance(cut, str)
    assert cut.input_ids[:60].tolist() == all_of_it.input_ids[:60].tolist()
    assert cut.loss_mask[:60].tolist() == all_of_it.loss_mask[:60].tolist()
    assert (len(cut.input_ids) > 60) == (len(all_of_it.input_ids) > 60)


def turns(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": "x"}, {"role": "assistant", "content": text}]


ROWS: dict[str, Callable[[str], dict[str, Any]]] = {
    "text": lambda text: {"text": text},
    "pair": lambda text: {"prompt": "x", "completion": text},
    "chat": lambda text: {"messages": turns(text)},
}


@pytest.mark.parametrize("kind", ROWS)
def test_a_long_row_is_not_tokenized_whole(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether it is cut off, left out or refused."""
    seen: list[int] = []
    before = Encoder._tokenize

    def spy(self: Encoder, texts: list[str], *options: bool) -> Any:
        seen.append(sum(map(len, texts)))
        return before(self, texts, *options)

    monkeypatch.setattr(Encoder, "_tokenize", spy)
    rows = [ROWS[kind]("def return value " * 10_000), ROWS[kind]("def")]
    source = write_rows(tmp_path / "rows.jsonl", rows)
    (tmp_path / "chat.jinja").write_text(CHAT)
    for long_documents in ("truncate", "drop", "error"):
        out, how = tmp_path / long_documents, {"max_length": 64, "long_documents": long_documents}
        how |= {"chat_template": str(tmp_path / "chat.jinja"), "on_bad_row": "skip"}
        counts = run_score(source, DEMO, out, **how).counts
        which = {"truncate": "truncated_rows", "drop": "dropped_long_rows", "error": "bad_rows"}[long_documents]
        assert (counts[which], counts["rows"]) == (1, 1 + (long_documents == "truncate"))
        if long_documents != "truncate":
            (line,) = (out / "rejected.jsonl").read_text().splitlines()
            assert re.search(r"more than \d+ tokens, over --max-length 64", line)
    assert max(seen) < 20_000


def changed(path: Path, how: str) -> None:
    content, stat = path.read_bytes(), path.stat()
    if how == "appended to":
        path.write_bytes(content + content[:60])
    elif how == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif how == "replaced":
        path.with_suffix(".new").write_bytes(content)
        path.with_suffix(".new").rename(path)
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    else:
        path.write_bytes(content.replace(b"w9", b"w8"))
    if how == "rewritten, times set back":
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


@pytest.mark.parametrize("how", ["appended to", "truncated", "replaced", "rewritten", "rewritten, times set back"])
@pytest.mark.parametrize("shard", [0, 3])
def test_a_source_that_changes_is_no_finished_dataset(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str, shard: int
) -> None:
    """After the first shard was written, and after the last one."""
    source = write_rows(tmp_path / "rows.jsonl", [{"text": f"w{4 + n % 9} w9 w5"} for n in range(40)])
    write = run_module._write_span

    def then_changed(plan: Any, span: Any, *rest: Any) -> None:
        write(plan, span, *rest)
        if span.index == shard:
            changed(source, how)

    monkeypatch.setattr(run_module, "_write_span", then_changed)
    with pytest.raises(EntrodropError, match=r"it changed during the run|the source changed: rows 0 to 9"):
        run_score(source, model, tmp_path / "out", rows_per_shard=10)
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_a_link_to_a_source_is_no_change(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_rows(tmp_path / "rows.jsonl", [{"text": f"w{4 + n % 9} w9 w5"} for n in range(40)])
    write = run_module._write_span

    def then_linked(plan: Any, span: Any, *rest: Any) -> None:
        write(plan, span, *rest)
        (tmp_path / f"link-{span.index}").hardlink_to(source)

    monkeypatch.setattr(run_module, "_write_span", then_linked)
    assert run_score(source, model, tmp_path / "out", rows_per_shard=10).counts["rows"] == 40


def test_a_shard_does_not_depend_on_how_much_is_read_at_a_time(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"text": f"w{4 + n % 9} " * (n % 30), "tag": n} for n in range(100)]
    for name in ("rows.jsonl", "rows.parquet", "rows.csv"):
        source = tmp_path / name
        if name.endswith("csv"):
            source.write_text("text,tag\n" + "".join(f"{r['text']},{r['tag']}\n" for r in rows))
        else:
            write_rows(source, rows)
        outs = []
        for most in (1, 200, 1 << 20):
            monkeypatch.setattr("entrodrop_prep.scoring.span.READ_BYTES", most)
            run_score(source, model, tmp_path / f"{name}-{most}", rows_per_shard=40, keep_columns=("tag",))
            outs.append([path.read_bytes() for path in shards(tmp_path / f"{name}-{most}")])
        assert outs[0] == outs[1] == outs[2]
    assert ScoreConfig.max_row_bytes == 32 << 20
    with pytest.raises(SourceError):
        rows_of(tmp_path / "nowhere.jsonl")


@pytest.mark.parametrize("nested", [False, True])
def test_a_page_that_is_read_as_a_whole_is_bounded(tmp_path: Path, nested: bool) -> None:
    """A dictionary holds the different values of a row group, and a page without one those that are written at once."""
    long = [f"{n} " + "word " * 200_000 for n in range(20)]
    other = pa.array([[{"role": "user", "content": text}] for text in long]) if nested else pa.array(long)
    name = "messages" if nested else "text"
    table = pa.table({name: other, "n": pa.array(range(20))})
    for dictionary, most, refused in (
        (True, 1_100_000, "dictionary"),
        (False, 1_100_000, ""),
        (False, 700_000, "page"),
    ):
        pq.write_table(table, tmp_path / "a.parquet", use_dictionary=dictionary, data_page_version="2.0")
        source = open_source(
            str(tmp_path), split="train", split_given=False, config=None, limit=None, max_row_bytes=most
        )
        source.check(["n"])
        if not refused:
            source.check([name])
            assert len(source.read(0, 20, None, [name]).rows) == 20
            continue
        said = f"a.parquet: column '{name}' has a {refused} of [12].,.* bytes in row group 0, which is read as a whole"
        with pytest.raises(SourceError, match=f"{said}.*--max-row-bytes"):
            source.check([name])


def test_headers_of_pages_are_read_one_after_the_other(tmp_path: Path) -> None:
    """Those of either version, with statistics and checksums, to the end of each chunk; others' bytes are no error."""
    path = tmp_path / "a.parquet"
    table = pa.table({"text": [f"{n % 50} " + "x" * (n % 700) for n in range(5_000)], "n": [[n] for n in range(5_000)]})
    for version in ("1.0", "2.0"):
        more: dict[str, Any] = {"data_page_version": version, "data_page_size": 10_000, "write_page_checksum": True}
        pq.write_table(table, path, row_group_size=2_000, dictionary_pagesize_limit=50_000, **more)
        file, sizes = DataFile("a.parquet", str(path), None, path.stat().st_size), []
        for group in range(3):
            for chunk in map(pq.read_metadata(path).row_group(group).column, range(2)):
                pages = list(page_sizes(file, chunk))
                assert len(pages) > 1
                assert {kind for kind, _ in pages} == {"dictionary", "page"}
                sizes.append((sum(size for _, size in pages), chunk.total_uncompressed_size))
        assert all(0.9 * whole < size < whole for size, whole in sizes), sizes
    data = bytearray(path.read_bytes())
    random.Random(1).shuffle(data)
    (tmp_path / "b.parquet").write_bytes(data)
    assert len(list(page_sizes(DataFile("b.parquet", str(tmp_path / "b.parquet"), None, len(data)), chunk))) < 5
