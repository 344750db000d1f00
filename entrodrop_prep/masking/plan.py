"""From a recipe and the scored rows to mask plans: thresholds, protected ids, the replacement."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from entrodrop_prep.config import Recipe
from entrodrop_prep.config.masking import DRAWN
from entrodrop_prep.config.settings import is_number
from entrodrop_prep.errors import ConfigError
from entrodrop_prep.masking.columns import Columns
from entrodrop_prep.masking.curriculum import epoch_rates, row_rates
from entrodrop_prep.masking.mask import MaskPlan
from entrodrop_prep.masking.quantile import Histogram, group_thresholds, quantile_of, threshold
from entrodrop_prep.masking.sources import Source, Sources
from entrodrop_prep.store.parallel import in_order
from entrodrop_prep.store.rows import Rows
from entrodrop_prep.store.scored import ScoredDataset

log = logging.getLogger(__name__)

Counts = np.ndarray[Any, np.dtype[np.int64]]
Taus = NDArray[np.float64]

LOW_TOP_RATE = 0.01


def thresholds(sources: Sources, recipe: Recipe, columns: Columns, jobs: int) -> Taus | None:
    """Of the corpus, of each masked source, or of each value of a column: nats. None where the recipe needs none.

    Exact: one pass over the scores for every 16 bits of theirs.
    """
    score, high = recipe.selection
    if recipe.threshold is not None or score is None or recipe.scope == "row":
        return None
    masked, q = sources.masked, quantile_of(recipe)
    groups = {"corpus": 1, "source": len(masked)}.get(recipe.scope, len(columns.facts["values"]))
    spans = [span for span in columns.chunks() if not sources.all[columns.arrays["source"][span[0]]].plain]

    def chosen(span: tuple[int, int]) -> tuple[Rows, NDArray[Any]]:
        rows = columns.span(*span)
        return rows, np.compress(rows.trainable, getattr(rows, score))

    def scores() -> Iterator[NDArray[Any]]:
        return (found for _, found in in_order(chosen, spans, jobs))

    def grouped() -> Iterator[tuple[NDArray[Any], NDArray[Any]]]:
        for (first, _), (rows, found) in zip(spans, in_order(chosen, spans, jobs), strict=True):
            if rows.group is not None:
                yield found, np.repeat(rows.group, rows.lengths)[rows.trainable]
            else:
                source = sources.all[columns.arrays["source"][first]]
                yield found, np.full(len(found), masked.index(source))

    dtype = np.dtype(np.float32) if score == "excess" else columns.arrays["entropy"].dtype
    if groups != 1:
        return group_thresholds(grouped, dtype, groups, q, high=high)
    histogram = Histogram(dtype)
    for found in scores():
        histogram.add(found)
    return np.array([threshold(histogram, q, high=high, again=scores)])


@dataclass(frozen=True)
class Tokens:
    """What a recipe says of single tokens, of all its sources."""

    protected: NDArray[np.int32]
    """Sorted ids that are never dropped nor replaced."""
    unigram: Counts | None
    """[V] how often each id is drawn as a replacement; None where none is drawn."""
    drop_token_id: int | None
    """The replacement, if it is always the same."""

    @classmethod
    def of(cls, sources: Sources, recipe: Recipe) -> Tokens:
        """Raises ConfigError for a token that cannot be protected or dropped to."""
        if not sources.masked:
            return cls(np.empty(0, np.int32), None, None)
        unigram = np.sum([s.scored.unigram for s in sources.masked], axis=0)
        one = sources.masked[0].scored
        protected, draws = protected_ids(one, recipe.protect), replacements(one, recipe, unigram)
        return cls(protected, draws, drop_token_id(one, recipe, unigram))


def mask_plans(
    sources: Sources, recipe: Recipe, tokens: Tokens, taus: Taus | None
) -> Mapping[tuple[int, int], MaskPlan]:
    """Everything that decides the masks of each (source, repeat); none of plain sources."""
    return {
        (index, repeat): MaskPlan(
            recipe=recipe,
            source=source.key_name(repeat),
            tau=_tau_of(sources, source, recipe, taus),
            protected=tokens.protected,
            unigram=tokens.unigram,
            drop_token_id=tokens.drop_token_id,
            taus=taus if recipe.scope_column else None,
        )
        for index, source in enumerate(sources.all)
        for repeat in range(0 if source.plain else source.times + bool(source.share))
    }


def _tau_of(sources: Sources, source: Source, recipe: Recipe, taus: Taus | None) -> float | None:
    """The one threshold of a masked source, if it has one."""
    if taus is None or recipe.scope_column:
        return recipe.threshold
    return float(taus[sources.masked.index(source) if recipe.scope == "source" else 0])


def threshold_summary(sources: Sources, recipe: Recipe, taus: Taus | None, values: list[Any]) -> Any:
    """The thresholds as the manifest has them: a number, or by source, or by the column's values."""
    if taus is None:
        return recipe.threshold
    shown = [t if abs(t) != float("inf") else "selects none" for t in taus.tolist()]  # JSON has no infinity
    if recipe.scope_column:
        return {"column": recipe.scope_column, "values": [[v, t] for v, t in zip(values, shown, strict=True)]}
    if recipe.scope == "source" and sources.named:
        return {s.name: t for s, t in zip(sources.masked, shown, strict=True)}
    return shown[0]


