"""Finding the files of a source behind an fsspec URL."""

from __future__ import annotations

import glob
import os
import posixpath
import urllib.parse
from typing import Any, cast

from entrodrop_prep.errors import SourceError
from entrodrop_prep.sources.files import (
    UNKNOWN,
    DataFile,
    Found,
    check_name,
    could_not_ask,
    find_glob,
    find_local,
    http_status,
    literal_root,
    matched,
    unreadable,
)
from entrodrop_prep.sources.formats import KNOWN, format_of
from entrodrop_prep.sources.unread import Unread
from entrodrop_prep.terminal.text import shown_url


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
            name = _url_name(fs, path)
            if format_of(name) is None:
                raise SourceError("has no known data format", where=url, fix=f"known extensions: {KNOWN}")
            return Found(name, [_remote_file(name, path, fs, info)], directory=False)
        if info is None and not _is_pattern(fs, path):
            raise SourceError("no such file or directory", where=url, fix="check the URL")
        root = literal_root(path) if info is None else path
        found = fs.glob(path, detail=True) if info is None else fs.find(path, detail=True)
    except (ImportError, ValueError) as e:
        raise SourceError(f"cannot be opened: {e}", where=url, fix="check the URL's scheme") from e
    except OSError as e:
        raise unreadable(url, e) from e
    files, left_out = [], Unread()
    for at, entry in sorted(found.items()):
        name = at[len(root) :].lstrip("/")
        if entry["type"] != "file":
            continue
        if info is not None and not left_out.takes(name):
            continue
        if format_of(name) is None:
            left_out.add(UNKNOWN, name)
        else:
            files.append(_remote_file(name, at, fs, entry))
    if info is None:
        return matched(url, path[len(root) :].lstrip("/"), files, left_out)
    name = posixpath.basename(path.rstrip("/")) or shown_url(url)
    return Found(name, files, directory=True, left_out=left_out)


def _url_name(fs: Any, path: str) -> str:
    """The file's name in a URL, without the query of one over HTTP."""
    return posixpath.basename(urllib.parse.urlsplit(path).path if "http" in _protocols(fs) else path)


def _is_pattern(fs: Any, path: str) -> bool:
    """Whether a path holds wildcards; a ``?`` of HTTP begins the query."""
    return glob.has_magic(urllib.parse.urlsplit(path).path if "http" in _protocols(fs) else path)


def _protocols(fs: Any) -> set[str]:
    return {fs.protocol} if isinstance(fs.protocol, str) else set(fs.protocol)


def _info(fs: Any, path: str) -> dict[str, Any] | None:
    """What the file system knows of a path, None if it is not there. Raises OSError where it cannot be asked."""
    try:
        return cast(dict[str, Any], fs.info(path))
    except FileNotFoundError as e:
        if http_status(e) in (None, 404, 410) and not could_not_ask(e):
            return None
        raise


def _existing(path: str) -> str:
    if not os.path.exists(path):
        raise FileNotFoundError(path)
    return path


def _remote_file(name: str, path: str, fs: Any, info: dict[str, Any]) -> DataFile:
    check_name(name)
    in_one_piece = "http" in _protocols(fs) and not info.get("partial")
    if in_one_piece and format_of(name) in ("parquet", "arrow"):
        raise SourceError("the server sends files only from their start", where=path, fix="download it first")
    return DataFile(name, path, fs, int(info.get("size") or 0), in_one_piece)
