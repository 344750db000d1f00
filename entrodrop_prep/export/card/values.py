"""What the front matter says beside the configurations: features and counts of each, licence, languages, size."""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from entrodrop_prep.store.layout import PLAIN, VALIDATION
from entrodrop_prep.store.schema import masked_schema
from entrodrop_prep.store.scored import ScoredDataset
from entrodrop_prep.store.shards import reading

TAGS = ["entrodrop", "token-dropout", "entropy", "tokenized"]
_SIZES = ((10**3, "n<1K"), (10**4, "1K<n<10K"), (10**5, "10K<n<100K"), (10**6, "100K<n<1M"), (10**7, "1M<n<10M"))
_SIZES_ABOVE = ((10**8, "10M<n<100M"), (10**9, "100M<n<1B"), (10**10, "1B<n<10B"), (10**11, "10B<n<100B"))
_LICENCE = ("license", "license_name", "license_link")
UNKNOWN = "unknown"
"""The Hub's identifier of a licence that is none."""
_NAMES = {
    **{"halffloat": "float16", "float": "float32", "double": "float64"},
    **{"date32[day]": "date32", "date64[ms]": "date64"},
}
"""Arrow types that ``datasets`` calls by another name."""


def infos(manifest: dict[str, Any]) -> list[dict[str, Any]]:
    """``dataset_info`` of each configuration. A wrong number of rows makes ``datasets`` refuse to load it."""
    schema = masked_schema(manifest["identity"].get("add_columns", ()))
    files: dict[str, list[dict[str, Any]]] = {}
    for entry in manifest["files"]:
        files.setdefault(entry["file"].split("/")[0], []).append(entry)
    epochs = [e["folder"] for e in manifest["epochs"]]
    parts = {"all": epochs, **{e: [e] for e in epochs}, **({PLAIN: [PLAIN]} if PLAIN in manifest else {})}
    features = [_feature(f) for f in schema]
    infos = []
    for name, folders in parts.items():
        splits = {"train": [e for folder in folders for e in files[folder]]}
        if VALIDATION in manifest:
            splits[VALIDATION] = files[VALIDATION]
        infos.append(_info(name, features, splits, {s: _bytes(f, schema) for s, f in splits.items()}))
    return infos


def scored_infos(name: str, scored: ScoredDataset) -> list[dict[str, Any]]:
    """``dataset_info`` of a scored directory. Its bytes are those that the Parquet footers give, uncompressed."""
    size = 0
    for entry in scored.files:
        path = scored.directory / entry["file"]
        with reading(path):
            found = pq.read_metadata(path)
        size += sum(found.row_group(i).total_byte_size for i in range(found.num_row_groups))
    return [_info(name, [_feature(f) for f in scored.schema], {"train": scored.files}, {"train": size})]


def _info(
    name: str, features: list[dict[str, Any]], splits: dict[str, list[dict[str, Any]]], sizes: dict[str, int]
) -> dict[str, Any]:
    """One configuration: the manifest's entries of each split's files, and the bytes of its rows."""
    return {
        "config_name": name,
        "features": [dict(f) for f in features],
        "splits": [
            {"name": s, "num_bytes": sizes[s], "num_examples": _sum(files, "rows")} for s, files in splits.items()
        ],
        "download_size": sum(_sum(files, "bytes") for files in splits.values()),
        "dataset_size": sum(sizes.values()),
    }


def values(manifest: dict[str, Any]) -> dict[str, Any]:
    """Keys that the user may change, of a masked dataset. What is not known is left out."""
    return values_of(scored_of(manifest), sum(e["rows"] for e in manifest["epochs"]))


def values_of(scored: list[dict[str, Any]], rows: int) -> dict[str, Any]:
    """As ``values``, of ``rows`` rows that come from these scores, each as ``provenance.summary_of`` describes it."""
    sources = [s["source"] for s in scored]
    licences = [tuple(s.get("card", {}).get(key) for key in _LICENCE) for s in sources]
    one = dict(zip(_LICENCE, licences[0], strict=True)) if len({str(found) for found in licences}) == 1 else {}
    languages = dict.fromkeys(code for s in sources for code in s.get("card", {}).get("language", []))
    hub = dict.fromkeys(s["identity"]["source"]["dataset"] for s in scored if is_hub(s))
    found = {
        **(one if is_known(one.get("license")) else {}),
        "language": list(languages),
        "source_datasets": list(hub),
        "task_categories": ["text-generation"],
        "size_categories": [next((name for top, name in (*_SIZES, *_SIZES_ABOVE) if rows < top), "100B<n<1T")],
        "tags": TAGS,
    }
    return {key: value for key, value in found.items() if value}


def is_known(licence: Any) -> bool:
    """Whether this names a licence: the Hub has an identifier for not knowing it."""
    return bool(licence) and licence not in (UNKNOWN, [UNKNOWN])


def scored_of(manifest: dict[str, Any]) -> list[dict[str, Any]]:
    """What the manifest says of each scored directory whose rows are in the dataset, validation included."""
    infos = manifest["scored"]
    validation = manifest.get(VALIDATION, {})
    return [*(infos if isinstance(infos, list) else [infos]), *([validation] if "source" in validation else [])]


def is_hub(scored: dict[str, Any]) -> bool:
    """Whether its rows came from the Hub."""
    return bool(scored.get("identity", {}).get("source", {}).get("kind") == "hub")


def _feature(field: pa.Field) -> dict[str, Any]:
    """A column as ``datasets`` writes it in YAML."""
    kind = _kind(field.type)
    return {"name": field.name, **({"struct": kind} if isinstance(kind, list) else kind)}


def _kind(kind: pa.DataType) -> dict[str, Any] | list[dict[str, Any]]:
    """A type: the fields of a struct, or a table that says whether it is a list."""
    if pa.types.is_struct(kind):
        return [_feature(f) for f in kind]
    if pa.types.is_list(kind):
        inner = _kind(kind.value_type)
        return {"list": inner["dtype"] if isinstance(inner, dict) and "dtype" in inner else inner}
    return {"dtype": _NAMES.get(str(kind), str(kind))}


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
