"""Pushes through a Hub and a network that fail: afterwards one commit of ours, and nothing lost or sent twice.

Runs that fail in different ways share no server and no directory, so that several go at once: they mostly wait.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from helpers.hub import Fault, Hub
from helpers.pushes import FAST, commits_of, holds, parquet_paths, push, put_rows, start

pytestmark = pytest.mark.network

STEPS = (
    *("whoami", "info", "create-repo", "refs", "tree", "validate-yaml", "preupload"),
    *("lfs-batch", "lfs-put", "lfs-verify", "commit", "resolve", "tag"),
)
UNKNOWING = tuple(step for step in STEPS if step != "commit")
"""All but the commit: one whose answer was lost is found to be there, and not made again."""
FOREIGN = {"notes.txt": b"mine", "other/train-0.parquet": put_rows(1)}


@dataclass
class Outcome:
    """A push through faults, and for some one more without any."""

    hub: Hub
    done: Any
    again: Any
    uploaded: int
    struck: int
    left: list[Fault]
    again_uploaded: int
    again_commits: int


def each(kind: str, steps: tuple[str, ...] = STEPS, **more: Any) -> list[Fault]:
    return [Fault(step, kind, **more) for step in steps]


def competing(hub: Hub, times: int) -> list[Fault]:
    """Someone else commits just before ours arrives."""
    count = iter(range(100))
    return [
        Fault("commit", "before", times=times, do=lambda: hub.repo("alice/data").put({f"their-{next(count)}": b"new"}))
    ]


SCENARIOS: dict[str, Callable[[Hub], list[Fault]]] = {
    "every step answers 500 once": lambda hub: each("500", retry_after=0),
    "every step answers 500 twice": lambda hub: each("500", times=2, retry_after=0),
    "every step answers 429 twice": lambda hub: each("429", times=2, retry_after=0),
    "the connection breaks in every step once": lambda hub: each("reset"),
    "the connection breaks in every step twice": lambda hub: each("reset", times=2),
    "every answer is lost once": lambda hub: each("lost"),
    "every answer is lost twice": lambda hub: each("lost", UNKNOWING, times=2) + each("lost", ("commit",)),
    "every step stalls once": lambda hub: each("stall", seconds=4.0),
    "every step stalls twice": lambda hub: (
        each("stall", UNKNOWING, times=2, seconds=4.0) + each("stall", ("commit",), seconds=4.0)
    ),
    "a gateway answers with a page": lambda hub: each("502", ("validate-yaml", "commit"), times=2),
    "someone else commits first": lambda hub: competing(hub, 1),
    "someone else commits first, three times": lambda hub: competing(hub, 3),
    "the head is said to have moved": lambda hub: each("412", ("commit",), times=3),
    "the branch is said to be busy": lambda hub: each("409", ("commit",), times=3),
}

KINDS = ["500", "reset", *(pytest.param(kind, marks=pytest.mark.heavy) for kind in ("429", "lost"))]
AGAIN = ("every answer is lost once", "someone else commits first")


@pytest.fixture(scope="module")
def outcomes(masked: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Future[Outcome]]]:
    """Each scenario's outcome, on a few threads."""

    def run(name: str, folder: Path) -> Outcome:
        with Hub(folder / "hub") as hub:
            if name.startswith("someone"):
                hub.create("alice/data", files=FOREIGN)
            hub.faults += SCENARIOS[name](hub)
            arguments = (str(masked), "alice/data", "--tag", "v1", "--timeout", "3")
            done = push(hub, folder / "home", *arguments)
            struck = sum(c.name == "lfs-put" and c.status != 200 for c in hub.calls)
            uploaded, left = hub.uploaded(), [f for f in hub.faults if f.times]
            hub.forget()
            again = push(hub, folder / "home", *arguments) if name in AGAIN else None
            return Outcome(hub, done, again, uploaded, struck, left, hub.uploaded(), hub.count("commit"))

    with ThreadPoolExecutor(4) as pool:
        yield {name: pool.submit(run, name, tmp_path_factory.mktemp("scenario")) for name in SCENARIOS}


