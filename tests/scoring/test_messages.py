"""Chats before they are rendered: one form from every file format, flags, roles, tool calls, and what is left out."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
import trl
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from entrodrop_prep import cli
from entrodrop_prep.config import ScoreConfig
from entrodrop_prep.errors import ConfigError, ModelError, RowError, SourceError
from entrodrop_prep.scoring.messages import Chat, chat_of, pair_of
from entrodrop_prep.scoring.notes import NOTES, note_text
from entrodrop_prep.scoring.tokenize import Encoded, Encoder, RowFormat, detect_format
from entrodrop_prep.scoring.tokenizer import load_tokenizer
from entrodrop_prep.sources.source import open_source
from entrodrop_prep.store import manifest
from entrodrop_prep.store.schema import SCORED
from entrodrop_prep.store.shards import read_footer
from entrodrop_prep.verification.run import verify
from helpers.models import run_score, save_model, shards, tiny_llama, write_rows
from helpers.scored import rewrite_manifest
from helpers.tokenizers import CHATML, CHATML_MARKED, byte_bpe

TRL = Path(trl.__file__).parent / "chat_templates"
USER = {"role": "user", "content": "Hi"}
BOT = {"role": "assistant", "content": "Hello!"}
# Templates that print content whatever it is, arguments as JSON, and every key that is there.
PLAIN = (
    "{%- for m in messages %}{{- '<|im_start|>' + m.role ~ '\\n' ~ m.content ~ '<|im_end|>\\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
CALLS = (
    "{%- for m in messages %}{{- '<|im_start|>' + m.role + '\\n' + m.content }}{%- for c in m.tool_calls or [] %}"
    "{{- 'call ' + c.function.name + ' ' + (c.function.arguments | tojson) }}{%- endfor %}{{- '<|im_end|>\\n' }}"
    "{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
TESTS_FOR_KEYS = (
    "{%- if tools is defined and tools is not none %}{{- tools | tojson }}{%- endif %}{%- for m in messages %}"
    "{{- '<|im_start|>' + m.role + '\\n' }}{%- for key in m if key != 'role' %}{{- key + ' ' + (m[key] | tojson) }}"
    "{%- endfor %}{{- '<|im_end|>\\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)


def call(name: str, arguments: Any) -> dict[str, Any]:
    return {"type": "function", "id": "abcdefghi", "function": {"name": name, "arguments": arguments}}


def chat(*given: Any, **row: Any) -> Chat:
    return chat_of({"messages": list(given), **row}, "messages", {})


def why(*given: Any, **row: Any) -> str:
    with pytest.raises(RowError) as caught:
        chat(*given, **row)
    return str(caught.value)


def encode(row: dict[str, Any], template: str = CHATML, **more: Any) -> Encoded | str:
    form = detect_format(list(row), ScoreConfig(source="s", model="m", out="o"))
    more = {"append_eos": True, "chat_template_kwargs": None, **more}
    (result,) = Encoder(byte_bpe(template=template), form, **more).encode([row])
    return result


def texts(row: dict[str, Any], template: str = CHATML, **more: Any) -> tuple[str, str]:
    """The whole row as text, and what is trained on of it."""
    result = encode(row, template, **more)
    assert isinstance(result, Encoded), result
    return byte_bpe().decode(result.input_ids), byte_bpe().decode(result.input_ids[result.loss_mask])


# ---- content


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("Hello!", "Hello!"),
        (None, ""),
        ([], ""),
        ([{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo!"}], "Hello!"),
        (["Hel", {"text": "lo!"}], "Hello!"),
        ([{"type": "text", "text": "a", "image_url": None}, {"type": "output_text", "text": "\n"}], "a\n"),
    ],
)
def test_content_is_one_text(content: Any, text: str) -> None:
    row = {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": content}, BOT]}
    turn = f"{text}<|im_end|>\n"
    whole, trained = texts(row, PLAIN)
    assert whole == f"<|im_start|>user\n{turn}<|im_start|>assistant\n{turn}<|im_start|>assistant\nHello!<|im_end|>\n"
    assert trained == f"{turn}Hello!<|im_end|>\n"


def test_a_message_without_content_is_said() -> None:
    for message in ({"role": "user"}, {"role": "user", "content": None}, {"role": "user", "text": "lost"}):
        assert chat(message, BOT).notes == {"no_content"}
    assert not chat({"role": "user", "content": ""}, BOT).notes
    assert not chat(USER, {"role": "assistant", "tool_calls": [call("f", {})]}).notes


@pytest.mark.parametrize(
    ("message", "words"),
    [
        ("hi", "is a string, not an object"),
        (None, "is null, not an object"),
        ({"role": "assistant", "content": 3}, "has content that is a number"),
        ({"role": "assistant", "content": True}, "has content that is a boolean"),
        ({"role": "assistant", "content": {"text": "x"}}, "has content that is an object"),
        ({"role": "assistant", "content": [{"type": "image", "image": "x.png"}]}, "part 0 is of type 'image'"),
        ({"role": "assistant", "content": ["x", {"type": "input_audio"}]}, "part 1 is of type 'input_audio'"),
        ({"role": "assistant", "content": [{"type": "text", "text": None}]}, "part 0 has a text that is null"),
        ({"role": "assistant", "content": [3]}, "part 0 is a number"),
        ({"role": 3, "content": "x"}, "has a role that is a number"),
        ({"content": "x"}, "has no role"),
        ({"role": "Assistant", "content": "x"}, "has the role 'Assistant'"),
        ({"role": "tool ", "content": "x"}, "has the role 'tool '"),
        ({"from": "GPT", "value": "x"}, "has the role 'GPT'"),
        ({"role": "tool", "name": 3, "content": "x"}, "has name that is a number"),
        ({"role": "tool", "tool_call_id": [1], "content": "x"}, "has tool_call_id that is a list of number"),
        ({"role": "assistant", "reasoning_content": ["x"], "content": "x"}, "has reasoning_content that is a list"),
        ({"role": "assistant", "thinking": {"a": 1}, "content": "x"}, "has thinking that is an object"),
        ({"role": "assistant", "tool_calls": "f()"}, "has tool_calls that are a string"),
        ({"role": "assistant", "tool_calls": {"name": "f"}}, "has tool_calls that are an object"),
        ({"role": "assistant", "tool_calls": ["f"]}, "has a tool call 0 that is a string"),
        ({"role": "assistant", "tool_calls": [call("f", {}), {"id": "x"}]}, "has a tool call 1 without a name"),
        ({"role": "assistant", "tool_calls": [{"function": "f"}]}, "tool call 0 whose function is a string"),
        ({"role": "assistant", "tool_calls": [call("f", "{")]}, "whose arguments are not JSON that can be read"),
        ({"role": "assistant", "tool_calls": [call("f", "[1]")]}, "whose arguments are JSON of a list of number"),
        ({"role": "assistant", "tool_calls": [call("f", '"{}"')]}, "whose arguments are JSON of a string"),
        ({"role": "assistant", "tool_calls": [call("f", "null")]}, "whose arguments are JSON of null"),
        ({"role": "assistant", "tool_calls": [call("f", [1])]}, "whose arguments are a list of number"),
        ({"role": "assistant", "tool_calls": [{"name": "f", "arguments": 3}]}, "whose arguments are a number"),
        ({"role": "assistant", "content": "x", "weight": 0.5}, "has weight 0.5"),
        ({"role": "assistant", "content": "x", "weight": True}, "has weight True"),
        ({"role": "assistant", "content": "x", "weight": "1"}, "has weight '1'"),
        ({"role": "user", "content": "x", "weight": -1}, "has weight -1"),
        ({"role": "assistant", "content": "x", "train": "no"}, "has train 'no'"),
        ({"role": "assistant", "content": "x", "loss": False}, "has loss False"),
        ({"role": "assistant", "content": "x", "training": 0.5}, "has training 0.5"),
        ({"role": "assistant", "content": "x", "train": 1}, "has train 1"),
        ({"role": "assistant", "content": "x", "train": True, "weight": 0}, "contradict each other"),
        ({"from": "function_call", "value": "f()"}, "is a function_call whose value is not JSON"),
    ],
)  # fmt: skip
def test_the_reason_names_the_message_and_the_key(message: Any, words: str) -> None:
    reason = why(USER, BOT, message)
    assert reason.startswith("column 'messages': message 2 ")
    assert words in reason
    assert "\n" not in reason


# ---- nulls


def test_null_keys_are_dropped_wherever_they_are() -> None:
    arguments = {"city": "Paris", "unit": None, "deep": {"x": None, "y": [None, {"z": None}]}}
    given = {"role": "assistant", "content": None, "name": None, "tool_calls": [call("f", arguments)], "weight": None}
    tools = [{"type": "function", "function": {"name": "f", "strict": None, "parameters": {"default": None}}}]
    one = chat(USER, given, tools=tools, chat_template_kwargs={"a": None, "b": 1})
    clean = {"city": "Paris", "deep": {"y": [None, {}]}}
    assert one.messages[1] == {"role": "assistant", "content": "", "tool_calls": [call("f", clean)]}
    assert one.variables == {"tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}], "b": 1}
    assert chat(USER, {**BOT, "tool_calls": None}).messages == chat(USER, {**BOT, "tool_calls": []}).messages
    text = json.dumps(tools)
    assert chat(USER, BOT, tools=text).variables["tools"] == tools  # JSON text is what it says
    assert chat(USER, BOT, tools="").variables["tools"] is None


SCALARS = {"city": st.sampled_from(["Paris", "東京", ""]), "n": st.integers(-9, 9), "ok": st.booleans()}
ARGUMENTS = st.fixed_dictionaries(
    {},
    optional={
        **SCALARS,
        "deep": st.fixed_dictionaries({}, optional={**SCALARS, "list": st.lists(st.integers(0, 3))}),
    },
)
CALL = st.fixed_dictionaries(
    {"function": st.fixed_dictionaries({"name": st.sampled_from(["get", "add"])}, optional={"arguments": ARGUMENTS})},
    optional={"id": st.just("abcdefghi"), "type": st.just("function")},
)
STRINGS = st.sampled_from(["", "It is 22", "\nsky\n", "né 東京"])
PARTS = st.lists(st.fixed_dictionaries({"type": st.just("text"), "text": STRINGS}), max_size=2)


def messages(content: st.SearchStrategy[Any]) -> st.SearchStrategy[list[dict[str, Any]]]:
    assistant = st.fixed_dictionaries(
        {"role": st.just("assistant")},
        optional={
            "content": st.none() | content,
            "reasoning_content": st.none() | STRINGS,
            "tool_calls": st.none() | st.lists(CALL, max_size=2),
            "weight": st.none() | st.just(1.0),
        },
    )
    other = st.fixed_dictionaries(
        {"role": st.sampled_from(["user", "tool", "system"]), "content": st.none() | content},
        optional={"name": st.none() | st.just("get")},
    )
    last = st.just({"role": "assistant", "content": None})
    return st.tuples(st.lists(assistant | other, max_size=4), last).map(lambda parts: [*parts[0], parts[1]])


TOOLS = st.lists(
    st.fixed_dictionaries(
        {"name": st.just("get")},
        optional={"strict": st.none() | st.booleans(), "parameters": st.none() | ARGUMENTS},
    ),
    max_size=2,
)
ROW = st.sampled_from([STRINGS, PARTS]).flatmap(
    lambda content: st.lists(
        st.fixed_dictionaries({"messages": messages(content)}, optional={"tools": st.none() | TOOLS}),
        min_size=1,
        max_size=4,
    )
)


def encoded_from(file: Path, template: str) -> list[Any]:
    """ids and masks of a file's rows, or what is wrong with them, as ``score`` makes them."""
    source = open_source(str(file), split="train", split_given=False, config=None, limit=None)
    form = detect_format(source.columns, ScoreConfig(source=str(file), model="m", out="o"))
    encoder = Encoder(byte_bpe(template=template), form, append_eos=True, chat_template_kwargs=None)
    rows = source.read(0, 100, None, form.columns).rows
    assert all(row.values is not None for row in rows)
    results = encoder.encode([row.values or {} for row in rows])
    return [r if isinstance(r, str) else (r.input_ids.tolist(), r.loss_mask.tolist()) for r in results]


