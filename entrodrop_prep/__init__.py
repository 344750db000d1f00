"""Entropy-guided token dropout as a data-preparation step: score once, write masked datasets that trainers read.

    from entrodrop_prep import MaterializeConfig, ScoreConfig, materialize, score

    score(ScoreConfig(source="docs.jsonl", model="org/base-model", out="scored"))
    materialize(MaterializeConfig(scored="scored", out="masked", epochs=4))

Names are loaded on first use (PEP 562), so importing the package costs nothing. ``PUBLIC`` is the one list of them:
``__init__.pyi``, which type checkers read, and docs/library.md are generated from it.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

PUBLIC = {
    "score": "entrodrop_prep.scoring.run:score",
    "ScoreConfig": "entrodrop_prep.config:ScoreConfig",
    "ScoreSummary": "entrodrop_prep.scoring.run:ScoreSummary",
    "ServeConfig": "entrodrop_prep.config:ServeConfig",
    "materialize": "entrodrop_prep.publish.materialize:materialize",
    "MaterializeConfig": "entrodrop_prep.config:MaterializeConfig",
    "MaterializeSummary": "entrodrop_prep.export.materialize:MaterializeSummary",
    "Recipe": "entrodrop_prep.config:Recipe",
    "MaskedRows": "entrodrop_prep.training.rows:MaskedRows",
    "MaskedStream": "entrodrop_prep.training.stream:MaskedStream",
    "MaskedLoader": "entrodrop_prep.training.stream:MaskedLoader",
    "recipe": "entrodrop_prep.trainers:recipe",
    "TrainingConfig": "entrodrop_prep.config:TrainingConfig",
    "check_batches": "entrodrop_prep.training.check_batches:check_batches",
    "BatchCheck": "entrodrop_prep.training.check_batches:BatchCheck",
    "recording": "entrodrop_prep.training.recording:recording",
    "inspect": "entrodrop_prep.verification.inspect:show",
    "report": "entrodrop_prep.verification.report:report",
    "verify": "entrodrop_prep.verification.run:verify",
    "push": "entrodrop_prep.publish.push:push",
    "PushConfig": "entrodrop_prep.config:PushConfig",
    "PushSummary": "entrodrop_prep.publish.push:PushSummary",
    "EntrodropError": "entrodrop_prep.errors:EntrodropError",
    "ArrivalError": "entrodrop_prep.errors:ArrivalError",
    "HubError": "entrodrop_prep.errors:HubError",
}
"""Name -> ``module:attribute``."""

__all__ = ["__version__", *PUBLIC]


def __getattr__(name: str) -> Any:
    if name not in PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, _, attribute = PUBLIC[name].partition(":")
    value = getattr(importlib.import_module(module), attribute)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
