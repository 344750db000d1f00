"""Several vLLM engines, some of which are killed; engines that do not start, or that end at their first step."""

from __future__ import annotations

import logging
import signal
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from entrodrop_prep.backends.batch import Batch
from entrodrop_prep.backends.engines import Engine, device_sets
from entrodrop_prep.backends.model import inspect_model
from entrodrop_prep.backends.prefetch import score_all
from entrodrop_prep.backends.vllm import VllmBackend
from entrodrop_prep.errors import ConfigError, ScoreError
from entrodrop_prep.store.shards import read_footer
from helpers.closed_form import check
from helpers.models import Markov, markov_model, random_rows, rows_of, run_score, settings_for, shards, write_rows
from helpers.vllm import engines, until

pytestmark = [pytest.mark.vllm, pytest.mark.usefixtures("quick")]

SETTINGS: dict[str, Any] = {"backend": "vllm", "batch_tokens": 16, "rows_per_shard": 5}
SHARDS, LATER = 32, 4


@pytest.fixture(scope="module")
def rows(closed_form: Markov) -> list[list[int]]:
    return random_rows(SHARDS * 5, len(closed_form.entropy), longest=256, seed=8)


@pytest.fixture(scope="module")
def source(rows: list[list[int]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rows") / "rows.parquet"
    return write_rows(path, [{"input_ids": ids} for ids in rows])


def test_engines_are_killed_one_after_the_other(
    closed_form: Markov, rows: list[list[int]], source: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The second continues what the first had; without any the run ends, and with another one it resumes."""
    out, running = tmp_path / "out", list[int]()

    def kill_both() -> None:
        for _ in range(2):
            enough = len(shards(out)) + LATER
            until(lambda enough=enough: len(shards(out)) >= enough)  # type: ignore[misc]
            left = engines()
            running.append(len(left))
            left[0].kill()

    killer = threading.Thread(target=kill_both)
    killer.start()
    with (
        caplog.at_level(logging.WARNING, logger="entrodrop_prep"),
        pytest.raises(ScoreError, match="every vLLM engine has ended: signal 9") as e,
    ):
        run_score(source, closed_form.directory, out, **SETTINGS, replicas="2")
    killer.join()
    assert running == [2, 1]
    assert [r.getMessage() for r in caplog.records if "engine" in r.getMessage()] == [
        "a vLLM engine ended (signal 9); left: 1",
        "a vLLM engine ended (signal 9); left: 0",
    ]
    assert "finished shards are kept: run the same command again" in str(e.value)
    assert not engines()
    kept = {path.name: path.read_bytes() for path in shards(out)}
    assert 2 * LATER <= len(kept) < SHARDS
    assert not (out / "manifest.json").exists()

    summary = run_score(source, closed_form.directory, out, **SETTINGS)  # one engine: how many is not part of a run
    assert summary.scored_tokens == sum(len(r) for i, r in enumerate(rows) if f"shard-{i // 5:05d}.parquet" not in kept)
    assert len(shards(out)) == SHARDS
    assert {path.name: path.read_bytes() for path in shards(out) if path.name in kept} == kept
    assert len({str(read_footer(path).info["environment"]) for path in shards(out)}) == 1
    check(rows_of(out), rows, closed_form)


def test_one_shard_is_shared_one_engine_does_not_start_and_one_hangs(
    closed_form: Markov,
    rows: list[list[int]],
    source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    given: dict[str, int] = {}
    give = Engine.give

    def noted(engine: Engine, batch: Batch) -> None:
        give(engine, batch)
        if batch.job.index >= 0:
            given[engine.name] = given.get(engine.name, 0) + 1
            if engine.name == "engine 1" and given[engine.name] == 20:
                engine.process.send_signal(signal.SIGSTOP)

    def kill_the_third() -> None:
        started: list[Any] = []

        def all_three() -> bool:
            started[:] = engines()
            return len(started) == 3

        if until(all_three):
            started[2].kill()

    monkeypatch.setattr(Engine, "give", noted)
    killer = threading.Thread(target=kill_the_third)
    killer.start()
    with caplog.at_level(logging.WARNING, logger="entrodrop_prep"):
        run_score(
            source,
            closed_form.directory,
            tmp_path / "out",
            **{**SETTINGS, "rows_per_shard": len(rows)},
            replicas="3",
            engine_timeout=10.0,
        )
    killer.join()
    assert [r.getMessage() for r in caplog.records if "engine" in r.getMessage()] == [
        "continuing without engine 2: vLLM's engine does not start: signal 9",
        "a vLLM engine ended (it finished no step in 10 s); left: 1",
    ]
    assert given.keys() == {"engine 0", "engine 1"}
    assert given["engine 0"] >= 20
    check(rows_of(tmp_path / "out"), rows, closed_form)
    assert not engines()


def start(model: Path, **settings: Any) -> VllmBackend:
    config = settings_for("-", model, Path("-"), **{"backend": "vllm", **settings})
    return VllmBackend(config, inspect_model(config))


def first_score(model: Path) -> None:
    backend = start(model)
    try:
        score_all(backend, [np.array([3, 4, 5], np.int32)])
    finally:
        backend.close()


@pytest.fixture(scope="module")
def failures(tmp_path_factory: pytest.TempPathFactory) -> dict[str, BaseException | None]:
    """What each engine that cannot work ends with; all at the same time."""
    home = tmp_path_factory.mktemp("models")
    ordinary = markov_model(home / "ordinary", vocabulary=128).directory
    long = markov_model(home / "long", vocabulary=128, context=1 << 20).directory
    odd = markov_model(home / "odd", vocabulary=40).directory
    inspect_model(settings_for("-", odd, Path("-")))  # what it imports cannot be imported by several threads at once
    with ThreadPoolExecutor() as pool:
        runs: dict[str, Future[Any]] = {
            "unknown option": pool.submit(start, ordinary, engine_arg=("no_such_option=1",)),
            "little cache": pool.submit(start, long, max_length=1 << 20),
            "head size": pool.submit(first_score, odd),
        }
        return {name: run.exception() for name, run in runs.items()}


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("unknown option", ("does not start", "no_such_option", "check --engine-arg")),
        ("little cache", ("does not start", "KV cache", "lower --max-length", "VLLM_CPU_KVCACHE_SPACE")),
        ("head size", ("every vLLM engine has ended: exit code 1", "head_dim=10", "--backend transformers")),
    ],
)
def test_an_engine_that_cannot_work_says_why(
    failures: dict[str, BaseException | None], name: str, says: tuple[str, ...]
) -> None:
    text = str(failures[name])
    assert "\n" not in text
    assert len(text) < 700
    for part in says:
        assert part in text
    assert not engines()


@pytest.mark.parametrize(
    ("option", "says"),
    [
        ("max_num_batched_tokens=-1", "a whole number of at least 1"),
        ("tensor_parallel_size=two", "a whole number of at least 1"),
        ("max-num-batched-tokens=8k", "a whole number of at least 1"),
        ("pipeline_parallel_size=2", "use tensor_parallel_size"),
        ("data-parallel-size=2", "use --replicas"),
        ("enable_lora=true", "merge the adapter"),
        ("load_format=dummy", "gives random weights"),
        ("load_format=pt", "may load pickles"),
        ("load_format=auto", "may load pickles"),
        ("kv_cache_memory_bytes=1000000000", "set VLLM_CPU_KVCACHE_SPACE"),
    ],
)
def test_an_option_that_makes_no_sense_starts_nothing(closed_form: Markov, option: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        start(closed_form.directory, engine_arg=(option,))
    assert not engines()


@pytest.mark.parametrize(
    ("visible", "replicas", "group", "expected"),
    [
        ("0,1,2,3", "auto", 1, ["0", "1", "2", "3"]),
        ("0,1,2,3", "auto", 2, ["0,1", "2,3"]),
        ("0, 1,2", "auto", 2, ["0,1"]),
        ("2,3", "1", 1, ["2"]),
        ("0,1,", "auto", 1, ["0", "1"]),
        ("3,-1,2", "auto", 1, ["3"]),
        ("GPU-8932f937-d72c,MIG-3eb87630", "auto", 1, ["GPU-8932f937-d72c", "MIG-3eb87630"]),
    ],
)
def test_each_engine_has_its_gpus(
    visible: str, replicas: str, group: int, expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert list(device_sets(replicas, group, cpu=False)) == expected


@pytest.mark.parametrize(("visible", "replicas", "group"), [("0", "2", 1), ("0,1", "2", 2), ("", "auto", 1)])
def test_more_engines_than_gpus(visible: str, replicas: str, group: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    with pytest.raises(ConfigError, match="do not fit on"):
        device_sets(replicas, group, cpu=False)
