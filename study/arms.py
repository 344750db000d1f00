"""The arms of the study as data: what the product's loader is asked for, and what the trainer is."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

EPOCHS = 12
TUNING_SEED = 100
SEEDS = (1, 2, 3, 4, 5)
PLAIN_RATES = {
    "planned": tuple(2.5e-4 * 16 ** (i / 8) for i in range(9)),
    "low": tuple(3e-5 * 10 ** (i / 8) for i in range(9)),
    "own": tuple(1e-5 * 10 ** (i / 8) for i in range(9)),
}
RATES = {"planned": (5e-4, 1e-3, 2e-3), **{name: PLAIN_RATES[name][::4] for name in ("low", "own")}}
"""Learning rates that are tried: those of the plan, those of its second run, and those for models of useful size."""
CURRICULUM = (0.4, 0.8, 1.0)


@dataclass(frozen=True)
class Arm:
    """An arm: ``recipe`` of the rows and ``trainer`` settings, in which the text "S" stands for the strength."""

    recipe: dict[str, Any]
    """Settings of ``MaskedRows.open``; empty where nothing is dropped."""
    strengths: tuple[float, ...] = CURRICULUM
    trainer: dict[str, Any] = field(default_factory=dict)
    """``decay``, ``dropout``, ``eaft``; ``mean`` where the loss divides by the labels left."""
    scores: str = "base"
    """Model that scored the rows: ``base``, or ``seen``, which was trained on them."""
    headline: bool = False
    chats: bool = False
    """Whether it is meant for CHATS only."""

    @property
    def needs_seen(self) -> bool:
        """Whether a model that has seen the data must score the rows."""
        return self.scores == "seen" or "excess" in self.recipe.get("select", "")

    def rows(self, strength: float) -> dict[str, Any]:
        """The recipe at a strength."""
        return {k: strength if v == "S" else v for k, v in self.recipe.items()}

    def training(self, strength: float) -> dict[str, float]:
        """The trainer's settings at a strength."""
        return {k: float(strength if v == "S" else v) for k, v in self.trainer.items()}


def _dropping(select: str, target: str, **more: Any) -> dict[str, Any]:
    return {"select": f"{select}", "target": target, "quantile": 0.5, "max_rate": "S", **more}


_CONSTANT = {"schedule": "constant"}
_UNIFORM = {"select": "random", "target": "inputs", "quantile": 1.0, "drop_token": "uniform", **_CONSTANT}
_ALWAYS = {"target": "labels", "schedule": "constant", "max_rate": 1.0}

ARMS = {
    "plain": Arm({}, (), headline=True),
    "low-labels": Arm(_dropping("low-entropy", "labels"), headline=True),
    "low-inputs": Arm(_dropping("low-entropy", "inputs"), headline=True),
    "low-both": Arm(_dropping("low-entropy", "both"), headline=True),
    "low-labels-unprotected": Arm({**_dropping("low-entropy", "labels"), "protect": "none"}, chats=True),
    "low-labels-mean": Arm(_dropping("low-entropy", "labels"), trainer={"mean": 1}),
    "random-labels": Arm(_dropping("random", "labels"), headline=True),
    "random-inputs": Arm(_dropping("random", "inputs"), headline=True),
    "random-both": Arm(_dropping("random", "both")),
    "high-labels": Arm(_dropping("high-entropy", "labels")),
    "high-inputs": Arm(_dropping("high-entropy", "inputs")),
    "low-labels-constant": Arm(_dropping("low-entropy", "labels", **_CONSTANT), (0.2, 0.4, 0.5)),
    "low-inputs-constant": Arm(_dropping("low-entropy", "inputs", **_CONSTANT), (0.2, 0.4, 0.5)),
    "uniform-inputs": Arm({**_UNIFORM, "max_rate": "S"}, (0.05, 0.1, 0.2), headline=True),
    "stm": Arm({"select": "high-surprisal", "threshold": "S", **_ALWAYS}, (0.916, 2.0, 4.0)),
    "low-excess": Arm({"select": "low-excess", "quantile": "S", **_ALWAYS}, (0.2, 0.4, 0.6)),
    "seen-low-labels": Arm(_dropping("low-entropy", "labels"), scores="seen"),
    "seen-low-inputs": Arm(_dropping("low-entropy", "inputs"), scores="seen"),
    "weight-decay": Arm({}, (0.1, 0.3, 0.8), {"decay": "S"}, headline=True),
    "dropout": Arm({}, (0.1, 0.2, 0.3), {"dropout": "S"}),
    "uniform-inputs+decay": Arm({**_UNIFORM, "max_rate": 0.05}, (0.1, 0.3, 0.8), {"decay": "S"}),
    "low-inputs+decay": Arm({**_dropping("low-entropy", "inputs"), "max_rate": 0.8}, (0.1, 0.3, 0.8), {"decay": "S"}),
    "eaft": Arm({}, (0.25, 0.5, 1.0), {"eaft": "S"}),
}


def trials(arm: str, rates: str = "planned") -> list[tuple[float, float]]:
    """The (learning rate, strength) pairs that are tried, nine for every arm; strength 0 where there is none."""
    strengths = ARMS[arm].strengths
    return [(r, s) for r in RATES[rates] for s in strengths] if strengths else [(r, 0.0) for r in PLAIN_RATES[rates]]


def middle(arm: str) -> float:
    """The second of the three strengths of an arm; 0 where there is none."""
    return ARMS[arm].strengths[1] if ARMS[arm].strengths else 0.0


def rows_key(arm: str, strength: float) -> str:
    """A name for the rows of an arm at a strength; the same for arms that train on the same rows."""
    recipe = ARMS[arm].rows(strength)
    return ",".join([ARMS[arm].scores, *(f"{k}={recipe[k]}" for k in sorted(recipe))]) if recipe else "plain"
