"""Train in one of several processes; the first writes what came of it. Arguments: model, rows as JSON, folder."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import datasets
import torch
from transformers import AutoModelForCausalLM, DataCollatorForSeq2Seq, Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer

from entrodrop_prep.training.losses import TrainableTokenLoss

Row = dict[str, Any]
BATCH, RATE = 2, 0.05
ARGUMENTS: dict[str, Any] = {
    "num_train_epochs": 1,
    "train_sampling_strategy": "sequential",
    "per_device_train_batch_size": BATCH,
    "remove_unused_columns": False,
    "learning_rate": RATE,
    "lr_scheduler_type": "constant",
    "optim": "sgd",
    "max_grad_norm": 0,
    "logging_steps": 1,
    "logging_nan_inf_filter": False,
    "save_strategy": "no",
    "report_to": [],
    "use_cpu": True,
}


class Ours(TrainableTokenLoss, Trainer):
    pass


def trainer_of(cls: Any, model: Path, rows: list[Row], out: Path, *, loss_kwargs: bool = True, **more: Any) -> Any:
    from transformers import AutoTokenizer

    net = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    if not loss_kwargs:
        net.accepts_loss_kwargs = False
    tokenizer = AutoTokenizer.from_pretrained(model)
    functions = {"compute_loss_func": more.pop("compute_loss_func")} if "compute_loss_func" in more else {}
    own = {"max_length": None, "bf16": False} if issubclass(cls, SFTTrainer) else {}
    return cls(
        model=net,
        args=(SFTConfig if own else TrainingArguments)(output_dir=str(out), **own, **{**ARGUMENTS, **more}),
        train_dataset=datasets.Dataset.from_list(rows),
        data_collator=DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=-100),
        **({"processing_class": tokenizer} if own else {}),
        **functions,
    )


def trained(trainer: Any) -> dict[str, torch.Tensor]:
    """Weights after training, and the losses that the trainer logged."""
    trainer.train()
    losses = torch.tensor([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    return {n: p.detach() for n, p in trainer.model.named_parameters()} | {"losses": losses}


if __name__ == "__main__":
    model, rows, out = map(Path, sys.argv[1:])
    trainer = trainer_of(
        Ours, model, json.loads(rows.read_text()), out, gradient_accumulation_steps=3, ddp_backend="gloo"
    )
    found = trained(trainer)
    if trainer.args.process_index == 0:
        torch.save(
            {name.removeprefix("module."): value for name, value in found.items()}
            | {"processes": trainer.args.world_size},
            out.with_suffix(".pt"),
        )
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()  # threads of gloo that still run at the end abort a process now and then
