"""What a Hub keeps, on disk: repositories, branches, tags, commits, and the bytes of files.

    root/secret                            signs upload addresses, as an object store would
    root/repos/TYPE/OWNER/NAME/repo.json   visibility, branches, tags
                              /commits/    one JSON file a commit: parent, title, files
                              /blobs/      small files by their git id
                              /lfs/        large files by their SHA-256

Every change is one renamed file under one lock, so that a store that was killed opens as it was.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import threading
from pathlib import Path
from typing import Any

LFS_SUFFIXES = (".parquet", ".npy", ".npz", ".arrow", ".bin", ".zip", ".png", ".safetensors")
ATTRIBUTES = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LFS_SUFFIXES).encode()


class Refused(Exception):
    """An answer other than 200, in the Hub's way: status, X-Error-Code, X-Error-Message."""

    def __init__(self, status: int, code: str | None, message: str, body: dict[str, Any] | None = None) -> None:
        super().__init__(message)
        self.status, self.code, self.message, self.body = status, code, message, body


def git_id(data: bytes) -> str:
    """The id git gives to these bytes as a blob."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def pointer(sha256: str, size: int) -> bytes:
    """What git keeps in place of a large file."""
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()


def write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    tmp = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    tmp.write_bytes(data)
    os.replace(tmp, path)


class Repo:
    """One repository. ``files`` of a commit: path -> {"size", "oid", "lfs" (SHA-256 or None), "xet" (hash or None)}."""

    def __init__(self, folder: Path, kind: str, name: str) -> None:
        self.folder, self.kind, self.name = folder, kind, name
        self.lock = threading.RLock()

    @property
    def meta(self) -> dict[str, Any]:
        return dict(json.loads((self.folder / "repo.json").read_bytes()))

    def change(self, **changes: Any) -> None:
        with self.lock:
            write(self.folder / "repo.json", json.dumps({**self.meta, **changes}).encode())

    @property
    def private(self) -> bool:
        return bool(self.meta["private"])

    def resolve(self, revision: str) -> str:
        """The commit that a branch, a tag or a commit id names."""
        meta = self.meta
        for refs in (meta["branches"], meta["tags"]):
            if revision in refs:
                return str(refs[revision])
        if (self.folder / "commits" / f"{revision}.json").exists():
            return revision
        raise Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")

    def head(self, branch: str = "main") -> str:
        return str(self.meta["branches"][branch])

    def read_commit(self, sha: str) -> dict[str, Any]:
        return dict(json.loads((self.folder / "commits" / f"{sha}.json").read_bytes()))

    def files(self, revision: str = "main") -> dict[str, dict[str, Any]]:
        return dict(self.read_commit(self.resolve(revision))["files"])

    def log(self, revision: str = "main") -> list[dict[str, Any]]:
        """Commits from the newest to the first."""
        found, sha = [], self.resolve(revision)
        while sha:
            commit = self.read_commit(sha)
            found.append({"id": sha, "title": commit["title"], "parent": commit["parent"]})
            sha = commit["parent"]
        return found

    def content(self, entry: dict[str, Any]) -> Path:
        return self.folder / ("lfs" if entry["lfs"] else "blobs") / (entry["lfs"] or entry["oid"])

    def read(self, path: str, revision: str = "main") -> bytes:
        """The bytes of one file."""
        return self.content(self.files(revision)[path]).read_bytes()

    def regular(self, data: bytes) -> dict[str, Any]:
        """Keep a small file; its entry."""
        oid = git_id(data)
        write(self.folder / "blobs" / oid, data)
        return {"size": len(data), "oid": oid, "lfs": None, "xet": None}

    def large(self, sha256: str, xet: str | None = None) -> dict[str, Any]:
        """The entry of a large file whose bytes were uploaded."""
        path = self.folder / "lfs" / sha256
        if not path.exists():
            raise Refused(400, None, f"the LFS object {sha256} was not uploaded")
        size = path.stat().st_size
        return {"size": size, "oid": git_id(pointer(sha256, size)), "lfs": sha256, "xet": xet}

    def commit(self, branch: str, title: str, add: dict[str, Any], delete: list[str], parent: str | None) -> str:
        """One commit on a branch. ``parent``: what the head must be."""
        with self.lock:
            meta = self.meta
            if branch not in meta["branches"]:
                raise Refused(404, "RevisionNotFound", f"Invalid rev id: {branch}")
            head = meta["branches"][branch]
            if parent is not None and parent != head:
                raise Refused(412, None, "A commit has happened since. Please refresh and try again.")
            files = self.read_commit(head)["files"]
            for path in delete:
                gone = [name for name in files if name == path or (path.endswith("/") and name.startswith(path))]
                if not gone:
                    raise Refused(404, "EntryNotFound", "A file with this name doesn't exist")
                for name in gone:
                    del files[name]
            return self._append(branch, title, {**files, **add}, head)

    def _append(self, branch: str, title: str, files: dict[str, Any], parent: str | None) -> str:
        data = json.dumps({"parent": parent, "title": title, "files": dict(sorted(files.items()))}).encode()
        sha = hashlib.sha1(data).hexdigest()
        write(self.folder / "commits" / f"{sha}.json", data)
        meta = self.meta
        self.change(branches={**meta["branches"], branch: sha})
        return sha

    def put(self, files: dict[str, bytes], title: str = "by someone else", delete: tuple[str, ...] = ()) -> str:
        """Commit files, as another client would: by suffix they are large or small."""
        added = {}
        for path, data in files.items():
            if path.endswith(LFS_SUFFIXES):
                sha256 = hashlib.sha256(data).hexdigest()
                write(self.folder / "lfs" / sha256, data)
                added[path] = self.large(sha256)
            else:
                added[path] = self.regular(data)
        return self.commit("main", title, added, list(delete), None)


class Store:
    """All repositories below ``root``."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.lock = threading.RLock()
        self._open: dict[tuple[str, str], Repo] = {}
        if not (root / "secret").exists():
            write(root / "secret", secrets.token_hex(16).encode())
        self.secret = (root / "secret").read_bytes()

    def signature(self, path: str) -> str:
        return hashlib.sha256(self.secret + path.encode()).hexdigest()[:32]

    def repo(self, kind: str, name: str) -> Repo:
        with self.lock:
            folder = self.root / "repos" / kind / name
            if not (folder / "repo.json").exists():
                raise Refused(404, "RepoNotFound", "Repository not found")
            return self._open.setdefault((kind, name), Repo(folder, kind, name))

    def create(self, kind: str, name: str, *, private: bool) -> Repo:
        """A repository with the first commit that the Hub makes: .gitattributes."""
        with self.lock:
            folder = self.root / "repos" / kind / name
            if (folder / "repo.json").exists():
                raise Refused(409, None, "You already created this repo", {"error": "You already created this repo"})
            repo = Repo(folder, kind, name)
            meta = {"private": private, "gated": False, "branches": {}, "tags": {}}
            write(folder / "repo.json", json.dumps(meta).encode())
            repo._append("main", "initial commit", {".gitattributes": repo.regular(ATTRIBUTES)}, None)
            return self._open.setdefault((kind, name), repo)
