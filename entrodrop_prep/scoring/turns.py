"""Where the assistant's turns are in a rendered chat: character spans, by rendering, for templates without markers.

A turn begins where the generation prompt ends, which is what the model is given when it has to write that turn; where
the template's turn lacks that text, it begins at the end of its header. It ends with the token that closes it. How a
template writes headers and closings is read once from probe chats (``TurnFormat``), never from a row's own text. Most
turns are then found between the texts of the other roles, all of which one more rendering locates (``_outline``), so
that the work grows with the length of the chat. Where that does not decide, prefixes of the chat are rendered; and
where a template renders a prefix in another way than the whole chat (it drops the thoughts of earlier turns, say), a
message whose text is replaced changes the rendered chat just there.
"""

from __future__ import annotations

import json
import re
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from entrodrop_prep.errors import RowError
from entrodrop_prep.scoring.chat import Span, has_markers, marked, render
from entrodrop_prep.scoring.messages import THOUGHTS, Chat, Message
from entrodrop_prep.scoring.turn_format import FormatReader, TurnFormat, in_parts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

USE_MARKERS = "give --chat-template FILE with {% generation %} markers (TRL ships such templates for common models)"
_THOUGHTS_END = re.compile(r"</[|｜]?think\w*[|｜]?>")
_FORMATS = 256  # kept at a time; rows may bring variables of their own
_TAIL = 2000
"""Characters at the end of a chat in which something behind the last turn's text is looked for."""
_FILLERS = "QXZJKVW" + string.ascii_letters + string.digits + "☃☎♞"


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
        self._tokenizer, self._reader = tokenizer, FormatReader(tokenizer)
        self._formats: dict[str, TurnFormat] = {}

    def format_of(self, variables: Mapping[str, Any]) -> TurnFormat:
        """The format under these template variables, from probe chats. Raises RowError where none can be rendered."""
        tools = variables.get("tools") is not None
        key = json.dumps({**variables, "tools": tools}, sort_keys=True, default=repr)
        if key not in self._formats:
            if len(self._formats) >= _FORMATS:
                self._formats.clear()
            self._formats[key] = self._reader.read(variables)
        return self._formats[key]

    def end_ids(self, variables: Mapping[str, Any]) -> list[int]:
        """Ids of the tokens that end an assistant turn, ascending; none where the template cannot be probed.

        Ends that the tokenizer splits into several tokens have no id of their own and are not among them.
        """
        known = self._tokenizer.get_vocab()
        found: set[int] = set()
        offers: tuple[list[Any] | None, ...] = (None, [])
        for tools in offers:
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
        search = _Search(self._tokenizer, self._reader, form, messages, chat.variables)
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
        return [in_parts(message) for message in chat.messages]


