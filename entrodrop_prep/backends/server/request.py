"""What a vLLM server is asked for, and its answer: exact scores from the plugin, or the top k of a stock server."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from entrodrop_prep.backends.bounds import entropy_bounds
from entrodrop_prep.backends.plugin_response import problem_of, split_scores
from entrodrop_prep.backends.server.http import Denied, Server, Unusable
from entrodrop_prep.errors import ConfigError, EntrodropError

if TYPE_CHECKING:
    from entrodrop_prep.backends import Scores
    from entrodrop_prep.backends.model import ModelInfo

Sequences = Sequence[np.ndarray[Any, Any]]

NO_CHANCE = -9999.0
"""What vLLM's JSON has in place of minus infinity."""
NO_TOKEN = 2**30
_VOCABULARY = re.compile(r"vocabulary size: (\d+)", re.IGNORECASE)


class ScoreRequest(Protocol):
    """A kind of request.

    Attributes:
        path: route of the request.
        most_sequences: sequences of one request, at most.
        room: tokens that the server must have room for beyond those of a sequence.
    """

    path: str
    most_sequences: int
    room: int

    def body(self, model: str, sequences: Sequences) -> bytes:
        """The request for the scores of ``sequences``, each ``input_ids [T] int32``."""

    def most_bytes(self, sequences: Sequences) -> int:
        """Bytes that an answer has at most."""

    def read(self, answer: bytes, sequences: Sequences) -> list[Scores]:
        """The scores in an answer, as ``Backend.score`` gives them.

        Raises Unusable for an answer that cannot be used, ScoreError for one that says the server is set up wrongly.
        """

    def explain(self, denied: Denied) -> EntrodropError:
        """Why a server does not answer such requests at all, and what to do."""

    def check(self, server: Server, model: str, timeout: float) -> None:
        """What ``read`` cannot see. Raises ConfigError, or Trouble."""


class ExactQuery:
    """``POST /pooling``: 8 bytes a token, which the plugin in the server reduced (``entrodrop_prep.engine.pooler``)."""

    path, most_sequences, room = "/pooling", 64, 0

    def __init__(self, info: ModelInfo) -> None:
        self.info = info

    def body(self, model: str, sequences: Sequences) -> bytes:
        """See ``ScoreRequest.body``."""
        return json.dumps(
            {
                "model": model,
                "input": [s.tolist() for s in sequences],
                "task": "token_classify",
                "encoding_format": "bytes_only",
                "embed_dtype": "float32",
                "endianness": "little",
                "add_special_tokens": False,
            }
        ).encode()

    def most_bytes(self, sequences: Sequences) -> int:
        """See ``ScoreRequest.most_bytes``."""
        return 8 * sum(map(len, sequences))

    def read(self, answer: bytes, sequences: Sequences) -> list[Scores]:
        """See ``ScoreRequest.read``."""
        lengths = [len(s) for s in sequences]
        if len(answer) != self.most_bytes(sequences):
            raise Unusable(f"its answer has {len(answer):,} bytes for {sum(lengths):,} tokens, not 8 a token")
        raw = np.frombuffer(answer, "<f4").reshape(-1, 2).astype(np.float32)
        problem = problem_of(raw, lengths, self.info.vocab_size)
        if problem is not None:
            raise Unusable(f"its answer cannot be used: {problem}")
        return split_scores(raw, lengths, self.info, "a server's answer")

    def explain(self, denied: Denied) -> EntrodropError:
        """See ``ScoreRequest.explain``."""
        return ConfigError(
            f"the server gives no token entropies ({denied})",
            fix="start it with `entrodrop serve MODEL`: it needs the plugin and --runner pooling",
        )

    def check(self, server: Server, model: str, timeout: float) -> None:
        """See ``ScoreRequest.check``. The plugin's answer has it all."""


