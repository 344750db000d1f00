"""The ids and the trainable positions t >= 1 of every row format are those of TRL's SFTTrainer on the same rows."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import trl
from transformers import GPT2Config, GPT2LMHeadModel
from trl.data_utils import maybe_convert_to_chatml

from entrodrop_prep.config import ScoreConfig
from entrodrop_prep.scoring.tokenize import Encoded, Encoder, detect_format
from helpers.tokenizers import CHATML, CHATML_MARKED, byte_bpe

Rows = Sequence[dict[str, Any]]


def system(text: str) -> dict[str, Any]:
    return {"role": "system", "content": text}


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def bot(text: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


def result(text: str) -> dict[str, Any]:
    return {"role": "tool", "name": "multiply", "content": text}


MULTIPLY = {
    "type": "function",
    "function": {
        "name": "multiply",
        "parameters": {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"enum": [1, "x", None]}}},
    },
}
LOOK_UP = {"type": "function", "function": {"name": "look_up", "strict": True, "parameters": {"type": "object"}}}


def call(name: str, **arguments: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


CHATS: dict[str, list[dict[str, Any]]] = {
    "one turn": [user("Why is the sky blue?"), bot("air scatters short waves")],
    "several turns": [
        system("Be brief."),
        user("Hi"),
        bot("Hello!"),
        user("東京?"),
        bot("🙂 Grüße"),
        user("a"),
        bot("b"),
    ],
    "user last": [user("Hi"), bot("Hello!"), user("and?")],
    "newline first": [user("Hi"), bot("\n\nHello!\n"), user("x"), bot("\n")],
    "blank turn": [user("Hi"), bot(""), user("x"), bot("  y ")],
    "two in a row": [user("Hi"), bot("Hello!"), bot("Hello again")],
    "assistant first": [bot("What can I do?"), user("multiply"), bot("done")],
}
TOOL_ROWS: list[dict[str, Any]] = [
    {
        "messages": [
            user("2 * 3?"),
            bot("", tool_calls=[call("multiply", a=2, b=[None]), call("look_up", q="x")]),
            result("6"),
            result("found"),
            bot("six"),
            user("and?"),
            bot("", tool_calls=[call("multiply")]),
            result("0"),
            bot("zero"),
        ],
        "tools": [MULTIPLY, LOOK_UP],
    },
    {"messages": [user("Hi"), bot("Hello!")], "tools": json.dumps([LOOK_UP, MULTIPLY])},
    {"messages": [user("Hi"), bot("Hello!")], "tools": None},
    {"messages": [user("Hi"), bot("Hello!")], "tools": []},
]


def trained_by_trl(tokenizer: Any, rows: Rows, out: Path, **options: Any) -> list[tuple[list[int], list[int]]]:
    """ids and trainable positions t >= 1 of each row, as the real trainer prepares them."""
    model = GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), n_positions=64, n_embd=8, n_layer=1, n_head=1))
    trainer = trl.SFTTrainer(
        model=model,
        processing_class=copy.deepcopy(tokenizer),
        train_dataset=datasets.IterableDataset.from_generator(lambda: iter(copy.deepcopy(list(rows)))),
        args=trl.SFTConfig(
            output_dir=str(out), report_to="none", use_cpu=True, max_length=None, packing=False, max_steps=1, **options
        ),
    )
    prepared = list(trainer.train_dataset)
    return [(r["input_ids"], [t for t, x in enumerate(r["labels"]) if x != -100 and t]) for r in prepared]


def ours(tokenizer: Any, rows: Rows, *, append_eos: bool = True, **kwargs: Any) -> list[Encoded | str]:
    """What the encoder makes of the rows, which it must leave as they are."""
    config = ScoreConfig(source="rows", model="m", out="o")
    row_format = detect_format(list(dict.fromkeys(name for row in rows for name in row)), config)
    before = copy.deepcopy(list(rows))
    encoder = Encoder(tokenizer, row_format, append_eos=append_eos, chat_template_kwargs=kwargs or None)
    encoded = encoder.encode(rows)
    assert list(rows) == before
    return encoded


def plain(encoded: Encoded | str) -> tuple[list[int], list[int]]:
    assert isinstance(encoded, Encoded), encoded
    assert encoded.input_ids.dtype == np.int32
    assert encoded.loss_mask.dtype == np.bool_
    assert not encoded.loss_mask[:1].any()
    return encoded.input_ids.tolist(), np.flatnonzero(encoded.loss_mask).tolist()


def check(tokenizer: Any, rows: Rows, out: Path, **options: Any) -> None:
    assert [plain(e) for e in ours(tokenizer, rows)] == trained_by_trl(tokenizer, rows, out, **options)


@pytest.mark.parametrize("bos", [False, True])
def test_text(tmp_path: Path, bos: bool) -> None:
    texts = ["The sky", "ends already</s>", "<s>begins with BOS", "", "def f():\n\n", "東京 🙂 </s> x", "</s></s>"]
    check(byte_bpe(bos=bos), [{"text": text} for text in texts], tmp_path)


@pytest.mark.parametrize("bos", [False, True])
def test_prompt_and_completion_strings(tmp_path: Path, bos: bool) -> None:
    pairs = [
        ("The sky is", " blue"),
        ("The s", "ky"),
        ("x", "ends</s>"),
        ("\n", "\n\nfoo"),
        ("", "all"),
        ("東", "京"),
        ("x", ""),
    ]
    check(byte_bpe(bos=bos), [{"prompt": p, "completion": c} for p, c in pairs], tmp_path)


@pytest.mark.parametrize("template", [CHATML, CHATML_MARKED], ids=["plain", "marked"])
def test_prompt_and_completion_messages(tmp_path: Path, template: str) -> None:
    rows = [
        {"prompt": [user("Hi")], "completion": [bot("Hello!")], "tools": None, "chat_template_kwargs": {}},
        {"prompt": [system("s"), user("Hi"), bot("x"), user("y")], "completion": [bot("z")],
         "tools": [MULTIPLY], "chat_template_kwargs": {"unused": 1}},
        {"prompt": [user("Hi")], "completion": [bot("", tool_calls=[call("multiply", a="x")])],
         "tools": json.dumps([LOOK_UP]), "chat_template_kwargs": {}},
        {"prompt": [user("Hi")], "completion": [bot("\nHello!")], "tools": None, "chat_template_kwargs": {}},
    ]  # fmt: skip
    check(byte_bpe(bos=True, template=template), rows, tmp_path)


@pytest.mark.parametrize("template", [CHATML, CHATML_MARKED], ids=["plain", "marked"])
def test_of_a_completion_only_the_assistants_messages_are_trained_on(tmp_path: Path, template: str) -> None:
    """TRL also trains on what the tool and the user say in it."""
    tokenizer = byte_bpe(template=template)
    rows = [{"prompt": [user("Hi")], "completion": [bot("z"), result("6"), bot("w"), user("Hi"), bot("b")]}]
    ((ids, trained),) = [plain(e) for e in ours(tokenizer, rows)]
    ((their_ids, theirs),) = trained_by_trl(tokenizer, rows, tmp_path)
    assert ids == their_ids
    assert set(trained) < set(theirs)
    assert tokenizer.decode([ids[t] for t in trained]) == "z<|im_end|>\nw<|im_end|>\nb<|im_end|>\n"


def test_prompt_whose_generation_prompt_the_turn_lacks(tmp_path: Path) -> None:
    template = CHATML.replace("assistant\\n' }}{%- endif %}\n", "assistant\\n<think>\\n\\n</think>' }}{%- endif %}\n")
    assert template != CHATML
    rows = [{"prompt": [user("Hi")], "completion": [bot("Hello!")]}]
    check(byte_bpe(template=template), rows, tmp_path)


@pytest.mark.parametrize("trim", [False, True])
def test_messages_with_markers(tmp_path: Path, trim: bool) -> None:
    """Where offsets leave blanks out, transformers' mask ends at the first turn that begins with one; ours does not."""
    rows = [{"messages": chat} for chat in CHATS.values()]
    theirs = trained_by_trl(byte_bpe(bos=True, template=CHATML_MARKED), rows, tmp_path, assistant_only_loss=True)
    assert [plain(e) for e in ours(byte_bpe(bos=True, template=CHATML_MARKED, trim=trim), rows)] == theirs


