"""A stock vLLM asked for the top k log-probabilities of each prompt token. ``python top_k.py MODEL TOKENS K [ROWS]``

K -1 is the full vocabulary. The numbers are only taken out of the engine: no bound is computed from them.
"""

from __future__ import annotations

import json
import os
import sys
import time

from common import engine_environment, read_tokens

engine_environment()
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")


def main(model: str, tokens: str, k: str, limit: str = "0") -> None:
    from vllm import LLM, SamplingParams

    rows = read_tokens(tokens)
    rows = rows[: int(limit)] if int(limit) else rows
    longest = max(map(len, rows))
    begun = time.monotonic()
    llm = LLM(
        model=model,
        dtype="float32",
        enforce_eager=True,
        skip_tokenizer_init=True,
        enable_prefix_caching=False,
        max_model_len=longest + 1,
        max_num_batched_tokens=8192,
        max_logprobs=int(k),
    )
    parameters = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=int(k), detokenize=False)
    prompts = [{"prompt_token_ids": row} for row in rows]
    llm.generate(prompts[:4], parameters, use_tqdm=False)
    start = time.monotonic() - begun
    begun = time.monotonic()
    llm.generate(prompts, parameters, use_tqdm=False)
    print(json.dumps({"tokens": sum(map(len, rows)), "seconds": time.monotonic() - begun, "start": start}))


if __name__ == "__main__":
    main(*sys.argv[1:])
