"""Which texts of a chat a template does not print: they are in no rendering, so no model sees them."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

from entrodrop_prep.scoring.messages import THOUGHTS, Chat, Message

_THINK = re.compile(r"</?[|｜]?think\w*[|｜]?>|\[/?THINK\]")


class _Rendering:
    """A rendered chat in which texts are looked for, whatever its line breaks and its escapes."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._words: str | None = None

    def count(self, wanted: str) -> int:
        """How often ``wanted`` is in it, as it is, else as JSON writes it, else with any white space for any other."""
        wanted = wanted.strip()
        found = self._text.count(wanted) or self._text.count(json.dumps(wanted, ensure_ascii=False)[1:-1])
        if found:
            return found
        if self._words is None:
            self._words = " ".join(self._text.split())
        return self._words.count(" ".join(wanted.split()))

    def __contains__(self, wanted: str) -> bool:
        return not wanted.strip() or self.count(wanted) > 0


def left_out(chat: Chat, text: str) -> set[str]:
    """What of a chat is not in ``text``, its rendering, as keys of ``notes.NOTES``."""
    rendering, notes = _Rendering(text), set()
    last_asked = max((i for i, m in enumerate(chat.messages) if m["role"] == "user"), default=-1)
    for i, message in enumerate(chat.messages):
        if message["role"] != "assistant":
            continue
        answer, thoughts = _answer(message, rendering)
        called = list(_called(message))
        missing = {piece for piece in (*answer, *thoughts, *called) if piece not in rendering}
        if missing.intersection(answer):
            notes.add("left_out:assistant")
        if missing.intersection(thoughts):
            notes.add("left_out_thoughts" if i > last_asked else "left_out_earlier_thoughts")
        if missing.intersection(called):
            notes.add("left_out_calls")
    notes |= {f"left_out:{role}" for role in _unprinted(chat, rendering)}
    if any(name not in rendering for name in _offered(chat)):
        notes.add("left_out_tools")
    return notes


def _unprinted(chat: Chat, rendering: _Rendering) -> Iterator[str]:
    """Roles other than the assistant's with a text that is printed less often than it is in the chat."""
    texts = [(m["role"], _text(m).strip()) for m in chat.messages]
    wanted = Counter(text for _, text in texts if text)
    short = {text for text, times in wanted.items() if rendering.count(text) < times}
    yield from sorted({role[:40] for role, text in texts if role != "assistant" and text in short})


def _answer(message: Message, rendering: _Rendering) -> tuple[list[str], list[str]]:
    """Pieces of an assistant's message: of what it says, and of its thoughts."""
    content = _text(message)
    thoughts = [message[key] for key in THOUGHTS if message.get(key, "").strip()]
    if not content.strip():
        return [], thoughts
    if content in rendering:
        return [content], thoughts
    *thinking, said = _THINK.split(content)
    return [said] if said.strip() else [], [*thoughts, *(t for t in thinking if t.strip())]


def _called(message: Message) -> Iterator[str]:
    """Names of tool calls, and the strings among their arguments."""
    for call in message.get("tool_calls") or ():
        function: dict[str, Any] = call.get("function", call)
        yield function["name"]
        arguments = function.get("arguments")
        if isinstance(arguments, str):
            arguments = json.loads(arguments)
        yield from (value for value in (arguments or {}).values() if isinstance(value, str) and value.strip())


def _offered(chat: Chat) -> Iterator[str]:
    """Names of the tools that the row offers."""
    for tool in chat.variables.get("tools") or ():
        function = tool.get("function", tool)
        name = function.get("name") if isinstance(function, dict) else None
        if isinstance(name, str):
            yield name


def _text(message: Message) -> str:
    content = message.get("content")
    return content if isinstance(content, str) else ""
