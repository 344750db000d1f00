"""What the tests' Hub answers to each call; ``ROUTES`` is the list of them."""

from __future__ import annotations

import base64
import functools
import hashlib
import json
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, quote, unquote

import yaml

from helpers.hub_store import LFS_SUFFIXES, Refused, Repo, write

if TYPE_CHECKING:
    from helpers.hub import Hub

DATE = "2026-01-01T00:00:00.000Z"
REGULAR_BYTES = 10_000_000


@dataclass(frozen=True)
class Request:
    method: str
    path: str
    query: dict[str, list[str]]
    headers: Any
    body: bytes
    user: str | None
    role: str | None

    def json(self) -> Any:
        return json.loads(self.body)


@dataclass
class Answer:
    body: Any = None
    headers: dict[str, str] = field(default_factory=dict)
    status: int = 200
    file: Path | None = None


def _who_am_i(hub: Hub, r: Request) -> Answer:
    if r.user is None:
        raise Refused(401, None, "Invalid username or password.")
    token = {"displayName": "tests", "role": r.role}
    return Answer({"type": "user", "name": r.user, "orgs": [], "auth": {"type": "access_token", "accessToken": token}})


def _create(hub: Hub, r: Request) -> Answer:
    asked = r.json()
    owner, kind = asked.get("organization") or r.user, f"{asked.get('type') or 'model'}s"
    name = f"{owner}/{asked['name']}"
    url = f"{hub.url}/{'' if kind == 'models' else kind + '/'}{name}"
    if r.user is None:
        raise Refused(401, None, "Invalid username or password.")
    if r.role != "write" or owner != r.user:
        what = "You don't have the rights to create a dataset under the namespace" + f' "{owner}"'
        raise Refused(403, None, what)
    try:
        hub.store.create(kind, name, private=asked.get("visibility", "public") == "private")
    except Refused as e:
        raise Refused(e.status, e.code, e.message, {"error": e.message, "url": url}) from None
    return Answer({"url": url, "name": name, "private": hub.repo(name, kind).private})


def _validate_yaml(hub: Hub, r: Request) -> Answer:
    """What the Hub is known to refuse: metadata that is no YAML, configurations without a name, an unknown licence."""
    front = re.match(r"---\s*\n(.*?)^---\s*$", r.json()["content"], re.DOTALL | re.MULTILINE)
    errors = []
    try:
        meta = yaml.safe_load(front[1]) if front else {}
        if not isinstance(meta, dict):
            errors.append("metadata must be an object")
        else:
            if not re.fullmatch(r"[a-z0-9.+-]+", str(meta.get("license", "mit"))):
                errors.append('"license" must be one of the list of licenses')
            configs = meta.get("configs", [])
            if not isinstance(configs, list) or any("config_name" not in c for c in configs):
                errors.append('"configs[0].config_name" is required')
    except yaml.YAMLError as e:
        errors.append(f"bad YAML: {e}")
    told = {"errors": [{"message": e} for e in errors], "warnings": []}
    return Answer(told, status=400 if errors else 200)


def _repo(hub: Hub, r: Request, kind: str, name: str, *, writing: bool = False, content: bool = False) -> Repo:
    """The repository, if the caller may see, read or write it; refused as the Hub refuses."""
    try:
        repo = hub.repo(name, kind)
    except Refused:
        if r.user is None:
            raise Refused(401, "RepoNotFound", "Invalid username or password.") from None
        raise
    owner = name.split("/")[0]
    if repo.private and r.user != owner:
        if r.user is None:
            raise Refused(401, "RepoNotFound", "Invalid username or password.")
        raise Refused(404, "RepoNotFound", "Repository not found")
    if writing and r.user is None:
        raise Refused(401, None, "Invalid username or password.")
    if writing and (r.user != owner or r.role != "write"):
        raise Refused(403, None, "Forbidden: you must use a write token to upload to a repository.")
    if content and repo.meta["gated"] and r.user != owner:
        status = 401 if r.user is None else 403
        raise Refused(status, "GatedRepo", f"Access to dataset {name} is restricted. Ask for access first.")
    return repo


def _info(hub: Hub, r: Request, kind: str, name: str, revision: str = "main") -> Answer:
    repo = _repo(hub, r, kind, name)
    sha = repo.resolve(revision)
    files = repo.files(sha)
    told = {
        **{"id": name, "_id": hashlib.md5(name.encode()).hexdigest()[:24], "author": name.split("/")[0], "sha": sha},
        **{"private": repo.private, "gated": repo.meta["gated"], "disabled": False, "downloads": 0, "likes": 0},
        **{"tags": [], "lastModified": DATE, "createdAt": DATE},
        "siblings": [{"rfilename": path} for path in files],
    }
    if "README.md" in files:
        front = re.match(r"---\s*\n(.*?)^---\s*$", repo.read("README.md", sha).decode(), re.DOTALL | re.MULTILINE)
        told["cardData"] = yaml.safe_load(front[1]) if front else {}
    return Answer(told)


