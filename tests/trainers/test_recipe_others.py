"""The recipes for trainers with environments of their own say what `make trainers` ran. No trainer runs here."""

from __future__ import annotations

import ast
import re
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from entrodrop_prep.errors import ConfigError
from entrodrop_prep.trainers import TRAINERS, recipe_of
from entrodrop_prep.trainers.facts import Epoch, Facts

ROOT = Path(__file__).resolve().parents[2]
OUT = 'trained-0123abcd-{}-org-a "model" \N{GRINNING FACE}'
OTHERS = ("axolotl", "llama-factory", "litgpt", "ms-swift", "unsloth")
FACTS = Facts(  # names that need quoting
    directory="data/it's $masked",
    epochs=(
        Epoch("epoch_000", 22, 440, 400, 390, 0.025),
        Epoch("epoch_001", 22, 440, 400, 300, 0.25),
    ),
    target="labels",
    drop_token="random",
    layouts=("concatenated",),
    longest=31,
    model='org/a "model" \N{GRINNING FACE}',
    content_digest="0123abcd" * 8,
)
WITH_VALIDATION = replace(FACTS, validation_rows=5)


def settings_of(trainer: str, facts: Facts) -> dict[str, Any]:
    """The settings as a YAML file, or Bash, gives them to the trainer."""
    text = recipe_of(trainer, facts)
    if trainer != "ms-swift":
        return dict(yaml.safe_load(text))
    script = text.replace("swift pt", "printf '%s\\0'")
    words = subprocess.run(["bash", "-c", script], check=True, capture_output=True, text=True).stdout.split("\0")[:-1]
    return {name.removeprefix("--"): value for name, value in zip(words[::2], words[1::2], strict=True)}


def constants(trainer: str, facts: Facts) -> set[Any]:
    """What stands in a script: every constant of it."""
    return {n.value for n in ast.walk(ast.parse(recipe_of(trainer, facts))) if isinstance(n, ast.Constant)}


@pytest.mark.parametrize("facts", [FACTS, WITH_VALIDATION, replace(FACTS, longest=None, target="inputs")])
@pytest.mark.parametrize("trainer", OTHERS)
def test_it_begins_with_the_figures(trainer: str, facts: Facts) -> None:
    text = recipe_of(trainer, facts)
    said = " ".join(text.partition("\n\n")[0].replace("\n# ", " ").split())
    assert "epoch_001 22 440 400 25.0% 300 75.0%" in said
    steps = 11 if trainer == "litgpt" else 3  # 44 rows, 4 or 16 a step
    assert f"= {steps} steps" in said
    assert "up to 1.33 times" in said
    assert "#?" not in text
    assert text.endswith("\n")
    assert max(map(len, text.splitlines())) <= 120


def test_axolotl_reads_in_order() -> None:
    settings = settings_of("axolotl", FACTS)
    assert settings["base_model"] == FACTS.model
    assert settings["datasets"] == [{"path": FACTS.directory, "split": "train"}]
    assert settings["output_dir"] == OUT.format("axolotl")
    assert settings["dataset_prepared_path"] == f"{OUT.format('axolotl')}/prepared"
    assert settings["sequence_len"] == 31
    assert settings["shuffle_merged_datasets"] is settings["sample_packing"] is False
    assert settings["curriculum_sampling"] is True
    assert settings["excess_length_strategy"] == "raise"
    assert settings["num_epochs"] == 1
    assert "test_datasets" not in settings
    validation = settings_of("axolotl", WITH_VALIDATION)["test_datasets"]
    assert validation == [{"path": FACTS.directory, "split": "validation"}]


def test_llama_factory_reads_the_saved_copy_in_order() -> None:
    settings = settings_of("llama-factory", FACTS)
    assert settings["model_name_or_path"] == FACTS.model
    assert settings["tokenized_path"] == f"{FACTS.directory}/all_hf"
    assert settings["output_dir"] == OUT.format("llama-factory")
    assert settings["stage"] == "sft"
    assert settings["disable_shuffling"] is settings["do_train"] is True
    assert settings["num_train_epochs"] == 1
    assert "eval_strategy" not in settings
    assert "eval_strategy" in settings_of("llama-factory", WITH_VALIDATION)


def test_ms_swift_reads_the_saved_copy_in_order() -> None:
    settings = settings_of("ms-swift", FACTS)
    assert settings["model"] == FACTS.model
    assert settings["cached_dataset"] == f"{FACTS.directory}/all_hf/train"
    assert settings["output_dir"] == OUT.format("ms-swift")
    assert settings["truncation_strategy"] == "split"
    assert settings["lazy_tokenize"] == "true"
    assert settings["train_dataloader_shuffle"] == settings["packing"] == settings["padding_free"] == "false"
    assert settings["num_train_epochs"] == "1"
    assert "cached_val_dataset" not in settings
    validation = settings_of("ms-swift", WITH_VALIDATION)["cached_val_dataset"]
    assert validation == f"{FACTS.directory}/all_hf/validation"


def test_litgpt_is_a_script_that_reads_in_order() -> None:
    assert {FACTS.directory, FACTS.model, "--train.epochs=1", False, "train[:1]"} <= constants("litgpt", FACTS)
    assert {"validation", "--eval.final_validation=true"} <= constants("litgpt", WITH_VALIDATION)


def test_unsloth_says_that_it_was_not_run_and_checks_first() -> None:
    text = recipe_of("unsloth", FACTS)
    assert "NOT RUN" in text
    assert {FACTS.directory, FACTS.model, "sequential", 31} <= constants("unsloth", FACTS)
    assert text.index("check_batches(MASKED") < text.index("trainer.train(")


@pytest.mark.parametrize("trainer", ["llama-factory", "ms-swift"])
def test_without_the_saved_copy_the_error_says_how_to_make_it(trainer: str) -> None:
    with pytest.raises(ConfigError, match=r"no all_hf.*--layout concatenated"):
        recipe_of(trainer, replace(FACTS, layouts=("jsonl",)))


def test_the_command_line_and_the_overview_name_every_trainer() -> None:
    help_line = re.search(r"\| `TRAINER` \| (.*?) \|", (ROOT / "docs" / "cli.md").read_text(encoding="utf-8"))
    assert help_line
    assert re.split(r", | or ", help_line[1].rstrip(".")) == list(TRAINERS)
    overview = (ROOT / "docs" / "trainers" / "README.md").read_text(encoding="utf-8")
    assert all(f"({name}.md)" in overview for name in TRAINERS)
