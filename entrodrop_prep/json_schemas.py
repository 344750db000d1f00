"""JSON Schemas of everything on disk, made from the declarations in ``config`` and ``schema``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from entrodrop_prep.config import EXTRA_COLUMNS, MaterializeConfig, Recipe, model_of
from entrodrop_prep.schema import MASKED, SCORED, SCORED_BOUNDS, Estimator, json_schema, masked_schema, scored_schema
from entrodrop_prep.shards import local_directory, write_bytes

DIALECT = "https://json-schema.org/draft/2020-12/schema"
_SHA = {"type": "string", "pattern": "^[0-9a-f]{64}$"}


def schemas() -> dict[str, dict[str, Any]]:
    """File name -> JSON Schema."""
    return {
        "scored.json": _scored(SCORED, "exact"),
        "scored-bounds.json": _scored(SCORED_BOUNDS, "topk"),
        "masked.json": json_schema(masked_schema(EXTRA_COLUMNS), MASKED)
        | {"required": masked_schema().names, "additionalProperties": False},
        "recipe.json": _recipe(),
        "manifest.json": _manifest(),
    }


def write_schemas(directory: str) -> list[Path]:
    """Write every schema into a directory; returns the paths."""
    out = local_directory(directory)
    written = []
    for name, content in schemas().items():
        write_bytes(out / name, json.dumps(content, indent=2, ensure_ascii=False).encode() + b"\n")
        written.append(out / name)
    return written


def _scored(title: str, estimator: Estimator) -> dict[str, Any]:
    """A row of a scored shard."""
    return json_schema(scored_schema("float32", with_id=True, estimator=estimator), title) | {
        "required": scored_schema("float32", logprob=False, estimator=estimator).names
    }


def _recipe() -> dict[str, Any]:
    """A recipe file: any subset of these settings."""
    schema: dict[str, Any] = model_of(MaterializeConfig).model_json_schema()
    names = [*Recipe.__dataclass_fields__, "rows_per_shard", "compression"]
    return {
        "$schema": DIALECT,
        "title": "recipe/1",
        "description": "Settings of `entrodrop materialize --recipe FILE` (YAML or JSON). Flags win over the file.",
        "type": "object",
        "properties": {n: schema["properties"][n] for n in names},
        "additionalProperties": False,
    }


def _manifest() -> dict[str, Any]:
    """manifest.json of both kinds of directory."""
    common = {
        "schema": {"enum": [SCORED, SCORED_BOUNDS, MASKED]},
        "generator": {"type": "string"},
        "identity": {"type": "object", "description": "What the content depends on; must match to continue a run."},
        "content_digest": {**_SHA, "description": "What the dataset is known by, whatever files hold it."},
        "manifest_digest": {**_SHA, "description": "SHA-256 of this file's bytes with these 64 digits zeroed."},
        "files": {
            "type": "array",
            "items": {
                "type": "object",
                "properties": {
                    "file": {"type": "string", "description": "Relative path."},
                    "bytes": {"type": "integer"},
                    "sha256": _SHA,
                    "rows": {"type": "integer"},
                    "tokens": {"type": "integer"},
                    "content_digest": _SHA,
                    "epoch": {"type": "integer"},
                    "part": {"enum": ["plain", "validation"], "description": "In place of the epoch."},
                    "trainable_tokens": {"type": "integer"},
                },
                "required": ["file", "bytes", "sha256"],
                "additionalProperties": False,
            },
        },
    }
    scored = {
        "environments": "array",
        "source": "object",
        "model": "object",
        "tokenizer": "object",
        "counts": "object",
    }
    only: dict[str, dict[str, Any]] = {
        SCORED: scored,
        SCORED_BOUNDS: scored,
        MASKED: {"recipe": "object", "scored": ["object", "array"], "epochs": "array", "rows_without_loss": "integer"},
    }
    open_share = {
        "type": "number",
        "description": "Experimental. Share of the trainable tokens of which bounds leave open whether they may be "
        "dropped; only where masks were made from bounds and look at them.",
    }
    others = {
        "plain": {"type": "object", "description": "Figures of the configuration `plain`, if it was asked for."},
        "validation": {
            "type": "object",
            "description": "Figures and origin of the split `validation`, if there is one.",
        },
    }
    derived = {
        "type": "array",
        "description": "Files that --layout derived from the epochs, if any.",
        "items": {
            "type": "object",
            "properties": {
                "layout": {"enum": ["concatenated", "jsonl"]},
                "file": {"type": "string", "description": "Relative path."},
                "bytes": {"type": "integer"},
                "sha256": _SHA,
            },
            "required": ["layout", "file", "bytes", "sha256"],
            "additionalProperties": False,
        },
    }
    told = {
        "entropy_histogram": {
            "type": "object",
            "description": "Trainable tokens by entropy: bin i counts those from i / bins_per_nat nats on, below the "
            "next bin; the 128th takes all above. Each row of a masked source counts once.",
            "properties": {
                "bins_per_nat": {"type": "integer"},
                "counts": {"type": "array", "items": {"type": "integer"}},
            },
            "required": ["bins_per_nat", "counts"],
        },
        "environments": {
            "type": "array",
            "description": "Versions that the files were written with, each set of them once.",
            "items": {"type": "object"},
        },
    }
    notes: dict[str, Any] = {
        "notes": {
            "type": "object",
            "description": "What was warned of, and of how many rows; only where there was anything.",
            "additionalProperties": {"type": "integer"},
        },
    }
    optional: dict[str, dict[str, Any]] = {
        SCORED: notes,
        SCORED_BOUNDS: notes,
        MASKED: {"open_share": open_share, **others, "derived": derived, **told},
    }
    return {
        "$schema": DIALECT,
        "title": "manifest/1",
        "type": "object",
        "properties": common,
        "required": list(common),
        "oneOf": [
            {
                "properties": {
                    "schema": {"const": kind},
                    **{n: {"type": t} for n, t in fields.items()},
                    **optional.get(kind, {}),
                },
                "required": list(fields),
            }
            for kind, fields in only.items()
        ],
    }
