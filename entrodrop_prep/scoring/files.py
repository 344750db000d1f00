"""Finding the files of a source: a path, a directory, a glob or an fsspec URL."""

from __future__ import annotations

import fnmatch
import glob
import io
import os
import posixpath
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

from entrodrop_prep.errors import SourceError

FORMATS = {
    ".parquet": "parquet",
    ".jsonl": "json",
    ".ndjson": "json",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".arrow": "arrow",
    ".txt": "text",
    ".text": "text",
}
COMPRESSED = (".gz", ".zst")
KNOWN = ".parquet, .jsonl, .ndjson, .json, .csv, .tsv, .arrow, .txt, .text (all but Parquet and Arrow also .gz or .zst)"
# Files that lie beside data and hold none, whatever their extension.
BESIDE_DATA = ("readme", "license", "licence", "notice", "changelog", "citation")
METADATA = ("config.json", "dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
BUFFER = 1 << 20


@dataclass(frozen=True)
class DataFile:
    """One file. ``name`` is relative to the source's root, with ``/``; ``fs`` the fsspec file system, None if local.

    ``in_one_piece``: an HTTP server sends it only from its start.
    """

    name: str
    path: str
    fs: Any | None
    size: int
    in_one_piece: bool = False

    @property
    def extension(self) -> str:
        """Lower-case extension without the compression's, e.g. ``.jsonl``."""
        base, extension = os.path.splitext(self.name.lower())
        return os.path.splitext(base)[1] if extension in COMPRESSED else extension

    @property
    def compression(self) -> str | None:
        """``.gz``, ``.zst`` or None."""
        extension = os.path.splitext(self.name.lower())[1]
        return extension if extension in COMPRESSED else None

    def open(self) -> BinaryIO:
        """The stored bytes, buffered. Raises OSError."""
        if self.fs is None:
            return open(self.path, "rb", buffering=BUFFER)
        options = {"block_size": 0} if self.in_one_piece else {}
        return cast(BinaryIO, io.BufferedReader(self.fs.open(self.path, "rb", **options), BUFFER))

    def stat(self) -> list[Any]:
        """[size in bytes, mtime_ns]; for a remote file [size, whatever its store gives as time or tag]."""
        if self.fs is None:
            found = os.stat(self.path)
            return [found.st_size, found.st_mtime_ns]
        self.fs.invalidate_cache()
        info = self.fs.info(self.path)
        tags = [str(info[key]) for key in ("ETag", "etag", "mtime", "LastModified", "created") if info.get(key)]
        return [info.get("size"), tags[0] if tags else None]


@dataclass(frozen=True)
class Found:
    """Files in reading order, sorted by name. ``directory``: they were found by walking one, so splits may apply."""

    name: str
    files: list[DataFile]
    directory: bool


def format_of(name: str) -> str | None:
    """``parquet``, ``json``, ``csv``, ``arrow`` or ``text`` by the file's extension; None for any other file."""
    base, extension = os.path.splitext(name.lower())
    if extension in COMPRESSED:
        inner = FORMATS.get(os.path.splitext(base)[1])
        return None if inner in ("parquet", "arrow") else inner
    return FORMATS.get(extension)


def looks_like_path(source: str) -> bool:
    """Whether a name that does not exist was meant as a file rather than as a Hub id."""
    return source.startswith((".", "/", "~")) or format_of(source) is not None


def local_path(source: str) -> str | None:
    """The local path that ``source`` names, if it exists. Raises SourceError where looking is not permitted."""
    path = os.path.expanduser(source)
    try:
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as e:
        raise unreadable(source, e) from e
    return path


def find_local(path: str) -> Found:
    """The data files at a local path that exists. Raises SourceError."""
    name = os.path.basename(os.path.abspath(path))
    if os.path.isdir(path):
        names = [n for n in _walk(path) if not _passed_over(n)]
        return Found(name, [_local_file(n, os.path.join(path, n)) for n in names], directory=True)
    if not os.path.isfile(path):
        raise SourceError("is not a regular file", where=path, fix="give a file that can be read twice")
    if format_of(name) is None:
        raise SourceError("has no known data format", where=path, fix=f"known extensions: {KNOWN}")
    return Found(name, [_local_file(name, path)], directory=False)


def find_glob(pattern: str) -> Found:
    """The data files that match a local glob (``**`` included). Raises SourceError where none does."""
    pattern = os.path.expanduser(pattern)
    root = _literal_root(pattern)
    matches = sorted(p for p in glob.glob(pattern, recursive=True) if os.path.isfile(p))
    files = [_local_file(Path(os.path.relpath(p, root or ".")).as_posix(), p) for p in matches if format_of(p)]
    return _matched(pattern, pattern[len(root) :].lstrip("/"), files)


def matches(pattern: str, path: str) -> bool:
    """Whether a local glob would find a path if something were there; links are taken as other folders."""
    if "://" in pattern or not glob.has_magic(pattern):
        return False
    parts = [os.path.abspath(os.path.expanduser(name)).split(os.sep) for name in (pattern, path)]
    return _matches(*parts)


def _matches(pattern: list[str], parts: list[str]) -> bool:
    if not pattern:
        return not parts
    if pattern[0] == "**":
        return any(_matches(pattern[1:] or ["*"], parts[n:]) for n in range(len(parts)))
    return bool(parts) and fnmatch.fnmatchcase(parts[0], pattern[0]) and _matches(pattern[1:], parts[1:])


def find_url(url: str) -> Found:
    """The data files at an fsspec URL: a file, a directory or a glob. Raises SourceError."""
    import fsspec
    from fsspec.implementations.local import LocalFileSystem

    try:
        fs, path = fsspec.core.url_to_fs(url)
        if isinstance(fs, LocalFileSystem):
            return find_glob(path) if glob.has_magic(path) and not os.path.exists(path) else find_local(_existing(path))
        info = _info(fs, path)
        if info is not None and info["type"] == "file":
            if format_of(path) is None:
                raise SourceError("has no known data format", where=url, fix=f"known extensions: {KNOWN}")
            name = posixpath.basename(path)
            return Found(name, [_remote_file(name, path, fs, info)], directory=False)
        if info is None and not glob.has_magic(path):
            raise SourceError("no such file or directory", where=url, fix="check the URL")
        root = _literal_root(path) if info is None else path
        found = fs.glob(path, detail=True) if info is None else fs.find(path, detail=True)
    except (ImportError, ValueError) as e:
        raise SourceError(f"cannot be opened: {e}", where=url, fix="check the URL's scheme") from e
    except OSError as e:
        raise unreadable(url, e) from e
    files = []
    for at, entry in sorted(found.items()):
        name = at[len(root) :].lstrip("/")
        if entry["type"] == "file" and not (format_of(at) is None if info is None else _passed_over(name)):
            files.append(_remote_file(name, at, fs, entry))
    if info is None:
        return _matched(url, path[len(root) :].lstrip("/"), files)
    return Found(posixpath.basename(path.rstrip("/")) or url, files, directory=True)


def unreadable(where: str, error: Exception) -> SourceError:
    """The SourceError for a path or file that could not be read."""
    if isinstance(error, PermissionError):
        return SourceError("permission denied", where=where, fix="check who may read it")
    if isinstance(error, FileNotFoundError):
        return SourceError("no such file or directory", where=where, fix="check the path")
    reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return SourceError(f"cannot be read: {reason}", where=where, fix="check that the file is whole and in its format")


def _info(fs: Any, path: str) -> dict[str, Any] | None:
    try:
        return cast(dict[str, Any], fs.info(path))
    except FileNotFoundError:
        return None


def _existing(path: str) -> str:
    if not os.path.exists(path):
        raise FileNotFoundError(path)
    return path


def _matched(pattern: str, name: str, files: list[DataFile]) -> Found:
    if not files:
        raise SourceError("no data file matches", where=pattern, fix=f"known extensions: {KNOWN}")
    return Found(name, files, directory=False)


def _literal_root(pattern: str) -> str:
    """The folder before the first wildcard, with its trailing slash; "" where the first part is one already."""
    parts = pattern.split("/")
    first = next(i for i, part in enumerate(parts) if glob.has_magic(part))
    return "/".join(parts[:first]) + "/" if first else ""


def _walk(root: str) -> Iterator[str]:
    """Names of all files under ``root``, relative and sorted; links to folders are followed, each folder once."""

    def refuse(error: OSError) -> None:
        raise unreadable(os.path.relpath(error.filename, root), error) from error

    names, seen = [], {os.path.realpath(root)}
    for folder, subfolders, files in os.walk(root, followlinks=True, onerror=refuse):
        new = [s for s in sorted(subfolders) if os.path.realpath(os.path.join(folder, s)) not in seen]
        seen.update(os.path.realpath(os.path.join(folder, s)) for s in new)
        subfolders[:] = new
        names += [Path(os.path.relpath(os.path.join(folder, f), root)).as_posix() for f in files]
    return iter(sorted(names))


def _passed_over(name: str) -> bool:
    """Whether a file of a directory is no data: hidden, ``_``-prefixed, a readme or its like, of no known format."""
    *_, base = parts = name.split("/")
    if any(part.startswith((".", "_")) for part in parts) or base.lower() in METADATA:
        return True
    return format_of(name) is None or base.lower().split(".")[0] in BESIDE_DATA


def check_utf8(path: str, name: str) -> None:
    """Raises SourceError for a path with other bytes, which the libraries of Parquet and Arrow do not open."""
    try:
        path.encode("utf-8")
    except UnicodeEncodeError as e:
        what = "its path is not UTF-8, and Parquet and Arrow files cannot be opened by such"
        raise SourceError(what, where=name, fix="rename it, or the folder it is in") from e


def _local_file(name: str, path: str) -> DataFile:
    if format_of(name) in ("parquet", "arrow"):
        check_utf8(path, name)
    try:
        size = os.stat(path).st_size
    except OSError as e:
        raise unreadable(name, e) from e
    if not os.access(path, os.R_OK):
        raise SourceError("permission denied", where=name, fix="check who may read it")
    return DataFile(name, path, None, size)


def _remote_file(name: str, path: str, fs: Any, info: dict[str, Any]) -> DataFile:
    protocols = {fs.protocol} if isinstance(fs.protocol, str) else set(fs.protocol)
    in_one_piece = "http" in protocols and not info.get("partial")
    if in_one_piece and format_of(name) in ("parquet", "arrow"):
        raise SourceError("the server sends files only from their start", where=path, fix="download it first")
    return DataFile(name, path, fs, int(info.get("size") or 0), in_one_piece)
