"""What a scoring run will take, before it: ``score --dry-run``."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from entrodrop_prep.backends import choose, load_backend
from entrodrop_prep.backends.prefetch import PrefetchQueue
from entrodrop_prep.config import ScoreConfig
from entrodrop_prep.errors import SourceError
from entrodrop_prep.scoring.described import described
from entrodrop_prep.scoring.plan import Plan, make_plan
from entrodrop_prep.scoring.run import check_place
from entrodrop_prep.scoring.span import ShardInput, span_table, take_rows
from entrodrop_prep.sources.sample import Sample, sample
from entrodrop_prep.store import manifest
from entrodrop_prep.store.disk import scratch
from entrodrop_prep.store.environment import host_environment
from entrodrop_prep.store.shards import encoded_bytes, local_directory, shard_names
from entrodrop_prep.terminal.amounts import NOISE, Amount, peak_memory, size_text, time_text

PROBE_SECONDS = 5.0
"""The last piece that the backend scores takes so long; those before it are half as long, and a quarter, and so on."""
SHARDS_AT_ONCE = 6
"""Read ahead, scored and being written."""
TOKEN_BYTES = 48
"""Of a token in memory: ids, masks, scores, the table that is written."""
LISTED_BYTES, BESIDE_BYTES = 900, 1500
"""Digests and the entry in the manifest, of a shard; of the directory what the manifest and the note hold beside the
identity, which both of them do."""
WORKERS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


@dataclass(frozen=True)
class ScoreEstimate:
    """What scoring takes. Amounts are of the whole source; seconds and bytes of what an earlier run has left to do.

    Attributes:
        rows: rows of the source, those that are left out among them.
        tokens: to score, context of windows included.
        shards: files; ``there`` of them are finished.
        disk: bytes of the directory once it is finished, less what is there.
        memory_bytes: the most that the process took so far, and what the shards at hand take.
        gpu_bytes: the most of a GPU's memory that this process took; 0 without one, and where an engine has it.
        start: seconds until the first row is scored.
        scoring: seconds from then on.
        speed: tokens a second.
        bad_share: of rows that cannot be scored; ``bad_example`` says of one what is wrong.
        beginning: whether only the source's first rows could be looked at.
    """

    rows: Amount
    tokens: Amount
    trainable: Amount
    shards: int
    there: int
    disk: Amount
    memory_bytes: float
    gpu_bytes: int
    start: float
    scoring: Amount
    speed: float
    bad_share: float
    bad_example: str
    on_bad_row: str
    beginning: bool

    def seconds(self, workers: int) -> float:
        """With so many workers, each with as much as this one had: none is faster than the shards that it gets."""
        missing = self.shards - self.there
        return self.start + self.scoring.value * math.ceil(missing / workers) / max(1, missing)

    @property
    def lines(self) -> Iterator[str]:
        """The estimate as lines of text."""
        yield f"rows: {self.rows.text()}" + (", by the first ones alone" if self.beginning else "")
        yield f"tokens: {self.tokens.text()}, of which {self.trainable.text()} are trainable"
        if self.bad_share:
            then = "are left out" if self.on_bad_row == "skip" else "stop the run, but with --on-bad-row skip"
            yield f"bad rows: {self.bad_share:.2%}; they {then}; one of them: {self.bad_example}"
        yield f"shards: {self.shards:,}" + (f", of which {self.there:,} are finished" if self.there else "")
        yield f"disk: {self.disk.text(size_text)}"
        gpu = f", {size_text(self.gpu_bytes)} of the GPU's" if self.gpu_bytes else ""
        yield f"memory: about {size_text(self.memory_bytes)}{gpu}"
        yield f"time: {self.scoring.text(time_text)} at {self.speed:,.0f} tokens/s, after {time_text(self.start)}"
        several = [n for n in WORKERS if 1 < n <= self.shards - self.there]
        if several:
            times = ", ".join(f"{n} in {time_text(self.seconds(n))}" for n in several)
            yield f"workers: {times}; each with processors or a GPU of its own like here"


def estimate(config: ScoreConfig) -> ScoreEstimate:
    """What ``score`` with these settings takes. Nothing is written.

    Args:
        config: the settings, those of ``entrodrop score``.

    Returns:
        The estimate. Rows are sampled from all over the source by a fixed seed, and read whole where they are few.
        The backend is started as the run starts it, and scores some of them for a few seconds.

    Raises:
        EntrodropError: as ``score``, but for bad rows, which are counted.
    """
    begun = time.monotonic()
    out = local_directory(config.out)
    check_place(config.source, out)
    manifest.check_usable(out, "scored")
    plan, there = _plan(config, out)
    started = time.monotonic() - begun
    found = sample(plan.source, plan.columns, config.limit)
    begun = time.monotonic()
    span, parts = _encoded(plan, found)
    encoding = span.tokens / max(1e-9, time.monotonic() - begun)
    if not span.tokens:
        raise SourceError("no row of it can be scored", where=plan.source.name, fix="check its rows")
    rows = _total(found, [b.count for b in found.blocks], [b.size for b in found.blocks])
    tokens, trainable = (_total(found, [p[i] for p in parts], [b.taken for b in found.blocks]) for i in range(2))
    begun = time.monotonic()
    name, _ = choose(plan.config, plan.info)
    backend = load_backend(name, plan.config, plan.info)
    started += time.monotonic() - begun
    try:
        speed, spread, scores = _probe(backend, plan, span)
        made = {"environment": {**host_environment(), **backend.environment()}, "described": described(plan)}
    finally:
        backend.close()
    size = plan.config.rows_per_shard
    shards = max(1, math.ceil(rows.value / size))
    there = min(there, shards)
    left = 1 - there / shards
    stored, empty = _stored(plan, span, scores, found)
    footer = len(json.dumps({**made, "identity": plan.identity, "counts": span.counts})) + LISTED_BYTES
    disk = Amount(tokens.value * stored * left + (empty + footer) * (shards - there), max(0.02, tokens.error))
    speed = min(speed, encoding)
    per_shard = tokens.value / shards
    return ScoreEstimate(
        rows=rows,
        tokens=tokens,
        trainable=trainable,
        shards=shards,
        there=there,
        disk=Amount(disk.value + _beside(plan), disk.error),
        memory_bytes=peak_memory() + SHARDS_AT_ONCE * per_shard * TOKEN_BYTES,
        gpu_bytes=_gpu_peak(),
        start=started,
        scoring=Amount(tokens.value * left / speed, min(0.9, tokens.error + NOISE + spread)),
        speed=speed,
        bad_share=span.counts["bad_rows"] / max(1, span.counts["rows_read"]),
        bad_example=next((f"{r['where']}: {r['reason']}" for r in span.rejected if r["kind"] == "bad"), ""),
        on_bad_row=config.on_bad_row,
        beginning=found.beginning,
    )


def _plan(config: ScoreConfig, out: Path) -> tuple[Plan, int]:
    """The plan of the run, and how many shards are there. Raises MismatchError where they are of other settings."""
    fresh = config.overwrite or not out.is_dir() or manifest.being_cleaned(out)
    state = {} if fresh else manifest.read_state(out) or {}
    before = None if fresh else manifest.identity_of_shards(out, "scored")
    plan = make_plan(replace(config, on_bad_row="skip"), state.get("model"), state.get("identity") or before)
    if before is not None:
        manifest.check_identity(out, before, plan.identity)
    return plan, 0 if fresh else len(shard_names(out, "scored"))


def _encoded(plan: Plan, found: Sample) -> tuple[ShardInput, list[tuple[int, int]]]:
    """The sampled rows as windows, and the tokens and trainable tokens of each block."""
    span, parts, before = ShardInput(-1), [], (0, 0)
    for block in found.blocks:
        take_rows(plan, span, block.rows)
        now = (span.counts["tokens"], span.counts["trainable_tokens"])
        parts.append((now[0] - before[0], now[1] - before[1]))
        before = now
    return span, parts


def _total(found: Sample, parts: Sequence[float], parts_sizes: Sequence[float]) -> Amount:
    """A figure of the whole source from that of each block: their ratio to its size, with two standard errors.

    The error is that of the jackknife: how much the ratio changes where one block is left out.
    """
    values, sizes = np.array(parts, float), np.array(parts_sizes, float)
    ratio = values.sum() / max(1e-9, sizes.sum())
    if found.whole or len(values) < 2 or not ratio:
        return Amount(ratio * found.total)
    without = (values.sum() - values) / np.maximum(1e-9, sizes.sum() - sizes)
    error = math.sqrt((len(values) - 1) / len(values) * float(((without - without.mean()) ** 2).sum()))
    return Amount(ratio * found.total, 2 * error / ratio)


def _probe(backend: Any, plan: Plan, span: ShardInput) -> tuple[float, float, list[np.ndarray[Any, Any]]]:
    """Tokens a second, how much two pieces differed in that, and the scores, of each kind [n] float32.

    Each piece has twice the windows of the one before, until one takes ``PROBE_SECONDS`` or there are no more.
    """
    order = np.random.Generator(np.random.Philox(key=1)).permutation(len(span.windows))
    windows = [span.windows[i] for i in order]
    first, count, speeds = 0, 1, [0.0]
    kept: list[list[np.ndarray[Any, Any]]] = [[] for _ in plan.score_columns]
    while first < len(windows):
        piece = windows[first : first + count]
        if len(windows) - first - count < count:  # the last piece is no small one
            piece = windows[first:]
        job = replace(span, index=0, windows=piece)
        begun = time.monotonic()
        for _, scores in backend.score(PrefetchQueue([job]), lambda job, tokens: None):
            for values, column in zip(kept, zip(*scores, strict=True), strict=False):
                values.extend(column)
        seconds = time.monotonic() - begun
        speeds.append(job.tokens / max(1e-9, seconds))
        if seconds > PROBE_SECONDS:
            break
        first, count = first + len(piece), 2 * len(piece)
    spread = abs(speeds[-1] - speeds[-2]) / max(speeds[-1], speeds[-2]) if len(speeds) > 4 else 0.5
    return speeds[-1], min(0.3, spread), [np.concatenate(values) for values in kept]


def _stored(plan: Plan, span: ShardInput, scores: Sequence[np.ndarray[Any, Any]], found: Sample) -> tuple[float, float]:
    """Bytes of a token in a shard, and bytes of a file without a row.

    The sampled rows are written as shards are, to memory; the tokens that were not scored have scores of others.
    """
    rng = np.random.Generator(np.random.Philox(key=2))
    drawn = [tuple(rng.choice(kind, len(w.input_ids) - 1) for kind in scores) for w in span.windows]
    table = span_table(plan, span, drawn)
    rows = np.array(table["row_id"])
    of_shard = (rows if found.whole else np.unique(rows, return_inverse=True)[1]) // plan.config.rows_per_shard
    edges = [*np.flatnonzero(np.diff(of_shard, prepend=-1)).tolist(), len(rows)]
    empty = encoded_bytes(table.slice(0, 0))
    pieces = [encoded_bytes(table.slice(a, b - a)) - empty for a, b in pairwise(edges)]
    return sum(pieces) / span.tokens, empty


def _beside(plan: Plan) -> int:
    """Bytes of a scored directory but for its shards: the tokenizer, counts of ids, the manifest."""
    with scratch() as tmp:
        plan.tokenizer.save_pretrained(str(tmp))
        tokenizer = sum(p.stat().st_size for p in tmp.rglob("*") if p.is_file())
    return tokenizer + 8 * plan.info.vocab_size + 3 * len(json.dumps(plan.identity)) + BESIDE_BYTES


def _gpu_peak() -> int:
    torch: Any = sys.modules.get("torch")
    return int(torch.cuda.max_memory_reserved()) if torch is not None and torch.cuda.is_initialized() else 0
