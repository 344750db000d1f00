"""What a masked dataset depends on, as its manifest and its footers have it."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from entrodrop_prep.config import MaterializeConfig, Recipe, identity
from entrodrop_prep.masking import quantile
from entrodrop_prep.masking.counter import FORMAT_VERSION
from entrodrop_prep.masking.curriculum import horizon
from entrodrop_prep.store.schema import MASKED

ADDED = ("plain_config", "add_columns", "rows_multiple", "pack", "eval_fraction")
"""Settings that the identity holds only where they are given: it is then as it was before there were these."""


def identity_of(sources: dict[str, Any], config: MaterializeConfig) -> dict[str, Any]:
    """What the masked files depend on: ``sources``, which say what the rows are, the recipe, how files are laid out."""
    settings = identity(config)
    for name in ADDED:
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


def recipe_values(recipe: Recipe) -> dict[str, Any]:
    """The recipe as plain JSON values."""
    values = {k: v for k, v in asdict(recipe).items() if k in Recipe.__dataclass_fields__}
    return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}
