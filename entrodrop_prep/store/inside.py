"""Files in a directory of ours: opened only where they are plain files, never through a link.

A manifest names them, and the sender of the directory wrote the manifest. So a name may lead nowhere else: no part of
the path below the directory may be a symbolic link, and no file a pipe or a device, which would block the process that
opens it. The one exception is the cache of ``huggingface_hub``, whose snapshots are links to the blobs of the same
repository.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
from collections.abc import Iterator
from io import BufferedReader
from pathlib import Path
from typing import Any

from entrodrop_prep.errors import IntegrityError
from entrodrop_prep.store import strict_json

_AGAIN = "run the command that made it again"
_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


def status(path: Path) -> os.stat_result:
    """The status of a plain file, which is not opened.

    Raises IntegrityError where it is missing, cannot be reached, is a link, or is no plain file.
    """
    try:
        found = os.lstat(path)
        if is_cached(path):
            found = os.stat(path)
    except (FileNotFoundError, NotADirectoryError) as e:
        raise IntegrityError("the file is missing", where=str(path), fix=_AGAIN) from e
    except OSError as e:
        raise unreadable(path, e) from e
    if stat.S_ISLNK(found.st_mode):
        raise IntegrityError(
            "it is a symbolic link, which may lead out of the directory",
            where=str(path),
            fix="put the file in its place",
        )
    if not stat.S_ISREG(found.st_mode):
        kind = next((name for test, name in _KINDS if test(found.st_mode)), "no file")
        raise IntegrityError(f"it is {kind}, not a file", where=str(path), fix=f"remove it and {_AGAIN}")
    return found


def status_below(directory: Path, name: str) -> os.stat_result:
    """As ``status`` for the file ``name`` (relative, POSIX) below a directory; the folders on its way are no links."""
    folder = directory
    for part in name.split("/")[:-1]:
        folder = folder / part
        if os.path.islink(folder):
            raise IntegrityError(
                "it is a symbolic link, which may lead out of the directory",
                where=str(folder),
                fix="put the folder in its place",
            )
    return status(directory / name)


def exists(path: Path) -> bool:
    """Whether anything is at a path, be it a link that leads nowhere. Raises IntegrityError where none may look."""
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as e:
        raise unreadable(path, e) from e
    return True


def check_place(directory: Path, name: str) -> None:
    """As ``status_below``, but a file that is missing is none of its business. Raises IntegrityError."""
    if exists(directory / name):
        status_below(directory, name)


@contextlib.contextmanager
def opened(path: Path) -> Iterator[BufferedReader]:
    """A plain file, open for reading; what cannot be read is an IntegrityError, see ``status``."""
    status(path)
    kept = 0 if os.path.islink(path) else os.O_NOFOLLOW
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | kept)
        with os.fdopen(handle, "rb") as f:
            if not stat.S_ISREG(os.fstat(handle).st_mode):
                raise IntegrityError("it is no plain file", where=str(path), fix=f"remove it and {_AGAIN}")
            yield f
    except OSError as e:
        raise unreadable(path, e) from e


def sha256_of(path: Path) -> str:
    """SHA-256 of a plain file's bytes, 64 hex digits. Raises IntegrityError as ``opened`` does."""
    with opened(path) as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def read_json(path: Path) -> Any:
    """The value in a JSON file. Raises IntegrityError as ``opened`` does, and ValueError for what is no plain JSON."""
    with opened(path) as f:
        return strict_json.loads(f.read())


def unreadable(path: Path, error: OSError) -> IntegrityError:
    """The system's refusal to read a file, as an error of ours."""
    why = os.strerror(error.errno) if error.errno else str(error)
    return IntegrityError(f"cannot be read: {why}", where=str(path), fix="check its permissions and the disk")


def is_cached(path: Path) -> bool:
    """Whether it is a link from a snapshot in the cache of ``huggingface_hub`` to a blob of the same repository."""
    if not path.is_symlink():
        return False
    from huggingface_hub import constants

    cache = os.path.realpath(constants.HF_HUB_CACHE)
    repository, _, below = os.path.relpath(os.path.realpath(path.parent), cache).partition(os.sep)
    blobs = os.path.join(cache, repository, "blobs")
    return below.startswith(f"snapshots{os.sep}") and os.path.dirname(os.path.realpath(path)) == blobs
