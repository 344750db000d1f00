"""What the examples share: rows are scored and masked, looked at in a report, and trained on by a printed recipe."""

from __future__ import annotations

import contextlib
import json
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import entrodrop_prep
from entrodrop_prep import MaterializeConfig, ScoreConfig, TrainingConfig, materialize, recipe, report, score

MODEL = Path(entrodrop_prep.__file__).parent / "demo" / "model"


def run(
    out: str,
    rows: Sequence[dict[str, Any]],
    *,
    scoring: dict[str, Any],
    masks: dict[str, Any],
    training: TrainingConfig,
) -> None:
    """Go from rows to a report and a trained model in the new directory ``out``; the last rows are for validation.

    Args:
        out: the directory; its parts have the names that the documentation uses.
        rows: of any form that ``entrodrop score`` reads.
        scoring: settings of ``score`` beside the source and the model.
        masks: settings of ``materialize`` beside the directories.
        training: settings of ``recipe``.
    """
    folder = Path(out).resolve()
    folder.mkdir(parents=True)
    train = len(rows) - max(2, len(rows) // 7)
    parts = {"scored": rows[:train], "held-out": rows[train:]}
    for name, part in parts.items():
        source = folder / f"{name}.jsonl"
        source.write_text("".join(json.dumps(row) + "\n" for row in part), encoding="utf-8")
        usual = {"backend": "transformers", "dtype": "float32"}
        score(ScoreConfig(source=str(source), model=str(MODEL), out=str(folder / name), **usual, **scoring))
    with contextlib.chdir(folder):
        made = materialize(MaterializeConfig(scored="scored", out="masked", epochs=3, eval="held-out", **masks))
        for epoch in made.epochs:
            print(f"{epoch['folder']}: {epoch['dropped_share']:.1%} of {epoch['trainable']:,} tokens dropped")
        print(f"look at it: {folder / report('masked', 'report.html', against=['scored'])}")
        Path("base-model").symlink_to(MODEL)
        Path("train.py").write_text(recipe("transformers", "masked", "./base-model", training), encoding="utf-8")
        trainer = runpy.run_path("train.py")["trainer"]
    losses = [f"{entry['eval_loss']:.3f}" for entry in trainer.state.log_history if "eval_loss" in entry]
    print(f"validation loss {' -> '.join(losses)}; the model: {folder / trainer.args.output_dir}")


def directory() -> str:
    """The directory that the command line names."""
    if len(sys.argv) != 2:
        raise SystemExit(f"usage: python {sys.argv[0]} OUT, a directory that is not there yet")
    return sys.argv[1]
