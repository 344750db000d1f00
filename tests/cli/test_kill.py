"""Runs killed with SIGKILL at random moments: nothing half written has a final name, and the rest is made the same.

The runs are forked from a server process that has imported everything, so that a start costs a fraction of a second.
CI kills what else it does not: tests/faults has runs that are killed at exact calls.
"""

from __future__ import annotations

import json
import os
import random
import signal
import time
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import pytest

import entrodrop_prep
from entrodrop_prep.verification.run import verify
from helpers.runs import Start, being_written, check_final_names, finish, names, starter, tables
from helpers.scored import some_rows, write_scored

MODEL = Path(entrodrop_prep.__file__).parent / "demo" / "model"
KILLS, STORIES, LANDED = 10, 60, 2


@pytest.fixture(scope="module")
def start() -> Start:
    return starter()


def kill_after(process: ForkServerProcess, delay: float) -> None:
    process.join(delay)
    if process.is_alive():
        os.kill(process.pid, signal.SIGKILL)
    process.join()


def kill_while_writing(process: ForkServerProcess, out: Path, delay: float) -> None:
    """At the first moment after ``delay`` at which something stands under a temporary name."""
    process.join(delay)
    while process.is_alive() and not being_written(out):
        time.sleep(0.0005)
    if process.is_alive():
        os.kill(process.pid, signal.SIGKILL)
    process.join()


def check_kills(start: Start, kind: str, settings: dict[str, Any], folder: Path) -> None:
    """Stories of a run that is killed, continued and killed again, until it finishes, against one that never was."""
    rng = random.Random(kind)
    begun = time.monotonic()
    finish(start(kind, {**settings, "out": str(folder / "whole")}))
    usual = time.monotonic() - begun
    expected, manifest = tables(folder / "whole"), (folder / "whole" / "manifest.json").read_bytes()

    landed = {"fresh": 0, "continued": 0, "while writing": 0}
    between = 0
    for story in range(STORIES):
        if landed["fresh"] + landed["continued"] >= KILLS and min(landed.values()) >= 3 and between >= 3:
            break
        out, kills = folder / f"story-{story}", 0
        while True:
            done = len(list(out.rglob("*.parquet"))) / len(expected)
            process = start(kind, {**settings, "out": str(out)})
            if kills == 3:
                finish(process)
                break
            writing = rng.random() < 0.5
            delay = rng.uniform(0.0, usual * max(0.4, 1 - done))
            if writing:
                kill_while_writing(process, out, delay)
            else:
                kill_after(process, delay)
            if (out / "manifest.json").exists():
                assert process.exitcode in (0, -signal.SIGKILL)
                break
            assert process.exitcode == -signal.SIGKILL
            shards = check_final_names(out)
            between += 0 < shards < len(expected)
            landed["continued" if kills else "fresh"] += 1
            landed["while writing"] += writing and being_written(out)
            kills += 1
        finish(start(kind, {**settings, "out": str(out)}))
        assert (out / "manifest.json").read_bytes() == manifest
        assert tables(out) == expected
        assert not being_written(out)
    assert landed["fresh"] + landed["continued"] >= KILLS, landed
    assert min(landed.values()) >= 3, landed
    assert between >= 3
    assert not verify(str(folder / "whole")).findings


@pytest.mark.heavy
def test_killed_scoring_goes_on(start: Any, tmp_path: Path) -> None:
    text = Path(json.__file__).read_text()
    rows = [{"text": text[97 * i : 97 * i + 150 + 40 * (i % 7)], "name": f"row {i}"} for i in range(45)]
    rows[17]["text"] = ""
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {"source": str(tmp_path / "rows.jsonl"), "model": str(MODEL), "rows_per_shard": 3, "id_column": "name"}
    settings |= {"max_length": 64, "overlap": 4, "device": "cpu"}
    check_kills(start, "score", settings, tmp_path)


@pytest.mark.heavy
@pytest.mark.parametrize("shuffle", ["epoch", "none"])
def test_killed_materializing_goes_on(shuffle: str, start: Any, tmp_path: Path) -> None:
    scored = write_scored(tmp_path / "scored", some_rows(400, lengths=(2, 60)), rows_per_shard=50)
    settings = {"scored": str(scored), "epochs": 4, "rows_per_shard": 60, "shuffle": shuffle, "target": "both"}
    check_kills(start, "materialize", settings, tmp_path)
    assert not verify(str(tmp_path / "whole"), str(scored)).findings


def test_killed_extension_goes_on(start: Any, tmp_path: Path) -> None:
    """More epochs for a finished directory: killed on the way, it is unfinished, and then as if made in one go."""
    scored = write_scored(tmp_path / "scored", some_rows(400, lengths=(2, 60)), rows_per_shard=50)
    settings = {"scored": str(scored), "horizon": 6, "rows_per_shard": 60, "progress": "row"}
    finish(start("materialize", {**settings, "epochs": 6, "out": str(tmp_path / "whole")}))
    rng, landed = random.Random(6), 0
    whole = len(tables(tmp_path / "whole"))
    for story in range(STORIES):
        if landed == LANDED:
            break
        out = tmp_path / f"story-{story}"
        finish(start("materialize", {**settings, "epochs": 2, "out": str(out)}))
        process, enough = start("materialize", {**settings, "epochs": 6, "out": str(out)}), rng.randrange(17, whole - 4)
        while process.is_alive() and sum(name.startswith("train-") for name in names(out)) < enough:
            time.sleep(0.0005)
        kill_after(process, rng.uniform(0, 0.005))
        check_final_names(out)
        landed += not (out / "manifest.json").exists()
        finish(start("materialize", {**settings, "epochs": 6, "out": str(out)}))
        assert tables(out) == tables(tmp_path / "whole")
        assert (out / "manifest.json").read_bytes() == (tmp_path / "whole" / "manifest.json").read_bytes()
    assert landed == LANDED


def test_killed_overwrite_goes_on(start: Any, tmp_path: Path) -> None:
    """A run that threw away an earlier one and was killed can be run again, whatever it had come to."""
    scored = write_scored(tmp_path / "scored", some_rows(200, lengths=(2, 60)), rows_per_shard=50)
    settings = {"scored": str(scored), "epochs": 3, "rows_per_shard": 40}
    finish(start("materialize", {**settings, "seed": 2, "out": str(tmp_path / "whole")}))
    rng = random.Random(3)
    for story in range(LANDED):
        out = tmp_path / f"story-{story}"
        finish(start("materialize", {**settings, "out": str(out)}))
        process = start("materialize", {**settings, "seed": 2, "overwrite": True, "out": str(out)})
        while process.is_alive() and (out / "manifest.json").exists():
            time.sleep(0.0005)
        kill_after(process, rng.uniform(0, 0.1))
        finish(start("materialize", {**settings, "seed": 2, "overwrite": story % 2 == 0, "out": str(out)}))
        assert tables(out) == tables(tmp_path / "whole")
        assert (out / "manifest.json").read_bytes() == (tmp_path / "whole" / "manifest.json").read_bytes()