def in_order(value: Any, like: Any) -> Any:
    """``value`` with its keys in the order of ``like``: a Parquet column has one order of keys for all of its rows."""
    if isinstance(value, dict):
        return {key: in_order(value[key], like[key]) for key in like if key in value}
    return [in_order(item, like[0]) for item in value] if isinstance(value, list) else value


def full_row(content: Any) -> dict[str, Any]:
    """A row with every key and every type, so that a table of it can be stored."""
    deep = {"city": "x", "n": 1, "ok": True, "deep": {"city": "x", "n": 1, "ok": True, "list": [1]}}
    message = {
        **{"role": "assistant", "content": content, "reasoning_content": "x", "name": "x", "weight": 1.0},
        "tool_calls": [{"id": "x", "type": "function", "function": {"name": "get", "arguments": deep}}],
    }
    return {"messages": [message], "tools": [{"name": "get", "strict": True, "parameters": deep}]}


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=ROW)
def test_the_same_table_gives_the_same_rows_from_every_format(tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    parts = any(isinstance(m.get("content"), list) for row in rows for m in row["messages"])
    full = full_row([{"type": "text", "text": "x"}] if parts else "x")
    rows = [full, *(in_order(row, full) for row in rows)]
    table = pa.Table.from_pylist(rows)
    write_rows(tmp_path / "a.jsonl", rows)
    pq.write_table(table, tmp_path / "a.parquet")
    with pa.ipc.new_file(tmp_path / "file.arrow", table.schema) as out:
        out.write_table(table)
    with pa.ipc.new_stream(tmp_path / "stream.arrow", table.schema) as out:
        out.write_table(table)
    for template in (TESTS_FOR_KEYS, CHATML_MARKED):
        expected = encoded_from(tmp_path / "a.jsonl", template)
        assert any(not isinstance(r, str) for r in expected)
        for name in ("a.parquet", "file.arrow", "stream.arrow"):
            assert encoded_from(tmp_path / name, template) == expected, name


@pytest.mark.parametrize(
    "rows",
    [
        [{"prompt": "a?", "completion": "b"}, {"prompt": "c, d\ne", "completion": 'say "f"'}],
        [{"instruction": "Add.", "input": "1 1", "output": "2"}, {"instruction": "Say a", "input": "", "output": "a"}],
        [{"text": "sky"}, {"text": "a\tb"}],
    ],
)
def test_flat_tables_give_the_same_rows_from_every_format(tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    table = pa.Table.from_pylist(rows)
    write_rows(tmp_path / "a.jsonl", rows)
    pq.write_table(table, tmp_path / "a.parquet")
    pa.csv.write_csv(table, tmp_path / "a.csv")
    with pa.ipc.new_stream(tmp_path / "a.arrow", table.schema) as out:
        out.write_table(table)
    expected = encoded_from(tmp_path / "a.jsonl", CHATML)
    assert not any(isinstance(r, str) for r in expected)
    for name in ("a.parquet", "a.csv", "a.arrow"):
        assert encoded_from(tmp_path / name, CHATML) == expected, name


# ---- tool calls


def arguments_row(arguments: Any) -> dict[str, Any]:
    asked = {"role": "assistant", "content": "", "tool_calls": [call("get", arguments)]}
    return {"messages": [USER, asked, {"role": "tool", "name": "get", "content": "22"}, BOT]}


@pytest.mark.parametrize("text", ['{"city": "Paris"}', '{"city": "a \\"b\\" \\u00e9"}', '{"n": [1, {"x": 2.5}]}', "{}"])
def test_arguments_as_text_are_rendered_once(text: str) -> None:
    given = json.loads(text)
    whole, trained = texts(arguments_row(text), CALLS)
    assert (whole, trained) == texts(arguments_row(given), CALLS)
    assert trained == f"call get {json.dumps(given, ensure_ascii=False)}<|im_end|>\nHello!<|im_end|>\n"


def test_a_null_in_arguments_that_are_text_is_meant_and_no_text_is_no_argument() -> None:
    assert 'call get {"unit": null}' in texts(arguments_row('{"unit": null}'), CALLS)[1]
    assert "call get {}" in texts(arguments_row(""), CALLS)[1]


# What the template prints of the call, by the installed trl: as an object and as text it must be the same.
REAL = {
    "qwen2_5": '{"name": "get", "arguments": {"city": "Paris"}}',
    "qwen3_instruct_2507": '{"name": "get", "arguments": {"city": "Paris"}}',
    "llama3_2": '{"name": "get", "parameters": {"city": "Paris"}}',
    "gptoss": '{"city": "Paris"}',
    "gemma4_v5": "call:get{city:",
    "deepseekv3": 'get\n```json\n{"city": "Paris"}\n```',
    "lfm2_v2": "get(city=",
}


@pytest.mark.parametrize("name", REAL)
def test_real_templates_get_arguments_in_the_form_they_take(name: str) -> None:
    from entrodrop_prep.scoring.chat import render
    from entrodrop_prep.scoring.messages import with_calls
    from entrodrop_prep.scoring.tool_calls import call_form

    tokenizer = byte_bpe(template=(TRL / f"{name}.jinja").read_text(encoding="utf-8"))
    form = call_form(tokenizer, {}, tools=False)
    rendered = []
    for arguments in ({"city": "Paris"}, '{"city": "Paris"}'):
        one = with_calls(chat_of(arguments_row(arguments), "messages", {}), form)
        rendered.append(render(tokenizer, one.messages, one.variables))
    assert rendered[0] == rendered[1]
    assert REAL[name] in rendered[0]
    assert "'city'" not in rendered[0]


@pytest.mark.parametrize("test", ["m.content is none", "m.content is not defined"])
def test_a_template_that_prints_calls_only_beside_no_content_gets_none(test: str) -> None:
    printed = "{{- m.tool_calls[0].function.name + ' ' + m.tool_calls[0].function.arguments }}"
    template = (
        "{%- for m in messages %}{{- '<|im_start|>' + m.role + '\\n' }}{%- if m.tool_calls and " + test + " %}"
        f"{printed}{{%- else %}}{{{{- m.content }}}}{{%- endif %}}{{{{- '<|im_end|>\\n' }}}}{{%- endfor %}}"
        "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
    )
    for arguments in ({"city": "Paris"}, '{"city": "Paris"}'):
        assert texts(arguments_row(arguments), template)[1].startswith('get {"city": "Paris"}<|im_end|>')


# ---- roles


@pytest.mark.parametrize(
    ("name", "role"),
    [("human", "user"), ("user", "user"), ("gpt", "assistant"), ("chatgpt", "assistant"), ("bing", "assistant"),
     ("bard", "assistant"), ("model", "assistant"), ("system", "system"), ("observation", "tool"), ("tool", "tool"),
     ("developer", "developer"), ("function", "function")],
)  # fmt: skip
def test_sharegpt_roles(name: str, role: str) -> None:
    one = chat({"from": name, "value": "x"}, {"from": "gpt", "value": "y"})
    assert [m["role"] for m in one.messages] == [role, "assistant"]
    assert one.trained == [role == "assistant", True]
    assert all(set(m) == {"role", "content"} for m in one.messages)
    with_role = chat({"role": name, "content": "x"}, BOT).messages[0]["role"]
    assert with_role == (name if name == "observation" else role)


def test_a_sharegpt_function_call_is_a_tool_call() -> None:
    value = json.dumps({"name": "get", "arguments": {"city": "Paris"}})
    one = chat(
        {"from": "human", "value": "?"}, {"from": "function_call", "value": value}, {"from": "gpt", "value": "x"}
    )
    function = {"name": "get", "arguments": {"city": "Paris"}}
    assert one.messages[1] == {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"type": "function", "function": function}],
    }
    legacy = {"role": "assistant", "content": None, "function_call": {"name": "get", "arguments": '{"city": "Paris"}'}}
    assert chat(USER, legacy).messages[1]["tool_calls"][0]["function"]["name"] == "get"


