"""Turns in chats that chat templates made at random render: each is the template's own, or the chat is refused.

A twin of each template writes a mark before and behind every assistant turn, so that its turns are known. Contents hold
headers and ends of turns, blanks, and each other.
"""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from entrodrop_prep.errors import RowError
from entrodrop_prep.scoring.chat import Span
from entrodrop_prep.scoring.messages import Chat, with_calls
from entrodrop_prep.scoring.tool_calls import PROBE_TOOL
from entrodrop_prep.scoring.turns import TurnFinder
from helpers.tokenizers import byte_bpe

BEGIN, END = "\ue000", "\ue001"
EOS = "</s>"
STYLES: dict[str, tuple[Callable[[str], str], dict[str, str]]] = {
    "im": (lambda role: f"<|im_start|>{role}\n", dict.fromkeys("uast", "<|im_end|>\n")),
    "llama": (lambda role: f"<|start_header_id|>{role}<|end_header_id|>\n\n", dict.fromkeys("uast", "<|eot_id|>")),
    "pipe": (lambda role: f"<|{role}|>\n", dict.fromkeys("uast", "<|end|>\n")),
    "pipe, eos": (lambda role: f"<|{role}|>", {"u": "\n", "a": EOS, "s": "\n", "t": "\n"}),
    "words": (lambda role: f"{role.upper()}: ", {"u": "\n", "a": EOS + "\n", "s": "\n\n", "t": "\n"}),
    "instruction": (lambda role: f"### {role}:\n", {"u": "\n\n", "a": "\n\n" + EOS, "s": "\n\n", "t": "\n\n"}),
    "bare": (lambda role: "" if role == "system" else f"<｜{role}｜>", {"u": "", "a": "<｜end｜>", "s": "", "t": ""}),
}
THOUGHTS = {"", "<think>", "<think>\n\n</think>"}
"""What a turn may begin with that is not trained on."""
PLAIN = (
    *("Hi", "no", "A", "user", "assistant", "x", "", "  ", " lead", "trail \n", "1", "Why is it so?", "Be nice."),
    *("<think>\nadd\n</think>\n\nIs 4.", "Is 4.", "é☃", '"q"', "{{ x }}", "a\nb", EOS, "<|im_end|>"),
)


def says(text: str) -> str:
    return "{{- " + json.dumps(text, ensure_ascii=False) + " -}}"


def when(condition: str, text: str) -> str:
    return "{%- if " + condition + " -%}" + text + "{%- endif -%}"


class Template:
    """A template with its features; its text writes ``begins`` and ``ends`` around turns, undefined but for a twin."""

    def __init__(self, chance: random.Random) -> None:
        one = chance.choice
        self.style = one(sorted(STYLES))
        self.header, self.end = STYLES[self.style]
        self.bot = one(["assistant", "assistant", "model", "Assistant"])
        self.prompt = one(["header", "header", "header", "none", "thinks", "has thought", "after others"])
        self.note = one([*[None] * 4, "first", "before user", "after turn", "last", "last, unasked"])
        self.last = one([*[None] * 4, "no end", "no blank", "eos", "another end"])
        self.thought = one([None, None, "dropped", "dropped early", "empty last", "empty"])
        self.system = one(["own", "own", "merged", "default"])
        self.always = self.prompt == "none" and self.note is None and chance.random() < 0.3
        self.trim, self.between = one(["", " | trim"]), one(["", "", "\n", " "])
        self.call = one([("<tool_call>\n", "\n</tool_call>"), ("<tool_call>", ""), ("[TOOL_CALLS]", "")])
        self.answer = one([("tool", "", ""), ("user", "<tool_response>\n", "\n</tool_response>")])
        self.text = self._text()

    def _text(self) -> str:
        header, end, prompt = self.header, self.end, self.header(self.bot)
        note = says(header("system") + "Be nice." + end["s"])
        text = note if self.note == "first" else ""
        text += "{%- set ns = namespace(system='') -%}"
        if self.system == "merged":
            text += "{%- for m in messages if m.role == 'system' -%}{%- set ns.system = m.content -%}{%- endfor -%}"
        if self.system == "default":
            text += when("messages[0].role != 'system'", says(header("system") + "You help." + end["s"]))
        text += "{%- for m in messages -%}" + when("not loop.first", says(self.between))
        shown = says(header("system")) + "{{- m.content -}}" + says(end["s"])
        text += when("m.role == 'system'", "" if self.system == "merged" else shown)
        merged = "{{- ns.system -}}{%- set ns.system = '' -%}" if self.system == "merged" else ""
        user = note if self.note == "before user" else ""
        user += says(header("user")) + merged + "{{- m.content" + self.trim + " -}}" + says(end["u"])
        text += when("m.role == 'user'", user)
        role, before, behind = self.answer
        answer = says(header(role) + before) + "{{- m.content -}}" + says(behind + end[role[0]])
        text += when("m.role == 'tool'", answer)
        text += when("m.role == 'assistant'", says(prompt) + self._turn() + (note if self.note == "after turn" else ""))
        text += "{%- endfor -%}"
        if self.last == "eos":
            text += when("not add_generation_prompt", says(EOS))
        text += note if self.note == "last" else ""
        text += when("not add_generation_prompt", note) if self.note == "last, unasked" else ""
        asks = prompt + {"thinks": "<think>\n", "has thought": "<think>\n\n</think>\n\n"}.get(self.prompt, "")
        if self.always or self.prompt != "none":
            asked = "add_generation_prompt" + " and messages[-1].role != 'assistant'" * (self.prompt == "after others")
            text += when("true" if self.always else asked, says(asks))
        return text

    def _turn(self) -> str:
        content, end = "m.content", self.end["a"]
        empty = says("<think>\n\n</think>\n\n")
        if self.thought in ("dropped", "dropped early"):
            content = "m.content.split('</think>')[-1]"
        if self.thought == "dropped early":
            content = f"(m.content if loop.last else {content})"
        text = "{{- begins -}}" + (when("loop.last", empty) if self.thought == "empty last" else "")
        text += (empty if self.thought == "empty" else "") + "{{- (" + content + ")" + self.trim + " -}}"
        call = says(self.call[0]) + "{{- c.function | tojson -}}" + says(self.call[1])
        text += when("m.tool_calls", "{%- for c in m.tool_calls -%}" + call + "{%- endfor -%}")
        if self.last == "no end":
            text += when("not loop.last or add_generation_prompt", says(end))
        elif self.last == "no blank":
            text += says(end.rstrip()) + "{{- ends -}}" + when("not loop.last", says(end[len(end.rstrip()) :]))
        elif self.last == "another end":
            text += when("loop.last", says("<|return|>")) + when("not loop.last", says(end))
        else:
            text += says(end)
        return text + "{{- ends -}}"

    def chat(self, chance: random.Random) -> list[dict[str, Any]]:
        """A chat for it."""
        header, end = self.header, self.end["a"]
        own = [header(self.bot), header("user"), end, header(self.bot) + "no", self.end["u"] + header(self.bot)]

        def said(role: str) -> dict[str, Any]:
            text = chance.choice(own if chance.random() < 0.15 else PLAIN)
            if role == "assistant" and self.last == "no end" and text.strip().endswith(end.strip()):
                text = "yes"  # whose end it is nothing shows
            return {"role": role, "content": text + (chance.choice(own[:2]) if chance.random() < 0.1 else "")}

        messages = [said("system")] if chance.random() < 0.4 else []
        for _ in range(chance.randint(1, 4)):
            roles = ["user"] + ["user"] * (chance.random() < 0.05) + ["assistant"] * (1 + (chance.random() < 0.08))
            roles += ["tool", "assistant"] * (chance.random() < 0.2)
            messages += map(said, roles)
            if "tool" in roles:
                calls = [{"type": "function", "function": {"name": "f", "arguments": {"x": chance.choice(own)}}}]
                messages[-3] |= {"content": chance.choice(PLAIN), "tool_calls": calls * chance.randint(1, 2)}
        return messages[:-1] if len(messages) > 3 and chance.random() < 0.1 else messages