@pytest.mark.heavy
@pytest.mark.parametrize("name", SCENARIOS)
def test_one_commit_comes_of_it(name: str, outcomes: dict[str, Future[Outcome]], masked: Path) -> None:
    found = outcomes[name].result()
    assert found.done.returncode == 0, found.done.stderr
    assert not found.left, "a fault that never struck proves nothing"
    repo = found.hub.repo("alice/data")
    assert len(commits_of(found.hub, "alice/data")) == 1
    assert holds(found.hub, "alice/data", masked)
    assert repo.meta["tags"] == {"v1": repo.head()}
    if name.startswith("someone"):
        assert {path: repo.read(path) for path in FOREIGN} == FOREIGN
        assert {path for path in repo.files() if path.startswith("their-")} != set()
    sizes = [p.stat().st_size for p in masked.glob("epoch_*/*.parquet")]
    most_again = found.struck + 2 * ("stalls" in name)  # what stalls is answered too late, and counts as sent
    assert sum(sizes) <= found.uploaded <= sum(sizes) + most_again * max(sizes)
    if found.again:
        assert found.again.returncode == 0, found.again.stderr
        assert (found.again_uploaded, found.again_commits) == (0, 0)
        assert "already there" in found.again.stdout


@pytest.mark.parametrize("kind", KINDS)
def test_a_branch_and_the_card_that_is_there(kind: str, masked: Path, tmp_path: Path) -> None:
    """Making the one and fetching the other fail twice; the card's manifest is one of an earlier push."""
    card = b"---\npretty_name: Mine\n---\n# T\n\nWords of mine.\n"
    earlier = json.dumps({"schema": "masked/1", "files": [{"file": "epoch_004/train-00000-of-00001.parquet"}]}).encode()
    stale = {"epoch_004/train-00000-of-00001.parquet": put_rows(4), "manifest.json": earlier}
    with Hub(tmp_path / "hub") as hub:
        repo = hub.create("alice/data", files={**FOREIGN, **stale, "README.md": card})
        head = repo.head()
        hub.faults += each(kind, ("refs", "branch", "resolve"), times=2, retry_after=0)
        done = push(hub, tmp_path / "home", str(masked), "alice/data", "--branch", "work", "--tag", "v1")
        assert done.returncode == 0, done.stderr
        assert not [f for f in hub.faults if f.times]
        assert repo.head() == head
        ours, *before = repo.log("work")
        assert ours["title"].startswith("masked dataset")
        assert [c["id"] for c in before] == [c["id"] for c in repo.log()]
        files = repo.files("work")
        assert set(files) - set(stale) >= {*FOREIGN, *parquet_paths(masked)}
        assert "epoch_004/train-00000-of-00001.parquet" not in files
        assert b"Words of mine." in repo.read("README.md", "work")
        assert repo.meta["tags"] == {"v1": repo.head("work")}


@pytest.mark.parametrize("kind", KINDS)
def test_faults_over_xet(kind: str, masked: Path, tmp_path: Path) -> None:
    """What the other way of uploading calls, the keys to its store among it. Its own transport is no HTTP here."""
    steps = ("tree", "preupload", "xet-token", "commit", "resolve", "tag")
    with Hub(tmp_path / "hub") as hub:
        repo = hub.create("alice/data", files=FOREIGN)
        hub.faults += each(kind, steps, retry_after=0)
        done = push(hub, tmp_path / "home", str(masked), "alice/data", "--tag", "v1", xet=True)
        assert done.returncode == 0, done.stderr
        assert not [f for f in hub.faults if f.times]
        assert len(commits_of(hub, "alice/data")) == 1
        assert holds(hub, "alice/data", masked)
        assert repo.meta["tags"] == {"v1": repo.head()}
        assert {path: repo.read(path) for path in FOREIGN} == FOREIGN
        kept = hub.uploaded()
        hub.forget()
        again = push(hub, tmp_path / "home", str(masked), "alice/data", "--tag", "v1", xet=True)
        assert "already there" in again.stdout
        assert (hub.uploaded(), hub.count("commit")) == (kept, 0)


