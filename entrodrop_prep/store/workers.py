"""Several processes, on any nodes, that write one directory together: who sets it up, who makes what, who leaves last.

    DIR/.lock                 held by each worker together with the others, by a run without --worker alone
    DIR/.tmp-workers/lock     held by one worker at a time, to set up, to take over a claim, and to publish
    DIR/.tmp-workers/clock-W  of worker W, by which it asks the file system for the time
    DIR/.tmp-workers/claim-X  made by the worker that makes X, and touched again and again while it lives

A claim only saves work. Files take their names atomically and keep them, so what two workers made is there once, whole.
"""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import json
import logging
import math
import os
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from entrodrop_prep.config.workers import Worker
from entrodrop_prep.errors import EntrodropError, OutputError
from entrodrop_prep.store.disk import WORKERS, check_held, check_regular, held, remove_tree, write_bytes, writing
from entrodrop_prep.store.locks import LOCK, lock_alone, open_locked, remove_if_empty
from entrodrop_prep.store.ownership import Contents, remove_leftovers
from entrodrop_prep.store.shards import shard_names
from entrodrop_prep.terminal.progress import Progress

log = logging.getLogger(__name__)
T = TypeVar("T")

LOOK_EVERY = 1.0
"""Seconds between two looks at what others do."""
TOUCH_EVERY = 30.0
"""Seconds, at most, between two touches of a claim."""
SIGNING = 10.0
"""Seconds between making a claim and writing whose it is, at most."""
LEAVING = 5.0
"""Seconds that a worker waits to find out whether it is the last one."""


@contextlib.contextmanager
def joined(directory: Path, contents: Contents, claim_timeout: float) -> Iterator[Workers]:
    """Write a directory together with other workers; the last one to leave removes what only they needed.

    Args:
        directory: made if it is not there.
        contents: what it holds.
        claim_timeout: seconds without a touch after which a claim may be taken over.

    Raises OutputError for a directory that is lost on the way; see ``Workers.setting_up`` for more.
    """
    token = secrets.token_hex(4)
    with held(directory, token) as made:
        workers = Workers(directory, contents, token, claim_timeout)
        try:
            yield workers
        except EntrodropError:
            workers._leave()
            remove_if_empty(directory, made)
            raise
        finally:
            workers._leave()


