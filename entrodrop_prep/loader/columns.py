"""The scored rows of a job as flat arrays in memory-mapped files: read once, then shared by every process."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from entrodrop_prep.errors import IntegrityError
from entrodrop_prep.sample.mask import Rows
from entrodrop_prep.shards import write_bytes, writing

NAME = "columns.json"
"""Written last: the number format and length of each array. Without it the files are not finished."""


class Columns:
    """R rows of N tokens, each array a file.

    ``source``, ``row_id``, ``window``, ``length`` and, with thresholds by column, ``group`` are [R]; ``input_ids``,
    ``entropy`` (NaN for null), ``loss_mask`` and, where it is looked at, ``logprob`` are [N], as in ``Rows``. In memory
    are 8 bytes a row, where each begins; the rest is the operating system's cache. Raises IntegrityError for files that
    are not those that were written.
    """

    def __init__(self, directory: Path) -> None:
        self.arrays: dict[str, NDArray[Any]] = {}
        told = json.loads((directory / NAME).read_bytes())
        for name, (dtype, length) in told.items():
            path = directory / name
            if not path.is_file() or path.stat().st_size != np.dtype(dtype).itemsize * length:
                raise IntegrityError("the cached rows are damaged", where=str(path), fix=f"remove {directory}")
            self.arrays[name] = np.asarray(np.memmap(path, dtype, "r")) if length else np.empty(0, dtype)
        self.starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(self.arrays["length"], dtype=np.int64)])

    def __len__(self) -> int:
        return len(self.arrays["row_id"])

    @property
    def lengths(self) -> NDArray[np.int32]:
        """[R] tokens of each row."""
        return self.arrays["length"]

    def rows(self, index: NDArray[np.int64]) -> Rows:
        """The rows at ``index`` [n], one after the other; a copy."""
        begins, ends = self.starts[index].tolist(), self.starts[index + 1].tolist()
        spans = list(zip(begins, ends, strict=True))

        def joined(name: str) -> NDArray[Any]:
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


def write_columns(directory: Path, parts: Iterable[tuple[Rows, NDArray[np.int32]]]) -> None:
    """Write rows with the number of each one's source, one part after the other."""
    written: dict[str, tuple[str, int]] = {}
    with writing(directory), ExitStack() as stack:
        directory.mkdir(parents=True, exist_ok=True)
        (directory / NAME).unlink(missing_ok=True)
        files: dict[str, BinaryIO] = {}
        for rows, source in parts:
            for name, array in _arrays(rows, source).items():
                if name not in files:
                    files[name] = stack.enter_context((directory / name).open("wb"))
                files[name].write(np.ascontiguousarray(array).data)
                written[name] = array.dtype.name, written.get(name, ("", 0))[1] + len(array)
        for file in files.values():
            file.flush()
            os.fsync(file.fileno())
    write_bytes(directory / NAME, json.dumps(written, indent=1).encode())


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
