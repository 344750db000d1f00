"""Runs in processes of their own, forked from one that has imported everything: each starts within a second."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from entrodrop_prep.config import MaterializeConfig, ScoreConfig
from entrodrop_prep.store.digest import ContentDigest
from entrodrop_prep.store.shards import read_footer

PRELOAD = [
    "pandas",
    "pyarrow.pandas_compat",
    "sentencepiece",
    "torch",
    "transformers",
    "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto",
    "transformers.models.llama.modeling_llama",
    "transformers.tokenization_utils_sentencepiece",
    "entrodrop_prep.backends.transformers",
    "entrodrop_prep.scoring.run",
    "entrodrop_prep.export.materialize",
    "helpers.scored",
]
Start = Callable[[str, dict[str, Any]], ForkServerProcess]


def run(kind: str, settings: dict[str, Any]) -> None:
    """What a forked process does."""
    import torch

    torch.set_num_threads(1)
    os.environ["HF_HUB_OFFLINE"] = "1"
    if kind == "score":
        from entrodrop_prep.scoring.run import score

        score(ScoreConfig(**{"backend": "transformers", **settings}))
    else:
        from entrodrop_prep.export.materialize import materialize

        materialize(MaterializeConfig(**settings))


def starter() -> Start:
    """A function that starts a run of ``score`` or ``materialize`` with some settings."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)

    def begin(kind: str, settings: dict[str, Any]) -> ForkServerProcess:
        process = context.Process(target=run, args=(kind, settings))
        process.start()
        return process

    warm = context.Process(target=time.sleep, args=(0,))  # the server has imported everything once this one ends
    warm.start()
    warm.join()
    return begin


def finish(*processes: ForkServerProcess) -> None:
    """Wait for runs that are to end well."""
    for process in processes:
        process.join()
        assert process.exitcode == 0


def names(out: Path) -> list[str]:
    """Names of all that lies below ``out``, which a living run may change: glob raises there, walk does not."""
    return [name for _, folders, files in os.walk(out) for name in folders + files]


def being_written(out: Path) -> bool:
    """Whether anything has a temporary name."""
    return any(name.startswith(".tmp-") for name in names(out))


def tables(directory: Path) -> dict[str, Any]:
    """Every Parquet file by its name."""
    return {p.relative_to(directory).as_posix(): pq.read_table(p) for p in sorted(directory.rglob("*.parquet"))}


def check_final_names(out: Path) -> int:
    """Every shard that has its name is whole; returns how many there are."""
    shards = sorted(out.rglob("*.parquet"))
    for shard in shards:
        content = ContentDigest(pq.read_schema(shard))
        with pq.ParquetFile(shard, page_checksum_verification=True) as f:
            for batch in f.iter_batches():
                content.update(batch)
        assert content.hexdigest() == read_footer(shard).content_digest
        assert not shard.name.startswith(".")
    return len(shards)
