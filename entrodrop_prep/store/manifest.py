"""The manifest: what a finished directory holds, and the proof that it still does.

``manifest.json`` lists every file with its SHA-256 and covers itself: ``manifest_digest`` is the SHA-256 of the
manifest's exact bytes with that field's 64 digits zeroed. It holds no time, host or path of a machine, so a directory
can be moved.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from entrodrop_prep.errors import IntegrityError, MismatchError, OutputError, UnsupportedError
from entrodrop_prep.store import inside, strict_json
from entrodrop_prep.store.disk import TMP, write_bytes, writing
from entrodrop_prep.store.layout import EPOCHS, OTHER_FILES, REJECTED, SCORED_FILES, SHARD_FILES, TOKENIZER, UNIGRAM
from entrodrop_prep.store.locks import LOCK
from entrodrop_prep.store.manifest_schema import State, problem
from entrodrop_prep.store.manifest_types import problem_of
from entrodrop_prep.store.parallel import in_order
from entrodrop_prep.store.schema import family
from entrodrop_prep.store.shards import DAMAGED_FOOTER, read_footer, shard_names
from entrodrop_prep.store.unsupported import refuse_bounds

NAME = "manifest.json"
STATE = ".state.json"
_ZERO = "0" * 64
_MEND = "remove it and run the command that made it again, or restore it"
_RESTORE = "restore it, or make the directory again"
_EPOCH = re.compile(r"epoch_\d+")
_FIELD = re.compile(rb'("manifest_digest": ")([0-9a-f]{64})(")')


def write(directory: Path, manifest: dict[str, Any]) -> dict[str, Any]:
    """Write ``manifest.json``, atomically, with its own digest; returns it as written."""
    manifest = {**manifest, "manifest_digest": _ZERO}
    data = json.dumps(manifest, indent=1, sort_keys=True, ensure_ascii=True).encode() + b"\n"
    manifest["manifest_digest"] = hashlib.sha256(data).hexdigest()
    data = _FIELD.sub(rb"\g<1>" + manifest["manifest_digest"].encode() + rb"\g<3>", data)
    write_bytes(directory / NAME, data)
    return manifest


def read(directory: Path, schema: str) -> dict[str, Any]:
    """The manifest of a finished directory, checked before it is believed: its own digest, the types and ranges of what
    it says, and that each file it lists is a plain file in the directory, if it is there at all.

    Args:
        directory: of a finished dataset.
        schema: ``scored/1`` or ``masked/1``.

    Raises IntegrityError if there is none, it was changed, it says what it cannot say, or it describes something else.
    """
    path = directory / NAME
    kind = family(schema)
    if not inside.exists(path):
        raise _absent(directory, kind)
    manifest, data = _read_json(path)
    claimed, found = manifest.get("manifest_digest"), manifest.get("schema")
    zeroed, fields = _FIELD.subn(rb"\g<1>" + _ZERO.encode() + rb"\g<3>", data)
    if fields != 1 or hashlib.sha256(zeroed).hexdigest() != claimed:
        raise IntegrityError("the manifest was changed after it was written", where=str(path), fix=_RESTORE)
    if found != schema:
        raise IntegrityError(
            f"it holds {found!r}, this needs {schema!r}",
            where=str(directory),
            fix=f"give a {kind} directory made by this version",
        )
    wrong = problem(manifest)
    if wrong:
        raise IntegrityError(f"the manifest cannot be right: {wrong}", where=str(path), fix=_RESTORE)
    manifest.get("recipe", {}).pop("bounds", None)  # null, of earlier versions
    if kind == "scored":
        manifest.pop("derived", None)  # which only a masked directory has
    for entry in (*manifest["files"], *manifest.get("derived", [])):
        inside.check_place(directory, entry["file"])
    return manifest


def _absent(directory: Path, kind: str) -> IntegrityError:
    """Why there is no manifest."""
    if not os.path.isdir(directory):
        return IntegrityError("no such directory", where=str(directory), fix=f"give a {kind} directory")
    refuse_unfinished(directory)
    if os.path.lexists(directory / STATE):
        command = {"scored": "score", "masked": "materialize"}[kind]
        return IntegrityError(
            f"the {kind} directory is not finished",
            where=str(directory),
            fix=f"run the same `entrodrop {command}` command again to finish it",
        )
    return IntegrityError(
        f"it has no {NAME}, so it is no {kind} directory", where=str(directory), fix=f"give a {kind} directory"
    )


def _read_json(path: Path) -> tuple[dict[str, Any], bytes]:
    """A manifest that is a JSON object, unchecked, and its bytes. Raises IntegrityError, of bounds UnsupportedError."""
    with inside.opened(path) as f:
        data = f.read()
    try:
        found = strict_json.loads(data)
        if not isinstance(found, dict):
            raise ValueError("it is no JSON object")
    except ValueError as e:
        raise IntegrityError(f"the manifest is damaged: {e}", where=str(path), fix=_RESTORE) from e
    refuse_bounds(found, path)
    return found, data


def changed_files(directory: Path, manifest: dict[str, Any]) -> Iterator[IntegrityError]:
    """Files that are where a manifest's are and are not listed, then listed ones that are missing or were changed."""
    yield from unlisted_files(directory, manifest)

    def changed(entry: dict[str, Any]) -> list[IntegrityError]:
        try:
            check_file(directory, entry)
        except IntegrityError as e:
            return [e]
        return []

    for found in in_order(changed, manifest["files"]):
        yield from found


