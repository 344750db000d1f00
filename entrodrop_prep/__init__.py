"""Entropy-guided token dropout as a data-preparation step: score once, write masked datasets that trainers read.

    from entrodrop_prep import MaterializeConfig, ScoreConfig, materialize, score

    score(ScoreConfig(source="docs.jsonl", model="org/base-model", out="scored"))
    materialize(MaterializeConfig(scored="scored", out="masked", epochs=4))

Names are loaded on first use (PEP 562), so importing the package costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_NAMES = {
    "score": "entrodrop_prep.scoring.run",
    "ScoreSummary": "entrodrop_prep.scoring.run",
    "materialize": "entrodrop_prep.publish.materialize",
    "MaterializeSummary": "entrodrop_prep.export.materialize",
    "push": "entrodrop_prep.publish.push",
    "PushSummary": "entrodrop_prep.publish.push",
    "verify": "entrodrop_prep.verification.run",
    "inspect": "entrodrop_prep.verification.inspect",
    "check_batches": "entrodrop_prep.training.check_batches",
    "BatchCheck": "entrodrop_prep.training.check_batches",
    "recording": "entrodrop_prep.training.recording",
    "MaskedRows": "entrodrop_prep.training.rows",
    "MaskedStream": "entrodrop_prep.training.stream",
    "MaskedLoader": "entrodrop_prep.training.stream",
    "recipe": "entrodrop_prep.trainers",
    "write_schemas": "entrodrop_prep.store.json_schemas",
    "ScoreConfig": "entrodrop_prep.config",
    "MaterializeConfig": "entrodrop_prep.config",
    "PushConfig": "entrodrop_prep.config",
    "Recipe": "entrodrop_prep.config",
    "ServeConfig": "entrodrop_prep.config",
    "EntrodropError": "entrodrop_prep.errors",
    "ArrivalError": "entrodrop_prep.errors",
    "HubError": "entrodrop_prep.errors",
}
_RENAMED = {"inspect": "show"}

if TYPE_CHECKING:
    from entrodrop_prep.config import MaterializeConfig, PushConfig, Recipe, ScoreConfig, ServeConfig
    from entrodrop_prep.errors import ArrivalError, EntrodropError, HubError
    from entrodrop_prep.export.materialize import MaterializeSummary
    from entrodrop_prep.publish.materialize import materialize
    from entrodrop_prep.publish.push import PushSummary, push
    from entrodrop_prep.scoring.run import ScoreSummary, score
    from entrodrop_prep.store.json_schemas import write_schemas
    from entrodrop_prep.trainers import recipe
    from entrodrop_prep.training.check_batches import BatchCheck, check_batches
    from entrodrop_prep.training.recording import recording
    from entrodrop_prep.training.rows import MaskedRows
    from entrodrop_prep.training.stream import MaskedLoader, MaskedStream
    from entrodrop_prep.verification.inspect import show as inspect
    from entrodrop_prep.verification.run import verify

__all__ = [
    "ArrivalError",
    "BatchCheck",
    "EntrodropError",
    "HubError",
    "MaskedLoader",
    "MaskedRows",
    "MaskedStream",
    "MaterializeConfig",
    "MaterializeSummary",
    "PushConfig",
    "PushSummary",
    "Recipe",
    "ScoreConfig",
    "ScoreSummary",
    "ServeConfig",
    "__version__",
    "check_batches",
    "inspect",
    "materialize",
    "push",
    "recipe",
    "recording",
    "score",
    "verify",
    "write_schemas",
]


def __getattr__(name: str) -> Any:
    if name not in _NAMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_NAMES[name]), _RENAMED.get(name, name))
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
