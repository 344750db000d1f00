"""What is at a path that a user gave, reported at once: before anything heavy is imported, and whatever was meant.

Each function raises the error of what cannot be right, and returns where only the command itself can decide.
"""

from __future__ import annotations

import glob
import json
import os
import re
from typing import Literal

from entrodrop_prep.config.names import is_hub_name, is_repo_id, only_a_path
from entrodrop_prep.errors import ConfigError, IntegrityError, ModelError, SourceError
from entrodrop_prep.store.unsupported import refuse_bounds

Kind = Literal["scored", "masked"]
MANIFEST, STATE = "manifest.json", ".state.json"
CHATML = "chatml"
"""The chat template that comes with this program."""
_NAMED = re.compile(r"[A-Za-z0-9_-]{1,64}=(.+)", re.DOTALL)
_WEIGHT = re.compile(r":(?:\d+(?:\.\d*)?|\.\d+)$")


def kind_of(path: str) -> Kind | None:
    """``scored`` or ``masked`` for a directory of this program, finished or not; None for anything else.

    Raises UnsupportedError for one of bounds of the entropy.
    """
    for name in (MANIFEST, STATE):
        file = os.path.join(path, name)
        if not os.path.isfile(file):  # a pipe would block
            continue
        try:
            with open(file, "rb") as f:
                found = json.loads(f.read())
            schema = str(found["schema"])
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            continue
        refuse_bounds(found, file)
        for kind in ("scored", "masked"):
            if schema.split("/")[0] == kind:
                return kind
    return None


def check_source(source: str, *, hub: bool = False) -> None:
    """Raises SourceError for a local source that is not there, cannot be data, or was made by this program.

    hub: whether to ask if the Hub is there, where the source can only be on it.
    """
    from entrodrop_prep.sources.files import find_local, local_path, looks_like_path

    if not source.strip() or "://" in source:
        return
    path = local_path(source)
    if path is None and not glob.has_magic(source):
        if looks_like_path(source):
            braces = "there are no braces in patterns: give a pattern of * ? and [ab], or a directory"
            fix = braces if "{" in source and "," in source else "check the path"
            raise SourceError("no such file or directory", where=source, fix=fix)
        if not is_hub_name(source):
            raise SourceError("no such file or directory, and no Hub dataset id", where=source, fix="check the path")
        if hub:
            _check_hub("dataset", source, SourceError)
        return
    at = os.path.abspath(path or os.path.expanduser(source))
    for folder in (at, os.path.dirname(at), os.path.dirname(os.path.dirname(at))):
        kind = kind_of(folder)
        if kind is not None:
            which = "it is" if folder == at else "it is in"
            what = f"{which} a {kind} directory, whose rows were scored already"
            do = {"scored": "write masked datasets from it with `entrodrop materialize`", "masked": "train on it"}[kind]
            raise SourceError(what, where=source, fix=f"{do}, or give the rows that it was made from")
    if path is not None and not os.path.isdir(path):
        find_local(path)


def check_model(name: str, what: str = "model") -> None:
    """Raises ModelError for the directory of a model or a tokenizer that is not there or is one of this program."""
    if not name.strip():
        return
    path, give = os.path.expanduser(name), f"give a {what} directory or a Hub id"
    if os.path.isdir(path):
        kind = kind_of(path)
        if kind is not None:
            raise ModelError(f"it is a {kind} directory, not a {what}", where=name, fix=give)
    elif os.path.lexists(path):
        raise ModelError("it is a file, not a directory", where=name, fix=give)
    elif only_a_path(name):
        raise ModelError("no such directory", where=name, fix=give)
    elif not is_hub_name(name):
        raise ModelError("no such directory, and no Hub id", where=name, fix=give)
    else:
        _check_hub("model", name, ModelError)


def check_file(path: str, option: str, what: str) -> None:
    """Raises ConfigError for a file that is not there or is not one."""
    if os.path.isdir(path):
        raise ConfigError(f"cannot read the {what}: it is a directory", where=path, fix=f"check {option}")
    if not os.path.lexists(path):
        raise ConfigError(f"cannot read the {what}: No such file or directory", where=path, fix=f"check {option}")
    if os.path.exists(path) and not os.path.isfile(path):
        raise ConfigError(f"cannot read the {what}: it is a pipe, socket or device", where=path, fix=f"check {option}")


def check_template(name: str) -> None:
    """Raises ConfigError for the file of a chat template that is not there or is not one."""
    if name != CHATML:
        check_file(name, "--chat-template", "chat template")


def check_directory(name: str, wanted: Kind | None = None, *, hub: bool = False) -> None:
    """Raises IntegrityError for what is not there, or is no directory of this program, or of the other kind.

    Args:
        name: as the user gave it.
        wanted: the kind that is needed; None takes both.
        hub: whether the name may be a dataset on the Hub where nothing is there.
    """
    if not name.strip() or "://" in name:
        return
    path = os.path.expanduser(name)
    give = f"give a {wanted} directory" if wanted else "give a scored or a masked directory"
    if not os.path.lexists(path):
        if hub and is_repo_id(name):
            return
        raise IntegrityError("no such directory", where=name, fix=give)
    kind = kind_of(path)
    if kind is None:
        found = described(path)
        if found is not None:
            raise IntegrityError(f"it is {found}, not {give.removeprefix('give ')}", where=name, fix=_way(name, wanted))
    elif wanted and kind != wanted:
        other = "that it was made from" if wanted == "scored" else f"that `entrodrop materialize {name}` writes"
        raise IntegrityError(f"it is a {kind} directory", where=name, fix=f"give the {wanted} directory {other}")


def check_named(text: str, wanted: Kind, *, hub: bool = False) -> None:
    """``check_directory`` for ``[NAME=]DIR[:WEIGHT]``; what exists as it is written wins."""
    named = _NAMED.fullmatch(text)
    name = text if named is None or os.path.lexists(os.path.expanduser(text)) else named[1]
    if not os.path.lexists(os.path.expanduser(name)):
        if named is None and os.path.lexists(os.path.expanduser(_WEIGHT.sub("", name.partition("=")[2]))):
            return  # what is before the = is no name: the command says so
        without = _WEIGHT.sub("", name)
        directory = name.rpartition(":")[0]
        if directory and os.path.isdir(os.path.expanduser(directory)) and without == name:
            return  # a weight that is no number: the command says so
        name = without
    check_directory(name, wanted, hub=hub)


def described(path: str) -> str | None:
    """What is at a path, phrased for a message, where it is certainly nothing of this program."""
    from entrodrop_prep.sources.formats import format_of

    if not os.path.isdir(path):
        return "a file" if os.path.isfile(path) else None
    try:
        names = sorted(os.listdir(path))
    except OSError:
        return None
    if MANIFEST in names or STATE in names:
        return None
    if "config.json" in names:
        return "a model directory"
    data = [name for name in names if format_of(name) and not name.startswith((".", "shard-"))]
    if data:
        return f"a directory of data ({data[0]})"
    return None if names else "an empty directory"


def _check_hub(kind: Literal["dataset", "model"], name: str, error: type[SourceError] | type[ModelError]) -> None:
    from entrodrop_prep.hub.read_errors import check_answers

    what = check_answers(kind, name)
    if what is not None:
        raise error(what, where=name, fix=f"check the network and the id; a local path is written ./{name}")


def _way(name: str, wanted: Kind | None) -> str:
    if wanted == "masked":
        return "make one with `entrodrop score` and then `entrodrop materialize`"
    return f"make one with `entrodrop score {name} --model MODEL --out SCORED`"
