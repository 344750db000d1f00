"""The columns of all files of a source together, and whether their types go together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pyarrow as pa

from entrodrop_prep.errors import SourceError


class Union:
    """Columns by first appearance, and each type of a column with the first file that has it."""

    def __init__(self) -> None:
        self._types: dict[str, list[tuple[Any, str]]] = {}

    @property
    def names(self) -> list[str]:
        return list(self._types)

    def add(self, columns: dict[str, Any], file: str) -> None:
        """Add a file's columns: name -> Arrow type, None where its format stores none."""
        for name, kind in columns.items():
            known = self._types.setdefault(name, [])
            if not any(kind is other or (kind is not None and kind.equals(other)) for other, _ in known):
                known.append((kind, file))

    def check(self, names: Sequence[str], where: str) -> None:
        """Raises SourceError for a column whose types in two files have no values in common."""
        for name in names:
            known = [(kind, file) for kind, file in self._types.get(name, []) if kind is not None]
            for kind, file in known[1:]:
                for other, first in known:
                    if kind is not other and not _together(other, kind):
                        raise SourceError(
                            f"column {name!r} is {_short(other)} in {first} and {_short(kind)} in {file}",
                            where=where,
                            fix="write both with one type, or give files of one type as a glob",
                        )


def _short(kind: pa.DataType) -> str:
    text = str(kind)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _together(one: pa.DataType, other: pa.DataType) -> bool:
    """Whether both give the same kind of Python values. Widths, encodings and the keys of structs may differ."""
    kinds = pa.types
    one, other = _plain(one), _plain(other)
    if kinds.is_null(one) or kinds.is_null(other) or one.equals(other):
        return True
    if _is_list(one) and _is_list(other):
        return _together(one.value_type, other.value_type)
    if kinds.is_struct(one) and kinds.is_struct(other):
        theirs = {field.name: field.type for field in other}
        return all(field.name not in theirs or _together(field.type, theirs[field.name]) for field in one)
    if kinds.is_map(one) and kinds.is_map(other):
        return _together(one.key_type, other.key_type) and _together(one.item_type, other.item_type)
    same = (kinds.is_integer, kinds.is_floating, _is_string, _is_binary, kinds.is_decimal)
    return any(test(one) and test(other) for test in same)


def _plain(kind: pa.DataType) -> pa.DataType:
    """The type of the values: JSON may be anything, as a column of nulls."""
    if "arrow.json" in str(kind) and not pa.types.is_nested(kind):
        return pa.null()
    if pa.types.is_dictionary(kind):
        return _plain(kind.value_type)
    return _plain(kind.storage_type) if isinstance(kind, pa.BaseExtensionType) else kind


def _is_list(kind: pa.DataType) -> bool:
    kinds = pa.types
    tests = (kinds.is_list, kinds.is_large_list, kinds.is_fixed_size_list, kinds.is_list_view, kinds.is_large_list_view)
    return any(test(kind) for test in tests)


def _is_string(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def _is_binary(kind: pa.DataType) -> bool:
    kinds = pa.types
    tests = (kinds.is_binary, kinds.is_large_binary, kinds.is_fixed_size_binary, kinds.is_binary_view)
    return any(test(kind) for test in tests)