def replacements(scored: ScoredDataset, recipe: Recipe, unigram: Counts) -> Counts | None:
    """How often each id is drawn, special tokens never: ``unigram``, or all alike; None where none is drawn."""
    if recipe.target == "labels" or recipe.drop_token not in DRAWN:
        return None
    draws = unigram.copy()
    if recipe.drop_token == "uniform":
        draws[:] = np.isin(np.arange(len(draws)), list(scored.tokenizer().get_vocab().values()))
    draws[[i for i in scored.special_ids if i < len(draws)]] = 0
    return draws


def protected_ids(scored: ScoredDataset, protect: str) -> np.ndarray[Any, np.dtype[np.int32]]:
    """Sorted ids that ``--protect`` means. Raises ConfigError for one outside the vocabulary."""
    ids: set[int] = set()
    for item in protect.split(","):
        if item.strip() == "special":
            ids |= set(scored.special_ids)
        elif item.strip() != "none":
            ids.add(int(item))
            if int(item) >= scored.vocab_size:
                raise ConfigError(
                    f"--protect {item.strip()} is outside the vocabulary of {scored.vocab_size} tokens",
                    fix="give ids of the training tokenizer",
                )
    return np.array(sorted(ids), np.int32)


def drop_token_id(scored: ScoredDataset, recipe: Recipe, unigram: Counts) -> int | None:
    """The id that ``--drop-token`` means, None where it is drawn.

    Raises ConfigError for pad, EOS, or what is not one token; warns of a token the model can hardly know.
    """
    text = recipe.drop_token
    if text in DRAWN or recipe.target == "labels":
        return None
    tokenizer = scored.tokenizer()
    vocabulary = tokenizer.get_vocab()
    if is_number(text):
        number = int(text)
    elif text in vocabulary:
        number = vocabulary[text]
    else:
        ids = tokenizer.encode(text, add_special_tokens=False)
        if len(ids) != 1:
            raise ConfigError(
                f"--drop-token {text!r} is {len(ids)} tokens", fix="give an id, or text that is one token"
            )
        number = ids[0]
    if number >= scored.vocab_size or number not in vocabulary.values():
        raise ConfigError(
            f"--drop-token {text!r}: no token has the id {number}",
            fix=f"ids go from 0 to {min(scored.vocab_size, len(tokenizer)) - 1}",
        )
    names = {"EOS": scored.manifest["tokenizer"]["eos_id"], "pad": scored.manifest["tokenizer"]["pad_id"]}
    for name, special in names.items():
        if number == special:
            raise ConfigError(
                f"--drop-token {text!r} is the {name} token: the model would learn to see ends everywhere",
                fix="use random, or another token",
            )
    if number in tokenizer.added_tokens_decoder or not unigram[number]:
        log.warning(
            "the token %r (id %d) is added or never occurs in the corpus: its embedding may be untrained, and "
            "a LoRA run does not train it",
            tokenizer.convert_ids_to_tokens(number),
            number,
        )
    return number


def warn_if_flat(recipe: Recipe, rows: int) -> None:
    """Warn of a curriculum that hardly ever drops anything."""
    if recipe.progress == "row" and rows:
        top = max(
            float(row_rates(recipe, e, 0, rows, rows).max())
            if rows <= 1024
            else max(float(row_rates(recipe, e, 0, 1, rows)[0]), float(row_rates(recipe, e, rows - 1, 1, rows)[0]))
            for e in range(recipe.epochs)
        )
    else:
        top = float(epoch_rates(recipe).max())
    if top < LOW_TOP_RATE:
        log.warning(
            "the highest drop rate of this curriculum is %.4f: hardly a token will be dropped; raise --max-rate, "
            "or lower --midpoint or --horizon",
            top,
        )
