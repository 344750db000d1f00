"""Where the assistant's turns are in a rendered chat: character spans, by rendering, for templates without markers.

A turn begins where the generation prompt ends, which is what the model is given when it has to write that turn; where
the template's turn lacks that text, it begins at the end of its header. It ends with the token that closes it. How a
template writes headers and closings is read once from probe chats (``TurnFormat``), never from a row's own text. Most
turns of a chat are then found by rendering prefixes of it. Where a template renders a prefix in another way than the
whole chat (it drops the thoughts of earlier turns, say), the turn is found between the texts of its neighbours: a
message whose text is replaced changes the rendered chat just there.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from entrodrop_prep.errors import RowError
from entrodrop_prep.scoring.chat import Span, has_markers, marked, render
from entrodrop_prep.scoring.messages import THOUGHTS, Chat, Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

USE_MARKERS = "give --chat-template FILE with {% generation %} markers (TRL ships such templates for common models)"
_ASKED = ("Uqzva", "Vwjkb")
_FILL = ("XqzvaX", "YwjkbY")  # without a first or last character in common
_OPENED = re.compile(r"<[|｜]?think\w*[|｜]?>\s*$")
_TOOL = {
    "type": "function",
    "function": {
        "name": "probe",
        "description": "A probe.",
        "parameters": {"type": "object", "properties": {"x": {"type": "string", "description": "Anything."}}},
    },
}


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
        dangling: a header that the template writes behind a final assistant turn although none was asked for; else "".
        parts: whether the template leaves out texts that are strings, and renders them as a list of parts.
    """

    prompt: str
    header: str
    closing: str
    end_tokens: tuple[str, ...]
    appended: str
    dangling: str
    parts: bool


@dataclass(frozen=True)
class Turns:
    """What of a rendered chat may be trained on.

    Attributes:
        text: the chat as text, with what ends its last turn.
        spans: half-open character spans in ``text``, ascending, of the assistant's turns that are trained on.
        closed: whether the last span ends with a token that ends a turn.
    """

    text: str
    spans: list[Span]
    closed: bool