class Workers:
    """One worker's view of all of them. Threads may share it."""

    def __init__(self, directory: Path, contents: Contents, token: str, claim_timeout: float) -> None:
        self._directory, self._folder, self._contents = directory, directory / WORKERS, contents
        self._token, self._timeout = token, claim_timeout
        self._host = _host()
        self._handle: int | None = None
        self._clock: int | None = None
        self._claims: dict[str, int] = {}
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self.stopped = threading.Event()
        """Set where nothing more is to be begun."""

    @contextlib.contextmanager
    def setting_up(self) -> Iterator[bool]:
        """The first section of a worker: gives whether it is alone, with no reader either; leftovers are gone then.

        Raises OutputError where a run without ``--worker`` is writing.
        """
        with self.section():
            try:
                self._handle, alone = lock_alone(self._directory), True
            except OutputError:
                shared = fcntl.LOCK_SH | fcntl.LOCK_NB
                self._handle, alone = open_locked(self._directory / LOCK, os.O_RDWR | os.O_CREAT, shared), False
            if alone:
                remove_leftovers(self._directory, self._contents, workers=False)
                self._remove_notes()
            self._clock = self._new(f"clock-{self._token}")
            yield alone
            if alone:  # on some systems another run may come in between: then this one gives way
                try:
                    fcntl.flock(self._handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
                except BlockingIOError:
                    raise OutputError(
                        "another run is writing here", where=str(self._directory), fix="wait for it"
                    ) from None
        threading.Thread(target=self._touch, name="claims", daemon=True).start()

    @contextlib.contextmanager
    def section(self, wait: float = math.inf) -> Iterator[None]:
        """What one worker does at a time. Raises TimeoutError where it cannot begin within ``wait`` seconds."""
        lock, until = fcntl.LOCK_EX | (fcntl.LOCK_NB if wait < math.inf else 0), time.monotonic() + wait
        handle = None
        while handle is None:
            with writing(self._directory):
                check_held(self._directory)
                self._folder.mkdir(exist_ok=True)
                with contextlib.suppress(FileNotFoundError):  # the last of others has just removed the folder
                    try:
                        handle = open_locked(self._folder / "lock", os.O_RDWR | os.O_CREAT, lock)
                    except OutputError:
                        if wait == math.inf:
                            raise
                        if time.monotonic() > until:
                            raise TimeoutError from None
                        time.sleep(0.05)
        try:
            yield
        finally:
            os.close(handle)

    def agreed(self, name: str, value: Any) -> Any:
        """What the first of these workers noted under a name; ``value`` if this one is the first. In a section."""
        found = self.read(name)
        if found is None:
            self.write(name, value)
            return value
        return found

    def read(self, name: str) -> Any:
        """What a worker wrote under a name, as JSON; None where nothing is there."""
        return read_note(self._directory, name)

    def write(self, name: str, value: Any) -> None:
        """Note a JSON value for the others, until all have left."""
        write_bytes(self._folder / f"{name}.json", json.dumps(value).encode())

    def claimed(
        self,
        worker: Worker,
        files: Callable[[], tuple[Sequence[str], bool]],
        progress: Progress,
        units: Callable[[str], float],
    ) -> Iterator[str]:
        """Names of shards that this worker has claimed and is to make, until all are there or it is to stop.

        Args:
            worker: decides which are looked at first, see ``in_turn``.
            files: gives the names that are known by now, and whether these are all.
            progress: counts what others made, and shows what is waited for: shards that others have claimed, which are
                made here if those workers are gone.
            units: how much of the work a finished shard is.
        """
        seen: set[str] = set()
        while not self.stopped.is_set():
            there = set(shard_names(self._directory, self._contents.kind))
            progress.skip(sum(map(units, sorted(there - seen))))
            seen |= there
            names, whole = files()
            missing = [name for name in in_turn(names, worker) if name not in there]
            if whole and not missing:
                return
            taken = False
            for name in missing:
                if self.stopped.is_set():
                    return
                if self.take(name, self._directory / name):
                    taken = True
                    seen.add(name)
                    yield name
            if not taken:
                others = len(missing) - len(self._claims)
                if others > 0 or not whole:
                    progress.wait(f"files with other workers: {others:,}" if others > 0 else "others find more to do")
                self.stopped.wait(min(LOOK_EVERY, self._timeout / 4))

    def take(self, name: str, made: Path | None = None) -> bool:
        """Claim a piece of work, whose file would be ``made``; False where that is there or another worker has it.

        A claim whose worker is gone is taken over: one that was not touched for the time out, by the clock of the file
        system, or whose process ended on this machine.
        """
        if name in self._claims:
            return False
        path = self._claim(name)
        with writing(path):
            check_held(self._directory)
            handle = self._new(path.name)
            if handle is None and self._is_stale(path):
                with self.section():
                    if self._is_stale(path):
                        path.unlink(missing_ok=True)
                        handle = self._new(path.name)
                        log.info("%s: taken over from a worker that is gone", name)
            if handle is None:
                return False
            with self._lock:
                self._claims[name] = handle
            if made is not None and is_there(made):  # its worker finished it just before the claim was free
                self.give_back(name)
                return False
        return True

    def give_back(self, name: str) -> None:
        """End a claim of this worker's, whether its work is done or not."""
        with self._lock:
            handle = self._claims.pop(name, None)
        if handle is None:
            return
        path = self._claim(name)
        with contextlib.suppress(OSError):
            if os.path.samestat(os.fstat(handle), os.stat(path)):
                path.unlink()
        os.close(handle)

    @contextlib.contextmanager
    def finishing(self, name: str) -> Iterator[None]:
        """The end of a piece of work: its claim ends with the block; where the block fails, nothing more is begun."""
        try:
            yield
        except BaseException:
            self.stopped.set()
            raise
        self.give_back(name)

    def _claim(self, name: str) -> Path:
        return self._folder / f"claim-{name.removesuffix('.parquet').replace('/', '-')}"  # readers look for .parquet

    def _new(self, name: str) -> int | None:
        """A file that was not there, open; it says who made it. None where it is there."""
        try:
            handle = os.open(self._folder / name, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o644)
        except FileExistsError:
            return None
        os.write(handle, json.dumps([self._host, os.getpid()]).encode())
        return handle

    def _is_stale(self, path: Path) -> bool:
        """Whether the worker of a claim is gone. Opening it asks a network file system for its time as it is now."""
        try:
            handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
        except FileNotFoundError:
            return False
        try:
            touched, owner = os.fstat(handle).st_mtime, os.read(handle, 1000)
        finally:
            os.close(handle)
        try:
            host, pid = json.loads(owner)
        except (ValueError, TypeError):  # its worker is just writing to it, or it or the machine ended before it had
            return self._now() - touched > min(SIGNING, self._timeout)
        gone = host is not None and host == self._host and not _is_running(pid)
        return gone or self._now() - touched > self._timeout

    def _now(self) -> float:
        """The time by the clock of the file system, which claims are compared by: no two machines' clocks agree."""
        if self._clock is None:
            raise RuntimeError("the worker has not set up the directory")
        os.utime(self._clock)
        return os.fstat(self._clock).st_mtime

    def _touch(self) -> None:
        """Touch the claims, by their open files: one that was taken over has another file."""
        while not self._ended.wait(min(TOUCH_EVERY, self._timeout / 4)):
            with self._lock:
                for handle in self._claims.values():
                    with contextlib.suppress(OSError):
                        os.utime(handle)

    def _remove_notes(self) -> None:
        """What workers left that are all gone."""
        for entry in os.scandir(self._folder):
            if entry.name != "lock":
                os.unlink(entry.path)

    def _leave(self) -> None:
        """Give back what is in hand; the last one removes what only workers needed."""
        if self._ended.is_set():
            return
        self._ended.set()
        for name in list(self._claims):
            self.give_back(name)
        for handle in (self._clock, self._handle):
            if handle is not None:
                os.close(handle)
        with contextlib.suppress(OSError):
            (self._folder / f"clock-{self._token}").unlink()
        with contextlib.suppress(TimeoutError, OutputError), self.section(LEAVING):
            try:
                os.close(lock_alone(self._directory))
                remove_leftovers(self._directory, self._contents, workers=False)
            except OutputError:  # others are there; a run that could not begin leaves nothing
                if os.listdir(self._folder) != ["lock"]:
                    return
            with contextlib.suppress(OSError):  # somebody joins
                remove_tree(self._folder)


def read_note(directory: Path, name: str) -> Any:
    """What a worker of a directory wrote under a name, as JSON; None where nothing is there."""
    try:
        return json.loads((directory / WORKERS / f"{name}.json").read_bytes())
    except FileNotFoundError:
        return None


def in_turn(items: Sequence[T], worker: Worker) -> list[T]:
    """Pieces of work in the order in which a worker looks for some to do: its own first, then all others'."""
    own = items[worker.index :: worker.count]
    others = [items[i :: worker.count] for i in range(worker.count) if i != worker.index]
    return [*own, *itertools.chain(*others[worker.index :], *others[: worker.index])]


def busy(directory: Path) -> OutputError:
    """What is said where a worker would have to change a finished directory that others have open."""
    return OutputError("other runs are reading or writing here", where=str(directory), fix="wait for them")


def is_there(path: Path) -> bool:
    """Whether a name is taken. Opening its folder asks a network file system for the names as they are now."""
    try:
        os.close(os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY))
    except FileNotFoundError:
        return False
    return check_regular(path)


def _host() -> list[Any] | None:
    """The machine since it was started, and the processes that are seen there; None where that is not known."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return [boot, os.stat("/proc/self/ns/pid").st_ino]
    except OSError:
        return None


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
