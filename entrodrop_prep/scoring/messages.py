"""Chats before a template renders them: a row's cells as messages, and the variables that go with them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from entrodrop_prep.errors import ConfigError, RowError

Message = Mapping[str, Any]

RESERVED = frozenset(
    [
        *("conversation", "messages", "chat_template", "tokenize", "return_dict", "return_tensors", "padding"),
        *("add_generation_prompt", "continue_final_message", "return_assistant_tokens_mask", "tokenizer_kwargs"),
        *("truncation", "max_length"),
    ]
)


@dataclass(frozen=True)
class Chat:
    """A chat as the template gets it.

    Attributes:
        messages: in order; ``role`` is a string, ``content`` is one where it is there at all.
        trained: one a message: whether it may be trained on. Never true but for an assistant's message.
        variables: what the template gets beside the messages: ``tools`` (None without any) and others.
    """

    messages: list[Message]
    trained: list[bool]
    variables: dict[str, Any] = field(default_factory=dict)


def chat_of(row: Mapping[str, Any], column: str, common: Mapping[str, Any]) -> Chat:
    """The chat in ``column`` of a row, ``common`` variables included. Raises RowError for what is no chat."""
    messages = messages_of(row.get(column), column)
    trained = [message["role"] == "assistant" for message in messages]
    return Chat(messages, trained, variables_of(row, common))


def pair_of(row: Mapping[str, Any], prompt: str, completion: str, common: Mapping[str, Any]) -> tuple[Chat, int]:
    """Prompt and completion as one chat, and how many of its messages are the prompt's.

    Only the completion's assistant messages are trained on. Raises RowError for what is no chat.
    """
    given = messages_of(row.get(prompt), prompt)
    answer = messages_of(row.get(completion), completion)
    trained = [False] * len(given) + [message["role"] == "assistant" for message in answer]
    return Chat([*given, *answer], trained, variables_of(row, common)), len(given)


def messages_of(value: object, column: str) -> list[Message]:
    """The messages in a cell, ``from``/``value`` turned to ``role``/``content`` as TRL does, in new objects.

    Raises RowError for anything but a list of at least one object with a ``role``.
    """
    if not isinstance(value, (list, tuple)):
        raise RowError(f"column {column!r} holds {kind_of(value)}, not a list of messages")
    if not value:
        raise RowError(f"column {column!r} holds no message")
    messages: list[Message] = []
    for i, message in enumerate(value):
        if not isinstance(message, Mapping):
            raise RowError(f"column {column!r}: message {i} is {kind_of(message)}, not an object")
        if "from" in message and "role" not in message:
            renamed = {key: item for key, item in message.items() if key not in ("from", "value")}
            renamed["role"] = message["from"]
            if "value" in message:
                renamed["content"] = message["value"]
            message = renamed
        if not isinstance(message.get("role"), str):
            raise RowError(f"column {column!r}: message {i} has no role")
        messages.append(message)
    return messages


def variables_of(row: Mapping[str, Any], common: Mapping[str, Any]) -> dict[str, Any]:
    """What the template gets beside the messages: the row's ``tools`` and ``chat_template_kwargs`` over ``common``.

    Raises RowError for tools that are neither a list of objects nor JSON of one, and for other kwargs than an object.
    """
    own = row.get("chat_template_kwargs")
    if own is not None and not isinstance(own, Mapping):
        raise RowError(f"column 'chat_template_kwargs' holds {kind_of(own)}, not an object")
    taken = sorted(RESERVED.intersection(own or ()))
    if taken:
        raise RowError(f"column 'chat_template_kwargs' sets {taken[0]!r}, which is no variable of the chat template")
    tools = row.get("tools")
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except (ValueError, RecursionError) as e:
            raise RowError(f"column 'tools' is not JSON that can be read: {e}") from e
    variables = {"tools": tools, **common, **(own or {})}
    tools = variables["tools"]
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise RowError(f"column 'tools' holds {kind_of(tools)}, not a list of objects")
    return variables


def check_common(kwargs: Mapping[str, Any]) -> None:
    """Refuse template variables that would change what is rendered instead of how. Raises ConfigError."""
    taken = sorted(RESERVED.intersection(kwargs))
    if taken:
        raise ConfigError(
            f"--chat-template-kwargs sets {taken[0]!r}", fix="give variables that the chat template reads"
        )


def kind_of(value: object) -> str:
    """A value's type in the words of the data, for messages."""
    if value is None:
        return "null"
    names = {bool: "a boolean", int: "a number", float: "a number", str: "a string", dict: "an object"}
    if isinstance(value, (list, tuple)):
        return f"a list of {kind_of(value[0]).removeprefix('a ').removeprefix('an ')}" if value else "an empty list"
    return names.get(type(value), f"a {type(value).__name__}")