def _refs(hub: Hub, r: Request, kind: str, name: str) -> Answer:
    meta = _repo(hub, r, kind, name).meta
    told: dict[str, Any] = {"converts": [], "pullRequests": []}
    for key, folder in (("branches", "heads"), ("tags", "tags")):
        told[key] = [
            {"name": n, "ref": f"refs/{folder}/{n}", "targetCommit": sha} for n, sha in sorted(meta[key].items())
        ]
    return Answer(told)


def _commits(hub: Hub, r: Request, kind: str, name: str, revision: str) -> Answer:
    log = _repo(hub, r, kind, name).log(revision)
    return Answer([{**c, "authors": [{"user": "alice"}], "date": DATE, "message": ""} for c in log])


def _told(path: str, entry: dict[str, Any]) -> dict[str, Any]:
    told = {"type": "file", "path": path, "size": entry["size"], "oid": entry["oid"]}
    if entry["lfs"]:
        told["lfs"] = {"oid": entry["lfs"], "size": entry["size"], "pointerSize": 134}
    if entry.get("xet"):
        told["xetHash"] = entry["xet"]
    return told


def _tree(hub: Hub, r: Request, kind: str, name: str, revision: str, folder: str = "") -> Answer:
    files = _repo(hub, r, kind, name).files(revision)
    prefix = f"{folder}/" if folder else ""
    below = {path: entry for path, entry in files.items() if path.startswith(prefix)}
    if folder and not below:
        raise Refused(404, "EntryNotFound", f"{folder} does not exist on {revision}")
    deep = r.query.get("recursive", ["false"])[0].lower() == "true"
    folders: set[str] = set()
    for path in below:
        steps = path[len(prefix) :].split("/")[:-1]
        folders.update(prefix + "/".join(steps[: n + 1]) for n in range(len(steps) if deep else min(1, len(steps))))
    listed = [{"type": "directory", "path": p, "size": 0, "oid": hashlib.sha1(p.encode()).hexdigest()} for p in folders]
    listed += [_told(p, e) for p, e in below.items() if deep or "/" not in p[len(prefix) :]]
    listed.sort(key=lambda entry: str(entry["path"]))
    start = int(r.query.get("cursor", ["0"])[0])
    headers = {}
    if start + hub.page < len(listed):
        again = f"{hub.url}{quote(r.path)}?recursive={deep}&expand=False&cursor={start + hub.page}"
        headers["Link"] = f'<{again}>; rel="next"'
    return Answer(listed[start : start + hub.page], headers)


def _paths_info(hub: Hub, r: Request, kind: str, name: str, revision: str) -> Answer:
    files = _repo(hub, r, kind, name).files(revision)
    if r.headers.get("Content-Type", "").startswith("application/json"):
        paths = r.json()["paths"]
    else:
        paths = parse_qs(r.body.decode()).get("paths", [])
    told: list[dict[str, Any]] = []
    for path in paths:
        if path in files:
            told.append(_told(path, files[path]))
        elif any(name.startswith(f"{path}/") for name in files):
            told.append({"type": "directory", "path": path, "oid": hashlib.sha1(path.encode()).hexdigest()})
    return Answer(told)


def _preupload(hub: Hub, r: Request, kind: str, name: str, revision: str) -> Answer:
    repo = _repo(hub, r, kind, name, writing=True)
    files, told = repo.files(revision), []
    for asked in r.json()["files"]:
        path, entry = asked["path"], files.get(asked["path"])
        binary = b"\0" in base64.b64decode(asked["sample"])
        mode = "lfs" if path.endswith(LFS_SUFFIXES) or asked["size"] > REGULAR_BYTES or binary else "regular"
        oid = entry and (entry["lfs"] or entry["oid"])
        told.append({"path": path, "uploadMode": mode, "shouldIgnore": False, **({"oid": oid} if oid else {})})
    return Answer({"files": told})