def look(directory: Path, manifest: dict[str, Any]) -> None:
    """A quick look, by names and sizes: what is listed is there, and nothing else that would be taken for it.

    Raises IntegrityError.
    """
    for found in unlisted_files(directory, manifest):
        raise found
    for entry in manifest["files"]:
        check_size(directory, entry)


def unlisted_files(directory: Path, manifest: dict[str, Any]) -> Iterator[IntegrityError]:
    """What is where files of this program are, and a reader would take for one of them. Quick: nothing is read."""
    listed = {entry["file"] for entry in manifest["files"]}
    if family(manifest["schema"]) == "scored":
        patterns = [SCORED_FILES, f"{TOKENIZER}/**/*", UNIGRAM, REJECTED]
    else:
        patterns = [SHARD_FILES, *(pattern for name, pattern in OTHER_FILES.items() if name in manifest)]
        known = {e["folder"] for e in manifest["epochs"]}
        for path in sorted(directory.glob(EPOCHS)):
            if _EPOCH.fullmatch(path.name) and path.name not in known:
                yield IntegrityError("the manifest does not list this epoch", where=str(path), fix="remove it")
    for path in sorted(path for pattern in patterns for path in directory.glob(pattern)):
        name = path.relative_to(directory).as_posix()
        if name not in listed and not path.name.startswith(".") and (os.path.islink(path) or not os.path.isdir(path)):
            yield IntegrityError("the manifest does not list this file", where=str(path), fix="remove it")


def check_file(directory: Path, entry: dict[str, Any]) -> None:
    """One listed file has the size and SHA-256 it should. Raises IntegrityError."""
    check_size(directory, entry)
    path = directory / entry["file"]
    if inside.sha256_of(path) != entry["sha256"]:
        raise IntegrityError("its bytes are not those the manifest was written for", where=str(path), fix=_MEND)


def check_size(directory: Path, entry: dict[str, Any]) -> None:
    """One listed file is there with the size it should have: a quick look. Raises IntegrityError."""
    size = inside.status_below(directory, entry["file"]).st_size
    if size != entry["bytes"]:
        path = directory / entry["file"]
        raise IntegrityError(f"it has {size} bytes, the manifest says {entry['bytes']}", where=str(path), fix=_MEND)


def file_entry(directory: Path, path: Path, **more: Any) -> dict[str, Any]:
    """The manifest's entry for one file."""
    name = path.relative_to(directory).as_posix()
    return {"file": name, "bytes": path.stat().st_size, "sha256": inside.sha256_of(path), **more}


