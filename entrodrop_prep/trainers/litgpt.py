"""The recipe for LitGPT."""

from __future__ import annotations

from entrodrop_prep.trainers.facts import Facts
from entrodrop_prep.trainers.switches import settings

BATCH = 4
WHAT = (
    "LitGPT on a masked dataset. Run this file with Python; run it again to go on where it was stopped; if it "
    "was killed while it wrote a checkpoint, delete that one first. The model is a LitGPT checkpoint: a directory that "
    "`litgpt download` or `litgpt convert_to_litgpt` made. To accumulate, make global_batch_size a multiple of "
    "micro_batch_size; LitGPT makes no step of the batches left over at the end."
)
SCRIPT = """\
import sys

import torch
from datasets import load_dataset
from litgpt.__main__ import main
from litgpt.data import DataModule, get_sft_collate_fn
from litgpt.prompts import Default
from torch.utils.data import DataLoader, Dataset

MASKED, MODEL = $masked, $model
OUT = $trained + MODEL.replace("/", "-")  # of these rows and this model: a run goes on from what is there


class Rows(Dataset):
    def __init__(self, split):
        self.rows = load_dataset(MASKED, split=split)  # all epochs, one after the other

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        row = self.rows[index]
        tokens = len(row["input_ids"])
        return {
            "input_ids": torch.tensor(row["input_ids"]),
            "labels": torch.tensor(row["labels"]),  # not shifted: LitGPT shifts them
            "token_counts": {"raw": tokens, "raw_plus_prompt_template": tokens},
        }


class Masked(DataModule):
    prompt_style = Default()  # no template

    def connect(self, tokenizer=None, batch_size=1, max_seq_length=None, **kwargs):
        self.batch_size = batch_size

    def loader(self, split):
        collate = get_sft_collate_fn(ignore_index=-100)  # pads labels and keeps them
        return DataLoader(Rows(split), batch_size=self.batch_size, shuffle=False, collate_fn=collate)

    def train_dataloader(self):
        return self.loader("train")

    def val_dataloader(self):
        return self.loader("validation")  #? validates
        return self.loader("train[:1]")  # there must be one; nothing is measured on it  #? !validates


if __name__ == "__main__":
    sys.argv[1:] = [
        "finetune_full",
        MODEL,
        "--data=__main__.Masked",
        "--train.epochs=1",  # the dataset holds every epoch already
        "--train.micro_batch_size=$batch",
        "--train.global_batch_size=$batch",
        "--train.lr_warmup_steps=$warmup",
        "--train.save_interval=$save_steps",
        "--eval.interval=1000000000",  # not while it trains: LitGPT would answer a question then, and has none
        "--eval.final_validation=true",  #? validates
        "--eval.final_validation=false",  #? !validates
        "--resume=auto",
        f"--out_dir={OUT}",
    ]
    main()
"""


def recipe(facts: Facts) -> str:
    """A Python script."""
    return settings(facts, WHAT, SCRIPT, BATCH, warmup=max(1, facts.steps(BATCH) // 20))
