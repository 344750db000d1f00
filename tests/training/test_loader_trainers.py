"""Trainers get the rows that ``materialize`` writes, with one process and with two, and continue where they were."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import lightning
import pytest

from entrodrop_prep import MaskedRows, check_batches, materialize, recording
from entrodrop_prep.config import MaterializeConfig
from helpers.mixtures import rows_in
from helpers.models import scored_documents
from helpers.ranks import run_ranks
from helpers.scored import copy, some_rows, write_scored
from programs.train import BATCH, RECIPE, STOP, Training, run_lightning, run_trainer

pytestmark = pytest.mark.training

TESTS = Path(__file__).resolve().parents[1]
Rows = list[tuple[list[int], list[int]]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``scored`` and, made from it, ``masked``; batches straddle epochs."""
    folder = tmp_path_factory.mktemp("trainers")
    write_scored(folder / "scored", some_rows(17, lengths=(3, 20)))
    materialize(MaterializeConfig(scored=str(folder / "scored"), out=str(folder / "masked"), **RECIPE))
    return folder


@pytest.fixture(scope="module")
def epochs(folder: Path) -> list[Rows]:
    """(input_ids, labels) of the rows of each epoch, from the files."""
    found = [[(r[0], r[2]) for r in rows_in(folder / "masked" / f"epoch_{e:03d}")] for e in range(RECIPE["epochs"])]
    assert all(len(rows) % BATCH for rows in found)
    assert str(found[0]) != str(found[1])
    return found


@pytest.fixture
def here(folder: Path, tmp_path: Path) -> Path:
    copy(folder / "scored", tmp_path / "scored")
    return tmp_path


def rows_on_the_fly(here: Path) -> MaskedRows:
    return MaskedRows.open(here / "scored", **RECIPE, cache_dir=here / "cache")


def cut(rows: Rows, size: int) -> list[Rows]:
    return [rows[i : i + size] for i in range(0, len(rows), size)]


def test_transformers_trainer(here: Path, epochs: list[Rows]) -> None:
    expected = cut(epochs[0] + epochs[1], BATCH)
    rows = rows_on_the_fly(here)
    assert run_trainer(rows, here, 2) == expected
    for step, workers in ((1, 0), (5, 2), (len(expected) - 1, 0)):
        assert run_trainer(rows, here, workers, step) == expected[step:]


def test_the_trainers_shuffling_is_noticed(here: Path, epochs: list[Rows]) -> None:
    came = run_trainer(rows_on_the_fly(here), here, 0, train_sampling_strategy="random")
    assert came != cut(epochs[0] + epochs[1], BATCH)
    assert sorted(row for batch in came for row in batch) == sorted(epochs[0] + epochs[1])