def test_a_system_column_is_the_system_message() -> None:
    row = {
        "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello!"}],
        "system": "Be brief.",
    }
    whole, trained = texts(row)
    assert whole.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user")
    assert trained == "Hello!<|im_end|>\n"
    for nothing in (None, "", " \n"):
        assert texts({**row, "system": nothing})[0].startswith("<|im_start|>user")
    own = {"role": "system", "content": "Be brief."}
    assert chat(own, USER, BOT, system="Be brief.\n").messages == chat(own, USER, BOT).messages
    assert "differ" in why(own, USER, BOT, system="Be long.")
    assert "'system' holds a number" in why(USER, BOT, system=3)


# ---- what is trained on


@pytest.mark.parametrize("template", [CHATML, CHATML_MARKED], ids=["plain", "marked"])
@pytest.mark.parametrize(
    ("flags", "train_on", "left"),
    [
        ([{}, {}, {}], "all-turns", "abc"),
        ([{"train": False}, {"train": True}, {}], "all-turns", "bc"),
        ([{"weight": 0}, {"weight": 1.0}, {"weight": None}], "all-turns", "bc"),
        ([{}, {}, {}], "last-turn", "c"),
        ([{}, {}, {"weight": 0.0}], "last-turn", "b"),
    ],
)
def test_turns_that_are_switched_off(flags: list[dict[str, Any]], train_on: str, left: str, template: str) -> None:
    turns = [{"role": "assistant", "content": text, **flag} for text, flag in zip("abc", flags, strict=True)]
    row = {"messages": [m for turn in turns for m in (USER, turn)]}
    whole, trained = texts(row, template, train_on=train_on)
    assert trained == "".join(f"{text}<|im_end|>\n" for text in left)
    assert whole == texts({"messages": [m for t in "abc" for m in (USER, {**BOT, "content": t})]}, template)[0]


