"""Train every arm of a study from arrays, many models at once, on a CPU or a GPU; needs torch and NumPy only.

python -m study.train ARRAYS OUT.json [--device cuda] [--models 64] [--again RESULTS.json]
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from study.arms import ARMS, EPOCHS, RATES, SEEDS, TUNING_SEED, middle, rows_key, trials
from study.network import Network, Weights, logits, repeated

BATCH, WARM_UP, BETAS, CLIP = 8, 20, (0.9, 0.95), 1.0
QUESTIONS, LONGEST = 100, 40
"""Test rows that are answered, and tokens of an answer."""


@dataclass(frozen=True)
class Run:
    """One model's training."""

    arm: str
    rate: float
    strength: float
    seed: int


def from_base(directory: Path) -> Weights:
    """The weights of a GPT-2 that transformers saved."""
    from transformers import GPT2LMHeadModel

    found = GPT2LMHeadModel.from_pretrained(directory).state_dict()
    return {n: w.contiguous() for n, w in found.items() if n != "lm_head.weight"}


def save_seen(base: Path, out: Path, start: Weights, plain: Any, epochs: int) -> None:
    """The base model after ``epochs`` plain epochs over the training rows, saved as transformers does."""
    from transformers import AutoTokenizer, GPT2LMHeadModel

    data = Data(plain, {}, epochs, "cpu")
    weights = repeated(start, 1, "cpu")
    for _ in trained(weights, [Run("plain", 1e-3, 0.0, 0)], data, epochs):
        pass
    model = GPT2LMHeadModel.from_pretrained(base)
    model.load_state_dict({n: w[0].detach() for n, w in weights.items()}, strict=False)
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(base).save_pretrained(out)


class Data:
    """The rows of a domain, plain, and as each arm has them in an epoch."""

    def __init__(self, plain: Any, packed: Any, epochs: int, device: str, network: Network = logits) -> None:
        self.device, self.network, self._epochs = device, network, epochs
        kinds = {n: np.float32 if "entropy" in n else np.int64 for n in plain}
        self.plain = {n: torch.as_tensor(np.asarray(plain[n]).astype(kinds[n])).to(device) for n in plain}
        self._packed = packed
        self.shape = tuple(self.plain["train_ids"].shape)
        self.trainable = (self.plain["train_labels"] >= 0).sum(1)

    @property
    def asks(self) -> bool:
        """Whether every test row begins with a question, which is not trained on."""
        return bool((self.plain["test_labels"][:, 1] < 0).all())

    def rows(self, run: Run, epoch: int) -> tuple[Tensor, Tensor]:
        """Ids and labels [R, T] of a run in an epoch."""
        ids, labels = self.plain["train_ids"], self.plain["train_labels"]
        if not ARMS[run.arm].recipe:
            return ids, labels
        key, size = f"{rows_key(run.arm, run.strength)}|{run.seed}", ids.numel()
        changed, lost = (
            np.unpackbits(self._packed[f"{key}|{name}"], axis=1, count=size).astype(bool)
            for name in ("changed", "lost")
        )
        first = int(changed[:epoch].sum())
        new = self._packed[f"{key}|new"][first : first + int(changed[epoch].sum())].astype(np.int64)
        ids, labels = ids.clone().flatten(), labels.clone().flatten()
        ids[torch.as_tensor(changed[epoch]).to(self.device)] = torch.as_tensor(new).to(self.device)
        labels[torch.as_tensor(lost[epoch]).to(self.device)] = -100
        return ids.view(self.shape), labels.view(self.shape)


def loss_of(found: Tensor, labels: Tensor, trainable: Tensor, mean: Tensor, power: Tensor | None) -> Tensor:
    """[M] the loss of each model's batch: over the ``trainable`` [M] tokens before dropping, or over those left.

    ``found`` [M, B, T, V], ``labels`` [M, B, T]; ``mean`` [M] says who divides by the labels left. With ``power`` [M] a
    label weighs (entropy / ln V)^power, scaled to mean 1.
    """
    shifted = labels[:, :, 1:]
    left = shifted >= 0
    flat = found[:, :, :-1].reshape(-1, found.shape[-1])
    losses = F.cross_entropy(flat, shifted.flatten(), ignore_index=-100, reduction="none").view(shifted.shape)
    if power is not None:
        with torch.no_grad():
            logp = flat.log_softmax(-1)
            entropy = -(logp.exp() * logp).sum(-1).view(shifted.shape) / math.log(found.shape[-1])
            weight = torch.where(left, entropy.clamp_min(1e-9) ** power[:, None, None], 0)
            weight = weight * left.sum((1, 2), keepdim=True) / weight.sum((1, 2), keepdim=True)
        losses = losses * torch.where(power[:, None, None] > 0, weight, 1)
    divisor = torch.where(mean, left.sum((1, 2)).clamp_min(1), trainable)
    return losses.sum((1, 2)) / divisor


