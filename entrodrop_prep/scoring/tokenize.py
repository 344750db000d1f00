"""Rows to token ids and loss masks: what TRL's SFTTrainer (``max_length=None``) trains on for the row and tokenizer.

text               all of it; EOS is added where the text does not end with it
prompt+completion  strings or messages; the completion, which starts where the ids of prompt and of both diverge
instruction+output with or without an input (Alpaca): prompt and completion, as strings
messages           the assistant's turns (``assistant_only_loss=True``)
input_ids          what ``labels`` or the masks beside them leave, else all
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from entrodrop_prep.errors import ConfigError, RowError, SourceError
from entrodrop_prep.scoring import chat, messages
from entrodrop_prep.scoring.left_out import left_out
from entrodrop_prep.scoring.token_ids import Padding, ids_and_mask
from entrodrop_prep.scoring.turns import TurnFinder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from entrodrop_prep.config import ScoreConfig

Kind = Literal["text", "prompt_completion", "alpaca", "messages", "input_ids"]
Row = Mapping[str, Any]
Bits = npt.NDArray[np.bool_]

CHARACTERS = 16
"""Of a token, more than most have."""
_WORD_END = re.compile(r"\S(?=\s)")
ALPACA = ("instruction", "input", "output")
_CHAT_EXTRAS = ("tools", "chat_template_kwargs")
_ALPACA_EXTRAS = ("input", "system", "history")
_CHOOSE = "choose with --text-column, --prompt-column and --completion-column, or --messages-column"


@dataclass(frozen=True)
class RowFormat:
    """What a row is and which columns it is made of: ``main`` holds it, ``extras`` say more about it."""

    kind: Kind
    main: tuple[str, ...]
    extras: tuple[str, ...] = ()

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns to read."""
        return self.main + self.extras

    @property
    def is_plain(self) -> bool:
        """Whether a long row may be split: text, tokenized or not, as opposed to a conversation."""
        return self.kind in ("text", "input_ids")

    @property
    def decisive(self) -> tuple[str, ...]:
        """Columns that would change what a row is, or what of it is trained on, if it had them."""
        if self.kind == "input_ids":
            return ("labels", "completion_mask", "assistant_masks", "attention_mask")
        if self.kind == "alpaca":
            return _ALPACA_EXTRAS
        if self.kind == "text":
            return ()
        return ("system", *_CHAT_EXTRAS) if self.kind == "messages" else _CHAT_EXTRAS

    def describe(self) -> str:
        """One line for people."""
        names = {
            "text": "plain text",
            "prompt_completion": "prompt and completion",
            "alpaca": "prompt and completion",
            "messages": "chat messages",
            "input_ids": "token ids",
        }
        main, extras = list(self.main), list(self.extras)
        if self.kind == "alpaca":
            main, extras = [n for n in ALPACA if n in self.columns], [n for n in extras if n not in ALPACA]
        beside = f", with {', '.join(extras)}" if extras else ""
        joined = f"{', '.join(main[:-1])} and {main[-1]}" if len(main) > 1 else main[0]
        return f"{names[self.kind]} from {joined}{beside}"


@dataclass(frozen=True)
class Encoded:
    """A row as it would be trained on.

    Attributes:
        input_ids: [T] int32, T >= 0.
        loss_mask: [T] bool, whether token t may be trained on; false at 0, which no model predicts.
        notes: what to warn of about this row, keys of ``notes.NOTES``.
        whole: whether these are all tokens of the row. Else they are more than ``cut_to``, and of these the first
            ``cut_to`` are the row's.
    """

    input_ids: npt.NDArray[np.int32]
    loss_mask: Bits
    notes: frozenset[str] = frozenset()
    whole: bool = True


@dataclass(frozen=True)
class _Draft:
    """A row on its way: the texts to tokenize, and what becomes of their ids (and of the first one's offsets)."""

    texts: tuple[str, ...]
    special: bool
    finish: Callable[[list[Any], Any], Encoded]
    offsets: bool = False


