"""Settings of ``recipe``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from entrodrop_prep.config.settings import Setting, validate


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """How a recipe trains. What is None is the trainer's own number in ``trainers.table``."""

    batch_size: Annotated[
        int | None, Setting("Rows in a batch of one process.", ge=1, role="operation", default_text="by trainer")
    ] = None
    grad_accum: Annotated[
        int | None, Setting("Batches in an optimizer step.", ge=1, role="operation", default_text="by trainer")
    ] = None
    lr: Annotated[float, Setting("Highest learning rate.", gt=0, role="operation")] = 1e-4
    lora: Annotated[
        int | None,
        Setting(
            "Train LoRA adapters of this rank on every linear layer, and nothing else.",
            ge=1,
            metavar="RANK",
            role="operation",
            default_text="all weights",
        ),
    ] = None
    dtype: Annotated[
        Literal["auto", "bfloat16", "float32"],
        Setting(
            "What is computed in: auto is bfloat16 where there is a GPU that has it. Weights that are trained are "
            "float32; the recipe says where they are not.",
            role="operation",
        ),
    ] = "auto"

    def __post_init__(self) -> None:
        validate(self)


@dataclass(frozen=True, kw_only=True)
class RecipeConfig(TrainingConfig):
    """Settings of ``entrodrop recipe``."""

    trainer: Annotated[
        str,
        Setting(
            "transformers, trl, axolotl, llama-factory, litgpt, lightning, ms-swift or unsloth.",
            argument=True,
            role="operation",
        ),
    ]
    directory: Annotated[str, Setting("Masked directory to train on.", argument=True, metavar="DIR", role="operation")]
    train_model: Annotated[
        str | None,
        Setting(
            "Model to train, a directory or a Hub id: its vocabulary, EOS, chat template and embeddings are compared "
            "with what the rows were made for. Without it the recipe names base-model.",
            metavar="MODEL",
            role="operation",
        ),
    ] = None
