"""Does dropping tokens help your model on your rows? The same training on several ways of dropping, in one table.

    python examples/compare.py make scored compared --eval held-out --train-model org/base-model --epochs 8
    bash compared/train.sh
    python examples/compare.py collect compared

``make`` writes a masked directory and a training script for each arm and seed, and prints how to run them; ``collect``
reads what the scripts logged, also while some are not yet run. docs/compare.md says how to read the result.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shlex
import sys
from pathlib import Path
from typing import Any

from entrodrop_prep import MaterializeConfig, TrainingConfig, materialize, recipe
from entrodrop_prep.errors import EntrodropError

MEAN_RATE = {"schedule": "constant", "max_rate": 0.4}
UNIFORM = {"select": "random", "quantile": 1.0, "drop_token": "uniform", "schedule": "constant", "max_rate": 0.05}
ARMS: dict[str, dict[str, Any]] = {
    "plain": {"schedule": "constant", "max_rate": 0.0},
    "low-labels": {},
    "low-inputs": {"target": "inputs"},
    "random-labels": {"select": "random"},
    "random-inputs": {"select": "random", "target": "inputs"},
    "low-labels-constant": MEAN_RATE,
    "uniform-inputs": {"target": "inputs", **UNIFORM},
}
"""What each arm's recipe has beside the defaults or ``--recipe``; the random arms have the rates of the low ones."""


def make(given: argparse.Namespace) -> None:
    """Write ``OUT/ARM-SEED/masked`` and ``train.py`` for each arm and seed, and ``OUT/train.sh``, which runs all."""
    out = Path(given.out).resolve()
    local = Path(given.train_model)
    model = str(local.resolve()) if local.is_dir() else given.train_model
    training = TrainingConfig(batch_size=given.batch_size, lr=given.lr, lora=given.lora)
    commands = []
    for seed in range(given.seeds):
        for arm, settings in ARMS.items():
            folder = out / f"{arm}-{seed}"
            config = MaterializeConfig.load(
                recipe=given.recipe, scored=given.scored, out=str(folder / "masked"), epochs=given.epochs, seed=seed,
                eval=given.eval, add_columns=("n_trainable",), **settings,
            )  # fmt: skip
            materialize(config)
            with contextlib.chdir(folder):
                Path("train.py").write_text(recipe(given.trainer, "masked", model, training), encoding="utf-8")
            commands.append(f"(cd {shlex.quote(str(folder))} && {shlex.quote(sys.executable)} train.py)\n")
    (out / "train.sh").write_text("".join(commands), encoding="utf-8")
    print(f"{len(commands)} arms and seeds in {out}; train them, one by one or on several machines:")
    print("".join(commands), end="")


def losses(folder: Path) -> tuple[list[float], str]:
    """Validation losses that a recipe's run logged, one an epoch, and how far the run is."""
    states = list(folder.glob("trained-*/checkpoint-*/trainer_state.json"))
    if not states:
        return [], "not trained"
    newest = max(states, key=lambda path: int(path.parent.name.rpartition("-")[2]))
    state = json.loads(newest.read_text(encoding="utf-8"))
    found = [entry["eval_loss"] for entry in state["log_history"] if "eval_loss" in entry]
    done = state["global_step"], state["max_steps"]
    return found, "" if done[0] == done[1] else f"step {done[0]} of {done[1]}"


def collect(given: argparse.Namespace) -> None:
    """Print a table of the arms, and write it with a picture: ``OUT/compared.md`` and ``OUT/compared.svg``."""
    out = Path(given.out)
    found = {p.parent.name: losses(p.parent) for p in sorted(out.glob("*/train.py"))}
    if not found:
        raise SystemExit(f"error: {out}: no arms are there; run `make` first")
    seeds = {arm: [n for n in found if n.rpartition("-")[0] == arm] for arm in ARMS}
    whole = {arm: [n for n in names if found[n][0] and not found[n][1]] for arm, names in seeds.items()}
    plain = {n.rpartition("-")[2]: found[n][0][-1] for n in whole["plain"]}
    lines = ["| arm | seeds | best | last | minus plain, last | |", "| --- | ---: | ---: | ---: | --- | --- |"]
    for arm, names in seeds.items():
        curves = [found[n][0] for n in whole[arm]]
        best, last = (f"{mean([f(c) for c in curves]):.4f}" if curves else "" for f in (min, lambda c: c[-1]))
        paired = [found[n][0][-1] - plain[s] for n in whole[arm] if (s := n.rpartition("-")[2]) in plain]
        difference = f"{mean(paired):+.4f} [{min(paired):+.4f}, {max(paired):+.4f}]" if paired else ""
        missing = ", ".join(f"seed {n.rpartition('-')[2]}: {found[n][1]}" for n in names if found[n][1])
        lines.append(
            f"| {arm} | {len(curves)} | {best} | {last} | {difference if arm != 'plain' else ''} | {missing} |"
        )
    print("\n".join(lines))
    (out / "compared.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    draw(out / "compared.svg", {arm: [found[n][0] for n in names if found[n][0]] for arm, names in seeds.items()})
    print(f"validation loss by epoch: {out / 'compared.svg'}")


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def draw(path: Path, curves: dict[str, list[list[float]]]) -> None:
    """A line for every run, a colour for every arm."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot(xlabel="epoch", ylabel="validation loss (nats a token)")
    for number, (arm, runs) in enumerate(curves.items()):
        for i, run in enumerate(runs):
            epochs, colour = range(1, len(run) + 1), colormaps["tab10"](number)
            axes.plot(epochs, run, color=colour, marker=".", label=None if i else arm)
    if any(curves.values()):
        axes.legend()
    figure.savefig(path)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    one = commands.add_parser("make", help="write the arms and their training scripts")
    one.add_argument("scored", help="directory that `entrodrop score` wrote of the rows to train on")
    one.add_argument("out", help="directory for the arms")
    one.add_argument("--eval", required=True, help="scored directory of rows that are held out")
    one.add_argument("--train-model", required=True, help="model to train: directory or Hub id")
    one.add_argument("--epochs", type=int, required=True)
    one.add_argument("--trainer", choices=("transformers", "trl"), default="transformers")
    one.add_argument("--seeds", type=int, default=1, help="so many times everything, with other masks and orders")
    one.add_argument("--recipe", help="settings of materialize that the arms share")
    one.add_argument("--batch-size", type=int)
    one.add_argument("--lr", type=float, default=1e-4)
    one.add_argument("--lora", type=int)
    one.set_defaults(run=make)
    two = commands.add_parser("collect", help="one table and one picture of what was logged")
    two.add_argument("out", help="the directory that `make` wrote")
    two.set_defaults(run=collect)
    given = parser.parse_args()
    try:
        given.run(given)
    except EntrodropError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