def detect_format(columns: Sequence[str], config: ScoreConfig) -> RowFormat:
    """The row format of a source with these columns: the one the settings name, else the only one there is.

    ``input_ids`` goes before all others, as in TRL. Raises ConfigError for a named column that is not there,
    SourceError where no format or several fit.
    """
    there = f"its columns are: {', '.join(columns) or 'none'}"

    def extras(*names: str) -> tuple[str, ...]:
        return tuple(name for name in names if name in columns)

    for setting in ("text_column", "prompt_column", "completion_column", "messages_column"):
        name = getattr(config, setting)
        if name is not None and name not in columns:
            raise ConfigError(f"there is no column {name!r} for --{setting.replace('_', '-')}", fix=there)
    if config.text_column:
        return RowFormat("text", (config.text_column,))
    if config.prompt_column and config.completion_column:
        return RowFormat("prompt_completion", (config.prompt_column, config.completion_column), extras(*_CHAT_EXTRAS))
    if config.messages_column:
        return RowFormat("messages", (config.messages_column,), extras("system", *_CHAT_EXTRAS))
    if "input_ids" in columns:
        masks = ("labels",) if "labels" in columns else ("completion_mask", "assistant_masks")  # labels decide alone
        return RowFormat("input_ids", ("input_ids",), extras(*masks, "attention_mask"))
    found = [
        form
        for form in (
            RowFormat("text", ("text",)),
            RowFormat("prompt_completion", ("prompt", "completion"), extras(*_CHAT_EXTRAS)),
            RowFormat("alpaca", ("instruction", "output"), extras(*_ALPACA_EXTRAS)),
            RowFormat("messages", ("messages",), extras("system", *_CHAT_EXTRAS)),
            RowFormat("messages", ("conversations",), extras("system", *_CHAT_EXTRAS)),
        )
        if all(name in columns for name in form.main)
    ]
    if len(found) > 1:
        several = " or as ".join(form.describe() for form in found)
        raise SourceError(f"its rows can be read as {several}; {there}", fix=_CHOOSE)
    if not found:
        wanted = "text, prompt and completion, instruction and output, messages, conversations or input_ids"
        raise SourceError(f"no column called {wanted}; {there}", fix=_CHOOSE)
    return found[0]


