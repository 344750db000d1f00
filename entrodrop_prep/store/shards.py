"""Parquet shards: written whole or not at all, and their footers, which say whose they are.

A shard is written under ``.tmp-*``, flushed to disk, renamed, and its folder flushed (``disk.renamed_file``). So a file
under its final name is whole, whatever kills the process; leftovers are removed by the next run.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from entrodrop_prep.config.names import user_path
from entrodrop_prep.errors import IntegrityError, OutputError
from entrodrop_prep.store import inside, strict_json
from entrodrop_prep.store.digest import ContentDigest, of_json
from entrodrop_prep.store.disk import renamed_file
from entrodrop_prep.store.manifest_schema import FooterInfo
from entrodrop_prep.store.manifest_types import PART, SHARD, problem_of
from entrodrop_prep.store.schema import META_KEY, check_schema
from entrodrop_prep.store.unsupported import refuse_bounds

SHARD_FOLDER = re.compile(r"epoch_\d{3,}|plain|validation")
SHARD_NAMES = {"scored": re.compile(SHARD), "masked": re.compile(PART)}
"""Names that this program gives to shards, from the directory on, by the directory's kind."""
_AGAIN = "remove it and run the command that made it again"

DAMAGED_FOOTER = "its footer is damaged"
FOOTER_DIGEST = "footer_digest"
"""In a footer, the digest of everything else in it."""
WITHOUT_DIGEST = {
    *("schema", "rows", "content_digest", "shard", "fingerprint", "identity", "environment", "counts", "rejected"),
    *("notes", "source", "epoch", "part", "provenance", "rates", "sources"),
}
"""What earlier versions wrote, which gave their footers no digest."""


@dataclass(frozen=True)
class Footer:
    """What a shard says of itself, read without reading its rows."""

    rows: int
    content_digest: str
    info: dict[str, Any]


def local_directory(out: str) -> Path:
    """The output directory as a path. Raises OutputError for a URL, and for what no Parquet file could be under."""
    if "://" in out:
        raise OutputError(
            "the output cannot be a URL",
            where=out,
            fix="write to a local or shared disk, and copy or push the finished directory",
        )
    if not out.strip():
        raise OutputError("the directory's name is empty", fix="give a directory")
    try:
        out.encode("utf-8")
    except UnicodeEncodeError as e:
        raise OutputError(
            "the directory's name is not UTF-8, and Parquet files cannot be opened by such",
            where=out,
            fix="choose another name",
        ) from e
    return user_path(out)


def shard_names(directory: Path, kind: str) -> list[str]:
    """Names of everything that is named as a shard of a ``scored`` or ``masked`` directory, in order, whatever it is.

    Links to folders are not followed.
    """
    found = []
    with os.scandir(directory) as entries:
        for entry in entries:
            if SHARD_NAMES[kind].fullmatch(entry.name):
                found.append(entry.name)
            elif kind == "masked" and SHARD_FOLDER.fullmatch(entry.name) and entry.is_dir(follow_symlinks=False):
                inside = [f"{entry.name}/{name}" for name in os.listdir(entry.path)]
                found += [name for name in inside if SHARD_NAMES[kind].fullmatch(name)]
    return sorted(found, key=lambda name: (len(name), name))


def write_shard(
    path: Path,
    schema: pa.Schema,
    tables: Iterable[pa.Table],
    info: dict[str, Any] | Callable[[], dict[str, Any]],
    *,
    compression: str = "zstd",
    flush_name: bool = True,
    keep: bool = False,
) -> Footer:
    """Write tables as one Parquet file, one row group each, atomically.

    ``info``, or what it gives once the tables are used up, goes into the footer as JSON, with the row count and the
    content digest added. ``flush_name`` and ``keep`` are those of ``disk.renamed_file``.
    """
    digest, rows = ContentDigest(schema), 0
    with (
        renamed_file(path, flush_name=flush_name, keep=keep) as file,
        _writer(file, schema, compression) as writer,
    ):
        for table in tables:
            digest.update(table)
            rows += table.num_rows
            writer.write_table(table, row_group_size=max(1, table.num_rows))
        described = info() if callable(info) else info
        footer = json.loads(_json({**described, "rows": rows, "content_digest": digest.hexdigest()}))
        writer.add_key_value_metadata({META_KEY.decode(): _json({**footer, FOOTER_DIGEST: of_json(footer)})})
    return Footer(rows, footer["content_digest"], footer)


def column_bytes(found: pq.FileMetaData) -> int:
    """Stored bytes of the rows of a Parquet file, without what is said of them."""
    groups = map(found.row_group, range(found.num_row_groups))
    return sum(g.column(c).total_compressed_size for g in groups for c in range(g.num_columns))


