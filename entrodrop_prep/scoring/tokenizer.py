"""Tokenizers: loading one, what decides its behaviour, and whether two of them mean the same by an id."""

from __future__ import annotations

import json
import logging
import os
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from entrodrop_prep.backends.model import commit_of, find_file
from entrodrop_prep.config.names import only_a_path, user_path
from entrodrop_prep.errors import ConfigError, ModelError, RowError
from entrodrop_prep.hub.loading import loading
from entrodrop_prep.scoring import chat
from entrodrop_prep.sources.given_paths import CHATML, check_file
from entrodrop_prep.store import digest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

CHATML_MARKS = ("<|im_start|>", "<|im_end|>")
_FIX = "name one with --tokenizer"


@dataclass(frozen=True)
class Disagreement:
    """Which ids do not mean the same to two tokenizers.

    Attributes:
        mask: [V] bool, V = the training tokenizer's ids or the reference model's vocabulary, whichever is more: True
            where id i is not the same token in both or is outside the model's vocabulary.
        training: token of each id in the tokenizer that is trained with.
        reference: token of each id in the reference model's tokenizer.
        vocab_size: columns of the reference model's logits.
    """

    mask: npt.NDArray[np.bool_]
    training: dict[int, str]
    reference: dict[int, str]
    vocab_size: int


def load_tokenizer(
    name_or_path: str, *, revision: str | None, trust_remote_code: bool, chat_template_file: str | None
) -> PreTrainedTokenizerBase:
    """A tokenizer from a directory or the Hub, with another chat template than its own where one is given.

    Raises:
        ModelError: no such directory, no tokenizer in it, missing or gated on the Hub, or the Hub cannot be reached.
        ConfigError: the template file cannot be read or is no Jinja template.
    """
    path = user_path(name_or_path)
    local = os.path.isdir(path)
    if not local and only_a_path(name_or_path):
        raise ModelError("no such directory", where=name_or_path, fix="give a tokenizer's directory or a Hub id")
    template = _read_template(chat_template_file) if chat_template_file is not None else None
    if local and not any(_is_tokenizer_file(file.name) for file in path.iterdir()):
        raise ModelError("the directory has no tokenizer files", where=name_or_path, fix=_FIX)
    try:
        tokenizer = _load(str(path) if local else name_or_path, name_or_path, revision, trust_remote_code)
    except ModelError as e:
        missing = _missing_packages(path) if local else []
        if missing:
            raise ModelError(
                e.what, where=e.where, fix=f"install {' and '.join(missing)}, or add tokenizer.json"
            ) from e
        raise
    if not isinstance(tokenizer.chat_template, (str, dict, type(None))):
        raise ModelError("its chat template is no text", where=name_or_path, fix="repair its tokenizer_config.json")
    if len(tokenizer.get_vocab()) <= len(tokenizer.get_added_vocab()):  # what transformers makes of a config alone
        raise ModelError("it comes with no tokenizer files", where=name_or_path, fix=_FIX)
    if template is not None:
        tokenizer.chat_template = template
        _check_template(tokenizer, str(chat_template_file))
        if template == _own_template(CHATML):
            _warn_of_pieces(tokenizer)
    return tokenizer


