"""A vLLM pooler that turns hidden states into the entropy and the log-probability of every token."""

from __future__ import annotations

import os
from contextlib import nullcontext
from typing import Any

import torch
from vllm.model_executor.layers.pooler import Pooler
from vllm.model_executor.layers.pooler.common import PoolingParamsUpdate
from vllm.platforms import current_platform

from entrodrop_prep.vllm_plugin.head import HALF, tf32
from entrodrop_prep.vllm_plugin.reduce import choose_reduction

BUDGET_VARIABLE = "ENTRODROP_LOGITS_MIB"
DEFAULT_BUDGET_MIB = {"cpu": 16}
GPU_BUDGET_MIB = 1024
MISSING = -1.0
"""Stands for the entropy of a position that was never computed (it was served from a cache)."""


def rows_per_chunk(vocab_size: int, device: str) -> int:
    """Positions whose logits are alive at once: the byte budget over four float32 values a logit, at least one.

    The budget is ``ENTRODROP_LOGITS_MIB``, by default 1 GiB, and 16 MiB on a CPU, where a chunk that stays in the
    cache is faster. vLLM counts it in its own memory profile, because the pooler takes part in the profiling run.
    """
    budget = int(os.environ.get(BUDGET_VARIABLE) or DEFAULT_BUDGET_MIB.get(device, GPU_BUDGET_MIB)) << 20
    return max(1, budget // (16 * vocab_size))


class EntropyPooler(Pooler):  # type: ignore[misc]
    """Gives ``[T, 2]`` float32 for a sequence of T tokens, under vLLM's task ``token_classify``.

    Row i: the entropy in nats of the prediction after token i, and the log-probability it gives token i+1. The last
    row has no token i+1: there the second column is the vocabulary's size, a positive number that no
    log-probability is, by which a client knows who answered. An entropy of ``MISSING`` marks a row that was never
    computed. Everything is finite.
    """

    _model: Any

    def __init__(self, model: Any, vocab_size: int, dtype: torch.dtype) -> None:
        super().__init__()
        object.__setattr__(self, "_model", model)  # no child module: that would be a cycle, and new weight names
        self.vocab_size = vocab_size
        self._products = tf32 if dtype in HALF else nullcontext
        self._reduce, self.reduction = choose_reduction(torch.device(current_platform.device_type), vocab_size, dtype)

    def get_supported_tasks(self) -> set[Any]:
        """Per-token outputs."""
        return {"token_classify"}

    def get_pooling_updates(self, task: Any) -> PoolingParamsUpdate:
        """The pooler needs to know which token came next."""
        return PoolingParamsUpdate(requires_token_ids=True)

    @torch.inference_mode()
    def forward(self, hidden_states: torch.Tensor, pooling_metadata: Any) -> list[torch.Tensor | None]:
        """Scores of each sequence of this step; None for one whose prompt is not finished yet.

        ``hidden_states`` [N, D]: the step's positions, one sequence after the other.
        """
        cursor = pooling_metadata.get_pooling_cursor()
        counts = cursor.num_scheduled_tokens_cpu.tolist()
        ends = cursor.seq_lens_cpu.tolist()
        lengths = cursor.prompt_lens_cpu.tolist()
        targets = torch.full((sum(counts),), -1, dtype=torch.int64)
        first = 0
        for count, end, ids in zip(counts, ends, pooling_metadata.get_prompt_token_ids_cpu(), strict=True):
            following = ids[end - count + 1 : end + 1]  # one short where the sequence ends
            targets[first : first + len(following)] = following
            first += count
        scores = torch.split(self._scores(hidden_states[:first], targets), counts)
        results: list[torch.Tensor | None] = []
        for state, part, count, end, length in zip(
            pooling_metadata.pooling_states, scores, counts, ends, lengths, strict=True
        ):
            earlier = _realigned(state.hidden_states_cache, end - count, part)
            if end < length:
                state.hidden_states_cache[:] = [*earlier, part.clone()]
                results.append(None)
            else:
                results.append(torch.cat([*earlier, part]) if earlier else part)
                state.clean()
        return results

    def _scores(self, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """[N, 2] of hidden states [N, D] and the tokens that came [N] int64 (-1: none)."""
        if hidden.device.type != "cpu":
            targets = targets.pin_memory().to(hidden.device, non_blocking=True)
        result = hidden.new_empty((len(hidden), 2), dtype=torch.float32)
        rows = rows_per_chunk(self.vocab_size, hidden.device.type)
        for start in range(0, len(hidden), rows):
            part = slice(start, start + rows)
            with self._products():  # where vLLM's head is not bfloat16 or float16 with float32 sums anyway
                logits = self._model.compute_logits(hidden[part])
            if logits is None:  # a tensor-parallel rank to which nothing is gathered
                result[part] = MISSING
                continue
            if logits.shape[-1] < self.vocab_size:
                raise RuntimeError(f"the head gives {logits.shape[-1]} logits for a vocabulary of {self.vocab_size}")
            entropy, logprob = self._reduce(logits[:, : self.vocab_size], targets[part])
            result[part, 0] = entropy
            result[part, 1] = logprob.masked_fill_(targets[part] < 0, float(self.vocab_size))
        # JSON responses cannot carry what is not finite; the client refuses these values as it would NaN.
        return result.nan_to_num_(nan=MISSING, posinf=MISSING, neginf=-torch.finfo(torch.float32).max)


def reduction_of(model: Any) -> str:
    """What a variant reduces logits with; see ``choose_reduction``."""
    return str(model.pooler.reduction)


def _realigned(earlier: list[torch.Tensor], start: int, like: torch.Tensor) -> list[torch.Tensor]:
    """Rows [0, start) of a sequence from the steps before this one.

    A sequence that was preempted is computed again from an earlier position, one that was found in a prefix cache
    starts at a later one: the first has rows too many, the second lacks rows.
    """
    have = sum(len(part) for part in earlier)
    if have == start:
        return earlier
    kept = torch.cat(earlier)[:start] if earlier else like.new_empty((0, 2))
    return [kept, like.new_full((start - len(kept), 2), MISSING)]
