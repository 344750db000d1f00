"""Which tokens are dropped, and what a masked row then looks like.

``apply`` is a pure function. What happens to a token depends on (seed, source name, row_id, window, t, epoch), the
stored scores of its row and the plan; the rows it shares a call with, their number and their order change nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from entrodrop_prep.config import Recipe
from entrodrop_prep.config.masking import DRAWN
from entrodrop_prep.errors import ConfigError
from entrodrop_prep.masking.counter import DROP, REPLACE, rate_limit, stream_key, token_words64, tokens_below
from entrodrop_prep.masking.quantile import quantile_of, row_thresholds
from entrodrop_prep.store.rows import Rows

IGNORE = -100
"""The label of a token that carries no loss (the Hugging Face convention)."""


@dataclass(frozen=True)
class MaskPlan:
    """A recipe with everything it needs from the corpus and the tokenizer.

    Raises ConfigError where tokens are to be replaced at random and the corpus has no token to draw, and ValueError
    for parts that do not fit the recipe.
    """

    recipe: Recipe
    source: str
    """Name of the dataset that the rows belong to."""
    tau: float | None
    """Threshold of the corpus or the source, nats (-inf or +inf where it selects none); None where there is none."""
    protected: NDArray[np.int32]
    """Sorted ids that are never dropped nor replaced."""
    unigram: NDArray[np.int64] | None
    """[V] how often each id is drawn as a replacement, relative to the others (special tokens: 0)."""
    drop_token_id: int | None
    """The replacement; None draws it from ``unigram``."""
    taus: NDArray[np.float64] | None = None
    """[G] thresholds of the values of a column, as ``tau``; only for --scope column:C."""

    def __post_init__(self) -> None:
        one = self.recipe.threshold is not None or needs_corpus_quantile(self.recipe)
        many = self.recipe.selection.score is not None and self.recipe.scope_column is not None
        if (self.tau is not None) != one or (self.taus is not None) != many:
            raise ValueError(f"tau is {self.tau}, taus {self.taus} for a recipe that says otherwise")
        if (self.drop_token_id is None) != (self.recipe.drop_token in DRAWN):
            raise ValueError(f"drop_token_id is {self.drop_token_id} for --drop-token {self.recipe.drop_token}")
        if self.recipe.target != "labels" and self.drop_token_id is None and not self._draws.any():
            raise ConfigError(
                f"--drop-token {self.recipe.drop_token} has no token to draw: there are special tokens only",
                fix="give --drop-token an id or a token, or use --target labels",
            )

    @cached_property
    def _draws(self) -> NDArray[np.int64]:
        """[V] running sum of ``unigram``; empty where there is none."""
        return np.cumsum(self.unigram if self.unigram is not None else np.zeros(0, np.int64), dtype=np.int64)


@dataclass(frozen=True)
class Masked:
    """R rows of N tokens in one epoch; index i of an [N] array is the token at i of ``rows``."""

    rows: Rows
    """The rows that were masked."""
    input_ids: NDArray[np.int32]
    """[N] ids to feed to the model, replaced where the recipe says so; with target labels, the array of ``rows``."""
    labels: NDArray[np.int32]
    """[N] unshifted labels; -100 = no loss."""
    droppable: NDArray[np.bool_]
    """[N] tokens that may be dropped."""
    dropped: NDArray[np.bool_]
    """[N] tokens dropped."""
    labelled: NDArray[np.bool_]
    """[N] tokens whose label is not -100."""

    @property
    def trainable(self) -> NDArray[np.int64]:
        """[R] tokens of each row that may be trained on."""
        return self.rows.per_row(self.rows.trainable)

    @property
    def eligible(self) -> NDArray[np.int64]:
        """[R] of those, tokens that may be dropped."""
        return self.rows.per_row(self.droppable)

    @property
    def dropped_count(self) -> NDArray[np.int64]:
        """[R] tokens dropped in each row."""
        return self.rows.per_row(self.dropped)

    @property
    def labels_left(self) -> NDArray[np.int64]:
        """[R] labels of each row that are not -100."""
        return self.rows.per_row(self.labelled)

    @property
    def figures(self) -> list[int]:
        """Tokens of all rows: all, those that may be trained on, may be dropped, were dropped, have a label left."""
        flags = (self.rows.trainable, self.droppable, self.dropped, self.labelled)
        return [len(self.labels), *(int(np.count_nonzero(f)) for f in flags)]


def needs_corpus_quantile(recipe: Recipe) -> bool:
    """Whether ``MaskPlan.tau`` is to be found among all scores of the corpus or the source (else: given, or others)."""
    return recipe.threshold is None and recipe.selection.score is not None and recipe.scope in ("corpus", "source")


def apply(rows: Rows, plan: MaskPlan, epoch: int, rates: NDArray[np.float64]) -> Masked:
    """``rows`` as they are trained on in ``epoch`` at drop rates ``rates`` [R] (see ``curriculum.row_rates``).

    A row with nothing trainable comes back with every label -100; leaving it out is the caller's part. Raises
    ConfigError where --keep-surprising finds no log-probabilities, ValueError for rates outside [0, 1] or numbers
    outside the ranges of ``counter.token_words``.
    """
    recipe = plan.recipe
    if len(rates) != len(rows.row_id):
        raise ValueError(f"{len(rates)} rates for {len(rows.row_id)} rows")
    chance = rates * quantile_of(recipe) if recipe.selection.score is None else rates
    eligible = eligible_tokens(rows, plan) if rows.eligible is None else rows.eligible
    key, limit = stream_key(recipe.seed, DROP, plan.source), rate_limit(chance)
    dropped = tokens_below(key, rows.row_id, rows.window, rows.lengths, epoch, limit)
    dropped &= eligible

    labelled = rows.trainable
    if recipe.target != "inputs":
        labelled = _rescued(rows, dropped)
    return Masked(
        rows=rows,
        input_ids=rows.input_ids if recipe.target == "labels" else _replaced(rows, plan, epoch, dropped),
        labels=_labels(rows.input_ids, labelled),
        droppable=eligible,
        dropped=dropped,
        labelled=labelled,
    )


def unmasked(rows: Rows) -> Masked:
    """``rows`` with every label they can have: nothing is eligible, nothing dropped."""
    none = np.zeros(len(rows.input_ids), np.bool_)
    labels = _labels(rows.input_ids, rows.trainable)
    return Masked(rows, rows.input_ids, labels, droppable=none, dropped=none, labelled=rows.trainable)


def any_per_row(flags: NDArray[np.bool_], offsets: NDArray[np.int64]) -> NDArray[np.bool_]:
    """[R] whether any of ``flags`` [N] is set in each row ``offsets[r]:offsets[r + 1]``."""
    starts = offsets[:-1]
    some = starts < offsets[1:]
    found = np.zeros(len(starts), np.bool_)
    found[some] = np.maximum.reduceat(flags.view(np.uint8), starts[some]) if some.any() else False
    return found


def _labels(ids: NDArray[np.int32], labelled: NDArray[np.bool_]) -> NDArray[np.int32]:
    """[N] ``ids`` where they are ``labelled``, -100 elsewhere; without a branch."""
    labels = ids - np.int32(IGNORE)
    labels *= labelled
    labels += np.int32(IGNORE)
    return labels


def eligible_tokens(rows: Rows, plan: MaskPlan) -> NDArray[np.bool_]:
    """[N] tokens that may be dropped: trainable, not protected, selected by their score, not surprising.

    Scores are compared in float64, in which each stored value is exact. A null score selects nothing.
    """
    recipe = plan.recipe
    eligible = rows.trainable & ~np.isin(rows.input_ids, plan.protected)
    score, high = recipe.selection
    if score is not None:
        scores: Any = getattr(rows, score)
        tau: Any = plan.tau
        if plan.taus is not None:
            if rows.group is None:
                raise ValueError("the rows do not say which threshold is theirs")
            tau = np.repeat(plan.taus[rows.group], rows.lengths)
        elif tau is None:
            of_row = row_thresholds(scores, rows.trainable, rows.offsets, quantile_of(recipe), high)
            tau = np.repeat(of_row, rows.lengths)
        values = scores.astype(np.float64)
        eligible &= values >= tau if high else values <= tau
    if recipe.keep_surprising is not None:
        if rows.logprob is None:
            raise ConfigError(
                "--keep-surprising needs log-probabilities, and the scored dataset has none",
                fix="score again without --no-logprob, or leave out --keep-surprising",
            )
        eligible &= ~(-rows.logprob.astype(np.float64) > recipe.keep_surprising)
    return eligible


def _rescued(rows: Rows, dropped: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """[N] the tokens that keep their label where ``dropped`` ones lose it.

    In rows that lose every label, the drop of the highest entropy (of the first on ties) is taken back, in place.
    """
    labelled = rows.trainable & ~dropped
    bare = np.flatnonzero(~any_per_row(labelled, rows.offsets))
    if not len(bare):
        return labelled
    lengths = rows.lengths[bare]
    positions = np.repeat(rows.offsets[bare] - np.cumsum(lengths) + lengths, lengths) + np.arange(lengths.sum())
    lost = dropped[positions]
    tokens, row = positions[lost], np.repeat(np.arange(len(bare)), lengths)[lost]
    if not len(tokens):
        return labelled
    entropy = np.nan_to_num(rows.entropy[tokens].astype(np.float64), nan=-np.inf)
    starts = np.flatnonzero(np.diff(row, prepend=-1))
    highest = entropy == np.repeat(np.maximum.reduceat(entropy, starts), np.diff(starts, append=len(row)))
    _, first = np.unique(row[highest], return_index=True)
    again = tokens[highest][first]
    dropped[again], labelled[again] = False, True
    return labelled


def _replaced(rows: Rows, plan: MaskPlan, epoch: int, dropped: NDArray[np.bool_]) -> NDArray[np.int32]:
    """[N] input ids with those of ``dropped`` tokens replaced.

    A drawn id is the first whose running unigram count exceeds floor(u * total), u = 53 bits of the replacement stream.
    """
    if plan.drop_token_id is not None:
        return np.where(dropped, np.int32(plan.drop_token_id), rows.input_ids)
    key = stream_key(plan.recipe.seed, REPLACE, plan.source)
    words = token_words64(key, rows.row_id, rows.window, rows.lengths, epoch)[dropped]
    point = np.floor((words >> np.uint64(11)) * 2.0**-53 * plan._draws[-1]).astype(np.int64)
    result = rows.input_ids.copy()
    result[dropped] = np.searchsorted(plan._draws, point, side="right")
    return result
