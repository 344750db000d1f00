"""The recipe for Unsloth."""

from __future__ import annotations

from entrodrop_prep.trainers.facts import Facts
from entrodrop_prep.trainers.switches import settings

BATCH, ACCUMULATE = 4, 4
WHAT = (
    "Unsloth on a masked dataset. NOT RUN by us: Unsloth refuses to start without a GPU. This script follows the "
    "source of Unsloth 2026.10.9, which takes rows that have labels as they are and gives them to "
    "DataCollatorForSeq2Seq. The check before training compares the first batches with the files. Run this file "
    "with Python; run it again to go on where it was stopped."
)
SCRIPT = """\
from itertools import islice
from pathlib import Path

from unsloth import FastLanguageModel  # isort: skip (before transformers and TRL, which it changes)

from datasets import load_dataset
from trl import SFTConfig, SFTTrainer

from entrodrop_prep import check_batches

MASKED, MODEL = $masked, $model
OUT = $trained + MODEL.replace("/", "-")  # of these rows and this model: a run goes on from what is there

model, tokenizer = FastLanguageModel.from_pretrained(
    MODEL,
    max_seq_length=$longest,  # of the longest row: longer ones are cut
    full_finetuning=True,
)
COLUMNS = ["input_ids", "attention_mask", "labels"]
trainer = SFTTrainer(
    model=model,
    args=SFTConfig(
        output_dir=OUT,
        num_train_epochs=1,  # the dataset holds every epoch already
        train_sampling_strategy="sequential",  # the default shuffles
        shuffle_dataset=False,
        max_length=$longest,
        packing=False,
        padding_free=False,  # Unsloth would choose by itself
        per_device_train_batch_size=$batch,
        gradient_accumulation_steps=$accumulate,
        learning_rate=1e-4,
        logging_steps=1,
        save_steps=$save_steps,
        save_total_limit=2,
        eval_strategy="steps",  #? validates
        eval_steps=$save_steps,  #? validates
        report_to=[],
    ),
    train_dataset=load_dataset(MASKED, split="train").select_columns(COLUMNS),  # all epochs, one after the other
    eval_dataset=load_dataset(MASKED, split="validation").select_columns(COLUMNS),  #? validates
    processing_class=tokenizer,
)
check_batches(MASKED, islice(trainer.get_train_dataloader(), 100), complete=False)  # is what comes what was written?
whole = Path(OUT).glob("checkpoint-*/trainer_state.json")  # written last: a checkpoint without it is not whole
newest = max(whole, key=lambda state: int(state.parent.name.rpartition("-")[2]), default=None)
trainer.train(resume_from_checkpoint=newest and str(newest.parent))
trainer.save_model(OUT)
tokenizer.save_pretrained(OUT)
"""


def recipe(facts: Facts) -> str:
    """A Python script, which was not run."""
    return settings(facts, WHAT, SCRIPT, BATCH, ACCUMULATE)
