"""Scores from a transformers model: a causal language model, or the text side of a multimodal one.

Two ways to the logits. The general way calls the model and lets it make the logits of a bounded number of positions at
a time (``logits_to_keep``). The chunked-head way runs the model's body once and then only its tail (the head with
whatever scale, bias or soft cap the architecture has) on slices of the hidden states. The second is used once a probe
has shown that it gives the same scores as the first. The probe also shows that the model looks only back, and whether
the scores of a row change where others are padded beside it: then each row is scored by itself.

On a GPU nothing waits: one batch computes while the next is prepared, and scores leave the device once a batch.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import itertools
import logging
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from entrodrop_prep.backends.devices import (
    Computing,
    check_compiles,
    compile_layers,
    is_out_of_memory,
    pick_device,
    without_cudnn_attention,
)
from entrodrop_prep.backends.loading import load_model
from entrodrop_prep.backends.model import ModelInfo
from entrodrop_prep.errors import ModelError, ScoreError
from entrodrop_prep.vllm_plugin.head import HALF, give_float32
from entrodrop_prep.vllm_plugin.reduce import choose_reduction

if TYPE_CHECKING:
    from entrodrop_prep.backends import Scores
    from entrodrop_prep.backends.prefetch import PrefetchQueue, ShardTokens
    from entrodrop_prep.config import ScoreConfig

    Chunks = Iterator[tuple[torch.Tensor | slice, torch.Tensor]]
    """Which of a batch's N scored positions, counted row by row, and their logits [n, V]."""

log = logging.getLogger(__name__)

# Bytes of float32 logits alive at once. Small on a CPU, where a chunk that stays in the cache is faster.
LOGITS_BYTES = {"cpu": 16 << 20, "cuda": 1 << 30, "mps": 128 << 20}
PROBE_LENGTHS = (2, 17, 33)
PROBE_TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2, "float16": 1e-2}
PADDING_TOLERANCE = {"float32": 2e-5, "bfloat16": 2e-2, "float16": 5e-3}
"""Mean difference in nats, of any row of the probe, between a batch with padding and the row by itself."""
FAILURES = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    IndexError,
    KeyError,
    RuntimeError,
    TypeError,
    ValueError,
)
"""What a model raises that cannot run on token ids."""


