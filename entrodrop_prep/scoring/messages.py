"""Chats before a template renders them: a row's cells as messages in one form, and the variables that go with them.

Parquet and Arrow store one struct type for all messages of a table, so that a key that one message has is null in every
other. Null keys are therefore dropped wherever they are, from every format alike, and a message without ``content`` has
an empty one. A null that is meant is kept in JSON text, which no file format touches.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from entrodrop_prep.errors import ConfigError, RowError
from entrodrop_prep.store import strict_json

Message = dict[str, Any]
TrainOn = Literal["all-turns", "last-turn"]

RESERVED = frozenset(
    [
        *("conversation", "messages", "chat_template", "tokenize", "return_dict", "return_tensors", "padding"),
        *("add_generation_prompt", "continue_final_message", "return_assistant_tokens_mask", "tokenizer_kwargs"),
        *("truncation", "max_length"),
    ]
)
THOUGHTS = ("reasoning_content", "reasoning", "thinking")
"""Keys of an assistant's message that templates read its thoughts from; each template reads one of them."""
ROLES = {
    "human": "user",
    **dict.fromkeys(("gpt", "chatgpt", "bing", "bard", "model"), "assistant"),
}
SHAREGPT_ROLES = {**ROLES, "observation": "tool", "function_call": "assistant"}
"""Of messages with ``from``. With ``role``, ``observation`` is a role that some templates know by that name."""
_TEXT_PARTS = (None, "text", "input_text", "output_text")


@dataclass(frozen=True)
class CallForm:
    """How a template takes an assistant's tool calls: see ``tool_calls.call_form``.

    Attributes:
        as_text: whether the arguments are JSON text to it, not an object.
        content: what an empty content must be beside calls: ``""``, ``"null"`` or ``"absent"``.
    """

    as_text: bool = False
    content: Literal["", "null", "absent"] = ""


@dataclass(frozen=True)
class Chat:
    """A chat as the template gets it.

    Attributes:
        messages: in order; ``role`` is a string, ``content`` is one unless the template wants none beside tool calls.
        trained: one a message: whether it may be trained on. Never true but for an assistant's message.
        variables: what the template gets beside the messages: ``tools`` (None without any) and others.
        notes: what to warn of about this row, keys of ``notes.NOTES``.
    """

    messages: list[Message]
    trained: list[bool]
    variables: dict[str, Any] = field(default_factory=dict)
    notes: frozenset[str] = frozenset()


def chat_of(row: Mapping[str, Any], column: str, common: Mapping[str, Any], train_on: TrainOn = "all-turns") -> Chat:
    """The chat in one column of a row.

    Args:
        row: the row; its ``system``, ``tools`` and ``chat_template_kwargs`` are read too.
        column: the column of messages.
        common: template variables of the run, which the row's own win over.
        train_on: the assistant's messages that are trained on: all, or the last.

    Returns:
        Messages in the form that templates expect. Arguments of tool calls may still be JSON text: see ``with_calls``.

    Raises:
        RowError: for what is no chat, naming the message and the key, and where nothing is left to train on.
    """
    chat = _chat([(row.get(column), column, True)], row, common, train_on)
    return _with_system(chat, row.get("system"))


def pair_of(
    row: Mapping[str, Any], prompt: str, completion: str, common: Mapping[str, Any], train_on: TrainOn = "all-turns"
) -> tuple[Chat, int]:
    """Prompt and completion as one chat, and how many of its messages are the prompt's.

    Only the completion's assistant messages are trained on. Else as ``chat_of``, but for a ``system`` column.
    """
    cells = [(row.get(prompt), prompt, False), (row.get(completion), completion, True)]
    return _chat(cells, row, common, train_on), len(row[prompt])


def with_calls(chat: Chat, form: CallForm) -> Chat:
    """``chat`` with its tool calls in the form that the template takes. JSON text that it takes is left as it is."""
    messages = []
    for message in chat.messages:
        calls = message.get("tool_calls")
        if calls:
            message = {**message, "tool_calls": [_in_form(call, form) for call in calls]}
            if form.content and not message["content"].strip():
                del message["content"]
                if form.content == "null":
                    message["content"] = None
        messages.append(message)
    return replace(chat, messages=messages)


def _in_form(call: Message, form: CallForm) -> Message:
    holder = call.get("function", call)
    if "arguments" not in holder:
        return call
    given = holder["arguments"]
    if form.as_text:
        arguments = given if isinstance(given, str) else json.dumps(given, ensure_ascii=False)
    else:
        arguments = json.loads(given) if isinstance(given, str) else given
    holder = {**holder, "arguments": arguments}
    return {**call, "function": holder} if "function" in call else holder


