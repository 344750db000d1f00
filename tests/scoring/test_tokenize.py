"""Row formats, bad rows, assistant spans, and what is known of a tokenizer."""

from __future__ import annotations

import copy
import json
import logging
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, PreTrainedTokenizerFast

from entrodrop_prep.config import ScoreConfig
from entrodrop_prep.errors import ConfigError, ModelError, SourceError
from entrodrop_prep.scoring.tokenize import Encoded, Encoder, RowFormat, detect_format
from entrodrop_prep.scoring.tokenizer import (
    check_ids,
    load_tokenizer,
    special_ids,
    tokenizer_digest,
    vocabulary_disagreement,
)
from helpers.hub import READER, Hub
from helpers.tokenizers import CHATML, CHATML_MARKED, byte_bpe
from helpers.warm import MODEL_CLIENT, OFFLINE

TEXT = RowFormat("text", ("text",))
PAIR = RowFormat("prompt_completion", ("prompt", "completion"), ("tools", "chat_template_kwargs"))
CHAT = RowFormat("messages", ("messages",), ("tools", "chat_template_kwargs"))
USER = {"role": "user", "content": "Hi"}
BOT = {"role": "assistant", "content": "Hello!"}


def config(**more: Any) -> ScoreConfig:
    return ScoreConfig(source="s", model="m", out="o", **more)


def encode(
    rows: list[dict[str, Any]], form: RowFormat, tokenizer: Any = None, *, append_eos: bool = True, **kwargs: Any
) -> list[Encoded | str]:
    tokenizer = tokenizer or byte_bpe(template=CHATML)
    return Encoder(tokenizer, form, append_eos=append_eos, chat_template_kwargs=kwargs or None).encode(rows)


def reason(row: dict[str, Any], form: RowFormat, tokenizer: Any = None, **kwargs: Any) -> str:
    (result,) = encode([row], form, tokenizer, **kwargs)
    assert isinstance(result, str), result
    assert "\n" not in result
    return result


def trained(row: dict[str, Any], form: RowFormat, tokenizer: Any = None, **kwargs: Any) -> str:
    """The text of the trainable tokens."""
    tokenizer = tokenizer or byte_bpe(template=CHATML)
    (result,) = encode([row], form, tokenizer, **kwargs)
    assert isinstance(result, Encoded), result
    return str(tokenizer.decode(result.input_ids[result.loss_mask]))


# ---- row formats


@pytest.mark.parametrize(
    ("columns", "settings_", "kind", "expected"),
    [
        (["id", "text"], {}, "text", ("text",)),
        (["body", "text"], {"text_column": "body"}, "text", ("body",)),
        (["prompt", "completion", "tools"], {}, "prompt_completion", ("prompt", "completion", "tools")),
        (["q", "a", "text"], {"prompt_column": "q", "completion_column": "a"}, "prompt_completion", ("q", "a")),
        (["prompt", "prompt_id", "messages"], {}, "messages", ("messages",)),
        (["conversations", "chat_template_kwargs"], {}, "messages", ("conversations", "chat_template_kwargs")),
        (["turns", "messages", "tools"], {"messages_column": "turns"}, "messages", ("turns", "tools")),
        (["input_ids", "text"], {}, "input_ids", ("input_ids",)),
        (["input_ids", "text"], {"text_column": "text"}, "text", ("text",)),
        (["attention_mask", "input_ids", "labels", "completion_mask"], {}, "input_ids",
         ("input_ids", "labels", "attention_mask")),
        (["input_ids", "assistant_masks", "completion_mask"], {}, "input_ids",
         ("input_ids", "completion_mask", "assistant_masks")),
    ],
)  # fmt: skip
def test_row_format(columns: list[str], settings_: dict[str, str], kind: str, expected: tuple[str, ...]) -> None:
    form = detect_format(columns, config(**settings_))
    assert (form.kind, form.columns) == (kind, expected)
    assert form.is_plain == (kind in ("text", "input_ids"))
    assert all(name in form.describe() for name in expected)


