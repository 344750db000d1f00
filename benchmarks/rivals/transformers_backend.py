"""``--backend transformers`` without the reading and writing. ``python transformers_backend.py MODEL TOKENS``"""

from __future__ import annotations

import json
import sys
import time

import numpy as np
from common import read_tokens


def main(model: str, tokens: str) -> None:
    from entrodrop_prep.backends.model import inspect_model
    from entrodrop_prep.backends.prefetch import score_all
    from entrodrop_prep.backends.transformers import TransformersBackend
    from entrodrop_prep.config import ScoreConfig

    rows = [np.array(row, np.int32) for row in read_tokens(tokens)]
    config = ScoreConfig(source="-", model=model, out="-", dtype="float32", device="cpu", backend="transformers")
    begun = time.monotonic()
    backend = TransformersBackend(config, inspect_model(config))
    score_all(backend, rows[:16])
    start = time.monotonic() - begun
    begun = time.monotonic()
    score_all(backend, rows)
    print(json.dumps({"tokens": sum(map(len, rows)), "seconds": time.monotonic() - begun, "start": start}))


if __name__ == "__main__":
    main(*sys.argv[1:])
