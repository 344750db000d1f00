"""Who may write to a directory, and who may read it: locks of the operating system, which a killed process drops.

A writer holds ``.lock`` alone, readers hold it together, and so do workers that share the writing (``store.workers``).
Where no lock can be had, as on read-only media, reading goes without: every file that is read is compared with the
manifest.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from entrodrop_prep.errors import EntrodropError, OutputError
from entrodrop_prep.store.disk import WORKERS, check_regular, held, writing
from entrodrop_prep.store.inside import is_cached

LOCK = ".lock"
_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)


@contextlib.contextmanager
def locked(directory: Path, *, wait: bool = False) -> Iterator[None]:
    """Make a directory where there is none, and hold it for one writer, against other writers and all readers.

    Raises OutputError where another run holds it, unless it is to ``wait``; and for a directory that is lost on the
    way, see ``disk.held``.
    """
    with held(directory) as made:
        with writing(directory):
            check_regular(directory / LOCK)
            handle = lock_alone(directory, wait=wait)
        try:
            yield
        except EntrodropError:
            remove_if_empty(directory, made)
            raise
        finally:
            os.close(handle)


def lock_alone(directory: Path, *, wait: bool = False) -> int:
    """The directory's lock file, open and locked for one writer. Raises as ``locked`` does, and OSError."""
    return open_locked(directory / LOCK, os.O_RDWR | os.O_CREAT, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))


def remove_if_empty(directory: Path, made: list[Path], *, locked: bool = True) -> None:
    """Leave nothing of folders that were ``made`` for a run of which nothing came.

    ``locked``: this process made the lock file. A directory without it was put there by others then, and stays.
    """
    if made and (_names(directory) == [LOCK] or (not locked and _names(directory) == [])):
        with contextlib.suppress(OSError):
            (directory / LOCK).unlink(missing_ok=not locked)
            for folder in reversed(made):
                folder.rmdir()


@contextlib.contextmanager
def reading_lock(*directories: Path) -> Iterator[None]:
    """Hold finished directories for reading: no run writes there meanwhile, others may read.

    Raises OutputError where a run is writing there.
    """
    with contextlib.ExitStack() as stack:
        for directory in dict.fromkeys(directories):
            if os.path.isfile(directory / "manifest.json") and not is_cached(directory / "manifest.json"):
                handle = _shared(directory)
                if handle is not None:
                    stack.callback(os.close, handle)
        yield


def _shared(directory: Path) -> int | None:
    """The lock for reading; None where there is none and none can be made."""
    try:
        return open_locked(directory / LOCK, os.O_RDONLY, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        pass
    except OSError:
        return None
    try:
        return open_locked(directory / LOCK, os.O_RDONLY | os.O_CREAT, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return None


def open_locked(path: Path, flags: int, lock: int) -> int:
    """A lock file, open and locked. Raises OutputError where another run holds it, and OSError."""
    while True:
        handle = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o644)  # a pipe would block
        try:
            fcntl.flock(handle, lock)
            if os.path.samestat(os.fstat(handle), os.stat(path)):
                return handle
        except FileNotFoundError:  # it was removed while this one waited: try again
            pass
        except BlockingIOError:
            doing, them = _doing(path.parent, handle, lock)
            os.close(handle)
            fix = f"wait for {them}" + ("" if lock & fcntl.LOCK_SH else ", or choose another --out")
            raise OutputError(f"{doing} here", where=str(path.parent), fix=fix) from None
        except OSError as e:
            os.close(handle)
            if e.errno in _NO_LOCKS and lock & fcntl.LOCK_EX:
                raise OutputError(
                    f"the file system has no locks ({e.strerror})", where=str(path.parent), fix="choose another --out"
                ) from e
            raise
        except BaseException:  # a signal while it waited
            os.close(handle)
            raise
        os.close(handle)


def _doing(directory: Path, handle: int, lock: int) -> tuple[str, str]:
    """What those do who hold the lock, and their pronoun."""
    if lock & fcntl.LOCK_SH or not _only_read(handle):
        return "another run is writing", "it"
    return ("workers are writing", "them") if (directory / WORKERS).is_dir() else ("another run is reading", "it")


def _only_read(handle: int) -> bool:
    """Whether those who hold the lock share it."""
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _names(directory: Path) -> list[str]:
    try:
        return os.listdir(directory)
    except OSError:
        return []