def _chat(
    cells: list[tuple[object, str, bool]], row: Mapping[str, Any], common: Mapping[str, Any], train_on: TrainOn
) -> Chat:
    """Cells of messages (value, column, whether they may be trained on) as one chat."""
    messages: list[Message] = []
    trained: list[bool] = []
    notes: set[str] = set()
    switched_off = False
    for value, column, may_train in cells:
        for i, raw in enumerate(_list_of(value, column)):
            try:
                switch, message = _message(raw, notes)
            except RowError as e:
                raise RowError(f"column {column!r}: message {i} {e.what}", fix=e.fix) from e
            assistant = message["role"] == "assistant"
            if switch and not assistant:
                notes.add("trained_role")
            switched_off |= may_train and assistant and switch is False
            messages.append(message)
            trained.append(may_train and assistant and switch is not False)
    if not any(trained):
        roles = ", ".join(dict.fromkeys(m["role"] for m in messages))
        why = "every one has train: false or weight: 0" if switched_off else f"roles: {roles}"
        raise RowError(f"no assistant turn to train on ({why})")
    if train_on == "last-turn":
        last = max(i for i, t in enumerate(trained) if t)
        trained = [i == last for i in range(len(trained))]
    return Chat(messages, trained, variables_of(row, common), frozenset(notes))


def _list_of(value: object, column: str) -> list[object]:
    if not isinstance(value, (list, tuple)):
        raise RowError(f"column {column!r} holds {kind_of(value)}, not a list of messages")
    if not value:
        raise RowError(f"column {column!r} holds no message")
    return list(value)


def _message(raw: object, notes: set[str]) -> tuple[bool | None, Message]:
    """Whether a message is switched on or off for training (None: not said), and the message in one form.

    Raises RowError with the end of a sentence that begins with "message i".
    """
    if not isinstance(raw, Mapping):
        raise RowError(f"is {kind_of(raw)}, not an object")
    message: Message = without_nulls(raw)
    sharegpt = "from" in message and "role" not in message
    if sharegpt:
        message["role"] = message.pop("from")
    if "value" in message and "content" not in message:
        message["content"] = message.pop("value")
    role = message.get("role")
    if role is None:
        raise RowError("has no role")
    if not isinstance(role, str):
        raise RowError(f"has a role that is {kind_of(role)}, not a string")
    roles = SHAREGPT_ROLES if sharegpt else ROLES
    meant = role.strip().lower()
    if role != meant and meant in (*roles, *SHAREGPT_ROLES.values(), "system"):
        raise RowError(f"has the role {role!r}", fix=f"write it {meant!r}: of another role nothing is trained on")
    message["role"] = roles.get(role, role)
    switch = _switch(message)
    for key in ("name", "tool_call_id", *THOUGHTS):
        if not isinstance(message.get(key, ""), str):
            raise RowError(f"has {key} that is {kind_of(message[key])}, not a string")
    if sharegpt and role == "function_call":
        message["function_call"] = _called(message.pop("content", ""))
    calls = _calls(message)
    if calls:
        message["tool_calls"] = calls
    if "content" not in message and not calls and not any(key in message for key in THOUGHTS):
        notes.add("no_content")
    message["content"] = _content(message.get("content", ""))
    return switch, message


def _switch(message: Message) -> bool | None:
    """Take ``train`` and ``weight`` out of a message: True, False, or None where neither is there."""
    names = ("loss", "trainable", "training") if message["role"] == "assistant" else ()  # as other programs call it
    for key in names:
        if isinstance(message.get(key), (bool, int, float)) and message[key] != 1:
            raise RowError(f"has {key} {message[key]!r}", fix="write train: false or weight: 0 in its place")
    said: dict[str, bool] = {}
    if "train" in message:
        train = message.pop("train")
        if not isinstance(train, bool):
            raise RowError(f"has train {train!r}", fix="give true or false")
        said["train"] = train
    if "weight" in message:
        weight = message.pop("weight")
        if isinstance(weight, bool) or not isinstance(weight, (int, float)) or weight not in (0, 1):
            raise RowError(f"has weight {weight!r}", fix="give 0 or 1: a loss mask knows nothing between them")
        said["weight"] = bool(weight)
    if len(set(said.values())) > 1:
        raise RowError("has a train and a weight that contradict each other")
    return next(iter(said.values()), None)


def _content(content: object) -> str:
    """A message's text: a string, or a list of strings and text parts, which are joined as they are."""
    if isinstance(content, str):
        return content
    if not isinstance(content, (list, tuple)):
        raise RowError(f"has content that is {kind_of(content)}, not text")
    return "".join(_part(part, k) for k, part in enumerate(content))


def _part(part: object, k: int) -> str:
    if isinstance(part, str):
        return part
    if not isinstance(part, Mapping):
        raise RowError(f"has content whose part {k} is {kind_of(part)}, not text")
    kind, text = part.get("type"), part.get("text")
    if kind not in _TEXT_PARTS:
        raise RowError(f"has content whose part {k} is of type {kind!r}: only text can be scored")
    if not isinstance(text, str):
        raise RowError(f"has content whose part {k} has a text that is {kind_of(text)}, not a string")
    return text


