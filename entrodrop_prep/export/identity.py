"""What a masked dataset depends on, as its manifest and its footers have it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from entrodrop_prep.config import MaterializeConfig, Recipe, build, identity
from entrodrop_prep.masking import quantile
from entrodrop_prep.masking.counter import FORMAT_VERSION
from entrodrop_prep.masking.curriculum import horizon
from entrodrop_prep.masking.sources import arguments
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


def config_of(
    described: dict[str, Any], given: Mapping[str, str], others: Mapping[str, str], **more: Any
) -> MaterializeConfig:
    """The settings that a masked directory was made with, as its manifest says. Raises ConfigError.

    Args:
        described: the manifest.
        given: the directory of each of its sources, by name.
        others: the same of the scores that these were compared with.
        more: settings that no manifest holds, ``out`` among them.
    """
    identity = described["identity"]
    stored = {name: identity[name] for name in (*ADDED, "rows_per_shard", "compression") if name in identity}
    sources = arguments(identity, given, others)
    return build(MaterializeConfig, {**described["recipe"], **stored, **sources, **more})


def recipe_values(recipe: Recipe) -> dict[str, Any]:
    """The recipe as plain JSON values."""
    values = {k: v for k, v in asdict(recipe).items() if k in Recipe.__dataclass_fields__}
    return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}
