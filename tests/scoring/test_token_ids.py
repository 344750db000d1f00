"""Rows that come tokenized: padding is refused, whatever the pad token is. BOS and EOS stand once at a row's edges."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from entrodrop_prep.scoring.token_ids import Padding
from entrodrop_prep.scoring.tokenize import Encoded, Encoder, RowFormat
from entrodrop_prep.scoring.tokenizer import added_ids, ends_itself
from entrodrop_prep.store import manifest
from entrodrop_prep.store.schema import SCORED
from helpers.models import rows_of, run_score, save_model, tiny_llama, write_rows
from helpers.tokenizers import CHATML, byte_bpe

BOS, EOS, PAD, END = 0, 1, 2, 4  # <s>, </s>, <pad>, <|im_end|> of byte_bpe
X, Y = 300, 301


def tokenizer_with(**tokens: str | None) -> PreTrainedTokenizerFast:
    tokenizer = byte_bpe()
    for name, token in tokens.items():
        setattr(tokenizer, name, token)
    return tokenizer


def reason(ids: list[int], tokenizer: Any, stops: tuple[int, ...] = (), **more: Any) -> str | None:
    """Why a row is bad; None for a good one."""
    form = RowFormat("input_ids", ("input_ids",), tuple(more))
    encoder = Encoder(tokenizer, form, append_eos=True, chat_template_kwargs=None, stops=stops)
    (result,) = encoder.encode([{"input_ids": ids, **more}])
    if isinstance(result, Encoded):
        assert result.input_ids.tolist() == ids
        return None
    return result


@pytest.mark.parametrize(
    ("tokens", "stops", "most", "token"),
    [
        ({}, (), 0, PAD),
        ({"pad_token": "</s>"}, (), 1, EOS),  # as Llama is padded most often
        ({"pad_token": None}, (), 1, EOS),  # what collators pad with then
        ({"pad_token": "<s>"}, (), 1, BOS),
        ({"unk_token": "<pad>"}, (), 1, PAD),
        ({}, (PAD,), 1, PAD),  # Qwen: generation stops with the pad token too
        ({"bos_token": "</s>", "pad_token": "</s>"}, (), 1, EOS),  # GPT-2
        ({"pad_token": "<|im_end|>"}, (), 0, END),
    ],
)
@pytest.mark.parametrize("mask", [False, True])
def test_rows_that_begin_or_end_with_padding(
    tokens: dict[str, str | None], stops: tuple[int, ...], most: int, token: int, mask: bool
) -> None:
    tokenizer = tokenizer_with(**tokens)

    def bad(*ids: int) -> bool:
        more = {"attention_mask": [1] * len(ids)} if mask else {}
        why = reason(list(ids), tokenizer, stops, **more)
        if why is not None:
            assert why.startswith("it is padded: it ")
            assert f"id {token}, the tokenizer's" in why
        return why is not None

    assert bad(*[token] * 6, X, Y)
    assert bad(X, Y, *[token] * 6)
    assert bad(*[token] * (most + 1), X)
    assert bad(X, *[token] * (most + 1))
    assert bad(*[token] * (most + 1))
    assert not bad(*[token] * most, X, Y, *[token] * most)
    assert not bad(X, token, token, Y)  # between documents of a packed row, say
    assert not bad(X, Y)
    assert not bad()


def test_padding_that_labels_leave_out_is_still_context() -> None:
    for ids in ([X, Y, PAD, PAD], [PAD, PAD, X, Y]):
        labels = [-100 if i == PAD else i for i in ids]
        assert str(reason(ids, byte_bpe(), labels=labels)).startswith("it is padded: it ")


def test_without_pad_and_eos_nothing_tells() -> None:
    tokenizer = tokenizer_with(pad_token=None, eos_token=None)
    assert Padding.of(tokenizer) is None
    assert reason([PAD, X, EOS, EOS], tokenizer) is None


# ---- BOS and EOS


def adding(front: str, back: str, **more: Any) -> PreTrainedTokenizerFast:
    """A tokenizer that puts something before and behind each text."""
    tokenizer = byte_bpe(**more)
    special: Any = [("<s>", BOS), ("</s>", EOS)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{front} $A {back}".strip(), special_tokens=special
    )
    return tokenizer


@pytest.mark.parametrize(("front", "back"), [("", ""), ("<s>", ""), ("", "</s>"), ("<s>", "</s>"), ("</s> <s>", "")])
def test_what_a_tokenizer_adds(front: str, back: str) -> None:
    tokenizer = adding(front, back)
    before, behind = ([{"<s>": BOS, "</s>": EOS}[t] for t in text.split()] for text in (front, back))
    assert added_ids(tokenizer) == (tuple(before), tuple(behind))


@pytest.mark.parametrize(
    ("front", "back", "row", "ids", "notes"),
    [
        ("<s>", "</s>", {"text": "sky"}, "<s>sky</s>", set()),  # the tokenizer ends it: nothing is appended
        ("", "</s>", {"text": "sky"}, "sky</s>", set()),
        ("<s>", "", {"text": "sky"}, "<s>sky</s>", set()),
        ("<s>", "", {"text": "<s>sky"}, "<s><s>sky</s>", {"double_bos"}),  # as TRL's
        ("", "", {"text": "<s>sky"}, "<s>sky</s>", set()),
        ("<s>", "</s>", {"text": "<s>sky</s>"}, "<s><s>sky</s></s>", {"double_bos", "double_eos"}),
        ("<s>", "</s>", {"prompt": "a", "completion": "sky"}, "<s>asky</s>", set()),
        ("<s>", "", {"prompt": "<s>a", "completion": "sky</s>"}, "<s><s>asky</s>", {"double_bos"}),
        ("", "</s>", {"prompt": "a", "completion": "sky</s>"}, "asky</s></s>", {"double_eos"}),
        ("<s>", "", {"input_ids": [BOS, BOS, X, Y]}, None, {"double_bos"}),
        ("<s>", "", {"input_ids": [BOS, X, EOS, EOS]}, None, {"double_eos"}),
        ("<s>", "", {"input_ids": [BOS, X, EOS]}, None, set()),
    ],
)
def test_bos_and_eos_stand_once_or_are_noted(
    front: str, back: str, row: dict[str, Any], ids: str | None, notes: set[str]
) -> None:
    tokenizer = adding(front, back)
    kinds: dict[str, Any] = {"text": "text", "prompt": "prompt_completion", "input_ids": "input_ids"}
    form = RowFormat(kinds[next(iter(row))], tuple(row))
    append_eos = not ends_itself(tokenizer)
    (result,) = Encoder(tokenizer, form, append_eos=append_eos, chat_template_kwargs=None).encode([row])
    assert isinstance(result, Encoded), result
    wanted = tokenizer(ids, add_special_tokens=False)["input_ids"] if ids else row["input_ids"]
    assert result.input_ids.tolist() == wanted
    assert result.notes == notes


def test_a_template_that_writes_bos_gives_one() -> None:
    tokenizer = adding("<s>", "", template="{{- bos_token }}" + CHATML)
    chat = [{"role": "user", "content": "sky"}, {"role": "assistant", "content": "blue"}]
    form = RowFormat("messages", ("messages",))
    (result,) = Encoder(tokenizer, form, append_eos=True, chat_template_kwargs=None).encode([{"messages": chat}])
    assert isinstance(result, Encoded), result
    assert result.input_ids[0] == BOS != result.input_ids[1]
    assert not result.notes


def test_what_is_said_of_bos_and_eos(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = save_model(tmp_path / "model", tiny_llama(420, context=32))
    source = write_rows(tmp_path / "rows.jsonl", [{"text": "<s>sky"}, {"text": "blue"}, {"text": "<s>sky"}])
    for name, front, back in (("both", "<s>", "</s>"), ("bos", "<s>", "")):
        adding(front, back).save_pretrained(model)
        with caplog.at_level(logging.WARNING):
            run_score(source, model, tmp_path / name)
        assert "BOS appears twice at the start of 2 rows" in caplog.text
        assert [row["input_ids"].count(EOS) for row in rows_of(tmp_path / name)] == [1, 1, 1]
        described = manifest.read(tmp_path / name, SCORED)
        assert described["notes"] == {"double_bos": 2}
        # what the setting comes to: nothing is appended by us where the tokenizer ends its texts
        assert described["identity"]["append_eos"] == (name == "bos")
    caplog.clear()
    tokenizer = adding("<s>", "", eos=None)
    tokenizer.save_pretrained(model)
    run_score(source, model, tmp_path / "none")
    assert "the tokenizer has no EOS token: texts end without one" in caplog.text
