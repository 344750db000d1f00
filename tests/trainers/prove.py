"""Train a tiny model with each trainer that has an environment of its own, and prove what it was trained on.

usage: prove.py [TRAINER ...]        `make trainers` runs all of them, `make test` none: installing them takes long

Each trainer runs by its own command with what ``entrodrop recipe`` prints, in a process in which torch's hooks note the
batches and read the trained labels off the gradient (``probe/sitecustomize.py``). Then the same with one thing wrong at
a time, where the proof must fail for that reason. One line of a table and one of JSON for each trainer is the result.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import datasets  # noqa: E402
import pyarrow as pa  # noqa: E402
import pyarrow.parquet as pq  # noqa: E402

from entrodrop_prep import ArrivalError, BatchCheck, check_batches, materialize  # noqa: E402
from entrodrop_prep.config import MaterializeConfig  # noqa: E402
from entrodrop_prep.masking.mask import IGNORE  # noqa: E402
from helpers.models import random_rows, run_score, save_model, tiny_llama, words, write_rows  # noqa: E402

CPU_BUILDS = "https://download.pytorch.org/whl/cpu"
EPOCHS, ROWS = 3, 22  # 22 rows: batches straddle epochs, and the last one is short
ON_A_CPU = ("--dtype", "float32")
Change = tuple[str, str]


@dataclass(frozen=True)
class Trainer:
    """How a trainer is run.

    Attributes:
        package: its distribution, whose version is reported.
        file: what the recipe is redirected into.
        command: its arguments; the first is a program of its environment.
        wrong: for each mistake the changes of the recipe's text that make it, and how the proof must fail.
        environment: variables to run it with.
        checkpoint: a script of its environment that makes the model, where that is not a directory of transformers.
        labels_given: whether the model is called with the labels, so that they can be compared too.
        accumulate: batches in a step.
        going_on: arguments that make it go on from the checkpoint of a step, ``{}`` in them; the recipe's own command
            does, where there are none.
        lora: whether it can train adapters on a CPU.
    """

    package: str
    file: str
    command: tuple[str, ...]
    wrong: dict[str, tuple[list[Change], str]]
    environment: dict[str, str] = field(default_factory=dict)
    checkpoint: str | None = None
    labels_given: bool = True
    accumulate: int = 4
    going_on: tuple[str, ...] = ()
    lora: bool = True


REBUILT, ORDER = "labels were made again from the input ids", "rows are out of order"
TRAINERS = {
    "litgpt": Trainer(
        package="litgpt",
        file="train.py",
        command=("python", "train.py"),
        wrong={
            "labels made again": ([('torch.tensor(row["labels"])', 'torch.tensor(row["input_ids"])')], REBUILT),
            "shuffled": ([("shuffle=False", "shuffle=True")], ORDER),
            "two passes": ([("train.epochs=1", "train.epochs=2")], "every row came, and then epoch 0, row 0 again"),
        },
        checkpoint="litgpt_checkpoint.py",
        labels_given=False,
        accumulate=1,
        lora=False,
    ),
    "axolotl": Trainer(
        package="axolotl",
        file="train.yaml",
        command=("axolotl", "train", "train.yaml"),
        wrong={
            "labels made again": (
                [('  - path: "./masked"\n    split: train', "  - path: texts.jsonl\n    type: completion")],
                REBUILT,
            ),
            "batches shuffled": ([("curriculum_sampling: true", "curriculum_sampling: false")], ORDER),
            "rows shuffled": (
                [
                    ("shuffle_merged_datasets: false", "shuffle_merged_datasets: true"),
                    ("curriculum_sampling: true", "curriculum_sampling: false"),
                ],
                ORDER,
            ),
        },
        environment={"AXOLOTL_DO_NOT_TRACK": "1", "CUDA_VISIBLE_DEVICES": ""},
        lora=False,  # its kernels for adapters need a GPU
    ),
    "llama-factory": Trainer(
        package="llamafactory",
        file="train.yaml",
        command=("llamafactory-cli", "train", "train.yaml"),
        wrong={
            "labels made again": ([("stage: sft ", "stage: pt "), ("batch_size: 4", "batch_size: 1")], REBUILT),
            "shuffled": ([("disable_shuffling: true", "disable_shuffling: false")], ORDER),
            "two passes": ([("num_train_epochs: 1", "num_train_epochs: 2")], "every row came, and then epoch 0, row 0"),
        },
    ),
    "ms-swift": Trainer(
        package="ms-swift",
        file="train.sh",
        command=("bash", "train.sh", "--model_type", "llama", "--template", "default"),
        wrong={
            "labels made again": (
                [
                    ("--cached_dataset ./masked/all_hf/train", "--dataset texts.jsonl --dataset_shuffle false"),
                    ("  --truncation_strategy split\n", "  --truncation_strategy delete\n"),
                ],
                REBUILT,
            ),
            "shuffled": ([("dataloader_shuffle false", "dataloader_shuffle true")], ORDER),
            "two passes": ([("num_train_epochs 1", "num_train_epochs 2")], "every row came, and then epoch 0, row 0"),
        },
        environment={"USE_HF": "1", "CUDA_VISIBLE_DEVICES": ""},
        going_on=("--resume_from_checkpoint", "{}"),
    ),
}


# --- what is trained on


def make_data(folder: Path) -> None:
    """For each target ``masked``, of the same scores, and the model they were made with."""
    model = save_model(folder / "base-model", tiny_llama())
    texts = [{"text": words(row) + " </s>"} for row in random_rows(ROWS, 97, longest=30)]
    run_score(write_rows(folder / "docs.jsonl", texts), model, folder / "scored")
    run_score(write_rows(folder / "held.jsonl", texts[:16]), model, folder / "held")
    for target in ("labels", "inputs"):
        settings: dict[str, Any] = {"schedule": "linear", "max_rate": 0.9, "rows_per_shard": 12, "target": target}
        settings |= {"layout": ("concatenated",)}
        if target == "inputs":  # recipes with a validation split, and without one
            settings |= {"eval": str(folder / "held"), "plain_config": True}
        out = str(folder / target / "masked")
        materialize(MaterializeConfig(scored=str(folder / "scored"), out=out, epochs=EPOCHS, **settings))


def rows_of(masked: Path) -> list[dict[str, list[int]]]:
    files = [f for e in range(EPOCHS) for f in sorted((masked / f"epoch_{e:03d}").iterdir())]
    return [row for f in files for row in pq.read_table(f).to_pylist()]


def everything(masked: Path) -> BatchCheck:
    """What must have arrived, by the manifest."""
    epochs = json.loads((masked / "manifest.json").read_bytes())["epochs"]
    return BatchCheck(
        tuple(range(EPOCHS)), *(sum(e[name] for e in epochs) for name in ("rows", "tokens", "labels_left"))
    )


def flip_a_label(masked: Path) -> str:
    """Change one label of the last epoch, in its file and in the saved copy; returns how the proof must fail."""
    file = sorted((masked / f"epoch_{EPOCHS - 1:03d}").iterdir())[0]
    table = pq.read_table(file)
    rows = table.to_pylist()
    t = max(t for t, label in enumerate(rows[5]["labels"]) if label != IGNORE)
    old = rows[5]["labels"][t]
    new = old - 1 if old > 50 else old + 1
    rows[5]["labels"][t] = new
    file.unlink()
    pq.write_table(pa.Table.from_pylist(rows, schema=table.schema), file)
    saved = datasets.load_from_disk(str(masked / "all_hf"))["train"]
    changed = datasets.Dataset.from_list(rows_of(masked), features=saved.features)
    shutil.rmtree(masked / "all_hf")
    datasets.DatasetDict(train=changed).save_to_disk(str(masked / "all_hf"))
    return f"epoch {EPOCHS - 1}, row 5, position {t} .*label {new} came, {old} was written"


# --- environments


def environment_of(name: str) -> Path:
    """The ``bin`` of a trainer's environment, made from ``requirements/NAME.txt`` where that changed."""
    venv, wanted = ROOT / ".venvs" / name, HERE / "requirements" / f"{name}.txt"
    stamp = venv / ".installed"
    if not stamp.exists() or stamp.read_bytes() != wanted.read_bytes():
        if not venv.exists():
            subprocess.run([sys.executable, "-m", "venv", venv], check=True)
        # --no-deps: some trainers ask for what only a GPU can use; the list is complete without it
        install = [venv / "bin" / "python", "-m", "pip", "install", "-q", "--no-deps"]
        if sys.platform == "linux":  # torch without gigabytes of CUDA, as in scripts/setup.sh
            (torch,) = re.findall(r"^torch==.*", wanted.read_text(encoding="utf-8"), re.MULTILINE)
            if subprocess.run([*install, f"{torch}+cpu"], check=False, stderr=subprocess.DEVNULL).returncode:
                subprocess.run([*install, f"{torch}+cpu", "--extra-index-url", CPU_BUILDS], check=True)
        subprocess.run([*install, "-r", wanted], check=True)
        stamp.write_bytes(wanted.read_bytes())
    return venv / "bin"


