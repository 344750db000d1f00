"""Durable files and folders: complete when they have their name, in a directory that is still the one it was.

A file is written under a temporary name, flushed to disk, renamed, and its folder flushed. So a file under its final
name is whole, whatever kills the process. The directory of a run is made once and kept open: if it is unmounted,
renamed or replaced on the way, the run ends instead of making it again underneath. Links are never followed.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, BinaryIO

from entrodrop_prep.errors import DiskSpaceError, OutputError

TMP = ".tmp-"
PART = ".part"
WORKERS = f"{TMP}workers"
"""Folder in which several processes that write one directory settle who does what."""
MOVE_IT = "move it out of the directory, and run again"

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_REFUSED = (
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.ENOTEMPTY),
    *(errno.EEXIST, errno.ENOENT, errno.ENAMETOOLONG, errno.ELOOP),
)
_FAILED = (
    *(errno.EIO, errno.ESTALE, errno.ENODEV, errno.ENXIO, errno.EREMOTEIO, errno.EBUSY, errno.ETIMEDOUT),
    *(errno.ENOTCONN, errno.ESHUTDOWN, errno.EHOSTDOWN, errno.EHOSTUNREACH),
)
_NO_FOLDER_SYNC = (errno.EINVAL, errno.EOPNOTSUPP)
"""What file systems answer that do not flush folders."""

NO_LINK = (errno.EXDEV, errno.EPERM, errno.EOPNOTSUPP, errno.EMLINK, errno.ENOSYS, errno.EACCES)
"""What file systems answer that give a file no second name."""

_held: dict[Path, int] = {}
"""Directories that runs of this process write to, each with its open descriptor."""
_tags: dict[Path, str] = {}
"""What temporary names begin with below those that other processes write to as well."""
_TAG = re.compile(r"[0-9a-f]{8}-")


@contextlib.contextmanager
def writing(where: Path) -> Iterator[None]:
    """Turn the system's refusals to write into errors of ours: OutputError, or DiskSpaceError for a full disk."""
    try:
        yield
    except OSError as e:
        check_held(where)  # a file that is not there may be lost with its directory
        if e.errno not in (*_FULL, *_REFUSED, *_FAILED):
            raise
        if e.errno in _FULL:
            raise DiskSpaceError(
                f"no space left ({os.strerror(e.errno)})",
                where=str(where),
                fix="make room and run the same command again: finished files are kept",
            ) from e
        if e.errno in _FAILED:
            raise OutputError(
                f"writing failed: {os.strerror(e.errno)}",
                where=str(where),
                fix="check the disk and run the same command again: finished files are kept",
            ) from e
        raise OutputError(
            f"cannot write here: {os.strerror(e.errno)}", where=str(where), fix="choose another --out"
        ) from e


@contextlib.contextmanager
def held(directory: Path, tag: str = "") -> Iterator[list[Path]]:
    """Make a directory if it is not there, and keep it open: what is written below it goes there or nowhere.

    ``tag``, eight hexadecimal digits, is part of the temporary names below it, so that several processes may write the
    same file at once. Gives the folders that were made, outermost first. Raises OutputError.
    """
    with writing(directory):
        made = make_folder(directory)
        fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    before = _held.get(directory)
    _held[directory] = fd
    if tag:
        _tags[directory] = f"{tag}-"
    try:
        yield made
    finally:
        _tags.pop(directory, None)
        if before is None:
            del _held[directory]
        else:
            _held[directory] = before
        os.close(fd)


def check_held(path: Path) -> None:
    """Raises OutputError where ``path`` is in a held directory whose place is now empty or taken by another."""
    for directory, fd in list(_held.items()):
        if directory != path and directory not in path.parents:
            continue
        try:
            there = os.path.samestat(os.stat(directory), os.fstat(fd))
        except OSError:
            there = False
        if not there:
            raise OutputError(
                "the directory was removed, renamed, replaced or unmounted while this run was writing to it",
                where=str(directory),
                fix="put it back and run the same command again: finished files are kept",
            )


def make_folder(path: Path) -> list[Path]:
    """Make a folder and those above it, durably; returns those that were made, outermost first. Raises OSError."""
    check_held(path)
    missing: list[Path] = []
    while not path.is_dir():
        missing.insert(0, path)
        if path == path.parent:
            break
        path = path.parent
    for folder in missing:
        folder.mkdir(exist_ok=True)
        flush_folder(folder.parent)
    return missing


def write_bytes(path: Path, data: bytes) -> None:
    """Write a small file atomically. Raises OutputError."""
    with renamed_file(path) as f:
        f.write(data)


def temporary(path: Path) -> Path:
    """The name that a file or folder has until it is finished, but for its ending."""
    tag = next((_tags[above] for above in path.parents if above in _tags), "")
    return path.with_name(f"{TMP}{tag}{path.name}")


def without_tag(name: str) -> str:
    """A temporary name without the tag of the process that gave it."""
    return TMP + _TAG.sub("", name.removeprefix(TMP), count=1) if name.startswith(TMP) else name