@pytest.mark.parametrize(
    ("columns", "settings_", "error", "words"),
    [
        (["text", "messages"], {}, SourceError, ["text, messages", "--text-column", "--messages-column", "or as"]),
        (["text", "prompt", "completion"], {}, SourceError, ["--prompt-column", "text, prompt, completion"]),
        (["messages", "conversations"], {}, SourceError, ["--messages-column"]),
        (["content", "id"], {}, SourceError, ["content, id", "--text-column"]),
        (["prompt"], {}, SourceError, ["its columns are: prompt"]),
        ([], {}, SourceError, ["none"]),
        (["text"], {"text_column": "body"}, ConfigError, ["'body'", "--text-column", "its columns are: text"]),
        (["q"], {"prompt_column": "q", "completion_column": "a"}, ConfigError, ["'a'", "--completion-column"]),
        (["text"], {"messages_column": "chat"}, ConfigError, ["'chat'", "--messages-column"]),
    ],
)
def test_unclear_row_format(
    columns: list[str], settings_: dict[str, str], error: type[Exception], words: list[str]
) -> None:
    with pytest.raises(error) as caught:
        detect_format(columns, config(**settings_))
    assert all(word in str(caught.value) for word in words), str(caught.value)


# ---- text and pairs


def test_eos_is_added_once_and_only_if_asked_for_and_there() -> None:
    rows = [{"text": "sky"}, {"text": "sky</s>"}]
    tokenizer = byte_bpe()
    ended, already = encode(rows, TEXT, tokenizer)
    assert isinstance(ended, Encoded)
    assert isinstance(already, Encoded)
    assert ended.input_ids.tolist() == already.input_ids.tolist() == tokenizer("sky</s>")["input_ids"]
    (bare,) = encode(rows[:1], TEXT, tokenizer, append_eos=False)
    assert isinstance(bare, Encoded)
    assert bare.input_ids.tolist() == tokenizer("sky")["input_ids"]
    (none,) = encode(rows[:1], TEXT, byte_bpe(eos=None))
    assert isinstance(none, Encoded)
    assert none.input_ids.tolist() == bare.input_ids.tolist()


def test_empty_text_is_a_short_row_and_no_error() -> None:
    (empty,) = encode([{"text": ""}], TEXT, byte_bpe(), append_eos=False)
    assert isinstance(empty, Encoded)
    assert empty.input_ids.shape == empty.loss_mask.shape == (0,)
    assert encode([], TEXT) == []


