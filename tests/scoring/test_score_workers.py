"""Several processes make one scored directory, whatever becomes of any of them."""

from __future__ import annotations

import gzip
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

import entrodrop_prep
from entrodrop_prep.config import ScoreConfig
from entrodrop_prep.errors import DiskSpaceError, MismatchError, OutputError, RowError
from entrodrop_prep.scoring import run as run_module
from entrodrop_prep.scoring.finish import CONTENTS
from entrodrop_prep.sources.source import open_source
from entrodrop_prep.store.disk import WORKERS
from entrodrop_prep.store.locks import locked
from entrodrop_prep.store.shards import read_footer
from entrodrop_prep.store.workers import joined
from entrodrop_prep.terminal.preemption import EXIT_CODE
from entrodrop_prep.verification.run import verify
from helpers.hub import Hub
from helpers.models import random_rows, run_score, shards, write_rows
from helpers.runs import Start, being_written, finish, names, starter, tables
from helpers.warm import MODEL_CLIENT, OFFLINE

MODEL = Path(entrodrop_prep.__file__).parent / "demo" / "model"
ROWS, PER_SHARD = 121, 4
V = 61


@pytest.fixture(scope="module")
def start() -> Start:
    return starter()


def documents() -> list[dict[str, Any]]:
    text = Path(json.__file__).read_text()
    rows = [{"text": text[97 * i : 97 * i + 150 + 40 * (i % 7)], "name": f"row {i}"} for i in range(ROWS)]
    rows[17]["text"] = ""
    return rows


def write(folder: Path, form: str) -> Path:
    path = write_rows(folder / f"rows.{form.removesuffix('.gz')}", documents())
    if form.endswith(".gz"):
        packed = folder / "rows.jsonl.gz"
        packed.write_bytes(gzip.compress(path.read_bytes(), mtime=0))
        return packed
    return path


def settings(source: Path | str, out: Path) -> dict[str, Any]:
    return {
        **{"source": str(source), "model": str(MODEL), "out": str(out), "device": "cpu", "id_column": "name"},
        **{"rows_per_shard": PER_SHARD, "max_length": 64, "overlap": 4},
    }


def until_there_are(count: int, out: Path) -> None:
    end = time.monotonic() + 120
    while sum(name.startswith("shard-") for name in names(out)) < count:
        assert time.monotonic() < end
        time.sleep(0.01)


def check_same(out: Path, whole: Path) -> None:
    assert tables(out) == tables(whole)
    assert (out / "manifest.json").read_bytes() == (whole / "manifest.json").read_bytes()
    assert not being_written(out)
    assert not verify(str(out)).findings


@pytest.mark.parametrize("form", ["jsonl", "parquet", pytest.param("jsonl.gz", marks=pytest.mark.heavy)])
def test_workers_that_come_and_go(form: str, start: Start, tmp_path: Path) -> None:
    """Three workers, of which one is killed, one is asked to end and one comes late; then two."""
    source, out = write(tmp_path, form), tmp_path / "out"
    finish(start("score", settings(source, tmp_path / "whole")))
    whole = settings(source, out)
    killed, asked = (start("score", {**whole, "worker": f"{i}/3"}) for i in range(2))
    until_there_are(4, out)
    killed.kill()
    killed.join()
    assert any(name.startswith("claim-") for name in names(out))
    late = start("score", {**whole, "worker": "2/3"})
    until_there_are(8, out)
    os.kill(asked.pid or 0, signal.SIGTERM)
    asked.join()
    assert (killed.exitcode, asked.exitcode) == (-signal.SIGKILL, EXIT_CODE)
    assert not (out / "manifest.json").exists()
    finish(late, *(start("score", {**whole, "worker": f"{i}/2"}) for i in range(2)))
    check_same(out, tmp_path / "whole")


