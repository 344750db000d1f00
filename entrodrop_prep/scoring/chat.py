"""Chats: rows to rendered text, and which of its characters the assistant wrote.

A template with ``{% generation %}`` markers says so itself, and transformers' own assistant mask is used. Without
markers transformers returns a mask of zeros and no error; then the spans are found by rendering prefixes. The span of
assistant turn i runs from the end of A = render(messages[:i], add_generation_prompt=True), which is what the model is
given when it has to write that turn, to the end of B = render(messages[:i + 1]), which has the turn and its end token.
Both must be prefixes of the whole chat's text. Where they are not, the template rewrites earlier turns, or its
generation prompt holds text that the turn does not (an empty think block): then no span is right, and the row is
refused. Rendering A without the generation prompt would succeed more often and be wrong: the model would be trained to
write its own header.
"""

from __future__ import annotations

import json
import logging
import re
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from entrodrop_prep.errors import ModelError, RowError
from entrodrop_prep.scoring.messages import Message

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

Span = tuple[int, int]

USE_MARKERS = "give --chat-template FILE with {% generation %} markers (TRL ships such templates for common models)"
_MARKER = re.compile(r"\{%-?\s*generation\s*-?%\}")  # the spelling that transformers and TRL look for


def has_markers(tokenizer: PreTrainedTokenizerBase, tools: list[dict[str, Any]] | None) -> bool:
    """Whether the template for a row with these tools has generation markers. Raises ModelError without a template."""
    if not tokenizer.chat_template:
        raise ModelError(
            "the tokenizer has no chat template", fix="give --chat-template FILE, or --chat-template chatml"
        )
    return _MARKER.search(tokenizer.get_chat_template(None, tools)) is not None


def warn_of_clock(tokenizer: PreTrainedTokenizerBase) -> None:
    """Say so if the template asks for the date, which would make the ids depend on the day they are made."""
    if "strftime_now" in json.dumps(tokenizer.chat_template or ""):
        log.warning(
            "the chat template can write today's date into a chat, so that rows made on another day differ; fix it "
            'with the variable the template reads, e.g. --chat-template-kwargs \'{"date_string": "26 Jul 2024"}\''
        )


def render(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    variables: Mapping[str, Any],
    *,
    prompt: bool = False,
) -> str:
    """The chat as text, and the generation prompt if ``prompt``. Raises RowError with what the template objects to."""
    from jinja2 import TemplateError

    apply: Any = tokenizer.apply_chat_template
    try:
        text = apply(
            list(messages),
            tokenize=False,
            add_generation_prompt=prompt,
            **variables,
        )
    except (TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError) as e:
        raise RowError(f"the chat template cannot render it: {type(e).__name__}: {e}") from e
    return encodable(str(text), "the rendered chat")


def encodable(text: str, what: str) -> str:
    """``text``, if it is Unicode that can be encoded. Raises RowError for lone surrogates (half a ``\\ud83d``)."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as e:
        raise RowError(f"{what} holds a lone surrogate at character {e.start}") from e
    return text


def marked(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], variables: Mapping[str, Any]
) -> tuple[list[int], list[int]]:
    """ids and assistant mask (0 or 1 an id) by the template's own markers, as transformers and TRL compute them."""
    if not tokenizer.is_fast:
        raise ModelError(
            "assistant masks need a fast tokenizer, and this one is written in Python", fix="give another --tokenizer"
        )
    render(tokenizer, messages, variables)  # its errors are the row's; those of the call below would be bugs
    apply: Any = tokenizer.apply_chat_template
    out = apply(
        list(messages),
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
        tokenizer_kwargs={"verbose": False},
        **variables,
    )
    return out["input_ids"], out["assistant_masks"]


def assistant_spans(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], variables: Mapping[str, Any]
) -> tuple[str, list[Span]]:
    """The whole chat as text, and the half-open character span of each assistant turn in it, by rendering prefixes.

    Raises RowError, naming the turn, where prefixes do not tell.
    """
    text = render(tokenizer, messages, variables)
    spans: list[Span] = []
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        name = f"message {i} (assistant)"
        try:
            start = _start(tokenizer, messages[:i], message, variables, text)
            end = len(text) if i + 1 == len(messages) else _end(tokenizer, messages[: i + 1], variables, text, start)
        except RowError as e:
            raise RowError(f"{name}: {e}", fix=USE_MARKERS) from e
        if start < (spans[-1][1] if spans else 0) or end < start:
            raise RowError(f"{name}: the chat template rewrites earlier turns", fix=USE_MARKERS)
        spans.append((start, end))
    return text, spans