def test_messages_with_markers_and_tools(tmp_path: Path) -> None:
    check(byte_bpe(template=CHATML_MARKED), TOOL_ROWS, tmp_path, assistant_only_loss=True)


@pytest.mark.parametrize("nfc", [False, True])
def test_messages_without_markers_match_the_same_template_with_them(tmp_path: Path, nfc: bool) -> None:
    for rows in ([{"messages": chat} for chat in CHATS.values()], TOOL_ROWS):
        expected = trained_by_trl(byte_bpe(template=CHATML_MARKED, nfc=nfc), rows, tmp_path, assistant_only_loss=True)
        # Trimmed offsets leave blanks out; that the derived mask does not depend on.
        for trim in (False, True):
            assert [plain(e) for e in ours(byte_bpe(template=CHATML, nfc=nfc, trim=trim), rows)] == expected


def test_template_variables_of_row_and_run(tmp_path: Path) -> None:
    named = "{%- if persona is defined %}{{- persona }}{%- endif %}"
    rows = [{"messages": CHATS["several turns"], "chat_template_kwargs": {"persona": p}} for p in ("blue", "air")]
    expected = trained_by_trl(byte_bpe(template=named + CHATML_MARKED), rows, tmp_path, assistant_only_loss=True)
    assert [plain(e) for e in ours(byte_bpe(template=named + CHATML), rows, persona="under it")] == expected
    bare = [{"messages": row["messages"]} for row in rows[:1]]
    assert plain(ours(byte_bpe(template=named + CHATML), bare, persona="blue")[0]) == expected[0]


