"""Which files of a directory belong to which split, by the names that ``datasets`` goes by."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path

from entrodrop_prep.errors import SourceError
from entrodrop_prep.sources.files import DataFile
from entrodrop_prep.sources.unread import Unread
from entrodrop_prep.store.disk import scratch

log = logging.getLogger(__name__)


def pick_split(files: Sequence[DataFile], split: str, where: str, left_out: Unread) -> list[DataFile]:
    """The files of ``split``, in the order given; all of them where no name carries a split and ``train`` is asked for.

    Where some names carry splits, files that carry none belong to no split, as in ``datasets``; they are noted in
    ``left_out``.
    Raises SourceError for an unknown split, and for a file that two splits claim.
    """
    by_split = files_by_split([f.name for f in files])
    claimed: dict[str, str] = {}
    for name, members in by_split.items():
        for member in members:
            if member in claimed:
                what = f"{member} belongs to the splits {claimed[member]} and {name} by its name"
                raise SourceError(what, where=where, fix="rename it, or give the files you want as a glob")
            claimed[member] = name
    if split not in by_split:
        raise SourceError(
            f"there is no split {split!r}, only {', '.join(by_split)}",
            where=where,
            fix="choose one with --split, or give the files you want as a glob",
        )
    chosen = set(by_split[split])
    others: dict[str, int] = {}
    for f in files:
        if f.name not in claimed:
            left_out.add("whose names carry no split where others do", f.name)
        elif f.name not in chosen:
            others[claimed[f.name]] = others.get(claimed[f.name], 0) + 1
    if others:
        several = ", ".join(f"{name} ({count:,} file{'s' * (count > 1)})" for name, count in others.items())
        log.info("split %s: %d file%s; other splits: %s", split, len(chosen), "s" * (len(chosen) > 1), several)
    return [f for f in files if f.name in chosen]


def files_by_split(names: Sequence[str]) -> dict[str, list[str]]:
    """Split name -> names of its files, by ``datasets.data_files.get_data_patterns``.

    That function looks at a folder, so it is shown one of empty files with the same names: what else is in the
    source's folder then has no say, and the source may be remote. Raises SourceError for split names it does not allow.
    """
    from datasets.data_files import get_data_patterns, resolve_pattern

    with scratch("entrodrop-names-") as folder:
        root = os.path.realpath(folder)
        for name in names:
            path = Path(root, name)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        try:
            patterns = get_data_patterns(root)
        except ValueError as e:
            raise SourceError(f"file names give no usable split: {e}", fix="rename them or give a glob") from e
        found: dict[str, list[str]] = {}
        for split, globs in patterns.items():
            members: set[str] = set()
            for pattern in globs:
                try:
                    members.update(resolve_pattern(pattern, root))
                except FileNotFoundError:  # one split has several patterns, and not all of them match
                    continue
            found[str(split)] = sorted(Path(os.path.relpath(m, root)).as_posix() for m in members)
    return found
