"""What turns token ids into scores. A backend is looked up by name and imported on first use."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol, cast

from entrodrop_prep.errors import ConfigError

if TYPE_CHECKING:
    import numpy as np

    from entrodrop_prep.backends.model import ModelInfo
    from entrodrop_prep.config import ScoreConfig

    Scores = tuple[np.ndarray[Any, np.dtype[np.float32]], np.ndarray[Any, np.dtype[np.float32]]]

BACKENDS = {"transformers": "entrodrop_prep.backends.transformers:TransformersBackend"}


class Backend(Protocol):
    """Gives the entropy and the log-probability of every token of many sequences."""

    def environment(self) -> dict[str, str]:
        """Versions and device that may change the last digits of a score; recorded in every shard."""

    def score(self, sequences: Sequence[np.ndarray[Any, Any]], done: Callable[[int], None]) -> list[Scores]:
        """Score sequences of one shard.

        Args:
            sequences: each ``input_ids [T] int32``, 2 <= T <= the model's context.
            done: called with the number of tokens finished, as work proceeds.

        Returns:
            For each sequence, in order, ``(entropy [T-1] float32, logprob [T-1] float32)``, nats; index i speaks of
            token i+1. The arithmetic of the reduction is float32 over the full vocabulary.

        Raises:
            ScoreError: the sequences do not fit in memory.
        """


def choose(name: str) -> str:
    """The backend that ``--backend`` means. ``auto`` is transformers."""
    return "transformers" if name == "auto" else name


def load_backend(name: str, config: ScoreConfig, info: ModelInfo) -> Backend:
    """Import and start a backend; this loads the model. Raises ConfigError for an unknown name."""
    if name not in BACKENDS:
        near = difflib.get_close_matches(name, BACKENDS, n=1)
        raise ConfigError(f"unknown backend {name!r}", fix=f"did you mean {near[0]}?" if near else "see --help")
    module, _, attribute = BACKENDS[name].partition(":")
    return cast("Backend", getattr(importlib.import_module(module), attribute)(config, info))