def _lfs_batch(hub: Hub, r: Request, kind: str, name: str) -> Answer:
    repo = _repo(hub, r, kind, name, writing=True)
    objects = []
    for asked in r.json()["objects"]:
        oid, size = asked["oid"], asked["size"]
        told: dict[str, Any] = {"oid": oid, "size": size}
        if not (repo.folder / "lfs" / oid).exists():
            base = f"/lfs/{kind}/{name}/{oid}"

            def signed(path: str) -> str:
                return f"{hub.url}{path}?signature={hub.store.signature(path)}"

            upload: dict[str, Any] = {"href": signed(base)}
            if hub.part_bytes and size > hub.part_bytes:
                parts = -(-size // hub.part_bytes)
                upload["href"] = signed(f"{base}/complete")
                upload["header"] = {"chunk_size": str(hub.part_bytes)}
                upload["header"] |= {str(n + 1): signed(f"{base}/part/{n + 1}") for n in range(parts)}
            told["actions"] = {"upload": upload, "verify": {"href": signed(f"{base}/verify")}}
        objects.append(told)
    return Answer({"transfer": "multipart" if hub.part_bytes else "basic", "objects": objects})


def _signed(hub: Hub, r: Request) -> None:
    if r.query.get("signature") != [hub.store.signature(r.path)]:
        raise Refused(403, None, "SignatureDoesNotMatch")


def _keep(repo: Repo, oid: str, data: bytes) -> None:
    if hashlib.sha256(data).hexdigest() != oid:
        raise Refused(400, None, "the bytes have another SHA-256")
    write(repo.folder / "lfs" / oid, data)


def _lfs_put(hub: Hub, r: Request, kind: str, name: str, oid: str) -> Answer:
    _signed(hub, r)
    _keep(hub.repo(name, kind), oid, r.body)
    return Answer(b"")


def _lfs_part(hub: Hub, r: Request, kind: str, name: str, oid: str, number: str) -> Answer:
    _signed(hub, r)
    write(hub.repo(name, kind).folder / "parts" / oid / number, r.body)
    return Answer(b"", {"ETag": f'"{hashlib.md5(r.body).hexdigest()}"'})


def _lfs_complete(hub: Hub, r: Request, kind: str, name: str, oid: str) -> Answer:
    _signed(hub, r)
    repo = hub.repo(name, kind)
    data = b""
    for part in r.json()["parts"]:
        piece = (repo.folder / "parts" / oid / str(part["partNumber"])).read_bytes()
        if part["etag"].strip('"') != hashlib.md5(piece).hexdigest():
            raise Refused(400, None, "InvalidPart")
        data += piece
    _keep(repo, oid, data)
    return Answer({"success": True})


def _lfs_verify(hub: Hub, r: Request, kind: str, name: str, oid: str) -> Answer:
    asked, path = r.json(), _repo(hub, r, kind, name, writing=True).folder / "lfs" / oid
    if not path.exists() or path.stat().st_size != asked["size"]:
        raise Refused(422, None, "the object is not there, or has another size")
    return Answer({"success": True})


def _commit(hub: Hub, r: Request, kind: str, name: str, branch: str) -> Answer:
    repo = _repo(hub, r, kind, name, writing=True)
    header: dict[str, Any] = {}
    add: dict[str, Any] = {}
    delete: list[str] = []
    for line in r.body.splitlines():
        item = json.loads(line)
        value = item["value"]
        if item["key"] == "header":
            header = value
        elif item["key"] == "file":
            add[value["path"]] = repo.regular(base64.b64decode(value["content"]))
        elif item["key"] == "lfsFile":
            add[value["path"]] = _large(hub, repo, value["oid"])
        elif item["key"] in ("deletedFile", "deletedFolder"):
            delete.append(value["path"].rstrip("/") + ("/" if item["key"] == "deletedFolder" else ""))
        else:
            raise Refused(400, None, f"unknown operation {item['key']}")
    sha = repo.commit(branch, header["summary"], add, delete, header.get("parentCommit"))
    return Answer({"success": True, "commitOid": sha, "commitUrl": f"{hub.url}/{kind}/{name}/commit/{sha}"})


def _large(hub: Hub, repo: Repo, sha256: str) -> dict[str, Any]:
    """The entry of a large file; one that came by Xet is put together from its chunks, once."""
    found = hub.xet.find(sha256)
    target = repo.folder / "lfs" / sha256
    if found and not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        hub.xet.restore(sha256, target)
    return repo.large(sha256, found and found[0])


def _branch(hub: Hub, r: Request, kind: str, name: str, branch: str) -> Answer:
    repo = _repo(hub, r, kind, name, writing=True)
    with repo.lock:
        branches = repo.meta["branches"]
        if branch in branches:
            raise Refused(409, None, f"Reference already exists: {branch}")
        repo.change(branches={**branches, branch: repo.resolve((r.json() or {}).get("startingPoint", "main"))})
    return Answer({"success": True})


def _tag(hub: Hub, r: Request, kind: str, name: str, revision: str) -> Answer:
    repo = _repo(hub, r, kind, name, writing=True)
    with repo.lock:
        tags, tag = repo.meta["tags"], r.json()["tag"]
        if tag in tags:
            raise Refused(409, None, f"Tag reference exists already: {tag}")
        repo.change(tags={**tags, tag: repo.resolve(revision)})
    return Answer({"success": True})


def _xet_token(hub: Hub, r: Request, kind: str, name: str, way: str, _revision: str) -> Answer:
    _repo(hub, r, kind, name, writing=way == "write", content=True)
    token, until = hub.store.signature(f"xet/{name}"), int(time.time()) + 3600
    headers = {
        "X-Xet-Cas-Url": hub.xet.address,
        "X-Xet-Access-Token": token,
        "X-Xet-Token-Expiration": str(until),
    }
    return Answer({"casUrl": hub.xet.address, "accessToken": token, "exp": until}, headers)


def _resolve(hub: Hub, r: Request, kind: str, name: str, revision: str, path: str) -> Answer:
    repo = _repo(hub, r, kind, name, content=True)
    sha = repo.resolve(revision)
    entry = repo.files(sha).get(path)
    headers = {"X-Repo-Commit": sha, "Accept-Ranges": "bytes"}
    if entry is None:
        answer = Answer({"error": "Entry not found"}, {**headers, "X-Error-Code": "EntryNotFound"}, 404)
        answer.headers["X-Error-Message"] = "Entry not found"
        return answer
    etag = entry["lfs"] or entry["oid"]
    headers["ETag"] = f'"{etag}"'
    if entry["lfs"]:
        headers |= {"X-Linked-Etag": f'"{etag}"', "X-Linked-Size": str(entry["size"])}
    if entry["xet"]:
        route = f"{hub.url}/api/{kind}/{name}/xet-read-token/{sha}"
        headers |= {"X-Xet-Hash": entry["xet"], "X-Xet-Refresh-Route": route, "Link": f'<{route}>; rel="xet-auth"'}
    return Answer(headers=headers, file=repo.content(entry))


def _nothing(hub: Hub, r: Request) -> Answer:
    raise Refused(404, None, f"this Hub does not know {r.method} {r.path}")


KIND, NAME = r"(datasets|models)", r"([\w.-]+/[\w.-]+)"
API, LFS = rf"/api/{KIND}/{NAME}", rf"/lfs/{KIND}/{NAME}/([0-9a-f]{{64}})"
ROUTES: list[tuple[str, str, str, Callable[..., Answer]]] = [
    ("GET", "/api/whoami-v2", "whoami", _who_am_i),
    ("POST", "/api/repos/create", "create-repo", _create),
    ("POST", "/api/validate-yaml", "validate-yaml", _validate_yaml),
    ("GET", rf"{API}", "info", _info),
    ("GET", rf"{API}/revision/([^/]+)", "info", _info),
    ("GET", rf"{API}/refs", "refs", _refs),
    ("GET", rf"{API}/commits/([^/]+)", "commits", _commits),
    ("GET", rf"{API}/tree/([^/]+)", "tree", _tree),
    ("GET", rf"{API}/tree/([^/]+)/(.+)", "tree", _tree),
    ("POST", rf"{API}/paths-info/([^/]+)", "paths-info", _paths_info),
    ("POST", rf"{API}/preupload/([^/]+)", "preupload", _preupload),
    ("POST", rf"{API}/commit/([^/]+)", "commit", _commit),
    ("POST", rf"{API}/branch/([^/]+)", "branch", _branch),
    ("POST", rf"{API}/tag/([^/]+)", "tag", _tag),
    ("GET", rf"{API}/xet-(read|write)-token/([^/]+)", "xet-token", _xet_token),
    ("POST", rf"/{KIND}/{NAME}\.git/info/lfs/objects/batch", "lfs-batch", _lfs_batch),
    ("PUT", LFS, "lfs-put", _lfs_put),
    ("PUT", rf"{LFS}/part/(\d+)", "lfs-part", _lfs_part),
    ("POST", rf"{LFS}/complete", "lfs-complete", _lfs_complete),
    ("POST", rf"{LFS}/verify", "lfs-verify", _lfs_verify),
    ("GET", rf"/{KIND}/{NAME}/resolve/([^/]+)/(.+)", "resolve", _resolve),
]


def route(method: str, path: str) -> tuple[str, Callable[[Hub, Request], Answer]]:
    """The name of a call and what answers it. Models have no folder of their own in addresses without /api."""
    method = "GET" if method == "HEAD" else method
    whole = path if re.match(r"/(api|lfs|datasets)/", path) else f"/models{path}"
    for verb, pattern, name, run in ROUTES:
        found = re.fullmatch(pattern, whole) if verb == method else None
        if found:
            values = [unquote(value) for value in found.groups()]
            return name, functools.partial(_called, run, values)
    return "other", _nothing


def _called(run: Callable[..., Answer], values: list[str], hub: Hub, r: Request) -> Answer:
    return run(hub, r, *values)
