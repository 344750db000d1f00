"""The Arrow schemas of what is on disk: the one declaration; ``schemas/*.json`` is generated from it.

``scored/1``   one row per window of a source row, with the scores of its tokens
``masked/1``   one row per training example, plain columns that every trainer reads

List columns of one row are all of one length T, and index t of each belongs to token t (but ``seq_lengths``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa

from entrodrop_prep.errors import IntegrityError

SCORED = "scored/1"
MASKED = "masked/1"
META_KEY = b"entrodrop"
DIALECT = "https://json-schema.org/draft/2020-12/schema"
ALIGNMENT = "value t belongs to the prediction of token t from tokens 0..t-1"

_DOC = {
    "row_id": "position in the source, from 0",
    "id": "the source's own name of the row; unique",
    "window": "0, or the number of the window of a document that was split",
    "input_ids": "token ids of the training tokenizer",
    "entropy": "nats; H(p(. | tokens 0..t-1)) over the full vocabulary; "
    + ALIGNMENT
    + "; null at position 0 and on repeated context",
    "logprob": "nats; log p(token t | tokens 0..t-1); same alignment, same nulls",
    "loss_mask": "true = may be trained on; false at position 0",
    "attention_mask": "1 everywhere: rows are not padded",
    "labels": "unshifted; -100 = no loss; else the token that stood at t before masking",
    "n_trainable": "tokens of the row that may be trained on, those that were dropped among them",
    "position_ids": "place of token t in its document: from 0, and from 0 again where another begins",
    "seq_lengths": "tokens of each document of the row, in order; they add up to T",
}
_UNIT = dict.fromkeys(("entropy", "logprob"), "nats")


def family(schema: str) -> str:
    """``scored`` or ``masked``: what a directory of this schema is, whatever its version."""
    return schema.split("/")[0]


def score_columns(*, logprob: bool = True) -> tuple[str, ...]:
    """Names of the score columns, in the order in which they stand and in which a backend gives them."""
    return ("entropy", "logprob") if logprob else ("entropy",)


def _field(name: str, kind: pa.DataType) -> pa.Field:
    meta = {"description": _DOC[name], **({"unit": _UNIT[name]} if name in _UNIT else {})}
    return pa.field(name, kind, nullable=False, metadata=meta)


def _list(kind: pa.DataType, *, nullable: bool = False) -> pa.DataType:
    return pa.list_(pa.field("element", kind, nullable=nullable))


def scored_schema(
    score_dtype: str,
    *,
    logprob: bool = True,
    with_id: bool = False,
    kept: Sequence[pa.Field] = (),
) -> pa.Schema:
    """Schema of a scored shard.

    Args:
        score_dtype: ``float16`` or ``float32``, the type of the score columns.
        logprob: whether the ``logprob`` column is there.
        with_id: whether the ``id`` column is there.
        kept: source columns carried along, in order.

    Raises IntegrityError for another ``score_dtype``, as a directory of another version might have.
    """
    kinds = {"float16": pa.float16(), "float32": pa.float32()}
    if score_dtype not in kinds:
        raise IntegrityError(f"scores are said to be {score_dtype!r}, this version knows {' and '.join(kinds)}")
    score = _list(kinds[score_dtype], nullable=True)
    fields = [_field("row_id", pa.int64())]
    if with_id:
        fields.append(_field("id", pa.string()))
    fields += [
        _field("window", pa.int32()),
        _field("input_ids", _list(pa.int32())),
        *(_field(name, score) for name in score_columns(logprob=logprob)),
        _field("loss_mask", _list(pa.bool_())),
        *kept,
    ]
    return pa.schema(fields, metadata={"schema": SCORED, "alignment": ALIGNMENT, "score_unit": "nats"})


def masked_schema(extra: Sequence[str] = ()) -> pa.Schema:
    """Schema of a masked dataset's files: exactly the three columns that trainers take, and the ``extra`` asked for.

    Raises IntegrityError for an extra column that is unknown, as a directory of another version might have.
    """
    more = {"n_trainable": pa.int32(), "position_ids": _list(pa.int32()), "seq_lengths": _list(pa.int32())}
    for name in extra:
        if name not in more:
            raise IntegrityError(f"a column is said to be {name!r}, this version knows {', '.join(more)} to add")
    return pa.schema(
        [
            _field("input_ids", _list(pa.int32())),
            _field("attention_mask", _list(pa.int8())),
            _field("labels", _list(pa.int32())),
            *(_field(name, more[name]) for name in extra),
        ],
        metadata={"schema": MASKED, "label_unit": "token id, -100 = no loss"},
    )


RESERVED = tuple(dict.fromkeys([*scored_schema("float32", with_id=True).names, *masked_schema().names]))


def check_schema(found: pa.Schema, expected: pa.Schema, where: str) -> None:
    """Raises IntegrityError unless ``found`` has the names, types and schema version of ``expected``."""
    version = (found.metadata or {}).get(b"schema", b"none").decode()
    wanted = expected.metadata[b"schema"].decode()
    if version != wanted:
        raise IntegrityError(
            f"its schema is {version!r}, this version reads {wanted!r}",
            where=where,
            fix="make it again with this version",
        )
    if found.names != expected.names:
        raise IntegrityError(f"its columns are {found.names}, expected {expected.names}", where=where)
    for have, want in zip(found, expected, strict=True):
        if not have.type.equals(want.type):
            raise IntegrityError(f"column {want.name} is {have.type}, expected {want.type}", where=where)


def json_schema(schema: pa.Schema, title: str) -> dict[str, Any]:
    """A JSON Schema of one row, for readers that do not speak Arrow."""
    rows = {f.name: {**_json_type(f.type), **_described(f.metadata)} for f in schema}
    return {
        "$schema": DIALECT,
        "title": title,
        "description": f"One row of {title}. Arrow types are given as `arrow`.",
        "type": "object",
        "properties": rows,
        "required": schema.names,
    }


def _described(meta: Mapping[bytes, bytes] | None) -> dict[str, str]:
    return {k.decode(): v.decode() for k, v in (meta or {}).items() if k in (b"description", b"unit")}


def _json_type(kind: pa.DataType) -> dict[str, Any]:
    if pa.types.is_list(kind):
        items = _json_type(kind.value_type)
        if kind.value_field.nullable:
            items["type"] = [items["type"], "null"]
        return {"type": "array", "items": items, "arrow": f"list<{kind.value_type}>"}
    if pa.types.is_boolean(kind):
        name = "boolean"
    elif pa.types.is_integer(kind):
        name = "integer"
    else:
        name = "number" if pa.types.is_floating(kind) else "string"
    return {"type": name, "arrow": str(kind)}
