"""Finding the files of a source: a path, a directory, a glob or an fsspec URL."""

from __future__ import annotations

import fnmatch
import glob
import io
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

from entrodrop_prep.errors import SourceError
from entrodrop_prep.sources.formats import KNOWN, format_of, split_extension
from entrodrop_prep.sources.unread import Unread

BUFFER = 1 << 20
UNKNOWN = "of no known format"


class Mark(NamedTuple):
    """What distinguishes a file from a later one of its name. ``ctime`` cannot be set back, but links change it."""

    size: int
    mtime: int
    inode: int
    ctime: int


@dataclass(frozen=True)
class DataFile:
    """One file. ``name`` is relative to the source's root, with ``/``; ``fs`` the fsspec file system, None if local.

    ``in_one_piece``: an HTTP server sends it only from its start. ``mark``: what a local file was when it was found.
    """

    name: str
    path: str
    fs: Any | None
    size: int
    in_one_piece: bool = False
    mark: Mark | None = None

    @property
    def extension(self) -> str:
        """Lower-case extension without the compression's, e.g. ``.jsonl``."""
        return split_extension(self.name)[0]

    @property
    def compression(self) -> str | None:
        """``gzip``, ``zstd``, ``bzip2``, ``xz`` or None."""
        return split_extension(self.name)[1]

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
    """Files in reading order, sorted by name.

    ``directory``: they were found by walking one, so splits may apply. ``left_out``: what else was found there.
    """

    name: str
    files: list[DataFile]
    directory: bool
    left_out: Unread = field(default_factory=Unread)


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
        left_out = Unread()
        files = []
        for inside in _walk(path):
            at = os.path.join(path, inside)
            if left_out.takes(inside):
                files.append(_local_file(inside, at))
            elif not any(part.startswith(".") for part in inside.split("/")):
                _check_regular(inside, at)
        return Found(name, files, directory=True, left_out=left_out)
    _check_regular(path, path)
    if format_of(name) is None:
        raise SourceError("has no known data format", where=path, fix=f"known extensions: {KNOWN}")
    return Found(name, [_local_file(name, path)], directory=False)


def find_glob(pattern: str) -> Found:
    """The data files that match a local glob (``**`` included). Raises SourceError where none does."""
    pattern = os.path.expanduser(pattern)
    root = literal_root(pattern)
    files, folders, left_out = [], [], Unread()
    for path in sorted(glob.glob(pattern, recursive=True)):
        name = Path(os.path.relpath(path, root or ".")).as_posix()
        if os.path.isdir(path):
            folders.append(name)
        elif format_of(path) is None:
            _check_regular(name, path)
            left_out.add(UNKNOWN, name)
        else:
            files.append(_local_file(name, path))
    names = [file.name for file in files]
    for folder in folders:
        if folder != "." and not any(name.startswith(f"{folder}/") for name in names):
            left_out.add("folders, which a glob does not enter without **", folder)
    return matched(pattern, pattern[len(root) :].lstrip("/"), files, left_out)


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


def unreadable(where: str, error: BaseException) -> SourceError:
    """The SourceError for a path or file that could not be read."""
    status = http_status(error)
    if status is not None and status not in (404, 410):
        refused = status in (401, 403)
        fix = "check the credentials, or whether the URL's signature expired" if refused else "try again later"
        return SourceError(f"the server refuses it: HTTP {status}", where=where, fix=fix)
    if isinstance(error, PermissionError):
        return SourceError("permission denied", where=where, fix="check who may read it")
    if isinstance(error, FileNotFoundError):
        if error.__cause__ is not None and could_not_ask(error):
            return unreadable(where, error.__cause__)
        return SourceError("no such file or directory", where=where, fix="check the path")
    reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return SourceError(f"cannot be read: {reason}", where=where, fix="check that the file is whole and in its format")


def could_not_ask(error: FileNotFoundError) -> bool:
    """Whether fsspec said "not found" because no connection was had."""
    return isinstance(error.__cause__, OSError) and not isinstance(error.__cause__, FileNotFoundError)


def http_status(error: BaseException | None) -> int | None:
    """The status that a server answered with, if ``error`` was raised from one."""
    while error is not None:
        for status in (getattr(error, "status", None), getattr(getattr(error, "response", None), "status_code", None)):
            if isinstance(status, int):
                return status
        error = error.__cause__
    return None


def matched(pattern: str, name: str, files: list[DataFile], left_out: Unread) -> Found:
    """The files that a pattern found. Raises SourceError for none."""
    if not files:
        what = f"no data file matches; not read: {left_out}" if left_out else "no data file matches"
        raise SourceError(what, where=pattern, fix=f"known extensions: {KNOWN}")
    return Found(name, files, directory=False, left_out=left_out)


def literal_root(pattern: str) -> str:
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


def check_utf8(path: str, name: str) -> None:
    """Raises SourceError for a path with other bytes, which the libraries of Parquet and Arrow do not open."""
    try:
        path.encode("utf-8")
    except UnicodeEncodeError as e:
        what = "its path is not UTF-8, and Parquet and Arrow files cannot be opened by such"
        raise SourceError(what, where=name, fix="rename it, or the folder it is in") from e


def check_name(name: str) -> None:
    """Raises SourceError for a name with bytes that are not UTF-8: the manifests name every file."""
    try:
        name.encode("utf-8")
    except UnicodeEncodeError as e:
        raise SourceError(
            "its name is not UTF-8, and the manifests could not name it", where=name, fix="rename it"
        ) from e


def _check_regular(name: str, path: str) -> None:
    """Raises SourceError for a FIFO, a device, a socket; nothing for what is not there any more."""
    try:
        mode = os.stat(path).st_mode
    except OSError:
        return
    kinds = (
        (stat.S_ISFIFO, "a FIFO"),
        (stat.S_ISSOCK, "a socket"),
        (stat.S_ISCHR, "a device"),
        (stat.S_ISBLK, "a device"),
    )
    found = next((kind for test, kind in kinds if test(mode)), None)
    if found:
        raise SourceError(f"is {found}, not a regular file", where=name, fix="give files that can be read twice")


def mark_of(name: str, path: str) -> Mark:
    """The mark of a local file. Raises SourceError."""
    try:
        found = os.stat(path)
    except OSError as e:
        raise unreadable(name, e) from e
    return Mark(found.st_size, found.st_mtime_ns, found.st_ino, found.st_ctime_ns)


def _local_file(name: str, path: str) -> DataFile:
    check_name(name)
    _check_regular(name, path)
    if format_of(name) in ("parquet", "arrow"):
        check_utf8(path, name)
    mark = mark_of(name, path)
    if not os.access(path, os.R_OK):
        raise SourceError("permission denied", where=name, fix="check who may read it")
    return DataFile(name, path, None, mark.size, mark=mark)
