"""The card's front matter: YAML keys that ``datasets`` and the Hub read. What the user wrote stays as it is."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from entrodrop_prep.config.expansion import bounded
from entrodrop_prep.store.layout import OTHER_FILES, PLAIN, VALIDATION

CONFIGS, INFO = "configs", "dataset_info"
_DESCRIPTION = "content digest"
_OUR_FILES = re.compile(rf"epoch_\d+/.*|{re.escape(OTHER_FILES[VALIDATION])}")


@dataclass(frozen=True)
class Front:
    """What this program has to say in YAML.

    Attributes:
        configs: configurations, ``all`` first: always renewed.
        infos: features and counts of each: always renewed.
        values: keys that the user may change or remove, such as ``license``: they are renewed as long as they are as
            this program wrote them.
    """

    configs: list[dict[str, Any]]
    infos: list[dict[str, Any]] = field(default_factory=list)
    values: dict[str, Any] = field(default_factory=dict)


def configs(manifest: dict[str, Any]) -> list[dict[str, Any]]:
    """``all`` = the epochs in order, the one default; then one configuration an epoch, and ``plain`` if it is there.

    ``datasets`` keys its cache of a local directory by the directory's last name and the card: the digest keeps two
    datasets of one name apart.
    """

    def files(names: list[str]) -> list[dict[str, Any]]:
        paths = [f"{name}/train-*.parquet" for name in names]
        train = {"split": "train", "path": paths if len(paths) > 1 else paths[0]}
        validation = {"split": VALIDATION, "path": OTHER_FILES[VALIDATION]}
        return [train, *([validation] if VALIDATION in manifest else [])]

    folders = [e["folder"] for e in manifest["epochs"]]
    description = {"description": f"{_DESCRIPTION} {manifest['content_digest']}"}
    return [
        {"config_name": "all", **description, "default": True, "data_files": files(folders)},
        *(
            {"config_name": name, **description, "data_files": files([name])}
            for name in [*folders, *([PLAIN] if PLAIN in manifest else [])]
        ),
    ]


def scored_configs(name: str, content_digest: str) -> list[dict[str, Any]]:
    """The one configuration of a scored directory: every shard, in order."""
    shards = [{"split": "train", "path": "shard-*.parquet"}]
    description = {"description": f"{_DESCRIPTION} {content_digest}"}
    return [{"config_name": name, **description, "default": True, "data_files": shards}]


def split_card(content: str) -> tuple[str, str]:
    """YAML front matter, empty if there is none that can be read, and the text behind it.

    A byte order mark and empty lines before it are no text.
    """
    content = re.sub(r"\A\ufeff?(?:[ \t]*\n)*", "", content)
    found = re.match(r"---[ \t]*\n(.*?)^---[ \t]*(?:\n|\Z)", content, re.DOTALL | re.MULTILINE)
    if found and _load(found[1]) is not None:
        return found[1], content[found.end() :].lstrip("\n")
    return "", content


def front_of(card_front: str) -> tuple[Front, list[dict[str, Any]]]:
    """Front matter as what is ours, all other keys being values, and the configurations that are the user's."""
    meta = _load(card_front) or {}
    listed, infos = _tables(meta.pop(CONFIGS, None)), _tables(meta.pop(INFO, None))
    ours = [c for c in listed if _is_ours(c)]
    names = {c["config_name"] for c in ours}
    theirs = [c for c in listed if not _is_ours(c)]
    return Front(ours, [i for i in infos if i.get("config_name") in names], meta), theirs


def clashing(front: str, ours: str) -> list[str]:
    """Names of configurations in front matter that are the user's, though one of ours has the same name."""
    names = {c["config_name"] for c in front_of(ours)[0].configs}
    return [str(c["config_name"]) for c in front_of(front)[1] if c.get("config_name") in names]