@pytest.mark.network
def test_workers_read_a_dataset_of_the_hub(tmp_path: Path) -> None:
    """The same with a dataset, in processes that find this Hub when they start."""
    write(tmp_path, "parquet")
    with Hub(tmp_path / "hub") as hub:
        hub.create("alice/rows", files={"data/train-00000.parquet": (tmp_path / "rows.parquet").read_bytes()})
        told = {**hub.environment(tmp_path / "home"), "OMP_NUM_THREADS": "1"}

        def begin(out: str, *more: str) -> subprocess.Popen[str]:
            given = settings("alice/rows", tmp_path / out)
            flags = [x for k, v in given.items() if k != "source" for x in (f"--{k.replace('_', '-')}", str(v))]
            command = [sys.executable, "-m", "entrodrop_prep", "score", "alice/rows", *flags, *more]
            env = {**told, "PYTHONPATH": str(Path(entrodrop_prep.__file__).parents[1])}
            return MODEL_CLIENT.popen(
                [*command, "--backend", "transformers"], env=env, stderr=subprocess.PIPE, text=True
            )

        assert begin("whole").wait() == 0
        killed, asked = (begin("out", "--worker", f"{i}/3") for i in range(2))
        until_there_are(4, tmp_path / "out")
        killed.kill()
        killed.wait()
        late = begin("out", "--worker", "2/3")
        until_there_are(8, tmp_path / "out")
        asked.send_signal(signal.SIGUSR1)
        _, said = asked.communicate()
        assert asked.returncode == EXIT_CODE
        assert said.splitlines()[-1] == (
            "stopped by SIGUSR1: finished files are kept, the rest is given back; run the same command again"
        )
        assert [p.wait() for p in (late, *(begin("out", "--worker", f"{i}/2") for i in range(2)))] == [0, 0, 0]
    check_same(tmp_path / "out", tmp_path / "whole")


def test_a_worker_and_a_run_by_itself_continue_each_other(start: Start, tmp_path: Path) -> None:
    source = write(tmp_path, "jsonl")
    finish(start("score", settings(source, tmp_path / "whole")))
    for first, then in ((None, "1/2"), ("1/3", None)):
        out = tmp_path / f"out-{first is None}"
        begun = start("score", {**settings(source, out), "worker": first})
        until_there_are(5, out)
        begun.kill()
        begun.join()
        finish(start("score", {**settings(source, out), "worker": then}))
        check_same(out, tmp_path / "whole")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """25 rows of token ids; with 5 rows a shard they make five."""
    rows = [{"input_ids": ids, "name": f"row {i}"} for i, ids in enumerate(random_rows(25, V))]
    return write_rows(tmp_path / "rows.jsonl", rows)


def test_a_worker_that_comes_when_all_is_done(tmp_path: Path, source: Path, model: Path) -> None:
    run_score(source, model, tmp_path / "out", rows_per_shard=5, worker="3/4")
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*")}
    again = run_score(source, model, tmp_path / "out", rows_per_shard=5, worker="0/2")
    assert again.already_complete
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*")} == before


def test_what_is_missing_of_a_finished_directory_is_made_again(tmp_path: Path, source: Path, model: Path) -> None:
    run_score(source, model, tmp_path / "whole", rows_per_shard=5)
    run_score(source, model, tmp_path / "out", rows_per_shard=5)
    shards(tmp_path / "out")[2].unlink()
    run_score(source, model, tmp_path / "out", rows_per_shard=5, worker="0/2")
    check_same(tmp_path / "out", tmp_path / "whole")


def test_workers_and_other_runs_keep_each_other_out(tmp_path: Path, source: Path, model: Path) -> None:
    out = tmp_path / "out"
    with joined(out, CONTENTS, 60) as workers:
        with workers.setting_up() as alone:
            assert alone
        for more in ({}, {"overwrite": True}):
            with pytest.raises(OutputError, match="out: workers are writing here; wait for them, or choose another"):
                run_score(source, model, out, rows_per_shard=5, **more)
    with locked(out), pytest.raises(OutputError, match="out: another run is writing here; wait for it"):
        run_score(source, model, out, rows_per_shard=5, worker="0/1")
    assert names(out) == [".lock"]


def test_workers_with_other_settings_are_refused(tmp_path: Path, source: Path, model: Path) -> None:
    """Already while the others have not finished a shard."""
    out, began, go = tmp_path / "out", threading.Event(), threading.Event()
    real = run_module.load_backend

    def waiting(*given: Any) -> Any:
        began.set()
        assert go.wait(60)
        return real(*given)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(run_module, "load_backend", waiting)
        first = threading.Thread(target=run_score, args=(source, model, out), kwargs={"worker": "0/2"})
        first.start()
        assert began.wait(60)
    try:
        code = f"""
import sys; sys.path.insert(0, {str(Path(__file__).parents[1])!r})
from helpers.models import run_score
run_score({str(source)!r}, {str(model)!r}, {str(out)!r}, max_length=20, worker="1/2")
"""
        done = OFFLINE.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert "MismatchError" in done.stderr
        assert "max_length was 128, now 20" in done.stderr
    finally:
        go.set()
        first.join()


