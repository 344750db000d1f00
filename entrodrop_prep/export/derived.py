"""Copies of finished epochs in the forms that some trainers need: ``--layout concatenated`` and ``--layout jsonl``.

They follow from the epochs' files alone, so they are no part of the dataset's identity or digest: they can be made at
any time, are made again when epochs are added, and are listed apart in the manifest, under ``derived``.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa

from entrodrop_prep.errors import ConfigError, IntegrityError, OutputError
from entrodrop_prep.export.card import NAME as CARD
from entrodrop_prep.export.card import PICTURE
from entrodrop_prep.export.epoch import misplaced
from entrodrop_prep.store import digest, manifest
from entrodrop_prep.store.digest import ContentDigest
from entrodrop_prep.store.disk import NO_LINK, TMP, check_held, create, system_error, writing
from entrodrop_prep.store.layout import VALIDATION
from entrodrop_prep.store.manifest_types import DERIVED, is_written
from entrodrop_prep.store.ownership import Contents, Owned
from entrodrop_prep.store.schema import MASKED, masked_schema
from entrodrop_prep.store.shards import read_batches, reading

log = logging.getLogger(__name__)

CONCATENATED, JSONL = "concatenated", "jsonl"
ALL, SAVED = "all", "all_hf"
FOLDERS = {CONCATENATED: (ALL, SAVED), JSONL: (JSONL,)}
CONTENTS = Contents(
    MASKED,
    files=(PICTURE,),
    folders=(ALL, SAVED, JSONL),
    misplaced=misplaced,
    drawn=(PICTURE,),
    edited=(CARD,),
    temporary=(f"{TMP}columns", f"{TMP}order", f"{TMP}cache", f"{TMP}link", f"{TMP}linked"),
)
"""What a masked directory holds beside its shards."""


def known(out: Path) -> list[str]:
    """The layouts that a directory has, or was to have when an earlier run was stopped."""
    names = set((manifest.read_state(out) or {}).get("layouts", []))
    if (out / manifest.NAME).exists():
        names |= {entry["layout"] for entry in manifest.read(out, MASKED).get("derived", [])}
    return [name for name in FOLDERS if name in names]


def check(out: Path, layouts: list[str], before: list[str], there: set[int], epochs: int) -> None:
    """Before any work: every epoch will be ``there``, and no folder to be written is the user's.

    ``before`` are the layouts whose folders are known to be this program's; ``Owned.check`` looks into them. Raises
    ConfigError and OutputError.
    """
    gaps = [e for e in range(epochs) if e not in there]
    if layouts and gaps:
        raise ConfigError(
            f"--layout {layouts[0]} needs all {epochs} epochs, and epoch {gaps[0]} would not be there",
            where=str(out),
            fix="leave out --only-epochs, or derive once the other epochs are there",
        )
    for folder in folders(name for name in layouts if name not in before):
        path = out / folder
        if os.path.lexists(path):
            inside = sorted(p.name for p in path.iterdir()) if path.is_dir() and not path.is_symlink() else []
            raise OutputError(
                "this is in the way of what --layout writes, and is not this program's",
                where=str(path / inside[0]) if inside else str(path),
                fix="move it out of the directory",
            )


def folders(layouts: Iterable[str]) -> list[str]:
    """The folders of some layouts."""
    return [folder for layout in layouts for folder in FOLDERS[layout]]


def holds(out: Path, finished: dict[str, Any], layouts: list[str]) -> bool:
    """Whether all of them are there, of the right size."""
    entries = finished.get("derived", [])
    return {e["layout"] for e in entries} == set(layouts) and all(
        (out / e["file"]).is_file() and (out / e["file"]).stat().st_size == e["bytes"] for e in entries
    )


def make(out: Path, described: dict[str, Any], layouts: list[str]) -> list[dict[str, Any]]:
    """Write the folders of ``layouts`` again; returns the manifest's entries for their files.

    Raises IntegrityError where an epoch's file is not what the manifest says.
    """
    if layouts:
        for entry in described["files"]:
            manifest.check_file(out, entry)
    owned, entries = Owned(out, CONTENTS), []
    for layout in layouts:
        log.info("deriving %s", " and ".join(f"{folder}/" for folder in FOLDERS[layout]))
        made: dict[str, str] = {}
        if layout == CONCATENATED:
            _concatenate(out, described, owned, made)
            _save(out, described, owned, made)
        else:
            _write_lines(out, described, owned, made)
        for name, sha256 in made.items():
            size = (out / name).stat().st_size
            entries.append({"file": name, "bytes": size, "sha256": sha256, "layout": layout})
    return entries


def can_link(out: Path) -> bool:
    """Whether the file system of a directory gives a file two names."""
    one, two = out / f"{TMP}link", out / f"{TMP}linked"
    with writing(out):
        create(one).close()
        try:
            os.link(one, two)
            two.unlink()
        except OSError as e:
            if e.errno not in NO_LINK:
                raise
            return False
        finally:
            one.unlink()
    return True


def epoch_files(described: dict[str, Any]) -> dict[int, list[dict[str, Any]]]:
    """Epoch -> the manifest's entries of its files, all in order."""
    found: dict[int, list[dict[str, Any]]] = {}
    for entry in described["files"]:
        if "epoch" in entry:
            found.setdefault(entry["epoch"], []).append(entry)
    return dict(sorted(found.items()))


