"""One vLLM engine in a process of its own, fed over a socket: ``... vllm_plugin.worker FD TMPDIR``.

Messages are pickled tuples. To the worker: a dictionary of options for ``vllm.LLM`` first, then jobs
``(key, ids [N] int32, lengths [R] int64)``, R sequences one after the other. From it: ``("ready", environment)`` or
``("failed", reason)`` once; then ``("step", {key: tokens})`` after each step of the engine, with the tokens of the
sequences that it finished, and ``("scores", key, [N, 2] float32)`` as ``entrodrop_prep.vllm_plugin.pooler`` gives them.
It ends when its parent closes the socket or dies, and at an error at once: a device that hangs must not hold it.
TMPDIR, which is its own, ends with it.
"""

from __future__ import annotations

import multiprocessing
import os
import queue
import sys
import threading
import traceback
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NoReturn

from entrodrop_prep.vllm_plugin import leftovers


class _Job:
    """Sequences of one job that come back in any order."""

    def __init__(self, lengths: Any) -> None:
        self.parts: list[Any] = [None] * len(lengths)
        self.left = len(lengths)


def main(descriptor: int) -> None:
    """Start the engine, then score until the parent is gone."""
    connection = Connection(descriptor)
    jobs: queue.SimpleQueue[Any] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(connection, jobs), daemon=True).start()
    options = jobs.get()
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # this process is the engine's own already
    from vllm import LLM, PoolingParams
    from vllm.inputs import TokensPrompt

    try:
        llm = LLM(**options)
    except (ValueError, RuntimeError, OSError, TypeError, AssertionError, KeyError, ImportError) as e:
        connection.send(("failed", f"{type(e).__name__}: {e}"))
        raise
    engine: Any = llm.llm_engine
    connection.send(("ready", _environment(engine)))
    parameters = PoolingParams(task="token_classify")
    open_jobs: dict[int, _Job] = {}
    while True:
        while not jobs.empty() or not engine.has_unfinished_requests():
            key, ids, lengths = jobs.get()
            open_jobs[key] = _Job(lengths)
            first = 0
            for i, length in enumerate(lengths.tolist()):
                prompt = TokensPrompt(prompt_token_ids=ids[first : first + length].tolist())
                engine.add_request(f"{key}/{i}", prompt, parameters)
                first += length
        _step(engine, open_jobs, connection)


def _step(engine: Any, open_jobs: dict[int, _Job], connection: Connection) -> None:
    """One step of the engine; what it finished is sent."""
    import numpy as np

    tokens: dict[int, int] = {}
    for output in engine.step():
        key, _, index = output.request_id.partition("/")
        job, scores = open_jobs[int(key)], output.outputs.data
        job.parts[int(index)] = scores.numpy()
        job.left -= 1
        tokens[int(key)] = tokens.get(int(key), 0) + len(scores)
    connection.send(("step", tokens))
    for key in tokens:
        if not open_jobs[key].left:
            connection.send(("scores", key, np.concatenate(open_jobs.pop(key).parts)))


def _listen(connection: Connection, jobs: queue.SimpleQueue[Any]) -> None:
    """Take messages off the socket at once, so that a parent who sends never waits for one who sends to it."""
    while True:
        try:
            jobs.put(connection.recv())
        except (EOFError, OSError):  # the parent is gone, whatever the engine is doing
            _end(0)


def _end(code: int) -> NoReturn:
    """End now, with the ranks of a tensor-parallel group; Python's own end may wait for the device."""
    for rank in multiprocessing.active_children():
        rank.kill()
    leftovers.clean(Path(sys.argv[2]))
    os._exit(code)


def _environment(engine: Any) -> dict[str, str]:
    """What may change the last digits of a score."""
    import torch
    import transformers
    import vllm
    from vllm.platforms import current_platform

    from entrodrop_prep.vllm_plugin.pooler import reduction_of

    config = engine.vllm_config
    name = current_platform.device_type
    return {
        "device": name if name == "cpu" else str(current_platform.get_device_name()),
        "vllm": vllm.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "head": str(config.model_config.head_dtype).removeprefix("torch."),
        "reduction": ", ".join(sorted(set(engine.apply_model(reduction_of)))),
        "tensor_parallel": str(config.parallel_config.tensor_parallel_size),
    }


if __name__ == "__main__":
    try:
        main(int(sys.argv[1]))
    except BaseException:  # noqa: BLE001 - whatever it is, it is shown, and the process ends
        traceback.print_exc()
        sys.stderr.flush()
        _end(1)