def turns_of(template: str, messages: list[dict[str, Any]], tools: Any, tokenizer: Any) -> tuple[str, list[Span]]:
    """The chat as text, and its assistant's turns."""
    given: Any = {**tokenizer.special_tokens_map, "tools": tools, "begins": BEGIN, "ends": END}
    result: Any = render_jinja_template([messages], chat_template=template, **given)
    text, spans, start = "", [], None
    for piece in re.split(f"([{BEGIN}{END}])", result[0][0]):
        if piece == BEGIN:
            start = len(text)
        elif piece == END and start is not None:
            spans.append((start, len(text)))
            start = None
        elif piece not in (BEGIN, END):
            text += piece
    return text, spans


def wrong(template: Template, text: str, wanted: list[Span], found: str, spans: list[Span]) -> str:
    """What is wrong with the spans that were found in the text ``found``; "" where nothing is."""
    if len(spans) != len(wanted):
        return "another number of turns"
    ends = {template.end["a"].strip(), EOS, "<|return|>"}
    for (start, stop), (first, last) in zip(spans, wanted, strict=True):
        if text[start:first].strip() or text[first:start].strip() not in THOUGHTS:
            return "starts elsewhere"
        more, less = found[last:stop].strip(), text[stop:last].strip()
        if more and (more not in ends or last != wanted[-1][1]):
            return "ends too late"
        if less and (template.last != "another end" or less != "<|return|>"):
            return "ends too early"
    return ""


def check(seed: int, templates: int) -> Counter[str]:
    """Read turns of so many templates, some chats each; how many were read and refused."""
    chance, counts = random.Random(seed), Counter[str]()
    for _ in range(templates):
        template = Template(chance)
        tokenizer = byte_bpe(template=template.text)
        finder = TurnFinder(tokenizer)
        for _ in range(10):
            messages = template.chat(chance)
            trained = [m["role"] == "assistant" for m in messages]
            if not any(trained):
                continue
            tools = [PROBE_TOOL] if any("tool_calls" in m for m in messages) else None
            form = finder.format_of({"tools": tools})
            chat = with_calls(Chat([dict(m) for m in messages], trained, {"tools": tools}), form.calls)
            text, wanted = turns_of(template.text, chat.messages, tools, tokenizer)
            try:
                turns = finder.find(chat)
            except RowError:
                counts["refused"] += 1
                continue
            counts["found"] += 1
            problem = wrong(template, text, wanted, turns.text, turns.spans)
            assert not problem, f"{problem}: {messages} {turns.text!r} {turns.spans} {wanted} {vars(template)}"
    return counts


def test_turns_of_random_templates() -> None:
    counts = check(0, 60)
    assert counts["found"] > 6 * counts["refused"]


@pytest.mark.heavy
@pytest.mark.parametrize("seed", range(1, 9))
def test_turns_of_many_random_templates(seed: int) -> None:
    check(seed, 1000)