def parts(described: dict[str, Any]) -> dict[str, list[str]]:
    """``train``: the files of all epochs in order; ``validation``: its own, if there are any."""
    found = {"train": [e["file"] for files in epoch_files(described).values() for e in files]}
    validation = [e["file"] for e in described["files"] if e.get("part") == VALIDATION]
    return {**found, VALIDATION: validation} if validation else found


def _concatenate(out: Path, described: dict[str, Any], owned: Owned, made: dict[str, str]) -> None:
    """The files of all epochs under new names: hard links, else copies."""
    files = parts(described)["train"]
    with owned.writing_folder(ALL, made) as tmp:
        for number, name in enumerate(files):
            target = tmp / f"train-{number:05d}-of-{len(files):05d}.parquet"
            try:
                os.link(out / name, target)
            except OSError as e:
                if e.errno not in NO_LINK:
                    raise
                shutil.copyfile(out / name, target)


def _save(out: Path, described: dict[str, Any], owned: Owned, made: dict[str, str]) -> None:
    """A ``DatasetDict`` as ``save_to_disk`` writes it. Nothing in it depends on the time, the machine or the cache."""
    import datasets
    from datasets import utils as bars

    schema = masked_schema()
    features = datasets.Features.from_arrow_schema(schema.remove_metadata())
    cache = out / f"{TMP}cache"
    silent = bars.are_progress_bars_disabled()
    bars.disable_progress_bars()
    try:
        with owned.writing_folder(SAVED, made) as tmp, _generation_errors():
            found = datasets.DatasetDict()
            for split, files in parts(described).items():
                check_held(out)
                read = datasets.Dataset.from_parquet(
                    [str(out / name) for name in files], cache_dir=str(cache), features=features, columns=schema.names
                )
                fingerprint = digest.of_json([described["content_digest"], split])
                info = datasets.DatasetInfo(features=features)
                named = datasets.NamedSplit(split)
                found[split] = datasets.Dataset(read.data, info=info, split=named, fingerprint=fingerprint[:16])
            check_held(out)
            found.save_to_disk(str(tmp))
    finally:
        shutil.rmtree(cache, ignore_errors=True)
        if not silent:
            bars.enable_progress_bars()


@contextlib.contextmanager
def _generation_errors() -> Iterator[None]:
    """Of a full disk ``datasets`` says no more than that it failed: raise the cause."""
    from datasets.exceptions import DatasetGenerationError

    try:
        yield
    except DatasetGenerationError as e:
        cause = system_error(e)
        if cause is None:
            raise
        raise cause from e


def lines(described: dict[str, Any]) -> dict[str, list[str]]:
    """Name of each JSONL file -> the Parquet files it holds the rows of."""
    found = {f"{files[0]['file'].split('/')[0]}.jsonl": files for files in epoch_files(described).values()}
    named = {name: [e["file"] for e in files] for name, files in found.items()}
    validation = parts(described).get(VALIDATION)
    return {**named, f"{VALIDATION}.jsonl": validation} if validation else named


def _write_lines(out: Path, described: dict[str, Any], owned: Owned, made: dict[str, str]) -> None:
    """One JSON object a row, in the columns of the files."""
    with owned.writing_folder(JSONL, made) as tmp:
        for name, files in lines(described).items():
            with (tmp / name).open("w", encoding="ascii", newline="\n") as f:
                for file in files:
                    for batch in read_batches(out / file):
                        f.writelines(json.dumps(row, separators=(",", ":")) + "\n" for row in batch.to_pylist())


