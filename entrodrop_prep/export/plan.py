"""From a recipe and a scored dataset to a mask plan: thresholds, protected ids, the replacement."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from entrodrop_prep.config import MaterializeConfig, Recipe, identity
from entrodrop_prep.errors import ConfigError
from entrodrop_prep.export.histogram import EntropyHistogram
from entrodrop_prep.export.order import has_label
from entrodrop_prep.masking import quantile
from entrodrop_prep.masking.counter import FORMAT_VERSION
from entrodrop_prep.masking.curriculum import epoch_rates, horizon, row_rates
from entrodrop_prep.masking.mask import MaskPlan, needs_corpus_quantile
from entrodrop_prep.store.rows import to_rows
from entrodrop_prep.store.schema import MASKED
from entrodrop_prep.store.scored import ScoredDataset

log = logging.getLogger(__name__)

Counts = np.ndarray[Any, np.dtype[np.int64]]

SOURCE = "source"
"""Name of a dataset in the masks' keys where there is only one."""
LOW_TOP_RATE = 0.01


@dataclass(frozen=True)
class Corpus:
    """What one pass over the scored rows tells.

    Attributes:
        rows: rows with something to train on; the others are left out of every epoch.
        rows_without_loss: those others.
        tokens: tokens of the rows that stay.
        trainable_tokens: of those, tokens that carry a label.
        tau: corpus threshold in nats, or None where the recipe needs none.
        spread: how the entropies of the trainable tokens are spread.
    """

    rows: int
    rows_without_loss: int
    tokens: int
    trainable_tokens: int
    tau: float | None
    spread: EntropyHistogram


def survey(scored: ScoredDataset, recipe: Recipe) -> Corpus:
    """Count the rows and find the corpus threshold: one pass over the scores, two where they are float32."""
    rows = left_out = tokens = trainable = 0
    histogram, spread = quantile.Histogram(scored.score_dtype), EntropyHistogram()
    wants_tau = needs_corpus_quantile(recipe)
    for batch in scored.batches(["row_id", "window", "input_ids", "loss_mask", "entropy"]):
        part = to_rows(batch)
        keep = has_label(batch.column("loss_mask"))
        rows += int(keep.sum())
        left_out += int((~keep).sum())
        tokens += int(part.lengths[keep].sum())
        trainable += int(part.trainable.sum())
        spread.add(part.entropy[part.trainable])
        if wants_tau:
            histogram.add(part.entropy[part.trainable])
    tau = recipe.threshold
    if wants_tau:
        tau = quantile.threshold(
            histogram,
            quantile.quantile_of(recipe),
            high=recipe.select == "high-entropy",
            again=lambda: _trainable_scores(scored),
        )
    return Corpus(rows, left_out, tokens, trainable, tau, spread)


def _trainable_scores(scored: ScoredDataset) -> Iterator[np.ndarray[Any, Any]]:
    for batch in scored.batches(["row_id", "window", "input_ids", "loss_mask", "entropy"]):
        part = to_rows(batch)
        yield part.entropy[part.trainable]


def check_logprob(scored: ScoredDataset, recipe: Recipe) -> None:
    """Raises ConfigError where the recipe looks at log-probabilities and there are none."""
    if recipe.keep_surprising is not None and not scored.has_logprob:
        raise ConfigError(
            "--keep-surprising needs log-probabilities, and the scored dataset has none",
            where=str(scored.directory),
            fix="score again without --no-logprob, or leave it out",
        )


def mask_plan(scored: ScoredDataset, recipe: Recipe, corpus: Corpus) -> MaskPlan:
    """Everything that decides the masks. Raises ConfigError for a token that cannot be protected or dropped to."""
    check_logprob(scored, recipe)
    return MaskPlan(
        recipe=recipe,
        source=SOURCE,
        tau=corpus.tau,
        protected=protected_ids(scored, recipe.protect),
        unigram=replacements(scored, recipe, scored.unigram),
        drop_token_id=drop_token_id(scored, recipe, scored.unigram),
    )


def replacements(scored: ScoredDataset, recipe: Recipe, unigram: Counts) -> Counts | None:
    """How often each id is drawn: ``unigram`` without special tokens; None where none is drawn."""
    if recipe.target == "labels" or recipe.drop_token != "random":
        return None
    draws = unigram.copy()
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
    """The id that ``--drop-token`` means, None for random.

    Raises ConfigError for pad, EOS, or what is not one token; warns of a token the model can hardly know.
    """
    text = recipe.drop_token
    if text == "random" or recipe.target == "labels":
        return None
    tokenizer = scored.tokenizer()
    vocabulary = tokenizer.get_vocab()
    if text.isdecimal():
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
            "the token %r (id %d) is added or never stands in the corpus: its embedding may be untrained, and "
            "a LoRA run does not train it",
            tokenizer.convert_ids_to_tokens(number),
            number,
        )
    return number


def masked_identity(scored: ScoredDataset, config: MaterializeConfig) -> dict[str, Any]:
    """What the masked files depend on: the scores, the recipe with its horizon, and how rows are laid into files."""
    return identity_of({"scored": scored.content_digest, "source": SOURCE}, config)


def identity_of(sources: dict[str, Any], config: MaterializeConfig) -> dict[str, Any]:
    """As ``masked_identity``, from whatever says what the rows are."""
    settings = identity(config)
    for name in ("plain_config", "add_columns", "rows_multiple", "pack"):  # as it was before there were these
        if not settings[name]:
            del settings[name]
    return {
        "schema": MASKED,
        "mask_format": FORMAT_VERSION,
        **sources,
        **settings,
        "quantile": None if config.threshold is not None else quantile.quantile_of(config),
        "horizon": horizon(config),
    }


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


def recipe_values(recipe: Recipe) -> dict[str, Any]:
    """The recipe as plain JSON values."""
    values = {k: v for k, v in asdict(recipe).items() if k in Recipe.__dataclass_fields__}
    return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}
