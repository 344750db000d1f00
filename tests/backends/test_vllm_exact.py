"""Scores of the vLLM backend: each is what the closed form says, also where a run was killed and went on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from entrodrop_prep.store.manifest import read
from entrodrop_prep.store.schema import SCORED
from entrodrop_prep.store.shards import read_footer
from entrodrop_prep.terminal.preemption import EXIT_CODE
from entrodrop_prep.verification.run import verify
from helpers.closed_form import check, shifted
from helpers.models import Markov, random_rows, rows_of, run_score, shards, write_rows
from helpers.scored import copy
from helpers.vllm import VLLM, all_gone, engines, environment, until

pytestmark = [pytest.mark.vllm, pytest.mark.usefixtures("quick")]

STEP, ROWS_PER_SHARD = 16, 8
REPEATED = 30


@pytest.fixture(scope="module")
def rows(closed_form: Markov) -> list[list[int]]:
    """Of 2 tokens, of the full context, of every kind between; one over and over, and starts of it."""
    vocabulary = len(closed_form.entropy)
    whole = np.random.default_rng(1).integers(3, vocabulary, 256).tolist()
    same = whole[:100]
    return [
        *([5, 9], [9, 5], whole, whole),
        *random_rows(110, vocabulary, longest=256, seed=3),
        *[same] * REPEATED,
        *(same[:n] for n in (2, 15, 16, 17, 64, 99)),
    ]


@pytest.fixture(scope="module")
def source(rows: list[list[int]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    return write_rows(path, [{"input_ids": ids} for ids in rows])


WINDOWS = {"max_length": 200, "overlap": 16}
SETTINGS: dict[str, Any] = {"backend": "vllm", "batch_tokens": STEP, "rows_per_shard": ROWS_PER_SHARD, **WINDOWS}
OPTIONS = (
    *("--dtype", "float32", "--batch-tokens", str(STEP), "--rows-per-shard", str(ROWS_PER_SHARD)),
    *("--max-length", "200", "--overlap", "16"),
)


def command(source: Path, model: Path, out: Path, *more: str) -> list[str]:
    start = [sys.executable, "-m", "entrodrop_prep", "score", str(source), "--model", str(model), "--out", str(out)]
    return [*start, "--backend", "vllm", *more]


@pytest.fixture(scope="module")
def killed(closed_form: Markov, source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a run left that was killed. It has no engine any more: an engine's working directory is that of its run."""
    out = tmp_path_factory.mktemp("killed") / "out"
    process = VLLM.popen(
        command(source, closed_form.directory, out, *OPTIONS),
        cwd=out.parent,
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    assert process.stderr is not None
    assert until(lambda: len(shards(out)) >= 3 or process.poll() is not None)
    both = working_in(out.parent)
    assert process.poll() is None, process.stderr.read()
    assert {process.pid} < {one.pid for one in both}
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert all_gone(both, 5)
    assert process.stderr.read() == b""
    return out


def working_in(folder: Path) -> list[psutil.Process]:
    """Processes by their working directory."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.cwd() == str(folder):
                found.append(process)
    return found


@pytest.fixture(scope="module")
def scored(closed_form: Markov, source: Path, killed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All rows, by engine steps of far fewer tokens than a row has; the run was killed and continued."""
    out = copy(killed, tmp_path_factory.mktemp("scored") / "out")
    run_score(source, closed_form.directory, out, **SETTINGS, self_check=False)
    assert not engines()
    return out


def self_checks(out: Path) -> list[str]:
    return [read_footer(path).info["environment"]["self_check"] for path in shards(out)]


def test_the_model_is_sharp_enough_to_show_a_shift(closed_form: Markov) -> None:
    assert np.median(np.diff(np.sort(closed_form.entropy[3:]))) > 1e-3


def test_each_score_is_that_of_the_closed_form(closed_form: Markov, rows: list[list[int]], scored: Path) -> None:
    check(rows_of(scored), rows, closed_form, **WINDOWS)
    environment = read_footer(shards(scored)[0]).info["environment"]
    assert environment["backend"] == "vllm"
    assert environment["device"] == "cpu"
    assert environment["reduction"] == "torch"


@pytest.mark.parametrize("name", ["entropy", "logprob"])
@pytest.mark.parametrize("by", [1, -1])
def test_a_shift_by_one_would_fail(
    closed_form: Markov, rows: list[list[int]], scored: Path, name: str, by: int
) -> None:
    with pytest.raises(AssertionError):
        check([{**row, name: shifted(row[name], by)} for row in rows_of(scored)], rows, closed_form, **WINDOWS)


def test_rows_that_a_prefix_cache_would_serve_are_scored_whole(rows: list[list[int]], scored: Path) -> None:
    same = rows[-7]
    found = [row for row in rows_of(scored) if row["input_ids"] == same]
    assert len(found) == REPEATED
    assert np.ptp([row["entropy"][1:] for row in found], axis=0).max() < 1e-4


def test_it_is_the_dataset_that_transformers_makes(
    closed_form: Markov, rows: list[list[int]], source: Path, scored: Path, tmp_path: Path
) -> None:
    run_score(source, closed_form.directory, tmp_path / "out", **{**SETTINGS, "backend": "transformers"})
    one, other = (read(out, SCORED) for out in (scored, tmp_path / "out"))
    assert one["identity"] == other["identity"]
    assert one["counts"] == other["counts"]
    check_as_one_run(tmp_path / "out", scored, rows, closed_form)
    assert not verify(str(scored)).findings


def test_a_finished_directory_starts_no_engine(closed_form: Markov, source: Path, scored: Path) -> None:
    before = {p.name: p.stat().st_mtime_ns for p in scored.iterdir()}
    # with this option no engine would start
    summary = run_score(source, closed_form.directory, scored, **SETTINGS, engine_arg=("no_such_option=1",))
    assert summary.already_complete
    assert {p.name: p.stat().st_mtime_ns for p in scored.iterdir()} == before


def test_a_prefix_cache_is_refused(closed_form: Markov, source: Path, tmp_path: Path) -> None:
    refused = command(source, closed_form.directory, tmp_path / "out", "--engine-arg", "enable_prefix_caching=true")
    done = VLLM.run(refused, env=environment(), capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: --engine-arg enable_prefix_caching")
    assert "a token found in the cache is never scored" in done.stderr
    assert not shards(tmp_path / "out")


def test_a_killed_run_goes_on(killed: Path, scored: Path) -> None:
    finished, every = len(shards(killed)), len(shards(scored))
    assert 3 <= finished < every
    assert not (killed / "manifest.json").exists()
    assert self_checks(scored) == ["passed"] * finished + ["off"] * (every - finished)
    assert [p.read_bytes() for p in shards(scored)[:finished]] == [p.read_bytes() for p in shards(killed)]


@pytest.mark.heavy
def test_workers_that_come_and_go_make_one_runs_rows(
    closed_form: Markov, rows: list[list[int]], source: Path, scored: Path, tmp_path: Path
) -> None:
    """Three workers, of which one is killed, one is asked to end and one comes late; then two. Each has an engine."""
    out = tmp_path / "out"

    def begin(worker: str) -> subprocess.Popen[bytes]:
        given = command(source, closed_form.directory, out, *OPTIONS, "--worker", worker)
        return subprocess.Popen(given, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    killed, asked = begin("0/3"), begin("1/3")
    assert until(lambda: len(shards(out)) >= 2)
    killed.kill()
    killed.wait()
    late = begin("2/3")
    assert until(lambda: len(shards(out)) >= 4)
    asked.terminate()
    assert asked.wait() == EXIT_CODE
    assert not (out / "manifest.json").exists()
    assert [process.wait() for process in (late, begin("0/2"), begin("1/2"))] == [0, 0, 0]
    check_as_one_run(out, scored, rows, closed_form)
    assert not engines()


def check_as_one_run(out: Path, scored: Path, rows: list[list[int]], closed_form: Markov) -> None:
    """The rows, ids and masks are those of ``scored``, the scores nearly so, and the closed form's."""
    found, whole = rows_of(out), rows_of(scored)
    for name in ("row_id", "window", "input_ids", "loss_mask"):
        assert [row[name] for row in found] == [row[name] for row in whole]
    check(found, rows, closed_form, **WINDOWS)
    for name in ("entropy", "logprob"):
        columns = [[np.array(row[name], float) for row in each] for each in (found, whole)]  # a null is not a number
        differences = [(a - b)[~np.isnan(b)] for a, b in zip(*columns, strict=True)]
        assert np.abs(np.concatenate(differences)).max() < 1e-4
