"""From logits to entropy and log-probability in one pass over them: a Triton kernel."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

COLUMNS = 4096
"""Of a row, read at once. Each of them keeps sums of its own, so that no sum has more terms than V / COLUMNS."""
WARPS = 32 if torch.version.hip is None else 16
"""A block of threads has at most 1,024 of them, and a warp of AMD's has 64."""
LOWEST = tl.constexpr(-3.4028234663852886e38)
"""Of the finite float32 numbers."""


@triton.jit  # type: ignore[untyped-decorator]
def _kernel(logits, targets, entropy, logprob, V, row_stride, column_stride, COLUMNS: tl.constexpr):  # type: ignore[no-untyped-def]
    """One row a program. With m the largest logit so far, s = sum exp(x - m) and t = sum exp(x - m) (x - m).

    Differences are cut at -1e4, whose exponential is 0: 0 * -inf would be NaN. m begins at a finite number.
    The arguments have no types: Triton would look their names up.
    """
    row = tl.program_id(0).to(tl.int64)
    logits += row * row_stride
    columns = tl.arange(0, COLUMNS)
    m = tl.full([COLUMNS], LOWEST, tl.float32)
    s = tl.zeros([COLUMNS], tl.float32)
    t = tl.zeros([COLUMNS], tl.float32)
    for start in range(0, V, COLUMNS):
        at = (start + columns).to(tl.int64)
        x = tl.load(logits + at * column_stride, mask=at < V, other=-float("inf")).to(tl.float32)
        largest = tl.where(x > m, x, m)
        d = x - largest
        d = tl.where(d < -1e4, -1e4, d)  # NaN stays NaN
        down = m - largest
        down = tl.where(down < -1e4, -1e4, down)
        e = tl.exp(d)
        scale = tl.exp(down)
        t = (t + s * down) * scale + e * d
        s = s * scale + e
        m = largest
    largest = tl.max(m, 0)
    down = m - largest
    down = tl.where(down < -1e4, -1e4, down)
    scale = tl.exp(down)
    t = tl.sum((t + s * down) * scale, 0)
    s = tl.sum(s * scale, 0)
    log_s = tl.log(s)
    h = log_s - t / s
    target = tl.load(targets + row)
    there = (target >= 0) & (target < V)
    x = tl.load(logits + tl.where(there, target, 0) * column_stride).to(tl.float32)
    tl.store(entropy + row, tl.where(h < 0.0, 0.0, h))
    tl.store(logprob + row, tl.where(there, x - largest - log_s, float("nan")))


def entropy_and_logprob(logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """As ``entrodrop_prep.vllm_plugin.reduce.entropy_and_logprob``; the logits are read once and left as they are.

    Args:
        logits: [n, V], float32, bfloat16 or float16, of any strides, on a GPU.
        targets: [n] int64.

    Returns:
        entropy [n] float32 and logprob [n] float32, nats.
    """
    n, vocab_size = logits.shape
    entropy, logprob = torch.empty((2, n), dtype=torch.float32, device=logits.device)
    if n:
        strides = logits.stride()
        _kernel[(n,)](
            logits, targets.contiguous(), entropy, logprob, vocab_size, *strides, COLUMNS=COLUMNS, num_warps=WARPS
        )
    return entropy, logprob
