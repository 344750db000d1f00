"""``--worker``: which of several processes that share a directory this one is."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from entrodrop_prep.config.settings import Setting, is_number
from entrodrop_prep.errors import ConfigError

WORKER = Setting(
    "Share --out with other processes, on this machine or others: number I of N, from 0, which looks at every Nth file "
    "first. auto takes the numbers of Slurm, of an indexed Kubernetes job, or of Open MPI.",
    metavar="I/N|auto",
    role="operation",
    panel="Resume and workers",
)
CLAIM_TIMEOUT = Setting(
    "Seconds without a sign of life after which other workers take over what one has begun.",
    gt=0,
    role="operation",
    panel="Resume and workers",
)
RAY = Setting(
    "Run --workers workers as tasks of Ray: on the cluster at ADDRESS; without ADDRESS on that of RAY_ADDRESS, or one "
    "that runs here already, else on one that is started here.",
    metavar="[ADDRESS]",
    role="operation",
    panel="Resume and workers",
)
WORKERS = Setting(
    "Workers that --ray runs, each with one CPU core.", ge=1, metavar="N", role="operation", panel="Resume and workers"
)
GPUS_PER_WORKER = Setting(
    "GPUs of each worker that --ray runs.", ge=0, metavar="N", role="operation", panel="Resume and workers"
)
RAY_FIX = "start one with `ray start`, give its address, or --ray local"
PAIRS = (
    ("SLURM_PROCID", "SLURM_NTASKS"),
    ("JOB_COMPLETION_INDEX", "JOB_COMPLETIONS"),
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
)
"""Variables that hold a process's number, from 0, and how many there are. Kubernetes sets no JOB_COMPLETIONS: the
manifest must."""
ARRAY = "SLURM_ARRAY_TASK_ID"


@dataclass(frozen=True)
class Worker:
    """Number ``index``, from 0, of ``count`` processes. It decides only which shards are looked at first."""

    index: int
    count: int


def worker_of(text: str, environment: Mapping[str, str] = os.environ) -> Worker:
    """What ``--worker`` says: ``I/N``, or ``auto``, as a scheduler's environment variables have it.

    In a Slurm array each task of each element is a worker. Elements need not be numbered without gaps.

    Raises ConfigError where it is neither, where a number is not below the count, and where ``auto`` finds nothing.
    """
    if text != "auto":
        index, slash, count = text.partition("/")
        if not slash:
            raise ConfigError(f"--worker {text!r} is not understood", fix="give I/N, such as 0/4, or auto")
        return _checked(index, count, f"--worker {text!r}", "give I/N with I from 0 to N - 1, such as 0/4")
    found = [_from(environment, *pair) for pair in PAIRS if pair[0] in environment]
    if ARRAY in environment:
        tasks = found[0] if "SLURM_PROCID" in environment else Worker(0, 1)
        element = _element(environment)
        return Worker(element.index * tasks.count + tasks.index, element.count * tasks.count)
    if not found:
        names = ", ".join(name for name in (ARRAY, *(pair[0] for pair in PAIRS)))
        raise ConfigError(f"--worker auto finds none of {names}", fix="give the number of this worker: --worker I/N")
    return found[0]


def check_worker(config: Any) -> None:
    """Raises ConfigError for workers that cannot be, or with a flag that one process must have for itself."""
    if config.ray is None and (config.workers is not None or config.gpus_per_worker):
        raise ConfigError(
            f"{'--workers' if config.workers else '--gpus-per-worker'} is for --ray",
            fix="add --ray, or start each worker yourself, with --worker I/N",
        )
    if config.ray is not None and config.workers is None:
        raise ConfigError("--ray needs --workers", fix="say how many: --workers N")
    if config.ray is not None and config.worker is not None:
        raise ConfigError("--ray and --worker exclude each other", fix="leave out --worker: --ray starts all workers")
    flag = "--ray" if config.ray is not None else "--worker"
    if config.worker is not None:
        worker_of(config.worker)
    if config.overwrite and (config.ray is not None or config.worker is not None):
        raise ConfigError(
            f"--overwrite and {flag} exclude each other: each worker would throw away what the others made",
            fix=f"remove the directory, or run once with --overwrite and without {flag}",
        )


def _from(environment: Mapping[str, str], number: str, count: str) -> Worker:
    if count not in environment:
        raise ConfigError(f"--worker auto finds {number}, but no {count}", fix=f"set {count}, or give --worker I/N")
    values = environment[number], environment[count]
    return _checked(*values, f"--worker auto: {number}={values[0]} of {count}={values[1]}", "give --worker I/N")


def _element(environment: Mapping[str, str]) -> Worker:
    """The element of a Slurm array. A list such as 3,7,8 has larger numbers than elements: these share places."""
    names = [f"SLURM_ARRAY_TASK_{name}" for name in ("ID", "MIN", "STEP", "COUNT")]
    values = [environment.get(name, default) for name, default in zip(names, ("", "0", "1", "1"), strict=True)]
    for name, value in zip(names, values, strict=True):
        if not is_number(value):
            raise ConfigError(f"--worker auto: {name}={value} is not a number", fix="give --worker I/N")
    number, first, step, count = map(int, values)
    if number < first or not count or not step:
        what = " ".join(f"{name}={value}" for name, value in zip(names, values, strict=True))
        raise ConfigError(f"--worker auto: {what} cannot be", fix="give --worker I/N")
    return Worker((number - first) // step % count, count)


def _checked(index: str, count: str, what: str, fix: str) -> Worker:
    if not (is_number(index) and is_number(count)):
        raise ConfigError(f"{what}: not two numbers", fix=fix)
    if int(index) >= int(count):
        raise ConfigError(f"{what}: {index} is not below {count}", fix=fix)
    return Worker(int(index), int(count))
