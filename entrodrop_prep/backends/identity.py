"""The identity of a model's weights: a Hub commit, or a digest of every file that loading may read."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from entrodrop_prep.backends.model import IDENTITY, ModelInfo, ModelSettings, find_file
from entrodrop_prep.backends.weight_files import (
    CONFIG,
    INDEX,
    SINGLE,
    index_names,
    named_files,
    plain_config,
    weight_files,
)
from entrodrop_prep.config.names import user_path
from entrodrop_prep.errors import ModelError
from entrodrop_prep.store import digest

log = logging.getLogger(__name__)

ADAPTER = "adapter_config.json"
_RESTORE = "restore it and rerun to resume, or score the changed model into another --out"


@dataclass(frozen=True)
class Weights:
    """Which weights exactly.

    Attributes:
        identity: a digest of a local model's files, or a Hub id with the commit.
        files: private note of the files, so that a rerun need not hash them again: name, relative to the model's
            directory, -> [bytes, mtime_ns, sha256, ctime_ns].
        directory: that of a local model; None for one on the Hub.
    """

    identity: dict[str, str]
    files: dict[str, list[Any]]
    directory: Path | None = None

    def check_unchanged(self) -> None:
        """Raises ModelError where a file is not what it was when the run began.

        Sizes and times are looked at. A file is hashed again where only its ctime differs: its other times may have
        been set back, or just its permissions were changed.
        """
        for name, entry in self.files.items():
            path = (self.directory or Path()) / name
            try:
                now = path.stat()
                same = [now.st_size, now.st_mtime_ns] == entry[:2]
                if same and now.st_ctime_ns != entry[3]:
                    same = digest.of_file(path) == entry[2]
                    entry[3] = now.st_ctime_ns if same else entry[3]
            except OSError:
                same = False
            if not same:
                raise ModelError("the file changed while its model was in use", where=str(path), fix=_RESTORE)


def identify_weights(config: ModelSettings, info: ModelInfo, known_files: dict[str, list[Any]] | None) -> Weights:
    """Hash a local model's files, but those unchanged since ``known_files`` was noted; a Hub model has its commit.

    Raises:
        ModelError: weights that cannot be told from others, or that may not be loaded.
    """
    if find_file(config.model, ADAPTER, info.commit) is not None:
        raise ModelError(
            f"it holds an adapter ({ADAPTER}), which may be loaded with another base model or not at all",
            where=config.model,
            fix="merge the adapter into the weights, or move its files elsewhere",
        )
    if info.commit is not None:
        index = find_file(config.model, INDEX, info.commit)
        if index is not None:
            index_names(config, config.model, index)
        return Weights({"hub_id": config.model, "commit": info.commit}, {})
    directory = user_path(config.model)
    names, named = weight_files(config, directory), named_files(config, directory)
    if SINGLE in names and {*named} - {SINGLE}:
        log.warning("%s: it has %s, which transformers loads, and an index of others for vLLM", info.name, SINGLE)
    files = dict(_hashed(directory, names, known_files or {}))
    content = {"config": plain_config(directory), **{name: entry[2] for name, entry in files.items()}}
    chosen = [name for name in named if name.endswith(".safetensors")]
    there = [name for name in names if name.endswith(".safetensors") and not name.startswith("consolidated")]
    if chosen and chosen != there:  # which of them are loaded; else it is all of them, and needs no saying
        content["index"] = chosen
    guarded = files | dict(_hashed(directory, [CONFIG], known_files or {}))
    return Weights({"digest": digest.of_json(content)}, guarded, directory)


def identity_name(identity: dict[str, str]) -> str:
    """The name under which a server also serves weights, so that a client can identify them: ``entrodrop:<digest>``."""
    return f"{IDENTITY}{identity.get('commit') or identity['digest']}"


def _hashed(directory: Path, names: list[str], known: dict[str, list[Any]]) -> Iterator[tuple[str, list[Any]]]:
    """The entry of ``Weights.files`` for each file."""
    for name in names:
        path = directory / name
        found = path.stat()
        before = known.get(name)
        times = [found.st_size, found.st_mtime_ns, found.st_ctime_ns]
        if isinstance(before, list) and len(before) == 4 and [*before[:2], before[3]] == times:
            yield name, list(before)
        else:
            yield name, [found.st_size, found.st_mtime_ns, digest.of_file(path), found.st_ctime_ns]
