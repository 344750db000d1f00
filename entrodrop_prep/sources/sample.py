"""A sample of rows from all over a source, and what it says of the whole: for estimates before a run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from entrodrop_prep.errors import ConfigError
from entrodrop_prep.sources.file_source import FileSource
from entrodrop_prep.sources.rows import Block, Source

BLOCKS = 192
BLOCK_ROWS, BLOCK_BYTES = 8, 1 << 14
FIRST_ROWS, MOST_ROWS = 2000, 100_000
"""Read of a stream, and of files, where the first rows of a source are scored and nobody has counted them."""


@dataclass(frozen=True)
class Sample:
    """Blocks of rows, and ``total``: what their ``size`` adds up to over the whole source.

    ``whole``: every row to be scored is in it. ``beginning``: it is of the first of them alone.
    """

    blocks: list[Block]
    total: float
    whole: bool = False
    beginning: bool = False


def sample(source: Source, columns: Sequence[str], limit: int | None, seed: int = 0) -> Sample:
    """Rows from all over a source, the same ones each time; all rows of a small source.

    Args:
        source: what is scored.
        columns: columns to read.
        limit: rows that are read at most, as the source was opened with.
        seed: of where the blocks begin.

    Raises:
        ConfigError: of a stream without ``limit``, whose rows nobody can count.
        SourceError: as ``Source.read``.
    """
    rng = np.random.Generator(np.random.Philox(key=seed))
    rows, few = source.total_rows, BLOCKS * BLOCK_ROWS
    if rows is not None and rows > few:
        starts = ((np.arange(BLOCKS) + rng.random(BLOCKS)) * ((rows - BLOCK_ROWS) / BLOCKS)).astype(int).tolist()
        chunks = [source.read(start, BLOCK_ROWS, None, columns, BLOCK_BYTES).rows for start in starts]
        return Sample([Block(chunk, len(chunk), len(chunk), len(chunk)) for chunk in chunks], rows)
    if rows is None and limit is None and isinstance(source, FileSource):
        size = int(source.size_bytes or 0)
        if size > BLOCKS * BLOCK_BYTES:
            return Sample(list(source.blocks(rng, BLOCKS, BLOCK_BYTES)), size)
    if rows is None and limit is None and not isinstance(source, FileSource):
        raise ConfigError(
            "nobody knows how many rows a stream has", where=source.name, fix="give --limit, or leave out --stream"
        )
    wanted = rows if rows is not None else limit
    most = MOST_ROWS if isinstance(source, FileSource) else FIRST_ROWS
    blocks, position, done, stride = [], None, 0, 1
    while wanted is None or done < min(wanted, most):
        size = BLOCK_ROWS if wanted is None else min(BLOCK_ROWS, wanted - done)
        chunk = source.read(done, size, position, columns)
        count = len(chunk.rows)
        if done // BLOCK_ROWS % stride == 0:
            blocks.append(Block(chunk.rows, count, count, count))
        done, position = done + count, chunk.next
        if len(blocks) == 2 * BLOCKS and wanted != rows:
            blocks, stride = blocks[::2], 2 * stride
        if position is None:
            return Sample(blocks, done, whole=stride == 1)
    if rows is not None or limit is None or limit <= done:
        return Sample(blocks, done, whole=stride == 1)
    total = float(limit)
    if isinstance(source, FileSource):
        parts = list(source.blocks(rng, BLOCKS, BLOCK_BYTES))
        counted = sum(p.count for p in parts) / max(1.0, sum(p.size for p in parts)) * (source.size_bytes or 0)
        total = max(float(done), min(total, counted))
    return Sample(blocks, total, beginning=True)
