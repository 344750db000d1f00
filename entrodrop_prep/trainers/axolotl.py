"""The recipe for Axolotl."""

from __future__ import annotations

from entrodrop_prep.trainers.facts import Facts
from entrodrop_prep.trainers.switches import settings
from entrodrop_prep.trainers.template import text

BATCH, ACCUMULATE = 4, 4
WHAT = (
    "Axolotl on a masked dataset: axolotl train THIS_FILE. The same command goes on where it was stopped, in the "
    "middle of an epoch too. If it was killed while it wrote a checkpoint, delete that one first."
)
SETTINGS = """\
base_model: $model
datasets:
  # All epochs, one after the other. Without `type`, as rows that have the three columns are taken as they are.
  - path: $masked
    split: train
test_datasets:  #? validates
  - path: $masked  #? validates
    split: validation  #? validates
shuffle_merged_datasets: false  # the default shuffles the rows
curriculum_sampling: true  # the default shuffles again when it forms batches; both lines are needed
num_epochs: 1  # the dataset holds every epoch already
sample_packing: false  # packing puts rows in another order
val_set_size: 0  # more would take rows out of the epochs
dataset_exact_deduplication: false
sequence_len: $longest
excess_length_strategy: raise  # the default leaves longer rows out
# Of these rows and this model: a run goes on from what is there, and takes the copy of the rows there as it is.
output_dir: $out
dataset_prepared_path: $prepared
micro_batch_size: $batch
gradient_accumulation_steps: $accumulate
learning_rate: 0.0001
optimizer: adamw_torch
lr_scheduler: linear
save_strategy: steps
save_steps: $save_steps
save_total_limit: 2
auto_resume_from_checkpoints: true
bf16: auto
fp16: false  # float32 where there is no bfloat16, as on a CPU
"""


def recipe(facts: Facts) -> str:
    """A YAML file."""
    return settings(facts, WHAT, SETTINGS, BATCH, ACCUMULATE, prepared=text(f"{facts.out}/prepared"))