class Encoder:
    """Turns rows of one format into ids and masks with one tokenizer."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        row_format: RowFormat,
        *,
        append_eos: bool,
        chat_template_kwargs: dict[str, Any] | None,
        train_on: messages.TrainOn = "all-turns",
        stops: Collection[int] = (),
        cut_to: int | None = None,
    ) -> None:
        """Settle what is the same for all rows.

        Args:
            tokenizer: turns texts into ids.
            row_format: what the rows are.
            append_eos: whether the EOS token is put behind texts that do not end with it.
            chat_template_kwargs: variables for the chat template.
            train_on: which assistant turns are trained on.
            stops: ids with which generation stops besides the tokenizer's EOS.
            cut_to: tokens of a row that are used, where longer ones are cut or left out; None for all.

        Raises:
            ConfigError: settings that do not fit the rows or the template.
            ModelError: chats without a template.
        """
        self._tokenizer = tokenizer
        self._format = row_format
        self._cut_to = cut_to
        self._eos = str(tokenizer.eos_token) if append_eos and tokenizer.eos_token else ""
        self._common = chat_template_kwargs or {}
        self._train_on = train_on
        if train_on != "all-turns" and row_format.is_plain:
            raise ConfigError(
                f"--train-on {train_on} is for chats, and these rows are {row_format.describe()}", fix="leave it out"
            )
        messages.check_common(self._common)
        self._turns = TurnFinder(tokenizer)
        is_tokenized = row_format.kind == "input_ids"
        self._padding = Padding.of(tokenizer, {*stops, *self.turn_end_ids()}) if is_tokenized else None
        if row_format.kind == "messages":
            chat.has_markers(tokenizer, None)
        if row_format.kind in ("messages", "prompt_completion"):
            chat.warn_of_clock(tokenizer)

    def turn_end_ids(self) -> list[int]:
        """Ids of the tokens that end the assistant's turns, ascending; none without a chat template."""
        return self._turns.end_ids(self._common) if self._tokenizer.chat_template else []

    def appended_turn_end(self) -> str:
        """The text that is put behind chats which end with an assistant's turn, "" for none."""
        if self._format.kind not in ("messages", "prompt_completion") or not self._tokenizer.chat_template:
            return ""
        return self._turns.appended(self._common)

    def encode(self, rows: Sequence[Row]) -> list[Encoded | str]:
        """Each row's ids and mask, or one line that says why it cannot be used. The rows are left as they are."""
        drafts = [_or_reason(partial(self._draft, row)) for row in rows]
        results: list[Encoded | str | None] = [None if isinstance(d, _Draft) else d for d in drafts]
        for kind in ((True, False), (False, False), (False, True)):
            group = [(i, d) for i, d in enumerate(drafts) if isinstance(d, _Draft) and (d.special, d.offsets) == kind]
            if not group:
                continue
            ids, offsets = self._tokenize([text for _, d in group for text in d.texts], *kind)
            at = 0
            for i, d in group:
                mine, spans = ids[at : at + len(d.texts)], offsets[at]
                at += len(d.texts)
                results[i] = _or_reason(partial(d.finish, mine, spans))
        return [self._noted(r) if isinstance(r, Encoded) else r for r in results if r is not None]

    def _noted(self, row: Encoded) -> Encoded:
        """The row, with a note where BOS or EOS appears twice at its edge."""
        special = self._tokenizer.bos_token_id, self._tokenizer.eos_token_id
        edges = row.input_ids[:2], row.input_ids[-2:]
        doubled = [
            note
            for note, token, edge in zip(("double_bos", "double_eos"), special, edges, strict=True)
            if token is not None and len(edge) == 2 and (edge == token).all()
        ]
        return replace(row, notes=row.notes | set(doubled)) if doubled else row

    def _tokenize(self, texts: list[str], special: bool, offsets: bool) -> tuple[list[Any], list[Any]]:
        """ids of each text, and their character offsets where asked for and the tokenizer has them, else None."""
        offsets = offsets and self._tokenizer.is_fast
        out: Any = self._tokenizer(
            texts,
            add_special_tokens=special,
            return_attention_mask=False,
            return_token_type_ids=False,
            return_offsets_mapping=offsets,
            verbose=False,
        )
        return out["input_ids"], out["offset_mapping"] if offsets else [None] * len(texts)

    def _draft(self, row: Row) -> _Draft | Encoded:
        kind, main = self._format.kind, self._format.main
        if kind == "text":
            text, whole = self._beginning(self._ended(_text(row, main[0])))
            return _Draft((text,), True, lambda ids, _: _encoded(ids[0], np.ones(len(ids[0]), np.bool_), whole))
        if kind == "prompt_completion":
            return self._prompt_completion(row, *main)
        if kind == "alpaca":
            return self._strings(*_alpaca(row))
        if kind == "messages":
            return self._chat(messages.chat_of(row, main[0], self._common, self._train_on))
        return _encoded(*ids_and_mask(row, main[0], self._format.extras, self._padding))

    def _beginning(self, text: str, *, special: bool = True) -> tuple[str, bool]:
        """Of a text that is cut off anyway, so much that the tokens in use are those of the whole; and if it is that.

        What comes far behind them has no say in them. That is tried: two beginnings, one twice as long as the other,
        must have the same first tokens, and the shorter one at least twice as many as are in use.
        """
        if self._cut_to is None:
            return text, True
        size = self._cut_to * CHARACTERS + 1024
        while 4 * size < len(text):
            short, long = (text[: _boundary(text, at)] for at in (size, 2 * size))
            (few, more), _ = self._tokenize([short, long], special, False)
            if len(few) >= 2 * self._cut_to and few[: self._cut_to] == more[: self._cut_to]:
                return short, False
            size *= 4
        return text, True

    def _ended(self, text: str) -> str:
        return text if text.endswith(self._eos) else text + self._eos

    def _strings(self, prompt: str, completion: str) -> _Draft:
        both, whole = self._beginning(prompt + self._ended(completion))
        prompt = prompt if whole else self._beginning(prompt)[0]
        return _Draft((prompt, both), True, lambda ids, _: _from_divergence(ids[0], ids[1], whole))

    def _called(self, talk: messages.Chat) -> messages.Chat:
        """A chat with its tool calls as the template takes them."""
        if not any(message.get("tool_calls") for message in talk.messages):
            return talk
        return messages.with_calls(talk, self._turns.format_of(talk.variables).calls)

    def _prompt_completion(self, row: Row, prompt_column: str, completion_column: str) -> _Draft:
        if not isinstance(row.get(prompt_column), (list, tuple)):
            return self._strings(_text(row, prompt_column), _text(row, completion_column))
        chat.has_markers(self._tokenizer, None)
        both, _ = messages.pair_of(row, prompt_column, completion_column, self._common, self._train_on)
        return self._chat(both)

    def _chat(self, talk: messages.Chat) -> _Draft:
        talk = self._called(talk)
        roles = ", ".join(dict.fromkeys(m["role"] for m in talk.messages))
        nothing = RowError(f"no assistant turn to train on (roles: {roles})")
        turns = self._turns.find(talk)
        if not turns.spans:
            raise nothing
        notes = talk.notes | left_out(talk, turns.text) | (frozenset() if turns.closed else {"unclosed_turns"})
        text, whole = self._beginning(turns.text, special=False)
        spans = [(start, min(end, len(text))) for start, end in turns.spans if start < len(text)]

        def finish(ids: list[Any], offsets: Any) -> Encoded:
            mask = chat.mask_of(self._tokenizer, text, ids[0], offsets, spans)
            return replace(_some(_encoded(ids[0], mask, whole), nothing), notes=notes)

        return _Draft((text,), False, finish, offsets=True)


