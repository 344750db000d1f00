"""vLLM engines as processes of this machine: where each runs, how it is started, fed, and ended."""

from __future__ import annotations

import contextlib
import getpass
import logging
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from entrodrop_prep.backends.batch import Batch
from entrodrop_prep.errors import ConfigError, ModelError
from entrodrop_prep.store.disk import scratch, scratch_file
from entrodrop_prep.vllm_plugin import leftovers

if TYPE_CHECKING:
    from entrodrop_prep.backends.model import ModelInfo
    from entrodrop_prep.backends.prefetch import ShardTokens

log = logging.getLogger(__name__)

LAST_WORDS = 4000
SECONDS_TO_END = 5.0


class Engine:
    """A worker process (``entrodrop_prep.vllm_plugin.worker``), and the batches it has.

    Attributes:
        name: for messages.
        environment: what it runs on, once it is ready.
        batches: key -> batch, and how many of its tokens are done.
        tokens_left: tokens that it still has to score.
        heard: when it last finished a step, or was given work while it had none; seconds of the monotonic clock.
    """

    def __init__(self, number: int, device: str | None, options: dict[str, Any], env: dict[str, str], verbose: bool):
        self.name = f"engine {number}" + (f" on GPU {device}" if device is not None else "")
        self._log: IO[bytes] | None = None if verbose else scratch_file()
        self._scratch = contextlib.ExitStack()
        self._folder = self._scratch.enter_context(scratch())
        ours, theirs = socket.socketpair()
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "entrodrop_prep.vllm_plugin.worker", str(theirs.fileno()), str(self._folder)],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=self._log or sys.stderr.fileno(),
                stderr=self._log or sys.stderr.fileno(),
                env={**env, **own_temporary_files(self._folder)},
                start_new_session=True,  # Ctrl-C is the parent's to handle
            )
        self.connection = Connection(ours.detach())
        self.environment: dict[str, str] = {}
        self.batches: dict[int, tuple[Batch, int]] = {}
        self.tokens_left = 0
        self.heard = time.monotonic()
        self._keys = 0
        self._started = 0
        self.connection.send(options)

    def answer(self) -> str | None:
        """Take its first message: None if it is ready, else what keeps it from starting; then it has ended."""
        try:
            kind, value = self.connection.recv()
        except (EOFError, OSError):
            return self.close()
        if kind != "ready":
            self.close()
            return str(value)
        if self._log is not None:
            self._started = os.fstat(self._log.fileno()).st_size
        self.environment = dict(value)
        return None

    def give(self, batch: Batch) -> None:
        """Send a batch."""
        sequences = batch.sequences
        lengths = np.array([len(s) for s in sequences], np.int64)
        if not self.batches:
            self.heard = time.monotonic()
        self.batches[self._keys] = (batch, 0)
        self.tokens_left += int(lengths.sum())
        with contextlib.suppress(OSError):  # it is gone: so is its side of the connection, and receive says so
            self.connection.send((self._keys, np.concatenate(sequences).astype(np.int32), lengths))
        self._keys += 1

    def receive(self, done: Callable[[ShardTokens, int], None]) -> tuple[Batch, np.ndarray[Any, Any]] | None:
        """Take one message; a batch with its raw scores [N, 2] if it finished one. Raises EOFError or OSError."""
        message = self.connection.recv()
        self.heard = time.monotonic()
        if message[0] == "step":
            for key, tokens in message[1].items():
                batch, before = self.batches[key]
                self.tokens_left -= tokens
                self.batches[key] = (batch, before + tokens)
                done(batch.job, tokens)
            return None
        _, key, raw = message
        batch, _ = self.batches.pop(key)
        return batch, raw

    def kill(self) -> None:
        """End it and its ranks at once, whatever they are doing."""
        leftovers.kill(self.process.pid, self._folder)

    def hang_up(self) -> None:
        """Ask it to end, and do not wait."""
        self.connection.close()

    def close(self) -> str:
        """End the process; returns how it ended and the last line it said."""
        self.hang_up()
        deadline = time.monotonic() + SECONDS_TO_END
        while self.process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        if self.process.poll() is None:
            self.kill()
        code = self.process.wait()
        leftovers.clean(self._folder)  # also of one that was killed by somebody else
        self._scratch.close()
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


def those_ready(engines: Sequence[Engine], info: ModelInfo) -> list[Engine]:
    """Wait until every engine has started or failed; those that started. Raises ModelError if none did."""
    waiting, failed = list(engines), dict[int, str]()
    while waiting:
        for connection in wait([engine.connection for engine in waiting]):
            engine = next(e for e in waiting if e.connection is connection)
            waiting.remove(engine)
            reason = engine.answer()
            if reason is not None:
                failed[id(engine)] = reason
    ready = [engine for engine in engines if id(engine) not in failed]
    if not ready:
        raise _start_error(failed[id(engines[0])], info)
    for engine in engines:
        if id(engine) in failed:
            log.warning("continuing without %s: %s", engine.name, _start_error(failed[id(engine)], info).what)
    return ready