def version_of(bin_: Path, package: str) -> str:
    code = f"import importlib.metadata; print(importlib.metadata.version({package!r}))"
    return subprocess.run([bin_ / "python", "-c", code], check=True, capture_output=True, text=True).stdout.strip()


# --- running and proving


def folder_for(data: Path, target: str, work: Path, name: str, bin_: Path, *options: str) -> Path:
    """A new folder with ``masked``, its recipe, ``base-model``, and the text of the rows, as a mistake would use it."""
    trainer = TRAINERS[name]
    folder = Path(tempfile.mkdtemp(dir=work))
    shutil.copytree(data / target / "masked", folder / "masked")
    with (folder / trainer.file).open("w") as out:
        command = [sys.executable, "-m", "entrodrop_prep", "recipe", name, "masked", *options]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        subprocess.run(command, cwd=folder, env=environment, stdout=out, check=True)
    if trainer.checkpoint:
        script = HERE / trainer.checkpoint
        subprocess.run([bin_ / "python", script, data / "base-model", folder / "base-model"], check=True)
    else:
        (folder / "base-model").symlink_to(data / "base-model")
    text = {i: w for w, i in json.loads((data / "base-model" / "tokenizer.json").read_text())["model"]["vocab"].items()}
    documents = [" ".join(text[i] for i in row["input_ids"]) for row in rows_of(folder / "masked")]
    if trainer.package == "ms-swift":  # adds the EOS that the rows end with
        answers = [{"role": "assistant", "content": document.removesuffix(" </s>")} for document in documents]
        rows: list[dict[str, Any]] = [{"messages": [answer]} for answer in answers]
    else:
        rows = [{"text": document} for document in documents]
    write_rows(folder / "texts.jsonl", rows)
    return folder


