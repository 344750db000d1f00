"""The demo's input: the split of the standard library's source, and the model that ships with the package."""

from __future__ import annotations

import json
import logging
import math
import re
import warnings
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

import entrodrop_prep
from entrodrop_prep.demo.corpus import LONGEST, documents, is_held_out, write_corpus
from entrodrop_prep.errors import OutputError, SourceError

MODEL = Path(entrodrop_prep.__file__).parent / "demo" / "model"


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(MODEL)


@pytest.fixture(scope="module")
def held_out() -> dict[str, str]:
    return dict(documents(held_out=True))


@pytest.fixture(scope="module")
def trained_on() -> dict[str, str]:
    return dict(documents(held_out=False))


def test_the_split_is_by_name_and_known():
    """Golden answers: a changed split would put text the model was trained on into the demo."""
    held = ["xml/dom/minidom.py", "importlib/util.py", "tarfile.py", "doctest.py", "re/_parser.py", "ipaddress.py"]
    trained = ["asyncio/events.py", "argparse.py", "json/decoder.py", "typing.py", "logging/__init__.py", "os.py"]
    assert all(map(is_held_out, held))
    assert not any(map(is_held_out, trained))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("pathlib.py", "pathlib/_local.py"),
        ("datetime.py", "_pydatetime.py"),
        ("locale.py", "_locale.py"),
        ("xml/dom/minidom.py", "xml\\dom\\minidom.py"),
    ],
)
def test_a_module_that_moves_stays_on_its_side(one: str, other: str):
    assert is_held_out(one) == is_held_out(other)


def test_both_sides_are_disjoint_deterministic_and_sorted(held_out, trained_on):
    assert list(documents(held_out=True)) == list(held_out.items())
    assert list(held_out) == sorted(held_out)
    assert list(trained_on) == sorted(trained_on)
    assert not held_out.keys() & trained_on.keys()
    shared = set(held_out.values()) & set(trained_on.values())
    assert not [text for text in shared if len(text) > 200]
    assert 0.1 < len(held_out) / (len(held_out) + len(trained_on)) < 0.4
    assert all(text.strip() for text in held_out.values())


def test_left_out_are_tests_packages_and_generated_files(held_out, trained_on):
    unwanted = re.compile(
        r"(^|/)(tests?|idle_test|site-packages|dist-packages|__pycache__)/|^encodings/|^_sysconfigdata"
    )
    assert not [name for name in held_out | trained_on if unwanted.search(name)]


def test_files_that_are_not_text_are_passed_over(tmp_path: Path):
    (tmp_path / "xml").mkdir()
    (tmp_path / "xml" / "good.py").write_text("x = 'é'\n", encoding="utf-8")
    (tmp_path / "xml" / "latin.py").write_bytes(b"# caf\xe9\n")
    (tmp_path / "xml" / "blank.py").write_text(" \n")
    (tmp_path / "xml" / "test").mkdir()
    (tmp_path / "xml" / "test" / "no.py").write_text("pass\n")
    assert list(documents(held_out=True, root=tmp_path)) == [("xml/good.py", "x = 'é'\n")]
    assert list(documents(held_out=False, root=tmp_path)) == []


@pytest.mark.parametrize("folder", ["there", "not-there", "python311.zip"])
def test_a_python_without_source_is_refused(tmp_path: Path, folder: str):
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "os.pyc").write_bytes(b"")
    (tmp_path / "python311.zip").write_bytes(b"PK")
    with pytest.raises(SourceError, match=r"no standard library source.*run the demo with a Python"):
        list(documents(held_out=True, root=tmp_path / folder))