class TopKQuery:
    """``POST /v1/completions`` of a stock server: bounds of the entropy, from the k most probable tokens."""

    path, most_sequences, room = "/v1/completions", 16, 1

    def __init__(self, info: ModelInfo, k: int) -> None:
        self.info, self.k = info, min(k, info.vocab_size)

    def body(self, model: str, sequences: Sequences, **more: Any) -> bytes:
        """See ``ScoreRequest.body``."""
        return json.dumps(
            {
                "model": model,
                "prompt": [s.tolist() for s in sequences],
                "max_tokens": 1,
                "temperature": 0,
                "prompt_logprobs": self.k,
                "add_special_tokens": False,
                **more,
            }
        ).encode()

    def most_bytes(self, sequences: Sequences) -> int:
        """See ``ScoreRequest.most_bytes``: a token's id, its log-probability, its rank and its text, k + 1 times."""
        return 512 * (self.k + 1) * sum(map(len, sequences))

    def read(self, answer: bytes, sequences: Sequences) -> list[Scores]:
        """See ``ScoreRequest.read``."""
        try:
            choices = sorted(json.loads(answer)["choices"], key=lambda choice: int(choice["index"]))
            positions = [choice["prompt_logprobs"] for choice in choices]
            if [len(p) for p in positions] != [len(s) for s in sequences]:
                raise Unusable("its answer has not one prompt_logprobs entry a token")
            known = [
                {int(token): float(entry["logprob"]) for token, entry in position.items()}
                for sequence in positions
                for position in sequence[1:]
            ]
            actual = np.concatenate([s[1:] for s in sequences]).tolist()
            logprob = np.array([tokens[token] for tokens, token in zip(known, actual, strict=True)])
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as e:
            raise Unusable(f"its answer is not what vLLM's completions give: {type(e).__name__}: {e}") from e
        table = np.full((len(known), self.k + 1), -np.inf)
        for row, tokens in zip(table, known, strict=True):
            if not 0 < len(tokens) <= self.k + 1 or not 0 <= min(tokens) <= max(tokens) < self.info.vocab_size:
                raise Unusable(f"its answer has other tokens than the top {self.k} of {self.info.vocab_size}")
            row[: len(tokens)] = list(tokens.values())
        if not np.isfinite(logprob).all() or np.isnan(table).any():
            raise Unusable("its answer has log-probabilities that are not finite")
        low, high = entropy_bounds(table, self.k, self.info.vocab_size)
        logprob = np.where(logprob <= NO_CHANCE, -np.inf, logprob).astype(np.float32)
        ends = np.cumsum([len(s) - 1 for s in sequences])[:-1]
        return list(zip(*(np.split(values, ends) for values in (low, high, logprob)), strict=True))

    def explain(self, denied: Denied) -> EntrodropError:
        """See ``ScoreRequest.explain``."""
        if "prompt logprobs" in str(denied) or "max_logprobs" in str(denied):
            return ConfigError(
                f"the server gives fewer log-probabilities than --top-k {self.k} ({denied})",
                fix=f"start it with --max-logprobs {self.k}, or lower --top-k",
            )
        return ConfigError(
            f"the server does not complete text ({denied})",
            fix="--estimator topk needs a stock server with --runner generate; for one with the plugin "
            "(--runner pooling) leave --estimator topk out: its entropies are exact",
        )

    def check(self, server: Server, model: str, timeout: float) -> None:
        """See ``ScoreRequest.check``. A server refuses a bias for an unknown token."""
        body = self.body(model, [np.zeros(1, np.int32)], logit_bias={str(NO_TOKEN): 0.0})
        try:
            server.post(self.path, body, timeout, 0)
        except Denied as e:
            found = _VOCABULARY.search(str(e))
            if found is None or int(found[1]) == self.info.vocab_size:
                return
            raise ConfigError(
                f"it speaks of a vocabulary of {found[1]} tokens, the model has {self.info.vocab_size}",
                fix="serve the model that --model names",
            ) from e