class _Search:
    """The search for the turns of one chat."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        reader: FormatReader,
        form: TurnFormat,
        messages: Sequence[Message],
        variables: Mapping[str, Any],
    ) -> None:
        """Raises RowError for a chat that cannot be rendered."""
        self._tokenizer, self._reader, self._form = tokenizer, reader, form
        self._messages, self._variables = messages, variables
        self.text = render(tokenizer, messages, variables)
        self._filled: str | None = None
        self._others = self._outline()
        self._regions: dict[int, Span | None] = dict(self._others)

    def start(self, i: int, before: int) -> int:
        """Where turn ``i`` starts, ``before`` being the end of the assistant's turn before it. Raises RowError."""
        form, text = self._form, self.text
        if i - 1 in self._others:
            asked = self._others[i - 1][1]
            for gap in form.gaps:
                if text.startswith(gap + form.header, asked):
                    return asked + len(gap) + len(self._opened_by(asked + len(gap)))
        given = self._rendered(i, prompt=True) if i else None
        if given is not None and text.startswith(given):
            if form.prompt and given.endswith(form.prompt):
                return len(given)
            blanks = len(text[len(given) :]) - len(text[len(given) :].lstrip())
            for begin in (len(given), len(given) + blanks):
                if form.header.strip() and text.startswith(form.header, begin):
                    return begin + len(form.header)
            if form.prompt:  # another prompt than usual, or no header: DeepSeek behind a tool's answer
                own = self._region(i)
                if own is None or self._reader.words(text[len(given) : own[0]]).strip():
                    raise RowError("the chat template writes something between this turn and what is before it")
                return len(given)
            if text.startswith(form.header, len(given)):
                return len(given) + len(form.header)
            raise RowError("the chat template has no generation prompt to separate the turn's header from the turn")
        if not form.header:
            behind = self._asked_behind(i)
            if behind.strip() and text.startswith(behind, self._others[i - 1][1]):
                return self._others[i - 1][1] + len(behind)
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
        start = before + found[0] - len(form.header)
        opened = self._opened_by(start)
        return start + len(opened if start + len(opened) <= own[0] else form.header)

    def _asked_behind(self, i: int) -> str:
        """What follows the text before turn ``i`` where that turn is asked for; "" where that cannot be told."""
        fill = next((c for c in _FILLERS if c not in self.text), "") * 6
        if i - 1 not in self._others or not fill:
            return ""
        filled = {**self._messages[i - 1], "content": fill}
        messages = [*self._messages[: i - 1], in_parts(filled) if self._form.parts else filled]
        try:
            _, found, behind = render(self._tokenizer, messages, self._variables, prompt=True).rpartition(fill)
        except RowError:
            return ""
        return behind if found else ""

    def _opened_by(self, at: int) -> str:
        """What opens a turn whose header is at ``at``: the whole generation prompt where it is there."""
        form = self._form
        return form.prompt if form.prompt and self.text.startswith(form.prompt, at) else form.header

    def end(self, i: int, start: int) -> int:
        """Where turn ``i``, which starts at ``start``, ends. Raises RowError."""
        form, text = self._form, self.text
        if i + 1 == len(self._messages):
            if not text.endswith(form.dangling):
                raise RowError("the chat template writes something else behind the last turn than behind a probe's")
            return len(text) - len(form.dangling)
        stop = self._before(i + 1, start)
        if stop is not None and (found := self._last_end(start, stop)) is not None:
            return found
        turn = self._rendered(i + 1)
        if turn is not None and form.dangling:
            turn = turn.removesuffix(form.dangling)
        if turn is not None and len(turn) >= start and text.startswith(turn):
            end = len(turn)
            bare = turn[start:].rstrip() if form.end_tokens else turn[start:]
            if form.appended or not bare.endswith(form.end_tokens or form.closing):
                closings = (form.closing, *form.end_tokens)
                end += next((len(closing) for closing in closings if closing and text.startswith(closing, end)), 0)
            return end
        later = (self._region(n) for n in range(i + 1, len(self._messages)))
        following = next((region for region in later if region is not None and region[0] >= start), None)
        if following is None:
            raise RowError("the chat template rewrites earlier turns, and the end of this one is not found")
        end_at = self._last_end(start, following[0]) if not form.opening else None
        if end_at is None:
            raise RowError("the chat template rewrites earlier turns, and no token ends this one")
        return end_at

    def _before(self, i: int, start: int) -> int | None:
        """Where the turn before message ``i``, which starts at ``start``, ends at the latest; None where unknown."""
        stop, opening = self._others[i][0] if i in self._others else None, self._form.opening
        if stop is None:
            return None
        if not opening:  # a system message may be written before the user's text
            return min([stop, *(begin for begin, _ in self._others.values() if begin >= start)])
        is_it = self._messages[i]["role"] == "user" and self.text.endswith(opening, start, stop)
        return stop - len(opening) if is_it else None

    def _last_end(self, start: int, stop: int) -> int | None:
        """The position behind the last token between two that ends a turn, and behind the white space it brings."""
        form, text = self._form, self.text
        at, token = max(((text.rfind(t, start, stop), t) for t in form.end_tokens), default=(-1, ""))
        if at < 0:
            return None
        end = at + len(token)
        trailing = form.closing[form.closing.rfind(token) + len(token) :] if token in form.closing else ""
        return end + len(trailing) if trailing and text.startswith(trailing, end) else end

    def check(self, i: int, before: int, start: int, end: int) -> None:
        """Raises RowError for a span that overlaps another, or does not hold what the chat shows of the message."""
        if not before <= start <= end:
            raise RowError("the chat template rewrites earlier turns, and this one is not found for certain")
        content = _THOUGHTS_END.split(text_of(self._messages[i]))[-1].strip()
        if content and content not in self.text[start:end]:
            own = self._region(i)
            if own is not None and own[0] < own[1] and not start <= own[1] <= end:
                raise RowError("the chat template puts its text outside of the turn")
        if "name" in self._messages[i] and self.text[start:end] not in self._unnamed:
            raise RowError("the chat template writes its name into the turn")
        last = i + 1 == len(self._messages)
        if last and self._filled is not None and not self._filled.endswith(self.text[start:]):
            raise RowError("the chat template writes a text of another role into the last turn")
        if (
            not last
            or not content
            or self._messages[i].get("tool_calls")
            or self._reader.words(self._form.closing).strip()
        ):
            return
        _, found, behind = self._reader.words(self.text[max(start, end - _TAIL) : end]).rpartition(content[-100:])
        if found and behind.strip():
            raise RowError("the chat template writes more behind the text of the last turn than behind a probe's")

    @cached_property
    def _unnamed(self) -> str:
        """The chat without names, which are part of headers."""
        messages = [{key: value for key, value in m.items() if key != "name"} for m in self._messages]
        try:
            return render(self._tokenizer, messages, self._variables)
        except RowError:
            return self.text

    def _outline(self) -> dict[int, Span]:
        """Where the texts of other roles than the assistant's are, by number of message; empty where not for certain.

        All of them are replaced at once. What is rendered then shows what comes before, between and after them, and
        the chat must be just that with their own texts.
        """
        text, fill = self.text, next((c for c in _FILLERS if c not in self.text), None)
        others = [i for i, m in enumerate(self._messages) if m["role"] != "assistant" and text_of(m).strip()]
        if fill is None or not others:
            return {}
        messages = list(self._messages)
        for i in others:
            filled = {**messages[i], "content": f"{fill}{i}{fill}"}
            messages[i] = in_parts(filled) if self._form.parts else filled
        try:
            self._filled = render(self._tokenizer, messages, self._variables)
        except RowError:
            return {}
        pieces = re.split(f"{fill}(\\d+){fill}", self._filled)
        at, found = len(pieces[0]), {}
        if not text.startswith(pieces[0]):
            return {}
        for number, behind in zip(map(int, pieces[1::2]), pieces[2::2], strict=True):
            content = text_of(self._messages[number])
            for own in (content, content.strip(), json.dumps(content, ensure_ascii=False)[1:-1]):
                if text.startswith(own + behind, at):
                    break
            else:
                return {}
            if number in found:
                return {}
            found[number] = (at, at + len(own))
            at += len(own) + len(behind)
        return found if at == len(text) else {}

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
        filled = _filled(self._messages[i])
        if filled is None:
            return None
        messages = [*self._messages[:i], filled, *self._messages[i + 1 :]]
        try:
            other = render(self._tokenizer, messages, self._variables)
        except RowError:
            return None
        if other == self.text:
            return None
        first = _common(self.text, other)
        last = len(self.text) - _common(self.text[first:][::-1], other[first:][::-1])
        return first, max(first, last)