@pytest.mark.parametrize(
    ("call", "kind", "after"),
    [
        *[("lfs-put", "before", 2), ("commit", "lost", 0), ("tag", "before", 0), ("xet commit", "before", 0)],
        pytest.param("commit", "before", 0, marks=pytest.mark.heavy),
        pytest.param("xet-token", "before", 0, marks=pytest.mark.heavy),
        pytest.param("xet commit", "lost", 0, marks=pytest.mark.heavy),
    ],
)
def test_a_killed_push_goes_on(call: str, kind: str, after: int, masked: Path, tmp_path: Path) -> None:
    xet, call = call.startswith("xet"), call.removeprefix("xet ")
    with Hub(tmp_path / "hub") as hub:
        repo = hub.create("alice/data", files=FOREIGN)
        running: list[subprocess.Popen[str]] = []

        def kill() -> None:
            os.kill(running[0].pid, signal.SIGKILL)
            running[0].wait()

        hub.faults.append(Fault(call, kind, after=after, do=kill))
        arguments = ("push", *FAST, str(masked), "alice/data", "--tag", "v1")
        running.append(start(hub, tmp_path / "home", *arguments, xet=xet))
        running[0].communicate()
        assert running[0].returncode == -signal.SIGKILL
    with Hub(tmp_path / "hub") as hub_again:
        hub_again.calls += hub.calls
        kept = hub_again.xet.stored_bytes()
        done = push(hub_again, tmp_path / "home", str(masked), "alice/data", "--tag", "v1", xet=xet)
        assert done.returncode == 0, done.stderr
        assert len(commits_of(hub_again, "alice/data")) == 1
        assert holds(hub_again, "alice/data", masked)
        assert repo.meta["tags"] == {"v1": repo.head()}
        assert {path: repo.read(path) for path in FOREIGN} == FOREIGN
        if xet:
            assert hub_again.count("lfs-batch") == 0
            assert not kept or hub_again.xet.stored_bytes() == kept, "chunks that are there are not sent again"
            return
        sizes = sorted(p.stat().st_size for p in masked.glob("epoch_*/*.parquet"))
        in_flight = 5 if call == "lfs-put" else 0  # so many files the library sends at a time
        assert sum(sizes) <= hub_again.uploaded() <= sum(sizes) + sum(sizes[-in_flight:] if in_flight else [])


@pytest.mark.heavy
def test_what_never_gets_better_ends_with_what_is_kept(masked: Path, tmp_path: Path) -> None:
    """A bounded number of tries, then one line; the next push sends only what is missing."""
    with Hub(tmp_path / "hub") as hub:
        hub.faults.append(Fault("lfs-put", "500", times=99, after=3, retry_after=0))
        done = push(hub, tmp_path / "home", str(masked), "alice/data", "--retries", "0")
        lines = [line for line in done.stderr.splitlines() if not line.startswith("warning: ")]
        assert done.returncode == 2
        assert len(lines) == 1, done.stderr
        assert "500" in lines[0]
        assert "sends only the rest" in lines[0]
        assert commits_of(hub, "alice/data") == []
        stored = hub.count("lfs-put", 200)
        assert stored == 3
        hub.forget()
        done = push(hub, tmp_path / "home", str(masked), "alice/data")
        assert done.returncode == 0, done.stderr
        assert hub.count("lfs-put") == len(parquet_paths(masked)) - stored
        assert holds(hub, "alice/data", masked)


def test_a_hub_that_is_not_there_is_said(masked: Path, tmp_path: Path) -> None:
    with Hub(tmp_path / "hub") as hub:
        pass
    done = push(hub, tmp_path / "home", str(masked), "alice/data", "--retries", "1")
    assert done.returncode == 2
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: alice/data: the Hub at http://127.0.0.1")
    assert "cannot be reached" in last
    assert "Traceback" not in done.stderr
