"""In which form a template takes an assistant's tool calls: found once a template, never from a row's own text.

Most templates take arguments as an object and write it as JSON. DeepSeek's take JSON text, and print calls only beside
a content that is null. Llama's and Qwen 2.5's write JSON text as a string, quoted and escaped. So a probe call is
rendered in every form, and the first that the template prints whole, not quoted again and with the end of the turn, is
the form.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from entrodrop_prep.errors import RowError
from entrodrop_prep.scoring.chat import render
from entrodrop_prep.scoring.messages import CallForm, Chat, Message, with_calls

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_FORMS = [CallForm(as_text, content) for content in ("", "null", "absent") for as_text in (False, True)]
_NAME, _KEY, _VALUE = "probe_name", "probe_key", "probe_value"
_CALL = {"id": "abcdefghi", "type": "function", "function": {"name": _NAME, "arguments": {_KEY: _VALUE}}}
_MESSAGES: list[Message] = [
    {"role": "user", "content": "x"},
    {"role": "assistant", "content": "", "tool_calls": [_CALL]},
]
PROBE_TOOL = {
    "type": "function",
    "function": {"name": "x", "description": "x", "parameters": {"type": "object", "properties": {}}},
}
"""A tool that a template prints in probe chats of rows that offer tools."""


def call_form(
    tokenizer: PreTrainedTokenizerBase, common: Mapping[str, Any], *, tools: bool, lead: Sequence[Message] = ()
) -> CallForm:
    """The form of tool calls that the chat template takes.

    Args:
        tokenizer: with its template.
        common: the template variables of the run.
        tools: whether rows have ``tools``, for which a tokenizer may have a template of its own.
        lead: messages that the probe begins with.

    Returns:
        The first form that prints the probe; the usual one where none does: the template has no tool calls.
    """
    variables = {"tools": [PROBE_TOOL] if tools else None, **common}
    end = ""
    for form in _FORMS:
        if form.content and not end:
            end = _end(tokenizer, variables, lead)
        chat = with_calls(Chat(_MESSAGES, [False, True]), form)
        try:
            text = render(tokenizer, [*lead, *chat.messages], variables)
        except RowError:
            continue
        quoted = f"'{_KEY}'" in text or f'\\"{_KEY}' in text
        # DeepSeek R1's template prints a call beside null content, and then does not end the turn.
        closed = not form.content or text.rstrip().endswith(end)
        if _NAME in text and _KEY in text and _VALUE in text and not quoted and closed:
            return form
    return CallForm()


def _end(tokenizer: PreTrainedTokenizerBase, variables: Mapping[str, Any], lead: Sequence[Message]) -> str:
    """What follows a final answer, without white space around it; "" where the template refuses one."""
    answer: Message = {"role": "assistant", "content": _VALUE}
    try:
        return render(tokenizer, [*lead, _MESSAGES[0], answer], variables).partition(_VALUE)[2].strip()
    except RowError:
        return ""