def test_workers_in_another_environment_are_refused(tmp_path: Path, source: Path, model: Path) -> None:
    """What another worker noted, before it has made a shard."""
    out = tmp_path / "out"
    with joined(out, CONTENTS, 60) as workers:
        with workers.setting_up():
            workers.agreed("environment", {"device": "another", "torch": "0.1"})
        os.close(os.open(out / WORKERS / "claim-other", os.O_CREAT | os.O_WRONLY))
        plan = run_module._plan(ScoreConfig(source=str(source), model=str(model), out=str(out)), out)
        with pytest.raises(MismatchError, match=r"device was .*another.*, now .*cpu"):
            run_module._check_environment(plan, out, {"device": "cpu", "torch": "0.1"}, workers)


def test_two_rows_with_one_id_are_found_at_the_end(tmp_path: Path, model: Path) -> None:
    rows = [{"input_ids": [5, 6, 7], "name": f"row {i % 11}"} for i in range(12)]
    source = write_rows(tmp_path / "rows.jsonl", rows)
    with pytest.raises(RowError, match=r"shard-00003.parquet: row 11: the id 'row 0' in column"):
        run_score(source, model, tmp_path / "out", rows_per_shard=3, id_column="name", worker="0/1")
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_a_shard_that_cannot_be_written_ends_the_worker(
    tmp_path: Path, source: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It does not wait for it as for one that another worker has."""

    def full(*given: Any, **named: Any) -> None:
        raise DiskSpaceError("no space left", where="here")

    def late(number: int, frame: FrameType | None) -> None:
        raise TimeoutError

    monkeypatch.setattr(run_module, "write_shard", full)
    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(100)
    try:
        with pytest.raises(DiskSpaceError):  # of two shards: the third would raise what the first did
            run_score(source, model, tmp_path / "out", rows_per_shard=20, worker="0/1")
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    assert not being_written(tmp_path / "out")


def test_a_bad_row_ends_the_worker_that_reads_it(tmp_path: Path, model: Path) -> None:
    rows: list[dict[str, Any]] = [{"input_ids": [5, 6, 7]} for _ in range(12)]
    rows[7] = {"input_ids": [5, V + 1]}
    source = write_rows(tmp_path / "rows.jsonl", rows)
    with pytest.raises(RowError, match=f"row 7: token id {V + 1} at position 1"):
        run_score(source, model, tmp_path / "out", rows_per_shard=3, worker="0/1")
    assert not being_written(tmp_path / "out")
    run_score(source, model, tmp_path / "out", rows_per_shard=3, worker="0/1", on_bad_row="skip")
    assert not verify(str(tmp_path / "out")).findings


@pytest.mark.parametrize("form", ["jsonl", "jsonl.gz", "json", "csv", "txt"])
def test_positions_are_those_that_runs_note(form: str, tmp_path: Path, model: Path) -> None:
    """Of two files, in which shards do not begin where files do."""
    folder = tmp_path / "rows"
    folder.mkdir()
    for name, first in (("a", 0), ("b", 9)):
        rows = [{"text": f"w{3 + i} w7", "name": f"row {i}"} for i in range(first, first + 9)]
        if form == "csv":
            text = "text,name\n" + "".join(f'"{r["text"]}\n",{r["name"]}\n' for r in rows)
        elif form == "txt":
            text = "".join(r["text"] + "\n" for r in rows)
        else:
            text = json.dumps(rows) if form == "json" else "".join(f"{json.dumps(r)}\n" for r in rows)
        data = text.encode()
        (folder / f"{name}.{form}").write_bytes(gzip.compress(data) if form.endswith("gz") else data)
    text_rows = "line" if form == "txt" else "document"
    run_score(folder, model, tmp_path / "out", rows_per_shard=4, text_rows=text_rows)
    noted = [read_footer(path).info["source"]["next"] for path in shards(tmp_path / "out")]
    usual: dict[str, Any] = {"split": "train", "split_given": False, "config": None, "text_rows": text_rows}
    for limit in (None, 16):
        source = open_source(str(folder), limit=limit, **usual)
        found = list(source.positions(4))
        assert found == [p for p in noted[:-1] if limit is None or p["row"] < limit]
        assert list(source.positions(4, found[1])) == found[2:]
        forward = [source.read(p["row"], 2, p).rows for p in found]
        backward = [source.read(p["row"], 2, p).rows for p in reversed(found)]
        assert forward == backward[::-1]
