"""Directories with odd or damaged tokenizer files: tokenizer.json is used where it is there, else one line says why."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from entrodrop_prep.errors import ModelError
from entrodrop_prep.scoring.tokenizer import load_tokenizer
from helpers.tokenizers import byte_bpe

MISTRAL = {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "vocab_size": 420}


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "good"
    byte_bpe(bos=True).save_pretrained(path)
    (path / "config.json").write_text(json.dumps(MISTRAL))
    return path


def load(path: Path) -> Any:
    return load_tokenizer(str(path), revision=None, trust_remote_code=False, chat_template_file=None)


def settings(path: Path, **values: Any) -> None:
    file = path / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def engine(path: Path, **values: Any) -> None:
    file = path / "tokenizer.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def alone(path: Path, name: str, content: bytes = b"\x00garbage\n" * 9) -> None:
    for file in path.glob("tok*"):
        file.unlink()
    (path / name).write_bytes(content)


def tekken(path: Path) -> None:
    vocabulary = [{"rank": i, "token_bytes": "AA==", "token_str": None} for i in range(3)]
    (path / "tekken.json").write_text(json.dumps({"config": {"pattern": "."}, "vocab": vocabulary}))


@pytest.mark.parametrize(
    "beside",
    [
        tekken,
        lambda p: (p / "tekken.json").write_text("{"),
        lambda p: (p / "tokenizer.model").write_bytes(b"\x00garbage"),
        lambda p: (p / "spiece.model").write_bytes(b"\x00garbage"),
        lambda p: (p / "vocab.json").write_text("{}"),
        lambda p: settings(p, tokenizer_class="NobodysTokenizer"),
    ],
)
def test_tokenizer_json_is_used_where_it_is_there(tmp_path: Path, good: Path, beside: Callable[[Path], Any]) -> None:
    path = shutil.copytree(good, tmp_path / "t")
    beside(path)
    tokenizer = load(path)
    assert tokenizer("The sky")["input_ids"] == byte_bpe(bos=True)("The sky")["input_ids"]
    tokenizer.save_pretrained(tmp_path / "saved")
    assert load(tmp_path / "saved")("The sky")["input_ids"] == tokenizer("The sky")["input_ids"]


def named(path: Path, name: str) -> None:
    (path / "config.json").write_text(json.dumps({**MISTRAL, "model_type": "llama"}))
    settings(path, tokenizer_class=name)


def only_tekken(path: Path) -> None:
    alone(path, "x")
    tekken(path)


Break = tuple[Callable[[Path], Any], str]
BROKEN: dict[str, Break] = {
    "only tekken": (only_tekken, "its only tokenizer is tekken.json; add tokenizer.json, or name one with --tokenizer"),
    "half a file": (lambda p: (p / "tokenizer.json").write_text('{"version": "1.0", "tru'), "repair its JSON files"),
    "empty": (lambda p: (p / "tokenizer.json").write_text(""), "repair its JSON files"),
    "a list": (lambda p: (p / "tokenizer.json").write_text("[]"), "repair its JSON files"),
    "nested": (lambda p: (p / "tokenizer.json").write_text("[" * 100_000), "RecursionError"),
    "not UTF-8": (lambda p: (p / "tokenizer_config.json").write_bytes(b'{"a": "\xe9"}'), "repair its JSON files"),
    "unknown model": (lambda p: engine(p, model={"type": "Foo"}), "cannot load the tokenizer"),
    "bad pattern": (
        lambda p: engine(
            p, pre_tokenizer={"type": "Split", "pattern": {"Regex": "(("}, "behavior": "Isolated", "invert": False}
        ),
        "cannot load the tokenizer: Oniguruma",
    ),
    "no tokenizer's class": (
        lambda p: named(p, "LlamaConfig"),
        "LlamaConfig, which is no tokenizer",
    ),
    "missing package": (lambda p: named(p, "XLMTokenizer"), "install what it names"),
    "class of another kind": (lambda p: settings(p, tokenizer_class=3), "repair its JSON files"),
    "code of its own": (lambda p: settings(p, auto_map={"AutoTokenizer": "x"}), "repair its JSON files"),
    "odd EOS": (lambda p: settings(p, eos_token=["</s>"]), "repair its JSON files"),
    "odd length": (lambda p: settings(p, model_max_length="x"), "repair its JSON files"),
    "odd template": (lambda p: settings(p, chat_template=5), "its chat template is no text"),
    "sentencepiece": (lambda p: alone(p, "tokenizer.model"), "cannot load the tokenizer"),
    "tiktoken": (lambda p: alone(p, "qwen.tiktoken"), "cannot load the tokenizer"),
    "no merges": (lambda p: alone(p, "vocab.json", b'{"a": 0}'), "cannot load the tokenizer"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_tokenizer_that_cannot_be_used(tmp_path: Path, good: Path, name: str) -> None:
    breaks, says = BROKEN[name]
    path = shutil.copytree(good, tmp_path / "t")
    breaks(path)
    with pytest.raises(ModelError) as caught:
        load(path)
    line = str(caught.value)
    assert line.startswith(f"{path}: ")
    assert says in line
    assert "\n" not in line
    assert caught.value.fix


def test_a_package_that_is_missing_is_named(tmp_path: Path, good: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = shutil.copytree(good, tmp_path / "t")
    alone(path, "tokenizer.model")
    monkeypatch.setattr("transformers.utils.import_utils.is_sentencepiece_available", lambda: False)
    with pytest.raises(ModelError, match=r"; install sentencepiece, or add tokenizer\.json$"):
        load(path)
