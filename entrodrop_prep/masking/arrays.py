"""Flat arrays in memory-mapped files: written once, then shared by every process and thread.

Where they are to last, every block of them has a checksum, which a process compares when it first reads the block, and
what is in JSON begins with its own digest. So a damaged cache is an error, never other rows.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import zlib
from collections.abc import Iterable
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from entrodrop_prep.errors import IntegrityError
from entrodrop_prep.store.disk import check_held, create, make_folder, renamed_file, write_bytes, writing

NAME = "columns.json"
"""Written last: the number format, length and checksums of each array, and facts. Without it they are not finished."""
BLOCK = 1 << 18
"""Bytes of an array under one checksum (CRC-32)."""


class Arrays:
    """The arrays of a directory by name. Raises IntegrityError for files that are not those that were written."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._arrays: dict[str, NDArray[Any]] = {}
        self._maps: list[mmap.mmap] = []
        self._sums: dict[str, list[int]] = {}
        self._checked: dict[str, NDArray[np.bool_]] = {}
        recorded = stored(directory / NAME)
        if recorded is None:
            raise _damaged(directory, directory / NAME)
        self.facts: dict[str, Any] = recorded["facts"]
        """What was recorded with the arrays."""
        for name, (dtype, length, sums) in recorded["arrays"].items():
            path, size = directory / name, np.dtype(dtype).itemsize * length
            if not path.is_file() or path.stat().st_size != size:
                raise _damaged(directory, path)
            self._arrays[name] = self._mapped(path, dtype) if length else np.empty(0, dtype)
            self._sums[name], self._checked[name] = sums, np.zeros(len(sums), bool)

    def __contains__(self, name: str) -> bool:
        return name in self._arrays

    def __getitem__(self, name: str) -> NDArray[Any]:
        """An array, not compared with its checksums: see ``check`` and ``whole``."""
        return self._arrays[name]

    def whole(self, name: str) -> NDArray[Any]:
        """An array, all of it compared with its checksums. Raises IntegrityError where it is damaged."""
        array = self._arrays[name]
        self.check(name, np.zeros(1, np.int64), np.array([len(array)]))
        return array

    def check(self, name: str, first: NDArray[np.int64], stop: NDArray[np.int64]) -> None:
        """Compare the checksums of the blocks that hold the values [first, stop) and were not looked at so far."""
        checked, array = self._checked[name], self._arrays[name]
        if checked.all():
            return
        some = stop > first
        begin, end = first[some] * array.itemsize // BLOCK, -(-stop[some] * array.itemsize // BLOCK)
        new = np.zeros(len(checked) + 1, np.int64)
        np.add.at(new, begin, 1)
        np.add.at(new, end, -1)
        data = array.view(np.uint8)
        for block in np.flatnonzero((np.cumsum(new)[:-1] > 0) & ~checked).tolist():
            if zlib.crc32(data[block * BLOCK : (block + 1) * BLOCK].data) != self._sums[name][block]:
                raise _damaged(self._directory, self._directory / name)
            checked[block] = True

    def release(self) -> None:
        """Give the pages that were read back to the operating system, which keeps them while it has room."""
        for one in self._maps:
            one.madvise(mmap.MADV_DONTNEED)

    def _mapped(self, path: Path, dtype: str) -> NDArray[Any]:
        with path.open("rb") as f:
            self._maps.append(mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ))
        return np.frombuffer(self._maps[-1], dtype)


class _File:
    """An array that is being written, with checksums of its blocks as the bytes come where these are wanted."""

    def __init__(self, file: BinaryIO, *, checked: bool) -> None:
        self._file, self._filled, self._checked = file, 0, checked
        self.dtype, self.length = "", 0
        self.sums: list[int] = []

    def write(self, array: NDArray[Any]) -> None:
        """Add values."""
        self.dtype, self.length = array.dtype.name, self.length + len(array)
        data = np.ascontiguousarray(array).view(np.uint8).data
        self._file.write(data)
        while data and self._checked:
            if not self._filled:
                self.sums.append(0)
            part, data = data[: BLOCK - self._filled], data[BLOCK - self._filled :]
            self.sums[-1] = zlib.crc32(part, self.sums[-1])
            self._filled = (self._filled + len(part)) % BLOCK


def write_arrays(
    directory: Path, parts: Iterable[dict[str, NDArray[Any]]], facts: dict[str, Any], *, lasting: bool
) -> None:
    """Write arrays part by part.

    Args:
        directory: made if it is not there.
        parts: by name, what is added to each array; all have the same names.
        facts: recorded with the arrays, as JSON, once the parts are used up.
        lasting: with checksums and flushed to the disk; if not, for the process that writes them alone.

    Raises OutputError.
    """
    files: dict[str, _File] = {}
    with writing(directory):
        make_folder(directory)
        (directory / NAME).unlink(missing_ok=True)

    def opened(name: str) -> AbstractContextManager[BinaryIO]:
        return renamed_file(directory / name) if lasting else create(directory / name)

    with writing(directory), ExitStack() as stack:  # other processes may have earlier files open: new ones take names
        for part in parts:
            check_held(directory)
            for name, array in part.items():
                if name not in files:
                    files[name] = _File(stack.enter_context(opened(name)), checked=lasting)
                files[name].write(array)
    store(directory / NAME, {"arrays": {n: [f.dtype, f.length, f.sums] for n, f in files.items()}, "facts": facts})


def store(path: Path, value: Any) -> None:
    """Write a JSON value behind the digest of its bytes. Raises OutputError."""
    data = json.dumps(value).encode()
    write_bytes(path, hashlib.sha256(data).hexdigest().encode() + b"\n" + data)


def stored(path: Path) -> Any | None:
    """What ``store`` wrote; None where nothing is there. Raises IntegrityError where it was changed."""
    try:
        recorded, _, data = path.read_bytes().partition(b"\n")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as e:
        raise IntegrityError(f"the cache cannot be read: {e.strerror}", where=str(path), fix="check the disk") from e
    if hashlib.sha256(data).hexdigest().encode() != recorded:
        raise _damaged(path.parent, path)
    return json.loads(data)


def _damaged(directory: Path, path: Path) -> IntegrityError:
    return IntegrityError("the cached rows are damaged", where=str(path), fix=f"remove {directory}")