def test_the_corpus_holds_whole_held_out_documents_only(tmp_path: Path, tokenizer, held_out):
    path = tmp_path / "corpus.jsonl"
    counts = write_corpus(path, tokenizer)
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
    assert [list(row) for row in rows] == [["name", "text"]] * counts["documents"]
    names = [row["name"] for row in rows]
    assert names == sorted(set(names))
    assert all(held_out[row["name"]] == row["text"] for row in rows)
    lengths = [len(tokenizer(row["text"])["input_ids"]) for row in rows]
    assert sum(lengths) == counts["tokens"]
    assert sum(len(row["text"]) for row in rows) == counts["characters"]
    assert 250_000 < counts["tokens"] <= 300_000
    assert max(lengths) <= LONGEST
    assert len(rows) + counts["left_out"] == len(held_out)
    assert list(tmp_path.iterdir()) == [path]

    again = tmp_path / "again.jsonl"
    assert write_corpus(again, tokenizer) == counts
    assert again.read_bytes() == path.read_bytes()


def test_a_small_corpus_keeps_to_its_limit(tmp_path: Path, tokenizer):
    counts = write_corpus(tmp_path / "small.jsonl", tokenizer, max_tokens=3_000)
    assert 0 < counts["tokens"] <= 3_000
    with pytest.raises(SourceError, match="no held-out document fits into 1 tokens"):
        write_corpus(tmp_path / "none.jsonl", tokenizer, max_tokens=1)
    assert not (tmp_path / "none.jsonl").exists()


def test_a_path_that_cannot_be_written_is_refused(tmp_path: Path, tokenizer):
    (tmp_path / "file").write_text("")
    (tmp_path / "c.jsonl").mkdir()
    for path, words in (
        (tmp_path / "c.jsonl", "this is a folder"),
        (tmp_path / "file" / "c.jsonl", "cannot write here"),
    ):
        with pytest.raises(OutputError, match=rf"c\.jsonl: {words}"):
            write_corpus(path, tokenizer, max_tokens=3_000)


def test_the_model_is_small_and_names_no_machine():
    sizes = {file.name: file.stat().st_size for file in MODEL.iterdir()}
    assert sizes["model.safetensors"] <= 4_000_000
    assert sum(sizes.values()) < 4_200_000
    for name in ("config.json", "generation_config.json", "tokenizer_config.json", "MODEL_CARD.md"):
        text = (MODEL / name).read_text(encoding="utf-8")
        assert not re.search(r"/(home|root|work|tmp|Users)\b|_name_or_path|auto_map", text), name


def test_the_model_loads_without_a_warning(caplog: pytest.LogCaptureFixture):
    logger = logging.getLogger("transformers")  # does not propagate to the root logger
    logger.addHandler(caplog.handler)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            tokenizer = AutoTokenizer.from_pretrained(MODEL)
            _, report = AutoModelForCausalLM.from_pretrained(MODEL, output_loading_info=True)
    finally:
        logger.removeHandler(caplog.handler)
    assert not caplog.records
    assert not any(report.values())
    assert tokenizer.all_special_tokens == ["<|endoftext|>", "<|padding|>"]
    assert tokenizer.eos_token_id != tokenizer.pad_token_id


def test_the_tokenizer_is_lossless(tokenizer, held_out):
    for text in [*list(held_out.values())[:5], "tab\tnul\0 é ✓ 🙂\r\n"]:
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_the_model_has_learned_what_the_card_says(tokenizer, held_out):
    """Perplexity on the first 512 tokens of some held-out documents: far below uniform, and near the card's figure."""
    import torch

    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    nats, count = 0.0, 0
    for text in list(held_out.values())[::8]:
        ids = tokenizer(text, return_tensors="pt", truncation=True, max_length=512)["input_ids"]
        with torch.inference_mode():
            nats += float(model(input_ids=ids, labels=ids).loss) * (ids.shape[1] - 1)
        count += ids.shape[1] - 1
    perplexity = math.exp(nats / count)
    assert model.config.vocab_size == 2048
    assert perplexity < 100
    card = (MODEL / "MODEL_CARD.md").read_text(encoding="utf-8")
    stated = re.search(r"this model, computed in float32 \| ([\d.]+) \| ([\d.]+)", card)
    assert stated is not None
    assert abs(nats / count - float(stated[1])) < 0.5
    assert float(stated[2]) == pytest.approx(math.exp(float(stated[1])), rel=0.01)