class TransformersBackend:
    """A frozen model in eval and inference mode."""

    def __init__(self, config: ScoreConfig, info: ModelInfo) -> None:
        self.info = info
        self.device = pick_device(config.device)
        self.batch_tokens = config.batch_tokens
        self.compiled = config.compile
        if self.compiled:
            check_compiles(self.device)
        try:
            self.model: Any = load_model(config, info).to(self.device).eval()
            head = self.model.get_output_embeddings()
            self.head = ""
            if type(head) is torch.nn.Linear and head.weight.dtype in HALF:
                give_float32(head)
                self.head = ", float32"
            self.reduce, self.reduction = choose_reduction(self.device, info.vocab_size, getattr(torch, info.dtype))
            self.rows = max(1, LOGITS_BYTES[self.device.type] // (4 * info.vocab_size))
            self.keeps_logits = "logits_to_keep" in inspect.signature(self.model.forward).parameters
            self.body: Any = None
            self.masked = True
            self.alone = False
            self.chunked_head = self._probe()
        except RuntimeError as e:
            if not is_out_of_memory(e):
                raise
            raise ModelError(
                f"it does not fit in the memory of {self.device.type}",
                where=info.name,
                fix="use a smaller --dtype, another --device, or a smaller model",
            ) from e

    def environment(self) -> dict[str, str]:
        """Library versions, device and dtype path."""
        import tokenizers
        import transformers

        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else self.device.type
        return {
            "backend": "transformers",
            "device": name,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "tokenizers": tokenizers.__version__,
            "head": ("chunked" if self.chunked_head else "general") + self.head,
            "reduction": self.reduction,
            **({"layers": "compiled"} if self.compiled else {}),
        }

    def score(
        self, jobs: PrefetchQueue, done: Callable[[ShardTokens, int], None]
    ) -> Iterator[tuple[ShardTokens, list[Scores]]]:
        """See ``Backend.score``. Batches are formed inside one job, so that a resumed run has the same ones."""
        while (job := jobs.take()) is not None:
            yield job, self._job(job.sequences, functools.partial(done, job))

    def close(self) -> None:
        """Nothing was started."""

    def _job(self, sequences: Sequence[np.ndarray[Any, Any]], done: Callable[[int], None]) -> list[Scores]:
        """Sequences of like length share a batch, at most ``batch_tokens`` padded tokens; or none does."""
        order = sorted(range(len(sequences)), key=lambda i: -len(sequences[i]))
        results: list[Any] = [None] * len(sequences)
        waiting: deque[tuple[list[int], list[Computing]]] = deque()
        start = 0
        while start < len(order) or waiting:
            if start < len(order):
                width = len(sequences[order[start]])
                stop = start + (1 if self.alone else max(1, self.batch_tokens // width))
                batch = order[start:stop]
                waiting.append((batch, self._batch([sequences[i] for i in batch])))
                start = stop
            if len(waiting) > 1 or start >= len(order):
                batch, computing = waiting.popleft()
                for i, scores in zip(batch, (s for c in computing for s in c.scores()), strict=True):
                    results[i] = scores
                done(sum(len(sequences[i]) for i in batch))
        return results

    def _batch(self, sequences: list[np.ndarray[Any, Any]]) -> list[Computing]:
        """One forward pass; when memory runs out, two of half the rows."""
        try:
            return [self._forward(sequences, self.chunked_head)]
        except RuntimeError as e:  # torch.OutOfMemoryError is one; the CPU allocator raises the plain kind
            if not is_out_of_memory(e):
                raise
        # outside the except block, so that the traceback no longer holds the failed pass's tensors
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        if len(sequences) > 1:
            half = len(sequences) // 2
            self.batch_tokens = max(1, half * max(len(s) for s in sequences))
            log.warning("out of memory: continuing with batches of %d tokens", self.batch_tokens)
            return self._batch(sequences[:half]) + self._batch(sequences[half:])
        if self.rows > 16:
            self.rows //= 2
            return self._batch(sequences)
        raise ScoreError(
            f"one row of {len(sequences[0])} tokens does not fit in memory",
            where=self.info.name,
            fix="lower --max-length, or use a smaller --dtype",
        )

    @torch.inference_mode()
    def _forward(self, sequences: list[np.ndarray[Any, Any]], chunked_head: bool) -> Computing:
        """Scores of sequences padded on the right into one batch of B rows and T columns."""
        lengths = np.array([len(s) for s in sequences])
        there = np.arange(lengths.max()) < lengths[:, None]
        padded = np.zeros(there.shape, np.int64)
        padded[there] = np.concatenate(sequences)
        positions = np.flatnonzero(np.arange(there.shape[1]) < lengths[:, None] - 1)
        targets = self._on_device(padded.ravel()[positions + 1])
        ids, mask = self._on_device(padded), self._on_device(there)
        chunks = self._chunked(ids, mask, self._on_device(positions)) if chunked_head else self._general(ids, mask)
        scores = torch.empty((2, len(targets)), dtype=torch.float32, device=self.device)
        for some, logits in without_cudnn_attention(chunks):
            if logits.shape[-1] < self.info.vocab_size:
                raise ModelError(
                    f"its logits have {logits.shape[-1]} columns, its configuration says {self.info.vocab_size}",
                    where=self.info.name,
                    fix="correct the model's config.json",
                )
            scores[:, some] = torch.stack(self.reduce(logits[:, : self.info.vocab_size], targets[some]))
        return Computing(scores, lengths)

    def _on_device(self, values: np.ndarray[Any, Any]) -> torch.Tensor:
        """A copy on the device, for which nothing waits."""
        tensor = torch.from_numpy(values)
        if self.device.type == "cuda":
            tensor = tensor.pin_memory()
        return tensor.to(self.device, non_blocking=True)

    def _chunked(self, ids: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor) -> Chunks:
        """From the hidden states at ``positions`` [N], which count the places of the batch, and the model's tail."""
        output = self.body(input_ids=ids, attention_mask=mask.long() if self.masked else None, use_cache=False)
        hidden, ids = output.last_hidden_state.flatten(0, 1), ids.flatten()
        for i in range(0, len(positions), self.rows):
            some = positions[i : i + self.rows]
            with self._body_returns(dataclasses.replace(output, last_hidden_state=hidden[some][None])):
                logits = self.model(input_ids=ids[some][None], use_cache=False).logits[0]
            yield slice(i, i + self.rows), logits

    def _general(self, ids: torch.Tensor, mask: torch.Tensor) -> Chunks:
        """From plain calls of the model, each making the logits of at most ``self.rows`` positions."""
        together = self.keeps_logits and self.rows >= ids.shape[0]
        rows_at_once = ids.shape[0] if together else 1
        width = self.rows // rows_at_once if self.keeps_logits else ids.shape[1]
        counts = mask.sum(1) - 1
        before = counts.cumsum(0) - counts
        for first in range(0, ids.shape[0], rows_at_once):
            some, there = ids[first : first + rows_at_once], mask[first : first + rows_at_once]
            last = int(there.sum(1).max()) - 1
            for start in range(0, last, width):
                stop = min(start + width, last)
                keep = {"logits_to_keep": torch.arange(start, stop, device=self.device)} if self.keeps_logits else {}
                out = self.model(input_ids=some, attention_mask=there.long(), use_cache=False, **keep).logits
                out = out if self.keeps_logits else out[:, start:stop]
                rows, columns = there[:, start + 1 : stop + 1].nonzero(as_tuple=True)
                for i in range(0, len(rows), self.rows):
                    r, c = rows[i : i + self.rows], columns[i : i + self.rows]
                    yield before[r + first] + c + start, out[r, c]

    @contextmanager
    def _body_returns(self, output: Any) -> Iterator[None]:
        """Within the block the model's body returns ``output``, so calling the model runs its tail alone."""
        self.body.forward = lambda *args, **kwargs: output
        try:
            yield
        finally:
            del self.body.forward

    def _probe(self) -> bool:
        """Whether the chunked head gives this model's own scores, on rows of mixed lengths; if so, sets ``body``.

        Also finds out whether rows may share a batch (``self.alone``).

        Raises ModelError for a model whose scores of a token depend on what comes after it, or that cannot run.
        """
        generator = np.random.Generator(np.random.Philox(key=0))
        longest = min(self.info.context or max(PROBE_LENGTHS), max(PROBE_LENGTHS))
        probe = [generator.integers(0, self.info.vocab_size, min(n, longest), np.int32) for n in PROBE_LENGTHS]
        try:
            general = [self._scores([p], chunked_head=False)[0] for p in probe]
            other_ends = [np.append(p[:-1], (p[-1:] + 1) % self.info.vocab_size) for p in probe]
            after = [self._scores([p], chunked_head=False)[0] for p in other_ends]
            self.alone = self._depends_on_padding(probe, general)
        except FAILURES as e:
            if is_out_of_memory(e):
                raise
            raise ModelError(
                f"it cannot score a row of token ids, its forward pass raises {type(e).__name__}: {str(e)[:300]}",
                where=self.info.name,
                fix="check its config.json, and that it is a text model that this version of transformers runs",
            ) from e
        ahead = _worst([s[:1] for s in general], [s[:1] for s in after])
        if not ahead <= PROBE_TOLERANCE[self.info.dtype]:
            raise ModelError(
                f"what it predicts depends on what comes after (the entropy changes by {ahead:.1e})",
                where=self.info.name,
                fix="the reference model must look only back, as decoders do",
            )
        if self.compiled:
            general = self._compile(probe, general)
        # The body, as its class says; or what the model calls instead.
        bodies = dict.fromkeys((self.model.base_model, self.model.get_decoder()))
        for self.body, self.masked in itertools.product([b for b in bodies if b is not self.model], (False, True)):
            try:
                worst = _worst(general, [s for b in self._together(probe) for s in self._scores(b, chunked_head=True)])
            except FAILURES as e:
                if is_out_of_memory(e):
                    raise
                log.debug("the head cannot run on its own: %s", e)
                continue
            if worst <= PROBE_TOLERANCE[self.info.dtype]:
                return True
            log.debug("the head on its own differs by %.1e", worst)
        log.info("the head of %s cannot run on its own: using the general, slower way", self.info.name)
        return False

    def _compile(self, probe: list[np.ndarray[Any, Any]], general: list[Scores]) -> list[Scores]:
        """Compile the model's layers; its scores of the probe afterwards. Raises ModelError where they are others."""
        compile_layers(self.model, self.info.name)
        try:
            compiled = [self._scores([p], chunked_head=False)[0] for p in probe]
        except FAILURES as e:
            if is_out_of_memory(e):
                raise
            why = f"{type(e).__name__}: {' '.join(str(e).split())[:300]}"
            raise ModelError(f"--compile: it does not compile, {why}", where=self.info.name, fix="leave it out") from e
        changed = _mean(general, compiled)
        if not changed <= PROBE_TOLERANCE[self.info.dtype]:
            raise ModelError(
                f"--compile changes its scores, by {changed:.1e} nats on average",
                where=self.info.name,
                fix="leave it out",
            )
        return compiled

    def _scores(self, sequences: list[np.ndarray[Any, Any]], chunked_head: bool) -> list[Scores]:
        return self._forward(sequences, chunked_head).scores()

    def _together(self, sequences: list[np.ndarray[Any, Any]]) -> list[list[np.ndarray[Any, Any]]]:
        """The batches that sequences may form."""
        return [[s] for s in sequences] if self.alone else [sequences]

    def _depends_on_padding(self, probe: list[np.ndarray[Any, Any]], alone: list[Scores]) -> bool:
        """Whether scores of rows change by more than their last digits where shorter ones are padded beside them.

        In half precision any other batch changes single tokens by tenths: there the mean must be over that of a batch
        without padding too.
        """
        padded = _mean(alone, self._scores(probe, chunked_head=False))
        full = _mean(alone[-1:] * 3, self._scores(probe[-1:] * 3, chunked_head=False))
        if padded <= max(PADDING_TOLERANCE[self.info.dtype], 3 * full):
            return False
        log.warning(
            "%s: its scores change with padding, by %.1e nats on average: each row is scored by itself",
            self.info.name,
            padded,
        )
        return True


def _mean(some: Sequence[Scores], others: Sequence[Scores]) -> float:
    """The largest mean difference between two lists of scores, of the entropies or the log-probabilities."""
    differences = [
        [float(np.mean(np.abs(a - b))) for a, b in zip(x, y, strict=True)] for x, y in zip(some, others, strict=True)
    ]
    return float(np.max(differences))


def _worst(some: Sequence[Sequence[np.ndarray[Any, Any]]], others: Sequence[Sequence[np.ndarray[Any, Any]]]) -> float:
    """The largest difference between two lists of scores; NaN where there is one."""
    pairs = ((a, b) for x, y in zip(some, others, strict=True) for a, b in zip(x, y, strict=True))
    return max(float(np.max(np.abs(a - b), initial=0)) for a, b in pairs)