def test_conversations_of_from_and_value(tmp_path: Path) -> None:
    rows = [{"conversations": [{"from": m["role"], "value": m["content"]} for m in chat]} for chat in CHATS.values()]
    # The trainer wants role and content with assistant_only_loss, so TRL's own conversion goes first.
    converted = [maybe_convert_to_chatml(row) for row in copy.deepcopy(rows)]
    tokenizer = byte_bpe(template=CHATML_MARKED)
    expected = trained_by_trl(tokenizer, converted, tmp_path, assistant_only_loss=True)
    assert [plain(e) for e in ours(tokenizer, rows)] == expected


def test_pretokenized(tmp_path: Path) -> None:
    tokenizer = byte_bpe()
    ids = tokenizer("The sky is blue because air scatters")["input_ids"]
    mask = [int(t % 3 == 0) for t in range(len(ids))]
    other = [int(t > 5) for t in range(len(ids))]
    labels = [i if keep else -100 for i, keep in zip(ids, mask, strict=True)]
    check(tokenizer, [{"input_ids": ids}], tmp_path)
    check(tokenizer, [{"input_ids": ids, "labels": labels}], tmp_path)
    check(tokenizer, [{"input_ids": ids, "labels": labels, "completion_mask": other}], tmp_path)
    check(tokenizer, [{"input_ids": ids, "completion_mask": mask}], tmp_path, completion_only_loss=True)
    check(tokenizer, [{"input_ids": ids, "assistant_masks": mask}], tmp_path)
    both = [{"input_ids": ids, "completion_mask": mask, "assistant_masks": other}]
    check(tokenizer, both, tmp_path, completion_only_loss=True)
