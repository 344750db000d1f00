"""Every setting, declared once.

The dataclasses here are the only declaration: the command line's flags, the recipe file, the JSON Schemas and the
table in the docs are all made from their fields (see ``entrodrop_prep.config.settings``).

``Setting.role`` says what a setting means for resuming a run: an ``identity`` setting changes the stored result, so a
run can only be continued with the same value; an ``operation`` setting (batch size, what to do with bad rows) may
differ.
"""

from entrodrop_prep.config.masking import EXTRA_COLUMNS, RECIPE_FIELDS, MaterializeConfig, Recipe, read_recipe
from entrodrop_prep.config.publishing import PushConfig
from entrodrop_prep.config.scoring import ScoreConfig, ServeConfig
from entrodrop_prep.config.settings import Setting, build, flag, identity, model_of, settings
from entrodrop_prep.config.training import RecipeConfig, TrainingConfig

__all__ = [
    "EXTRA_COLUMNS",
    "RECIPE_FIELDS",
    "MaterializeConfig",
    "PushConfig",
    "Recipe",
    "RecipeConfig",
    "ScoreConfig",
    "ServeConfig",
    "Setting",
    "TrainingConfig",
    "build",
    "flag",
    "identity",
    "model_of",
    "read_recipe",
    "settings",
]
