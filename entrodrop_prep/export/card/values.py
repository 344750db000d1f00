"""What the front matter says beside the configurations: features and counts of each, licence, languages, size."""

from __future__ import annotations

from typing import Any

import pyarrow as pa

from entrodrop_prep.export.epoch import PLAIN, VALIDATION
from entrodrop_prep.schema import masked_schema

TAGS = ["entrodrop", "token-dropout", "entropy", "tokenized"]
_SIZES = ((10**3, "n<1K"), (10**4, "1K<n<10K"), (10**5, "10K<n<100K"), (10**6, "100K<n<1M"), (10**7, "1M<n<10M"))
_SIZES_ABOVE = ((10**8, "10M<n<100M"), (10**9, "100M<n<1B"), (10**10, "1B<n<10B"), (10**11, "10B<n<100B"))
_LICENCE = ("license", "license_name", "license_link")


def infos(manifest: dict[str, Any]) -> list[dict[str, Any]]:
    """``dataset_info`` of each configuration. A wrong number of rows makes ``datasets`` refuse to load it."""
    schema = masked_schema(manifest["identity"].get("add_columns", ()))
    files: dict[str, list[dict[str, Any]]] = {}
    for entry in manifest["files"]:
        files.setdefault(entry["file"].split("/")[0], []).append(entry)
    epochs = [e["folder"] for e in manifest["epochs"]]
    parts = {"all": epochs, **{e: [e] for e in epochs}, **({PLAIN: [PLAIN]} if PLAIN in manifest else {})}
    features = [_feature(f) for f in schema]
    told = []
    for name, folders in parts.items():
        splits = {"train": [e for folder in folders for e in files[folder]]}
        if VALIDATION in manifest:
            splits[VALIDATION] = files[VALIDATION]
        counts = [
            {"name": s, "num_bytes": _bytes(f, schema), "num_examples": _sum(f, "rows")} for s, f in splits.items()
        ]
        told.append(
            {
                "config_name": name,
                "features": [dict(f) for f in features],
                "splits": counts,
                "download_size": sum(_sum(f, "bytes") for f in splits.values()),
                "dataset_size": sum(_bytes(f, schema) for f in splits.values()),
            }
        )
    return told


def values(manifest: dict[str, Any]) -> dict[str, Any]:
    """Keys that the user may change. What is not known is left out."""
    scored = scored_of(manifest)
    sources = [s["source"] for s in scored]
    licences = [tuple(s.get("card", {}).get(key) for key in _LICENCE) for s in sources]
    one = dict(zip(_LICENCE, licences[0], strict=True)) if len({str(found) for found in licences}) == 1 else {}
    languages = dict.fromkeys(code for s in sources for code in s.get("card", {}).get("language", []))
    hub = dict.fromkeys(s["identity"]["source"]["dataset"] for s in scored if is_hub(s))
    rows = sum(e["rows"] for e in manifest["epochs"])
    found = {
        **one,
        "language": list(languages),
        "source_datasets": list(hub),
        "task_categories": ["text-generation"],
        "size_categories": [next((name for top, name in (*_SIZES, *_SIZES_ABOVE) if rows < top), "100B<n<1T")],
        "tags": TAGS,
    }
    return {key: value for key, value in found.items() if value}


def scored_of(manifest: dict[str, Any]) -> list[dict[str, Any]]:
    """What the manifest tells of each scored directory whose rows are in the dataset, validation included."""
    told = manifest["scored"]
    validation = manifest.get(VALIDATION, {})
    return [*(told if isinstance(told, list) else [told]), *([validation] if "source" in validation else [])]


def is_hub(scored: dict[str, Any]) -> bool:
    """Whether its rows came from the Hub."""
    return bool(scored.get("identity", {}).get("source", {}).get("kind") == "hub")


def _feature(field: pa.Field) -> dict[str, Any]:
    """A column as ``datasets`` writes it in YAML."""
    if pa.types.is_list(field.type):
        return {"name": field.name, "list": str(field.type.value_type)}
    return {"name": field.name, "dtype": str(field.type)}


def _bytes(files: list[dict[str, Any]], schema: pa.Schema) -> int:
    """Of the rows as Arrow data, the way ``datasets`` counts them: values, and 4 bytes a list for its place.

    ``seq_lengths`` counts as one number a row: how many documents a file holds is not told.
    """
    whole = [f for f in schema if f.name != "seq_lengths"]
    lists: list[int] = [f.type.value_type.bit_width // 8 for f in whole if pa.types.is_list(f.type)]
    plain: int = sum(f.type.bit_width // 8 for f in whole if not pa.types.is_list(f.type)) + 8 * (
        len(schema) - len(whole)
    )
    return sum(lists) * _sum(files, "tokens") + (4 * len(lists) + plain) * _sum(files, "rows")


def _sum(files: list[dict[str, Any]], name: str) -> int:
    return sum(int(e[name]) for e in files)
