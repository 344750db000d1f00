"""Files of a local model that loading may read or run."""

from __future__ import annotations

import json
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from entrodrop_prep.errors import ModelError

if TYPE_CHECKING:
    from entrodrop_prep.backends.model import ModelSettings

CONFIG, SINGLE = "config.json", "model.safetensors"
INDEX, PICKLED_INDEX = "model.safetensors.index.json", "pytorch_model.bin.index.json"
PICKLES = ("*.bin", "*.pt", "*.pth")


def weight_files(config: ModelSettings, directory: Path) -> list[str]:
    """Files of a local model that loading may read or run: weights of every engine, those of an index, and code.

    transformers loads model.safetensors, else what its index names, sub-folders included; vLLM loads what the index
    names, else all *.safetensors. So each of them counts.

    Args:
        config: which model, and what of it may be used.
        directory: where it is.

    Returns:
        Paths relative to ``directory``, with ``/``, in order.

    Raises:
        ModelError: no weights, pickles that were not allowed, or of ``named_files``.
    """
    patterns = ("*.safetensors", "*.py", *(PICKLES if config.allow_pickle else ()))
    found = {f.relative_to(directory).as_posix() for p in patterns for f in directory.glob(p) if f.is_file()}
    if config.trust_remote_code:
        found |= {f.relative_to(directory).as_posix() for f in directory.rglob("*.py") if f.is_file()}
    found |= set(named_files(config, directory))
    if not any(not name.endswith(".py") for name in found):
        if any(f.is_file() for p in PICKLES for f in directory.glob(p)):
            raise ModelError(
                "its weights are pickles, which can run code when loaded",
                where=str(directory),
                fix="convert them to safetensors, or add --allow-pickle",
            )
        raise ModelError("the directory has no weights", where=str(directory), fix="it needs *.safetensors files")
    return sorted(found)


def named_files(config: ModelSettings, directory: Path) -> list[str]:
    """The files that a local model's indices and its ``transformers_weights`` name, in order.

    Raises:
        ModelError: an index that is damaged, or that names a file which is not there or may not be loaded.
    """
    found: set[str] = set()
    indices = [INDEX, *([PICKLED_INDEX] if config.allow_pickle else [])]
    own = plain_config(directory).get("transformers_weights")
    if isinstance(own, str) and own.endswith(".index.json"):
        found.add(_checked(config, str(directory), CONFIG, own, suffix=".index.json"))
        indices.append(own)
    elif own is not None:
        found.add(_checked(config, str(directory), CONFIG, own))
    for index in indices:
        if (directory / index).is_file():
            found |= set(index_names(config, str(directory), directory / index))
    for name in sorted(found):
        if not (directory / name).is_file():
            raise ModelError(f"its weights lack the file {name}", where=str(directory), fix="fetch it again")
    return sorted(found)


def index_names(config: ModelSettings, where: str, index: Path) -> list[str]:
    """The files that an index names, relative to the model's root.

    Args:
        config: what may be used of the model.
        where: the model, for messages.
        index: a ``*.index.json``.

    Raises:
        ModelError: it is damaged, or names a file that is elsewhere or may not be loaded.
    """
    try:
        weights = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = list(dict.fromkeys(weights.values()))
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as e:
        raise ModelError(f"{index.name} is damaged: it has no weight_map", where=where, fix="fetch it again") from e
    return [_checked(config, where, index.name, name) for name in names]


def _checked(config: ModelSettings, where: str, source: str, name: object, suffix: str = ".safetensors") -> str:
    """A name that a model gives of a file, without needless parts. Raises ModelError for one that may not be used."""
    parts = PurePosixPath(name).parts if isinstance(name, str) else ()
    if not parts or not isinstance(name, str) or "\\" in name or "\0" in name or name.startswith("/") or ".." in parts:
        raise ModelError(
            f"{source} names {str(name)[:200]!r}, which is no file in the model's directory",
            where=where,
            fix="put its weights into its directory, and name them by relative paths",
        )
    if not name.endswith(suffix) and not config.allow_pickle:
        raise ModelError(
            f"{source} names {name[:200]}, which is no safetensors file: a pickle can run code when loaded",
            where=where,
            fix="convert it to safetensors, or add --allow-pickle",
        )
    return PurePosixPath(name).as_posix()


def plain_config(path: Path) -> dict[str, Any]:
    """config.json without what says nothing of the model."""
    config = json.loads((path / CONFIG).read_text(encoding="utf-8"))
    return {k: v for k, v in config.items() if k not in ("_name_or_path", "transformers_version")}