def run(
    name: str, bin_: Path, folder: Path, changes: list[Change], *more: str, stop: int | None = None
) -> list[dict[str, Any]]:
    """Train as the recipe in the folder says, some of its text exchanged; returns what the probe noted.

    ``more`` are arguments behind the command's. With ``stop`` it is killed behind as many batches.
    """
    trainer = TRAINERS[name]
    text = (folder / trainer.file).read_text(encoding="utf-8")
    for old, new in changes:
        if text.count(old) != 1:
            raise SystemExit(f"the recipe of {name} has {text.count(old)} times {old!r}")
        text = text.replace(old, new)
    (folder / trainer.file).write_text(text, encoding="utf-8")
    program, *arguments = trainer.command
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(HERE / "probe"), str(HERE / "standins")]),
        "PROBE_OUT": str(folder / "batches.jsonl"),
        "PATH": f"{bin_}{os.pathsep}{os.environ['PATH']}",
        "HF_HOME": str(folder / "cache"),
        "HF_HUB_OFFLINE": "1",
        **({} if stop is None else {"PROBE_STOP": str(stop)}),
        **trainer.environment,
    }
    with (folder / "log.txt").open("w") as log:
        done = subprocess.run(
            [shutil.which(program, path=environment["PATH"]) or program, *arguments, *more],
            cwd=folder,
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
            check=False,
        )
    if (done.returncode == 0) == (stop is not None):
        said = "failed" if done.returncode else "was not stopped"
        raise SystemExit(f"{name} {said} in {folder}:\n{(folder / 'log.txt').read_text()[-6000:]}")
    with (folder / "batches.jsonl").open() as noted:
        batches = [json.loads(line) for line in noted]
    (folder / "batches.jsonl").unlink()
    return batches


def prove(masked: Path, batches: list[dict[str, Any]], labels_given: bool) -> BatchCheck:
    """The labels read off the gradient are the files', and those that the model was given, if any, too."""
    trained = check_batches(masked, [{**batch, "labels": batch["trained"]} for batch in batches])
    if labels_given and check_batches(masked, batches) != trained:
        raise SystemExit("the labels that were given and those that were trained differ")
    return trained