def trained(weights: Weights, runs: list[Run], data: Data, epochs: int) -> Iterator[int]:
    """Train M models, one for each run, in place; yields after each epoch."""
    settings = [ARMS[r.arm].training(r.strength) for r in runs]

    def each(name: str) -> Tensor:
        return torch.tensor([s.get(name, 0.0) for s in settings], device=data.device)

    rate, decay, dropout = torch.tensor([r.rate for r in runs], device=data.device), each("decay"), each("dropout")
    mean, eaft = each("mean") > 0, each("eaft")
    power, dropped = (v if bool(v.any()) else None for v in (eaft, dropout))
    first, second = ({n: torch.zeros_like(w) for n, w in weights.items()} for _ in range(2))
    step, count, number = 0, data.shape[0], torch.arange(len(runs), device=data.device)[:, None]
    generators = [np.random.Generator(np.random.Philox(key=r.seed)) for r in runs]
    torch.manual_seed(runs[0].seed)
    for epoch in range(epochs):
        orders = {
            r.seed: torch.as_tensor(g.permutation(count)).to(data.device) for r, g in zip(runs, generators, strict=True)
        }
        cache: dict[tuple[str, int], tuple[Tensor, Tensor]] = {}
        for r in runs:
            name = (rows_key(r.arm, r.strength), r.seed)
            if name not in cache:
                cache[name] = data.rows(r, epoch)
        made = [cache[rows_key(r.arm, r.strength), r.seed] for r in runs]
        every = [torch.stack([m[i] for m in made]) for i in (0, 1)]
        order = torch.stack([orders[r.seed] for r in runs])
        for at in range(0, count, BATCH):
            some = order[:, at : at + BATCH]
            ids, labels = (of_run[number, some] for of_run in every)
            trainable = data.trainable[some].sum(1)
            loss = loss_of(data.network(weights, ids, dropped), labels, trainable, mean, power)
            gradients = torch.autograd.grad(loss.sum(), list(weights.values()))
            step += 1
            _update(weights, gradients, first, second, rate * min(1, step / WARM_UP), decay, step)
        yield epoch


@torch.no_grad()
def _update(
    weights: Weights,
    gradients: tuple[Tensor, ...],
    first: Weights,
    second: Weights,
    rate: Tensor,
    decay: Tensor,
    step: int,
) -> None:
    """AdamW with each model's own rate, decay and gradient norm; matrices decay, vectors do not."""
    norm = torch.stack([g.flatten(1).square().sum(1) for g in gradients]).sum(0).sqrt()
    scale = (CLIP / (norm + 1e-6)).clamp_max(1)
    for (name, w), g in zip(weights.items(), gradients, strict=True):

        def shaped(v: Tensor, like: Tensor = w) -> Tensor:
            return v.view(-1, *[1] * (like.dim() - 1))

        g = g * shaped(scale)
        first[name].mul_(BETAS[0]).add_(g, alpha=1 - BETAS[0])
        second[name].mul_(BETAS[1]).addcmul_(g, g, value=1 - BETAS[1])
        if w.dim() > 2:
            w.mul_(1 - shaped(rate * decay))
        m, v = first[name] / (1 - BETAS[0] ** step), second[name] / (1 - BETAS[1] ** step)
        w.sub_(shaped(rate) * m / (v.sqrt() + 1e-8))


