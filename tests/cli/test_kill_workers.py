"""Workers that are killed or asked to end at random moments, and others in their places: the result is one run's."""

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
from entrodrop_prep.terminal.preemption import EXIT_CODE
from helpers.runs import Start, being_written, finish, starter, tables
from helpers.scored import some_rows, write_scored

MODEL = Path(entrodrop_prep.__file__).parent / "demo" / "model"
ROUNDS = 20
SIGNALS = (signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGUSR1)

pytestmark = pytest.mark.heavy


def score_settings(folder: Path) -> dict[str, Any]:
    text = Path(json.__file__).read_text()
    rows = [{"text": text[97 * i : 97 * i + 150 + 40 * (i % 7)], "name": f"row {i}"} for i in range(150)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        **{"source": str(folder / "rows.jsonl"), "model": str(MODEL), "rows_per_shard": 4, "id_column": "name"},
        **{"max_length": 64, "overlap": 4, "device": "cpu"},
    }


def materialize_settings(folder: Path) -> dict[str, Any]:
    for seed, name in enumerate(("code", "text")):
        write_scored(folder / name, some_rows(400, lengths=(2, 60), seed=seed), rows_per_shard=50)
    return {
        **{"scored": [f"code={folder / 'code'}:2", f"text={folder / 'text'}:0.5"], "pack": 64, "epochs": 4},
        **{"rows_per_shard": 15, "target": "both", "jobs": "1"},
    }


@pytest.fixture(scope="module")
def start() -> Start:
    return starter()


@pytest.mark.parametrize("kind", ["score", "materialize"])
def test_workers_killed_at_random(kind: str, start: Start, tmp_path: Path) -> None:
    rng = random.Random(kind)
    settings = score_settings(tmp_path) if kind == "score" else materialize_settings(tmp_path)
    begun = time.monotonic()
    finish(start(kind, {**settings, "out": str(tmp_path / "one" / "out")}))
    usual = time.monotonic() - begun
    expected = tables(tmp_path / "one" / "out")
    manifest = (tmp_path / "one" / "out" / "manifest.json").read_bytes()
    struck = dict.fromkeys(SIGNALS, 0)
    alone = 0

    def worker(out: Path) -> ForkServerProcess:
        count = rng.randrange(1, 5)
        return start(kind, {**settings, "out": str(out), "worker": f"{rng.randrange(count)}/{count}"})

    for number in range(ROUNDS):
        out = tmp_path / str(number) / "out"
        living = [worker(out) for _ in range(rng.randrange(1, 4))]
        for _ in range(rng.randrange(2, 6)):
            time.sleep(rng.uniform(0, usual / 2))
            victim = living.pop(rng.randrange(len(living)))
            sent = rng.choice(SIGNALS)
            if victim.is_alive():
                os.kill(victim.pid or 0, sent)
            victim.join()
            # A process that has not come to handle signals ends by them.
            assert victim.exitcode in (0, EXIT_CODE, -sent)
            struck[sent] += victim.exitcode != 0
            alone += not living
            if not living or rng.random() < 0.7:
                living.append(worker(out))
        finish(*living)
        assert tables(out) == expected
        assert (out / "manifest.json").read_bytes() == manifest
        if being_written(out):  # the last one to leave was killed while it cleaned up
            finish(start(kind, {**settings, "out": str(out), "worker": "0/1"}))
        assert not being_written(out)
    print(f"{kind}: {struck}, nobody left {alone} times, {usual:.1f} s alone")
    assert min(struck.values()) >= 3, struck
    assert alone >= 3