def read_state(directory: Path) -> dict[str, Any] | None:
    """What a run noted for its own continuation; None where it is not there or of no use. Never part of the result."""
    try:
        state = inside.read_json(directory / STATE)
    except (IntegrityError, ValueError):
        return None
    return state if problem_of(State, state) is None else None


def being_cleaned(directory: Path) -> bool:
    """Whether a run was stopped while it threw away what was there: what is left goes too, whatever it is."""
    state = read_state(directory)
    return state is not None and "identity" not in state


def write_state(directory: Path, state: dict[str, Any]) -> None:
    """Note what a later run needs to continue this one."""
    write_bytes(directory / STATE, json.dumps(state, indent=1, sort_keys=True).encode())


def check_usable(directory: Path, kind: str) -> None:
    """An output directory is new, empty, or one of ours. Raises OutputError naming what else is there."""
    with writing(directory):
        if not directory.exists():
            return
        if not directory.is_dir():
            raise OutputError("this is a file, not a directory", where=str(directory), fix="choose another --out")
        present = sorted(p.name for p in directory.iterdir() if p.name != LOCK and not p.name.startswith(TMP))
    if not present:
        return
    state = read_state(directory) or (_footer_of_a_shard(directory) if NAME not in present else None)
    refuse_bounds(state, directory / STATE)
    if state is None and NAME not in present:
        raise OutputError(
            f"the directory holds something else ({present[0]})",
            where=str(directory),
            fix="choose an empty or a new directory for --out",
        )
    if state is None:
        state, _ = _read_json(directory / NAME)
    found = family(str(state.get("schema")))
    if found != kind:
        raise OutputError(
            f"the directory holds a {found} dataset",
            where=str(directory),
            fix=f"choose another --out for the {kind} one",
        )


def identity_of_shards(directory: Path, kind: str) -> dict[str, Any] | None:
    """The identity of an unfinished run, as its first shard gives it; None where it left none: any settings will do.

    Raises IntegrityError for a shard that cannot be read.
    """
    first = next(iter(shard_names(directory, kind)), None)
    return None if first is None else read_footer(directory / first).info.get("identity")


def _footer_of_a_shard(directory: Path) -> dict[str, Any] | None:
    """What a shard says of an unfinished directory whose private note was not copied along; None if none is ours.

    Raises IntegrityError for one of ours that is damaged.
    """
    for name in (*shard_names(directory, "scored"), *shard_names(directory, "masked")):
        try:
            return read_footer(directory / name).info
        except IntegrityError as e:
            if isinstance(e, UnsupportedError) or e.what.startswith(DAMAGED_FOOTER):
                raise
            return None
    return None


def refuse_unfinished(directory: Path) -> None:
    """Raises UnsupportedError for a directory without a manifest whose note or first shard is of bounds.

    Raises IntegrityError for one whose shard is damaged.
    """
    refuse_bounds(read_state(directory), directory / STATE)
    _footer_of_a_shard(directory)


def differences(before: dict[str, Any], now: dict[str, Any], prefix: str = "") -> list[str]:
    """Names and values of what differs between two identities, one line each."""
    found = []
    for key in sorted(before.keys() | now.keys()):
        old, new = before.get(key), now.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            found += differences(old, new, f"{prefix}{key}.")
        elif old != new:
            found.append(f"{prefix}{key} was {_short(old)}, now {_short(new)}")
    return found


def check_identity(directory: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    """Raises MismatchError naming the keys in which two identities differ."""
    changed = differences(before, now)
    if changed:
        fix = "use the settings it was made with, another --out, or --overwrite"
        if len(changed) == 1 and changed[0].startswith("horizon was "):
            fix = f"add --horizon {before['horizon']} to add epochs and leave the others as they are"
        raise MismatchError(f"it was made with other settings: {'; '.join(changed)}", where=str(directory), fix=fix)


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


def peek_schema(directory: Path) -> str | None:
    """What a manifest says it describes, unchecked; None without one. Raises IntegrityError for a damaged one."""
    path = directory / NAME
    return str(_read_json(path)[0].get("schema")) if inside.exists(path) else None
