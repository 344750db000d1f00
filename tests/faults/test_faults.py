"""Commands that are killed, interrupted, or refused by the system at exact calls: nothing is lost, the rerun completes.

CI runs the first of each kind; ``make faults`` runs all of them and lists each with its outcome.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

import entrodrop_prep
from entrodrop_prep import cli
from entrodrop_prep.verification.run import verify
from helpers.faults import REPORT, Fault, Job, Processes, kept, strike
from helpers.hub import Hub
from helpers.pushes import commits_of, holds, masked_directory, push
from helpers.scored import some_rows, write_scored
from programs.faulty import digest_of_rows

MODEL = Path(entrodrop_prep.__file__).parent / "demo" / "model"

CI = [
    Fault("score", "SIGKILL", 0.35),
    Fault("score", "SIGINT", 0.5),
    Fault("score", "ENOSPC", 0.5, "write"),
    Fault("score", "edited", 0.4),
    Fault("score", "another", 0.5),
    *[Fault("materialize", "SIGKILL", at) for at in (0.3, 0.97)],
    *[Fault("materialize", what, 0.5) for what in ("SIGTERM", "replaced", "clock +3650")],
    Fault("materialize", "EIO", 0.6, "fsync"),
    Fault("materialize", "EROFS on", 0.5, "open"),
    Fault("materialize", "room", 0.25, "write"),
    Fault("materialize --worker", "SIGKILL", 0.5),
    Fault("materialize --worker", "SIGTERM", 0.3),
    Fault("materialize --worker", "claims-past", 0.4),
    Fault("report", "ENOSPC", 0.5, "write"),
    Fault("load", "SIGKILL", 0.5),
    Fault("load", "ENOSPC", 0.7, "write"),
]


def more() -> Iterator[Fault]:
    """The rest: each kind at points of the run that a seed decides."""
    rng = random.Random(15)

    def points(count: int) -> list[float]:
        return [(i + rng.random()) / count for i in range(count)]

    for job, kill, term, interrupt in (
        *[("score", 10, 4, 5), ("materialize", 12, 5, 6), ("score --worker", 5, 4, 3)],
        *[("materialize --worker", 6, 4, 3), ("load", 8, 3, 3)],
    ):
        for what, count in (("SIGKILL", kill), ("SIGTERM", term), ("SIGINT", interrupt)):
            yield from (Fault(job, what, at) for at in points(count))
    yield from (Fault("report", what, 0.5) for what in ("SIGKILL", "SIGTERM", "SIGINT"))
    yield from (Fault("report", what, 1, calls) for what, calls in (("EIO", "fsync"), ("EROFS on", "open")))
    for what, count in (("SIGKILL", 6), ("SIGTERM", 3), ("SIGINT", 3)):
        yield from (Fault("push", what, at, "send") for at in points(count))
    for job in ("score", "materialize", "load"):
        for what, calls in (
            *[("ENOSPC", "write"), ("EDQUOT", "write"), ("ENOSPC", "fsync"), ("EIO", "fsync"), ("EIO", "write")],
            *[("EROFS on", "open"), ("EACCES on", "any"), ("ESTALE", "rename"), ("ENOSPC", "open")],
        ):
            yield from (Fault(job, what, at, calls) for at in points(2))
        yield from (Fault(job, "room", at, "write") for at in points(6))
    for what in ("edited", "vanished", "replaced", "truncated", "grown"):
        yield from (Fault("score", what, at) for at in points(2))
        yield Fault("materialize", what, rng.random())
    for job in ("score", "materialize", "score --worker", "materialize --worker"):
        yield from (Fault(job, f"clock {days:+d}", rng.random()) for days in (-3650, 3650))
    for job in ("score", "materialize"):
        yield Fault(job, "another", rng.random())
        yield from (Fault(f"{job} --worker", f"claims-{when}", rng.uniform(0.2, 0.6)) for when in ("past", "future"))


REST = [f for f in more() if f not in CI]


def score_job(folder: Path, *flags: str) -> Job:
    text = Path(json.__file__).read_text()
    rows = [{"text": text[97 * i : 97 * i + 90 + 20 * (i % 7)]} for i in range(24)]
    source = folder / "rows.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = ["score", str(source), "--model", str(MODEL), "--backend", "transformers", "--device", "cpu"]
    given += ["--rows-per-shard", "4", "--max-length", "64", "--overlap", "4", *flags]
    return finished(lambda out: [*given, "--out", str(out)], [source], folder)


def materialize_job(folder: Path, *flags: str) -> Job:
    scored = write_scored(folder / "scored", some_rows(200, lengths=(2, 60)), rows_per_shard=50)
    given = ["materialize", str(scored), "--epochs", "3", "--rows-per-shard", "60", "--layout", "jsonl", *flags]
    return finished(lambda out: [*given, "--out", str(out)], [scored / "shard-00002.parquet"], folder)


def finished(arguments: Callable[[Path], list[str]], changed: list[Path], folder: Path) -> Job:
    """A job, run once to its end."""
    worker = "--worker" in arguments(folder)
    job = Job(arguments, lambda out: cli.run(arguments(out)) == 0, changed=changed, worker=worker)
    assert job.again(folder / "out")
    assert not verify(str(folder / "out")).findings
    job.expected = kept(folder / "out")
    return job


def report_job(folder: Path) -> Job:
    scored = write_scored(folder / "scored", some_rows(200, lengths=(2, 60)), rows_per_shard=50)

    def arguments(out: Path) -> list[str]:
        return ["report", str(scored), "--out", str(out / REPORT)]

    (folder / "out").mkdir()
    job = Job(arguments, lambda out: cli.run(arguments(out)) == 0)
    assert job.again(folder / "out")
    job.expected = kept(folder / "out")
    return job


def load_job(folder: Path) -> Job:
    scored = write_scored(folder / "scored", some_rows(200, lengths=(2, 60)), rows_per_shard=50)
    right = digest_of_rows(str(scored), str(folder / "cache"))
    job = Job(lambda out: ["load", str(scored), str(out)], lambda out: digest_of_rows(str(scored), str(out)) == right)
    job.expected = kept(folder / "cache")
    return job


def push_job(folder: Path, hub: Hub) -> Job:
    """Each push is to a repository of its own, named after the folder that the harness gives it."""
    masked = masked_directory(folder, epochs=2)

    def repository(out: Path) -> str:
        return f"alice/{out.parent.name}"

    def again(out: Path) -> bool:
        done = push(hub, folder / "home", str(masked), repository(out))
        assert done.returncode == 0, done.stderr
        return len(commits_of(hub, repository(out))) == 1 and bool(holds(hub, repository(out), masked))

    job = Job(lambda out: ["push", "--retry-seconds", "0.05", str(masked), repository(out)], again, sockets=True)
    job.environment = {k: v for k, v in hub.environment(folder / "home").items() if k.startswith(("HF_", "HOME"))}
    return job


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory) -> Processes:
    return Processes(tmp_path_factory.mktemp("processes"))


@pytest.fixture(scope="module")
def job_of(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Job]]:
    """Jobs by name, each made once."""
    made: dict[str, Job] = {}
    with Hub(tmp_path_factory.mktemp("hub")) as hub:
        make: dict[str, Callable[[Path], Job]] = {
            "score": score_job,
            "score --worker": lambda folder: score_job(folder, "--worker", "0/2"),
            "materialize": materialize_job,
            "materialize --worker": lambda folder: materialize_job(folder, "--worker", "0/2"),
            "report": report_job,
            "load": load_job,
            "push": partial(push_job, hub=hub),
        }

        def job(name: str) -> Job:
            if name not in made:
                made[name] = make[name](tmp_path_factory.mktemp(name.replace(" ", "")))
            return made[name]

        yield job


@pytest.mark.parametrize(
    "fault", [*CI, *(pytest.param(fault, marks=pytest.mark.faults) for fault in REST)], ids=[str(f) for f in CI + REST]
)
def test_nothing_is_lost(
    fault: Fault,
    processes: Processes,
    job_of: Callable[[str], Job],
    tmp_path: Path,
    record_property: Callable[[str, object], None],
) -> None:
    outcome = strike(processes, fault.job, job_of(fault.job), fault, tmp_path)
    record_property("fault", f"{fault}: {outcome}")