@pytest.mark.parametrize("by_epoch", [False, True])
def test_lightning(by_epoch: bool, here: Path, epochs: list[Rows]) -> None:
    expected = [b for e in epochs for b in cut(e, BATCH)] if by_epoch else cut(epochs[0] + epochs[1], BATCH)
    rows = rows_on_the_fly(here)
    assert run_lightning(rows, here, 2, by_epoch=by_epoch) == expected
    of_the_first = -(-len(epochs[0]) // BATCH)
    for step in (of_the_first, of_the_first + 1, len(expected) - 1) if by_epoch else (1, of_the_first):
        assert run_lightning(rows, here, 1, step, by_epoch) == expected[step:], step
    rest = epochs[0][BATCH:]
    smaller = cut(rest, 3) + cut(epochs[1], 3) if by_epoch else cut(rest + epochs[1], 3)
    assert run_lightning(rows, here, 0, 1, by_epoch, batch=3) == smaller


# The page.


@pytest.fixture(scope="module")
def with_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``base-model``, ``scored`` by it, and ``masked``: what the pages name."""
    folder = tmp_path_factory.mktemp("page")
    scored_documents(folder)
    materialize(MaterializeConfig(scored=str(folder / "scored"), out=str(folder / "masked"), epochs=3, target="both"))
    return folder


@pytest.fixture
def as_current(with_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    copy(with_model, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path / "here"


def scripts(page: str) -> list[str]:
    text = (TESTS.parent / "docs" / page).read_text(encoding="utf-8")
    return re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def test_the_page(as_current: Path) -> None:
    names: dict[str, Any] = {"__name__": "script"}
    opening, with_trainer, own_loop, with_lightning = scripts("loader.md")
    for script in (opening, with_trainer, own_loop):
        exec(compile(script, "loader.md", "exec"), names)
    assert check_batches("masked", names["batches"]).rows == sum(names["rows"].epoch_lengths) == 66
    assert check_batches("masked", names["came"]).rows == 66

    exec(compile(with_lightning, "loader.md", "exec"), names)
    training = Training(names["model"])
    settings = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    with recording(training.model) as batches:
        lightning.Trainer(max_epochs=1, **settings).fit(training, names["Rows"]())
    assert check_batches("masked", batches).rows == 66


def test_trl(as_current: Path) -> None:
    (script,) = scripts("trainers/trl.md")
    told = "MaskedRows.open('scored', epochs=3, target='both').dataset()"
    for old, new in (
        ('load_dataset(MASKED, split="train")', told),
        ("packing=False,", 'packing=False, dataset_kwargs={"skip_prepare_dataset": True},'),
        ("\ntrainer.train(", "\nwith recording(model) as batches:\n    trainer.train("),
    ):
        assert script.count(old) == 1
        script = script.replace(old, new)
    names: dict[str, Any] = {"__name__": "script", "MaskedRows": MaskedRows, "recording": recording}
    exec(compile(script, "trl.md", "exec"), names)
    assert check_batches("masked", names["batches"]).rows == 66


# Two processes.


PACKED = "packed "


def run_kinds(names: list[str], folder: Path, home: Path) -> None:
    """Whole runs and continued ones on two processes that talk over gloo, each in a folder named as it is."""
    write_scored(home / "other", some_rows(23, seed=1, lengths=(3, 20)))
    alone = {"scored": str(folder / "scored")}
    mixed = {"scored": [f"a={folder / 'scored'}:1.5", f"b={home / 'other'}:0.7"], "pack": 24}
    materialize(MaterializeConfig(out=str(home / "masked"), **{**RECIPE, **mixed}))
    for name in names:
        (home / name).mkdir()
    jobs = [(n.removeprefix(PACKED), home / n, mixed if n.startswith(PACKED) else alone) for n in names]
    run_ranks(TESTS / "programs/train.py", json.dumps(jobs, default=str))


def came(place: Path, name: str) -> list[list[Rows]]:
    """The batches of either rank in one run."""
    read = [json.loads((place / f"{name}-{rank}.json").read_bytes()) for rank in (0, 1)]
    return [[[tuple(row) for row in batch] for batch in rank] for rank in read]


def filled_up(every: Rows) -> list[list[Rows]]:
    """The batches of two ranks; accelerate fills the last step up with the first rows."""
    over = -len(every) % (2 * BATCH)
    assert over
    batches = cut(every + every[:over], BATCH)
    return [batches[0::2], batches[1::2]]


def shared_out(every: Rows) -> list[list[Rows]]:
    """The batches of two ranks; the stream shares the last rows out, and none comes twice."""
    steps = cut(every, 2 * BATCH)
    rest = len(steps[-1])
    assert 1 < rest < 2 * BATCH
    half = -(-rest // 2)
    return [[s[:BATCH] for s in steps[:-1]] + [steps[-1][:half]], [s[BATCH:] for s in steps[:-1]] + [steps[-1][half:]]]


KINDS = {"trainer": filled_up, "lightning": shared_out}


IN_CI = [f"{PACKED}trainer", "lightning"]


def check_two_processes(names: list[str], home: Path, folder: Path) -> None:
    """Of one source, and packed ones of a mixture."""
    run_kinds(names, folder, home)
    for name in names:
        masked = home / "masked" if name.startswith(PACKED) else folder / "masked"
        every = [(r[0], r[2]) for e in range(RECIPE["epochs"]) for r in rows_in(masked / f"epoch_{e:03d}")]
        expected = KINDS[name.removeprefix(PACKED)](every)
        assert came(home / name, "whole") == expected, name
        assert came(home / name, "resumed") == [rank[STOP:] for rank in expected], name


def test_two_processes_share_the_rows(folder: Path, tmp_path: Path) -> None:
    check_two_processes(IN_CI, tmp_path, folder)


@pytest.mark.heavy
def test_two_processes_share_the_rows_in_every_way(folder: Path, tmp_path: Path) -> None:
    every = [f"{packed}{kind}" for packed in ("", PACKED) for kind in KINDS]
    check_two_processes([name for name in every if name not in IN_CI], tmp_path, folder)
