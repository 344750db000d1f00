"""The text of each token of a row, for people."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PARTIAL = "\N{REPLACEMENT CHARACTER}"
"""Stands for a token that is part of a character."""


def pieces(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[str]:
    """The text that each token adds to the tokens before it.

    Args:
        tokenizer: the one that the ids are of.
        ids: [T] token ids.

    Returns:
        [T] texts. Of a character that several tokens make, the last one has it and the others are ``PARTIAL``, as is
        what is no UTF-8 at all.
    """
    found, begin, read = [], 0, 0
    for stop in range(1, len(ids) + 1):
        before, text = (str(tokenizer.decode(list(ids[begin:end]))) for end in (read, stop))
        if text.endswith(PARTIAL) and stop - read < 4 and stop < len(ids):
            found.append(PARTIAL)
            continue
        found.append(text[len(before) :] if text.startswith(before) else str(tokenizer.decode([ids[stop - 1]])))
        begin, read = read, stop
    return found
