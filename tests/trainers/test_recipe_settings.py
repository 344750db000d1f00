"""Batch size, learning rate, adapters and precision reach every trainer, and a run with them is what was printed."""

from __future__ import annotations

import ast
import re
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from entrodrop_prep import check_batches, materialize
from entrodrop_prep.cli import run
from entrodrop_prep.config import MaterializeConfig, TrainingConfig
from entrodrop_prep.errors import ConfigError
from entrodrop_prep.trainers import TRAINERS, recipe, recipe_of
from entrodrop_prep.trainers.facts import Epoch, Facts
from helpers.models import scored_documents
from helpers.recipes import run_text

pytestmark = pytest.mark.training

OURS = ("transformers", "trl", "lightning")
EPOCHS, ROWS = 2, 11
FACTS = Facts(
    directory="./masked",
    epochs=(Epoch("epoch_000", 2200, 44000, 40000, 39000, 0.025), Epoch("epoch_001", 2200, 44000, 40000, 30000, 0.25)),
    target="labels",
    drop_token="random",
    layouts=("concatenated",),
    longest=31,
    content_digest="0123abcd" * 8,
)
GIVEN = TrainingConfig(batch_size=3, grad_accum=5, lr=0.00002, lora=7, dtype="bfloat16")
WITHOUT_LORA = replace(GIVEN, lora=None)
PEFT = {"r": 7, "lora_alpha": 14, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
HUGGING_FACE = {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 5, "learning_rate": 0.00002}
REACHED: dict[str, dict[str, Any]] = {
    "transformers": {**HUGGING_FACE, **PEFT, "BF16": True},
    "trl": {**HUGGING_FACE, **PEFT, "BF16": True},
    "lightning": {"batch_size": 3, "accumulate_grad_batches": 5, "lr": 0.00002, **PEFT, "BF16": True},
    "unsloth": {**HUGGING_FACE, "r": 7, "lora_alpha": 14, "load_in_4bit": False},
    "axolotl": {
        **{"micro_batch_size": 3, "gradient_accumulation_steps": 5, "learning_rate": 0.00002, "bf16": True},
        **{"adapter": "lora", "lora_r": 7, "lora_alpha": 14, "lora_target_linear": True},
    },
    "llama-factory": {
        **HUGGING_FACE,
        **{"finetuning_type": "lora", "lora_rank": 7, "lora_alpha": 14, "lora_target": "all"},
        **{"bf16": True, "pure_bf16": False},
    },
    "ms-swift": {
        **{name: str(value) for name, value in HUGGING_FACE.items() if name != "learning_rate"},
        **{"learning_rate": "0.00002", "bf16": "true", "fp16": "false", "torch_dtype": "bfloat16"},
        **{"tuner_type": "lora", "lora_rank": "7", "lora_alpha": "14", "target_modules": "all-linear"},
    },
    "litgpt": {
        **{"train.micro_batch_size": "3", "train.global_batch_size": "15", "precision": "bf16-mixed"},
        "optimizer": '{"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.00002}}',
    },
}


def settings_in(trainer: str, text: str) -> dict[str, Any]:
    """The settings that a recipe gives its trainer: keys of YAML, options of Bash, keywords and names of Python."""
    if TRAINERS[trainer].form == "yaml":
        return dict(yaml.safe_load(text))
    if TRAINERS[trainer].form == "sh":
        script = text.replace("swift pt", "printf '%s\\0'")
        done = subprocess.run(["bash", "-c", script], check=True, capture_output=True, text=True)
        found = done.stdout.split("\0")[:-1]
        return {name.removeprefix("--"): value for name, value in zip(found[::2], found[1::2], strict=True)}
    settings: dict[str, Any] = {}
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.keyword) and isinstance(node.value, ast.Constant):
            settings[node.arg or ""] = node.value.value
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            settings[node.targets[0].id] = getattr(node.value, "value", None)
        if isinstance(node, ast.Constant) and str(node.value).startswith("--"):
            name, _, value = node.value[2:].partition("=")
            settings[name] = value
    return settings