def _boundary(text: str, at: int) -> int:
    """Where a word ends, at most 1,000 characters before ``at``; else ``at``."""
    ends = [found.end() for found in _WORD_END.finditer(text, at - 1000, at)]
    return ends[-1] if ends else at


def _or_reason(make: Callable[[], Any]) -> Any:
    try:
        return make()
    except (RowError, chat.SlowTemplate) as e:
        return str(e)


def _text(row: Row, column: str) -> str:
    value = row.get(column)
    if not isinstance(value, str):
        raise RowError(f"column {column!r} holds {messages.kind_of(value)}, not a string")
    return chat.encodable(value, f"column {column!r}")


def _alpaca(row: Row) -> tuple[str, str]:
    """Prompt and completion of an Alpaca row: instruction, input if any, and output, each on a line of its own."""
    for name in ("system", "history"):
        if row.get(name):
            raise RowError(
                f"column {name!r} is not empty, and there is no place for it in a row of {', '.join(ALPACA)}",
                fix="give such rows as messages",
            )
    given = [_text(row, "instruction")]
    if row.get("input") is not None:
        given.append(_text(row, "input"))
    prompt = "".join(text + "\n" for text in given if text.strip())
    return prompt, _text(row, "output")


def _encoded(ids: npt.ArrayLike, mask: Bits, whole: bool = True) -> Encoded:
    mask[:1] = False
    return Encoded(np.asarray(ids, np.int32), mask, whole=whole)


def _some(encoded: Encoded, otherwise: RowError) -> Encoded:
    """The row, if it has a token to train on; behind those of a beginning there may be one."""
    if encoded.whole and not encoded.loss_mask.any():
        raise otherwise
    return encoded


def _from_divergence(prompt: list[int], both: list[int], whole: bool) -> Encoded:
    """TRL's completion: what follows the common prefix of the prompt's ids and the ids of both together."""
    start = next((t for t, (a, b) in enumerate(zip(prompt, both, strict=False)) if a != b), min(len(prompt), len(both)))
    mask = np.arange(len(both)) >= start
    return _some(_encoded(both, mask, whole), RowError("the completion has no token to train on"))