def test_long_text_raises_no_warning(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = byte_bpe(template=CHATML_MARKED)
    tokenizer.model_max_length = 4
    long = {"role": "assistant", "content": "The sky is blue " * 9}
    encode([{"text": "The sky is blue " * 9}], TEXT, tokenizer)
    encode([{"messages": [USER, long]}], CHAT, tokenizer)
    tokenizer.chat_template = CHATML
    encode([{"messages": [USER, long]}], CHAT, tokenizer)
    assert "longer than" not in caplog.text


@pytest.mark.parametrize(
    ("row", "form", "words"),
    [
        ({"text": None}, TEXT, "'text' holds null"),
        ({}, TEXT, "'text' holds null"),
        ({"text": 3}, TEXT, "'text' holds a number"),
        ({"text": ["a"]}, TEXT, "'text' holds a list of string"),
        ({"text": "a\ud83d"}, TEXT, "lone surrogate at character 1"),
        ({"prompt": "a", "completion": None}, PAIR, "'completion' holds null"),
        ({"prompt": "a", "completion": [BOT]}, PAIR, "'completion' holds a list of object, not a string"),
        ({"prompt": [USER], "completion": "a"}, PAIR, "'completion' holds a string, not a list of messages"),
        ({"prompt": None, "completion": "a"}, PAIR, "'prompt' holds null"),
        ({"prompt": [], "completion": [BOT]}, PAIR, "'prompt' holds no message"),
        ({"prompt": [USER], "completion": []}, PAIR, "'completion' holds no message"),
        ({"messages": None}, CHAT, "'messages' holds null"),
        ({"messages": "hi"}, CHAT, "'messages' holds a string"),
        ({"messages": []}, CHAT, "'messages' holds no message"),
        ({"messages": ["hi"]}, CHAT, "message 0 is a string, not an object"),
        ({"messages": [USER, {"content": "x"}]}, CHAT, "message 1 has no role"),
        ({"messages": [USER, {"role": None, "content": "x"}]}, CHAT, "message 1 has no role"),
        ({"messages": [USER]}, CHAT, "no assistant turn to train on (roles: user)"),
        ({"messages": [USER, {"role": "bot", "content": "x"}]}, CHAT, "(roles: user, bot)"),
        ({"messages": [{"role": "user", "content": "\ud83d"}, BOT]}, CHAT, "lone surrogate"),
        ({"messages": [USER, BOT], "tools": "{"}, CHAT, "'tools' is not JSON"),
        ({"messages": [USER, BOT], "tools": '"x"'}, CHAT, "'tools' holds a string"),
        ({"messages": [USER, BOT], "tools": ["x"]}, CHAT, "'tools' holds a list of string"),
        ({"messages": [USER, BOT], "chat_template_kwargs": "x"}, CHAT, "'chat_template_kwargs' holds a string"),
        ({"messages": [USER, BOT], "chat_template_kwargs": {"tokenize": True}}, CHAT, "sets 'tokenize'"),
    ],
)
def test_bad_row(row: dict[str, Any], form: RowFormat, words: str) -> None:
    assert words in reason(row, form)
    if form is CHAT:
        assert words in reason(row, form, byte_bpe(template=CHATML_MARKED))


def test_completion_without_a_token_is_a_bad_row() -> None:
    assert "no token to train on" in reason({"prompt": "a", "completion": ""}, PAIR, append_eos=False)
    nothing = "{%- for m in messages %}{%- if m.role == 'user' %}{{- m.content }}{%- endif %}{%- endfor %}"
    tokenizer = byte_bpe(template=nothing)
    assert "leaves the assistant's text out" in reason({"prompt": [USER], "completion": [BOT]}, PAIR, tokenizer)


def test_good_and_bad_rows_keep_their_places() -> None:
    rows = [{"prompt": "a", "completion": "b"}, {"prompt": 1}, {"prompt": [USER], "completion": [BOT]}, {"prompt": "c"}]
    tokenizer = byte_bpe(template=CHATML)
    alone = [encode([row], PAIR, tokenizer)[0] for row in rows]
    together = encode(rows, PAIR, tokenizer)
    assert [type(r) for r in together] == [Encoded, str, Encoded, str]
    for a, b in zip(alone, together, strict=True):
        if isinstance(a, Encoded) and isinstance(b, Encoded):
            assert a.input_ids.tolist() == b.input_ids.tolist()
            assert a.loss_mask.tolist() == b.loss_mask.tolist()
        else:
            assert a == b


# ---- chats


@pytest.mark.parametrize("prompt", [None, 3])
def test_a_prompt_that_is_no_text_is_a_bad_row_whatever_the_tokenizer(prompt: object) -> None:
    encoder = Encoder(byte_bpe(), PAIR, append_eos=True, chat_template_kwargs=None)
    good, bad = encoder.encode([{"prompt": "a", "completion": "b"}, {"prompt": prompt, "completion": "b"}])
    assert isinstance(good, Encoded)
    assert "column 'prompt' holds" in str(bad)


def test_chats_need_a_template() -> None:
    with pytest.raises(ModelError, match="--chat-template"):
        Encoder(byte_bpe(), CHAT, append_eos=True, chat_template_kwargs=None)
    with pytest.raises(ModelError, match="--chat-template"):
        encode([{"prompt": [USER], "completion": [BOT]}], PAIR, byte_bpe())
    assert trained({"prompt": "a", "completion": "b"}, PAIR, byte_bpe()) == "b</s>"


def test_template_variables_that_are_not_the_templates() -> None:
    with pytest.raises(ConfigError, match="--chat-template-kwargs sets 'add_generation_prompt'"):
        encode([], CHAT, add_generation_prompt=True)


@pytest.mark.parametrize("value", ["NaN", "1e999", str(2**64), "[" * 70 + "]" * 70, "[" * 5000 + "]" * 5000])
def test_template_variables_that_no_manifest_can_hold(value: str) -> None:
    """They would be in the footer of every shard, which nobody could read again."""

    def encoder(given: Any) -> Encoder:
        config = ScoreConfig(source="s", model="m", out="o", chat_template_kwargs=given)
        return Encoder(
            byte_bpe(template=CHATML), CHAT, append_eos=True, chat_template_kwargs=config.chat_template_kwargs
        )

    with pytest.raises(ConfigError, match="--chat-template-kwargs"):
        encoder(f'{{"a": {value}}}')


def test_every_assistant_turn_and_its_end_is_trained_on_and_no_header() -> None:
    row = {"messages": [USER, BOT, USER, {"role": "assistant", "content": "\nBye"}, USER]}
    assert trained(row, CHAT) == "Hello!<|im_end|>\n\nBye<|im_end|>\n"


def test_marked_template_that_marks_nothing_here_is_a_bad_row() -> None:
    template = "{%- for m in messages %}{%- if m.role == 'bot' %}{%- generation %}{{ m.content }}{%- endgeneration %}"
    template += "{%- else %}{{- m.content + '<|end|>' }}{%- endif %}{%- endfor %}"
    assert "(roles: user, assistant)" in reason({"messages": [USER, BOT]}, CHAT, byte_bpe(template=template))
    row = {"messages": [USER, {"role": "bot", "content": "sky"}]}
    assert "(roles: user, bot)" in reason(row, CHAT, byte_bpe(template=template))


def test_template_without_generation_prompt() -> None:
    """Where it writes a header all the same, that must not be trained on; where it needs none, nothing is missing."""
    blind = CHATML.split("{%- if add_generation_prompt")[0]
    assert trained({"messages": [USER, BOT]}, CHAT, byte_bpe(template=blind)) == "Hello!<|im_end|>\n"
    inst = (
        "{%- for m in messages %}{%- if m.role == 'user' %}{{- '[INST] ' + m.content + ' [/INST]' }}"
        "{%- else %}{{- ' ' + m.content + ' </s>' }}{%- endif %}{%- endfor %}"
    )
    row = {"messages": [USER, BOT, USER, {"role": "assistant", "content": "Bye"}]}
    assert trained(row, CHAT, byte_bpe(template=inst)) == " Hello! </s> Bye </s>"


def test_assistant_first_where_the_header_could_be_in_the_tools() -> None:
    row = {"messages": [BOT, USER, BOT]}
    assert trained(row, CHAT) == "Hello!<|im_end|>\nHello!<|im_end|>\n"
    own = CHATML.replace("{%- if tools %}", "{{- '<|im_start|>assistant\nx' }}{%- if tools %}")
    why = reason({"messages": [BOT]}, CHAT, byte_bpe(template=own))
    assert "message 0 (assistant)" in why
    assert "the header of this one is not found" in why


def test_arguments_reach_the_template_as_they_are() -> None:
    """No merged dicts: a key that only one tool has renders where it was given, and a null in a list stays."""
    calls = [{"name": "f", "arguments": {"a": {}}}, {"name": "g", "arguments": {"b": [1, {"c": [None]}]}}]
    row = {
        "messages": [USER, {"role": "assistant", "content": None, "tool_calls": calls}],
        "tools": [{"name": "f", "x": 1}, {"name": "g", "y": {"z": [None]}}],
        "chat_template_kwargs": None,
    }
    before = copy.deepcopy(row)
    for template in (CHATML, CHATML_MARKED):
        text = trained(row, CHAT, byte_bpe(template=template))
        found = re.findall(r"<tool_call>\n(.*?)\n</tool_call>", text)
        assert [json.loads(call) for call in found] == calls
        assert text.startswith("<tool_call>")
        (whole,) = encode([row], CHAT, byte_bpe(template=template))
        assert isinstance(whole, Encoded)
        head = byte_bpe().decode(whole.input_ids).split("<|im_end|>")[0].splitlines()[1:]
        assert [json.loads(line) for line in head] == row["tools"]
        assert row == before


def test_template_that_writes_the_date_warns(caplog: pytest.LogCaptureFixture) -> None:
    template = "{%- set today = strftime_now('%d %b %Y') %}{{- today }}" + CHATML
    with caplog.at_level(logging.WARNING):
        encode([], CHAT, byte_bpe(template=template))
    assert "--chat-template-kwargs" in caplog.text


WORDS = st.text(alphabet=st.sampled_from("ab é\n\t 🙂東.!<>"), max_size=12)


@settings(max_examples=150, deadline=None)
@given(
    turns=st.lists(st.tuples(st.sampled_from(["system", "user", "assistant", "tool"]), WORDS), min_size=1, max_size=7),
    trim=st.booleans(),
)
def test_derived_mask_equals_the_marked_one(turns: list[tuple[str, str]], trim: bool) -> None:
    messages = [{"role": role, "content": text} for role, text in turns]
    (derived,) = encode([{"messages": messages}], CHAT, byte_bpe(template=CHATML, trim=trim))
    (marked,) = encode([{"messages": messages}], CHAT, byte_bpe(template=CHATML_MARKED))
    if isinstance(marked, str):
        assert derived == marked
    elif isinstance(derived, str):  # trimmed offsets and a token across the edge: nothing tells which it is
        assert trim
        assert "no token begins" in derived
    else:
        assert derived.input_ids.tolist() == marked.input_ids.tolist()
        assert derived.loss_mask.tolist() == marked.loss_mask.tolist()


# No special tokens: turns run into one another, and a token may hold the end of one and the start of the next.
LOOSE = (
    "{%- for m in messages %}{{- m.role + ': ' + m.content + ' ' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- 'assistant: ' }}{%- endif %}"
)
LOOSE_MARKED = (
    "{%- for m in messages %}{{- m.role + ': ' }}{%- if m.role == 'assistant' %}{%- generation %}"
    "{{- m.content + ' ' }}{%- endgeneration %}{%- else %}{{- m.content + ' ' }}{%- endif %}{%- endfor %}"
)


@settings(max_examples=150, deadline=None)
@given(
    turns=st.lists(st.text(alphabet=st.sampled_from("ab\n .!"), min_size=1, max_size=6), min_size=2, max_size=6),
    trim=st.booleans(),
    whole=st.booleans(),
)
def test_derived_mask_where_tokens_cross_the_edges(turns: list[str], trim: bool, whole: bool) -> None:
    messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)]
    (marked,) = encode([{"messages": messages}], CHAT, byte_bpe(template=LOOSE_MARKED, whole=whole))
    (derived,) = encode([{"messages": messages}], CHAT, byte_bpe(template=LOOSE, trim=trim, whole=whole))
    assert isinstance(marked, Encoded)
    if isinstance(derived, str):  # blanks left out of the offsets, and ids that a prefix does not share: no telling
        assert trim
        return
    assert derived.input_ids.tolist() == marked.input_ids.tolist()
    assert derived.loss_mask.tolist() == marked.loss_mask.tolist()


