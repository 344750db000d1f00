"""What turns token ids into scores. A backend is looked up by name and imported on first use."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Protocol, cast

from entrodrop_prep.errors import ConfigError

if TYPE_CHECKING:
    import numpy as np

    from entrodrop_prep.backends.model import ModelInfo
    from entrodrop_prep.backends.prefetch import PrefetchQueue
    from entrodrop_prep.config import ScoreConfig

    Scores = tuple[np.ndarray[Any, np.dtype[np.float32]], ...]
    """Scores of one sequence of T tokens: ``(entropy [T-1] float32, logprob [T-1] float32)``, both in nats.

    Index i belongs to the prediction of token i+1 from tokens 0 to i: entropy is H(p(. | x_0..x_i)) over the full
    vocabulary, logprob is log p(x_(i+1) | x_0..x_i).
    """

BACKENDS = {
    "transformers": "entrodrop_prep.backends.transformers:TransformersBackend",
    "vllm": "entrodrop_prep.backends.vllm:VllmBackend",
    "server": "entrodrop_prep.backends.server.backend:ServerBackend",
}


class Backend(Protocol):
    """Gives the entropy and the log-probability of every token of many sequences.

    Attributes:
        step_tokens: tokens that one step of an engine takes, as far as is known.
    """

    step_tokens: int

    def environment(self) -> dict[str, str]:
        """Versions and device that may change the last digits of a score; recorded in every shard."""

    def score(self, jobs: PrefetchQueue, done: Callable[[Any, int], None]) -> Iterator[tuple[Any, list[Scores]]]:
        """Score the jobs of a feed, each as a whole, in any order, as many at once as is good for speed.

        Args:
            jobs: shards to score; a backend that still has work takes the next without waiting.
            done: called with a job and a number of its tokens that are finished, as work proceeds; with a negative
                number where work was lost and is done again.

        Yields:
            Each job with the scores of its sequences in order: ``(entropy [T-1] float32, logprob [T-1] float32)``,
            nats; index i belongs to token i+1. The arithmetic of the reduction is float32 over the full vocabulary.

        Raises:
            ScoreError: there is nothing left to score with, or what it gives cannot be used.
        """

    def each(self) -> Iterator[tuple[str, Backend]]:
        """What scores side by side in it, each as a backend with a name, for the self-check. Only the whole is closed.

        Only those with vLLM have it.
        """

    def close(self) -> None:
        """End what was started. Safe to call twice."""


def choose(config: ScoreConfig, info: ModelInfo) -> tuple[str, str]:
    """The backend that ``--backend`` means, and why where it is ``auto``."""
    from entrodrop_prep.backends.architectures import why_not

    if config.backend != "auto":
        return config.backend, ""
    if config.server:
        return "server", "--server names one"
    reason = why_not(info.architecture, info.dtype, config.device)
    if config.trust_remote_code or config.compile:
        reason = "it is code of the model's own" if config.trust_remote_code else "--compile is for it"
    if reason is None:
        return "vllm", f"vLLM is installed and proven for {info.architecture}"
    for name in config.of_engines:
        raise ConfigError(
            f"{name} applies to vLLM's engines, and --backend auto takes transformers: {reason}",
            fix=f"leave out {name}, or give --backend vllm",
        )
    return "transformers", reason


def load_backend(name: str, config: ScoreConfig, info: ModelInfo) -> Backend:
    """Import and start a backend: load the model, or connect to servers; then the self-check of those with vLLM.

    Raises ConfigError, ModelError, or ScoreError where the self-check fails.
    """
    module, _, attribute = BACKENDS[name].partition(":")
    backend = cast("Backend", getattr(importlib.import_module(module), attribute)(config, info))
    if name != "transformers" and config.self_check:
        from entrodrop_prep.backends.self_check import self_check

        try:
            self_check(backend, config, info)
        except BaseException:
            backend.close()
            raise
    return backend
