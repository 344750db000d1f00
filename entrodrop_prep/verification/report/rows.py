"""The rows that a report shows token by token."""

from __future__ import annotations

import math
import re
from base64 import b64encode
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from entrodrop_prep.masking.epoch_rows import EpochRows
from entrodrop_prep.store.rows import Rows
from entrodrop_prep.verification.pieces import pieces
from entrodrop_prep.verification.report.statistics import Key

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MOST_TOKENS = 4096
"""Of a row, that are shown."""
LONGEST_PIECE = 200
"""Characters of a token that are shown."""
TRAINABLE, ELIGIBLE, SPECIAL = 1, 2, 4


def sample(rows: EpochRows, count: int, seed: int) -> dict[Key, int]:
    """``count`` rows, or all if there are fewer: by its key the number of each among the columns' rows, ascending."""
    arrays = rows.columns.arrays
    generator = np.random.Generator(np.random.Philox(key=seed))
    chosen = np.sort(generator.choice(len(rows.columns), min(count, len(rows.columns)), replace=False))
    keys = zip(*(arrays[name][chosen].tolist() for name in ("source", "row_id", "window")), strict=True)
    return dict(zip(keys, chosen.tolist(), strict=True))


class Shown:
    """A row with its scores; ``masks`` adds what happens to it in each epoch."""

    def __init__(self, label: str, scored: Rows, tokenizer: PreTrainedTokenizerBase, special: set[int]) -> None:
        self.ids = scored.input_ids[:MOST_TOKENS].tolist()
        self.flags = TRAINABLE * scored.trainable[:MOST_TOKENS].astype(np.uint8)
        self.flags += (SPECIAL * np.isin(scored.input_ids[:MOST_TOKENS], list(special))).astype(np.uint8)
        self.surprisal = None if scored.logprob is None else -scored.logprob[:MOST_TOKENS].astype(np.float64)
        self._tokenizer = tokenizer
        self.pieces = pieces(tokenizer, self.ids)
        self.data: dict[str, Any] = {
            "label": label,
            "all": len(scored.input_ids),
            "ids": self.ids,
            "text": [_short(piece) for piece in self.pieces],
            "entropy": _thousandths(np.asarray(scored.entropy)[:MOST_TOKENS]),
            "surprisal": None if self.surprisal is None else _thousandths(self.surprisal),
            "dropped": [],
            "replaced": [],
        }

    def add_epoch(self, droppable: NDArray[np.bool_], dropped: NDArray[np.bool_], ids: NDArray[np.int32]) -> None:
        """What an epoch does to the row: tokens [T] that may be dropped, that are, and the ids [T] that are fed."""
        n = len(self.ids)
        self.flags |= np.where(droppable[:n], ELIGIBLE, 0).astype(np.uint8)
        self.data["dropped"].append(b64encode(np.packbits(dropped[:n], bitorder="little").tobytes()).decode())
        other = np.flatnonzero(dropped[:n] & (ids[:n] != self.ids))
        self.data["replaced"].append({t: _short(str(self._tokenizer.decode([int(ids[t])]))) for t in other.tolist()})

    def leave_out(self) -> None:
        """An epoch that does not have the row: a mixture may take a part of a source."""
        self.data["dropped"].append(None)
        self.data["replaced"].append({})


def add_masks(shown: dict[int, Shown], rows: EpochRows, epochs: int) -> None:
    """Add to each row, by its number among the columns' rows, what every epoch does to it."""
    numbers = np.array(sorted(shown))
    for epoch in range(epochs):
        index = rows.order(epoch).index
        found = np.flatnonzero(np.isin(index, numbers))
        found = found[np.unique(index[found], return_index=True)[1]]  # of a row that is repeated, the first
        for number in set(shown) - set(index[found].tolist()):
            shown[number].leave_out()
        for some, scored, made, _, _ in rows.masked(epoch, found):
            for r, at in enumerate(some.tolist()):
                span = slice(int(scored.offsets[r]), int(scored.offsets[r + 1]))
                shown[int(index[found[at]])].add_epoch(made.droppable[span], made.dropped[span], made.input_ids[span])


def surprising(shown: list[Shown], most: int) -> list[dict[str, Any]]:
    """Tokens that may be dropped and that the reference did not expect, the least expected first, in context."""
    found = []
    for number, row in enumerate(shown):
        if row.surprisal is not None:
            eligible = np.flatnonzero(row.flags & ELIGIBLE)
            found += [(float(row.surprisal[t]), number, t) for t in eligible.tolist()]
    least_expected: dict[int, tuple[float, int, int]] = {}
    for value, number, t in sorted(found, reverse=True):  # of each id one token
        least_expected.setdefault(shown[number].ids[t], (value, number, t))
    return [
        {
            "row": number,
            "token": t,
            "surprisal": f"{value:.2f}",
            "before": _line("".join(shown[number].pieces[max(0, t - 16) : t]))[-60:],
            "piece": _line(_short(shown[number].pieces[t])),
            "after": _line("".join(shown[number].pieces[t + 1 : t + 12]))[:40],
        }
        for value, number, t in list(least_expected.values())[:most]
    ]


def _line(text: str) -> str:
    return re.sub(r"\s+", " ", text) if text.strip() else repr(text)[1:-1]


def _short(piece: str) -> str:
    return piece if len(piece) <= LONGEST_PIECE else f"{piece[:LONGEST_PIECE]}… ({len(piece):,} characters)"


def _thousandths(values: NDArray[Any]) -> list[int]:
    """[T] scores in thousandths of a nat, -1 for none."""
    return [-1 if math.isnan(value) else round(value * 1000) for value in values.astype(np.float64).tolist()]
