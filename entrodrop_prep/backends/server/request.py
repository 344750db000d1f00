"""What a vLLM server with the plugin is asked for, and its answer: ``POST /pooling``, 8 bytes a token.

The plugin in the server has reduced the logits (``entrodrop_prep.vllm_plugin.pooler``).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from entrodrop_prep.backends.plugin_response import problem_of, split_scores
from entrodrop_prep.backends.server.http import Unusable

if TYPE_CHECKING:
    from entrodrop_prep.backends import Scores
    from entrodrop_prep.backends.model import ModelInfo

Sequences = Sequence[np.ndarray[Any, Any]]

PATH = "/pooling"
MOST_SEQUENCES = 64
"""Of one request."""


def request_body(model: str, sequences: Sequences) -> bytes:
    """The request for the scores of ``sequences``, each ``input_ids [T] int32``."""
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


def answer_bytes(sequences: Sequences) -> int:
    """Bytes of the answer."""
    return 8 * sum(map(len, sequences))


def read_answer(answer: bytes, sequences: Sequences, info: ModelInfo) -> list[Scores]:
    """The scores in an answer, as ``Backend.score`` gives them.

    Raises Unusable for an answer that cannot be used, ScoreError for one that says the server is set up wrongly.
    """
    lengths = [len(s) for s in sequences]
    if len(answer) != answer_bytes(sequences):
        raise Unusable(f"its answer has {len(answer):,} bytes for {sum(lengths):,} tokens, not 8 a token")
    raw = np.frombuffer(answer, "<f4").reshape(-1, 2).astype(np.float32)
    problem = problem_of(raw, lengths, info.vocab_size)
    if problem is not None:
        raise Unusable(f"its answer cannot be used: {problem}")
    return split_scores(raw, lengths, info, "a server's answer")