def test_flags_of_other_roles_and_of_all_turns() -> None:
    one = chat({**USER, "train": True}, {"role": "system", "content": "x", "weight": 1}, {**BOT, "weight": 1})
    assert one.trained == [False, False, True]
    assert one.notes == {"trained_role"}
    assert not any({"train", "weight"} & m.keys() for m in one.messages)
    assert not chat({**USER, "weight": 0}, BOT).notes
    assert chat({**USER, "loss": False}, {**BOT, "loss": True}).trained == [False, True]
    assert "every one has train: false or weight: 0" in why(USER, {**BOT, "weight": 0})
    assert "(roles: user)" in why(USER)


def test_of_a_completion_only_its_own_assistant_messages_are_trained_on() -> None:
    row = {"prompt": [USER, BOT, USER], "completion": [{**BOT, "weight": 0}, USER, BOT]}
    both, count = pair_of(row, "prompt", "completion", {})
    assert count == 3
    assert both.trained == [False] * 5 + [True]


def test_train_on_is_for_chats() -> None:
    for form in (RowFormat("text", ("text",)), RowFormat("input_ids", ("input_ids",))):
        with pytest.raises(ConfigError, match="--train-on last-turn is for chats"):
            Encoder(byte_bpe(), form, append_eos=True, chat_template_kwargs=None, train_on="last-turn")