def plain(text: str) -> str:
    """Text without the comments' line breaks."""
    return " ".join(text.replace("\n# ", " ").split())


@pytest.mark.parametrize("trainer", TRAINERS)
def test_every_setting_reaches_the_trainer(trainer: str) -> None:
    given = WITHOUT_LORA if TRAINERS[trainer].no_lora else GIVEN
    text = recipe_of(trainer, replace(FACTS, training=given))
    found = settings_in(trainer, text)
    assert {name: found.get(name) for name in REACHED[trainer]} == REACHED[trainer]
    rounded = "down" if trainer == "litgpt" else "up"
    assert f"3 x 5 = 15 in an optimizer step of one process: 4,400 / 15, rounded {rounded}, = 29" in plain(text)


@pytest.mark.parametrize("trainer", TRAINERS)
def test_other_settings_have_another_folder(trainer: str) -> None:
    """A trainer resumes from what is there, with another batch size from the wrong row."""
    changes: list[dict[str, Any]] = [{}, {"batch_size": 2}, {"grad_accum": 2}, {"lr": 0.5}, {"dtype": "float32"}]
    if not TRAINERS[trainer].no_lora:
        changes.append({"lora": 2})
    texts = [recipe_of(trainer, replace(FACTS, training=TrainingConfig(**change))) for change in changes]
    folders = {re.findall(r"trained-[\w.-]*", text)[0] for text in texts}
    assert len(folders) == len(changes)


@pytest.mark.parametrize("trainer", TRAINERS)
def test_a_run_writes_ten_checkpoints_at_most(trainer: str) -> None:
    for rows in (1, 7, 16 * 10, 16 * 19, 16 * 100, 100_000):
        facts = replace(FACTS, epochs=tuple(replace(e, rows=rows) for e in FACTS.epochs))
        text = recipe_of(trainer, facts)
        every = [int(n) for n in re.findall(r"(?:save_steps|save_interval|every_n_train_steps)\W+(\d+)", text)]
        steps = int(re.findall(r"= ([\d,]+) steps", plain(text))[0].replace(",", ""))
        assert len(every) == 1
        assert 1 <= steps // every[0] <= 10 or steps == 0


@pytest.mark.parametrize("trainer", TRAINERS)
def test_it_begins_with_what_to_install(trainer: str) -> None:
    first = recipe_of(trainer, FACTS).splitlines()[0]
    assert first.startswith("# pip install ")
    assert "peft" not in first
    pinned = Path(__file__).parent / "requirements" / f"{trainer}.txt"
    if pinned.exists():  # the version that is proven
        (version,) = re.findall(r"\S+==\S+", first)
        assert version in pinned.read_text(encoding="utf-8").replace("_", "-").splitlines()
    if trainer in OURS:
        adapters = recipe_of(trainer, replace(FACTS, training=GIVEN))
        assert adapters.splitlines()[0].endswith(" peft")


@pytest.mark.parametrize("trainer", TRAINERS)
def test_it_says_why_the_loss_rises_and_in_what_weights_are_kept(trainer: str) -> None:
    text = plain(recipe_of(trainer, FACTS))
    assert (
        "The training loss may rise from epoch to epoch while the model gets better: it is a mean over the lab" in text
    )
    assert "on rows that `materialize --eval-fraction 0.05` holds out" in text
    assert "on the split `validation`" in plain(recipe_of(trainer, replace(FACTS, validation_rows=5)))
    flat = replace(FACTS, epochs=FACTS.epochs[:1] * 2)
    for other in (flat, replace(FACTS, select="random")):
        assert "The training loss may rise" not in plain(recipe_of(trainer, other))
    rounded, exact = "small updates are rounded away", "16 bytes a parameter"
    assert (rounded in text, exact in text) == ((True, False) if trainer == "axolotl" else (False, True))
    in_float32 = plain(recipe_of(trainer, replace(FACTS, training=TrainingConfig(dtype="float32"))))
    assert rounded not in in_float32


