"""Which files of a directory are this program's, and their removal: nothing else is ever removed.

A shard is ours by its footer, any other file by its digest in the manifest, or in the private note that a run makes
before it writes or removes one. A name alone proves nothing. Links are never followed, and a folder goes only when it
is empty.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import stat
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from entrodrop_prep.errors import IntegrityError, OutputError
from entrodrop_prep.store import digest, manifest
from entrodrop_prep.store.disk import (
    MOVE_IT,
    PART,
    TMP,
    WORKERS,
    check_folder,
    check_regular,
    flush_folder,
    remove_tree,
    renamed_folder,
    without_tag,
    write_bytes,
    writing,
)
from entrodrop_prep.store.schema import family
from entrodrop_prep.store.shards import SHARD_FOLDER, SHARD_NAMES, read_footer, shard_names


@dataclass(frozen=True)
class Contents:
    """What a kind of directory holds beside its shards: the names that this program needs, and may remove."""

    schema: str
    files: tuple[str, ...]
    folders: tuple[str, ...]
    """Folders that are written as a whole."""
    misplaced: Callable[[str, dict[str, Any]], str | None]
    """What is wrong with a shard of a name and the footer's ``info``; None if nothing is."""
    drawn: tuple[str, ...] = ()
    """Those of ``files`` that are made again whatever was done to them."""
    edited: tuple[str, ...] = ()
    """Files that are written, and never removed: they are the user's too."""
    temporary: tuple[str, ...] = ()
    """Folders and files without a final name."""

    @property
    def kind(self) -> str:
        """``scored`` or ``masked``."""
        return family(self.schema)


def remove_leftovers(directory: Path, contents: Contents, *, workers: bool = True) -> None:
    """Remove what a killed run left under temporary names that this program gives; other names stay, ``.tmp-x`` too.

    ``workers``: also what workers settled among each other.
    """
    names = [*contents.files, *contents.edited, manifest.NAME, manifest.STATE]
    folders = [*([WORKERS] if workers else []), *(f"{TMP}{name}" for name in contents.folders)]
    with writing(directory):
        for entry in _entries(directory):
            name = without_tag(entry.name)
            if _is_folder(entry) and SHARD_FOLDER.fullmatch(name):
                _remove_parts(Path(entry.path), f"{name}/", contents)
            elif name in folders or name in contents.temporary:
                _remove_temporary(Path(entry.path))
            elif name in [f"{TMP}{n}{PART}" for n in names]:
                _remove_temporary(Path(entry.path), folder=False)
        _remove_parts(directory, "", contents)


def _remove_parts(folder: Path, prefix: str, contents: Contents) -> None:
    """The unfinished shards of a folder."""
    for entry in _entries(folder):
        named = prefix + without_tag(entry.name).removeprefix(TMP).removesuffix(PART)
        whole = entry.name.startswith(TMP) and entry.name.endswith(PART)
        if whole and SHARD_NAMES[contents.kind].fullmatch(named):
            _remove_temporary(Path(entry.path), folder=False)


def _remove_temporary(path: Path, *, folder: bool = True) -> None:
    mode = os.lstat(path).st_mode
    if stat.S_ISREG(mode):
        path.unlink()
    elif folder:
        remove_tree(path)