def encoded_bytes(table: pa.Table, compression: str = "zstd") -> int:
    """Size of a table as a file of one row group, but for what its footer says of the run."""
    data = io.BytesIO()
    with _writer(data, table.schema, compression) as writer:
        writer.write_table(table, row_group_size=max(1, table.num_rows))
    return data.getbuffer().nbytes


def _writer(file: Any, schema: pa.Schema, compression: str) -> pq.ParquetWriter:
    options = {"write_page_checksum": True, "write_page_index": True, **encodings(schema, compression)}
    return pq.ParquetWriter(file, schema, compression=compression, **options)


def encodings(schema: pa.Schema, compression: str) -> dict[str, Any]:
    """How the numbers of a file are laid out, as arguments of ``pq.ParquetWriter``; benchmarks/storage.py measures it.

    Scores and ids have high bytes that repeat and low ones that do not: split by byte they are smallest and written
    fastest. Labels are -100 in between, whose bytes are those of no id. A weak codec, or none, needs a dictionary.
    """
    split = ["entropy", "logprob", *(["input_ids"] if compression != "none" else [])]
    tabled = {"zstd": [], "snappy": ["labels"], "none": ["input_ids", "labels"]}[compression]
    return {
        "use_dictionary": [f"{name}.list.element" for name in tabled if name in schema.names],
        "column_encoding": {f"{name}.list.element": "BYTE_STREAM_SPLIT" for name in split if name in schema.names},
    }


def read_footer(path: Path) -> Footer:
    """A shard's footer, checked before it is believed: its own digest, if it has one, and the types of what it says.

    Raises IntegrityError for a file that is no shard of ours.
    """
    with reading(path):
        return _footer(path, pq.read_metadata(path))


def _footer(path: Path, metadata: pq.FileMetaData) -> Footer:
    try:
        info = strict_json.loads((metadata.metadata or {})[META_KEY])
        wrong = None if isinstance(info, dict) else "it is no JSON object"
        claimed = info.pop(FOOTER_DIGEST, None) if wrong is None else None
        if claimed != of_json(info) if claimed is not None else wrong is None and info.keys() - WITHOUT_DIGEST:
            wrong = "it is not what was written"
    except KeyError as e:
        raise IntegrityError("it carries no footer of this program", where=str(path), fix=_AGAIN) from e
    except ValueError as e:
        wrong = str(e)
    wrong = wrong or problem_of(FooterInfo, info)
    if wrong:
        raise IntegrityError(f"{DAMAGED_FOOTER}: {wrong}", where=str(path), fix=_AGAIN)
    refuse_bounds(info, path)
    return Footer(metadata.num_rows, info["content_digest"], info)


def check_file_schema(path: Path, schema: pa.Schema) -> None:
    """A file has the columns, types and schema version that it should. Raises IntegrityError."""
    with reading(path):
        check_schema(pq.read_schema(path), schema, str(path))


def read_batches(
    path: Path,
    columns: list[str] | None = None,
    rows: int = 512,
    *,
    content_digest: str | None = None,
    use_threads: bool = False,
) -> Iterator[pa.RecordBatch]:
    """The rows of a shard, at most ``rows`` at a time, page checksums verified.

    Args:
        path: the shard.
        columns: those to read; all by default.
        rows: the most of a batch.
        content_digest: the shard's in its manifest. The file that was opened must carry it, so that no other run's
            rows are taken for these, whatever was renamed meanwhile.
        use_threads: whether columns are decoded at once, for a caller that reads one file at a time.

    Raises IntegrityError.
    """
    with reading(path), pq.ParquetFile(path, page_checksum_verification=True, pre_buffer=False) as f:
        if content_digest is not None and _footer(path, f.metadata).content_digest != content_digest:
            raise IntegrityError(
                "it is not the shard that the manifest lists: another run wrote it",
                where=str(path),
                fix="run again once the directory is finished",
            )
        if missing := set(columns or ()) - set(f.schema_arrow.names):  # pyarrow would leave them out
            raise IntegrityError(f"it has no column {min(missing)!r}", where=str(path), fix=_AGAIN)
        yield from f.iter_batches(batch_size=rows, columns=columns, use_threads=use_threads)


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn what a damaged or missing file causes into an IntegrityError; what is no plain file is not opened."""
    inside.status(path)
    try:
        yield
    except FileNotFoundError as e:
        raise IntegrityError("the file is missing", where=str(path), fix="run the command that made it again") from e
    except (pa.ArrowException, OSError, UnicodeDecodeError) as e:
        if isinstance(e, OSError) and e.errno:  # the system's trouble, which says nothing of the file
            raise inside.unreadable(path, e) from e
        raise IntegrityError(f"the file is damaged: {e}", where=str(path), fix=_AGAIN) from e


def _json(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
