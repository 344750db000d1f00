"""Source columns carried into the shards: their types come from the first rows, and later rows must fit them."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from entrodrop_prep.errors import SourceError

# What pyarrow raises for values that have no common type, or not the one that is asked for.
_REFUSALS = (pa.ArrowException, OverflowError, TypeError, ValueError)


def infer_field(name: str, values: Sequence[Any], where: str) -> pa.Field:
    """The Arrow field for a column with these values; string where all are null. Raises SourceError if none fits.

    The type is the one that Parquet gives back, which names the elements of lists its own way.
    """
    if any(_has_maps(value) for value in values):
        raise SourceError(
            f"column {name!r} holds maps, which are not supported",
            where=where,
            fix="leave it out of --keep-columns, or store it as a list of structs",
        )
    stored = io.BytesIO()
    try:
        kind = pa.infer_type(list(values))
        field = pa.field(name, pa.string() if pa.types.is_null(kind) else kind)
        pq.write_table(pa.schema([field]).empty_table(), stored)
        return pa.field(name, pq.read_schema(stored).field(0).type)
    except (*_REFUSALS, OSError) as e:  # of types too deep for Parquet it says OSError
        raise SourceError(
            f"column {name!r} has no one type that can be stored: {e}",
            where=where,
            fix="leave it out of --keep-columns",
        ) from e


def _has_maps(value: Any) -> bool:
    """Whether a map is in a value: pyarrow gives its items as tuples, and nothing else."""
    if isinstance(value, dict):
        return any(_has_maps(item) for item in value.values())
    return isinstance(value, tuple) or (isinstance(value, list) and any(_has_maps(item) for item in value))


def misfits(fields: Sequence[pa.Field], rows: Sequence[Mapping[str, Any]]) -> dict[int, str]:
    """Which of the rows do not fit the fields, by their index in ``rows``, and why, in one line."""
    found: dict[int, str] = {}
    for f in fields:
        if _fits([row.get(f.name) for row in rows], f.type):
            continue
        for i, row in enumerate(rows):
            if not _fits([row.get(f.name)], f.type):
                found.setdefault(i, f"column {f.name!r}, to be kept, is no {f.type} as in the first rows")
    return found


def _fits(values: list[Any], wanted: pa.DataType) -> bool:
    """Whether values can be stored as a type and nothing of them is lost: no digits cut off, no keys dropped."""
    try:
        if not _holds(wanted, pa.infer_type(values)):
            return False
        pa.array(values, wanted)
    except _REFUSALS:
        return False
    return True


def _holds(wanted: pa.DataType, found: pa.DataType) -> bool:
    kinds = pa.types
    if kinds.is_null(found) or found.equals(wanted) or (kinds.is_integer(found) and kinds.is_floating(wanted)):
        return True
    if kinds.is_decimal(found) or kinds.is_timestamp(found):  # of other digits or another time zone
        return bool(found.id == wanted.id)
    if kinds.is_list(found) and kinds.is_list(wanted):
        return _holds(wanted.value_type, found.value_type)
    if kinds.is_struct(found) and kinds.is_struct(wanted):
        types = {f.name: f.type for f in wanted}
        return all(f.name in types and _holds(types[f.name], f.type) for f in found)
    return False