# ---- Alpaca


def test_alpaca_columns() -> None:
    def columns(*names: str) -> RowFormat:
        return detect_format(names, ScoreConfig(source="s", model="m", out="o"))

    form = columns("input", "id", "output", "instruction", "history")
    assert form.describe() == "prompt and completion from instruction, input and output, with history"
    assert set(form.columns) == {"instruction", "input", "output", "history"}
    assert columns("output", "instruction").describe() == "prompt and completion from instruction and output"
    for other in ("text", "messages", "conversations"):
        with pytest.raises(SourceError, match=f"from {other}") as caught:
            columns("instruction", "input", "output", other)
        assert "instruction, input and output" in str(caught.value)
    with pytest.raises(SourceError):
        columns("instruction", "input")


def test_alpaca_rows() -> None:
    row = {"instruction": "Add.", "input": "1 1", "output": "two", "system": "", "history": []}
    assert texts(row) == ("Add.\n1 1\ntwo</s>", "two</s>")
    for nothing in ("", None, " "):
        assert texts({**row, "input": nothing}) == ("Add.\ntwo</s>", "two</s>")
    for name, value in (("system", "Be brief."), ("history", [["a", "b"]])):
        assert f"column '{name}' is not empty" in str(encode({**row, name: value}))
    assert "'output' holds null" in str(encode({**row, "output": None}))
    assert "'instruction' holds a number" in str(encode({**row, "instruction": 3}))