@pytest.mark.parametrize("trim", [False, True])
def test_token_across_an_edge_belongs_to_the_turn(trim: bool) -> None:
    row = {"messages": [USER, {"role": "assistant", "content": "sky"}, USER]}
    tokenizer = byte_bpe(template=LOOSE, trim=trim)
    assert {"Ġsky", "Ġuser"} <= set(tokenizer.get_vocab())
    if not trim:
        assert trained(row, CHAT, tokenizer) == " sky user"
    else:  # whether " user" holds the turn's last blank, its offsets do not say, and no prefix has these ids
        assert "no token begins at character" in reason(row, CHAT, tokenizer)


@pytest.mark.parametrize("before", [True, False])
def test_tokens_that_take_the_blanks_around_them_belong_where_their_text_is(before: bool) -> None:
    """``before``: whether the token before a line break takes it, else the next header does."""
    template = (
        "{%- for m in messages %}{{- '<|of ' + m.role + '|>\\n' + m.content + '<|over|>\\n' }}{%- endfor %}"
        "{%- if add_generation_prompt %}{{- '<|of assistant|>\\n' }}{%- endif %}"
    )
    tokenizer = byte_bpe(template=template)
    marks = [AddedToken(f"<|of {role}|>", lstrip=True, rstrip=True) for role in ("user", "assistant")]
    marks.append(AddedToken("<|over|>", rstrip=before))
    tokenizer.add_special_tokens({"additional_special_tokens": marks})
    row = {"messages": [USER, {"role": "assistant", "content": "\n sky"}, USER, BOT]}
    assert trained(row, CHAT, tokenizer) == "sky<|over|>Hello!<|over|>" + "\n" * (not before)


