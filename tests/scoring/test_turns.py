"""The assistant's turns in what real and odd chat templates render, and that no other text is trained on."""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import trl
from transformers.utils.chat_template_utils import render_jinja_template

import entrodrop_prep.scoring.turns as turns_module
from entrodrop_prep.config import MaterializeConfig
from entrodrop_prep.errors import RowError
from entrodrop_prep.export.materialize import materialize
from entrodrop_prep.scoring.chat import render
from entrodrop_prep.scoring.messages import Chat
from entrodrop_prep.scoring.tokenize import Encoded, Encoder, RowFormat
from entrodrop_prep.scoring.turns import TurnFinder, Turns
from helpers.models import rows_of, run_score, save_model, tiny_llama, word_tokenizer, write_rows
from helpers.tokenizers import CHATML, CHATML_MARKED, byte_bpe

TEMPLATES = Path(trl.__file__).parent / "chat_templates"
NAMES = sorted(p.stem for p in TEMPLATES.glob("*.jinja") if not p.stem.endswith("_training"))


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def bot(text: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather of a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
CALL = {"type": "function", "id": "abcdefghi", "function": {"name": "get_weather", "arguments": {"city": "Paris"}}}
FOUND = {"role": "tool", "name": "get_weather", "tool_call_id": "abcdefghi", "content": "22"}
CHATS: dict[str, tuple[list[dict[str, Any]], list[Any] | None]] = {
    "one turn": ([user("Why is the sky blue?"), bot("Air scatters.")], None),
    "two turns": ([user("Hi"), bot("Hello!"), user("and then?"), bot("Done now.")], None),
    "system": ([{"role": "system", "content": "Be brief."}, user("Hi"), bot("Hello!"), user("a"), bot("Bye.")], None),
    "thoughts in text": (
        [user("2+2?"), bot("<think>\nadd\n</think>\n\nIs 4."), user("3+3?"), bot("<think>\nmore\n</think>\n\nIs 6.")],
        None,
    ),
    "thoughts apart": (
        [user("2+2?"), bot("Is 4.", reasoning_content="add"), user("3+3?"), bot("Is 6.", reasoning_content="more")],
        None,
    ),
    "tool": ([user("Weather in Paris?"), bot("", tool_calls=[CALL]), FOUND, bot("It is 22.")], [WEATHER]),
    "tools twice": (
        [user("Paris?"), bot("", tool_calls=[CALL]), FOUND, bot("22."), user("again?"), bot("", tool_calls=[CALL]),
         FOUND, bot("Still 22.")],
        [WEATHER],
    ),
    "last word the user's": ([user("Hi"), bot("Hello!"), user("and?")], None),
}  # fmt: skip

THOUGHT = r"^(<think>\n?)?[^<>]*</think>(\n\n)?"
DIFFERENCES: dict[str, tuple[str, str]] = {
    **dict.fromkeys(
        ["deepseekv3", "gptoss", "muse_glimmer"],
        ("the variant trains on the header", r"^(<｜Assistant｜>|<｜tool▁outputs▁end｜>|<\|start\|>assistant)"),
    ),
    "qwen2_5": ("the variant trains on the end of the header", r"^\n"),
    "deepseek_r1_distill": (
        "the variant trains on the header, and keeps the thoughts that the template drops",
        r"^(<｜Assistant｜>|<｜tool▁outputs▁end｜>)?(<think>[^<>]*</think>)?",
    ),
    **dict.fromkeys(
        ["nemotron_3_5_lightning", "nemotron_3_nano", "nemotron_3_super", "nemotron_3_ultra", "qwen3_8"],
        ("the generation prompt opens the thought, which the variant trains on all the same", r"^<think>\n"),
    ),
    **dict.fromkeys(
        ["qwen3", "qwen3_5_nothink", "qwen3_5_think", "qwen3_6"],
        (
            "the variant also writes thoughts, empty ones too, into earlier turns, and trains on what prompts open",
            THOUGHT,
        ),
    ),
    "diffusion_gemma": ("the token that ends a tool call is not marked", r"<\|tool_response>$"),
    "llava_next": ("the blank behind the end of a turn is not marked", r" $"),
}
"""Where the trained text is not that of TRL's training variant: why, and the part that is not compared."""


IN_PARTS = ["idefics3", "llava_next", "smolvlm"]
"""They read texts as lists of parts, and nothing of one that is a string."""


def in_parts(messages: Sequence[Any]) -> list[Any]:
    return [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in messages]


def theirs(name: str, messages: Sequence[Any], tools: Any, tokenizer: Any) -> list[str]:
    """The texts that TRL's training variant marks."""
    text, spans = render_jinja_template(
        [in_parts(messages) if name in IN_PARTS else list(messages)],
        tools=tools,
        chat_template=(TEMPLATES / f"{name}_training.jinja").read_text(encoding="utf-8"),
        return_assistant_tokens_mask=True,
        **tokenizer.special_tokens_map,
    )
    return [text[0][start:end] for start, end in spans[0]]


def comparable(name: str, texts: Sequence[str]) -> str:
    """The trained text without what is known to differ."""
    return "".join(re.sub(DIFFERENCES[name][1], "", text) if name in DIFFERENCES else text for text in texts)


def template_of(name: str) -> str:
    return (TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8")


def found(tokenizer: Any, messages: list[dict[str, Any]], tools: Any = None, **variables: Any) -> Turns:
    trained = [m["role"] == "assistant" and m.get("train", True) for m in messages]
    shown: list[Any] = [{k: v for k, v in m.items() if k != "train"} for m in messages]
    return TurnFinder(tokenizer).find(Chat(shown, trained, {"tools": tools, **variables}))


def texts(turns: Turns) -> list[str]:
    return [turns.text[start:end] for start, end in turns.spans]


@pytest.mark.parametrize("name", NAMES)
def test_what_one_rendering_finds_is_what_prefixes_find(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = byte_bpe(bos=True, eos="<|return|>" if name == "gptoss" else "</s>", template=template_of(name))
    answers, outlined = [], turns_module._Search._outline
    seen: list[bool] = []

    def noted(search: Any) -> Any:
        others = outlined(search)
        seen.append(bool(others))
        return others

    for outline in (noted, lambda search: {}):
        monkeypatch.setattr(turns_module._Search, "_outline", outline)
        answers.append([found_or_refused(tokenizer, *chat) for chat in CHATS.values()])
    assert answers[0] == answers[1]
    assert (
        any(seen) or "{%- generation" in template_of(name) or "{% generation" in template_of(name)
    )  # markers need none


def found_or_refused(tokenizer: Any, messages: list[dict[str, Any]], tools: Any) -> Turns | None:
    try:
        return found(tokenizer, messages, tools)
    except RowError:
        return None


@pytest.mark.parametrize("name", NAMES)
def test_real_templates(name: str) -> None:
    """No chat that the template renders is refused; each turn is its training variant's, and ends with an end token."""
    tokenizer = byte_bpe(bos=True, eos="<|return|>" if name == "gptoss" else "</s>", template=template_of(name))
    finder, seen, different = TurnFinder(tokenizer), 0, False
    form = RowFormat("messages", ("messages",), ("tools",))
    encoder = Encoder(tokenizer, form, append_eos=True, chat_template_kwargs=None)
    for messages, tools in CHATS.values():
        chat = Chat(messages, [m["role"] == "assistant" for m in messages], {"tools": tools})
        try:
            render(tokenizer, in_parts(messages) if name in IN_PARTS else messages, chat.variables)
        except RowError:
            with pytest.raises(RowError, match="cannot render"):
                finder.find(chat)
            continue
        turns = finder.find(chat)
        (encoded,) = encoder.encode([{"messages": messages, "tools": tools}])
        assert isinstance(encoded, Encoded), encoded
        spoken = tokenizer.decode(encoded.input_ids[encoded.loss_mask])
        # a token may hold the last blank of a header and the first of a turn
        assert spoken.replace("\n", "") == "".join(texts(turns)).replace("\n", "")
        seen += 1
        assert len(turns.spans) == sum(chat.trained)
        ends = finder.format_of(chat.variables).end_tokens
        assert ends
        assert all(text.rstrip().endswith(ends) for text in texts(turns)), texts(turns)
        assert turns.closed
        if (TEMPLATES / f"{name}_training.jinja").exists():
            wanted = theirs(name, messages, tools, tokenizer)
            assert comparable(name, texts(turns)) == comparable(name, wanted)
            different |= texts(turns) != wanted
    assert seen
    assert different or name not in DIFFERENCES  # a difference that is gone is taken off the list


PLAIN = (
    "{%- for m in messages %}{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
HEADED = (
    "{%- for m in messages %}{%- if m.role == 'user' %}{{- 'user: ' + m.content }}{%- else %}"
    "{{- ' Answer: ' + m.content + eos_token }}{%- endif %}{%- endfor %}"
)
FORGETFUL = PLAIN.replace("+ m.content +", "+ (m.content if loop.last else m.content.split('</t>')[-1]) +")
ALWAYS = PLAIN.split("{%- if add_generation_prompt")[0] + "{{- '<|im_start|>assistant\\n' }}"
HEADINGS = (
    "{%- for m in messages %}{{- '\\n\\n## ' + m.role + ':\\n' + m.content + '\\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '\\n\\n## assistant:\\n' }}{%- endif %}"
)
HALF_ASKED = (
    "{%- for m in messages %}{{- '<|im_start|><|' + m.role + '|>' + ('<think>' if m.role == 'assistant' else '') }}"
    "{{- m.content + '<|end|><|im_end|>' }}{%- endfor %}{{- '<|im_start|><|assistant|>' }}"
    "{%- if add_generation_prompt %}{{- '<think>' }}{%- endif %}"
)
SYSTEM_LAST = (  # and a number in what follows a tool's answer
    "{%- for m in messages %}{%- if m.role == 'tool' %}{{- '[TOOL]' + m.content + ',' + m.tool_call_id + '[/TOOL]' }}"
    "{%- elif m.role == 'user' %}"
    "{{- '[INST] ' + (messages[0].content + ' ' if loop.last and messages[0].role == 'system' else '') + m.content }}"
    "{{- '[/INST]' }}{%- elif m.role == 'assistant' %}{{- ' ' + m.content + eos_token }}{%- endif %}{%- endfor %}"
)
LATE_EOS = (
    "{%- for m in messages %}{{- m.role + ': ' + m.content }}{{- eos_token if not loop.last }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- eos_token + 'assistant: ' }}{%- endif %}"
)
CLOSING_EOS = (
    "{%- for m in messages %}{{- m.role + ': ' + m.content }}{{- '\\n' if not loop.last }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '\\nassistant: ' }}{%- else %}{{- eos_token }}{%- endif %}"
)
OTHER_PROMPT = (
    "{%- for m in messages %}{{- '\\n @' + m.role + ': ' + m.content + eos_token }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '\\n@assistant:' }}{%- endif %}"
)
COUNTING = PLAIN.replace("<|im_start|>' + m.role", "<|im_start|>' ~ messages|length ~ m.role").replace(
    "'assistant", "'~messages|length~'assistant"
)
TWO = [user("Hi"), bot("Hello!"), user("x"), bot("y")]


@pytest.mark.parametrize(
    ("template", "messages", "wanted"),
    [
        # an answer that begins as the header does
        (HEADED, [user("Which?"), bot("A")], ["A</s>"]),
        (HEADED, [user("Which?"), bot("An")], ["An</s>"]),
        (HEADED, [user("Which?"), bot(" Answer: B")], [" Answer: B</s>"]),
        # texts that hold what the template writes
        (PLAIN, [user("<|im_end|>\n<|im_start|>assistant\nno"), bot("yes")], ["yes<|im_end|>\n"]),
        (FORGETFUL, [user("a"), bot("t</t>b<|im_end|>"), user("<|im_start|>assistant\nno<|im_end|>"), bot("c")],
         ["b<|im_end|><|im_end|>\n", "c<|im_end|>\n"]),
        (FORGETFUL, [bot("t</t>a"), bot("t</t>b"), user("<|im_end|>"), user("z"), bot("t</t>c")],
         ["a<|im_end|>\n", "b<|im_end|>\n", "t</t>c<|im_end|>\n"]),
        (FORGETFUL, [user("XqzvaX YwjkbY"), bot("t</t>XqzvaX"), user(""), bot("")],
         ["XqzvaX<|im_end|>\n", "<|im_end|>\n"]),
        # a generation prompt that nobody asked for
        (ALWAYS, TWO, ["Hello!<|im_end|>\n", "y<|im_end|>\n"]),
        (ALWAYS, [*TWO, user("z")], ["Hello!<|im_end|>\n", "y<|im_end|>\n"]),
        (HALF_ASKED, TWO, ["Hello!<|end|><|im_end|>", "y<|end|><|im_end|>"]),
        (HALF_ASKED.partition("{%- if add")[0].replace("think", "tool_call"), TWO,
         ["<tool_call>Hello!<|end|><|im_end|>", "<tool_call>y<|end|><|im_end|>"]),
        # an end that is a line break, before a header that begins with one
        (HEADINGS, [user("\n"), bot("a"), user(" "), bot("b")], ["a\n", "b\n"]),
        (HEADINGS, TWO, ["Hello!\n", "y\n"]),
        # a system message that only the last question has
        (SYSTEM_LAST, [{"role": "system", "content": "s"}, *TWO], [" Hello!</s>", " y</s>"]),
        (SYSTEM_LAST, [{"role": "system", "content": "s"}, user("a"), bot("b"), FOUND, *TWO[1:]],
         [" b</s>", " Hello!</s>", " y</s>"]),
        # an end that only the next turn brings
        (LATE_EOS, TWO, ["Hello!</s>", "y</s>"]),
        (LATE_EOS, [user("a"), bot("b"), bot("c")], ["b</s>", "c</s>"]),
        (template_of("glm4moe"), [user("a"), bot("b<|user|>"), user(" "), bot("c")],
         ["\n<think></think>\nb<|user|><|user|>", "\n<think></think>\nc<|user|>"]),
        # a generation prompt that shares only white space, or some words, with the header
        (OTHER_PROMPT, TWO, ["Hello!</s>", "y</s>"]),
        (OTHER_PROMPT.replace("\\n@assistant", "\\n @answer"), [bot("a"), *TWO], ["a</s>", "Hello!</s>", "y</s>"]),
        # an end of the conversation, not of the turn
        (PLAIN + "{%- if not add_generation_prompt %}{{- eos_token }}{%- endif %}", TWO,
         ["Hello!<|im_end|>\n", "y<|im_end|>\n</s>"]),
        (CLOSING_EOS, [user("a"), bot("b")], ["b</s>"]),
    ],
)  # fmt: skip
def test_odd_templates(template: str, messages: list[dict[str, Any]], wanted: list[str]) -> None:
    assert texts(found(byte_bpe(template=template), messages)) == wanted


SAYS = "{%- for m in messages %}@BEFORE@{{- '<|' + m.role + '|>' + m.content + '<|end|>' }}@AFTER@{%- endfor %}@LAST@"
ASKS = "{%- if add_generation_prompt %}{{- '<|assistant|>' }}{%- endif %}"
NOTE = "{{- '<|system|>Be nice<|end|>' }}"


def with_note(**places: str) -> str:
    """A template that writes something of its own before or behind messages, or behind the last one."""
    text = SAYS
    for place in ("before", "after", "last"):
        text = text.replace(f"@{place.upper()}@", places.get(place, ""))
    return text + ASKS


@pytest.mark.parametrize(
    "template",
    [
        with_note(before=f"{{%- if m.role == 'user' %}}{NOTE}{{%- endif %}}"),
        with_note(after=f"{{%- if m.role == 'assistant' %}}{NOTE}{{%- endif %}}"),
        with_note(last=f"{{%- if not add_generation_prompt %}}{NOTE}{{%- endif %}}"),
        with_note(last="{%- if not add_generation_prompt %}{{- 'The end.' }}{%- endif %}"),
        with_note(before="{%- if messages[0].role != 'system' %}{{ raise_exception('none') }}{%- endif %}"),
    ],
    ids=["before the user", "behind the answer", "at the end", "words at the end", "system needed"],
)
def test_what_the_template_says_itself_is_not_trained_on(template: str) -> None:
    messages = [{"role": "system", "content": "s"}, *TWO]
    assert texts(found(byte_bpe(template=template), messages)) == ["Hello!<|end|>", "y<|end|>"]
    assert texts(found(byte_bpe(template=template), [*messages, user("z")])) == ["Hello!<|end|>", "y<|end|>"]


def test_a_header_that_only_a_reminder_shares_is_not_trained_on() -> None:
    note = "{%- if not add_generation_prompt %}{{- '<|im_start|>system\\nBe nice<|im_end|>\\n' }}{%- endif %}"
    template = PLAIN.replace("{%- if add", f"{note}{{%- if add")
    assert texts(found(byte_bpe(template=template), TWO)) == ["Hello!<|im_end|>\n", "y<|im_end|>\n"]


@pytest.mark.parametrize("again", ["messages[0].content", "messages[-1].content"])
def test_a_text_that_comes_again_at_the_end_is_refused(again: str) -> None:
    last = f"{{%- if messages[0].role == 'system' %}}{{{{- '<|system|>' + {again} }}}}{{%- endif %}}"
    tokenizer = byte_bpe(template=with_note(last="{%- if not add_generation_prompt %}" + last + "{%- endif %}"))
    assert texts(found(tokenizer, TWO)) == ["Hello!<|end|>", "y<|end|>"]
    if again.startswith("messages[0]"):
        with pytest.raises(RowError, match="another role"):
            found(tokenizer, [{"role": "system", "content": "s"}, *TWO])
    where = "{%- if messages[0].role == 'system' and not add_generation_prompt %}"
    with pytest.raises(RowError, match="more behind the text"):
        found(
            byte_bpe(template=with_note(last=where + NOTE + "{%- endif %}")), [{"role": "system", "content": "s"}, *TWO]
        )
    tokenizer = byte_bpe(
        template=with_note(last=f"{{{{- '<|system|>' + {again} if not add_generation_prompt else '' }}}}")
    )
    with pytest.raises(RowError, match=r"message 3 \(assistant\)"):
        found(tokenizer, TWO)


def test_a_name_in_the_header_is_not_trained_on() -> None:
    name = "{{- ' ' + m.name if m.name else '' }}"
    template = PLAIN.replace("m.role + '\\n' + m.content", f"m.role }}}}{name}{{{{- ' ' + m.content")
    template = template.replace("assistant\\n", "assistant")
    assert texts(found(byte_bpe(template=template), TWO)) == [" Hello!<|im_end|>\n", " y<|im_end|>\n"]
    with pytest.raises(RowError, match=r"message 1 \(assistant\): .* its name"):
        found(byte_bpe(template=template), [TWO[0], bot("Hello!", name="Bob"), *TWO[2:]])
    assert texts(found(byte_bpe(template=PLAIN), [TWO[0], bot("Hello!", name="Bob")])) == ["Hello!<|im_end|>\n"]


def test_a_turn_that_cannot_be_found_is_refused() -> None:
    """Its end is a line break, in a template that renders the beginning of a chat in another way than the chat."""
    with pytest.raises(RowError, match=r"message 1 \(assistant\): the chat template rewrites earlier turns") as e:
        found(byte_bpe(template=CLOSING_EOS), TWO)
    assert "--chat-template" in str(e.value)
    with pytest.raises(RowError, match=r"message 1 \(assistant\)"):
        found(byte_bpe(template=COUNTING), TWO)


def test_the_end_of_a_chat_whose_turns_end_with_the_next_header_is_added() -> None:
    turns = found(byte_bpe(template=LATE_EOS), TWO)
    assert turns.text == "user: Hi</s>assistant: Hello!</s>user: x</s>assistant: y</s>"
    assert found(byte_bpe(template=LATE_EOS), TWO[:3]).text == "user: Hi</s>assistant: Hello!</s>user: x"
    glm = byte_bpe(template=template_of("glm4moe"))
    assert TurnFinder(glm).end_ids({}) == [glm.convert_tokens_to_ids("<|user|>")]


@pytest.mark.parametrize("template", [CHATML, CHATML_MARKED])
def test_turns_that_are_not_trained_on(template: str) -> None:
    messages = [user("a"), bot("b", train=False), user("c"), bot("d"), bot("e", train=False)]
    assert texts(found(byte_bpe(template=template), messages)) == ["d<|im_end|>\n"]


def test_markers_around_parts_of_turns() -> None:
    """gemma4's have several spans a turn; they belong to the message whose turn they are in."""
    tokenizer = byte_bpe(template=(TEMPLATES / "diffusion_gemma_training.jinja").read_text(encoding="utf-8"))
    (ask, call, answer, last), tools = CHATS["tool"]
    assert "".join(texts(found(tokenizer, [ask, call, answer, last], tools))).endswith("<tool_call|>It is 22.<turn|>\n")
    assert texts(found(tokenizer, [ask, {**call, "train": False}, answer, last], tools)) == ["It is 22.", "<turn|>\n"]


def test_markers_that_leave_out_the_end_of_the_turn() -> None:
    marked = "{%- generation %}{{- m.content }}{%- endgeneration %}"
    inner = PLAIN.replace("'\\n' + m.content + '<|im_end|>\\n' }}", f"'\\n' }}}}{marked}{{{{- '<|im_end|>\\n' }}}}")
    turns = found(byte_bpe(template=inner), TWO)
    assert (texts(turns), turns.closed) == (["Hi", "Hello!", "x", "y"], False)
    assert found(byte_bpe(template=CHATML_MARKED), TWO).closed
    assert not found(
        byte_bpe(template="{%- for m in messages %}{{- m.role + ': ' + m.content + ' ' }}{%- endfor %}"), TWO
    ).closed


def test_markers_out_of_order_are_refused() -> None:
    nested = "{%- generation %}{{- 'a' }}{%- generation %}{{- 'b' }}{%- endgeneration %}{{- 'c' }}{%- endgeneration %}"
    with pytest.raises(RowError, match=r"out of order"):
        found(byte_bpe(template=nested + PLAIN), TWO)


FULL = ["gemma3", "gptoss", "llama3", "qwen3", "qwen3_5_think"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("tiny") / "model", tiny_llama(440, context=4096))


@pytest.mark.parametrize("name", FULL)
def test_from_a_chat_to_labels(tiny: Path, tmp_path: Path, name: str) -> None:
    """score and materialize at rate 1: of each turn its end keeps its label, and no other role's text has one."""
    tokenizer = byte_bpe(bos=True, eos="<|return|>" if name == "gptoss" else "</s>", template=template_of(name))
    tokenizer.add_tokens(list(TurnFinder(tokenizer).format_of({"tools": [WEATHER]}).end_tokens))  # not as special
    model = shutil.copytree(tiny, tmp_path / "model")
    tokenizer.save_pretrained(model)
    chats = [CHATS["thoughts apart"], CHATS["thoughts in text"]]
    chats += [CHATS["tools twice"]] if name != "gemma3" else []  # which knows no tools
    rows = [{"messages": messages, **({"tools": tools} if tools else {})} for messages, tools in reversed(chats)]
    source = write_rows(tmp_path / "rows.jsonl", rows)
    scored, masked = tmp_path / "scored", tmp_path / "masked"
    run_score(source, model, scored)
    materialize(
        MaterializeConfig(scored=(str(scored),), out=str(masked), epochs=1, rates=(1.0,), quantile=1.0, shuffle="none")
    )
    (epoch,) = sorted((masked / "epoch_000").glob("*.parquet"))
    ends = TurnFinder(tokenizer).end_ids({})
    for (messages, _), before, after in zip(reversed(chats), rows_of(scored), rows_from(epoch), strict=True):
        labels = np.array(after["labels"])
        kept = np.flatnonzero(labels != -100)
        turns = sum(m["role"] == "assistant" for m in messages)
        assert len([t for t in kept if labels[t] in ends]) >= turns
        assert all(before["loss_mask"][t] for t in kept)
        spoken = tokenizer.decode([i for i, on in zip(before["input_ids"], before["loss_mask"], strict=True) if on])
        assert not re.search("2\\+2|Paris\\?|again\\?|user", spoken)


def rows_from(path: Path) -> list[dict[str, Any]]:
    import pyarrow.parquet as pq

    return list(pq.read_table(path).to_pylist())


SAID = "{{- m.content + ' ' }}"
LINES = (
    "{%- for m in messages %}{%- if m.role == 'assistant' %}{{- 'w5 ' }}@B@"
    + SAID
    + "@E@{%- else %}{{- 'w4 ' }}"
    + SAID
    + "{%- endif %}{%- endfor %}{%- if add_generation_prompt %}{{- 'w5 ' }}{%- endif %}"
)
LINES_MARKED = LINES.replace("@B@", "{%- generation %}").replace("@E@", "{%- endgeneration %}")
LINES_PLAIN = LINES.replace("@B@", "").replace("@E@", "")
WORDS = [user("w7"), bot("w8"), user("w9 w10 w11"), bot("w12")]


@pytest.mark.parametrize("template", [LINES_MARKED, LINES_PLAIN], ids=["marked", "plain"])
@pytest.mark.parametrize(
    ("messages", "wanted"),
    [
        (WORDS, [8, 12]),
        ([*WORDS, user("w13")], [8, 12]),
        ([user("w7"), bot("w8 w9"), bot("w10"), user("w11")], [8, 9, 10]),
    ],
)
def test_a_span_whose_last_character_no_token_covers(template: str, messages: list[Any], wanted: list[int]) -> None:
    """Tokens are words, without the blanks between them: transformers' mask runs on to the end of the row there."""
    tokenizer = word_tokenizer(20)
    tokenizer.chat_template = template
    encoder = Encoder(tokenizer, RowFormat("messages", ("messages",)), append_eos=True, chat_template_kwargs=None)
    (encoded,) = encoder.encode([{"messages": messages}])
    assert isinstance(encoded, Encoded), encoded
    assert encoded.input_ids[encoded.loss_mask].tolist() == wanted
    assert encoded.notes == {"unclosed_turns"}


def test_a_marked_span_that_is_the_first_token_is_nothing_to_train_on() -> None:
    tokenizer = word_tokenizer(20)
    tokenizer.chat_template = LINES_MARKED.replace("{{- 'w5 ' }}", "")
    encoder = Encoder(tokenizer, RowFormat("messages", ("messages",)), append_eos=True, chat_template_kwargs=None)
    (why,) = encoder.encode([{"messages": [bot("w8"), user("w9")]}])
    assert isinstance(why, str)
    assert "no assistant turn to train on" in why
