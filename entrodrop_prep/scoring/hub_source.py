"""Sources that ``datasets`` loads: a Hub dataset, and a directory that ``save_to_disk`` wrote."""

from __future__ import annotations

import json
import os
import pkgutil
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from entrodrop_prep.errors import ConfigError, SourceError
from entrodrop_prep.scoring.rows import Chunk, Source, SourceRow
from entrodrop_prep.scoring.tables import Rows

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9_][\w.-]*)?", re.ASCII)
LOG_IN = "log in with `hf auth login` or set HF_TOKEN"


class DatasetSource(Source):
    """A ``datasets.Dataset``: Arrow tables mapped into memory, any row at once."""

    def __init__(
        self, dataset: Any, *, name: str, label: str, identity: dict[str, Any], folder: str | None, limit: int | None
    ) -> None:
        """label: for messages, before the row's number. folder: where ``save_to_disk`` wrote, None for the Hub."""
        if len(dataset) == 0:
            raise SourceError("holds no rows", where=label, fix="give a source with at least one row")
        self._dataset, self._label, self._identity, self._folder = dataset, label, identity, folder
        self.name = name
        self.columns = list(dataset.column_names)
        self.total_rows: int = len(dataset) if limit is None else min(limit, len(dataset))
        self.size_bytes: int = dataset.data.nbytes

    def identity(self) -> dict[str, Any]:
        return self._identity

    def stat(self) -> dict[str, Any]:
        if self._folder is None:
            return {"fingerprint": self._dataset._fingerprint}
        try:
            found = {p.name: p.stat() for p in sorted(Path(self._folder).glob("*.arrow"))}
        except OSError as e:
            raise SourceError(f"cannot be read: {e.strerror}", where=self._label, fix="check who may read it") from e
        return {name: [s.st_size, s.st_mtime_ns] for name, s in found.items()}

    def read(
        self, first: int, count: int, position: dict[str, Any] | None, columns: Sequence[str] | None = None
    ) -> Chunk:
        stop = min(first + count, self.total_rows)
        if stop <= first:
            return Chunk([], None, 0)
        dataset = self._dataset.with_format("arrow")
        table = dataset[first:stop]
        if columns is not None:
            table = table.select([name for name in table.column_names if name in columns])
        rows = [
            SourceRow(n, f"{self._label} row {n}", values, problem)
            for n, (values, problem) in enumerate(Rows(table.schema).parse(table), start=first)
        ]
        done = self.size_bytes * stop // len(self._dataset)
        following = {"row": stop} if stop < self.total_rows else None
        return Chunk(rows, following, done - self.size_bytes * first // len(self._dataset))


def is_saved(path: str) -> bool:
    """Whether ``save_to_disk`` wrote this local directory."""
    inside = [os.path.isfile(os.path.join(path, n)) for n in ("dataset_info.json", "state.json", "dataset_dict.json")]
    return (inside[0] and inside[1]) or inside[2]


def open_saved(path: str, *, split: str, split_given: bool, limit: int | None) -> DatasetSource:
    """A Dataset or DatasetDict that ``save_to_disk`` wrote. Raises SourceError, ConfigError."""
    from datasets import Dataset

    name = os.path.basename(os.path.abspath(path))
    label, folder = name, path
    try:
        several = os.path.isfile(os.path.join(path, "dataset_dict.json"))
        if several:
            splits = json.loads(Path(path, "dataset_dict.json").read_text(encoding="utf-8"))["splits"]
            if split not in splits:
                what = f"there is no split {split!r}, only {', '.join(splits)}"
                raise SourceError(what, where=path, fix="choose one with --split")
            label, folder = f"{name}[{split}]", os.path.join(path, split)
        dataset = Dataset.load_from_disk(folder)
    except (OSError, ValueError, KeyError) as e:
        raise SourceError(f"the saved dataset cannot be read: {e}", where=path, fix="save it again") from e
    saved = str(dataset.split) if dataset.split is not None else "train"
    if not several and split_given and split != saved:
        raise ConfigError(f"--split {split}: {path} holds one dataset, the split {saved}", fix="leave out --split")
    files = [{"name": p.name, "size": p.stat().st_size} for p in sorted(Path(folder).glob("*.arrow"))]
    identity = {
        "kind": "save_to_disk",
        "split": split if several else None,
        "files": files,
        "fingerprint": dataset._fingerprint,
    }
    return DatasetSource(dataset, name=name, label=label, identity=identity, folder=folder, limit=limit)


def open_hub(source: str, *, split: str, config: str | None, limit: int | None) -> DatasetSource:
    """A split of a Hub dataset, downloaded into the cache of ``datasets``. Raises SourceError that says what to do."""
    if not HUB_ID.fullmatch(source):
        raise SourceError("no such file or directory, and no Hub dataset id", where=source, fix="check the path")
    from datasets import load_dataset, packaged_modules
    from datasets.exceptions import DatasetsError
    from huggingface_hub.errors import HfHubHTTPError

    if source in {module.name for module in pkgutil.iter_modules(packaged_modules.__path__)}:
        # load_dataset would read whatever files of that format lie in the working directory.
        what = "is the name of a file format, not of a dataset"
        raise SourceError(what, where=source, fix="give the files themselves: a path, a directory or a glob")
    # Errors on the way to the Hub are those of the HTTP library that huggingface_hub uses: httpx, in newer ones httpx2.
    http_errors = tuple(base for base in HfHubHTTPError.__mro__ if base.__name__ == "HTTPError")
    try:
        dataset = load_dataset(source, config, split=split)
    except (DatasetsError, *http_errors, OSError, ValueError, RuntimeError, ImportError) as e:
        raise _refused(source, config, e) from e
    revision = _revision(dataset)
    identity = {"kind": "hub", "dataset": source, "config": dataset.config_name, "split": split, "revision": revision}
    if revision is None:
        identity["fingerprint"] = dataset._fingerprint
    label = f"{source}[{split}]"
    return DatasetSource(dataset, name=source, label=label, identity=identity, folder=None, limit=limit)


def _revision(dataset: Any) -> str | None:
    """The commit that the files came from: ``datasets`` names the folder in its cache after it."""
    for file in dataset.cache_files:
        folder = Path(file["filename"]).parent.name
        if re.fullmatch("[0-9a-f]{40}", folder):
            return folder
    return None


def _refused(source: str, config: str | None, error: Exception) -> SourceError:
    from datasets.data_files import EmptyDatasetError
    from datasets.exceptions import DataFilesNotFoundError, DatasetNotFoundError, DatasetsError
    from huggingface_hub import constants
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError

    reasons = [error, error.__cause__, error.__context__]
    what = str(error).strip() or type(error).__name__
    lower = what.lower()
    if any(isinstance(e, GatedRepoError) for e in reasons) or "gated" in lower:
        fix = f"accept its terms on {constants.ENDPOINT}/datasets/{source}, then {LOG_IN}"
    elif constants.HF_HUB_OFFLINE and isinstance(error, OSError):
        fix = "HF_HUB_OFFLINE is set and the dataset is not in the cache: unset it, or load the dataset once online"
    elif isinstance(error, DatasetNotFoundError):
        fix = f"check the id; if the dataset is private, {LOG_IN}; a local path is written ./{source}"
    elif "split" in lower and isinstance(error, ValueError):
        fix = "choose a split with --split"
    elif "config" in lower and isinstance(error, ValueError):
        fix = "choose a configuration with --config"
    elif isinstance(error, (EmptyDatasetError, DataFilesNotFoundError)):
        fix = f"see what files it has on {constants.ENDPOINT}/datasets/{source}"
    elif isinstance(error, HfHubHTTPError):
        fix = f"check the id and your rights; {LOG_IN}"
    elif isinstance(error, (DatasetsError, ValueError, RuntimeError, ImportError)):
        fix = f"see whether datasets.load_dataset({source!r}, {config!r}) works"
    else:
        fix = f"check the network and the id; a local path is written ./{source}"
    return SourceError(f"the Hub dataset cannot be loaded: {what}", where=source, fix=fix)
