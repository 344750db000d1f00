"""Workers as tasks of Ray: each runs what ``--worker I/N`` runs; one whose process or node is lost is started again.

Only settings and summaries pass through Ray. Rows, scores and figures of progress are in the directory that all share.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import math
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from entrodrop_prep.config.workers import RAY_FIX
from entrodrop_prep.errors import ConfigError, EngineError, EntrodropError, OutputError
from entrodrop_prep.store.disk import make_folder, writing
from entrodrop_prep.store.locks import remove_if_empty
from entrodrop_prep.store.shards import read_footer, shard_names
from entrodrop_prep.store.workers import LOOK_EVERY, read_note
from entrodrop_prep.terminal import progress
from entrodrop_prep.terminal.preemption import preemptible
from entrodrop_prep.terminal.text import one_line

if TYPE_CHECKING:
    from entrodrop_prep.config import MaterializeConfig, ScoreConfig

S = TypeVar("S")

WORK = "work"
"""Note of a worker: ``total`` work in ``unit``, and the ``folders`` that its shards are in."""
RETRIES = 20
"""How often Ray starts one worker again."""
CONNECT = 10.0
"""Seconds in which a cluster's address must take a connection."""
GRACE = 15.0
"""Seconds in which workers that are cancelled may give back what they have claimed."""


@dataclass(frozen=True)
class Done(Generic[S]):
    """The summary of a worker, of one that had something to do if there was any; seconds and tokens are of all."""

    summary: S
    seconds: float
    tokens: int


def on_ray(work: Callable[[Any], S], config: ScoreConfig | MaterializeConfig, out: Path, kind: str) -> Done[S]:
    """Run ``config.workers`` workers on the Ray that ``config.ray`` names, and wait until the directory is finished.

    Args:
        work: ``score`` or ``materialize``.
        config: its settings.
        out: the directory, on a file system that all nodes share.
        kind: ``scored`` or ``masked``.

    Raises:
        ConfigError: Ray is not installed, cannot be reached, or has no such GPUs.
        EntrodropError: what the first worker raised that met a mistake of the user's; the others are cancelled.
        Preempted: SIGTERM or SIGUSR1; the workers are cancelled.
    """
    with _connected(config) as ray:
        options: dict[str, Any] = {"num_gpus": config.gpus_per_worker} if config.gpus_per_worker else {}
        task = ray.remote(max_calls=1, max_retries=RETRIES, scheduling_strategy="SPREAD", **options)(_work)
        alone = replace(config, out=str(out.absolute()), ray=None, workers=None, gpus_per_worker=0)
        with writing(out):
            made = make_folder(out)
        count = config.workers or 0
        given = [(work, replace(alone, worker=f"{i}/{count}"), os.getcwd()) for i in range(count)]
        stopped = threading.Event()
        with preemptible() as preemption, preemption.finishing(stopped):
            tasks = [task.options(name=f"{work.__name__} {g[1].worker}").remote(*g) for g in given]
            try:
                return _finished(ray, tasks, _Watch(out, kind), stopped)
            except EntrodropError:
                _cancel(ray, tasks)
                remove_if_empty(out, made, locked=False)
                raise
            finally:
                _cancel(ray, tasks)


def _work(work: Callable[[Any], S], config: Any, folder: str) -> S | EntrodropError:
    """What a task of Ray does, in a process of its own. A user's mistake is returned: raised, it gets a traceback."""
    with contextlib.suppress(OSError):  # relative paths are then not found, or not needed
        os.chdir(folder)
    progress.LOG_EVERY = math.inf
    if not os.path.isdir(config.out):
        fix = "put --out on a file system that all nodes of Ray share, at the same path"
        return OutputError(f"it is not there on the node {os.uname().nodename}", where=config.out, fix=fix)
    try:
        return work(config)
    except EngineError as e:
        print(f"warning: {e}", file=sys.stderr, flush=True)
        os._exit(1)
    except EntrodropError as e:
        return e


