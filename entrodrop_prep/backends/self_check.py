"""A fixed probe before the first shard: an engine that is wrong is stopped before it has cost a week."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from entrodrop_prep.backends.agreement import disagreement
from entrodrop_prep.backends.prefetch import score_all
from entrodrop_prep.errors import ModelError, ScoreError

if TYPE_CHECKING:
    from entrodrop_prep.backends import Backend, Scores
    from entrodrop_prep.backends.model import ModelInfo
    from entrodrop_prep.config import ScoreConfig

log = logging.getLogger(__name__)

LONGEST = 256
SMALL_BYTES = 1 << 30
"""Weights up to this size are also loaded by transformers, on the CPU, for comparison."""
REFERENCE_TOKENS = 64
REFERENCE = {"float32": 5e-3, "bfloat16": 0.5, "float16": 0.1}
"""Largest mean difference, nats, from transformers in float32: a wrong engine is off by whole nats."""


def self_check(backend: Backend, config: ScoreConfig, info: ModelInfo) -> None:
    """Every engine scores a probe whole, cut short, and among so many others that it must cut one into chunks.

    Raises ScoreError saying what differs: lengths, values that are no scores, one way from another, one engine from
    another, or the engine from transformers (where the weights are here and at most 1 GiB).
    """
    longest = min(LONGEST, info.max_length(config.max_length))
    generator = np.random.Generator(np.random.Philox(key=1))
    probe = generator.integers(0, info.vocab_size, longest, dtype=np.int32)
    first: Scores | None = None
    checked = 0
    for name, one in backend.each():
        whole = _check_one(one, name, probe, info)
        if first is None:
            first = whole
        else:
            _compare(first, whole, f"{name} and another", info)
        checked += 1
    against = "" if first is None or not _compare_with_transformers(probe, first, config, info) else "transformers"
    log.info(
        "self-check: the same scores whole, in chunks and cut short%s%s",
        f", by {checked} engines" if checked > 1 else "",
        f", and against {against}" if against else "",
    )


def _check_one(backend: Backend, name: str, probe: np.ndarray[Any, Any], info: ModelInfo) -> Scores:
    """The probe's scores by one engine, which agree however they are had."""
    of = f"{name}, " if name else ""
    whole: Scores = score_all(backend, [probe])[0]
    _check_values(whole, len(probe), of, info)
    copies = crowd(probe, backend.step_tokens)
    for i, (copy, scores) in enumerate(zip(copies, score_all(backend, copies), strict=True)):
        _compare(tuple(s[: len(copy) - 1] for s in whole), scores, f"{of}copy {i} of it in one batch", info)
    half = max(2, len(probe) // 2)
    start = score_all(backend, [probe[:half]])[0]
    _compare(tuple(s[: half - 1] for s in whole), start, f"{of}its first {half} tokens alone", info)
    return whole


def crowd(probe: np.ndarray[Any, Any], step: int) -> list[np.ndarray[Any, Any]]:
    """More copies of the probe than a step of ``step`` tokens takes, so that it ends within one of them.

    Before them goes a start of the probe whose length keeps the step's end off the seams between copies.
    """
    longest = len(probe)
    lead = next(n for n in range(max(2, longest // 3), longest + 2) if longest < 4 or (step - n) % longest)
    return [probe[:lead], *[probe] * (step // longest + 2)]


def _check_values(scores: Scores, length: int, of: str, info: ModelInfo) -> None:
    for values, low, high in zip(scores, (0.0, -math.inf), (math.log(info.vocab_size), 0.0), strict=True):
        if len(values) != length - 1:
            raise _failed(f"{of}{len(values)} scores for {length} tokens", info)
        if not np.isfinite(values).all():
            raise _failed(f"{of}scores that are not finite", info)
        if (values < low - 1e-3).any() or (values > high + 1e-3).any():
            raise _failed(
                f"{of}scores from {values.min():.4f} to {values.max():.4f}, outside {low:.4f} to {high:.4f}", info
            )


def _compare(expected: Scores, found: Scores, what: str, info: ModelInfo) -> None:
    differs = disagreement(expected, found, info.dtype)
    if differs is not None:
        raise _failed(f"{what}: {differs}", info)


def _compare_with_transformers(probe: Any, scores: Scores, config: ScoreConfig, info: ModelInfo) -> bool:
    """Whether the engine was compared; not where the weights are big or not on this machine."""
    import dataclasses

    from entrodrop_prep.backends.transformers import TransformersBackend

    if config.trust_remote_code or not 0 < _bytes_of_weights(config, info) <= SMALL_BYTES:
        return False
    settings = dataclasses.replace(
        config,
        backend="transformers",
        device="cpu",
        server=(),
        engine_arg=(),
        replicas="auto",
        logits_mib=None,
        dtype="float32",
    )
    length = min(len(probe), REFERENCE_TOKENS)
    try:
        reference = TransformersBackend(settings, dataclasses.replace(info, dtype="float32"))
    except ModelError as e:
        log.warning("self-check: not compared with transformers: %s", e)
        return False
    expected = score_all(reference, [probe[:length]])[0]
    for name, a, b in zip(("entropy", "log-probability"), expected, scores, strict=True):
        difference = float(np.abs(a - b[: length - 1]).mean())
        if not difference <= REFERENCE[info.dtype]:
            raise _failed(f"its {name} differs from that of transformers by {difference:.4f} nats on average", info)
    return True


def _bytes_of_weights(config: ScoreConfig, info: ModelInfo) -> int:
    """Size of the model's safetensors files on this machine, 0 where they are not here."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    if info.commit is None:
        directory = Path(config.model).expanduser()
    else:
        try:
            directory = Path(snapshot_download(config.model, revision=info.commit, local_files_only=True))
        except LocalEntryNotFoundError:
            return 0
    return sum(file.stat().st_size for file in directory.glob("*.safetensors"))


def _failed(what: str, info: ModelInfo) -> ScoreError:
    return ScoreError(
        f"the self-check found {what}",
        where=info.name,
        fix="the engine cannot be trusted with this model here: use --backend transformers, and report it "
        "(--no-self-check continues regardless)",
    )
