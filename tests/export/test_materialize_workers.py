"""Several processes write one masked directory, whatever becomes of any of them."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from entrodrop_prep.config import MaterializeConfig
from entrodrop_prep.errors import ConfigError, DiskSpaceError, MismatchError, OutputError
from entrodrop_prep.export import derived
from entrodrop_prep.export import materialize as module
from entrodrop_prep.export.materialize import materialize
from entrodrop_prep.store.disk import WORKERS
from entrodrop_prep.store.locks import reading_lock
from entrodrop_prep.store.workers import joined
from entrodrop_prep.terminal.preemption import EXIT_CODE
from entrodrop_prep.verification.run import verify
from helpers.runs import Start, being_written, finish, names, starter
from helpers.scored import all_bytes, some_rows, write_scored


@pytest.fixture(scope="module")
def start() -> Start:
    return starter()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four scored directories, never written to."""
    folder = tmp_path_factory.mktemp("place")
    for seed, name in enumerate(("code", "text", "old", "held")):
        write_scored(folder / name, some_rows(300 - 90 * seed, lengths=(2, 60), seed=seed), rows_per_shard=50)
    return folder


def mixture(place: Path, **more: Any) -> dict[str, Any]:
    return {
        **{"scored": [f"code={place / 'code'}:2", f"text={place / 'text'}:0.5"], "plain": [f"old={place / 'old'}:1.5"]},
        **{"eval": str(place / "held"), "epochs": 4, "rows_per_shard": 40, "target": "both", "progress": "row"},
        **more,
    }


def written(directory: Path) -> dict[str, bytes]:
    """Bytes of everything but notes and the lock; the card has the directory's name."""
    return {name: data for name, data in all_bytes(directory).items() if not name.startswith(".")}


def until_there_are(count: int, out: Path) -> None:
    end = time.monotonic() + 120
    while sum(name.startswith("train-") for name in names(out)) < count:
        assert time.monotonic() < end
        time.sleep(0.005)


SETTINGS: dict[str, dict[str, Any]] = {
    "mixture": {},
    "packed mixture": {"pack": 64, "rows_per_shard": 15, "add_columns": ("position_ids",), "jobs": "1"},
    "layouts": {"layout": ("concatenated", "jsonl"), "plain_config": True, "eval": None},
}


@pytest.mark.parametrize("kind", SETTINGS)
def test_workers_that_come_and_go(kind: str, start: Start, place: Path, tmp_path: Path) -> None:
    """Three workers, of which one is killed, one is asked to end and one comes late; then two."""
    whole, out = mixture(place, **SETTINGS[kind]), tmp_path / "many" / "masked"
    finish(start("materialize", {**whole, "out": str(tmp_path / "one" / "masked")}))
    total = len(list((tmp_path / "one" / "masked").glob("epoch_*/*.parquet")))
    assert total >= 20
    given = {**whole, "out": str(out)}
    killed, asked = (start("materialize", {**given, "worker": f"{i}/3"}) for i in range(2))
    until_there_are(3, out)
    killed.kill()
    killed.join()
    os.kill(asked.pid or 0, signal.SIGTERM)
    late = start("materialize", {**given, "worker": "2/3"})
    asked.join()
    assert killed.exitcode == -signal.SIGKILL
    assert asked.exitcode in (EXIT_CODE, -signal.SIGTERM)  # the latter if it had not come to handle signals
    finish(late, *(start("materialize", {**given, "worker": f"{i}/2"}) for i in range(2)))
    assert written(out) == written(tmp_path / "one" / "masked")
    assert not being_written(out)
    assert not verify(str(out)).findings


def test_a_worker_and_a_run_by_itself_continue_each_other(start: Start, place: Path, tmp_path: Path) -> None:
    whole = mixture(place)
    finish(start("materialize", {**whole, "out": str(tmp_path / "one" / "masked")}))
    for first, then in ((None, "1/2"), ("1/3", None)):
        out = tmp_path / str(then) / "masked"
        begun = start("materialize", {**whole, "out": str(out), "worker": first})
        until_there_are(5, out)
        begun.kill()
        begun.join()
        finish(start("materialize", {**whole, "out": str(out), "worker": then}))
        assert written(out) == written(tmp_path / "one" / "masked")
        assert not being_written(out)


