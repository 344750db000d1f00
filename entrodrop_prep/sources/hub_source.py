"""Sources that ``datasets`` loads: a Hub dataset, and a directory that ``save_to_disk`` wrote."""

from __future__ import annotations

import json
import os
import pkgutil
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from entrodrop_prep.config.expansion import bounded
from entrodrop_prep.errors import ConfigError, SourceError
from entrodrop_prep.hub.read_errors import asking, refusal
from entrodrop_prep.hub.refusals import LOG_IN, unreachable_errors
from entrodrop_prep.sources.hub_stream import StreamSource
from entrodrop_prep.sources.lines import MAX_ROW_BYTES
from entrodrop_prep.sources.rows import Chunk, Source, SourceRow
from entrodrop_prep.sources.tables import Rows

ROWS_AT_ONCE = 128


class DatasetSource(Source):
    """A ``datasets.Dataset``: Arrow tables mapped into memory, any row at once."""

    def __init__(
        self,
        dataset: Any,
        *,
        name: str,
        label: str,
        identity: dict[str, Any],
        folder: str | None,
        limit: int | None,
        max_row_bytes: int,
    ) -> None:
        """label: for messages, before the row's number. folder: where ``save_to_disk`` wrote, None for the Hub."""
        if len(dataset) == 0:
            raise SourceError("holds no rows", where=label, fix="give a source with at least one row")
        self._dataset, self._label, self._identity, self._folder = dataset, label, identity, folder
        self.name, self._longest = name, max_row_bytes
        self.columns = list(dataset.column_names)
        self.total_rows: int = len(dataset) if limit is None else min(limit, len(dataset))
        self.size_bytes: int = dataset.data.nbytes
        self._opened = self.stat()

    @property
    def direct(self) -> bool:
        return True

    def identity(self) -> dict[str, Any]:
        return self._identity

    def check_unchanged(self, *, remote: bool = False) -> bool:
        if self.stat() != self._opened:
            fix = "leave it as it is while it is scored, and run again"
            raise SourceError("it changed during the run, so its rows would be of both", where=self._label, fix=fix)
        return True

    def stat(self) -> dict[str, Any]:
        if self._folder is None:
            return {"fingerprint": self._dataset._fingerprint}
        try:
            found = {p.name: p.stat() for p in sorted(Path(self._folder).glob("*.arrow"))}
        except OSError as e:
            raise SourceError(f"cannot be read: {e.strerror}", where=self._label, fix="check who may read it") from e
        return {name: [s.st_size, s.st_mtime_ns] for name, s in found.items()}

    def read(
        self,
        first: int,
        count: int,
        position: dict[str, Any] | None,
        columns: Sequence[str] | None = None,
        at_most: int | None = None,
    ) -> Chunk:
        stop = min(first + count, self.total_rows)
        if stop <= first:
            return Chunk([], None, 0)
        dataset = self._dataset.with_format("arrow")
        rows: list[SourceRow] = []
        size = 0
        while (row := first + len(rows)) < stop and (at_most is None or size < at_most):
            table = dataset[row : min(row + ROWS_AT_ONCE, stop)]
            if columns is not None:
                table = table.select([name for name in table.column_names if name in columns])
            parsed = Rows(table.schema).parse(table, self._longest)
            for n, ((values, problem), taken) in enumerate(parsed, start=row):
                rows.append(SourceRow(n, f"{self._label} row {n}", values, problem))
                size += taken
                if at_most is not None and size >= at_most:
                    break
        stop = first + len(rows)
        done = self.size_bytes * stop // len(self._dataset)
        following = {"row": stop} if stop < self.total_rows else None
        return Chunk(rows, following, done - self.size_bytes * first // len(self._dataset))


def is_saved(path: str) -> bool:
    """Whether ``save_to_disk`` wrote this local directory."""
    inside = [os.path.isfile(os.path.join(path, n)) for n in ("dataset_info.json", "state.json", "dataset_dict.json")]
    return (inside[0] and inside[1]) or inside[2]


def open_saved(
    path: str, *, split: str, split_given: bool, limit: int | None, max_row_bytes: int = MAX_ROW_BYTES
) -> DatasetSource:
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
    except IndexError as e:  # what ``datasets`` makes of no files
        raise SourceError("holds no rows", where=path, fix="give a source with at least one row") from e
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
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
    return DatasetSource(
        dataset,
        name=name,
        label=label,
        identity=identity,
        folder=folder,
        limit=limit,
        max_row_bytes=max_row_bytes,
    )


def open_hub(
    source: str,
    *,
    split: str,
    config: str | None,
    limit: int | None,
    revision: str | None = None,
    stream: bool = False,
    max_row_bytes: int = MAX_ROW_BYTES,
) -> Source:
    """A split of a Hub dataset at a revision, in the cache of ``datasets`` or read as a stream.

    Raises SourceError that says what to do, before any row is read.
    """
    from datasets import load_dataset, packaged_modules
    from datasets.exceptions import DatasetsError

    if source in {module.name for module in pkgutil.iter_modules(packaged_modules.__path__)}:
        # load_dataset would read whatever files of that format are in the working directory.
        what = "is the name of a file format, not of a dataset"
        raise SourceError(what, where=source, fix="give the files themselves: a path, a directory or a glob")
    errors = (DatasetsError, *unreachable_errors(), OSError, ValueError, RuntimeError, ImportError)

    def refused(error: Exception) -> SourceError:
        return _refused(source, config, revision, error)

    try:
        with asking("dataset", source):
            commit = _commit(source, revision)
            dataset = load_dataset(source, config, split=split, revision=commit or revision, streaming=stream)
    except errors as e:
        raise refused(e) from e
    identity = {"kind": "hub", "dataset": source, "config": dataset.info.config_name, "split": split}
    label = f"{source}[{split}]"
    found: Source
    if stream:
        identity["revision"] = commit
        found = StreamSource(
            dataset,
            name=source,
            label=label,
            identity=identity,
            limit=limit,
            refused=refused,
            errors=errors,
            max_row_bytes=max_row_bytes,
        )
    else:
        identity["revision"] = commit = _cached_commit(dataset) or commit
        if commit is None:
            identity["fingerprint"] = dataset._fingerprint
        found = DatasetSource(
            dataset,
            name=source,
            label=label,
            identity=identity,
            folder=None,
            limit=limit,
            max_row_bytes=max_row_bytes,
        )
    if commit is not None:
        found.card = _card(source, commit)
    return found


def _commit(source: str, revision: str | None) -> str | None:
    """The commit that a revision is; None where the Hub cannot be asked, and the cache must do.

    Raises what the client raises for a dataset that is not there or not open to us.
    """
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import HfHubHTTPError

    if constants.HF_HUB_OFFLINE:
        return revision
    try:
        return HfApi().dataset_info(source, revision=revision).sha
    except HfHubHTTPError:
        raise
    except unreachable_errors():
        return None


def _cached_commit(dataset: Any) -> str | None:
    """The commit that the files came from: ``datasets`` names the folder in its cache after it."""
    for file in dataset.cache_files:
        folder = Path(file["filename"]).parent.name
        if re.fullmatch("[0-9a-f]{40}", folder):
            return folder
    return None


def _card(source: str, commit: str) -> dict[str, Any]:
    """What the dataset's card says of licence and languages, as far as it can be read."""
    import yaml
    from huggingface_hub import DatasetCard, hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    errors: tuple[type[Exception], ...] = (
        *unreachable_errors(),
        EntryNotFoundError,
        OSError,
        ValueError,
        RecursionError,
        yaml.YAMLError,
    )
    try:
        path = hf_hub_download(source, "README.md", repo_type="dataset", revision=commit)
        known = bounded(DatasetCard.load(path).data.to_dict())
    except errors:
        return {}
    language = known.get("language")
    codes = language if isinstance(language, list) else [language]
    texts = [code for code in codes if code is False or (code and isinstance(code, str))]
    languages = ["no" if code is False else code for code in texts]  # YAML's `no`
    found = {key: known.get(key) for key in ("license", "license_name", "license_link")}
    kept = {key: value for key, value in found.items() if value and _is_text(value)}
    return {**kept, **({"language": languages} if languages else {})}


def _is_text(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, list) and all(isinstance(item, str) for item in value))