# ---- token ids


def ids_row(**more: Any) -> tuple[dict[str, Any], RowFormat]:
    row = {"input_ids": [5, 6, 7, 8], **more}
    return row, detect_format(list(row), config())


def mask_of(**more: Any) -> list[bool]:
    row, form = ids_row(**more)
    (result,) = encode([row], form)
    assert isinstance(result, Encoded), result
    assert result.input_ids.tolist() == list(row["input_ids"])
    return list(result.loss_mask.tolist())


def test_labels_and_masks() -> None:
    assert mask_of() == [False, True, True, True]
    assert mask_of(labels=[5, 6, -100, 8]) == [False, True, False, True]
    assert mask_of(labels=np.array([5, -100, -100, 8], np.int32), attention_mask=[1, 1, 1, 1]) == [
        False,
        False,
        False,
        True,
    ]
    assert mask_of(completion_mask=[0, 1, 1, 0]) == [False, True, True, False]
    assert mask_of(completion_mask=[True, True, True, False], assistant_masks=[0, 0, 1, 1]) == [
        False,
        False,
        True,
        False,
    ]
    assert mask_of(labels=[-100] * 4) == [False] * 4
    assert mask_of(input_ids=[], labels=[]) == []


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"input_ids": None}, "'input_ids' holds null"),
        ({"input_ids": "abc"}, "'input_ids' holds a string"),
        ({"input_ids": [1.5]}, "entry 0 is 1.5"),
        ({"input_ids": [1, None]}, "entry 1 is None"),
        ({"input_ids": [True, False]}, "not a list of whole numbers"),
        ({"input_ids": [[1], [1, 2]]}, "'input_ids' holds a list of list"),
        ({"input_ids": [[1, 2]]}, "not a list of whole numbers"),
        ({"input_ids": [1, -1]}, "entry 1 is -1"),
        ({"input_ids": [2**31]}, "entry 0 is 2147483648"),
        ({"input_ids": [2**80]}, "not a list of whole numbers"),
        ({"labels": None}, "'labels' holds null"),
        ({"labels": [5, 6, 7]}, "'labels' has 3 entries for 4 input ids"),
        (
            {"labels": [6, 7, 8, -100]},
            "label 6 at position 0 is neither -100 nor the input id there, 5; labels must not",
        ),
        ({"labels": [-1, 6, 7, 8]}, "label -1 at position 0"),
        ({"completion_mask": [1, 1]}, "'completion_mask' has 2 entries"),
        ({"assistant_masks": [0, 1, 2, 1]}, "entry 2 is 2, not from 0 to 1"),
        ({"attention_mask": [1, 1, 1, 0]}, "it is padded"),
    ],
)
def test_bad_ids(more: dict[str, Any], words: str) -> None:
    assert words in reason(*ids_row(**more))


