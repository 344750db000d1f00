"""The recipe for ``transformers.Trainer``."""

from __future__ import annotations

from entrodrop_prep.trainers.facts import Facts
from entrodrop_prep.trainers.script import script

BATCH, ACCUMULATE = 4, 4
WHAT = (
    "transformers.Trainer on a masked dataset. Run this file with Python; run it again to go on where it was stopped. "
    "In several processes (torchrun) each batch goes to one of them, and a step holds the same rows as in one process "
    "with as many batches more to accumulate."
)
SCRIPT = '''\
from itertools import islice
from pathlib import Path

import torch  #? apart
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, ${seq2seq}Trainer, TrainingArguments

from entrodrop_prep import check_batches
from entrodrop_prep.training.losses import TrainableTokenLoss  #? divides

MASKED, MODEL = $masked, $model
OUT = $trained + MODEL.replace("/", "-")  # of these rows and this model: a run goes on from what is there

#? divides
class Training(TrainableTokenLoss, Trainer):  #? divides
    """Divides by the trainable tokens before dropping."""  #? divides
#? divides
#? divides
${collate}model = AutoModelForCausalLM.from_pretrained(MODEL)
tokenizer = AutoTokenizer.from_pretrained(MODEL)
if tokenizer.pad_token is None:  #? !apart
    tokenizer.pad_token = tokenizer.eos_token  # only fills up a batch: attention_mask 0, label -100  #? !apart
trainer = Trainer(  #? !divides
trainer = Training(  #? divides
    model=model,
    args=TrainingArguments(
        output_dir=OUT,
        num_train_epochs=1,  # the dataset holds every epoch already
        train_sampling_strategy="sequential",  # the default shuffles
        per_device_train_batch_size=$batch,
        gradient_accumulation_steps=$accumulate,
        learning_rate=1e-4,
        remove_unused_columns=False,  # n_trainable must reach the loss  #? divides
        logging_steps=1,
        save_steps=$save_steps,  # a stopped run goes on behind the last of these
        save_total_limit=2,
        eval_strategy="steps",  #? validates
        eval_steps=$eval_steps,  # about once an epoch  #? validates
        report_to=[],
    ),
    train_dataset=load_dataset(MASKED, split="train")$columns,  # all epochs, one after the other
    eval_dataset=load_dataset(MASKED, split="validation")$held_out_columns,  #? validates
    data_collator=DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=-100),  # pads labels and keeps them  #? !apart
    data_collator=collate,  #? apart
)
if trainer.args.world_size == 1:  # is what comes what was written? (of several processes each has a part of it)
    check_batches(MASKED, islice(trainer.get_train_dataloader(), $checked), complete=False)
whole = Path(OUT).glob("checkpoint-*/trainer_state.json")  # written last: a checkpoint without it is not whole
newest = max(whole, key=lambda state: int(state.parent.name.rpartition("-")[2]), default=None)
trainer.train(resume_from_checkpoint=newest and str(newest.parent))
trainer.save_model(OUT)
tokenizer.save_pretrained(OUT)
'''


def recipe(facts: Facts) -> str:
    """A Python script."""
    return script(facts, WHAT, SCRIPT, BATCH, ACCUMULATE, can_keep_apart=True)
