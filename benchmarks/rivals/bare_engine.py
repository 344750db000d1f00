"""vLLM with the plugin and nothing around it: all token lists in one call. ``python bare_engine.py MODEL TOKENS``"""

from __future__ import annotations

import json
import os
import sys
import time

from common import engine_environment, read_tokens

engine_environment()
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")


def main(model: str, tokens: str) -> None:
    from vllm import LLM

    from entrodrop_prep.backends.engine_args import engine_options
    from entrodrop_prep.backends.model import inspect_model
    from entrodrop_prep.config import ScoreConfig

    rows = read_tokens(tokens)
    config = ScoreConfig(source="-", model=model, out="-", dtype="float32")
    info = inspect_model(config)
    begun = time.monotonic()
    options = engine_options(
        model,
        info,
        max_length=info.max_length(None),
        batch_tokens=config.batch_tokens,
        cpu=True,
        trust_remote_code=False,
        allow_pickle=False,
        options=(),
    )
    llm = LLM(**options)
    prompts = [{"prompt_token_ids": row} for row in rows]
    llm.encode(prompts[:64], pooling_task="token_classify", use_tqdm=False)
    start = time.monotonic() - begun
    begun = time.monotonic()
    llm.encode(prompts, pooling_task="token_classify", use_tqdm=False)
    print(json.dumps({"tokens": sum(map(len, rows)), "seconds": time.monotonic() - begun, "start": start}))


if __name__ == "__main__":
    main(*sys.argv[1:])
