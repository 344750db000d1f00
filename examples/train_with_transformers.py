"""Train on a masked directory with transformers.Trainer, epoch after epoch, in the order of the files.

    python examples/train_with_transformers.py masked --model org/base-model --out trained

The epochs are one after the other in the dataset's default configuration, so one pass over it is the whole curriculum:
``num_train_epochs=1``, rows in order, and a collator that pads the labels and keeps them as they are.
"""

from __future__ import annotations

import argparse

from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq, Trainer, TrainingArguments


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("masked", help="directory that `entrodrop materialize` wrote")
    parser.add_argument("--model", required=True, help="model to train: directory or Hub id")
    parser.add_argument("--out", required=True, help="directory for the trained model")
    parser.add_argument("--batch", type=int, default=4, help="rows in one optimizer step")
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    given = parser.parse_args()

    dataset = load_dataset(given.masked, split="train")  # all epochs, one after the other
    tokenizer = AutoTokenizer.from_pretrained(given.model)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token  # only fills up a batch: attention_mask 0, label -100
    trainer = Trainer(
        model=AutoModelForCausalLM.from_pretrained(given.model),
        args=TrainingArguments(
            output_dir=given.out,
            num_train_epochs=1,  # the dataset holds every epoch already
            train_sampling_strategy="sequential",  # the order carries the curriculum
            per_device_train_batch_size=given.batch,
            learning_rate=given.learning_rate,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
        ),
        train_dataset=dataset,
        data_collator=DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=-100),
    )
    trainer.train()
    trainer.save_model(given.out)
    tokenizer.save_pretrained(given.out)


if __name__ == "__main__":
    main()
