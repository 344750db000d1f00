"""The recipe for Lightning."""

from __future__ import annotations

from entrodrop_prep.trainers.facts import Facts
from entrodrop_prep.trainers.script import script

BATCH = 16
WHAT = (
    "Lightning on a masked dataset. Run this file with Python; run it again to go on where it was stopped. "
    "accumulate_grad_batches averages the losses of batches, whatever number of labels each has: prefer a larger batch."
)
SCRIPT = '''\
from itertools import islice

import lightning
import torch
from datasets import load_dataset
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq

from entrodrop_prep import check_batches

MASKED, MODEL = $masked, $model
OUT = $trained + MODEL.replace("/", "-")  # of these rows and this model: a run goes on from what is there


class Training(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.model = AutoModelForCausalLM.from_pretrained(MODEL).train()  # it comes without dropout

    def training_step(self, batch, batch_idx):
        return self.model(**batch).loss  #? !divides
        n_trainable = batch.pop("n_trainable").sum()  # before dropping  #? divides
        labels_left = (batch["labels"][:, 1:] != -100).sum()  #? divides
        return self.model(**batch).loss * labels_left / n_trainable  # the loss is a mean over those left  #? divides

    def validation_step(self, batch, batch_idx):  #? validates
        labels = int((batch["labels"] != -100).sum())  #? validates
        self.log("validation_loss", self.model(**batch).loss, batch_size=labels)  #? validates
#? validates
    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-4)


class Batches(DataLoader):
    """Goes on behind the batches that were trained on: Lightning keeps this state in its checkpoints."""

    done = 0

    def __iter__(self):
        for batch in islice(super().__iter__(), self.done, None):
            self.done += 1
            yield batch
        self.done = 0

    def state_dict(self):
        return {"done": self.done}

    def load_state_dict(self, state):
        self.done = state["done"]


training = Training()
tokenizer = AutoTokenizer.from_pretrained(MODEL)
if tokenizer.pad_token is None:
    tokenizer.pad_token = tokenizer.eos_token  # only fills up a batch: attention_mask 0, label -100
collator = DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=-100)  # pads labels and keeps them
rows = load_dataset(MASKED, split="train")$columns  # all epochs, one after the other
loader = Batches(rows, batch_size=$batch, shuffle=False, collate_fn=collator)
held_out = load_dataset(MASKED, split="validation")$held_out_columns  #? validates
held_out_loader = DataLoader(held_out, batch_size=$batch, collate_fn=collator)  #? validates
check_batches(MASKED, islice(loader, $checked), complete=False)  # is what comes what was written?
loader.done = 0
trainer = lightning.Trainer(
    max_epochs=1,  # the dataset holds every epoch already
    callbacks=[ModelCheckpoint(OUT, every_n_train_steps=$save_steps, save_last=True, save_top_k=0)],
    val_check_interval=$eval_steps,  # about once an epoch  #? validates
    logger=False,
)
trainer.fit(training, loader, ckpt_path="last")  #? !validates
trainer.fit(training, loader, held_out_loader, ckpt_path="last")  #? validates
training.model.save_pretrained(OUT)
tokenizer.save_pretrained(OUT)
'''


def recipe(facts: Facts) -> str:
    """A Python script."""
    return script(facts, WHAT, SCRIPT, BATCH)