def renewed(
    front: str, ours: Front, noted: dict[str, Any], also: Iterable[dict[str, Any]] = ()
) -> tuple[str, dict[str, Any]]:
    """Front matter with ``ours`` in it, and the values in it that are this program's, which is what ``noted`` was.

    The user's keys, configurations and every other line stay as they are. ``also`` are configurations to add where
    there is none of that name.
    """
    front = _last_of_each(front)
    meta = _load(front) or {}
    now: dict[str, Any] = {}
    for key in dict.fromkeys([*ours.values, *noted]):
        if key in noted and key not in meta:
            now[key] = noted[key]  # the user removed it
        elif key not in meta or (key in noted and meta[key] == noted[key]):
            front = with_value(front, key, ours.values.get(key))
            if key in ours.values and isinstance(key, str) and _is_json(ours.values[key]):
                now[key] = ours.values[key]
    mine, theirs = [dict(c) for c in ours.configs], [c for c in _tables(meta.get(CONFIGS)) if not _is_ours(c)]
    there = {c.get("config_name") for c in (*theirs, *mine)}
    theirs = [c for c in theirs if c.get("config_name") not in {m["config_name"] for m in mine}]
    theirs += [c for c in also if c.get("config_name") not in there]
    if mine and any(c.get("default") for c in theirs):
        mine[0].pop("default", None)
    replaced = {c["config_name"] for c in [*mine, *_tables(meta.get(CONFIGS))] if _is_ours(c)}
    infos = [*ours.infos, *(i for i in _tables(meta.get(INFO)) if i.get("config_name") not in replaced)]
    front = with_value(front, INFO, infos or None)
    return with_value(front, CONFIGS, [*mine, *theirs] or None), now


def value_of(front: str, key: str) -> Any:
    """What a key holds; None where it is not there."""
    return (_load(front) or {}).get(key)


def with_value(front: str, key: str, value: Any) -> str:
    """Front matter with a key set, or removed where ``value`` is None; no other line changes."""
    import yaml

    meta = _load(front) or {}
    wanted = {k: v for k, v in meta.items() if k != key} | ({} if value is None else {key: value})
    if wanted == meta:
        return front
    dumper = getattr(yaml, "CSafeDumper", yaml.SafeDumper)
    block = "" if value is None else yaml.dump({key: value}, Dumper=dumper, sort_keys=False, allow_unicode=True)
    spans = [m.span() for m in _blocks(front, key)] if isinstance(key, str) else []
    if spans or key not in meta:
        start, stop = spans[-1] if spans else (len(front), len(front))
        changed = front[:start] + block + front[stop:]
        if _load(changed) == wanted:
            return changed
    return yaml.safe_dump(wanted, sort_keys=False, allow_unicode=True)  # written unusually: write everything again


def _load(front: str) -> dict[str, Any] | None:
    """The keys; None for what is no YAML table, or one that grows beyond bounds."""
    import yaml

    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # ten times as fast, which many epochs need
    try:
        meta = bounded(yaml.load(front, loader))
    except (yaml.YAMLError, ValueError, RecursionError):
        return None
    return None if not isinstance(meta, dict) and meta is not None else dict(meta or {})


def _tables(value: Any) -> list[dict[str, Any]]:
    """What a key holds that may be a table or a list of tables."""
    listed = value if isinstance(value, list) else [value]
    return [item for item in listed if isinstance(item, dict)]


def _last_of_each(front: str) -> str:
    """Front matter without keys that occur again below, where the user added what was there."""
    keys = re.findall(r"^(\w+)[ \t]*:", front, re.MULTILINE)
    for key in dict.fromkeys(k for k in keys if keys.count(k) > 1):
        kept = front
        for found in reversed(_blocks(front, key)[:-1]):
            kept = kept[: found.start()] + kept[found.end() :]
        if _load(kept) == _load(front):
            front = kept
    return front


def _blocks(front: str, key: str) -> list[re.Match[str]]:
    """Where a key is at the outermost level, with the lines that belong to it."""
    return list(re.finditer(rf"^{re.escape(key)}[ \t]*:.*\n(?:[ \t-].*\n)*", front, re.MULTILINE))


def _is_ours(config: dict[str, Any]) -> bool:
    """By its description; without one, by its name, unless it has files that no configuration of ours has."""
    name = config.get("config_name")
    if not isinstance(name, str):
        return False
    if str(config.get("description")).startswith(_DESCRIPTION):
        return True
    named = re.fullmatch(r"all|epoch_\d+", name) is not None
    return named and all(_OUR_FILES.fullmatch(path) for path in _paths(config.get("data_files")))


def _paths(files: Any) -> list[str]:
    """What a configuration's ``data_files`` name: a path, a table of paths by split, or a list of either."""
    if isinstance(files, dict):
        return _paths(files["path"]) if "path" in files else _paths(list(files.values()))
    if isinstance(files, list):
        return [path for item in files for path in _paths(item)]
    return [] if files is None else [str(files)]


def _is_json(value: Any) -> bool:
    try:
        return bool(json.loads(json.dumps(value)) == value)
    except (TypeError, ValueError):
        return False
