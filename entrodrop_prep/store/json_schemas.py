"""JSON Schemas of everything on disk, made from the declarations in ``config`` and ``schema``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from entrodrop_prep.config import EXTRA_COLUMNS, MaterializeConfig, Recipe, model_of
from entrodrop_prep.store.disk import write_bytes
from entrodrop_prep.store.schema import DIALECT, MASKED, SCORED, json_schema, masked_schema, scored_schema
from entrodrop_prep.store.shards import local_directory


def schemas() -> dict[str, dict[str, Any]]:
    """File name -> JSON Schema."""
    return {
        "scored.json": json_schema(scored_schema("float32", with_id=True), SCORED)
        | {"required": scored_schema("float32", logprob=False).names},
        "masked.json": json_schema(masked_schema(EXTRA_COLUMNS), MASKED)
        | {"required": masked_schema().names, "additionalProperties": False},
        "recipe.json": _recipe(),
        "manifest.json": _manifest(),
    }


def write_schemas(directory: str) -> list[Path]:
    """Write every JSON Schema into a directory, which is made if it is not there.

    Returns:
        The paths of the files.

    Raises:
        OutputError: they cannot be written there.
    """
    out = local_directory(directory)
    written = []
    for name, content in schemas().items():
        write_bytes(out / name, json.dumps(content, indent=2, ensure_ascii=False).encode() + b"\n")
        written.append(out / name)
    return written


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
    from pydantic.json_schema import models_json_schema

    from entrodrop_prep.store.manifest_schema import MaskedManifest, ScoredManifest

    _, found = models_json_schema([(ScoredManifest, "validation"), (MaskedManifest, "validation")])
    kinds = [{"$ref": f"#/$defs/{model.__name__}"} for model in (ScoredManifest, MaskedManifest)]
    return {"$schema": DIALECT, "title": "manifest/1", "type": "object", "oneOf": kinds, "$defs": _bare(found["$defs"])}


def _bare(schema: Any) -> Any:
    """Without the titles and defaults that pydantic adds: what may be left out is not to be null."""
    if isinstance(schema, list):
        return [_bare(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    bare = {k: _bare(v) for k, v in schema.items() if k not in ("title", "default", "properties")}
    if "properties" in schema:  # whose keys are names
        bare["properties"] = {name: _bare(v) for name, v in schema["properties"].items()}
    return bare
