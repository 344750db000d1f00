"""Digests: of bytes, of JSON, and of a table's content whatever file or batches hold it."""

from __future__ import annotations

import functools
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

_ONES = 1 << 20


def of_json(value: Any) -> str:
    """SHA-256 of a JSON value in canonical form (sorted keys, no spaces, UTF-8)."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def of_file(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


class ContentDigest:
    """SHA-256 of a table's content: column names, types, lengths, nulls and values.

    It does not depend on compression, encoding, row groups or how the rows come in batches.
    """

    def __init__(self, schema: pa.Schema) -> None:
        self._schema = schema
        self._streams: dict[str, Any] = {}
        self._ones: dict[str, int] = {}

    def update(self, batch: pa.RecordBatch | pa.Table) -> None:
        """Add rows. ``batch`` has the columns of the schema."""
        for part in batch.to_batches() if isinstance(batch, pa.Table) else [batch]:
            for field in self._schema:
                self._walk(field.name, part.column(field.name))

    def hexdigest(self) -> str:
        """The digest of the rows so far, 64 hex digits."""
        streams = self._streams | {name: _hash_of_ones(n) for name, n in self._ones.items()}
        parts = {name: h.hexdigest() for name, h in sorted(streams.items())}
        return of_json({"columns": [[f.name, str(f.type)] for f in self._schema], "streams": parts})

    def _feed_ones(self, name: str, n: int) -> None:
        """Add n bytes of 1, which are only counted while a stream holds nothing else."""
        if name in self._streams:
            self._streams[name].update(np.ones(n, np.uint8).data)
        else:
            self._ones[name] = self._ones.get(name, 0) + n

    def _feed(self, name: str, values: np.ndarray[Any, Any]) -> None:
        if name not in self._streams:
            self._streams[name] = _hash_of_ones(self._ones.pop(name, 0)).copy()
        self._streams[name].update(np.ascontiguousarray(values).data)

    def _walk(self, name: str, array: pa.Array) -> None:
        kind = array.type
        if isinstance(array, pa.ExtensionArray):
            return self._walk(name, array.storage)
        if pa.types.is_dictionary(kind):
            return self._walk(name, array.dictionary_decode())
        if array.null_count:
            self._feed(name + "?", pc.is_valid(array).cast(pa.uint8()).to_numpy(zero_copy_only=False))
        else:
            self._feed_ones(name + "?", len(array))
        if pa.types.is_null(kind):
            return None
        if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_map(kind):
            lengths = pc.list_value_length(array) if not pa.types.is_map(kind) else _map_lengths(array)
            self._feed(name + "#", lengths.fill_null(0).cast(pa.int64()).to_numpy(zero_copy_only=False))
            return self._walk(name + "[]", array.flatten() if not pa.types.is_map(kind) else _map_items(array))
        if pa.types.is_fixed_size_list(kind):
            return self._walk(name + "[]", array.flatten())
        if pa.types.is_struct(kind):
            for i, child in enumerate(array.flatten()):
                self._walk(f"{name}.{kind.field(i).name}", child)
            return None
        if pa.types.is_boolean(kind):
            return self._feed(name, array.fill_null(False).cast(pa.uint8()).to_numpy(zero_copy_only=False))
        if pa.types.is_integer(kind) or pa.types.is_floating(kind):
            values = _numbers(array)
            if kind == pa.int8() and (values == 1).all():
                return self._feed_ones(name, len(values))
            return self._feed(name, values)
        if pa.types.is_temporal(kind):
            return self._feed(name, _numbers(array.cast(pa.int64() if kind.bit_width == 64 else pa.int32())))
        binary = array.cast(pa.string()) if not _is_text(kind) else array
        binary = binary.cast(pa.large_binary()).fill_null(b"")
        self._feed(name + "#", pc.binary_length(binary).to_numpy(zero_copy_only=False))
        start, stop = (
            np.frombuffer(binary.buffers()[1], np.int64)[[binary.offset, binary.offset + len(binary)]]
            if len(binary)
            else (0, 0)
        )
        if stop > start:
            self._feed(name, np.frombuffer(binary.buffers()[2], np.uint8)[start:stop])
        return None


@functools.lru_cache(8)
def _hash_of_ones(n: int) -> Any:
    """SHA-256 over n bytes of 1, which masks of attention and of valid values mostly are. Not to be changed."""
    found, ones = hashlib.sha256(), bytes([1]) * min(n, _ONES)
    for first in range(0, n, _ONES):
        found.update(ones[: n - first])
    return found


def _numbers(array: pa.Array) -> np.ndarray[Any, Any]:
    """Values with nulls as zero, straight from the buffer where there are none."""
    if array.null_count:
        width = array.type.to_pandas_dtype()
        filled = np.frombuffer(array.buffers()[1], width)[array.offset : array.offset + len(array)].copy()
        filled[~pc.is_valid(array).to_numpy(zero_copy_only=False)] = 0
        return filled
    values: np.ndarray[Any, Any] = array.to_numpy(zero_copy_only=False)
    return values


def _is_text(kind: pa.DataType) -> bool:
    return bool(
        pa.types.is_string(kind)
        or pa.types.is_large_string(kind)
        or pa.types.is_binary(kind)
        or pa.types.is_large_binary(kind)
    )


def _map_lengths(array: pa.MapArray) -> pa.Array:
    return pc.list_value_length(array.cast(pa.list_(array.type.field(0))))


def _map_items(array: pa.MapArray) -> pa.Array:
    return array.cast(pa.list_(array.type.field(0))).flatten()