@contextlib.contextmanager
def _connected(config: ScoreConfig | MaterializeConfig) -> Iterator[Any]:
    """The module ``ray``, connected as ``config`` says, or as the calling program has connected it already."""
    try:
        ray: Any = importlib.import_module("ray")
    except ModuleNotFoundError as e:
        raise ConfigError("--ray needs the package ray", fix="in the checkout: pip install '.[ray]'") from e
    if ray.is_initialized():
        yield ray
        return
    address = config.ray or os.environ.get("RAY_ADDRESS", "")
    host, _, port = address.rpartition(":")
    try:
        if port.isdecimal() and "://" not in address:  # Ray itself tries for minutes
            socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT).close()
        ray.init(address or None, include_dashboard=False, logging_level=logging.ERROR)
    except (OSError, RuntimeError, ValueError) as e:
        raise ConfigError(f"--ray {address}: Ray cannot be reached: {one_line(str(e)).rstrip('.')}", fix=RAY_FIX) from e
    try:
        most = max((n["Resources"].get("GPU", 0) for n in ray.nodes() if n["Alive"]), default=0)
        if config.ray in ("", "local") and config.gpus_per_worker > most:
            what = f"--gpus-per-worker {config.gpus_per_worker}: no node of this Ray has more than {most:g} GPUs"
            raise ConfigError(what, fix="ask for fewer, or give the address of a cluster that adds nodes by itself")
        yield ray
    finally:
        ray.shutdown()


def _finished(ray: Any, tasks: list[Any], watch: _Watch, stopped: threading.Event) -> Done[Any]:
    """Wait for all tasks and show how far they are together. Raises what a worker returned as an error."""
    summaries, lost = [], "they were stopped"
    with contextlib.closing(watch):
        while tasks and not stopped.is_set():
            ended, tasks = ray.wait(tasks, timeout=LOOK_EVERY)
            watch.look()
            for task in ended:
                try:
                    result = ray.get(task)
                except ray.exceptions.RayTaskError:  # a bug
                    raise
                except ray.exceptions.RayError as e:
                    lost = one_line(str(e))
                    continue
                if isinstance(result, EntrodropError):
                    raise result
                summaries.append(result)
        if not summaries:
            raise EntrodropError(
                f"each worker ended {RETRIES + 1} times before it was done: {lost}",
                where=str(watch.out),
                fix="finished files are kept; Ray's logs on that node say more",
            )
        watch.look(ended=True)
        summaries.sort(key=lambda summary: summary.already_complete)
        return Done(summaries[0], watch.seconds, watch.tokens)


def _cancel(ray: Any, tasks: list[Any]) -> None:
    """End tasks that have not ended: as Ctrl-C does, and by force where that takes too long."""
    for force, wait in ((False, GRACE), (True, 1.0)):
        _, tasks = ray.wait(tasks, num_returns=len(tasks), timeout=0)
        for task in tasks:
            ray.cancel(task, force=force)
        if tasks:
            ray.wait(tasks, num_returns=len(tasks), timeout=wait)


class _Watch:
    """Progress of all workers, read from their directory: a shard counts when it is there."""

    def __init__(self, out: Path, kind: str) -> None:
        self.out, self._kind = out, kind
        self._begun = time.monotonic()
        self._seen: set[str] = set()
        self._there = set(shard_names(out, kind))
        self._progress: progress.Progress | None = None
        self._folders: list[str] = []
        self.tokens = 0

    def look(self, *, ended: bool = False) -> None:
        """Count what is new, and show it while a note says how much there is to do: the last worker removes it."""
        if not self._progress and (noted := read_note(self.out, WORK)):
            self._folders = noted["folders"]
            self._progress = progress.Progress("workers", noted["total"], noted["unit"])
        if not self._progress and not ended:
            return
        for name in shard_names(self.out, self._kind):
            if name in self._seen or (self._folders and name.rpartition("/")[0] not in self._folders):
                continue
            self._seen.add(name)
            footer = read_footer(self.out / name)
            units = footer.info["source"]["units"] if self._kind == "scored" else footer.rows
            if name not in self._there:
                self.tokens += footer.info["counts"]["tokens"]
                if self._progress:
                    self._progress.add(units, footer.info["counts"]["tokens"])
            elif self._progress:
                self._progress.skip(units)

    @property
    def seconds(self) -> float:
        """Since it began."""
        return time.monotonic() - self._begun

    def close(self) -> None:
        """End the bar."""
        if self._progress:
            self._progress.__exit__(None, None, None)
