"""Pushing to the tests' Hub with the real command in processes of its own."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from entrodrop_prep import MaterializeConfig, materialize
from helpers import hub_calls
from helpers.hub import WRITER, Hub
from helpers.scored import some_rows, write_scored
from helpers.warm import CLIENT

ROOT = Path(__file__).resolve().parents[2]
FAST = ("--retry-seconds", "0.05", "--timeout", "20")
LOAD = """
import json, sys
from datasets import load_dataset
repo, config, streaming = sys.argv[1:4]
rows = load_dataset(repo, config, split="train", streaming=streaming == "yes")
json.dump([dict(row) for row in rows], sys.stdout)
"""


def masked_directory(folder: Path, *, rows: int = 60, epochs: int = 4, rows_per_shard: int = 40, **recipe: Any) -> Path:
    """A masked directory, and beside it the scored one that it was made from."""
    scored = write_scored(folder / "scored", some_rows(rows), rows_per_shard=20)
    out = folder / "masked"
    config = {"epochs": epochs, "rows_per_shard": rows_per_shard, **recipe}
    materialize(MaterializeConfig(scored=str(scored), out=str(out), **config))
    return out


def start(
    hub: Hub,
    home: Path,
    *arguments: str,
    xet: bool = False,
    token: str | None = WRITER,
    popen: Any = None,
    **more: Any,
) -> Any:
    """``entrodrop`` with these arguments, started; ``popen`` is that of ``CLIENT`` by default."""
    environment = hub.environment(home, token, xet=xet)
    environment["PYTHONPATH"] = str(ROOT)
    if popen:
        del environment["HF_HUB_DISABLE_PROGRESS_BARS"]
    return (popen or CLIENT.popen)(
        [sys.executable, "-m", "entrodrop_prep", *arguments],
        **{"env": environment, "text": True, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **more},
    )


def push(hub: Hub, home: Path, *arguments: str, stdin: str | None = None, **more: Any) -> Any:
    """``entrodrop push``, run to its end: exit code, stdout, stderr."""
    process = start(hub, home, "push", *FAST, *arguments, stdin=subprocess.PIPE, **more)
    out, err = process.communicate(stdin)
    return subprocess.CompletedProcess(arguments, process.returncode, out, err)


def loaded(hub: Hub, home: Path, repo: str, config: str, *, streaming: bool) -> list[dict[str, Any]]:
    """What ``datasets`` loads from the Hub, in a process of its own with an empty cache."""
    import json

    environment = hub.environment(home)
    command = [sys.executable, "-c", LOAD, repo, config, "yes" if streaming else "no"]
    done = CLIENT.run(command, env=environment, capture_output=True, text=True, check=True)
    return list(json.loads(done.stdout))


def local_rows(folder: Path) -> list[dict[str, Any]]:
    """The rows of one configuration as its files hold them."""
    return [row for path in sorted(folder.glob("*.parquet")) for row in pq.read_table(path).to_pylist()]


def parquet_paths(directory: Path, pattern: str = "epoch_*/*.parquet") -> set[str]:
    return {path.relative_to(directory).as_posix() for path in directory.glob(pattern)}


def commits_of(hub: Hub, repo: str) -> list[str]:
    """Titles of the commits of ours, newest first."""
    return [c["title"] for c in hub.repo(repo).log() if c["title"].startswith(("masked dataset", "scored dataset"))]


def holds(hub: Hub, repo: str, directory: Path) -> bool:
    """Whether the repository holds every file of a directory's manifest, byte for byte, and no other epoch file."""
    import json

    files = hub.repo(repo).files()
    listed = json.loads((directory / "manifest.json").read_bytes())["files"]
    wanted = {entry["file"]: entry["sha256"] for entry in listed if entry["file"].endswith(".parquet")}
    there = {path: entry["lfs"] for path, entry in files.items() if path.startswith("epoch_")}
    return there == wanted and hub.repo(repo).read("manifest.json") == (directory / "manifest.json").read_bytes()


def put_rows(value: int) -> bytes:
    """A small Parquet file of someone else's."""
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"x": np.full(3, value)}), sink)
    return bytes(sink.getvalue())


def written(*folders: Path) -> dict[str, bytes]:
    """Every file below some folders, hidden ones included."""
    return {os.fspath(path): path.read_bytes() for folder in folders for path in folder.rglob("*") if path.is_file()}


def fails(done: Any, *words: str) -> None:
    """It exits with 2 and one line that says these words."""
    lines = [line for line in done.stderr.splitlines() if not line.startswith("warning: ")]
    assert done.returncode == 2, done.stderr
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("error: ")
    for word in words:
        assert word in lines[0], lines[0]


def front_of(card: bytes) -> dict[str, Any]:
    return dict(yaml.safe_load(card.decode().split("---\n")[1]))


def changed(patch: pytest.MonkeyPatch, call: str, change: Callable[[Any], None]) -> None:
    """Every Hub of the test changes the body of its answers to a call so."""

    def answer(run: Callable[..., Any], *asked: Any) -> Any:
        answered = run(*asked)
        change(answered.body)
        return answered

    routes = [(*r[:3], functools.partial(answer, r[3]) if r[2] == call else r[3]) for r in hub_calls.ROUTES]
    patch.setattr(hub_calls, "ROUTES", routes)