def run(place: Path, out: Path, **more: Any) -> module.MaterializeSummary:
    given = {"scored": str(place / "code"), "horizon": 6, "epochs": 2, "rows_per_shard": 60, **more}
    return materialize(MaterializeConfig(**given, out=str(out)))


def test_workers_extend_a_finished_directory(place: Path, tmp_path: Path) -> None:
    """The scored rows that the first one read for all are gone in the end."""
    run(place, tmp_path / "one" / "masked", epochs=4)
    run(place, tmp_path / "many" / "masked", worker="0/2")
    assert run(place, tmp_path / "many" / "masked", worker="1/2").already_complete
    assert not run(place, tmp_path / "many" / "masked", epochs=4, worker="1/2").already_complete
    assert written(tmp_path / "many" / "masked") == written(tmp_path / "one" / "masked")
    assert not being_written(tmp_path / "many" / "masked")


def test_what_one_worker_read_the_others_use(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "many" / "masked"
    with joined(out, derived.CONTENTS, 60) as first:
        job = module.open_job(MaterializeConfig(scored=str(place / "code"), epochs=2, out=str(out), worker="0/2"))
        with first.setting_up() as alone:
            assert isinstance(module._set_up(job, out, alone, first), module._Task)
        monkeypatch.setattr("entrodrop_prep.masking.epoch_rows.write", lambda *a, **k: pytest.fail("read again"))
        other = module.open_job(MaterializeConfig(scored=str(place / "code"), epochs=2, out=str(out), worker="1/2"))
        with joined(out, derived.CONTENTS, 60) as second, second.setting_up() as alone:
            assert not alone
            assert isinstance(module._set_up(other, out, alone, second), module._Task)
        for more in ({"epochs": 3, "horizon": 2}, {"layout": ("jsonl",)}):
            config = MaterializeConfig(
                **{"scored": str(place / "code"), "epochs": 2, "out": str(out), "worker": "1/2", **more}
            )
            with (
                joined(out, derived.CONTENTS, 60) as third,
                third.setting_up() as alone,
                pytest.raises(
                    MismatchError, match=r"the other workers do not write (epoch 2|--layout jsonl); give all"
                ),
            ):
                module._set_up(module.open_job(config), out, alone, third)
        with pytest.raises(OutputError, match="masked: workers are writing here"):
            run(place, out)


def test_a_finished_directory_that_others_read_is_not_changed(place: Path, tmp_path: Path) -> None:
    run(place, tmp_path / "many" / "masked")
    with reading_lock(tmp_path / "many" / "masked"):
        assert run(place, tmp_path / "many" / "masked", worker="0/2").already_complete
        for more in ({"epochs": 3}, {"layout": ("jsonl",)}):
            with pytest.raises(OutputError, match="other runs are reading or writing here; wait for them"):
                run(place, tmp_path / "many" / "masked", worker="0/2", **more)
    assert not (tmp_path / "many" / "masked" / WORKERS).exists()
    assert not verify(str(tmp_path / "many" / "masked")).findings


def test_a_file_that_cannot_be_written_ends_the_worker(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*given: Any, **named: Any) -> None:
        raise DiskSpaceError("no space left", where="here")

    monkeypatch.setattr(module, "write_shard", full)
    with pytest.raises(DiskSpaceError):
        run(place, tmp_path / "many" / "masked", worker="0/1")
    assert not being_written(tmp_path / "many" / "masked")


def test_what_only_one_process_can_do_is_refused(place: Path) -> None:
    for more, message in (
        ({"push_to_hub": "user/name"}, "--push-to-hub and --worker exclude each other"),
        ({"overwrite": True}, "--overwrite and --worker exclude each other"),
    ):
        with pytest.raises(ConfigError, match=message):
            MaterializeConfig(scored="s", out="o", epochs=1, worker="0/2", **more)
