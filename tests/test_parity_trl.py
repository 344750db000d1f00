"""The ids and the trainable positions t >= 1 of every row format are those of TRL's SFTTrainer on the same rows."""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import trl
from tokenizers_for_tests import CHATML, CHATML_MARKED, byte_bpe
from transformers import GPT2Config, GPT2LMHeadModel
from trl.data_utils import maybe_convert_to_chatml

from entrodrop_prep.config import ScoreConfig
from entrodrop_prep.scoring.tokenize import Encoded, Encoder, detect_format

TEMPLATES = Path(trl.__file__).parent / "chat_templates"
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
        {"prompt": [system("s"), user("Hi"), bot("x"), user("y")], "completion": [bot("z"), result("6"), bot("w")],
         "tools": [MULTIPLY], "chat_template_kwargs": {"unused": 1}},
        {"prompt": [user("Hi")], "completion": [bot("", tool_calls=[call("multiply", a="x")])],
         "tools": json.dumps([LOOK_UP]), "chat_template_kwargs": {}},
        {"prompt": [user("Hi")], "completion": [bot("\nHello!")], "tools": None, "chat_template_kwargs": {}},
    ]  # fmt: skip
    check(byte_bpe(bos=True, template=template), rows, tmp_path)


def test_prompt_whose_generation_prompt_the_turn_lacks(tmp_path: Path) -> None:
    template = CHATML.replace("assistant\\n' }}{%- endif %}\n", "assistant\\n<think>\\n\\n</think>' }}{%- endif %}\n")
    assert template != CHATML
    rows = [{"prompt": [user("Hi")], "completion": [bot("Hello!")]}]
    check(byte_bpe(template=template), rows, tmp_path)


@pytest.mark.parametrize("trim", [False, True])
def test_messages_with_markers(tmp_path: Path, trim: bool) -> None:
    rows = [{"messages": chat} for chat in CHATS.values()]
    check(byte_bpe(bos=True, template=CHATML_MARKED, trim=trim), rows, tmp_path, assistant_only_loss=True)


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


# Real templates and TRL's training variants of them, as the installed trl ships them. In these the variant only adds
# markers, where a turn's header ends, so that the masks must be the same.
SAME = ["cohere", "cohere2", "gemma", "gemma3", "lfm2", "lfm2_v2", "llama3", "phi3", "phi3_5", "qwen2_5_vl",
        "qwen3_instruct_2507", "qwen3_vl"]  # fmt: skip
# In these the variant also trains on (the end of) the turn's header, which the generation prompt gives the model.
FEWER = {"qwen2_5": "\n", "gptoss": "<|start|>assistant", "muse_glimmer": "<|start|>assistant"}
# These rewrite earlier turns, and the variant does not.
REWRITE = ["qwen3", "qwen3_5_think", "qwen3_5_nothink", "qwen3_6", "gptoss"]

REAL: list[dict[str, Any]] = [
    *({"messages": chat, "tools": None} for chat in CHATS.values()),
    {"messages": [user("Hi"), bot("<think>\nhm\n</think>\n\nBlue"), user("x"), bot("<think>\ny\n</think>\n\nz")],
     "tools": None},
    {"messages": [user("2?"), bot("", tool_calls=[call("multiply", a=2)]), result("4"), bot("four")],
     "tools": [MULTIPLY]},
]  # fmt: skip


def real(name: str, rows: Rows = REAL) -> list[Encoded | str]:
    eos = "<|return|>" if name.startswith("gptoss") else "</s>"
    template = (TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8")
    return ours(byte_bpe(bos=True, eos=eos, template=template), rows)


@pytest.mark.parametrize("name", SAME)
def test_real_template_gives_the_mask_of_its_training_variant(name: str) -> None:
    pairs = list(zip(real(name), real(f"{name}_training"), strict=True))
    derived = [(plain(a), plain(b)) for a, b in pairs if not isinstance(a, str)]
    assert derived
    assert all(a == b for a, b in derived)
    for a, b in pairs:  # a row is refused where the variant raises too, or where the assistant begins
        assert not isinstance(a, str) or isinstance(b, str) or "begins with the assistant" in a


@pytest.mark.parametrize("name", FEWER)
def test_variant_that_also_trains_on_the_header(name: str) -> None:
    derived = 0
    for a, b in zip(real(name), real(f"{name}_training"), strict=True):
        if isinstance(a, Encoded) and isinstance(b, Encoded):
            derived += 1
            assert a.input_ids.tolist() == b.input_ids.tolist()
            assert not (a.loss_mask & ~b.loss_mask).any()
            more = byte_bpe().decode(b.input_ids[b.loss_mask & ~a.loss_mask])
            assert more.replace(FEWER[name], "") == ""
    assert derived


def all_pairs() -> list[str]:
    variants = sorted(TEMPLATES.glob("*_training.jinja"))
    return [v.stem.removesuffix("_training") for v in variants]


@pytest.mark.parametrize("name", all_pairs())
def test_no_real_template_trains_on_what_its_variant_does_not(name: str) -> None:
    """Whatever the template: refused, or other ids than the variant's (which rewords the chat), or no token more."""
    for a, b in zip(real(name), real(f"{name}_training"), strict=True):
        if isinstance(a, Encoded) and isinstance(b, Encoded) and a.input_ids.tolist() == b.input_ids.tolist():
            assert not (a.loss_mask & ~b.loss_mask).any()


@pytest.mark.parametrize("name", REWRITE)
def test_template_that_rewrites_earlier_turns_is_refused(name: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR)
    (reason,) = real(name, [{"messages": CHATS["several turns"]}])
    assert isinstance(reason, str)
    assert "message 2 (assistant)" in reason
    assert "--chat-template" in reason


def test_qwen3_without_thinking_starts_after_the_empty_thought() -> None:
    template = (TEMPLATES / "qwen3.jinja").read_text(encoding="utf-8")
    tokenizer = byte_bpe(template=template)
    (a,) = ours(tokenizer, [{"messages": [user("Hi"), bot("Blue")]}], enable_thinking=False)
    assert isinstance(a, Encoded)
    assert tokenizer.decode(a.input_ids[a.loss_mask]) == "Blue<|im_end|>\n"
    thought = [{"messages": [user("Hi"), bot("<think>\nhm\n</think>\n\nBlue")]}]
    (b,) = ours(tokenizer, thought, enable_thinking=False)
    assert isinstance(b, str)
    assert "holds text that the turn does not begin with" in b
    (c,) = ours(tokenizer, thought)
    assert isinstance(c, Encoded)
    assert tokenizer.decode(c.input_ids[c.loss_mask]) == "<think>\nhm\n</think>\n\nBlue<|im_end|>\n"