class TurnFinder:
    """Finds the assistant's turns in chats that one tokenizer's template renders."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._formats: dict[str, TurnFormat] = {}
        added = sorted(tokenizer.get_added_vocab(), key=len, reverse=True)
        markup = (r"<[|｜]?[^<>\s|｜]{1,40}[|｜]?>", r"\[/?[A-Z_]{2,40}\]")
        self._atoms = re.compile("|".join([*map(re.escape, added), *markup, "."]), re.DOTALL)

    def format_of(self, variables: Mapping[str, Any]) -> TurnFormat:
        """The format under these template variables, from probe chats. Raises RowError where none can be rendered."""
        tools = variables.get("tools") is not None
        plain = {key: value for key, value in variables.items() if key != "tools"}
        key = f"{tools} {json.dumps(plain, sort_keys=True, default=repr)}"
        if key not in self._formats:
            self._formats[key] = self._probe({**plain, "tools": [_TOOL] if tools else None})
        return self._formats[key]

    def end_ids(self, variables: Mapping[str, Any]) -> list[int]:
        """Ids of the tokens that end an assistant turn, ascending; none where the template cannot be probed.

        Ends that the tokenizer splits into several tokens have no id of their own and are not among them.
        """
        known = self._tokenizer.get_vocab()
        found: set[int] = set()
        for tools in (None, [_TOOL]):
            try:
                form = self.format_of({**variables, "tools": tools})
            except RowError:
                continue
            found.update(known[token] for token in form.end_tokens if token in known)
        return sorted(found)

    def appended(self, variables: Mapping[str, Any]) -> str:
        """What is put behind a chat that ends with an assistant's turn, "" for templates that end it themselves."""
        try:
            return "" if has_markers(self._tokenizer, None) else self.format_of({**variables, "tools": None}).appended
        except RowError:
            return ""

    def find(self, chat: Chat) -> Turns:
        """The turns of a chat that are trained on: by the template's markers where it has them, else by rendering.

        Raises:
            RowError: a turn cannot be found for certain; it names the message.
        """
        if not has_markers(self._tokenizer, chat.variables["tools"]):
            text, found = self._turns(chat)
            spans = [turn for turn, trained in zip(found, chat.trained, strict=True) if turn and trained]
        else:
            text, spans = marked(self._tokenizer, self._shown(chat), chat.variables)
            if any(
                m["role"] == "assistant" and not trained for m, trained in zip(chat.messages, chat.trained, strict=True)
            ):
                spans = self._of_trained(chat, spans)
        return Turns(text, spans, not spans or self._closed(chat, text[slice(*spans[-1])]))

    def _closed(self, chat: Chat, turn: str) -> bool:
        try:
            ends = self.format_of(chat.variables).end_tokens
        except RowError:
            ends = ()
        eos = self._tokenizer.eos_token
        return turn.rstrip().endswith((*ends, *([eos] if isinstance(eos, str) and eos else [])))

    def _of_trained(self, chat: Chat, spans: Sequence[Span]) -> list[Span]:
        """Those of a template's marked spans that belong to messages which are trained on."""
        _, turns = self._turns(chat)
        kept = []
        for start, end in spans:
            shared = [min(end, turn[1]) - max(start, turn[0]) if turn else -1 for turn in turns]
            best = max(range(len(turns)), key=shared.__getitem__)
            if shared[best] < 0:
                raise RowError("the chat template marks text that belongs to no assistant message")
            if chat.trained[best]:
                kept.append((start, end))
        return kept

    def _turns(self, chat: Chat) -> tuple[str, list[Span | None]]:
        """The chat as text, and for each message its span in it, None for other roles than the assistant."""
        form, messages = self.format_of(chat.variables), self._shown(chat)
        search = _Search(self._tokenizer, form, messages, chat.variables)
        spans: list[Span | None] = [None] * len(messages)
        before = 0
        for i, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            try:
                start = search.start(i, before)
                end = search.end(i, start)
                search.check(i, before, start, end)
            except RowError as e:
                raise RowError(f"message {i} (assistant): {e}", fix=USE_MARKERS) from e
            spans[i], before = (start, end), end
        text, last = search.text, spans[-1]
        if last is not None and form.appended:
            text, spans[-1] = text[: last[1]] + form.appended, (last[0], last[1] + len(form.appended))
        return text, spans

    def _shown(self, chat: Chat) -> list[Message]:
        """The messages as this template reads them: texts as a list of parts where it wants that."""
        if not self.format_of(chat.variables).parts:
            return chat.messages
        return [_in_parts(message) for message in chat.messages]

    def _probe(self, variables: Mapping[str, Any]) -> TurnFormat:
        """Read the format from chats of one and two turns."""
        ask, again = {"role": "user", "content": _ASKED[0]}, {"role": "user", "content": _ASKED[1]}
        reply, other = {"role": "assistant", "content": _FILL[0]}, {"role": "assistant", "content": _FILL[1]}
        problem = RowError("the chat template leaves the assistant's text out")
        for parts in (False, True):

            def rendered(*messages: Message, prompt: bool = False, parts: bool = parts) -> str | None:
                shown = [_in_parts(message) for message in messages] if parts else messages
                try:
                    return render(self._tokenizer, shown, variables, prompt=prompt)
                except RowError:
                    return None

            final = rendered(ask, reply)
            if final is not None and _FILL[0] in final:
                break
        else:
            render(self._tokenizer, [ask, reply], variables)  # with its error, if it has one
            raise problem
        asked = rendered(ask) or ""
        prompted, middle = rendered(ask, prompt=True) or asked, rendered(ask, reply, again, other) or ""
        behind = final[final.index(_FILL[0]) + len(_FILL[0]) :]
        between = _between(middle, _FILL[0], _ASKED[1])
        prompt = prompted[len(self._common([asked, prompted])) :]
        openings = [
            text[len(self._common([asked, text])) : text.index(_FILL[0])]
            for text in (final, middle)
            if _FILL[0] in text
        ]
        header = self._common([prompt, *openings] if prompt.strip() else openings)
        dangling = ""
        if not prompt.strip():
            left = self._opening(behind, between) if between else ""
            if left.strip() and asked.endswith(left) and middle.count(left) > 1:
                prompt = header = dangling = left  # written whether it is asked for or not
            else:
                prompt, header = "", header if header.strip() else ""
        elif header != prompt:
            header = _OPENED.sub("", header)
        if dangling == "" and prompt and prompt in behind:
            dangling = behind[behind.index(prompt) :]
        behind = behind.removesuffix(dangling)
        closing = self._common([behind, between]) if between else behind
        ends, appended = self._tokens(closing)[-1:], ""
        if between and not ends:
            # The end differs in the middle of a chat (gpt-oss), or the header of the next turn is the end (GLM-4).
            found = next(iter(self._tokens(between)), "")
            if found and not between[: between.index(found)].strip():
                closing, ends = between[: between.index(found)] + found, [found]
                appended = "" if self._tokens(behind) else closing
        ends += [token for token in self._tokens(behind)[-1:] if token not in ends]
        ends += [token for token in self._call_ends(rendered, bool(appended)) if token not in ends]
        return TurnFormat(prompt, header, closing, tuple(ends), appended, dangling, parts)

    def _call_ends(self, rendered: Callable[..., str | None], by_the_next: bool) -> list[str]:
        """The token that ends a turn which calls a tool, where the usual ones do not.

        by_the_next: whether turns end with the next one's header.
        """
        ask = {"role": "user", "content": _ASKED[0]}
        answer = {"role": "tool", "name": "probe", "tool_call_id": "abcdefghi", "content": _ASKED[1]}
        for arguments in ({"x": _FILL[0]}, json.dumps({"x": _FILL[0]})):
            call = {"id": "abcdefghi", "type": "function", "function": {"name": "probe", "arguments": arguments}}
            calls = {"role": "assistant", "content": "", "tool_calls": [call]}
            called = rendered(ask, calls) or ""
            whole = rendered(ask, calls, answer, {"role": "assistant", "content": _FILL[1]}) or ""
            if _FILL[0] in called and _ASKED[1] in whole and whole.startswith(called):
                break
        else:
            return []
        if by_the_next:
            return self._tokens(whole[len(called) : whole.index(_ASKED[1])])[:1]
        tokens = self._tokens(called[called.rindex(_FILL[0]) :])
        return tokens[-1:] if tokens and called.rstrip().endswith(tokens[-1]) else []

    def _opening(self, behind: str, between: str) -> str:
        """What begins another turn in the text behind a final one, where it is not what begins the user's."""
        shared = self._atoms.findall(self._common([behind, between]))
        if len(self._tokens("".join(shared))) > 1 and len(shared[-1]) > 1:
            shared.pop()  # a token that begins both headers
        return behind[len("".join(shared)) :]

    def _common(self, texts: Iterable[str]) -> str:
        """The longest common beginning of texts, in whole tokens."""
        split = [self._atoms.findall(text) for text in texts]
        count = 0
        while all(len(atoms) > count and atoms[count] == split[0][count] for atoms in split):
            count += 1
        return "".join(split[0][:count])

    def _tokens(self, text: str) -> list[str]:
        return [atom for atom in self._atoms.findall(text) if len(atom) > 1]


