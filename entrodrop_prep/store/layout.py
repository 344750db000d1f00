"""Names of the folders and files of scored and masked directories, and of a repository that holds one."""

from __future__ import annotations

EPOCHS = "epoch_*"
SHARD_FILES = f"{EPOCHS}/*.parquet"
PLAIN, VALIDATION = "plain", "validation"
OTHER_FILES = {PLAIN: "plain/train-*.parquet", VALIDATION: "validation/validation-*.parquet"}
SCORED_FILES = "shard-*.parquet"
TOKENIZER, UNIGRAM, REJECTED = "tokenizer", "unigram.npy", "rejected.jsonl"
"""What is beside the shards of a scored directory."""
SCORED_FOLDER = "scored"
"""Where a masked dataset's scores are published with it."""
RECIPE = "recipe.yaml"
"""The recipe that is published with a scored directory."""
