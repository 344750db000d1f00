"""Weights that nothing unpacks: 8-bit or packed numbers, and the scales that would make weights of them.

A loader that does not know a format takes the stored numbers for the weights, and scores follow from nonsense.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from entrodrop_prep.backends.weight_files import weight_files
from entrodrop_prep.config.names import user_path
from entrodrop_prep.errors import ModelError

if TYPE_CHECKING:
    from entrodrop_prep.backends.model import ModelInfo, ModelSettings

Stored = Mapping[str, tuple[str, int]]
"""Name of a tensor -> its number format as safetensors names it, and its number of dimensions."""

_PACKED = re.compile(r"F[468]_\w+|F[468]|[IU](8|16|32)")
"""Formats of numbers that are not yet weights. 64-bit integers and booleans are indices and masks."""
_NO_WEIGHTS = ("bias", "masked_bias", "position_ids", "relative_position_index")
_SCALE = re.compile(
    r"(.*[._])?((weight|input|output|activation|act)_(global_)?scale(_inv|_2)?|\w*_scale_inv|scb|(nested_)?absmax"
    r"|(nested_)?quant_map|quant_state\.\w+|qzeros|(\w+_)?zero_point|g_idx)",
    re.IGNORECASE,
)
_PERHAPS = re.compile(r"(\w+_)?scales?|zeros")
"""A scale where a weight of that name is beside it; a model may have scales of its own."""
_OF_ATTENTION = re.compile(r".*[._](k|v|q|kv|prob)_scale")
"""Scales of a cache of keys and values in 8 bits: of no weight, and of no meaning where the cache has whole numbers."""
_FIX = "give the checkpoint in bfloat16, float16 or float32, or one that is quantized as {} can read it"


def stored_in(files: Iterable[Path]) -> Stored:
    """The tensors of safetensors files, from their headers. A damaged file is the loader's to refuse."""
    found: dict[str, tuple[str, int]] = {}
    for file in files:
        try:
            with file.open("rb") as f:
                (length,) = struct.unpack("<Q", f.read(8))
                header = json.loads(f.read(length))
            found |= {n: (t["dtype"], len(t["shape"])) for n, t in header.items() if n != "__metadata__"}
        except (OSError, ValueError, struct.error, TypeError, KeyError, AttributeError, MemoryError, OverflowError):
            continue
    return found


def stored_weights(config: ModelSettings, info: ModelInfo) -> Stored:
    """The tensors of a model, from its files here or the headers of those on the Hub; none where they cannot be had."""
    from huggingface_hub import get_safetensors_metadata, snapshot_download
    from huggingface_hub.errors import (
        HfHubHTTPError,
        LocalEntryNotFoundError,
        NotASafetensorsRepoError,
        OfflineModeIsEnabled,
        SafetensorsParsingError,
    )

    if info.commit is None:
        path = user_path(config.model)
        return stored_in(path / name for name in _loaded(weight_files(config, path)))
    try:
        here = Path(snapshot_download(config.model, revision=info.commit, local_files_only=True))
        if stored := stored_in(here / name for name in _loaded(_names(here))):
            return stored
    except LocalEntryNotFoundError:
        pass
    try:
        metadata = get_safetensors_metadata(config.model, revision=info.commit)
    except (HfHubHTTPError, NotASafetensorsRepoError, SafetensorsParsingError, OfflineModeIsEnabled, OSError):
        return {}  # what keeps them from being read keeps them from being loaded
    files = metadata.files_metadata.values()
    return {name: (str(t.dtype), len(t.shape)) for file in files for name, t in file.tensors.items()}


def _names(directory: Path) -> list[str]:
    return sorted(file.relative_to(directory).as_posix() for file in directory.rglob("*.safetensors"))


def _loaded(names: Iterable[str]) -> list[str]:
    """The safetensors files, without Mistral's own form of the same weights where the usual one is there too."""
    files = [name for name in names if name.endswith(".safetensors")]
    return [name for name in files if "consolidated" not in name] or files


def check_for_engine(config: ModelSettings, info: ModelInfo) -> None:
    """Raise ModelError for weights that vLLM would take as they are stored; what it knows of it refuses by itself."""
    if not info.quantization and not (user_path(config.model) / "hf_quant_config.json").exists():
        check_stored(stored_weights(config, info), info, "vLLM")


def check_stored(stored: Stored, info: ModelInfo, engine: str) -> None:
    """Raise ModelError for weights in 8 bits, packed in integers, or with scales, of a model that nobody unpacks.

    Args:
        stored: its tensors.
        info: the model, which is not quantized as far as ``engine`` knows.
        engine: what loads it, for people.
    """
    for name, (dtype, dimensions) in sorted(stored.items()):
        packed = _PACKED.fullmatch(dtype) and dimensions > 1 and name.rpartition(".")[2] not in _NO_WEIGHTS
        if packed and not is_scale(name, stored):
            raise _unread(f"its weight {name} is stored as {dtype}", info, engine)
    for name in sorted(name for name in stored if is_scale(name, stored)):
        module, _, last = name.rpartition(".")
        of = last.partition("_scale")[0]  # x.weight_scale of x.weight, down_proj_scale of down_proj
        if not stored.keys().isdisjoint((f"{module}.weight", f"{module}.{of}", f"{module}.{of}.weight")):
            raise _unread(f"its weights have scales, such as {name}", info, engine)


def check_left_over(left: Iterable[str], stored: Stored, info: ModelInfo, engine: str, *, quantized: bool) -> None:
    """Raise ModelError for tensors that a loader had no use for where they are scales of weights.

    Args:
        left: tensors of the checkpoint that became part of nothing.
        stored: all of them, as far as is known.
        info: the model.
        engine: what loaded it, for people.
        quantized: whether it was unpacked by a quantizer, which may do without scales of the inputs.
    """
    for name in sorted(name for name in left if is_scale(name, stored)):
        if not quantized or "weight" in name.rpartition(".")[2]:
            raise _unread(f"its weights have scales that were not used, such as {name}", info, engine)


def is_scale(name: str, stored: Stored) -> bool:
    """Whether a tensor is a scale, a zero point or the like of a quantized weight, by its name and those beside it."""
    if _OF_ATTENTION.fullmatch(name):
        return False
    module, _, last = name.rpartition(".")
    if _SCALE.fullmatch(name):
        return True
    beside = (f"{module}.{other}" for other in (last.partition("_scale")[0], "weight", "qweight"))
    return _PERHAPS.fullmatch(last) is not None and not stored.keys().isdisjoint(beside)


def _unread(what: str, info: ModelInfo, engine: str) -> ModelError:
    how = f" (its config.json says {info.quantization})" if info.quantization else ""
    return ModelError(f"{what}, which {engine} does not unpack{how}", where=info.name, fix=_FIX.format(engine))