@torch.no_grad()
def evaluated(weights: Weights, data: Data, part: str, threshold: float) -> Tensor:
    """[M, 3] loss in nats a token of a part: of all tokens, those of low entropy at the start, those of high."""
    ids, labels, entropy = (data.plain[f"{part}_{n}"] for n in ("ids", "labels", "entropy"))
    models = next(iter(weights.values())).shape[0]
    low = (entropy <= threshold)[:, 1:]
    sums = torch.zeros(models, 2, device=data.device)
    for at in range(0, len(ids), BATCH):
        some = slice(at, at + BATCH)
        batch, wanted = (t[some].expand(models, -1, -1) for t in (ids, labels))
        shifted = wanted[:, :, 1:].reshape(-1)
        found = data.network(weights, batch, None)[:, :, :-1].flatten(0, 2)
        losses = F.cross_entropy(found, shifted, ignore_index=-100, reduction="none").view(models, -1)
        sums[:, 0] += (losses * low[some].flatten()).sum(1)
        sums[:, 1] += (losses * ~low[some].flatten()).sum(1)
    here = (labels >= 0)[:, 1:]
    counts = torch.stack([(here & low).sum(), (here & ~low).sum()])
    return torch.cat([sums.sum(1, keepdim=True) / counts.sum(), sums / counts], 1)


@torch.no_grad()
def answered(weights: Weights, data: Data) -> Tensor:
    """[M, 2] shares of test questions whose greedy answer is that of the row, token for token, and that end at all.

    The last trained token of a row is what ends an answer.
    """
    ids, labels = (data.plain[f"test_{n}"][:QUESTIONS] for n in ("ids", "labels"))
    models, (rows, width) = next(iter(weights.values())).shape[0], ids.shape
    trained, number = labels >= 0, torch.arange(len(ids), device=data.device)
    first, count = trained.int().argmax(1), trained.sum(1)
    end = ids[number, first + count - 1]
    length = max(int(first.max()) + LONGEST, width)
    text = torch.zeros(models, rows, length, dtype=torch.long, device=data.device)
    text[:, :, :width] = torch.where(torch.arange(width, device=data.device) < first[:, None], ids, 0)
    right = torch.ones(models, rows, dtype=torch.bool, device=data.device)
    ended = torch.zeros_like(right)
    for step in range(LONGEST):
        at = first + step
        new = data.network(weights, text, None)[:, number, at - 1].argmax(-1)
        wanted = torch.where(step < count, ids[number, at.clamp_max(width - 1)], -1)
        right &= ended | (new == wanted)
        ended |= new == end
        text[:, number, at] = new
        if bool(ended.all()):
            break
    return torch.stack([(right & ended).float().mean(1), ended.float().mean(1)], 1)


def study(
    directory: Path,
    out: Path,
    runs: list[Run],
    *,
    epochs: int = EPOCHS,
    models: int = 64,
    device: str = "cpu",
    processes: int = 1,
    other: tuple[Network, Weights] | None = None,
) -> dict[str, Any]:
    """Train ``runs``, so many ``models`` at once, and write their losses after each epoch as JSON.

    ``processes``: how many, of one thread each, share the runs. ``other``: a network in place of the study's GPT-2, and
    what it starts with; one process trains it.
    """
    if other and processes > 1:
        raise ValueError("another network is trained by one process")
    inputs = load(directory, epochs, device, other)
    found, began, groups = [], time.monotonic(), [runs[at : at + models] for at in range(0, len(runs), models)]
    for some in in_order(groups, inputs, (directory, epochs, device), processes):
        found += some
        result = {
            "arrays": directory.name, "epochs": epochs, "torch": torch.__version__,
            "device": torch.cuda.get_device_name() if device == "cuda" else "CPU",
            "parameters": sum(w.numel() for w in inputs.start.values()), "seconds": round(time.monotonic() - began),
            "train_tokens": int(inputs.data.trainable.sum()), "test_median_nats": inputs.medians["test"], "runs": found,
        }  # fmt: skip
        text = json.dumps(result, separators=(",", ":")).replace('{"arm"', '\n{"arm"')
        out.write_text(f"{text}\n", encoding="utf-8")
        print(f"{len(found)} of {len(runs)} runs, {time.monotonic() - began:.0f} s", flush=True)
    return result


@dataclass(frozen=True)
class Inputs:
    """What every training of a study needs."""

    data: Data
    start: Weights
    medians: dict[str, float]
    epochs: int


def load(directory: Path, epochs: int, device: str, other: tuple[Network, Weights] | None = None) -> Inputs:
    """The arrays of a directory on a device."""
    with np.load(directory / "plain.npz") as file:
        plain = dict(file)
    with np.load(directory / "rows.npz") as file:
        packed = dict(file)
    network, start = other or (logits, torch.load(directory / "start.pt", weights_only=True))
    torch.backends.cuda.matmul.allow_tf32 = True
    medians = {p: float(np.median(plain[f"{p}_entropy"][plain[f"{p}_labels"] >= 0])) for p in ("dev", "test")}
    return Inputs(Data(plain, packed, epochs, device, network), start, medians, epochs)