# ---- tokenizers


def test_special_ids_are_the_named_and_the_flagged() -> None:
    tokenizer = byte_bpe()
    expected = [tokenizer.convert_tokens_to_ids(t) for t in ("<s>", "</s>", "<pad>", "<|im_end|>")]
    ids = special_ids(tokenizer)
    assert ids == sorted(set(ids))
    assert set(expected) <= set(ids)
    assert tokenizer.convert_tokens_to_ids("<think>") not in ids


def test_digest_is_that_of_the_behaviour(tmp_path: Path) -> None:
    digest = tokenizer_digest(byte_bpe(template=CHATML))
    assert re.fullmatch(r"[0-9a-f]{64}", digest)
    used = byte_bpe(template=CHATML)
    used(["a b", "c"], padding=True, truncation=True, max_length=1)
    assert tokenizer_digest(used) == digest
    used.save_pretrained(str(tmp_path / "saved"))
    code = "import sys; from entrodrop_prep.scoring.tokenizer import *\n"
    code += "print(tokenizer_digest(load_tokenizer(sys.argv[1], "
    code += "revision=None, trust_remote_code=False, chat_template_file=None)))"
    run = [sys.executable, "-c", code, str(tmp_path / "saved")]
    assert OFFLINE.run(run, capture_output=True, text=True, check=True).stdout == digest + "\n"  # has its own hash seed
    others = [byte_bpe(), byte_bpe(template=CHATML, bos=True), byte_bpe(template=CHATML, eos="<|im_end|>")]
    assert digest not in {tokenizer_digest(t) for t in others}


