"""Scores of many models, one vLLM engine after the other in one process: starting Python again costs more than a model.

    python vllm_many_models.py PLAN.json OUT.npz

PLAN.json is a list of ``Job``; OUT.npz holds under each key what the plugin answered, [sum of lengths, 2] float32, or,
as text, the error of an engine that did not start; and under ``preempted KEY`` how often a row was put back. The last
line printed is the seconds of each.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from entrodrop_prep.backends.engine_args import engine_options
from entrodrop_prep.backends.model import inspect_model
from entrodrop_prep.config import ScoreConfig


@dataclasses.dataclass(frozen=True)
class Job:
    """One model and the rows to score with it: ``ids_of`` each length. ``options`` as ``--engine-arg`` has them."""

    key: str
    model: str
    lengths: tuple[int, ...]
    max_length: int
    batch_tokens: int
    options: tuple[str, ...] = ("num_gpu_blocks_override=64",)  # 1 GiB of cache takes longer to clear than all the rest
    logits_mib: int | None = None
    dtype: str = "float32"


def ids_of(length: int, vocabulary: int) -> np.ndarray[Any, np.dtype[np.int32]]:
    """The token ids [length] of a row, any of the vocabulary's."""
    return np.random.default_rng(length).integers(0, vocabulary, length, dtype=np.int32)


def answer(job: Job) -> np.ndarray[Any, Any]:
    """What an engine answers [sum of lengths, 2]; it is gone afterwards."""
    from vllm import LLM
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory
    from vllm.inputs import TokensPrompt

    os.environ.pop("ENTRODROP_LOGITS_MIB", None)
    if job.logits_mib is not None:
        os.environ["ENTRODROP_LOGITS_MIB"] = str(job.logits_mib)
    info = inspect_model(ScoreConfig(source="-", model=job.model, out="-", dtype=job.dtype))
    options = engine_options(
        job.model,
        info,
        max_length=job.max_length,
        batch_tokens=job.batch_tokens,
        cpu=True,
        trust_remote_code=False,
        allow_pickle=False,
        options=job.options,
    )
    try:
        llm = LLM(**options)
        prompts = [TokensPrompt(prompt_token_ids=ids_of(n, info.vocab_size).tolist()) for n in job.lengths]
        outputs = llm.encode(prompts, pooling_task="token_classify", use_tqdm=False)
        llm.llm_engine.engine_core.shutdown()
        return np.concatenate([np.asarray(output.outputs.data) for output in outputs])
    finally:
        cleanup_dist_env_and_memory()


def main(plan: Path, out: Path) -> None:
    """Run every job of the plan."""
    from vllm.model_executor.models import registry
    from vllm.triton_utils import dispatcher
    from vllm.v1.core.sched.scheduler import Scheduler

    registry._run_in_subprocess = lambda function: function()  # else each architecture costs another start of Python
    gc.collect = lambda generation=2: 0  # nine times an engine, each longer than the model runs
    rebind = dispatcher._rebind_kernels  # half of an engine's start, and done after the first one

    def rebind_once(overrides: Any) -> None:
        dispatcher._rebind_kernels = lambda overrides: None
        rebind(overrides)

    dispatcher._rebind_kernels = rebind_once
    put_back: list[Any] = []
    preempt = Scheduler._preempt_request

    def counted(self: Any, request: Any, *more: Any, **named: Any) -> None:
        put_back.append(request)
        preempt(self, request, *more, **named)

    Scheduler._preempt_request = counted
    results: dict[str, Any] = {}
    seconds = {}
    for job in [Job(**entry) for entry in json.loads(plan.read_text())]:
        begun = time.monotonic()
        put_back.clear()
        try:
            results[job.key] = answer(job)
        except Exception as e:  # noqa: BLE001 - the test of this model reports it, the others continue
            results[job.key] = np.array(f"{type(e).__name__}: {e}")
        results[f"preempted {job.key}"] = np.array(len(put_back))
        seconds[job.key] = round(time.monotonic() - begun, 1)
    np.savez(out, **results)
    print(json.dumps(seconds))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