class Owned:
    """The files of one directory that are this program's.

    ``unsure`` is a directory begun by an earlier version, which noted no digests: what has a name of ours there may
    stay, and be replaced by the same bytes, but is not removed.
    """

    def __init__(self, directory: Path, contents: Contents) -> None:
        self.directory, self.contents = directory, contents
        described: dict[str, Any] | None = None
        with contextlib.suppress(IntegrityError):
            described = manifest.read(directory, contents.schema)
        state = manifest.read_state(directory) or {}
        known = described is not None or "files" in state
        self.unsure = not known and any(os.path.lexists(directory / n) for n in (*contents.files, *contents.folders))
        self._proved: dict[str, set[str]] = {}
        listed = [*described["files"], *described.get("derived", [])] if described else []
        for name, sha256 in [*((e["file"], e["sha256"]) for e in listed), *_pairs(state.get("files"))]:
            if self._may_be_ours(name):
                self._proved.setdefault(name, set()).add(sha256)

    def check(self, *, shards: bool, folders: Collection[str] | None = None) -> list[str]:
        """Nothing else has a name that this program needs; returns the names of everything that is ours.

        Args:
            shards: look at the shards too, by their footers: all is to be removed.
            folders: those of ``Contents.folders`` that are needed; all by default.

        Raises OutputError naming what is in the way: a file of the user's, a link, a folder for a file.
        """
        found = self._shards() if shards else []
        for name in (manifest.NAME, manifest.STATE, *self.contents.edited):
            check_regular(self.directory / name)
        for name in self.contents.files:
            if check_regular(self.directory / name):
                self._check_ours(name, sure=shards)
                found.append(name)
        for folder in self.contents.folders if folders is None else folders:
            for name in self._inside(folder):
                self._check_ours(name, sure=shards)
                found.append(name)
        return found

    def note(self, files: dict[str, str]) -> None:
        """Add files that are about to be written, name -> SHA-256, to the private note."""
        for name, sha256 in files.items():
            self._proved.setdefault(name, set()).add(sha256)
        self._write_note()

    def settle(self, described: dict[str, Any]) -> None:
        """The files that are about to be published, and no others, are what the private note lists."""
        entries = [*described["files"], *described.get("derived", [])]
        self._proved = {e["file"]: {e["sha256"]} for e in entries if self._may_be_ours(e["file"])}
        self._write_note()

    def _write_note(self) -> None:
        state = manifest.read_state(self.directory)
        if state and state.get("files") != self.noted:
            manifest.write_state(self.directory, {**state, "files": self.noted})

    @property
    def noted(self) -> list[list[str]]:
        """Name and SHA-256 of what is known to be ours, for the private note; of what is drawn the name will do."""
        drawn = self.contents.drawn
        pairs = {(n, "" if n in drawn else sha256) for n, known in self._proved.items() for sha256 in known}
        return [list(pair) for pair in sorted(pairs | {(name, "") for name in drawn})]

    def write(self, name: str, data: bytes) -> None:
        """Write one of the ``files``. Raises OutputError where another file has its name."""
        path = self.directory / name
        if check_regular(path) and path.read_bytes() != data:
            self._check_ours(name, sure=True)
        self.note({name: hashlib.sha256(data).hexdigest()})
        write_bytes(path, data)

    @contextlib.contextmanager
    def writing_folder(self, folder: str, made: dict[str, str]) -> Iterator[Path]:
        """A temporary folder that becomes one of the ``folders``; what is ours there goes.

        ``made`` gets the name and the SHA-256 of each file. Raises OutputError, and removes nothing, where anything
        else is in the folder.
        """

        def replace(tmp: Path) -> None:
            made.update({f"{folder}/{name}": digest.of_file(tmp / name) for name in files_below(tmp)})
            old = list(self._inside(folder))
            for name in old:
                if made.get(name) != digest.of_file(self.directory / name):
                    self._check_ours(name, sure=True)
            self.note(made)
            remove_files(self.directory, old)
            with contextlib.suppress(FileNotFoundError):
                os.rmdir(self.directory / folder)

        with renamed_folder(self.directory / folder, replace) as tmp:
            yield tmp

    def remove(self, names: Iterable[str], note: dict[str, Any]) -> None:
        """Remove files that ``check`` found, the manifest first; ``note`` is what the private note says meanwhile."""
        manifest.write_state(self.directory, {**note, "files": self.noted})
        with writing(self.directory):
            remove_files(self.directory, [manifest.NAME, *names])
        self._proved, self.unsure = {}, False

    def _shards(self) -> list[str]:
        names = shard_names(self.directory, self.contents.kind)
        for name in names:
            path = self.directory / name
            check_regular(path)
            try:
                info = read_footer(path).info
            except IntegrityError as e:
                raise _in_the_way(path, e.what) from e
            wrong = self.contents.misplaced(name, info)
            if family(str(info.get("schema"))) != self.contents.kind:
                wrong = f"it holds {info.get('schema')!r}"
            if wrong:
                raise _in_the_way(path, wrong)
        return names

    def _inside(self, folder: str) -> Iterator[str]:
        """Names of the files in one of the ``folders``. Raises OutputError for links, and where it is no folder."""
        path = self.directory / folder
        if not check_folder(path):
            return
        for name in files_below(path):
            check_regular(path / name)
            yield f"{folder}/{name}"

    def _check_ours(self, name: str, *, sure: bool = False) -> None:
        """Raises OutputError unless the file is known to be ours, or may be and that is enough."""
        path = self.directory / name
        if name in self.contents.drawn and (self.unsure or name in self._proved):
            return
        if self.unsure and not sure:
            return
        if name not in self._proved:
            raise _in_the_way(path, "no manifest of this program lists it")
        if digest.of_file(path) not in self._proved[name]:
            raise _in_the_way(path, "it was changed after it was written")

    def _may_be_ours(self, name: str) -> bool:
        parts = PurePosixPath(name).parts
        plain = "/".join(parts) == name and not {"..", "/"} & set(parts) and name.isprintable()
        return (
            plain
            and name != ""
            and (name in self.contents.files or (parts[0] in self.contents.folders and len(parts) > 1))
        )


