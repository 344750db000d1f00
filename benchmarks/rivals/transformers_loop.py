"""A transformers loop: rows of like length in a batch, the head in chunks. ``python transformers_loop.py MODEL TOKENS``

What one writes without this project, and none of its code. A batch holds at most ``PADDED`` tokens: of 2,048, 4,096,
8,192 and 16,384 that was the fastest on two cores.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from common import measure, read_tokens
from transformers import AutoModelForCausalLM

PADDED = 2048
POSITIONS = 512
"""Whose logits are alive at once."""


def batches_of(rows: list[list[int]]) -> list[list[int]]:
    """Places of rows, sorted by length and cut into batches."""
    batches: list[list[int]] = [[]]
    for place in sorted(range(len(rows)), key=lambda i: len(rows[i])):
        if batches[-1] and len(rows[place]) * (len(batches[-1]) + 1) > PADDED:
            batches.append([])
        batches[-1].append(place)
    return batches


@torch.inference_mode()
def score(model: Any, rows: list[list[int]]) -> list[Any]:
    """Entropy and log-probability of every token, [T - 1, 2] a row."""
    scores: list[Any] = [None] * len(rows)
    for batch in batches_of(rows):
        longest = max(len(rows[place]) for place in batch)
        ids = torch.zeros((len(batch), longest), dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for i, place in enumerate(batch):
            ids[i, : len(rows[place])] = torch.tensor(rows[place])
            mask[i, : len(rows[place])] = 1
        hidden = model.model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        there = mask[:, 1:].bool()
        found = []
        for some, targets in zip(
            hidden[:, :-1][there].split(POSITIONS), ids[:, 1:][there].split(POSITIONS), strict=True
        ):
            logprobs = torch.log_softmax(model.lm_head(some).float(), -1)
            entropy = -(logprobs.exp() * logprobs).sum(-1)
            found.append(torch.stack([entropy, logprobs.gather(1, targets[:, None]).squeeze(1)], 1))
        for place, part in zip(batch, torch.cat(found).split([len(rows[p]) - 1 for p in batch]), strict=True):
            scores[place] = part.numpy()
    return scores


def main(path: str, tokens: str) -> None:
    rows = read_tokens(tokens)
    measure(rows, lambda: AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval(), score)


if __name__ == "__main__":
    main(*sys.argv[1:])
