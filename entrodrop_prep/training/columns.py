"""The scored rows of a job as flat arrays in memory-mapped files: read once, then shared by every process.

Every block of them has a checksum, which a process compares when it first reads the block; what is in JSON begins with
its own digest. So a damaged cache is an error, never other rows.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from entrodrop_prep.errors import IntegrityError
from entrodrop_prep.store.disk import make_folder, renamed_file, write_bytes, writing
from entrodrop_prep.store.rows import Rows

NAME = "columns.json"
"""Written last: the number format, length and checksums of each array. Without it the files are not finished."""
BLOCK = 1 << 18
"""Bytes of an array under one checksum (CRC-32)."""


class Columns:
    """R rows of N tokens, each array a file.

    ``source``, ``row_id``, ``window``, ``length`` and, with thresholds by column, ``group`` are [R]; ``input_ids``,
    ``entropy`` (NaN for null), ``loss_mask`` and, where it is looked at, ``logprob`` are [N], as in ``Rows``. In memory
    are 8 bytes a row, where each begins; the rest is the operating system's cache. What is [R] is checked on opening,
    what is [N] when it is read. Raises IntegrityError for files that are not those that were written.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self.arrays: dict[str, NDArray[Any]] = {}
        """Name -> the array; those that are [N] are read by ``rows`` and ``whole``, which check them."""
        self._sums: dict[str, list[int]] = {}
        self._checked: dict[str, NDArray[np.bool_]] = {}
        recorded = stored(directory / NAME)
        if recorded is None:
            raise _damaged(directory, directory / NAME)
        for name, (dtype, length, sums) in recorded.items():
            path, size = directory / name, np.dtype(dtype).itemsize * length
            if not path.is_file() or path.stat().st_size != size:
                raise _damaged(directory, path)
            self.arrays[name] = np.asarray(np.memmap(path, dtype, "r")) if length else np.empty(0, dtype)
            self._sums[name], self._checked[name] = sums, np.zeros(len(sums), bool)
            if length == recorded["length"][1]:
                self.whole(name)
        self.starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(self.arrays["length"], dtype=np.int64)])

    def __len__(self) -> int:
        return len(self.arrays["row_id"])

    @property
    def lengths(self) -> NDArray[np.int32]:
        """[R] tokens of each row."""
        return self.arrays["length"]

    def rows(self, index: NDArray[np.int64]) -> Rows:
        """The rows at ``index`` [n], one after the other; a copy. Raises IntegrityError where they are damaged."""
        first, stop = self.starts[index], self.starts[index + 1]
        spans = list(zip(first.tolist(), stop.tolist(), strict=True))

        def joined(name: str) -> NDArray[Any]:
            self._check(name, first, stop)
            array = self.arrays[name]
            return np.concatenate([array[a:b] for a, b in spans])

        return Rows(
            row_id=self.arrays["row_id"][index],
            window=self.arrays["window"][index],
            offsets=np.concatenate([np.zeros(1, np.int64), np.cumsum(self.lengths[index], dtype=np.int64)]),
            input_ids=joined("input_ids"),
            entropy=joined("entropy"),
            logprob=joined("logprob") if "logprob" in self.arrays else None,
            loss_mask=joined("loss_mask"),
            group=self.arrays["group"][index] if "group" in self.arrays else None,
        )

    def whole(self, name: str) -> NDArray[Any]:
        """An array, all of it compared with its checksums. Raises IntegrityError where it is damaged."""
        array = self.arrays[name]
        self._check(name, np.zeros(1, np.int64), np.array([len(array)]))
        return array

    def _check(self, name: str, first: NDArray[np.int64], stop: NDArray[np.int64]) -> None:
        """Compare the checksums of the blocks that hold the values [first, stop) and were not looked at so far."""
        checked, array = self._checked[name], self.arrays[name]
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


class _File:
    """An array that is being written: checksums of its blocks as the bytes come."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._filled = file, 0
        self.dtype, self.length = "", 0
        self.sums: list[int] = []

    def write(self, array: NDArray[Any]) -> None:
        """Add values."""
        self.dtype, self.length = array.dtype.name, self.length + len(array)
        data = np.ascontiguousarray(array).view(np.uint8).data
        self._file.write(data)
        while data:
            if not self._filled:
                self.sums.append(0)
            part, data = data[: BLOCK - self._filled], data[BLOCK - self._filled :]
            self.sums[-1] = zlib.crc32(part, self.sums[-1])
            self._filled = (self._filled + len(part)) % BLOCK


def write_columns(directory: Path, parts: Iterable[tuple[Rows, NDArray[np.int32]]]) -> None:
    """Write rows with the number of each one's source, one part after the other. Raises OutputError."""
    files: dict[str, _File] = {}
    with writing(directory):
        make_folder(directory)
        (directory / NAME).unlink(missing_ok=True)
    with ExitStack() as stack:  # other processes may have earlier files open: new ones take their names
        for rows, source in parts:
            for name, array in _arrays(rows, source).items():
                if name not in files:
                    files[name] = _File(stack.enter_context(renamed_file(directory / name)))
                files[name].write(array)
    store(directory / NAME, {name: [f.dtype, f.length, f.sums] for name, f in files.items()})


def store(path: Path, value: Any) -> None:
    """Write a JSON value behind the digest of its bytes. Raises OutputError."""
    data = json.dumps(value).encode()
    write_bytes(path, hashlib.sha256(data).hexdigest().encode() + b"\n" + data)


def stored(path: Path) -> Any | None:
    """What ``store`` wrote; None where nothing is there, or what an earlier version wrote, without a digest.

    Raises IntegrityError where it was changed.
    """
    try:
        recorded, _, data = path.read_bytes().partition(b"\n")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as e:
        raise IntegrityError(f"the cache cannot be read: {e.strerror}", where=str(path), fix="check the disk") from e
    if recorded.startswith(b"{"):
        return None
    if hashlib.sha256(data).hexdigest().encode() != recorded:
        raise _damaged(path.parent, path)
    return json.loads(data)


def _damaged(directory: Path, path: Path) -> IntegrityError:
    return IntegrityError("the cached rows are damaged", where=str(path), fix=f"remove {directory}")


def _arrays(rows: Rows, source: NDArray[np.int32]) -> dict[str, NDArray[Any]]:
    found: dict[str, NDArray[Any] | None] = {
        "source": source,
        "row_id": rows.row_id,
        "window": rows.window,
        "length": rows.lengths.astype(np.int32),
        "group": rows.group,
        "input_ids": rows.input_ids,
        "entropy": rows.entropy,
        "logprob": rows.logprob,
        "loss_mask": rows.loss_mask,
    }
    return {name: array for name, array in found.items() if array is not None}
