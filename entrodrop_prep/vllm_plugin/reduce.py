"""From logits to entropy and log-probability."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def entropy_and_logprob(logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Entropy of each row's distribution and the log-probability of its target.

    With z the logits, m = max z, d = z - m and s = sum exp(d):
    ``H = log s - sum(exp(d) d) / s`` and ``log p(target) = d[target] - log s`` (the definition of the Shannon entropy
    of softmax(z), with the maximum taken out so that nothing overflows).

    Args:
        logits: [n, V], any float dtype; row i is the distribution of one next token. -inf is probability zero.
            float32 logits are overwritten.
        targets: [n] int64, the token that came.

    Returns:
        entropy [n] float32 >= 0 and logprob [n] float32 <= 0, nats. NaN in a row of logits gives NaN.
    """
    d = logits.float()
    d = d.sub_(d.amax(-1, keepdim=True))
    target = d.gather(1, targets[:, None]).squeeze(1)
    p = d.exp()
    s = p.sum(-1)
    # 0 * -inf is NaN where a logit is -inf: such a token adds nothing to the sum.
    t = p.mul_(d.clamp_(min=-1e4)).sum(-1)
    log_s = s.log()
    entropy = log_s - t / s
    return entropy.clamp_min_(0.0), target - log_s
