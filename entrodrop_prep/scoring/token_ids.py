"""Rows that come as token ids: what of them is trained on, and padding that must not be taken for tokens."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from entrodrop_prep.errors import RowError
from entrodrop_prep.scoring import messages

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100


@dataclass(frozen=True)
class Padding:
    """How padding looks in rows of one tokenizer.

    Attributes:
        token: the id that rows are padded with.
        name: what that token is, for people.
        most: how many of it a row may begin or end with: 1 where the token means something else too, as an EOS that is
            the pad token does, else 0.
    """

    token: int
    name: str
    most: int

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, stops: Collection[int] = ()) -> Padding | None:
        """The padding of a tokenizer: its pad token, else its EOS; None without either.

        Args:
            tokenizer: the tokenizer that the rows were made with.
            stops: ids with which generation stops besides the tokenizer's EOS.
        """
        pad, eos = tokenizer.pad_token_id, tokenizer.eos_token_id
        if pad is None:
            return None if eos is None else cls(int(eos), "EOS", 1)
        others = {eos, tokenizer.bos_token_id, tokenizer.unk_token_id, *stops}
        return cls(int(pad), "pad", int(pad in others))

    def check(self, ids: npt.NDArray[np.int64]) -> None:
        """Raises RowError for ids [T] that begin or end with padding."""
        there = np.flatnonzero(ids != self.token)
        front, back = (int(there[0]), len(ids) - 1 - int(there[-1])) if len(there) else (len(ids), len(ids))
        for count, where in ((front, "begins"), (back, "ends")):
            if count > self.most:
                times = f"{count} times" if count > 1 else "once"
                raise RowError(
                    f"it is padded: it {where} with id {self.token}, the tokenizer's {self.name} token, {times}",
                    fix="give rows without padding",
                )


def ids_and_mask(
    row: Mapping[str, Any], column: str, extras: Sequence[str], padding: Padding | None
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
    """The ids of a tokenized row, and what of them may be trained on.

    Args:
        row: its columns.
        column: the column of the ids.
        extras: columns that say more of them: labels or masks, and the attention mask.
        padding: how padding looks; None where it is not known.

    Returns:
        ids [T] int64 and mask [T] bool, T >= 0: what ``labels`` or the masks leave, else all.

    Raises:
        RowError: a column is not what it must be, or the row is padded.
    """
    ids = _integers(row, column, np.iinfo(np.int32).max)
    mask = np.ones(len(ids), np.bool_)
    for name in extras:
        values = _integers(row, name, None if name == "labels" else 1)
        if len(values) != len(ids):
            raise RowError(f"column {name!r} has {len(values)} entries for {len(ids)} input ids")
        if name == "attention_mask":
            if not values.all():
                raise RowError("it is padded: column 'attention_mask' has zeros", fix="give rows without padding")
        elif name == "labels":
            mask &= values != IGNORED
            wrong = np.flatnonzero(mask & (values != ids))
            if len(wrong):
                t = wrong[0]
                raise RowError(
                    f"label {values[t]} at position {t} is neither -100 nor the input id there, {ids[t]}",
                    fix="labels must not be shifted",
                )
        else:
            mask &= values != 0
    if padding is not None:
        padding.check(ids)
    return ids, mask


def _integers(row: Mapping[str, Any], column: str, most: int | None) -> npt.NDArray[np.int64]:
    """A cell as whole numbers [T], from 0 to ``most`` if that is given. Raises RowError."""
    value = row.get(column)
    odd = RowError(f"column {column!r} holds {messages.kind_of(value)}, not a list of whole numbers")
    if not isinstance(value, (list, tuple, np.ndarray)):
        raise odd
    try:
        numbers = np.asarray(value if len(value) else np.zeros(0, np.int64))
    except ValueError:  # lists of different lengths in it
        raise odd from None
    # NumPy takes booleans among numbers for numbers, and turns numbers over 64 bits into objects.
    mixed = most != 1 and not isinstance(value, np.ndarray) and any(isinstance(n, bool) for n in value)
    if mixed or numbers.ndim != 1 or numbers.dtype.kind not in ("iub" if most == 1 else "iu"):
        at = next((t for t, n in enumerate(value) if isinstance(n, bool) or not isinstance(n, int)), None)
        if at is None:
            at = next(t for t, n in enumerate(value) if not -(2**63) <= n < 2**63)
        raise RowError(f"column {column!r} is not a list of whole numbers: entry {at} is {value[at]!r}")
    outside = (numbers < 0) | (numbers > most) if most is not None else np.zeros(len(numbers), np.bool_)
    if outside.any():
        t = int(outside.argmax())
        raise RowError(f"column {column!r}: entry {t} is {numbers[t]}, not from 0 to {most}")
    return numbers.astype(np.int64)