def close_all(engines: Iterable[Engine]) -> None:
    """End engines, side by side."""
    some = list(engines)
    for engine in some:
        engine.hang_up()
    for engine in some:
        engine.close()


def _start_error(reason: str, info: ModelInfo) -> ModelError:
    """What kept an engine from starting, and what to do about it."""
    text = " ".join(reason.split())
    lower = text.lower()
    if "kv cache" in lower or "gpu memory utilization" in lower or "gpu_memory_utilization" in lower:
        fix = "lower --max-length, or give --engine-arg gpu_memory_utilization or (on a CPU) VLLM_CPU_KVCACHE_SPACE"
    elif "out of memory" in lower or "can't allocate" in lower:
        fix = "use --engine-arg tensor_parallel_size, a smaller --dtype or a smaller --logits-mib"
    elif "torchvision" in lower:
        fix = "install the torchvision that belongs to the installed torch, or use --backend transformers"
    elif "unexpected keyword" in lower:
        fix = "check --engine-arg: the installed vLLM does not know that option"
    elif "not supported" in lower or "architectures" in lower:
        fix = "use --backend transformers for this architecture"
    else:
        fix = "--verbose shows everything vLLM says; --backend transformers does without it"
    return ModelError(f"vLLM's engine does not start: {text[:400]}", where=info.name, fix=fix)


def device_sets(replicas: str, group: int, cpu: bool) -> Sequence[str | None]:
    """The devices of each engine, as CUDA_VISIBLE_DEVICES names them; None on a CPU. Raises ConfigError.

    Args:
        replicas: ``auto`` or a number.
        group: devices of one engine.
        cpu: whether this vLLM is built for CPUs.
    """
    if cpu:
        return [None] * (1 if replicas == "auto" else int(replicas))
    devices = _devices()
    most = len(devices) // group
    count = most if replicas == "auto" else int(replicas)
    if not most or count > most:
        raise ConfigError(
            f"{max(count, 1)} engines of {group} GPUs each do not fit on {len(devices)} GPUs",
            fix="lower --replicas or --engine-arg tensor_parallel_size",
        )
    return [",".join(devices[i * group : (i + 1) * group]) for i in range(count)]


def _devices() -> list[str]:
    """The GPUs this process may use: as the environment names them, which may be by UUID, else by number."""
    import torch

    chosen = os.environ.get(_visible())
    if chosen is None:
        return [str(i) for i in range(torch.cuda.device_count())]
    names = [name.strip() for name in chosen.split(",")]
    invalid = next((i for i, name in enumerate(names) if name in ("", "-1")), len(names))
    return names[:invalid]  # CUDA takes none from the first invalid one on


def _visible() -> str:
    """The variable that names the GPUs a process sees."""
    import torch

    return "HIP_VISIBLE_DEVICES" if torch.version.hip else "CUDA_VISIBLE_DEVICES"


KEEPS_MEMORY = {"hugetlb": 1, "mmap_threshold": 32 << 20, "trim_threshold": 4 << 30, "top_pad": 64 << 20}
"""Settings of glibc's allocator: huge pages, and what a step has freed is kept for the next.

Without them each step's tensors go back to the system and come again as fresh pages: a million page faults in 250,000
tokens, a tenth of the time. Other allocators pass over them.
"""


def engine_environment(logits_mib: int | None, device: str | None, cpu: bool, engines: int = 1) -> dict[str, str]:
    """Environment variables of a process with an engine. What the user has set stays.

    Args:
        logits_mib: ``--logits-mib``.
        device: the GPUs it may use, as ``CUDA_VISIBLE_DEVICES`` names them; None: as they are.
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
    if device is not None:
        environment[_visible()] = device
    return environment


SOCKET_LENGTH = 70
"""Characters of a folder in which vLLM may name sockets: the system takes 107, and the names have 36."""


def own_temporary_files(folder: Path) -> dict[str, str]:
    """Environment variables by which vLLM's sockets and temporary files are in ``folder``, but not what it compiles."""
    shared = tempfile.gettempdir()
    try:
        user = getpass.getuser()
    except (KeyError, ImportError, OSError):
        user = f"uid_{os.getuid()}"
    kept = {"TORCHINDUCTOR_CACHE_DIR": os.path.join(shared, f"torchinductor_{user}")}
    if len(str(folder)) > SOCKET_LENGTH:
        kept["VLLM_RPC_BASE_PATH"] = shared
    return {"TMPDIR": str(folder), **{name: os.environ.get(name, value) for name, value in kept.items()}}
