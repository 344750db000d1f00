"""The trainers: what a recipe says of each, and how large its steps are. Its template is ``templates/NAME.*.j2``."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Trainer:
    """What a recipe for one trainer begins with.

    Attributes:
        what: paragraph on the trainer and on how to run the file.
        install: what pip installs for it.
        form: ``py``, ``yaml`` or ``sh``: what the recipe is, and so how values in it are quoted.
        batch: rows in a batch.
        accumulate: batches in an optimizer step.
        divides: whether the recipe can divide the loss by the trainable tokens before dropping.
        keeps_apart: whether it can keep the documents of a packed row apart. Such a row is then a batch, with as many
            more to a step: the attention takes memory by the square of the tokens in a batch.
        leaves_rest: whether it makes no step of the last batches where they are too few for one.
        masters: whether weights that are trained are float32 where bfloat16 is computed in.
        peft_apart: whether adapters need peft installed beside it.
        no_lora: why it has no recipe with adapters.
        reads_saved: its name, where it reads nothing but the copy of the rows that ``save_to_disk`` made.
    """

    what: str
    install: str
    form: str
    batch: int = 4
    accumulate: int = 4
    divides: bool = False
    keeps_apart: bool = False
    leaves_rest: bool = False
    masters: bool = True
    peft_apart: bool = False
    no_lora: str = ""
    reads_saved: str = ""


TRAINERS = {
    "transformers": Trainer(
        "transformers.Trainer on a masked dataset. Run this file with Python, in an environment with entrodrop-prep; "
        "run it again to resume where it was stopped. In several processes (torchrun) each batch goes to one of them, "
        "and a step holds the same rows as in one process with as many batches more to accumulate.",
        install="'transformers>=5.2' accelerate datasets",
        form="py",
        peft_apart=True,
        divides=True,
        keeps_apart=True,
    ),
    "trl": Trainer(
        "TRL's SFTTrainer on a masked dataset: rows that have input_ids and labels are taken as they are. Run "
        "this file with Python, in an environment with entrodrop-prep; run it again to resume where it was stopped.",
        install="'trl>=1.16'",
        form="py",
        peft_apart=True,
        divides=True,
        keeps_apart=True,
    ),
    "axolotl": Trainer(
        "Axolotl on a masked dataset: axolotl train THIS_FILE. The same command resumes where it was stopped, in "
        "the middle of an epoch too. If it was killed while it wrote a checkpoint, delete that one first.",
        install="axolotl==0.19.0",
        form="yaml",
        masters=False,
    ),
    "llama-factory": Trainer(
        "LLaMA-Factory on a masked dataset: llamafactory-cli train THIS_FILE. The same command resumes where it "
        "was stopped, in the middle of an epoch too. If it was killed while it wrote a checkpoint, delete that "
        "one first. On a CPU, or a GPU without bfloat16, it takes --dtype float32.",
        install="llamafactory==0.9.5",
        form="yaml",
        reads_saved="LLaMA-Factory",
    ),
    "litgpt": Trainer(
        "LitGPT on a masked dataset. Run this file with Python; run it again to resume where it was stopped; if it "
        "was killed while it wrote a checkpoint, delete that one first. The model is a LitGPT checkpoint: a "
        "directory that `litgpt download` or `litgpt convert_to_litgpt` made.",
        install="litgpt==0.5.13 datasets",
        form="py",
        accumulate=1,
        leaves_rest=True,
        no_lora="LitGPT's finetune_lora cannot resume a run that was stopped",
    ),
    "lightning": Trainer(
        "Lightning on a masked dataset. Run this file with Python, in an environment with entrodrop-prep; run it again "
        "to resume where it was stopped. accumulate_grad_batches averages the losses of batches, whatever number of "
        "labels each has: prefer a larger batch.",
        install="lightning 'transformers>=5.2' datasets",
        form="py",
        peft_apart=True,
        batch=16,
        accumulate=1,
        divides=True,
    ),
    "ms-swift": Trainer(
        "ms-swift on a masked dataset: bash THIS_FILE. Rows that are tokenized already are taken as they are only "
        "with both --truncation_strategy split and --lazy_tokenize true; nothing is split or tokenized then. Its "
        "own documentation does not mention this use: prove it again with another version than 4.6. Where "
        "ms-swift cannot determine the model's type, append --model_type; to resume where it was stopped, "
        "--resume_from_checkpoint and the newest whole checkpoint-N in the folder of --output_dir. On a CPU, or a GPU "
        "without bfloat16, it takes --dtype float32.",
        install="ms-swift==4.6.0",
        form="sh",
        reads_saved="ms-swift",
    ),
    "unsloth": Trainer(
        "Unsloth on a masked dataset. NOT RUN by us: Unsloth refuses to start without a GPU. This script follows "
        "the source of Unsloth 2026.10.9, which takes rows that have labels as they are and gives them to "
        "DataCollatorForSeq2Seq. The check before training compares the first batches with the files. Run this "
        "file with Python, in an environment with entrodrop-prep; run it again to resume where it was stopped.",
        install="unsloth==2026.10.9",
        form="py",
    ),
}
