"""The transformers loop that people write: batches of 8 as the rows come, full logits, torch's Categorical.

``python plain_loop.py MODEL TOKENS``. None of this project's code.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from common import measure, read_tokens
from transformers import AutoModelForCausalLM

ROWS = 8


@torch.inference_mode()
def score(model: Any, rows: list[list[int]]) -> list[Any]:
    """Entropy and log-probability of every token, [T - 1, 2] a row."""
    scores = []
    for first in range(0, len(rows), ROWS):
        batch = rows[first : first + ROWS]
        longest = max(map(len, batch))
        ids = torch.tensor([row + [0] * (longest - len(row)) for row in batch])
        mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in batch])
        logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1].float()
        entropy = torch.distributions.Categorical(logits=logits).entropy()
        logprob = torch.log_softmax(logits, -1).gather(2, ids[:, 1:, None]).squeeze(2)
        both = torch.stack([entropy, logprob], 2)
        scores += [both[i, : len(row) - 1].numpy() for i, row in enumerate(batch)]
    return scores


def main(path: str, tokens: str) -> None:
    rows = read_tokens(tokens)
    measure(rows, lambda: AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval(), score)


if __name__ == "__main__":
    main(*sys.argv[1:])