def _calls(message: Message) -> list[Message]:
    """Take the tool calls out of a message, a legacy ``function_call`` among them, checked."""
    calls = message.pop("tool_calls", [])
    if not isinstance(calls, (list, tuple)):
        raise RowError(f"has tool_calls that are {kind_of(calls)}, not a list of objects")
    calls = list(calls)
    legacy = message.pop("function_call", None)
    if legacy is not None:
        legacy = legacy if isinstance(legacy, list) else [legacy]
        calls += [{"type": "function", "function": function} for function in legacy]
    return [_call(call, f"tool call {k}") for k, call in enumerate(calls)]


def _call(call: object, name: str) -> Message:
    if not isinstance(call, Mapping):
        raise RowError(f"has a {name} that is {kind_of(call)}, not an object")
    function = call.get("function", call)
    if not isinstance(function, Mapping):
        raise RowError(f"has a {name} whose function is {kind_of(function)}, not an object")
    if not isinstance(function.get("name"), str):
        raise RowError(f"has a {name} without a name")
    if "arguments" not in function:
        return dict(call)
    arguments = function["arguments"]
    if isinstance(arguments, str):
        arguments = arguments if arguments.strip() else "{}"
        try:
            parsed = json.loads(arguments)
        except (ValueError, RecursionError) as e:
            raise RowError(f"has a {name} whose arguments are not JSON that can be read: {e}") from e
    else:
        parsed = arguments
    if not isinstance(parsed, Mapping):
        what = "JSON of " if isinstance(arguments, str) else ""
        raise RowError(f"has a {name} whose arguments are {what}{kind_of(parsed)}, not an object")
    whole = {**function, "arguments": arguments}
    return {**call, "function": whole} if "function" in call else whole


def _called(text: object) -> object:
    """The calls in the text of a ShareGPT ``function_call``: JSON of ``{"name", "arguments"}`` or a list of them."""
    if not isinstance(text, str):
        raise RowError(f"is a function_call whose value is {kind_of(text)}, not JSON text")
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as e:
        raise RowError(f"is a function_call whose value is not JSON that can be read: {e}") from e


def _with_system(chat: Chat, system: object) -> Chat:
    """``chat`` with a ``system`` column's text as its first message, unless that is there already."""
    if system is None or (isinstance(system, str) and not system.strip()):
        return chat
    if not isinstance(system, str):
        raise RowError(f"column 'system' holds {kind_of(system)}, not a string")
    own = [m["content"] for m in chat.messages if m["role"] == "system"]
    if own:
        if own[0].strip() != system.strip():
            raise RowError("column 'system' and the chat's own system message differ", fix="leave one of them empty")
        return chat
    return replace(
        chat, messages=[{"role": "system", "content": system}, *chat.messages], trained=[False, *chat.trained]
    )


def without_nulls(value: Any) -> Any:
    """``value`` in new objects without the keys that are null, at every depth; entries of lists stay."""
    if isinstance(value, Mapping):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, (list, tuple)):
        return [without_nulls(item) for item in value]
    return value


def variables_of(row: Mapping[str, Any], common: Mapping[str, Any]) -> dict[str, Any]:
    """What the template gets beside the messages: the row's ``tools`` and ``chat_template_kwargs`` over ``common``.

    Null keys are dropped, but in tools that are JSON text. Raises RowError for tools that are neither a list of objects
    nor JSON of one, and for other kwargs than an object.
    """
    own = row.get("chat_template_kwargs")
    if own is not None and not isinstance(own, Mapping):
        raise RowError(f"column 'chat_template_kwargs' holds {kind_of(own)}, not an object")
    own = without_nulls(own or {})
    taken = sorted(RESERVED.intersection(own))
    if taken:
        raise RowError(f"column 'chat_template_kwargs' sets {taken[0]!r}, which is no variable of the chat template")
    tools = row.get("tools")
    if isinstance(tools, str):
        try:
            tools = json.loads(tools) if tools.strip() else None
        except (ValueError, RecursionError) as e:
            raise RowError(f"column 'tools' is not JSON that can be read: {e}") from e
    else:
        tools = without_nulls(tools)
    variables = {"tools": tools, **common, **own}
    tools = variables["tools"]
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise RowError(f"column 'tools' holds {kind_of(tools)}, not a list of objects")
    return variables


def check_common(kwargs: Mapping[str, Any]) -> None:
    """Refuse template variables that would change what is rendered instead of how, or that no manifest can hold.

    Raises ConfigError.
    """
    try:
        strict_json.loads(json.dumps([[[kwargs]]]))  # as deep as in a footer
    except (ValueError, TypeError, RecursionError) as e:
        raise ConfigError(
            f"--chat-template-kwargs cannot be recorded: {e}", fix="give JSON of finite numbers, not so deep"
        ) from e
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
