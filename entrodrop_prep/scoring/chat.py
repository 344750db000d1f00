"""Chats as a template renders them, and which tokens hold which of their characters.

A template with ``{% generation %}`` markers says itself which characters the assistant wrote. Which tokens these are is
decided here, by the offsets, not by transformers' assistant mask: where no token covers the last character of a span
that mask runs on to the end of the row. For templates without markers see ``turns``.
"""

from __future__ import annotations

import json
import logging
import re
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from entrodrop_prep.errors import ModelError, RowError
from entrodrop_prep.scoring.messages import Message
from entrodrop_prep.scoring.time_limit import within

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

Span = tuple[int, int]

_MARKER = re.compile(r"\{%-?\s*generation\s*-?%\}")  # the spelling that transformers and TRL look for


RENDER_SECONDS = 10.0
"""For one chat, which takes milliseconds."""


LARGEST = 1_000_000
"""Number that a template may have: text or a list is as easily repeated so many times."""


class SlowTemplate(ModelError):
    """A template does not come to an end. No RowError: who tries one way after another must not try on."""


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
    """The chat as text, and the generation prompt if ``prompt``.

    Raises:
        RowError: what the template objects to.
        SlowTemplate: it takes longer than ``RENDER_SECONDS``.
    """
    from jinja2 import TemplateError

    template = tokenizer.chat_template
    for text in template.values() if isinstance(template, dict) else [template or ""]:
        if does := _takes_forever(text):
            raise RowError(f"the chat template {does}, which may take forever")
    apply: Any = tokenizer.apply_chat_template
    try:
        text = within(
            RENDER_SECONDS,
            lambda: apply(list(messages), tokenize=False, add_generation_prompt=prompt, **variables),
        )
    except TimeoutError as e:
        raise SlowTemplate(
            f"the chat template takes longer than {RENDER_SECONDS:g} s to render one chat",
            fix="give another one with --chat-template FILE",
        ) from e
    except (TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as e:
        raise RowError(f"the chat template cannot render it: {type(e).__name__}: {e}") from e
    except (RecursionError, MemoryError) as e:
        raise RowError(f"the chat template cannot render it: {type(e).__name__}") from e
    return encodable(str(text), "the rendered chat")


@lru_cache(maxsize=16)
def _takes_forever(template: str) -> str | None:
    """What a template does in one step of Python, which nothing interrupts: powers, or as much as a large number says.

    ``f(**names)`` is no power.
    """
    from jinja2 import Environment, TemplateSyntaxError

    before = ""
    try:
        for _, kind, value in Environment().lex(template):
            if kind == "operator" and value == "**" and before not in ("(", ","):
                return "raises a number to a power"
            if kind == "integer" and (len(value) > 40 or int(value, 0) > LARGEST):
                return f"has a number over {LARGEST:,}"
            before = before if kind == "whitespace" else value
    except TemplateSyntaxError:
        pass  # rendering says what is wrong
    return None


def encodable(text: str, what: str) -> str:
    """``text``, if it is Unicode that can be encoded. Raises RowError for lone surrogates (half a ``\\ud83d``)."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as e:
        raise RowError(f"{what} holds a lone surrogate at character {e.start}") from e
    return text


def marked(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], variables: Mapping[str, Any]
) -> tuple[str, list[Span]]:
    """The chat as text, and the character spans that the template's own markers enclose.

    Raises RowError for what the template objects to, and for spans that are not in order.
    """
    from transformers.utils.chat_template_utils import render_jinja_template

    text = render(tokenizer, messages, variables)  # its errors are the row's; those of the call below would be bugs
    template = tokenizer.get_chat_template(None, variables.get("tools"))
    given: Any = {**tokenizer.special_tokens_map, **variables}
    result: Any = render_jinja_template(
        [[dict(message) for message in messages]], chat_template=template, return_assistant_tokens_mask=True, **given
    )
    rendered, spans = result
    before = 0
    for start, end in spans[0]:
        if not before <= start <= end <= len(rendered[0]):
            raise RowError(f"the chat template's generation markers give the span {start} to {end}, out of order")
        before = end
    if rendered[0] != text:
        raise RowError("the chat template renders the same chat in two ways")
    return text, [(start, end) for start, end in spans[0] if start < end]


def mask_of(
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    ids: Sequence[int],
    offsets: Sequence[Span] | None,
    spans: Sequence[Span],
) -> npt.NDArray[np.bool_]:
    """The token mask [T] bool of character ``spans``: a token is in it that holds at least one of a span's characters.

    That is transformers' rule for markers. ``offsets`` [T] are each token's characters, None for a Python tokenizer.
    Raises RowError where neither they nor the ids of the text up to a span's edge show which token is at it.
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
        (begins, ends), before = offsets[t], offsets[t - 1][1] if t else 0
        # Tokens that take the blanks around them (Phi-3's <|assistant|>) are on the side of their own text.
        if not closing and begins <= edge:
            return t + (begins < edge and _only_blanks(tokenizer, ids[t], text[edge:ends]))
        if closing and begins < edge:
            return t + (not _only_blanks(tokenizer, ids[t], text[begins:edge]))
        if closing and before == edge:
            return t
    # Some tokenizers leave blanks out of the offsets, so that those at the edge may be of either token: the ids decide.
    out: Any = tokenizer(text[:edge], add_special_tokens=False, verbose=False)
    prefix: list[int] = out["input_ids"]
    if list(ids[: len(prefix)]) == prefix:
        return len(prefix)
    raise RowError(f"no token begins at character {edge} of the rendered chat, where an assistant turn does or ends")


def _only_blanks(tokenizer: PreTrainedTokenizerBase, token: int, part: str) -> bool:
    """Whether of an added token some characters are just blanks, which belong to its neighbours."""
    return part.isspace() and token in tokenizer.added_tokens_decoder