class _Search:
    """The search for the turns of one chat."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        form: TurnFormat,
        messages: Sequence[Message],
        variables: Mapping[str, Any],
    ) -> None:
        """Raises RowError for a chat that cannot be rendered."""
        self._tokenizer, self._form, self._messages, self._variables = tokenizer, form, messages, variables
        self.text = render(tokenizer, messages, variables)
        self._regions: dict[int, Span | None] = {}

    def start(self, i: int, before: int) -> int:
        """Where turn ``i`` starts, ``before`` being the end of the assistant's turn before it. Raises RowError."""
        form, text = self._form, self.text
        given = self._rendered(i, prompt=True) if i else None
        if given is not None and text.startswith(given):
            if form.prompt and given.endswith(form.prompt):
                return len(given)
            plain = self._rendered(i)
            if plain is not None and form.prompt and len(plain) < len(given) and given.startswith(plain):
                return len(given)  # another generation prompt than usual
            if text.startswith(form.header, len(given)):
                return len(given) + len(form.header)
            if form.prompt:
                return len(given)  # DeepSeek has no header after a tool's answer
            raise RowError("the chat template has no generation prompt to tell the turn's header from the turn")
        if not form.header:
            raise RowError("the chat template rewrites earlier turns, and has no header to find this one by")
        plain = self._rendered(i) if i else None
        if plain is not None and text.startswith(plain) and text.startswith(form.header, len(plain)):
            return len(plain) + len(form.header)
        own = self._region(i)
        if own is None:
            raise RowError("the chat template rewrites earlier turns, and this one has no text to find it by")
        if i and (neighbour := self._region(i - 1)) is not None and neighbour[1] <= own[0]:
            before = max(before, neighbour[1])
        found = [m.end() for m in re.finditer(re.escape(form.header), text[before : own[0]])]
        if len(found) != 1:
            raise RowError("the chat template rewrites earlier turns, and the header of this one is not found")
        start = before + found[0]
        full = start - len(form.header) + len(form.prompt)
        return (
            full if form.prompt and full <= own[0] and text.startswith(form.prompt, start - len(form.header)) else start
        )

    def end(self, i: int, start: int) -> int:
        """Where turn ``i``, which starts at ``start``, ends. Raises RowError."""
        form, text = self._form, self.text
        if i + 1 == len(self._messages):
            return len(text.removesuffix(form.dangling)) if form.dangling else len(text)
        turn = self._rendered(i + 1)
        if turn is not None and form.dangling:
            turn = turn.removesuffix(form.dangling)
        if turn is not None and len(turn) >= start and text.startswith(turn):
            end = len(turn)
            if not any(turn[start:].rstrip().endswith(token) for token in form.end_tokens):
                end += next((len(token) for token in form.end_tokens if text.startswith(token, end)), 0)
            return end
        later = (self._region(n) for n in range(i + 1, len(self._messages)))
        following = next((region for region in later if region is not None and region[0] >= start), None)
        if following is None:
            raise RowError("the chat template rewrites earlier turns, and the end of this one is not found")
        at, token = max(((text.rfind(t, start, following[0]), t) for t in form.end_tokens), default=(-1, ""))
        if at < 0:
            raise RowError("the chat template rewrites earlier turns, and no token ends this one")
        end = at + len(token)
        trailing = form.closing[form.closing.rfind(token) + len(token) :] if token in form.closing else ""
        return end + len(trailing) if trailing and text.startswith(trailing, end) else end

    def check(self, i: int, before: int, start: int, end: int) -> None:
        """Raises RowError for a span that overlaps another, or does not hold what the chat shows of the message."""
        if not before <= start <= end:
            raise RowError("the chat template rewrites earlier turns, and this one is not found for certain")
        content = text_of(self._messages[i]).strip()
        if content and content not in self.text[start:end]:
            own = self._region(i)
            if own is not None and own[0] < own[1] and not start <= own[1] <= end:
                raise RowError("the chat template puts its text outside of the turn")

    def _rendered(self, count: int, *, prompt: bool = False) -> str | None:
        """The first ``count`` messages as text; None where the template refuses them."""
        try:
            return render(self._tokenizer, self._messages[:count], self._variables, prompt=prompt)
        except RowError:
            return None

    def _region(self, i: int) -> Span | None:
        """The part of the chat that changes with the strings of message ``i``; None where that cannot be told."""
        if i not in self._regions:
            self._regions[i] = self._changed(i)
        return self._regions[i]

    def _changed(self, i: int) -> Span | None:
        text, first, last = self.text, len(self.text), 0
        for fill in _FILL:
            filled = _filled(self._messages[i], fill)
            if filled is None:
                return None
            try:
                other = render(
                    self._tokenizer, [*self._messages[:i], filled, *self._messages[i + 1 :]], self._variables
                )
            except RowError:
                return None
            if other == text:
                return None
            begin = len(_common(text, other))
            first = min(first, begin)
            last = max(last, len(text) - len(_common(text[begin:][::-1], other[begin:][::-1])))
        return first, max(first, last)


