"""How a chat template writes assistant turns: read once a template from probe chats, never from a row's own text."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from entrodrop_prep.errors import RowError
from entrodrop_prep.scoring.chat import render
from entrodrop_prep.scoring.messages import CallForm, Chat, Message, with_calls
from entrodrop_prep.scoring.tool_calls import PROBE_TOOL, call_form

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_ASKED = ("Uqzva", "Vwjkb")
_REPLIES = ("XqzvaX", "YwjkbY")
_LEADS: tuple[tuple[Message, ...], ...] = ((), ({"role": "system", "content": "x"},))
"""What probe chats begin with: some templates refuse a chat without a system message."""
_OPENED = re.compile(r"<[|｜]?think\w*[|｜]?>\s*$")
"""A thought that a generation prompt opens: no part of the header of a turn that does not hold the whole prompt."""
_THOUGHT = re.compile(r"(<[|｜]?think\w*[|｜]?>\s*(</[|｜]?think\w*[|｜]?>\s*)?)?$")
"""One that a turn begins with, or opens."""
_MARKUP = (r"<[|｜]?[^<>\s|｜]{1,40}[|｜]?>", r"\[/?[A-Z_]{2,40}\]")
"""What is taken for a token of the template where the tokenizer has none of that name: <end>, [/INST]."""


@dataclass(frozen=True)
class TurnFormat:
    """How a chat template writes assistant turns, under one set of template variables.

    Attributes:
        prompt: the generation prompt, "" where the template has none.
        header: what opens every assistant turn: the part of ``prompt`` that all turns begin with; without a prompt,
            the text before the assistant's own.
        closing: what closes a turn that another one follows, whitespace behind it included; "" where nothing does.
        end_tokens: tokens that end a turn, the most usual first.
        appended: what a chat that ends with an assistant turn lacks at its end, where the header of the next turn is
            what ends one (GLM-4: ``<|user|>``); else "".
        dangling: what the template writes behind a final assistant turn and is no part of it, a header that nobody
            asked for or a reminder; else "".
        opening: what comes between a closed turn and the user's next text, where that holds the end of another role's
            turn (a reminder); else "".
        gaps: texts between the end of another role's text and the header, as seen behind a user and behind a tool.
        calls: the form in which it takes tool calls.
        parts: whether the template leaves out texts that are strings, and renders them as a list of parts.
    """

    prompt: str
    header: str
    closing: str
    end_tokens: tuple[str, ...]
    appended: str
    dangling: str
    opening: str
    gaps: tuple[str, ...]
    calls: CallForm
    parts: bool


class FormatReader:
    """Reads the ``TurnFormat`` of one tokenizer's chat template."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        added = sorted(tokenizer.get_added_vocab(), key=len, reverse=True)
        self._atoms = re.compile("|".join([*map(re.escape, added), *_MARKUP, "."]), re.DOTALL)

    def read(self, variables: Mapping[str, Any]) -> TurnFormat:
        """The format of assistant turns, read from chats of one and two turns.

        Args:
            variables: what the template gets beside the messages; of ``tools`` only whether there are any counts.

        Raises:
            RowError: the template renders no plain chat, or leaves the assistant's text out of it.
        """
        tools = variables.get("tools") is not None
        variables = {**variables, "tools": [PROBE_TOOL] if tools else None}
        ask, again = {"role": "user", "content": _ASKED[0]}, {"role": "user", "content": _ASKED[1]}
        reply, other = {"role": "assistant", "content": _REPLIES[0]}, {"role": "assistant", "content": _REPLIES[1]}
        problem = RowError("the chat template leaves the assistant's text out")
        for lead, parts in itertools.product(_LEADS, (False, True)):

            def rendered(
                *messages: Message, prompt: bool = False, lead: Sequence[Message] = lead, parts: bool = parts
            ) -> str | None:
                messages = (*lead, *messages)
                shown = [in_parts(message) for message in messages] if parts else messages
                try:
                    return render(self._tokenizer, shown, variables, prompt=prompt)
                except RowError:
                    return None

            final = rendered(ask, reply)
            if final is not None and _REPLIES[0] in final:
                break
        else:
            render(self._tokenizer, [ask, reply], variables)  # with its error, if it has one
            raise problem
        asked = rendered(ask) or ""
        prompted, middle = rendered(ask, prompt=True) or asked, rendered(ask, reply, again, other) or ""
        behind = final[final.index(_REPLIES[0]) + len(_REPLIES[0]) :]
        between = _between(middle, _REPLIES[0], _ASKED[1])
        prompt, header, dangling = self._header(asked, prompted, final, middle)
        behind = behind.removesuffix(dangling)
        closing = self._closing(self._common([behind, between]) if between else behind)
        if self.words(behind.removeprefix(closing)).strip():
            closing = self._without_opening(closing, final.partition(_ASKED[0])[0])
        ends, appended = self._tokens(closing)[-1:], ""
        more = behind.removeprefix(closing)
        if self.words(more).strip():
            own = self._own_end(more, asked, between)
            behind, dangling = closing + own, more.removeprefix(own) + dangling
        if between and not ends:
            # The end differs in the middle of a chat (gpt-oss), or the header of the next turn is the end (GLM-4).
            found = next(iter(self._tokens(between)), "")
            if found and not between[: between.index(found)].strip():
                closing, ends = between[: between.index(found)] + found, [found]
                appended = "" if self._tokens(behind) or dangling else closing
        ends += [token for token in self._tokens(behind)[-1:] if token not in ends]
        common = {key: value for key, value in variables.items() if key != "tools"}
        calls = call_form(self._tokenizer, common, tools=tools, lead=lead)
        called, whole = self._with_a_call(rendered, calls)
        called = called.removesuffix(dangling)
        ends += [token for token in self._call_ends(called, whole, not self._tokens(behind)) if token not in ends]
        between_roles = [final.partition(_ASKED[0])[2], middle.partition(_ASKED[1])[2], whole.partition(_ASKED[1])[2]]
        gaps = dict.fromkeys(_gap(text, header) for text in between_roles if header and header in text)
        opening = between.removeprefix(closing) if closing else ""
        opening = opening if any(token in opening for token in ends) else ""
        return TurnFormat(prompt, header, closing, tuple(ends), appended, dangling, opening, tuple(gaps), calls, parts)

    def _header(self, asked: str, prompted: str, final: str, middle: str) -> tuple[str, str, str]:
        """``prompt``, ``header`` and, of ``dangling``, the header that nobody asked for.

        Args:
            asked: the chat of one question.
            prompted: the same with a generation prompt.
            final: with the reply.
            middle: with another question and reply behind that.
        """
        asks_for = prompt = prompted[self._asked(asked, prompted) :]
        openings = [
            text[self._asked(asked, text) : text.index(_REPLIES[0])] for text in (final, middle) if _REPLIES[0] in text
        ]
        header = self._common([prompt, *openings] if prompt.strip() else openings)
        dangling = self._unasked(asked, final, middle, prompt, header)
        if dangling:
            return (
                (dangling + prompt, dangling + header, dangling) if prompt.strip() else (dangling, dangling, dangling)
            )
        if not prompt.strip():
            prompt, header = "", header if header.strip() else ""
        elif header != prompt:
            header, whole = _OPENED.sub("", header), self._common(openings)
            others = (prompt.removeprefix(header), whole.removeprefix(header))
            if not header.strip() or any(self.words(other).strip() for other in others):
                prompt, header = "", whole if whole.strip() else ""  # turns have another header than the prompt
        behind = final.partition(_REPLIES[0])[2]
        if asks_for.strip() and asks_for in behind:
            dangling = behind[behind.index(asks_for) :]
        return prompt, header, dangling

    def _unasked(self, asked: str, final: str, middle: str, prompt: str, header: str) -> str:
        """What opens a turn, or the first part of it, and is written whether it is asked for or not; else ""."""
        between = _between(middle, _REPLIES[0], _ASKED[1])
        unasked = self._opening(final.partition(_REPLIES[0])[2], between) if between else ""
        left = self._common([asked, unasked], at_end=True)
        if not left.strip() or middle.count(left) < 2:
            return ""
        before, goes_on = _THOUGHT.sub("", final.partition(_REPLIES[0])[0]), final.startswith(asked)
        if prompt.strip():
            is_it = before.removesuffix(header).endswith(left) and goes_on and left != asked.partition(_ASKED[0])[2]
        else:
            is_it = before.endswith(left) or (left == unasked and goes_on)
        return left if is_it else ""

    @staticmethod
    def _with_a_call(rendered: Callable[..., str | None], form: CallForm) -> tuple[str, str]:
        """A chat that ends with a tool call, and the same one with the tool's answer and a reply; "" where refused."""
        call = {"id": "abcdefghi", "type": "function", "function": {"name": "probe", "arguments": {"x": _REPLIES[0]}}}
        messages: list[Message] = [
            {"role": "user", "content": _ASKED[0]},
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "name": "probe", "tool_call_id": "abcdefghi", "content": _ASKED[1]},
            {"role": "assistant", "content": _REPLIES[1]},
        ]
        messages = with_calls(Chat(messages, [False] * len(messages)), form).messages
        return rendered(*messages[:2]) or "", rendered(*messages) or ""

    def _call_ends(self, called: str, whole: str, by_the_next: bool) -> list[str]:
        """The token that ends a turn which calls a tool, where the usual ones do not.

        by_the_next: whether turns end with the next one's header.
        """
        if _REPLIES[0] not in called or _ASKED[1] not in whole or not whole.startswith(called):
            return []
        if by_the_next:
            return self._tokens(whole[len(called) : whole.index(_ASKED[1])])[:1]
        tokens = self._tokens(called[called.rindex(_REPLIES[0]) :])
        return tokens[-1:] if tokens and called.rstrip().endswith(tokens[-1]) else []

    def _asked(self, asked: str, text: str) -> int:
        """How far a text is the chat that asks, without a token that begins a reminder there and a turn here."""
        shared = self._common([asked, text])
        *others, last = self._tokens(shared.partition(_ASKED[0])[2]) or [""]
        if others and shared.endswith(last) and self.words(asked[len(shared) :]).strip():
            return len(shared) - len(last)
        return len(shared)

    def _opening(self, behind: str, between: str) -> str:
        """What begins another turn in the text behind a final one, where it is not what begins the user's."""
        shared = self._atoms.findall(self._common([behind, between]))
        if len("".join(shared)) < len(behind) and len(self._tokens("".join(shared))) > 1 and len(shared[-1]) > 1:
            shared.pop()  # a token that begins both headers
        return behind[len("".join(shared)) :]

    def _own_end(self, behind: str, *others: str) -> str:
        """The token of a final turn in the text behind it; what follows is a reminder, which ``others`` have, too."""
        first = next(iter(self._tokens(behind)), "")
        end = behind[: behind.index(first) + len(first)]
        other = self.words(end).strip() or any(behind in text for text in others)
        return end if not other and any(behind.removeprefix(end) in text for text in others) else ""

    def _closing(self, closing: str) -> str:
        """``closing`` without the words of another role behind its first token."""
        tokens = self._tokens(closing)
        end = closing.index(tokens[0]) + len(tokens[0]) if tokens else len(closing)
        end += len(closing[end:]) - len(closing[end:].lstrip())
        return closing[:end] if self.words(closing[end:]).strip() else closing

    def _without_opening(self, closing: str, header: str) -> str:
        """``closing`` without its last token, if that begins a turn: it is in a user's ``header``."""
        *others, last = self._tokens(closing) or [""]
        return closing[: closing.rindex(last)] if others and last in self._tokens(header) else closing

    def words(self, text: str) -> str:
        """A text with a blank in the place of each token."""
        return "".join(atom if len(atom) == 1 else " " for atom in self._atoms.findall(text))

    def _common(self, texts: Iterable[str], *, at_end: bool = False) -> str:
        """The longest common beginning, or end, of texts, in whole tokens."""
        step = -1 if at_end else 1
        split = [self._atoms.findall(text)[::step] for text in texts]
        count = 0
        while all(len(atoms) > count and atoms[count] == split[0][count] for atoms in split):
            count += 1
        return "".join(split[0][:count][::step])

    def _tokens(self, text: str) -> list[str]:
        return [atom for atom in self._atoms.findall(text) if len(atom) > 1]


def in_parts(message: Message) -> Message:
    """The message with its text as a list of one part, as templates of some vision models read it."""
    content = message.get("content")
    return {**message, "content": [{"type": "text", "text": content}]} if isinstance(content, str) else message


def _gap(text: str, header: str) -> str:
    """What is before a turn's header in the text behind another role's; a header of blanks is next to the reply."""
    if header.strip():
        return text.partition(header)[0]
    return min((text.partition(reply)[0] for reply in _REPLIES), key=len).rpartition(header)[0]


def _between(text: str, first: str, second: str) -> str:
    """What is between two texts in another one, "" where they are not both in it in this order."""
    _, found, behind = text.partition(first)
    between, other, _ = behind.partition(second)
    return between if found and other else ""