def _load(found: str, name: str, revision: str | None, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    """The tokenizer as transformers loads it, from tokenizer.json where there is one. Raises ModelError."""
    from transformers import AutoTokenizer, PreTrainedTokenizerBase

    with loading(name, "tokenizer"):
        if find_file(name, "tokenizer.json", revision) is None and find_file(name, "tekken.json", revision) is not None:
            raise ModelError("its only tokenizer is tekken.json", where=name, fix=f"add tokenizer.json, or {_FIX}")
        tokenizer: Any = AutoTokenizer.from_pretrained(
            found,
            trust_remote_code=trust_remote_code,
            mistral_format=False,  # else a tekken.json goes before tokenizer.json, with another class and other ids
            **({"revision": revision} if revision is not None else {}),
        )
        if not isinstance(tokenizer, PreTrainedTokenizerBase):  # tokenizer_class may name anything in transformers
            raise ModelError(
                f"its tokenizer_config.json names {type(tokenizer).__name__}, which is no tokenizer that can be used",
                where=name,
                fix=_FIX,
            )
        tokenizer("x")  # some of what is wrong with its files shows only now
    for of_this_machine in ("local_files_only", "is_local"):  # which would be saved with it
        tokenizer.init_kwargs.pop(of_this_machine, None)
    return tokenizer


def _missing_packages(path: Path) -> list[str]:
    """Packages without which transformers cannot read a SentencePiece or tiktoken file, the only one there is."""
    from transformers.utils.import_utils import is_protobuf_available, is_sentencepiece_available, is_tiktoken_available

    if (path / "tokenizer.json").is_file() or not any(f.suffix in (".model", ".tiktoken") for f in path.iterdir()):
        return []
    needed = {
        "sentencepiece": is_sentencepiece_available(),
        "protobuf": is_protobuf_available(),
        "tiktoken": is_tiktoken_available(),
    }
    return [name for name, there in needed.items() if not there]


def tokenizer_origin(name_or_path: str) -> dict[str, str]:
    """Name of a tokenizer, and its commit if it is on the Hub. Raises ModelError as ``load_tokenizer`` does."""
    path = user_path(name_or_path)
    if os.path.isdir(path) or only_a_path(name_or_path):
        return {"name": path.resolve().name}
    with loading(name_or_path, "tokenizer"):
        return {"name": name_or_path, "commit": commit_of(name_or_path, "tokenizer_config.json", None)}


def special_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids of special tokens, ascending: the named ones (BOS, EOS, ...) and every added token flagged special."""
    flagged = (i for i, token in tokenizer.added_tokens_decoder.items() if token.special)
    return sorted({*tokenizer.all_special_ids, *flagged})


def added_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Ids that a tokenizer puts before a text of its own accord, and behind it: BOS and EOS, or nothing."""
    bare, whole = (tokenizer("x", add_special_tokens=special)["input_ids"] for special in (False, True))
    for first in range(len(whole) - len(bare) + 1):
        if whole[first : first + len(bare)] == bare:
            return tuple(whole[:first]), tuple(whole[first + len(bare) :])
    return (), ()


def ends_itself(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether nothing is to be appended to texts: the tokenizer adds EOS of its own accord, or has none."""
    _, behind = added_ids(tokenizer)
    return tokenizer.eos_token_id is None or tokenizer.eos_token_id in behind


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 over what decides ids and rendered chats, 64 hex digits, the same in every process and machine."""
    if tokenizer.is_fast:
        engine = json.loads(tokenizer.backend_tokenizer.to_str())
        engine["truncation"] = engine["padding"] = None  # set again by each call
    else:
        engine = {"class": type(tokenizer).__name__, "vocabulary": tokenizer.get_vocab()}
    return digest.of_json(
        {
            "engine": engine,
            "special": {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
            "special_ids": special_ids(tokenizer),
            "template": tokenizer.chat_template,
            "adds": [getattr(tokenizer, name, None) for name in ("add_bos_token", "add_eos_token")],
        }
    )


def vocabulary_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 over which token each id is, 64 hex digits."""
    return digest.of_json(tokenizer.get_vocab())


def template_digest(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """SHA-256 over the chat template, 64 hex digits; None without one."""
    return None if tokenizer.chat_template is None else digest.of_json(tokenizer.chat_template)


def vocabulary_disagreement(
    training: PreTrainedTokenizerBase, reference: PreTrainedTokenizerBase, vocab_size: int
) -> Disagreement:
    """Compare the tokenizer trained with to the reference model's, id by id. Ids not in use may differ.

    An id that is a token to neither (a reserved row of the embeddings) is the same to both.
    """
    ours, theirs = _tokens(training), _tokens(reference)
    size = max(vocab_size, max(ours, default=-1) + 1)
    mask = np.zeros(size, np.bool_)
    mask[[i for i in {*ours, *theirs} if i < size and ours.get(i) != theirs.get(i)]] = True
    mask[vocab_size:] = True
    return Disagreement(mask, ours, theirs, vocab_size)


def check_ids(ids: npt.NDArray[Any], disagreement: Disagreement) -> None:
    """Check that ids [T] in use mean the same to both. Raises ModelError naming the first that does not."""
    known = np.minimum(ids, len(disagreement.mask) - 1)
    wrong = np.flatnonzero((ids >= len(disagreement.mask)) | disagreement.mask[known])
    if not len(wrong):
        return
    i = int(ids[wrong[0]])
    ours, theirs = (_quoted(tokens.get(i)) for tokens in (disagreement.training, disagreement.reference))
    if i >= disagreement.vocab_size:
        what = f"id {i} ({ours}) is outside the reference model's vocabulary of {disagreement.vocab_size}"
    else:
        what = f"id {i} is {ours} to the tokenizer you train with and {theirs} to the reference model"
    raise ModelError(what, fix="score with a model that has the same tokenizer, or check --tokenizer")


def _quoted(token: str | None) -> str:
    return "no token" if token is None else repr(token)


def _tokens(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    return {i: token for token, i in tokenizer.get_vocab().items()}


def _is_tokenizer_file(name: str) -> bool:
    return name.startswith(("tokenizer", "tokenization", "vocab", "spiece", "sentencepiece", "tekken")) or (
        name.endswith((".tiktoken", ".model"))
    )


def _own_template(name: str) -> str:
    return (files("entrodrop_prep") / "scoring" / "templates" / f"{name}.jinja").read_text(encoding="utf-8")


def _warn_of_pieces(tokenizer: PreTrainedTokenizerBase) -> None:
    """Say so where ChatML's tokens are none to this tokenizer: they would be learned as text."""
    known = tokenizer.get_vocab()
    split = [m for m in CHATML_MARKS if tokenizer.encode(m, add_special_tokens=False) != [known.get(m)]]
    if split:
        log.warning(
            "--chat-template chatml: the tokenizer has no token for %s: such marks become several tokens; add "
            "them to the tokenizer and the model, or give a template with tokens that it has",
            " or ".join(split),
        )


def _read_template(name: str) -> str:
    if name == CHATML and not os.path.exists(name):
        return _own_template(name)
    check_file(name, "--chat-template", "chat template")
    try:
        text = Path(name).read_text(encoding="utf-8")
    except OSError as e:
        raise ConfigError(
            f"cannot read the chat template: {e.strerror}", where=name, fix="check --chat-template"
        ) from e
    except UnicodeDecodeError as e:
        raise ConfigError("the chat template is not UTF-8", where=name, fix="check --chat-template") from e
    if not text.strip():
        raise ConfigError("the chat template is empty", where=name, fix="check --chat-template")
    return text


def _check_template(tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """A template may refuse this chat, but it must be Jinja."""
    from jinja2 import TemplateSyntaxError

    try:
        chat.render(tokenizer, [{"role": "user", "content": "x"}], {})
    except RowError as e:
        if isinstance(e.__cause__, TemplateSyntaxError):
            problem = e.__cause__
            raise ConfigError(f"line {problem.lineno}: {problem.message}", where=name, fix="fix the template") from e
