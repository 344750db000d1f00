"""What a repository holds of this program already: what a push may delete there, and what is in its way.

Ours is what a manifest of ours lists, and what is in a folder whose files the push replaces.
All else is somebody's, and stays.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from entrodrop_prep.errors import HubError
from entrodrop_prep.publish.local import Local
from entrodrop_prep.publish.plan import RemoteFile, same
from entrodrop_prep.store import manifest, strict_json
from entrodrop_prep.store.layout import PLAIN, SCORED_FOLDER, VALIDATION
from entrodrop_prep.store.manifest_types import is_written
from entrodrop_prep.store.schema import family
from entrodrop_prep.store.unsupported import refuse_bounds

_FOLDER = re.compile(rf"epoch_\d+|{PLAIN}|{VALIDATION}")
_WHERE_VERIFY_LOOKS = {"masked": r"epoch_[^/]*/[^/]*\.parquet", "scored": r"shard-[^/]*\.parquet"}
"""Files that ``verify`` finds where the manifest does not list them: with them the published dataset does not hold."""
SCORES = f"{SCORED_FOLDER}/{manifest.NAME}"


def stale(local: Local, repo: str, remote: Mapping[str, RemoteFile], read: Callable[[str], str]) -> set[str]:
    """Paths of the repository that a push of ``local`` replaces or deletes; ``read`` gives the text of one.

    Raises HubError where the repository holds a dataset of the other kind, or files of somebody else where ours go.
    """
    ours = set()
    before = _described(manifest.NAME, local, repo, remote, read)
    if before is not None:
        kind = family(str(before["schema"]))
        if kind != local.kind:
            raise HubError(
                f"it holds a {kind} dataset; nothing was changed there",
                where=repo,
                fix=f"push the {local.kind} one to another repository or --branch",
            )
        ours |= _listed(before)
    if local.kind == "masked":
        ours |= _scores(local, repo, remote, read)
    filled = _filled(local)
    ours |= {path for path in remote if filled.fullmatch(path)}
    way = [p for p in remote if re.fullmatch(_WHERE_VERIFY_LOOKS[local.kind], p) and p not in ours | set(local.files)]
    if way:
        raise HubError(
            f"it holds files of somebody else where those of a {local.kind} dataset are ({', '.join(way[:3])}"
            f"{', ...' if len(way) > 3 else ''}): with them it would not verify; nothing was changed there",
            where=repo,
            fix="move them there, or push to another repository or --branch",
        )
    return ours


def _scores(local: Local, repo: str, remote: Mapping[str, RemoteFile], read: Callable[[str], str]) -> set[str]:
    """What is there of scores beside masks, unless it is the masks' own and stays."""
    before = _described(SCORES, local, repo, remote, read)
    if before is None:
        return set()
    made_from = local.manifest["scored"]
    digest = made_from["content_digest"] if isinstance(made_from, dict) else None
    if SCORES not in local.files and before.get("content_digest") == digest:
        return set()
    return {SCORES, *(f"{SCORED_FOLDER}/{path}" for path in _listed(before))}


def _filled(local: Local) -> re.Pattern[str]:
    """Paths that ``datasets`` or a tokenizer would take for part of what the push puts beside them."""
    folders = {path.rpartition("/")[0] for path in local.files}
    patterns = [rf"{f}/(train|{VALIDATION})-[^/]*\.parquet" for f in sorted(folders) if _FOLDER.fullmatch(f)]
    patterns += [rf"{f}/[^/]*" for f in ("tokenizer", f"{SCORED_FOLDER}/tokenizer") if f in folders]
    patterns += [rf"{f}/shard-[^/]*\.parquet" for f in (SCORED_FOLDER,) if f in folders]
    return re.compile("|".join(patterns))


def _described(
    path: str, local: Local, repo: str, remote: Mapping[str, RemoteFile], read: Callable[[str], str]
) -> dict[str, Any] | None:
    """The manifest at a path of the repository, None where there is none.

    Raises HubError for somebody else's file, UnsupportedError for a dataset of bounds.
    """
    if path not in remote:
        return None
    if path == manifest.NAME and same(local.files[path], remote[path]):
        return local.manifest
    try:
        found = strict_json.loads(read(path))
    except ValueError:
        found = None
    refuse_bounds(found, f"{repo}/{path}")
    files = found.get("files") if isinstance(found, dict) else None
    ours = isinstance(files, list) and all(isinstance(e, dict) and is_written(e.get("file")) for e in files)
    if not ours or family(str(found.get("schema"))) not in ("masked", "scored"):
        raise HubError(
            f"its {path} is not one of entrodrop-prep, and would be replaced; nothing was changed there",
            where=repo,
            fix="rename it there, or push to another repository or --branch",
        )
    return dict(found)


def _listed(described: dict[str, Any]) -> set[str]:
    return {str(entry["file"]) for entry in described["files"]}