def words(*names: str) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token=names[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token=names[0])


def test_only_ids_in_use_must_agree() -> None:
    ours, theirs = words("unk", "a", "b", "c", "d"), words("unk", "a", "x")
    found = vocabulary_disagreement(ours, theirs, 4)
    assert found.mask.tolist() == [False, False, True, True, True]
    check_ids(np.array([0, 1, 1], np.int32), found)
    check_ids(np.array([], np.int32), found)
    with pytest.raises(ModelError, match="id 2 is 'b' to the tokenizer you train with and 'x' to the reference model"):
        check_ids(np.array([1, 2, 3], np.int32), found)
    with pytest.raises(ModelError, match=r"id 3 is 'c' .* and no token to the reference model"):
        check_ids(np.array([3], np.int32), found)
    for i in (4, 9):
        with pytest.raises(ModelError, match=f"id {i} .* outside the reference model's vocabulary of 4"):
            check_ids(np.array([1, i], np.int32), found)


def test_reserved_rows_of_the_embeddings_are_the_same_to_both() -> None:
    found = vocabulary_disagreement(words("unk", "a"), words("unk", "a"), 4)
    assert found.mask.tolist() == [False, False, False, False]
    check_ids(np.array([1, 3], np.int32), found)
    with pytest.raises(ModelError, match="id 4"):
        check_ids(np.array([4], np.int32), found)


def load(name: Path | str, template: Path | None = None) -> Any:
    file = str(template) if template else None
    return load_tokenizer(str(name), revision=None, trust_remote_code=False, chat_template_file=file)


def test_load_with_a_template_file(tmp_path: Path) -> None:
    byte_bpe(template=CHATML).save_pretrained(str(tmp_path / "t"))
    assert load(tmp_path / "t").chat_template == CHATML
    (tmp_path / "mine.jinja").write_text(CHATML_MARKED, encoding="utf-8")
    assert load(tmp_path / "t", tmp_path / "mine.jinja").chat_template == CHATML_MARKED
    (tmp_path / "strict.jinja").write_text("{{ raise_exception('no') }}", encoding="utf-8")
    assert load(tmp_path / "t", tmp_path / "strict.jinja").chat_template
    for name, content, what in [
        ("broken", b"{% for %}", "line 1"),
        ("latin", b"\xe9", "UTF-8"),
        ("gone", None, "cannot read"),
    ]:
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(ConfigError, match=what) as caught:
            load(tmp_path / "t", tmp_path / name)
        assert str(tmp_path / name) in str(caught.value)


def test_what_is_no_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no such directory"):
        load(tmp_path / "nowhere")
    GPT2Config(vocab_size=64, bos_token_id=1, eos_token_id=1).save_pretrained(str(tmp_path))
    with pytest.raises(ModelError, match="--tokenizer"):
        load(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer"}', encoding="utf-8")
    with pytest.raises(ModelError, match="no tokenizer files; name one with --tokenizer"):
        load(tmp_path)


def test_missing_and_gated_on_the_hub(tmp_path: Path) -> None:
    code = """
import sys
from entrodrop_prep.errors import ModelError
from entrodrop_prep.scoring.tokenizer import load_tokenizer
for name in sys.argv[1:]:
    try:
        load_tokenizer(name, revision=None, trust_remote_code=False, chat_template_file=None)
    except ModelError as e:
        print(e)
"""
    with Hub(tmp_path / "hub") as hub:
        hub.create("someone/gated-model", "models", private=False).change(gated="auto")
        env = hub.environment(tmp_path / "home", READER)
        run = [sys.executable, "-c", code, "someone/gated-model", "someone/missing-model"]
        done = MODEL_CLIENT.run(run, env=env, capture_output=True, text=True, check=True)
    gated, missing = done.stdout.splitlines()
    assert gated.startswith("someone/gated-model: ")
    assert "hf auth login" in gated
    assert missing.startswith("someone/missing-model: ")
    assert "check the id" in missing