@contextlib.contextmanager
def renamed_file(path: Path, *, flush_name: bool = True, keep: bool = False) -> Iterator[BinaryIO]:
    """A file under a temporary name that becomes ``path`` when the block ends well, and vanishes when it does not.

    Without ``flush_name`` the caller flushes the folder once it holds all of its files. ``keep``: where another process
    finished the file meanwhile, that one stays, and this one vanishes. Raises OutputError, also where a link or a
    folder has the name.
    """
    with writing(path):
        make_folder(path.parent)
        check_regular(path)
        tmp = temporary(path).with_name(temporary(path).name + PART)
        tmp.unlink(missing_ok=True)
        try:
            with create(tmp) as f:
                yield f
                f.flush()
                os.fsync(f.fileno())
            check_held(path)
            if keep:
                _name_unless_there(tmp, path)
            else:
                os.rename(tmp, path)
        except BaseException:
            with contextlib.suppress(OSError):
                tmp.unlink()
            raise
        if flush_name:
            flush_folder(path.parent)


def _name_unless_there(tmp: Path, path: Path) -> None:
    """Give a file its final name, or remove it where that name is taken."""
    try:
        os.link(tmp, path)
    except OSError as e:
        if e.errno in NO_LINK and not os.path.lexists(path):
            os.rename(tmp, path)
            return
        if e.errno not in (errno.EEXIST, *NO_LINK):
            raise
    tmp.unlink()


def create(path: Path) -> BinaryIO:
    """A new file, open for writing. Raises FileExistsError where anything has the name, a link too."""
    return os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666), "wb")


def check_regular(path: Path) -> bool:
    """Whether a file is there. Raises OutputError for anything else under its name: a link, a folder, a device."""
    try:
        mode = os.lstat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        return False
    if not stat.S_ISREG(mode):
        what = "a link" if stat.S_ISLNK(mode) else "a folder" if stat.S_ISDIR(mode) else "no regular file"
        raise OutputError(f"this is {what}, and in the way of a file to be written", where=str(path), fix=MOVE_IT)
    return True


def check_folder(path: Path) -> bool:
    """Whether a folder is there. Raises OutputError for anything else under its name, a link to a folder too."""
    if not os.path.lexists(path):
        return False
    if path.is_symlink() or not path.is_dir():
        what = "a link" if path.is_symlink() else "a file"
        raise OutputError(f"this is {what}, and in the way of a folder to be written", where=str(path), fix=MOVE_IT)
    return True


@contextlib.contextmanager
def renamed_folder(path: Path, replace: Callable[[Path], None]) -> Iterator[Path]:
    """A temporary folder that takes the name ``path`` when the block ends well, and vanishes when it does not.

    ``replace`` is called with the finished temporary folder and removes what is at ``path``, or raises OutputError. A
    process killed after it leaves nothing there.
    """
    with writing(path):
        check_held(path)
        tmp = temporary(path)
        remove_tree(tmp)
        tmp.mkdir()
        try:
            yield tmp
            for folder, _, files in os.walk(tmp):
                for name in files:
                    _flush(Path(folder, name))
                flush_folder(Path(folder))
            replace(tmp)
            check_held(path)
            os.rename(tmp, path)
        except BaseException:
            shutil.rmtree(tmp, ignore_errors=True)
            raise
        flush_folder(path.parent)


def remove_tree(path: Path) -> None:
    """Remove a folder of temporary files, if it is there; nothing else that has its name, and nothing behind links."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)


def flush_folder(path: Path) -> None:
    """The names in a folder, to the disk."""
    try:
        _flush(path)
    except OSError as e:
        if e.errno not in _NO_FOLDER_SYNC:
            raise


def _flush(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextlib.contextmanager
def scratch(prefix: str = "entrodrop-") -> Iterator[Path]:
    """A folder for temporary files, in TMPDIR, removed at the end; the block writes nowhere else.

    Raises OutputError, or DiskSpaceError for a full one, that says that it is TMPDIR.
    """
    with _in_tmpdir(), tempfile.TemporaryDirectory(prefix=prefix, ignore_cleanup_errors=True) as tmp:
        yield Path(tmp)


def scratch_file() -> IO[bytes]:
    """A temporary file without a name, in TMPDIR. Raises as ``scratch`` does."""
    with _in_tmpdir():
        return tempfile.TemporaryFile()


@contextlib.contextmanager
def _in_tmpdir() -> Iterator[None]:
    try:
        yield
    except (OutputError, OSError) as e:
        if isinstance(e, OSError) and e.errno not in (*_FULL, *_REFUSED, *_FAILED):
            raise
        full = isinstance(e, DiskSpaceError) or (isinstance(e, OSError) and e.errno in _FULL)
        what = e.what if isinstance(e, OutputError) else e.strerror
        raise (DiskSpaceError if full else OutputError)(
            f"no room for temporary files: {what}",
            where=tempfile.tempdir or os.environ.get("TMPDIR", "TMPDIR"),
            fix="make room there, or set TMPDIR to another folder",
        ) from e


def system_error(error: BaseException) -> OSError | None:
    """The system's refusal behind an error, however a library wrapped it; None where there is none."""
    cause: BaseException | None = error
    while cause is not None and not (isinstance(cause, OSError) and cause.errno):
        cause = cause.__cause__ or cause.__context__
    return cause


def is_full(error: OSError) -> bool:
    """Whether it says that there is no room."""
    return error.errno in _FULL
