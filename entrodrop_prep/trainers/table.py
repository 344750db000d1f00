"""The trainers: what a recipe says of each, and how large its steps are. Its template is ``templates/NAME.*.j2``."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Trainer:
    """What a recipe for one trainer begins with.

    Attributes:
        what: paragraph on the trainer and on how to run the file.
        form: ``py``, ``yaml`` or ``sh``: what the recipe is, and so how values in it are quoted.
        batch: rows in a batch.
        accumulate: batches in an optimizer step.
        divides: whether the recipe can divide the loss by the trainable tokens before dropping.
        keeps_apart: whether it can keep the documents of a packed row apart. Such a row is then a batch, with as many
            more to a step: the attention takes memory by the square of the tokens in a batch.
        reads_saved: its name, where it reads nothing but the copy of the rows that ``save_to_disk`` made.
    """

    what: str
    form: str
    batch: int = 4
    accumulate: int = 4
    divides: bool = False
    keeps_apart: bool = False
    reads_saved: str = ""


TRAINERS = {
    "transformers": Trainer(
        "transformers.Trainer on a masked dataset. Run this file with Python; run it again to resume where it was "
        "stopped. In several processes (torchrun) each batch goes to one of them, and a step holds the same rows "
        "as in one process with as many batches more to accumulate.",
        form="py",
        divides=True,
        keeps_apart=True,
    ),
    "trl": Trainer(
        "TRL's SFTTrainer on a masked dataset: rows that have input_ids and labels are taken as they are. Run "
        "this file with Python; run it again to resume where it was stopped.",
        form="py",
        divides=True,
        keeps_apart=True,
    ),
    "axolotl": Trainer(
        "Axolotl on a masked dataset: axolotl train THIS_FILE. The same command resumes where it was stopped, in "
        "the middle of an epoch too. If it was killed while it wrote a checkpoint, delete that one first.",
        form="yaml",
    ),
    "llama-factory": Trainer(
        "LLaMA-Factory on a masked dataset: llamafactory-cli train THIS_FILE. The same command resumes where it "
        "was stopped, in the middle of an epoch too. If it was killed while it wrote a checkpoint, delete that "
        "one first.",
        form="yaml",
        reads_saved="LLaMA-Factory",
    ),
    "litgpt": Trainer(
        "LitGPT on a masked dataset. Run this file with Python; run it again to resume where it was stopped; if it "
        "was killed while it wrote a checkpoint, delete that one first. The model is a LitGPT checkpoint: a "
        "directory that `litgpt download` or `litgpt convert_to_litgpt` made. To accumulate, make "
        "global_batch_size a multiple of micro_batch_size; LitGPT makes no step of the batches left over at the "
        "end.",
        form="py",
        accumulate=1,
    ),
    "lightning": Trainer(
        "Lightning on a masked dataset. Run this file with Python; run it again to resume where it was stopped. "
        "accumulate_grad_batches averages the losses of batches, whatever number of labels each has: prefer a "
        "larger batch.",
        form="py",
        batch=16,
        accumulate=1,
        divides=True,
    ),
    "ms-swift": Trainer(
        "ms-swift on a masked dataset: bash THIS_FILE. Rows that are tokenized already are taken as they are only "
        "with both --truncation_strategy split and --lazy_tokenize true; nothing is split or tokenized then. Its "
        "own documentation does not mention this use: prove it again with another version than 4.6. Where "
        "ms-swift cannot determine the model's type, append --model_type; to resume where it was stopped, "
        "--resume_from_checkpoint and the newest whole checkpoint-N in the folder of --output_dir.",
        form="sh",
        reads_saved="ms-swift",
    ),
    "unsloth": Trainer(
        "Unsloth on a masked dataset. NOT RUN by us: Unsloth refuses to start without a GPU. This script follows "
        "the source of Unsloth 2026.10.9, which takes rows that have labels as they are and gives them to "
        "DataCollatorForSeq2Seq. The check before training compares the first batches with the files. Run this "
        "file with Python; run it again to resume where it was stopped.",
        form="py",
    ),
}