def text_of(message: Message) -> str:
    """A message's content as one text, "" where it has none."""
    content = message.get("content")
    if isinstance(content, (list, tuple)):
        return "".join(str(part.get("text", "")) for part in content if isinstance(part, Mapping))
    return content if isinstance(content, str) else ""


def _filled(message: Message) -> Message | None:
    """The message with its texts replaced by one that shares no character with them; None where that cannot be."""
    parts = isinstance(message.get("content"), (list, tuple))
    texts = [key for key in THOUGHTS if isinstance(message.get(key), str) and message[key].strip()]
    if text_of(message).strip():
        texts.append("content")
    there = json.dumps(message, ensure_ascii=False, default=str)
    fill = next((c for c in _FILLERS if c not in there), "") * 6
    if not fill:
        return None
    calls = message.get("tool_calls")
    if not texts and calls:
        filled = _with_strings(calls, fill, "arguments")
        filled = filled if filled != calls else _with_strings(calls, fill, "name")
        return {**message, "tool_calls": filled} if filled != calls else None
    new: Message = {**message, **dict.fromkeys(texts or ["content"], fill)}
    return in_parts(new) if parts else new


def _with_strings(value: Any, fill: str, below: str, inside: bool = False) -> Any:
    """Tool calls with the strings below one key replaced."""
    if isinstance(value, Mapping):
        return {key: _with_strings(item, fill, below, inside or key == below) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_with_strings(item, fill, below, inside) for item in value]
    return fill if inside and isinstance(value, str) else value


def _common(a: str, b: str) -> int:
    """The length of the longest common beginning of two texts."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