def results_of(runs: list[Run], inputs: Inputs) -> list[dict[str, Any]]:
    """Train ``runs`` at once; settings, losses after each epoch, and answers of each."""
    data, medians = inputs.data, inputs.medians
    weights = repeated(inputs.start, len(runs), data.device)
    curves: dict[str, list[Any]] = {part: [evaluated(weights, data, part, medians[part]).cpu()] for part in medians}
    for _ in trained(weights, runs, data, inputs.epochs):
        for part, curve in curves.items():
            curve.append(evaluated(weights, data, part, medians[part]).cpu())
    answers = answered(weights, data).tolist() if data.asks else []
    found = []
    for i, run in enumerate(runs):
        kept: dict[str, Any] = {p: [[round(float(x), 5) for x in c[i]] for c in curve] for p, curve in curves.items()}
        found.append({**asdict(run), **kept, **({"answers": answers[i]} if answers else {})})
    return found


_own: list[Inputs] = []
"""In a process that shares the runs: what it trains with."""


def _begin(directory: Path, epochs: int, device: str) -> None:
    torch.set_num_threads(1)
    _own.append(load(directory, epochs, device))


def _one(runs: list[Run]) -> list[dict[str, Any]]:
    return results_of(runs, _own[0])


def in_order(
    groups: list[list[Run]], inputs: Inputs, given: tuple[Path, int, str], processes: int
) -> Iterator[list[dict[str, Any]]]:
    """The results of each group of runs, in their order, by so many processes."""
    if processes == 1:
        yield from (results_of(group, inputs) for group in groups)
        return
    with ProcessPoolExecutor(processes, get_context("spawn"), _begin, given) as pool:
        yield from pool.map(_one, groups)


def planned(arms: list[str], rates: str) -> list[Run]:
    """Every trial of the arms with every seed, runs alike together."""
    every = [Run(a, r, s, seed) for a in arms for r, s in trials(a, rates) for seed in (TUNING_SEED, *SEEDS)]
    return sorted(every, key=lambda r: (bool(ARMS[r.arm].trainer), r.arm, r.seed))


def again(results: Path, rate: float, seeds: int) -> list[Run]:
    """The headline arms at a rate and the strengths that were chosen for it in ``results``, so many seeds."""
    from study.page import chosen

    found = [
        r
        for r in json.loads(results.read_text(encoding="utf-8"))["runs"]
        if math.isclose(r["rate"], rate, rel_tol=1e-6)
    ]
    arms = [a for a in ARMS if ARMS[a].headline and any(r["arm"] == a for r in found)]
    strengths = {a: chosen(found, a, last=True).strength for a in arms}
    return [Run(a, rate, strengths[a], seed) for seed in SEEDS[:seeds] for a in arms]


def headline(rate: float, seeds: int, *, chats: bool = False) -> list[Run]:
    """The headline arms, and with ``chats`` those for chats, at one rate and the second of their strengths."""
    some = [name for name, arm in ARMS.items() if arm.headline or (chats and arm.chats)]
    return [Run(a, rate, middle(a), seed) for seed in SEEDS[:seeds] for a in some]


def options(parser: argparse.ArgumentParser) -> None:
    """The options that say which runs are meant."""
    parser.add_argument("--rates", choices=RATES, default="planned")
    parser.add_argument("--headline", action="store_true", help="only the headline arms")
    parser.add_argument("--again", type=Path, help="headline arms at one rate, with the strengths chosen for it here")
    parser.add_argument("--middle", action="store_true", help="headline arms and that for chats, at one rate each")
    parser.add_argument("--rate", type=float, default=5e-4, help="the rate of --again and --middle")
    parser.add_argument("--seeds", type=int, default=3, help="the seeds of --again and --middle")


def wanted(given: argparse.Namespace) -> list[Run]:
    """The runs that these options mean."""
    if given.again:
        return again(given.again, given.rate, given.seeds)
    if given.middle:
        return headline(given.rate, given.seeds, chats=True)
    some = [name for name, arm in ARMS.items() if not arm.chats and (arm.headline or not given.headline)]
    return planned(some, given.rates)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("arrays", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--models", type=int, default=64)
    parser.add_argument("--processes", type=int, default=1)
    options(parser)
    given = parser.parse_args()
    study(given.arrays, given.out, wanted(given), models=given.models, device=given.device, processes=given.processes)