def _refused(source: str, config: str | None, revision: str | None, error: Exception) -> SourceError:
    from datasets.data_files import EmptyDatasetError
    from datasets.exceptions import DataFilesNotFoundError, DatasetNotFoundError, DatasetsError
    from huggingface_hub import constants

    known = refusal(error, "dataset", source, revision)
    if known is not None:
        return SourceError(f"the Hub dataset cannot be loaded: {known[0]}", where=source, fix=known[1])
    what = str(error).strip() or type(error).__name__
    lower = what.lower()
    if (
        isinstance(error, DatasetNotFoundError) and "gated" in lower
    ):  # what it was raised from is lost in newer versions
        fix = f"accept its terms on {constants.ENDPOINT}/datasets/{source}, then {LOG_IN}"
        what = "access to the dataset is restricted (gated)"
    elif isinstance(error, DatasetNotFoundError):
        fix = f"check the id; if the dataset is private, {LOG_IN}; a local path is written ./{source}"
    elif "split" in lower and isinstance(error, ValueError):
        fix = "choose a split with --split"
    elif "config" in lower and isinstance(error, ValueError):
        fix = "choose a configuration with --config"
    elif isinstance(error, (EmptyDatasetError, DataFilesNotFoundError)):
        fix = f"see what files it has on {constants.ENDPOINT}/datasets/{source}"
    elif isinstance(error, (DatasetsError, ValueError, RuntimeError, ImportError)):
        fix = f"see whether datasets.load_dataset({source!r}, {config!r}) works"
    else:
        fix = f"check the network and the id; a local path is written ./{source}"
    return SourceError(f"the Hub dataset cannot be loaded: {what}", where=source, fix=fix)
