"""What the plugin answers, [T, 2] float32 a sequence, checked and split into scores."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from entrodrop_prep.errors import ScoreError

if TYPE_CHECKING:
    from entrodrop_prep.backends import Scores
    from entrodrop_prep.backends.model import ModelInfo

LOWEST = -1e30
"""Below it a log-probability stands for minus infinity."""
ROUNDING = 1e-3
"""Nats by which float32 arithmetic may put a score outside its range."""


def problem_of(raw: np.ndarray[Any, Any], lengths: Sequence[int], vocab_size: int) -> str | None:
    """What is wrong with the plugin's answer [N, 2] for sequences of these lengths (N their sum); None if nothing.

    The last row of each sequence carries the vocabulary's size: see ``entrodrop_prep.vllm_plugin.pooler``.
    """
    if len(raw) != sum(lengths):
        return f"{len(raw)} rows for {sum(lengths)} tokens"
    last = np.cumsum(lengths) - 1
    sizes = raw[last, 1]
    if not (sizes == vocab_size).all():
        found = float(sizes[sizes != vocab_size][0])
        if found > 0 and found == int(found):
            return f"its vocabulary is {int(found)} tokens, the model has {vocab_size}"
        return "it is not from the plugin"
    scored = np.ones(len(raw), bool)
    scored[last] = False
    entropy, logprob = raw[scored].T
    if not (entropy >= 0).all():
        return "a position was not computed, or its logits are not finite"
    if not (entropy <= (most := math.log(vocab_size)) + ROUNDING).all():
        return f"an entropy is {entropy.max():.4g} nats, where the vocabulary has room for {most:.4g}"
    if not (logprob <= ROUNDING).all():
        return "a log-probability is above zero, or is no number"
    return None


def split_scores(raw: np.ndarray[Any, Any], lengths: Sequence[int], info: ModelInfo, where: str) -> list[Scores]:
    """Entropy and log-probability [T-1] of each sequence. Raises ScoreError for an answer that cannot be used."""
    problem = problem_of(raw, lengths, info.vocab_size)
    if problem is not None:
        raise ScoreError(
            f"the engine's answer cannot be used: {problem}",
            where=f"{info.name}, {where}",
            fix="try --dtype float32; if it stays, --backend transformers",
        )
    logprob = np.where(raw[:, 1] < LOWEST, -np.inf, raw[:, 1])
    ends = np.cumsum(lengths)
    return [
        (raw[end - length : end - 1, 0].copy(), logprob[end - length : end - 1].copy())
        for end, length in zip(ends, lengths, strict=True)
    ]
