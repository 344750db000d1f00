"""The line on the study: which recipe gets which sentence, and that the pages hold the same sentences."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from entrodrop_prep.config import Recipe
from entrodrop_prep.masking.study import FINDINGS, finding

ROOT = Path(__file__).resolve().parents[2]
ALWAYS = {"schedule": "constant", "max_rate": 1.0}
UNIFORM = {"select": "random", "quantile": 1.0, "target": "inputs", "drop_token": "uniform", "schedule": "constant"}


@pytest.mark.parametrize(
    ("settings", "found"),
    [
        ({}, "labels"),
        ({"rates": (0.1, 0.2)}, "labels"),
        ({"select": "random"}, "other labels"),
        ({"target": "inputs"}, "inputs"),
        ({"target": "both"}, "inputs"),
        ({"target": "inputs", "max_rate": 0.1}, "none"),
        ({"target": "inputs", "select": "high-entropy"}, "other inputs"),
        ({**UNIFORM, "max_rate": 0.05}, "few inputs"),
        ({**UNIFORM, "max_rate": 0.4}, "other inputs"),
        ({**UNIFORM, "max_rate": 0.05, "drop_token": "random"}, "none"),
        ({"select": "high-surprisal", "threshold": 0.916, **ALWAYS}, "always"),
        ({"select": "high-surprisal", "threshold": 0.916}, "none"),
        ({"select": "low-surprisal"}, "none"),
    ],
)
def test_what_is_said(settings: dict[str, Any], found: str) -> None:
    assert (
        finding(Recipe(epochs=2, **settings)) == f"study of models of 1M parameters: {FINDINGS[found]} (docs/study.md)"
    )


@pytest.mark.parametrize("settings", [{"max_rate": 0.0}, {"quantile": 0.0}, {"rates": (0.0, 0.0)}])
def test_nothing_is_said_where_nothing_is_dropped(settings: dict[str, Any]) -> None:
    assert finding(Recipe(epochs=2, **settings)) is None


def test_the_pages_say_the_same() -> None:
    study, readme = (
        " ".join((ROOT / name).read_text(encoding="utf-8").split()) for name in ("docs/study.md", "README.md")
    )
    assert [text for text in FINDINGS.values() if text not in study] == []
    assert "did next to nothing against overfitting" in readme