# ---- what a template leaves out


def notes(template: str, *given: Any, **row: Any) -> set[str]:
    result = encode({"messages": list(given), **row}, template)
    assert isinstance(result, Encoded), result
    return set(result.notes)


SOME_ROLES = (
    "{%- for m in messages if m.role in ('user', 'assistant', 'tool') %}{{- '<|im_start|>' + m.role + '\\n' + "
    "m.content | trim + '<|im_end|>\\n' }}{%- endfor %}{%- if add_generation_prompt %}"
    "{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)


def test_texts_that_the_template_leaves_out_are_said_by_role() -> None:
    developer, system = {"role": "developer", "content": "Be kind."}, {"role": "system", "content": "Hi"}
    assert notes(SOME_ROLES, USER, BOT) == set()
    assert notes(SOME_ROLES, developer, USER, BOT) == {"left_out:developer"}
    assert "left_out:system" in notes(SOME_ROLES, system, USER, BOT)  # the user says the same, and that is printed
    assert notes(CHATML, developer, system, USER, {**BOT, "content": "\n\n a \n"}) == set()
    assert notes(SOME_ROLES, USER, {**BOT, "content": "\n\n a \n"}) == set()
    assert notes(SOME_ROLES, USER, {**BOT, "tool_calls": [call("get", {})]}) == {"left_out_calls"}
    tools = [{"type": "function", "function": {"name": "get"}}]
    assert notes(SOME_ROLES, USER, BOT, tools=tools) == {"left_out_tools"}
    assert notes(CHATML, USER, BOT, tools=tools) == set()
    for thoughts in ("reasoning_content", "reasoning", "thinking"):
        assert notes(CHATML, USER, {**BOT, thoughts: "hm"}) == {"left_out_thoughts"}
        assert notes(CHATML, USER, {**BOT, thoughts: "hm"}, USER, BOT) == {"left_out_earlier_thoughts"}
    assert all("2 rows" in note_text(key, 2) for key in NOTES)
    assert "developer" in note_text("left_out:developer", 1)


def test_thoughts_in_the_text_that_are_cut_off_earlier() -> None:
    template = (TRL / "lfm2_2_5.jinja").read_text(encoding="utf-8")
    thought = {**BOT, "content": "<think>hm</think>sky"}
    assert notes(template, USER, thought, USER, {**BOT, "content": "<think>hum</think>blue"}) == {
        "left_out_earlier_thoughts"
    }


def test_a_trained_message_of_which_nothing_is_printed_is_said() -> None:
    template = SOME_ROLES.replace("m.content | trim", "(m.content if m.content != 'lost' else '')")
    row = {"messages": [USER, {**BOT, "content": "lost"}, USER, BOT]}
    for train in (True, False):
        row["messages"][1]["train"] = train
        result = encode(row, template)
        assert isinstance(result, Encoded), result
        assert result.notes == {"left_out:assistant"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = save_model(tmp_path_factory.mktemp("model"), tiny_llama(len(byte_bpe())))
    byte_bpe(template=SOME_ROLES).save_pretrained(directory)
    return directory


def test_notes_are_counted_once_a_row_and_said_at_the_end(
    tmp_path: Path, model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    developer = {"role": "developer", "content": "Be kind."}
    rows = [{"messages": [developer, developer, USER, BOT] if i % 2 else [USER, BOT]} for i in range(7)]
    source = write_rows(tmp_path / "rows.jsonl", rows)
    with caplog.at_level(logging.WARNING):
        run_score(source, model, tmp_path / "out", rows_per_shard=3)
    line = "3 rows: the chat template does not print the text of the developer messages"
    assert caplog.text.count(line) == 1
    described = manifest.read(tmp_path / "out", SCORED)
    assert described["notes"] == {"left_out:developer": 3}
    assert "train_on" not in described["identity"]
    assert [read_footer(path).info.get("notes") for path in shards(tmp_path / "out")] == [
        {"left_out:developer": 1},
        {"left_out:developer": 2},
        None,
    ]
    assert not verify(str(tmp_path / "out"), None).findings
    shutil.copytree(tmp_path / "out", tmp_path / "again")
    shards(tmp_path / "again")[1].unlink()
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        run_score(source, model, tmp_path / "again", rows_per_shard=3)
    assert caplog.text.count(line) == 1
    assert manifest.read(tmp_path / "again", SCORED) == described
    rewrite_manifest(tmp_path / "again", notes={"left_out:developer": 2})
    (finding,) = verify(str(tmp_path / "again"), None).findings
    assert "the notes are not those of the shards" in finding
    run_score(source, model, tmp_path / "last", rows_per_shard=3, train_on="last-turn")
    assert manifest.read(tmp_path / "last", SCORED)["identity"]["train_on"] == "last-turn"


# ---- a template of our own


def test_chatml_comes_with_the_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    byte_bpe().save_pretrained(tmp_path / "tokenizer")
    monkeypatch.chdir(tmp_path)

    def load() -> Any:
        return load_tokenizer(
            str(tmp_path / "tokenizer"), revision=None, trust_remote_code=False, chat_template_file="chatml"
        )

    rows = {"messages": [{"role": "system", "content": "s"}, USER, BOT, USER, {**BOT, "content": " a"}]}
    own = load().chat_template
    whole, trained = texts(rows, own)
    assert whole == texts(rows, PLAIN)[0]
    assert trained == "Hello!<|im_end|>\n a<|im_end|>\n".replace("<|im_end|>\n", "<|im_end|>")
    assert "no place for tools" in str(encode({**rows, "tools": [{"name": "f"}]}, own))
    assert "no place for tool calls" in str(encode(arguments_row({}), own))
    (tmp_path / "chatml").write_text("{{ messages }}", encoding="utf-8")
    assert load().chat_template == "{{ messages }}"
    with pytest.raises(ModelError, match="--chat-template chatml"):
        encode(rows, None)  # type: ignore[arg-type]


def test_chatml_for_a_tokenizer_without_its_tokens(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, model: Path
) -> None:
    from helpers.models import word_tokenizer

    for directory, said in ((model, False), (tmp_path, True)):
        if said:
            word_tokenizer(61).save_pretrained(directory)
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            load_tokenizer(str(directory), revision=None, trust_remote_code=False, chat_template_file="chatml")
        assert ("no token for <|im_start|> or <|im_end|>" in caplog.text) == said


def test_chatml_is_named_on_the_command_line(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it is no file, and the directory in which the command runs has none of that name."""
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "rows.jsonl", [{"messages": [USER, BOT]}])
    command = ["score", "rows.jsonl", "--model", str(model), "--backend", "transformers", "--out", "scored"]
    assert cli.run([*command, "--chat-template", "chatml"]) == 0
    assert cli.run([*command, "--chat-template", "chatmll", "--overwrite"]) == 2
