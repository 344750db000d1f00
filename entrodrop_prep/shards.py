"""Files that are complete when they have their name: directories, locks, atomic Parquet shards and their footers.

A shard is written under ``.tmp-*``, flushed to disk, renamed, and its folder flushed. So a file under its final name is
whole, whatever kills the process; leftovers are removed by the next run.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from entrodrop_prep.digest import ContentDigest
from entrodrop_prep.errors import DiskSpaceError, EntrodropError, IntegrityError, OutputError
from entrodrop_prep.schema import META_KEY

_REFUSED = (
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR),
    *(errno.EEXIST, errno.ENOENT, errno.ENAMETOOLONG, errno.ELOOP),
)

TMP = ".tmp-"
LOCK = ".lock"


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


def user_path(name: str) -> Path:
    """A path with ``~`` as the user's home; one that means no user's home stays as it is."""
    return Path(os.path.expanduser(name))


@contextlib.contextmanager
def locked(directory: Path, *, wait: bool = False) -> Iterator[None]:
    """Hold the directory for one writer. An OS lock: a killed process leaves none.

    Raises OutputError where another holds it, unless it is to ``wait`` for that one.
    """
    with writing(directory):
        made = not directory.exists()
        directory.mkdir(parents=True, exist_ok=True)
        handle = os.open(directory / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            raise OutputError(
                "another run is writing here", where=str(directory), fix="wait for it, or choose another --out"
            ) from None
        yield
    except EntrodropError:
        if made and [p.name for p in directory.iterdir()] == [LOCK]:  # nothing came of it: leave nothing
            (directory / LOCK).unlink()
            directory.rmdir()
        raise
    finally:
        os.close(handle)


@contextlib.contextmanager
def writing(where: Path) -> Iterator[None]:
    """Turn the system's refusals to write into errors of ours."""
    try:
        yield
    except OSError as e:
        if e.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise DiskSpaceError(
                f"no space left ({os.strerror(e.errno)})",
                where=str(where),
                fix="make room and run the same command again: finished files are kept",
            ) from e
        if e.errno in _REFUSED:
            raise OutputError(
                f"cannot write here: {os.strerror(e.errno)}", where=str(where), fix="choose another --out"
            ) from e
        raise


def remove_leftovers(directory: Path, *folders: str) -> None:
    """Remove what a killed run left under temporary names in a directory and in its ``folders`` of shards (patterns).

    Folders of the user's are not looked into: a temporary name there is another program's.
    """
    for pattern in (f"{TMP}*", *(f"{folder}/{TMP}*.part" for folder in folders)):
        for path in sorted(directory.glob(pattern)):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)


def write_bytes(path: Path, data: bytes) -> None:
    """Write a small file atomically."""
    with writing(path), _renamed(path) as tmp, tmp.open("wb") as f:
        f.write(data)


@contextlib.contextmanager
def _renamed(path: Path) -> Iterator[Path]:
    """A temporary path that becomes ``path`` when the block ends well, and vanishes when it does not."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tmp = path.with_name(f"{TMP}{path.name}.part")
    try:
        yield tmp
        _flush(tmp)
        os.rename(tmp, path)
    except BaseException:
        tmp.unlink(missing_ok=True)
        raise
    _flush(path.parent)


@contextlib.contextmanager
def renamed_folder(path: Path) -> Iterator[Path]:
    """A temporary folder that takes the place of ``path`` when the block ends well, and vanishes when it does not.

    What stood at ``path`` is removed just before; a process killed in between leaves nothing there.
    """
    tmp = path.with_name(f"{TMP}{path.name}")
    with writing(path):
        shutil.rmtree(tmp, ignore_errors=True)
        tmp.mkdir(parents=True)
        try:
            yield tmp
            for folder, _, files in os.walk(tmp):
                for name in [*files, ""]:
                    _flush(Path(folder, name))
            if path.exists():
                shutil.rmtree(path)
            os.rename(tmp, path)
        except BaseException:
            shutil.rmtree(tmp, ignore_errors=True)
            raise
        _flush(path.parent)


def _flush(path: Path) -> None:
    """A file, or the names in a folder, to the disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_shard(
    path: Path, schema: pa.Schema, tables: Iterable[pa.Table], info: dict[str, Any], *, compression: str = "zstd"
) -> Footer:
    """Write tables as one Parquet file, one row group each, atomically.

    ``info`` goes into the footer as JSON, with the row count and the content digest added. It is read again after the
    tables are used up, so their producer may add to it.
    """
    digest, rows = ContentDigest(schema), 0
    with (
        writing(path),
        _renamed(path) as tmp,
        pq.ParquetWriter(
            tmp,
            schema,
            compression=compression,
            use_dictionary=["input_ids.list.element", "labels.list.element"],
            write_page_checksum=True,
        ) as writer,
    ):
        for table in tables:
            digest.update(table)
            rows += table.num_rows
            writer.write_table(table, row_group_size=max(1, table.num_rows))
        footer = {**info, "rows": rows, "content_digest": digest.hexdigest()}
        writer.add_key_value_metadata({META_KEY.decode(): _json(footer)})
    return Footer(rows, footer["content_digest"], footer)


def read_footer(path: Path) -> Footer:
    """A shard's footer. Raises IntegrityError for a file that is no shard of ours."""
    with reading(path):
        metadata = pq.read_metadata(path)
    try:
        info = json.loads((metadata.metadata or {})[META_KEY])
        return Footer(metadata.num_rows, info["content_digest"], info)
    except (KeyError, ValueError, UnicodeDecodeError) as e:
        raise IntegrityError(
            "it carries no footer of this program",
            where=str(path),
            fix="remove it and run the command that made it again",
        ) from e


def read_batches(path: Path, columns: list[str] | None = None, rows: int = 512) -> Iterator[pa.RecordBatch]:
    """The rows of a shard, at most ``rows`` at a time, page checksums verified. Raises IntegrityError."""
    with reading(path), pq.ParquetFile(path, page_checksum_verification=True, pre_buffer=False) as f:
        yield from f.iter_batches(batch_size=rows, columns=columns, use_threads=False)


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn what a damaged or missing file causes into an IntegrityError."""
    try:
        yield
    except FileNotFoundError as e:
        raise IntegrityError("the file is missing", where=str(path), fix="run the command that made it again") from e
    except (pa.ArrowException, OSError, UnicodeDecodeError) as e:
        if isinstance(e, OSError) and e.errno in (errno.EACCES, errno.EISDIR):
            raise IntegrityError(f"cannot be read: {os.strerror(e.errno)}", where=str(path)) from e
        raise IntegrityError(
            f"the file is damaged: {e}", where=str(path), fix="remove it and run the command that made it again"
        ) from e


def _json(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