def absent(out: Path, described: dict[str, Any]) -> list[str]:
    """Layouts that the manifest lists and of which no file is there."""
    listed = {e["layout"] for e in described.get("derived", [])}
    return [name for name in FOLDERS if name in listed and not any((out / f).exists() for f in FOLDERS[name])]


def findings(out: Path, described: dict[str, Any], schema: pa.Schema) -> Iterator[str]:
    """What does not hold of the derived files: missing, changed, not listed, or other rows than the epochs'.

    A layout of which nothing is there is left out: it follows from the epochs, and a push leaves it behind.
    """
    yield from _unlisted(out, described)
    gone = absent(out, described)
    entries = [e for e in described.get("derived", []) if e["layout"] not in gone]
    listed = {e["file"]: e for e in entries}
    layouts = [name for name in FOLDERS if name in {e["layout"] for e in entries}]
    for folder in (f for layout in layouts for f in FOLDERS[layout]):
        for path in sorted((out / folder).rglob("*")):
            if path.is_file() and path.relative_to(out).as_posix() not in listed:
                yield f"{path}: the manifest does not list this file; remove it"
    broken = False
    for entry in entries:
        try:
            manifest.check_file(out, entry)
        except IntegrityError as e:
            broken = True
            yield str(e)
    if broken:
        return
    if CONCATENATED in layouts:
        yield from _other_copies(out, described, listed)
    if JSONL in layouts:
        for name, files in lines(described).items():
            if not (out / JSONL / name).exists():
                yield f"{out / JSONL / name}: the file is missing"
            elif _digest_of_lines(out / JSONL / name, schema) != _digest_of(out, files, schema):
                yield f"{out / JSONL / name}: its rows are not those of {files[0].split('/')[0]}"


def _unlisted(out: Path, described: dict[str, Any]) -> Iterator[str]:
    """Folders with a layout's name and a layout's files, of a layout that the manifest does not list."""
    listed = {e["layout"] for e in described.get("derived", [])}
    for folder, layout in ((f, layout) for layout, folders in FOLDERS.items() for f in folders):
        names = [p.relative_to(out).as_posix() for p in (out / folder).rglob("*") if not p.is_dir()]
        if layout not in listed and names and all(is_written(name, DERIVED[layout]) for name in names):
            yield f"{out / folder}: the manifest does not list these files; remove them, or add --layout and run again"


def _other_copies(out: Path, described: dict[str, Any], listed: dict[str, Any]) -> Iterator[str]:
    """Of ``all`` the bytes, of ``all_hf`` the rows."""
    files = [e for of_epoch in epoch_files(described).values() for e in of_epoch]
    copies = [e for name, e in sorted(listed.items()) if name.startswith(f"{ALL}/")]
    if [e["sha256"] for e in copies] != [e["sha256"] for e in files]:
        yield f"{out / ALL}: its files are not those of the epochs"
    for split, names in parts(described).items():
        saved, content = sorted((out / SAVED / split).glob("data-*.arrow")), ContentDigest(masked_schema())
        for path in saved:
            with reading(path), pa.memory_map(str(path)) as f, pa.ipc.open_stream(f) as reader:
                for batch in reader:
                    content.update(batch)
        if content.hexdigest() != _digest_of(out, names, masked_schema()):
            yield f"{out / SAVED / split}: its rows are not those of the epochs"


def _digest_of(out: Path, files: list[str], schema: pa.Schema) -> str:
    """Of the rows of several Parquet files, one after the other."""
    content = ContentDigest(schema)
    for name in files:
        for batch in read_batches(out / name, schema.names):
            content.update(batch)
    return content.hexdigest()


def _digest_of_lines(path: Path, schema: pa.Schema) -> str | None:
    """The same of a JSONL file; None where a line is no such row."""
    content = ContentDigest(schema)
    try:
        with path.open(encoding="ascii") as f:
            while some := [json.loads(line) for line in islice(f, 512)]:
                if any(list(row) != schema.names for row in some):
                    return None
                content.update(pa.Table.from_pylist(some, schema=schema))
    except (ValueError, TypeError, pa.ArrowException):
        return None
    return content.hexdigest()
