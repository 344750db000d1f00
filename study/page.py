"""The tables of ``docs/study.md`` from ``study/results/``: ``python -m study.page``; ``--check`` only compares."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from study.arms import ARMS, SEEDS, TUNING_SEED

HERE = Path(__file__).parent
PAGE = HERE.parent / "docs" / "study.md"
BEGIN, END = "<!-- figures: begin -->", "<!-- figures: end -->"
RESAMPLES = 10_000
Array = NDArray[np.float64]


@dataclass(frozen=True)
class Chosen:
    """A setting that was chosen on dev, and its test losses by seed."""

    rate: float
    strength: float
    dev: Array
    """[S, E + 1] loss of all tokens on dev, before training and after each epoch."""
    test: Array
    """[S, E + 1, 3] loss on test: all tokens, those of low entropy, those of high."""

    @property
    def last(self) -> Array:
        """[S] test loss after the last epoch."""
        return self.test[:, -1, 0]

    @property
    def best(self) -> Array:
        """[S] test loss at the epoch that is best on dev."""
        return self.test[np.arange(len(self.dev)), self.dev.argmin(1), 0]


def chosen(runs: list[dict[str, Any]], arm: str, *, last: bool) -> Chosen:
    """The setting of an arm with the lowest dev loss, of the last epoch or of the best, with the tuning seed."""
    own = [r for r in runs if r["arm"] == arm]
    dev = {(r["rate"], r["strength"]): [e[0] for e in r["dev"]] for r in own if r["seed"] == TUNING_SEED}
    rate, strength = min(dev, key=lambda s: dev[s][-1] if last else min(dev[s]))
    by_seed = {r["seed"]: r for r in own if (r["rate"], r["strength"]) == (rate, strength)}
    some = [by_seed[s] for s in SEEDS if s in by_seed]
    return Chosen(
        rate, strength, np.array([[e[0] for e in r["dev"]] for r in some]), np.array([r["test"] for r in some])
    )


def interval(differences: Array) -> tuple[float, float]:
    """95% of the means of resampled seeds."""
    rng = np.random.Generator(np.random.Philox(key=0))
    means = differences[rng.integers(0, len(differences), (RESAMPLES, len(differences)))].mean(1)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def p_value(differences: Array) -> float:
    """Two-sided p of a t-test that the mean is 0."""
    n, spread = len(differences), float(differences.std(ddof=1))
    if spread == 0:
        return 1.0 if differences.mean() == 0 else 0.0
    t, nu = abs(float(differences.mean())) / spread * math.sqrt(n), n - 1
    scale = math.gamma((nu + 1) / 2) / (math.gamma(nu / 2) * math.sqrt(nu * math.pi))
    x = np.linspace(0, t, 200_001)
    return max(0.0, 1 - 2 * float(np.trapezoid(scale * (1 + x**2 / nu) ** (-(nu + 1) / 2), x)))


def holm(values: dict[str, float]) -> dict[str, float]:
    """P-values corrected for their number, by Holm."""
    found, top = {}, 0.0
    for i, (name, p) in enumerate(sorted(values.items(), key=lambda item: item[1])):
        found[name] = top = max(top, min(1.0, p * (len(values) - i)))
    return found


def table(result: dict[str, Any]) -> Iterator[str]:
    """The table of a domain and a size, arms by their primary measure."""
    runs = result["runs"]
    arms = [a for a in ARMS if any(r["arm"] == a for r in runs)]
    last, best = ({a: chosen(runs, a, last=which) for a in arms} for which in (True, False))
    plain, early = last["plain"], best["plain"]
    corrected = holm({a: p_value(last[a].last - plain.last) for a in arms if a != "plain"})
    yield (
        "| arm | rate, strength | last epoch | minus plain [95%] | p (Holm) | low / high | rate, strength | early stop "
        "| minus plain [95%] | degradation |"
    )
    yield "| --- | --- | ---: | ---: | ---: | ---: | --- | ---: | ---: | ---: |"
    for arm in sorted(arms, key=lambda a: float(last[a].last.mean())):
        one, two = last[arm], best[arm]
        parts = (one.test - plain.test)[:, -1, 1:].mean(0)
        rest = "" if arm == "plain" else f"{corrected[arm]:.3f}"
        sides = "" if arm == "plain" else f"{parts[0]:+.3f} / {parts[1]:+.3f}"
        yield (
            f"| {arm} | {_setting(one)} | {one.last.mean():.3f} | {_difference(one.last - plain.last)} | {rest} | "
            f"{sides} | {_setting(two)} | {two.best.mean():.3f} | {_difference(two.best - early.best)} | "
            f"{(two.last - two.best).mean():.3f} |"
        )


def equal_rates(result: dict[str, Any]) -> Iterator[str]:
    """Each arm minus plain at the same learning rate: test loss after the last epoch, strength chosen on dev."""
    runs = result["runs"]
    shared = sorted({r["rate"] for r in runs if r["arm"] != "plain"})
    some = {rate: [r for r in runs if math.isclose(r["rate"], rate, rel_tol=1e-6)] for rate in shared}
    plain = {rate: chosen(some[rate], "plain", last=True).last for rate in shared}
    yield "| arm | " + " | ".join(f"rate {rate:.2g}" for rate in shared) + " |"
    yield "| --- |" + " --- |" * len(shared)
    yield "| plain | " + " | ".join(f"{plain[rate].mean():.3f}" for rate in shared) + " |"
    found = {}
    for arm in (a for a in ARMS if a != "plain" and any(r["arm"] == a for r in runs)):
        own = {rate: chosen(some[rate], arm, last=True) for rate in shared}
        found[arm] = [own[rate].last - plain[rate] for rate in shared], [own[rate].strength for rate in shared]
    for arm, (differences, strengths) in sorted(found.items(), key=lambda item: float(item[1][0][0].mean())):
        cells = [f"{_difference(d)}, at {s:g}" for d, s in zip(differences, strengths, strict=True)]
        yield f"| {arm} | " + " | ".join(cells) + " |"


def _setting(one: Chosen) -> str:
    return f"{one.rate:.2g}" + (f", {one.strength:g}" if one.strength else "")


def _difference(values: Array) -> str:
    if not values.any():
        return ""
    low, high = interval(values)
    return f"{values.mean():+.3f} [{low:+.3f}, {high:+.3f}]"


def figures(paths: list[Path]) -> str:
    """The tables of some results."""
    lines = []
    for path in paths:
        found = json.loads(path.read_text(encoding="utf-8"))
        domain, size, *low = path.stem.split("-")
        start = found["runs"][0]["test"][0][0]
        lines += [
            f"### {domain}, {size}{', lower learning rates' if low else ''}",
            "",
            f"{found['parameters']:,} parameters, {found['train_tokens']:,} training tokens, {found['epochs']} "
            f"epochs, {len(found['runs']):,} runs on {found['device']} in {found['seconds']:,} s "
            f"(torch {found['torch']}). Test loss before training: {start:.3f}.",
            "",
            *table(found),
            "",
            "After the last epoch, minus plain at the same learning rate:",
            "",
            *equal_rates(found),
            "",
        ]
    return "\n".join(lines)


def renewed(page: str, results: Path) -> str:
    """The page with its figures made again."""
    head, rest = page.split(BEGIN)
    return f"{head}{BEGIN}\n\n{figures(sorted(results.glob('*.json')))}\n{END}{rest.split(END)[1]}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--print", nargs="+", type=Path, metavar="RESULTS.json", help="only print the tables of these")
    given = parser.parse_args()
    if given.print:
        raise SystemExit(print(figures(given.print)))
    before = PAGE.read_text(encoding="utf-8")
    after = renewed(before, HERE / "results")
    if given.check and before != after:
        raise SystemExit("docs/study.md is not what study/results give: run python -m study.page")
    PAGE.write_text(after, encoding="utf-8")
