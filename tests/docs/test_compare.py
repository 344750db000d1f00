"""examples/compare.py: arms hold what they are named after, both recipes train them, one table has their losses."""

from __future__ import annotations

import json
import runpy
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from entrodrop_prep.store import manifest
from helpers.models import random_rows, run_score, save_model, tiny_llama, words, write_rows

pytestmark = pytest.mark.training

SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "compare.py"
EPOCHS = 2


@pytest.fixture
def compare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> Any:
    """Runs the script in a folder with scored rows; returns its exit code and what it printed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    main = runpy.run_path(str(SCRIPT))["main"]
    model = save_model(tmp_path / "base-model", tiny_llama(97))
    for name, count in (("scored", 16), ("held-out", 4)):
        texts = [{"text": words(row)} for row in random_rows(count, 97, longest=12)]
        run_score(write_rows(tmp_path / f"{name}.jsonl", texts), model, tmp_path / name)

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["compare.py", *arguments])
        code = main()
        return code, *capfd.readouterr()

    return run


MAKE = ("--eval", "held-out", "--train-model", "base-model", "--epochs", str(EPOCHS))


def train(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.chdir(folder)
    trainer = runpy.run_path("train.py")["trainer"]
    monkeypatch.chdir(folder.parents[1])
    return trainer


def test_arms_are_made_trained_and_collected(compare: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code, said, _ = compare("make", "scored", "out", *MAKE, "--seeds", "2")
    lines = (tmp_path / "out" / "train.sh").read_text(encoding="utf-8").splitlines()
    assert code == 0
    assert [line for line in said.splitlines() if line.startswith("(cd ")] == lines
    assert len(lines) == 14
    dropped = {}
    for folder in (tmp_path / "out").glob("*-0"):
        epochs = manifest.read(folder / "masked", "masked/1")["epochs"]
        dropped[folder.name.removesuffix("-0")] = [e["dropped_share"] for e in epochs]
    assert dropped.pop("plain") == [0, 0]
    assert all(d[0] < d[1] for arm, d in dropped.items() if "constant" not in arm and "uniform" not in arm)
    assert all(max(d) > 0 for d in dropped.values())

    assert "| plain | 0 |  |  |  | seed 0: not trained, seed 1: not trained |" in compare("collect", "out")[1]
    losses = {}
    for arm in ("plain-0", "low-labels-0"):
        history = train(tmp_path / "out" / arm, monkeypatch).state.log_history
        losses[arm] = [entry["eval_loss"] for entry in history if "eval_loss" in entry]
        assert len(losses[arm]) == EPOCHS
    unfinished = tmp_path / "out" / "low-labels-1"
    shutil.copytree(unfinished.with_name("low-labels-0"), unfinished, dirs_exist_ok=True)
    for path in unfinished.glob("trained-*/checkpoint-*/trainer_state.json"):
        state = json.loads(path.read_text(encoding="utf-8"))
        path.write_text(json.dumps({**state, "max_steps": 100}), encoding="utf-8")
    code, said, _ = compare("collect", "out")
    plain, last = losses["plain-0"], losses["low-labels-0"][-1]
    assert code == 0
    assert f"| plain | 1 | {min(plain):.4f} | {plain[-1]:.4f} |  | seed 1: not trained |" in said
    difference = last - plain[-1]
    assert f"| {last:.4f} | {difference:+.4f} [{difference:+.4f}, {difference:+.4f}] | seed 1: step " in said
    assert (tmp_path / "out" / "compared.md").read_text(encoding="utf-8") in said
    assert "low-labels" in (tmp_path / "out" / "compared.svg").read_text(encoding="utf-8")


def test_trl_and_mistakes(compare: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert compare("make", "scored", "out", *MAKE, "--trainer", "trl")[0] == 0
    train(tmp_path / "out" / "plain-0", monkeypatch)
    assert "| plain | 1 | " in compare("collect", "out")[1]
    code, _, error = compare("make", "missing", "other", *MAKE)
    assert code == 2
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    with pytest.raises(SystemExit, match="no arms are there"):
        compare("collect", "base-model")
