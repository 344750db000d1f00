"""Scores and a recipe from a dataset repository on the Hub: only the files that masks are made from."""

from __future__ import annotations

from pathlib import Path

from entrodrop_prep.store.layout import RECIPE, SCORED_FOLDER
from entrodrop_prep.store.published import download

FILES = (
    "manifest.json",
    RECIPE,
    "unigram.npy",
    "tokenizer/*",
    "shard-*.parquet",
    f"{SCORED_FOLDER}/*",
)
"""Of a scored directory at the root, and of a masked one with the scores beside it; no masked row is fetched."""


def fetch(repo: str, revision: str | None, token: str | None) -> Path:
    """A folder in the cache of ``huggingface_hub`` with the repository's ``FILES``; what is there is not fetched again.

    Raises HubError where the repository, the revision or the Hub cannot be had.
    """
    return download(repo, revision, list(FILES), token)