def must_fail(masked: Path, batches: list[dict[str, Any]], said: str) -> str:
    try:
        arrived = prove(masked, batches, labels_given=False)
    except ArrivalError as e:
        if not re.search(said, str(e)):
            raise SystemExit(f"the proof failed for another reason than {said!r}: {e}") from e
        return str(e)
    raise SystemExit(f"the proof holds, {arrived}, and should say {said!r}")


def prove_going_on(name: str, bin_: Path, folder: Path) -> BatchCheck:
    """Kill it in the middle of epoch 1, start it again, and prove what both runs trained on together."""
    trainer, stop = TRAINERS[name], 9
    first = run(name, bin_, folder, [], stop=stop)
    every = int(re.findall(r"save_(?:steps|interval)\W+(\d+)", (folder / trainer.file).read_text(encoding="utf-8"))[0])
    steps = stop // trainer.accumulate // every * every
    left_over = stop - steps * trainer.accumulate
    (out,) = folder.glob("trained-*")
    more = [a.format(out / f"checkpoint-{steps}") for a in trainer.going_on]
    again = run(name, bin_, folder, [], *more)
    if not len(again) < len(first) + len(again) - left_over == -(-EPOCHS * ROWS // 4):
        raise SystemExit(f"{name} trained on {len(first)} batches and, gone on, on {len(again)}")
    return prove(folder / "masked", first[: stop - left_over] + again, trainer.labels_given)


def prove_trainer(name: str, data: Path, work: Path) -> dict[str, Any]:
    """Both targets, other settings, a run that is killed, then every mistake and one label flipped."""
    trainer = TRAINERS[name]
    bin_ = environment_of(name)
    found: dict[str, Any] = {"trainer": name, "version": version_of(bin_, trainer.package)}
    other = ["--batch-size", "2", "--grad-accum", "3", "--lr", "0.001", *(["--lora", "4"] if trainer.lora else [])]
    for target, options in (("labels", []), ("inputs", []), ("labels", other)):
        folder = folder_for(data, target, work, name, bin_, *ON_A_CPU, *options)
        arrived = prove(folder / "masked", run(name, bin_, folder, []), trainer.labels_given)
        if arrived != everything(folder / "masked"):
            raise SystemExit(f"{arrived} came of {everything(folder / 'masked')}")
        found[target] = {"rows": arrived.rows, "tokens": arrived.tokens, "labels": arrived.labels}
        print(f"{name} --target {target} {' '.join(options)}: {arrived}", flush=True)
    folder = folder_for(data, "labels", work, name, bin_, *ON_A_CPU)
    arrived = prove_going_on(name, bin_, folder)
    if arrived != everything(folder / "masked"):
        raise SystemExit(f"gone on after it was killed: {arrived} came of {everything(folder / 'masked')}")
    found["resumes"] = True
    print(f"{name}, killed and started again: {arrived}", flush=True)
    mistakes = {**trainer.wrong, "one label flipped": ([], "")}
    for mistake, (changes, said) in mistakes.items():
        folder = folder_for(data, "labels", work, name, bin_, *ON_A_CPU)
        if not changes:
            said = flip_a_label(folder / "masked")
        message = must_fail(data / "labels" / "masked", run(name, bin_, folder, changes), said)
        print(f"{name}, {mistake}: {message}", flush=True)
    return {**found, "caught": list(mistakes), "date": datetime.now(UTC).date().isoformat()}


def main() -> None:
    names = sys.argv[1:] or list(TRAINERS)
    unknown = [name for name in names if name not in TRAINERS]
    if unknown:
        raise SystemExit(f"error: unknown trainer {unknown[0]}; there are: {', '.join(TRAINERS)}")
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "data"
        make_data(data)
        results = [prove_trainer(name, data, Path(folder)) for name in names]
    print("\n| trainer | version | rows | labels trained | mistakes caught | date |")
    print("| --- | --- | --- | --- | --- | --- |")
    for r in results:
        labels = " and ".join(f"{r[target]['labels']:,} ({target})" for target in ("labels", "inputs"))
        caught = ", ".join(r["caught"])
        print(f"| {r['trainer']} | {r['version']} | {r['labels']['rows']} | {labels} | {caught} | {r['date']} |")
    for r in results:
        print(json.dumps(r))


if __name__ == "__main__":
    main()
