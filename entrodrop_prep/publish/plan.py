"""What a commit must change: the files of a push compared with those of the repository, by their digests."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from entrodrop_prep.store.shards import reading


@dataclass(frozen=True)
class LocalFile:
    """A file to push: bytes on disk or in memory; ``sha256`` is of its bytes, in hex."""

    content: Path | bytes
    size: int
    sha256: str

    @classmethod
    def of(cls, content: Path | bytes, sha256: str | None = None) -> LocalFile:
        """A file whose size is taken now, and its digest where it is not given."""
        if isinstance(content, bytes):
            return cls(content, len(content), sha256 or hashlib.sha256(content).hexdigest())
        if sha256 is None:
            with content.open("rb") as f:
                sha256 = hashlib.file_digest(f, "sha256").hexdigest()
        return cls(content, content.stat().st_size, sha256)

    def git_id(self) -> str:
        """The SHA-1 that git gives to these bytes as a blob."""
        if isinstance(self.content, bytes):
            data = self.content
        else:
            with reading(self.content):
                data = self.content.read_bytes()
        return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


@dataclass(frozen=True)
class RemoteFile:
    """A file of the repository: ``sha256`` for one in large file storage, else None; ``oid`` is git's id."""

    size: int
    oid: str
    sha256: str | None


@dataclass(frozen=True)
class Changes:
    """Paths to add or replace, and to delete, each in order."""

    add: list[str]
    delete: list[str]

    def __bool__(self) -> bool:
        return bool(self.add or self.delete)


def changes(local: Mapping[str, LocalFile], remote: Mapping[str, RemoteFile], stale: Collection[str]) -> Changes:
    """What is missing or different in the repository, and which of the ``stale`` files there are no longer made."""
    add = [path for path, file in sorted(local.items()) if path not in remote or not same(file, remote[path])]
    delete = [path for path in sorted(remote) if path not in local and path in stale]
    return Changes(add, delete)


def same(local: LocalFile, remote: RemoteFile) -> bool:
    """Whether the two have the same bytes."""
    if remote.size != local.size:
        return False
    return local.sha256 == remote.sha256 if remote.sha256 else local.git_id() == remote.oid


def batches(paths: list[str], files: Mapping[str, LocalFile], most_bytes: int, most_files: int) -> Iterator[list[str]]:
    """The paths in order, in groups of at most so many bytes and files; a larger file is a group of its own."""
    group: list[str] = []
    size = 0
    for path in paths:
        if group and (size + files[path].size > most_bytes or len(group) >= most_files):
            yield group
            group, size = [], 0
        group.append(path)
        size += files[path].size
    if group:
        yield group