def _start(
    tokenizer: PreTrainedTokenizerBase,
    before: Sequence[Message],
    message: Message,
    variables: Mapping[str, Any],
    text: str,
) -> int:
    if not before:
        return _first_start(tokenizer, variables, text)
    given = render(tokenizer, before, variables, prompt=True)
    if text.startswith(given):
        content = message.get("content")
        plain = content.strip() if isinstance(content, str) else ""
        if plain and text[len(given) :].lstrip().startswith(plain):
            return len(given)
        # The turn does not open with its content. It may be a tool call or a thought, or a header that the template
        # writes although add_generation_prompt brought nothing.
        if given != render(tokenizer, before, variables):
            return len(given)
        raise RowError("the chat template has no generation prompt to tell the turn's header from the turn")
    if text.startswith(render(tokenizer, before, variables)):
        raise RowError("the chat template's generation prompt holds text that the turn does not begin with")
    raise RowError("the chat template rewrites earlier turns")


def _first_start(tokenizer: PreTrainedTokenizerBase, variables: Mapping[str, Any], text: str) -> int:
    """Where the turn starts in a chat that an assistant opens: no prefix to render, so the header is looked for.

    The header is the generation prompt that follows a user's message. It must occur once in a chat of one short
    assistant message, and the chat at hand must begin with the same text up to and with it.
    """
    user, assistant = {"role": "user", "content": "x"}, {"role": "assistant", "content": "x"}
    plain = render(tokenizer, [user], variables)
    given = render(tokenizer, [user], variables, prompt=True)
    probe = render(tokenizer, [assistant], variables)
    header = given.removeprefix(plain)
    if given.startswith(plain) and header and probe.count(header) == 1:
        opening = probe[: probe.index(header) + len(header)]
        if text.startswith(opening):
            return len(opening)
    raise RowError("the chat begins with the assistant, and the chat template does not show where that turn starts")


def _end(
    tokenizer: PreTrainedTokenizerBase, upto: Sequence[Message], variables: Mapping[str, Any], text: str, start: int
) -> int:
    turn = render(tokenizer, upto, variables)
    if text.startswith(turn):
        return len(turn)
    # Some templates (Phi-3) close the conversation, not the turn, with one more EOS. The turn proper is what comes
    # before it, if it has an end token of its own; else the EOS is the turn's end, and rewritten when more follows.
    eos = tokenizer.eos_token
    if isinstance(eos, str) and eos and turn.endswith(eos) and text.startswith(turn.removesuffix(eos)):
        proper = turn.removesuffix(eos)
        if proper[start:].rstrip().endswith(tuple(tokenizer.get_added_vocab())):
            return len(proper)
    raise RowError("the chat template rewrites earlier turns")


def mask_of(
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    ids: Sequence[int],
    offsets: Sequence[Span] | None,
    spans: Sequence[Span],
) -> npt.NDArray[np.bool_]:
    """The token mask [T] bool of character ``spans``: a token is in it that holds at least one of a span's characters.

    That is transformers' rule for markers. ``offsets`` [T] are each token's characters, None for a Python tokenizer.
    Raises RowError where neither they nor the ids of the text up to a span's edge tell which token is at it.
    """
    import numpy as np

    mask = np.zeros(len(ids), np.bool_)
    for start, end in spans:
        if start < end:
            first = _token_at(tokenizer, text, ids, offsets, start, closing=False)
            mask[first : _token_at(tokenizer, text, ids, offsets, end, closing=True)] = True
    return mask


def _token_at(
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    ids: Sequence[int],
    offsets: Sequence[Span] | None,
    edge: int,
    *,
    closing: bool,
) -> int:
    """The first token with a character at or after ``edge``; ``closing``: the first with none before it."""
    if edge == len(text):
        return len(ids)
    t = bisect_right(offsets, edge, key=lambda span: span[1]) if offsets is not None else len(ids)
    if offsets is not None and t < len(ids):
        begins, before = offsets[t][0], offsets[t - 1][1] if t else 0
        if not closing and begins <= edge:
            return t
        if closing and begins < edge:
            return t + 1
        if closing and before == edge:
            return t
    # Some tokenizers leave blanks out of the offsets, so that those at the edge may be of either token: the ids tell.
    out: Any = tokenizer(text[:edge], add_special_tokens=False, verbose=False)
    prefix: list[int] = out["input_ids"]
    if list(ids[: len(prefix)]) == prefix:
        return len(prefix)
    raise RowError(f"no token begins at character {edge} of the rendered chat, where an assistant turn does or ends")
