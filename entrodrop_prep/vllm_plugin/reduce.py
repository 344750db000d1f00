"""From logits to entropy and log-probability."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    Reduction = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]

log = logging.getLogger(__name__)

AGREEMENT = 1e-4
"""Nats by which the kernel and torch may differ on the probe: sums of 150,000 float32 terms in another order."""
PROBE_ROWS = 8
FAILURES = (AssertionError, AttributeError, ImportError, KeyError, OSError, RuntimeError, TypeError, ValueError)
"""What importing Triton raises, or compiling, beside its own errors: no C compiler, no driver, another version."""


def entropy_and_logprob(logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Entropy of each row's distribution and the log-probability of its target.

    With z the logits, m = max z, d = z - m and s = sum exp(d):
    ``H = log s - sum(exp(d) d) / s`` and ``log p(target) = d[target] - log s`` (the definition of the Shannon entropy
    of softmax(z), with the maximum taken out so that nothing overflows).

    Args:
        logits: [n, V], any float dtype; row i is the distribution of one next token. -inf is probability zero.
            float32 logits are overwritten.
        targets: [n] int64, the token that came; negative where none did.

    Returns:
        entropy [n] float32 >= 0 and logprob [n] float32 <= 0, nats. NaN in a row of logits gives NaN; so does, for
        logprob, a negative target.
    """
    d = logits.float()
    d = d.sub_(d.amax(-1, keepdim=True))
    target = d.gather(1, targets.clamp_min(0)[:, None]).squeeze(1).masked_fill_(targets < 0, float("nan"))
    p = d.exp()
    s = p.sum(-1)
    # 0 * -inf is NaN where a logit is -inf: such a token adds nothing to the sum.
    t = p.mul_(d.clamp_(min=-1e4)).sum(-1)
    log_s = s.log()
    entropy = log_s - t / s
    return entropy.clamp_min_(0.0), target - log_s


def choose_reduction(device: torch.device, vocab_size: int, dtype: torch.dtype) -> tuple[Reduction, str]:
    """The fastest reduction that works here, and its name: on a GPU the Triton kernel, once it agrees with torch.

    Args:
        device: where the logits are.
        vocab_size: their columns.
        dtype: of the model: logits are float32 or of this.

    Returns:
        A function like ``entropy_and_logprob``, and ``triton VERSION`` or ``torch``. Where the kernel cannot be
        compiled or differs from torch by more than ``AGREEMENT``, a warning says so.
    """
    if device.type != "cuda":
        return entropy_and_logprob, "torch"
    try:
        import triton

        from entrodrop_prep.vllm_plugin import fused

        failures = (triton.errors.TritonError, *FAILURES)
    except FAILURES as e:
        log.warning("the Triton kernel cannot be used (%s): logits are reduced by torch, which is slower", _line(e))
        return entropy_and_logprob, "torch"
    try:
        worst = _disagreement(fused.entropy_and_logprob, device, vocab_size, dtype)
    except failures as e:
        log.warning("the Triton kernel does not compile (%s): logits are reduced by torch, which is slower", _line(e))
        return entropy_and_logprob, "torch"
    if not worst <= AGREEMENT:
        log.warning("the Triton kernel is off by %.1e nats: logits are reduced by torch, which is slower", worst)
        return entropy_and_logprob, "torch"
    return fused.entropy_and_logprob, f"triton {triton.__version__}"


def _disagreement(reduction: Reduction, device: torch.device, vocab_size: int, dtype: torch.dtype) -> float:
    """The largest difference from torch on random logits, a few of them -inf, with one target absent; or NaN."""
    import torch

    generator = torch.Generator().manual_seed(0)
    logits = torch.randn((PROBE_ROWS, vocab_size), generator=generator, dtype=torch.float32, device="cpu").mul_(4.0)
    targets = torch.randint(vocab_size, (PROBE_ROWS,), generator=generator, device="cpu")
    logits[:, ::7] = -torch.inf
    logits.scatter_(1, targets[:, None], 1.0)
    targets[0] = -1
    worst = []
    for kind in dict.fromkeys((torch.float32, dtype)):
        some = logits.to(device, kind)
        found, wanted = (torch.stack(f(some.clone(), targets.to(device))) for f in (reduction, entropy_and_logprob))
        differences = (found - wanted).abs()
        differences[1, 0] = 0.0 if found[1, 0].isnan() else torch.inf
        worst.append(differences.max())
    return float(torch.stack(worst).max())


def _line(error: BaseException) -> str:
    """The last line of what an exception says, cut short: a compiler quotes the source before it."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[-1][:200]}"
