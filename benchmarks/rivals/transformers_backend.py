"""``--backend transformers`` without the reading and writing. ``python transformers_backend.py MODEL TOKENS``"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
from common import measure, read_tokens

SHARD_ROWS = 1000
"""Batches are formed inside a shard: so many rows of it together."""


def main(model: str, tokens: str) -> None:
    from entrodrop_prep.backends.model import inspect_model
    from entrodrop_prep.backends.prefetch import score_all
    from entrodrop_prep.backends.transformers import TransformersBackend
    from entrodrop_prep.config import ScoreConfig

    config = ScoreConfig(source="-", model=model, out="-", dtype="float32", device="cpu", backend="transformers")

    def score(backend: Any, rows: list[list[int]]) -> None:
        arrays = [np.array(row, np.int32) for row in rows]
        for first in range(0, len(rows), SHARD_ROWS):
            score_all(backend, arrays[first : first + SHARD_ROWS])

    measure(read_tokens(tokens), lambda: TransformersBackend(config, inspect_model(config)), score)


if __name__ == "__main__":
    main(*sys.argv[1:])
