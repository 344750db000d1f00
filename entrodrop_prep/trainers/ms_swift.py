"""The recipe for ms-swift."""

from __future__ import annotations

from entrodrop_prep.trainers.facts import Facts
from entrodrop_prep.trainers.switches import saved_rows, settings
from entrodrop_prep.trainers.template import word

BATCH, ACCUMULATE = 4, 4
WHAT = (
    "ms-swift on a masked dataset: bash THIS_FILE. Rows that are tokenized already are taken as they are only with "
    "both --truncation_strategy split and --lazy_tokenize true; nothing is split or tokenized then. Its own "
    "documentation does not speak of this use: prove it again with another version than 4.6. Where ms-swift cannot "
    "tell the model's type, append --model_type; to go on where it was stopped, --resume_from_checkpoint and the "
    "newest whole checkpoint-N in the folder of --output_dir."
)
COMMAND = """\
settings=(
  --model $model
  --tuner_type full
  --cached_dataset $rows  # all epochs, one after the other
  --truncation_strategy split
  --lazy_tokenize true
  --train_dataloader_shuffle false  # the default shuffles
  --num_train_epochs 1  # the dataset holds every epoch already
  --packing false
  --padding_free false
  --cached_val_dataset $held_out  #? validates
  --output_dir $out
  --add_version false
  --per_device_train_batch_size $batch
  --gradient_accumulation_steps $accumulate
  --learning_rate 1e-4
  --logging_steps 1
  --save_steps $save_steps
  --save_total_limit 2
)
swift pt "$${settings[@]}" "$$@"
"""


def recipe(facts: Facts) -> str:
    """A script for Bash. Raises ConfigError where ``all_hf``, which ms-swift reads, is missing."""
    saved = saved_rows(facts, "ms-swift")
    rows, held_out = (word(f"{saved}/{split}") for split in ("train", "validation"))
    model, out = word(facts.model), word(facts.out)
    return settings(facts, WHAT, COMMAND, BATCH, ACCUMULATE, model=model, out=out, rows=rows, held_out=held_out)
