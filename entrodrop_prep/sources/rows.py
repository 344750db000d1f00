"""What a source gives: numbered rows, in chunks.

A source numbers its rows from 0 in one fixed order. It is read in spans; each chunk says where the next one begins, so
that a later process resumes there without reading what is before, where the format can seek.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class SourceRow:
    """One row of the source.

    row_id: position in the source, from 0; broken rows count too.
    where: for messages, relative to the source's root: ``train.jsonl:17`` (line, from 1), ``data.parquet row 5``
        (row of the file, from 0), ``org/name[train] row 5``.
    values: column name -> value as plain Python objects (null is None); None where ``problem`` is set.
    problem: why the row cannot be read, in one line; None for a good row.
    """

    row_id: int
    where: str
    values: dict[str, Any] | None
    problem: str | None


@dataclass(frozen=True)
class Chunk:
    """Rows in order, and where the row after them is found.

    rows: at most as many as were asked for; fewer only at the end of the source, and where ``at_most`` bytes were.
    next: small JSON object for ``Source.read(position=...)``; None when no row follows. It holds that row's number.
    bytes_read: the source's bytes from the chunk's first row to the next chunk's, for showing progress; over a whole
        source they add up to ``size_bytes``. Of compressed files it is what was taken in by then, so a resumed run may
        divide it among the chunks a little differently.
    """

    rows: list[SourceRow]
    next: dict[str, Any] | None
    bytes_read: int


@dataclass(frozen=True)
class Block:
    """Some rows of a sample: ``count`` of them are in ``size`` bytes or rows of the source.

    ``rows``, which may be fewer, take ``taken`` of the source themselves: more than ``size``, where they reach beyond.
    """

    rows: list[SourceRow]
    count: int
    size: float
    taken: float


class Source(ABC):
    """Rows that can be read in spans. Made by ``open_source``.

    name: basename of the file, directory or pattern, or the Hub id.
    columns: declared columns; where a format declares none (JSON), the keys of the first 100 rows by first appearance.
    total_rows: number of rows, ``--limit`` included; None where only reading everything would show it.
    size_bytes: bytes of all files; for a Hub dataset or a saved one, of its Arrow data; None where nobody knows.
    card: what a Hub dataset's card says of licence and languages; empty for others.
    """

    name: str
    columns: list[str]
    total_rows: int | None
    size_bytes: int | None
    card: dict[str, Any] | None = None

    @property
    def direct(self) -> bool:
        """Whether any row is found by its number, without reading those before it."""
        return False

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """What the rows are, as plain JSON: kind, relative file names and sizes in order, or Hub id and revision.

        Holds no time, host or absolute path.
        """

    @abstractmethod
    def stat(self) -> dict[str, Any]:
        """What a quick look can show of a change: size and mtime_ns per file, asked for again at each call."""

    def check_unchanged(self, *, remote: bool = False) -> bool:
        """Whether the files are certainly those that were opened; False where only their rows can show it.

        remote: whether to ask for files that are not here, which takes a request each.

        Raises SourceError for a file whose size, time of change or inode is another.
        """
        return True

    def check(self, columns: Sequence[str]) -> None:
        """Raises SourceError where files of the source have types for one of these columns that do not go together."""
        return None

    @abstractmethod
    def read(
        self,
        first: int,
        count: int,
        position: dict[str, Any] | None,
        columns: Sequence[str] | None = None,
        at_most: int | None = None,
    ) -> Chunk:
        """Rows ``first`` to ``first + count - 1``, fewer at the end of the source.

        position: ``Chunk.next`` of the chunk that ended before ``first``, of this process or an earlier one. Without it
            the rows before ``first`` are skipped. A source that already is at ``first`` continues from there.
        columns: columns to read where the format stores columns (Parquet, Arrow); None reads all. Other formats always
            give whole rows.
        at_most: bytes after which the chunk ends, if rows so large are among those asked for; ``Chunk.next`` is where
            it continues.

        Raises SourceError for a file that is damaged or cannot be read; a single bad row comes with ``problem`` set.
        """

    def positions(self, every: int, position: dict[str, Any] | None = None) -> Iterator[dict[str, Any]]:
        """``Chunk.next`` of each span of ``every`` rows, from the start of the source or behind one of them.

        Rows are found, not parsed, where the format allows that. Raises as ``read`` does.
        """
        row = position["row"] if position else 0
        left = every
        while (chunk := self.read(row, left, position, self.columns[:1])).next is not None:
            row, left, position = row + len(chunk.rows), left - len(chunk.rows), chunk.next
            if not left:
                yield position
                left = every