def test_what_a_trainer_has_not_is_refused_in_one_line() -> None:
    with pytest.raises(ConfigError, match="--lora: LitGPT's finetune_lora cannot resume a run that was stopped; "):
        recipe_of("litgpt", replace(FACTS, training=GIVEN))


@pytest.mark.parametrize(
    ("option", "value"),
    [
        *[("--batch-size", v) for v in ("0", "-1", "1.5", "4)\nimport os #", "true")],
        *[("--grad-accum", v) for v in ("0", "", "x")],
        *[("--lr", v) for v in ("0", "-1", "nan", "inf", "1e-4, x=1", "1e-4\nmodel: other")],
        *[("--lora", v) for v in ("0", "8}", "$(id)")],
        *[("--dtype", v) for v in ("float64", "bfloat16\nx: y", "")],
    ],
)
def test_no_value_gets_into_a_recipe_that_is_no_setting(
    option: str, value: str, made: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["recipe", "transformers", str(made / "masked"), option, value]) == 2
    out, err = capsys.readouterr()
    (line,) = err.splitlines()
    assert line.startswith("error: ")
    assert option in line
    assert not out


# --- runs


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``base-model``, of which the weights are bfloat16, and ``masked`` rows for it."""
    folder = tmp_path_factory.mktemp("settings")
    scored_documents(folder, rows=ROWS, longest=20, dtype="bfloat16")
    materialize(MaterializeConfig(scored=str(folder / "scored"), out=str(folder / "masked"), epochs=EPOCHS))
    return folder


@pytest.fixture
def here(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder as the current one, with ``base-model`` and ``masked`` in it."""
    for name in ("base-model", "masked"):
        (tmp_path / name).symlink_to(made / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path


def run_with(trainer: str, **settings: Any) -> tuple[dict[str, Any], Any]:
    """Run a recipe with these settings; its names, and the model it trained. All rows came, in the steps it says."""
    text = recipe(trainer, "masked", training=TrainingConfig(**settings))
    names, batches = run_text(text)
    assert check_batches("masked", batches).rows == EPOCHS * ROWS
    assert {len(batch["input_ids"]) for batch in batches[:-1]} == {settings["batch_size"]}
    trained = names["trainer"]
    steps = trained.state.global_step if hasattr(trained.state, "global_step") else trained.global_step
    assert f"rounded up, = {steps} steps" in plain(text)
    return names, names["training"].model if trainer == "lightning" else trained.model


@pytest.mark.parametrize("trainer", OURS)
def test_a_model_in_bfloat16_trains_with_float32_weights(trainer: str, here: Path) -> None:
    dtype = "bfloat16" if trainer == "lightning" else "auto"  # Lightning computes in bfloat16 on a CPU too
    names, model = run_with(trainer, batch_size=3, grad_accum=2, lr=0.01, dtype=dtype)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    before, after = (load_file(here / folder / "model.safetensors") for folder in ("base-model", names["OUT"]))
    assert {value.dtype for value in before.values()} == {torch.bfloat16}
    assert {value.dtype for value in after.values()} == {torch.float32}
    moved = [(before[name].float() - after[name]).abs().max() for name in before if "proj" in name]
    assert min(moved) > 0.001  # the learning rate that was given
    if trainer == "lightning":
        assert names["trainer"].precision == "bf16-mixed"


@pytest.mark.parametrize("trainer", OURS)
def test_adapters_are_trained_and_nothing_else(trainer: str, here: Path) -> None:
    names, model = run_with(trainer, batch_size=4, grad_accum=2, lora=3, dtype="float32")
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert trainable
    assert all("lora_" in name and 3 in p.shape and p.dtype == torch.float32 for name, p in trainable.items())
    before = load_file(here / "base-model" / "model.safetensors")
    frozen = {name.replace(".base_layer", ""): p for name, p in model.get_base_model().named_parameters()}
    assert all(torch.equal(frozen[name].cpu(), value.float()) for name, value in before.items() if name in frozen)
    saved = load_file(here / names["OUT"] / "adapter_model.safetensors")
    assert len(saved) == len(trainable)
    assert any(value.any() for name, value in saved.items() if "lora_B" in name), "adapters start at 0"
