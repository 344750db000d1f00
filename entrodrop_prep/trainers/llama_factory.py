"""The recipe for LLaMA-Factory."""

from __future__ import annotations

from entrodrop_prep.trainers.facts import Facts
from entrodrop_prep.trainers.switches import saved_rows, settings
from entrodrop_prep.trainers.template import text

BATCH, ACCUMULATE = 4, 4
WHAT = (
    "LLaMA-Factory on a masked dataset: llamafactory-cli train THIS_FILE. The same command goes on where it was "
    "stopped, in the middle of an epoch too. If it was killed while it wrote a checkpoint, delete that one first."
)
SETTINGS = """\
model_name_or_path: $model
stage: sft  # the stage `pt` makes the labels anew
do_train: true
finetuning_type: full
tokenized_path: $rows  # all epochs, one after the other; no template is applied, no EOS added
dataset: masked  # any name: there must be one, and it is not looked at
template: empty  # as above
disable_shuffling: true  # the default shuffles
num_train_epochs: 1  # the dataset holds every epoch already
packing: false
# Of these rows and this model: a run goes on from what is there.
output_dir: $out
per_device_train_batch_size: $batch
gradient_accumulation_steps: $accumulate
learning_rate: 0.0001
logging_steps: 1
save_steps: $save_steps
save_total_limit: 2
eval_dataset: masked  # any name, as above: the split `validation` is taken  #? validates
eval_strategy: steps  #? validates
eval_steps: $save_steps  #? validates
report_to: none
# On a GPU add `bf16: true`.
"""


def recipe(facts: Facts) -> str:
    """A YAML file. Raises ConfigError where ``all_hf``, which LLaMA-Factory reads, is missing."""
    rows = text(saved_rows(facts, "LLaMA-Factory"))
    return settings(facts, WHAT, SETTINGS, BATCH, ACCUMULATE, rows=rows)
