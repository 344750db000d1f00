"""Whether the model to train fits the rows: vocabulary, EOS, chat template, embeddings, context."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from entrodrop_prep.backends.model import inspect_model
from entrodrop_prep.errors import ConfigError, ModelError
from entrodrop_prep.scoring.tokenizer import load_tokenizer, template_digest, tokenizer_digest, vocabulary_digest


@dataclass(frozen=True)
class _Settings:
    """Of ``inspect_model``. No weight is loaded, so a pickle does no harm."""

    model: str
    revision: None = None
    dtype: str = "float32"
    trust_remote_code: bool = False
    allow_pickle: bool = True


def compare(name: str, tokenizer: dict[str, Any], largest: int, longest: int) -> list[str]:
    """In what the model to train differs from what the rows were made for, a sentence each.

    Args:
        name: directory or Hub id of the model.
        tokenizer: what the manifest says of the tokenizer of the rows.
        largest: the largest token id in the rows.
        longest: tokens of the longest row.

    Raises ModelError where the model cannot be read, ConfigError where an id of the rows is outside its vocabulary.
    """
    try:
        info = inspect_model(_Settings(name))
        theirs = load_tokenizer(name, revision=info.commit, trust_remote_code=False, chat_template_file=None)
    except ModelError as e:
        if "--" not in (e.fix or ""):
            raise
        raise ModelError(e.what, where=e.where, fix="give another --train-model, or leave it out") from e
    if largest >= info.vocab_size:
        raise ConfigError(
            f"id {largest} of the rows is outside its vocabulary of {info.vocab_size}",
            where=name,
            fix="train the model whose tokenizer the rows were made with, or score again with that of this one",
        )
    found = list(_of_tokenizer(name, theirs, tokenizer))
    if info.context is not None and longest > info.context:
        found.append(f"rows are up to {longest:,} tokens long, the context of {name} is {info.context:,}.")
    return found


def _of_tokenizer(name: str, theirs: Any, ours: dict[str, Any]) -> Iterator[str]:
    if tokenizer_digest(theirs) == ours["digest"]:
        return
    said = False
    if vocabulary_digest(theirs) != ours["vocabulary"]:
        said = True
        yield f"the vocabulary of {name} is not that of the rows: an id may be another token to it."
    if theirs.eos_token_id != ours["eos_id"]:
        said = True
        yield f"EOS is id {theirs.eos_token_id} to {name} and {ours['eos_id']} in the rows: it may not learn to stop."
    if template_digest(theirs) != ours["chat_template"]:
        said = True
        yield f"the chat template of {name} is not that of the rows: its chats would look otherwise than in training."
    if not said:
        yield (
            f"the tokenizer of {name} is not that of the rows, though its vocabulary, EOS and chat template are: it "
            "may split text or add tokens in another way."
        )
