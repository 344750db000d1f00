"""One rank of training runs on masked rows made on the fly; notes every batch that reaches the model.

    torchrun --nproc-per-node 2 programs/train.py JOBS

JOBS are [trainer|lightning, FOLDER, SETTINGS] each, as JSON, done one after the other. SETTINGS are those of the rows.
FOLDER gets ``NAME-RANK.json`` for each run: the ids and labels of each batch, padding left out.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import lightning
import torch
import torch.multiprocessing
from lightning.pytorch.callbacks import ModelCheckpoint
from transformers import DataCollatorForSeq2Seq, LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from entrodrop_prep import MaskedLoader, MaskedRows, recording
from entrodrop_prep.training.recording import pieces
from helpers.scored import VOCABULARY
from helpers.tokenizers import byte_bpe

BATCH, STOP = 4, 3
"""Rows in a batch of one rank; the step from which two ranks continue."""
RECIPE: dict[str, Any] = {"epochs": 2, "schedule": "linear", "max_rate": 1, "target": "both", "progress": "row"}


def small_model() -> LlamaForCausalLM:
    """A Llama of one layer; the same weights each time."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, max_position_embeddings=64, **sizes))


def collator() -> DataCollatorForSeq2Seq:
    """Pads labels with -100 and keeps them."""
    return DataCollatorForSeq2Seq(byte_bpe(), label_pad_token_id=-100)


def plain(batches: list[dict[str, Any]]) -> list[list[tuple[list[int], list[int]]]]:
    """(input_ids, labels) of the rows of each batch."""
    return [[(p.input_ids.tolist(), p.labels.tolist()) for p in pieces([batch])] for batch in batches]


def run_trainer(rows: MaskedRows, folder: Path, workers: int, step: int | None = None, **options: Any) -> Any:
    """One run of transformers.Trainer over all epochs, from the checkpoint at ``step`` on; what reached the model."""
    model = small_model()
    arguments = {
        "output_dir": str(folder / "run"),
        "num_train_epochs": 1,
        "train_sampling_strategy": "sequential",
        "per_device_train_batch_size": BATCH,
        "dataloader_num_workers": workers,
        "dataloader_pin_memory": False,
        "save_steps": 1,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
    }
    trainer = Trainer(
        model=model,
        args=TrainingArguments(**{**arguments, **options}),
        train_dataset=rows.dataset(),
        data_collator=collator(),
    )
    with recording(model) as batches:
        trainer.train(resume_from_checkpoint=str(folder / "run" / f"checkpoint-{step}") if step else None)
    return plain(batches)


class Training(lightning.LightningModule):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        loss: torch.Tensor = self.model(**batch).loss
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-4)


class Rows(lightning.LightningDataModule):
    """All epochs in one pass, or one epoch after the other."""

    def __init__(self, rows: MaskedRows, workers: int, by_epoch: bool, batch: int) -> None:
        super().__init__()
        self._rows, self._workers, self._by_epoch, self._batch = rows, workers, by_epoch, batch

    def train_dataloader(self) -> MaskedLoader:
        trainer: Any = self.trainer
        epoch = trainer.current_epoch if self._by_epoch else None
        stream = self._rows.stream(self._batch, rank=trainer.global_rank, world_size=trainer.world_size, epoch=epoch)
        return MaskedLoader(stream, num_workers=self._workers, collate_fn=collator())


def run_lightning(
    rows: MaskedRows,
    folder: Path,
    workers: int,
    step: int | None = None,
    by_epoch: bool = False,
    batch: int = BATCH,
    **options: Any,
) -> Any:
    """One run of Lightning, from the checkpoint at ``step`` on; what reached the model."""
    training = Training(small_model())
    checkpoints = ModelCheckpoint(folder / "run", "{step}", every_n_train_steps=1, save_top_k=-1)
    trainer = lightning.Trainer(
        **{
            "accelerator": "cpu",
            "max_epochs": RECIPE["epochs"] if by_epoch else 1,
            "reload_dataloaders_every_n_epochs": int(by_epoch),
            "logger": False,
            "callbacks": [checkpoints],
            "default_root_dir": folder,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            **options,
        }
    )
    with recording(training.model) as batches:
        checkpoint = str(folder / "run" / f"step={step}.ckpt") if step else None
        trainer.fit(training, Rows(rows, workers, by_epoch, batch), ckpt_path=checkpoint)
    return plain(batches)


def main() -> None:
    # A fork beside the threads of gloo now and then waits for ever: CPython may copy a lock that one of them holds.
    torch.multiprocessing.set_start_method("forkserver")
    torch.multiprocessing.set_forkserver_preload(["programs.train"])
    for kind, name, settings in json.loads(sys.argv[1]):
        folder = Path(name)
        rows = MaskedRows.open(**{**RECIPE, **settings}, cache_dir=folder / "cache")
        run: Any = {"trainer": run_trainer, "lightning": run_lightning}[kind]
        options: dict[str, Any] = {} if kind == "trainer" else {"strategy": "ddp", "devices": 2}
        for name, workers, step in (("whole", 2, None), ("resumed", 1, STOP)):
            came = run(rows, folder, workers, step, **options)
            rank = torch.distributed.get_rank()
            (folder / f"{name}-{rank}.json").write_text(json.dumps(came))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()  # threads of gloo that still run at the end abort a process now and then


if __name__ == "__main__":
    main()