def text_of(message: Message) -> str:
    """A message's content as one text, "" where it has none."""
    content = message.get("content")
    if isinstance(content, (list, tuple)):
        return "".join(str(part.get("text", "")) for part in content if isinstance(part, Mapping))
    return content if isinstance(content, str) else ""


def _in_parts(message: Message) -> Message:
    content = message.get("content")
    return {**message, "content": [{"type": "text", "text": content}]} if isinstance(content, str) else message


def _filled(message: Message, fill: str) -> Message | None:
    """The message with its texts replaced; None where it has none that can be."""
    parts = isinstance(message.get("content"), (list, tuple))
    texts = [key for key in THOUGHTS if isinstance(message.get(key), str) and message[key].strip()]
    if text_of(message).strip():
        texts.append("content")
    calls = message.get("tool_calls")
    if not texts and calls:
        filled = _with_strings(calls, fill, "arguments")
        filled = filled if filled != calls else _with_strings(calls, fill, "name")
        return {**message, "tool_calls": filled} if filled != calls else None
    new: Message = {**message, **dict.fromkeys(texts or ["content"], fill)}
    return _in_parts(new) if parts else new


def _with_strings(value: Any, fill: str, below: str, inside: bool = False) -> Any:
    """Tool calls with the strings below one key replaced."""
    if isinstance(value, Mapping):
        return {key: _with_strings(item, fill, below, inside or key == below) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_with_strings(item, fill, below, inside) for item in value]
    return fill if inside and isinstance(value, str) else value


def _between(text: str, first: str, second: str) -> str:
    """What is between two texts in another one, "" where they are not both in it in this order."""
    _, found, behind = text.partition(first)
    between, other, _ = behind.partition(second)
    return between if found and other else ""


def _common(a: str, b: str) -> str:
    """The longest common beginning of two texts."""
    n = next((n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    return a[:n]
