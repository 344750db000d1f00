"""A Hub dataset read row by row over the network: nothing of it is stored."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from entrodrop_prep.errors import SourceError
from entrodrop_prep.sources.rows import Chunk, Source, SourceRow
from entrodrop_prep.sources.tables import Rows

if TYPE_CHECKING:
    import pyarrow as pa

PEEK = 100


class StreamSource(Source):
    """A ``datasets.IterableDataset``, read forwards. It resumes from what ``datasets`` calls its state."""

    def __init__(
        self,
        dataset: Any,
        *,
        name: str,
        label: str,
        identity: dict[str, Any],
        limit: int | None,
        refused: Callable[[Exception], SourceError],
        errors: tuple[type[Exception], ...],
        max_row_bytes: int,
    ) -> None:
        """Reads the first rows. refused: makes an error of ours of one of ``errors`` while reading."""
        self._dataset, self._label, self._identity, self._limit = dataset.with_format("arrow"), label, identity, limit
        self._refused, self._errors, self._longest = refused, errors, max_row_bytes
        self._held: _Held | None = None
        self.name = name
        first = next(self._tables(self._dataset, PEEK), None)
        if first is None:
            raise SourceError("holds no rows", where=label, fix="give a source with at least one row")
        declared = list(dataset.features or ())
        self.columns = list(dict.fromkeys([*first.column_names, *declared]))
        known = (dataset.info.splits or {}).get(identity["split"])
        total = known.num_examples if known else None
        self.total_rows = total if limit is None or total is None else min(limit, total)
        self.size_bytes = None

    def identity(self) -> dict[str, Any]:
        return self._identity

    def stat(self) -> dict[str, Any]:
        return {"revision": self._identity["revision"]}

    def read(
        self,
        first: int,
        count: int,
        position: dict[str, Any] | None,
        columns: Sequence[str] | None = None,
        at_most: int | None = None,
    ) -> Chunk:
        stop = first + count if self._limit is None else min(first + count, self._limit)
        held, self._held = self._held, None
        if held is None or (held.first, held.count) != (first, count):
            held = _Held(first, count, self._begin_at(first, count, position))
        table, state = held.table, None
        if table is not None:
            state = held.dataset.state_dict()  # of the row behind this table: nothing was read ahead yet
            held.table = next(held.tables, None)
        rows = [] if table is None else self._parsed(table.slice(0, max(0, stop - first)), first, columns)
        if held.table is None or first + len(rows) == self._limit:
            return Chunk(rows, None, 0)
        held.first = first + len(rows)
        self._held = held
        return Chunk(rows, {"row": held.first, "state": state}, 0)

    def _begin_at(self, first: int, count: int, position: dict[str, Any] | None) -> tuple[Any, Iterator[pa.Table]]:
        """A dataset that begins at a row, and its tables."""
        dataset = self._dataset
        if position and position.get("row") == first and position.get("state"):
            dataset.load_state_dict(position["state"])
        else:
            dataset.load_state_dict(None)
            dataset = dataset.skip(first) if first else dataset
        return dataset, self._tables(dataset, count)

    def _tables(self, dataset: Any, count: int) -> Iterator[pa.Table]:
        try:
            yield from dataset.iter(batch_size=count)
        except self._errors as e:
            raise self._refused(e) from e

    def _parsed(self, table: pa.Table, first: int, columns: Sequence[str] | None) -> list[SourceRow]:
        if columns is not None:
            table = table.select([name for name in table.column_names if name in columns])
        parsed = Rows(table.schema).parse(table, self._longest)
        return [
            SourceRow(n, f"{self._label} row {n}", v, problem)
            for n, ((v, problem), _) in enumerate(parsed, start=first)
        ]


class _Held:
    """The table that begins at row ``first``, read with others of ``count`` rows behind it; None at the end."""

    def __init__(self, first: int, count: int, start: tuple[Any, Iterator[pa.Table]]) -> None:
        self.first, self.count = first, count
        self.dataset, self.tables = start
        self.table = next(self.tables, None)
