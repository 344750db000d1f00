"""The demo's real input: the standard library source of the Python that runs it.

The corpus is split by name, so that the split is the same on every Python: the shipped model was trained on one side
(``examples/train_demo_model.py``), the demo scores the other. Names are grouped by top-level module before they are
hashed, because modules turn into packages and get private twins between releases (``pathlib.py`` and
``pathlib/__init__.py``, ``datetime.py`` and ``_pydatetime.py``): text that moves that way stays on its side.
"""

from __future__ import annotations

import hashlib
import json
import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from entrodrop_prep.errors import SourceError
from entrodrop_prep.store.disk import renamed_file

HELD_OUT_SHARE = 0.25
"""Expected share of top-level modules that are held out."""

LONGEST = 40_000
"""Longest document taken, in tokens: no single file may crowd out the others."""

_SALT = "entrodrop-demo/1"
_SKIPPED_FOLDERS = {"__pycache__", "site-packages", "dist-packages", "test", "tests", "idle_test", "lib-dynload"}
_SKIPPED_TOPS = {"encodings", "pydoc_data"}  # generated tables
_SKIPPED_FILES = {"html/entities.py"}  # a table
_SKIPPED_PREFIXES = ("_sysconfigdata", "config-")  # how this one Python was built


def is_held_out(relative_path: str) -> bool:
    """Whether a file was kept from the shipped model; ``relative_path`` counts from the standard library's folder.

    Depends on the name of the top-level module only, e.g. ``json`` for ``json/decoder.py``, less ``_`` or ``_py``
    in front.
    """
    top = PurePosixPath(relative_path.replace("\\", "/")).parts[0].removesuffix(".py")
    module = top.removeprefix("_py").lstrip("_") or top
    return _fraction(module) < HELD_OUT_SHARE


def documents(held_out: bool, root: Path | None = None) -> Iterator[tuple[str, str]]:
    """Pairs (name, text), sorted by name, of one side of the split.

    ``name`` is the path from ``root`` with ``/``; ``root`` is the folder of the running Python's standard library
    unless given. Left out are tests, installed packages, generated tables, blank files, and files that are not valid
    UTF-8 or cannot be read. Raises SourceError when there is no source at all.
    """
    folder = Path(sysconfig.get_path("stdlib")) if root is None else root
    found = False
    for name in _names(folder):
        found = True
        if is_held_out(name) != held_out:
            continue
        try:
            text = (folder / name).read_text(encoding="utf-8")
        except (UnicodeDecodeError, OSError):
            continue
        if text.strip():
            yield name, text
    if not found:
        raise SourceError(
            "this Python has no standard library source (*.py)",
            where=str(folder),
            fix="run the demo with a Python that is not zipped or stripped, e.g. one from python.org, uv or conda",
        )


def write_corpus(path: str | os.PathLike[str], tokenizer: Any, max_tokens: int = 300_000) -> dict[str, int]:
    """Write held-out documents as JSONL, columns ``name`` and ``text``, sorted by name.

    ``tokenizer`` is a transformers tokenizer. Whole documents are taken, in an order given by a hash of their names
    (a spread over the library, not its first letters), as long as their tokens fit into ``max_tokens``; special
    tokens are not counted. Returns ``documents``, ``tokens``, ``characters`` written and ``left_out``: documents
    that were too long or did not fit. Raises SourceError without standard library source, or when nothing fits, and
    OutputError when ``path`` cannot be written.
    """
    taken: list[tuple[str, str]] = []
    tokens = left_out = 0
    for name, text in sorted(documents(held_out=True), key=lambda document: _fraction(document[0])):
        count = len(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
        if count > LONGEST or tokens + count > max_tokens:
            left_out += 1
            continue
        tokens += count
        taken.append((name, text))
    if not taken:
        raise SourceError(f"no held-out document fits into {max_tokens:,} tokens", fix="allow more tokens")
    target = Path(path)
    with renamed_file(target) as file:
        for name, text in sorted(taken):
            file.write(json.dumps({"name": name, "text": text}, ensure_ascii=False).encode() + b"\n")
    characters = sum(len(text) for _, text in taken)
    return {"documents": len(taken), "tokens": tokens, "characters": characters, "left_out": left_out}


def _names(root: Path) -> list[str]:
    """Relative paths, with ``/`` and sorted, of the source files that make up the corpus."""
    names = []
    for folder, below, files in os.walk(root):
        below[:] = [name for name in below if name not in _SKIPPED_FOLDERS]
        for file in files:
            path = PurePosixPath(Path(folder, file).relative_to(root).as_posix())
            top = path.parts[0]
            if path.suffix != ".py" or str(path) in _SKIPPED_FILES:
                continue
            if top not in _SKIPPED_TOPS and not top.startswith(_SKIPPED_PREFIXES):
                names.append(str(path))
    return sorted(names)


def _fraction(name: str) -> float:
    """A number in [0, 1) that is a pure function of ``name``."""
    digest = hashlib.sha256(f"{_SALT}/{name}".encode()).digest()
    return int.from_bytes(digest[:6]) / 2**48