def remove_files(directory: Path, names: Iterable[str]) -> None:
    """Remove regular files below a directory, and the folders that are empty then. Links are not followed."""
    folders: set[PurePosixPath] = set()
    for name in names:
        above = PurePosixPath(name).parent
        with _open_folder(directory, above.parts) as fd:
            if fd is None:
                continue
            with contextlib.suppress(FileNotFoundError):
                last = PurePosixPath(name).name
                if stat.S_ISREG(os.lstat(last, dir_fd=fd).st_mode):
                    os.unlink(last, dir_fd=fd)
        folders |= {above, *above.parents} - {PurePosixPath(".")}
    for folder in sorted(folders, key=lambda f: len(f.parts), reverse=True):
        try:
            os.rmdir(directory / folder)
        except OSError as e:
            if e.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOENT, errno.ENOTDIR):
                raise
    flush_folder(directory)


def files_below(path: Path) -> list[str]:
    """Names of everything below a folder but folders themselves, sorted; links are named, not followed."""
    found = []
    for folder, folders, files in os.walk(path):
        linked = [name for name in folders if Path(folder, name).is_symlink()]
        found += [Path(folder, name).relative_to(path).as_posix() for name in (*files, *linked)]
    return sorted(found)


@contextlib.contextmanager
def _open_folder(directory: Path, parts: tuple[str, ...]) -> Iterator[int | None]:
    """A folder below a directory, opened part by part; None where one of them is no folder, or a link."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        for part in parts:
            try:
                deeper = os.open(part, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=fd)
            except OSError as e:
                if e.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
                    raise
                yield None
                return
            os.close(fd)
            fd = deeper
        yield fd
    finally:
        os.close(fd)


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    with os.scandir(folder) as entries:
        return sorted(entries, key=lambda entry: entry.name)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    return entry.is_dir(follow_symlinks=False)


def _pairs(value: Any) -> list[tuple[str, str]]:
    """What a note lists, as far as it is what this program writes."""
    pairs = [p for p in value or [] if isinstance(p, list) and len(p) == 2]
    return [(p[0], p[1]) for p in pairs if isinstance(p[0], str) and isinstance(p[1], str)]


def _in_the_way(path: Path, why: str) -> OutputError:
    return OutputError(f"this is in the way, and not known to be this program's: {why}", where=str(path), fix=MOVE_IT)
