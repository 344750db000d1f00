"""The tables, pictures and figures in the text of ``docs/study.md``, from ``study/results/`` and ``study/found.md``.

python -m study.page              write them; --check only compares, --print RESULTS.json only prints tables
"""

from __future__ import annotations

import argparse
import io
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
FOUND = HERE / "found.md"
RESAMPLES = 10_000
SIZES = ("0.1M", "0.3M", "1M")
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
    fixed = {(r["rate"], r["strength"]) for r in own}
    if len(fixed) > 1 and fixed != set(dev):
        raise ValueError(f"{arm}: settings without a run of seed {TUNING_SEED}")
    rate, strength = min(dev, key=lambda s: dev[s][-1] if last else min(dev[s])) if dev else fixed.pop()
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
    corrected = holm({a: p_value(last[a].last - plain.last) for a in arms if a != "plain" and len(plain.last) > 1})
    yield (
        "| arm | rate, strength | last epoch | minus plain [95%] | p (Holm) | low / high | rate, strength | early stop "
        "| minus plain [95%] | degradation |"
    )
    yield "| --- | --- | ---: | ---: | ---: | ---: | --- | ---: | ---: | ---: |"
    for arm in sorted(arms, key=lambda a: float(last[a].last.mean())):
        one, two = last[arm], best[arm]
        parts = (one.test - plain.test)[:, -1, 1:].mean(0)
        rest = f"{corrected[arm]:.3f}" if arm in corrected else ""
        sides = "" if arm == "plain" else f"{parts[0]:+.3f} / {parts[1]:+.3f}"
        yield (
            f"| {arm} | {_setting(one)} | {one.last.mean():.3f} | {_difference(one.last - plain.last)} | {rest} | "
            f"{sides} | {_setting(two)} | {two.best.mean():.3f} | {_difference(two.best - early.best)} | "
            f"{(two.last - two.best).mean():.3f} |"
        )


def at_equal_rates(result: dict[str, Any]) -> dict[float, dict[str, Chosen]]:
    """Learning rate -> arm -> its strength that is best on dev after the last epoch; rates that all arms have."""
    found = {}
    for rate in sorted({r["rate"] for r in result["runs"] if r["arm"] != "plain"}):
        some = [r for r in result["runs"] if math.isclose(r["rate"], rate, rel_tol=1e-6)]
        found[rate] = {a: chosen(some, a, last=True) for a in ARMS if any(r["arm"] == a for r in some)}
    return found


def equal_rates(result: dict[str, Any]) -> Iterator[str]:
    """Each arm minus plain at the same learning rate: test loss after the last epoch, strength chosen on dev."""
    by_rate = at_equal_rates(result)
    shared, plain = list(by_rate), {rate: arms["plain"].last for rate, arms in by_rate.items()}
    yield "| arm | " + " | ".join(f"rate {rate:.2g}" for rate in shared) + " |"
    yield "| --- |" + " --- |" * len(shared)
    yield "| plain | " + " | ".join(f"{plain[rate].mean():.3f}" for rate in shared) + " |"
    found = {}
    for arm in (a for a in by_rate[shared[0]] if a != "plain"):
        own = {rate: by_rate[rate][arm] for rate in shared}
        found[arm] = [own[rate].last - plain[rate] for rate in shared], [own[rate].strength for rate in shared]
    for arm, (differences, strengths) in sorted(found.items(), key=lambda item: float(item[1][0][0].mean())):
        cells = [f"{_difference(d)}, at {s:g}" for d, s in zip(differences, strengths, strict=True)]
        yield f"| {arm} | " + " | ".join(cells) + " |"


def _setting(one: Chosen) -> str:
    return f"{one.rate:.2g}" + (f", {one.strength:g}" if one.strength else "")


def _difference(values: Array) -> str:
    if not values.any():
        return ""
    if len(values) == 1:
        return f"{values[0]:+.3f}"
    low, high = interval(values)
    return f"{values.mean():+.3f} [{low:+.3f}, {high:+.3f}]"


def comparable(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The runs of the seeds that every arm has."""
    seeds = [{r["seed"] for r in runs if r["arm"] == arm} for arm in {r["arm"] for r in runs}]
    return [r for r in runs if r["seed"] in set.intersection(*seeds)]


def figures(paths: list[Path]) -> str:
    """The tables of some results."""
    lines = []
    for path in paths:
        found = json.loads(path.read_text(encoding="utf-8"))
        count, found["runs"] = len(found["runs"]), comparable(found["runs"])
        domain, size, *low = path.stem.split("-")
        start, seeds = found["runs"][0]["test"][0][0], sorted({r["seed"] for r in found["runs"]} - {TUNING_SEED})
        lines += [
            f"### {domain}, {size}{', lower learning rates' if low else ''}",
            "",
            f"{found['parameters']:,} parameters, {found['train_tokens']:,} training tokens, {found['epochs']} "
            f"epochs, {count:,} runs on {found['device']} in {found['seconds']:,} s "
            f"(torch {found['torch']}), tables of {len(seeds)} seed{'s'[: len(seeds) > 1]}. "
            f"Test loss before training: {start:.3f}.",
            "",
            *table(found),
            "",
        ]
        if len({r["rate"] for r in found["runs"]}) > 1:
            lines += ["After the last epoch, minus plain at the same learning rate:", "", *equal_rates(found), ""]
        beside = {name: path.with_name(f"{domain}-{name}.json") for name in SIZES}
        beside = {name: other for name, other in beside.items() if other.exists()}
        if not low and len(beside) > 1 and size == next(iter(beside)):
            lines += ["After the last epoch, minus plain, with the same settings and seeds at each size:", ""]
            lines += [*by_size({name: json.loads(other.read_text("utf-8")) for name, other in beside.items()}), ""]
        if "answers" in found["runs"][0]:
            lines += ["Answers to the test questions after the last epoch:", "", *answers(found), ""]
    return "\n".join(lines)


def differences(results: dict[str, dict[str, Any]]) -> dict[tuple[str, float], list[Array]]:
    """Arm and strength -> [S] loss after the last epoch minus that of plain, of each result: the runs that all have."""
    rate = next(iter(results.values()))["runs"][0]["rate"]
    last = [
        {(r["arm"], r["strength"], r["seed"]): r for r in result["runs"] if math.isclose(r["rate"], rate, rel_tol=1e-6)}
        for result in results.values()
    ]
    shared = [key for key in last[0] if all(key in runs for runs in last)]
    found = {}
    for arm, strength in dict.fromkeys((a, s) for a, s, _ in shared if a != "plain"):
        seeds = [seed for a, s, seed in shared if (a, s) == (arm, strength)]
        pairs = ([(runs[arm, strength, s], runs["plain", 0.0, s]) for s in seeds] for runs in last)
        found[arm, strength] = [np.array([a["test"][-1][0] - b["test"][-1][0] for a, b in some]) for some in pairs]
    return found


def by_size(results: dict[str, dict[str, Any]]) -> Iterator[str]:
    """The arms of the smallest model, which comes first, beside the same runs of the larger ones."""
    yield f"| arm | {' | '.join(results)} |"
    yield "| --- |" + " --- |" * len(results)
    for (arm, strength), found in differences(results).items():
        yield f"| {arm}, {strength:g} | {' | '.join(map(_difference, found))} |"


def shares_of(result: dict[str, Any]) -> dict[str, Array]:
    """Arm -> [S, 2] by seed: shares of answers that are right, and that end."""
    found = {a: [r["answers"] for r in result["runs"] if r["arm"] == a] for a in ARMS}
    return {a: np.array(values) for a, values in found.items() if values}


def answers(result: dict[str, Any]) -> Iterator[str]:
    """Shares of greedy answers that are right and that end, means over the seeds, and minus plain."""
    shares = shares_of(result)
    less = {a: found - shares["plain"] for a, found in shares.items() if a != "plain"}
    several = len(shares["plain"]) > 1
    corrected = [holm({a: p_value(d[:, i]) for a, d in less.items()}) if several else {} for i in (0, 1)]
    yield "| arm | right | minus plain [95%] | p (Holm) | end | minus plain [95%] | p (Holm) |"
    yield "| --- | ---: | --- | ---: | ---: | --- | ---: |"
    for arm, found in sorted(shares.items(), key=lambda item: -float(item[1][:, 0].mean())):
        cells = [f"{arm}"]
        for i in (0, 1):
            cells += [f"{found[:, i].mean():.1%}", _difference(less[arm][:, i]) if arm in less else ""]
            cells.append(f"{corrected[i][arm]:.3f}" if arm in corrected[i] else "")
        yield f"| {' | '.join(cells)} |"


def found_values(results: dict[str, dict[str, Any]]) -> dict[str, float]:
    """The figures in the text of ``found.md``, from results by name."""
    full, low = ([f"{domain}-1M{end}" for domain in ("code", "prose")] for end in ("", "-low"))
    last = {
        n: {a: {r: c[a].last for r, c in at_equal_rates(results[n]).items() if a in c} for a in ARMS}
        for n in full + low
    }

    def gains(arm: str, names: list[str], than: str = "plain") -> list[float]:
        """How far an arm is below another, at each rate."""
        return [float((last[n][than][r] - last[n][arm][r]).mean()) for n in names for r in last[n][arm]]

    def picked(name: str, arm: str, *, last: bool) -> float:
        one = chosen(results[name]["runs"], arm, last=last)
        return float((one.last if last else one.best).mean())

    labels = gains("low-labels", full + low)
    against = [
        gains(f"low-{t}", full + (low if t != "both" else []), f"random-{t}") for t in ("labels", "inputs", "both")
    ]
    guided = [x for some in against for x in some]
    inputs, random = (gains(f"{kind}-inputs", full) for kind in ("low", "random"))
    start = results["code-1M"]["runs"][0]["test"][0][0]
    shares = {
        name: {arm: found.mean(0) for arm, found in shares_of(results[name]).items()}
        for name in ("task-0.3M", "chat-0.3M")
    }
    sizes = differences({size: results[f"code-{size}"] for size in SIZES})
    return {
        **{
            f"{arm.replace('-', '_')}_{size.replace('.', '')}": -float(one.mean())
            for (arm, _), found in sizes.items()
            for size, one in zip(SIZES, found, strict=True)
        },
        "task_right_least": min(float(x[0]) for x in shares["task-0.3M"].values()),
        "task_right_most": max(float(x[0]) for x in shares["task-0.3M"].values()),
        "chat_right_most": max(float(x[0]) for x in shares["chat-0.3M"].values()),
        "chat_ends_least": min(float(x[1]) for x in shares["chat-0.3M"].values()),
        "chat_ends_plain": float(shares["chat-0.3M"]["plain"][1]),
        "chat_ends_unprotected": float(shares["chat-0.3M"]["low-labels-unprotected"][1]),
        "labels_above": -min(labels),
        "labels_below": max(labels),
        "plain_lost": max(float(x.mean()) for x in last["code-1M"]["plain"].values()) - start,
        "comparisons": len(guided),
        "random_wins": sum(x <= 0 for x in guided),
        "low_ahead": max(guided),
        "inputs_least": min(inputs),
        "inputs_most": max(inputs),
        "random_least": min(random),
        "random_most": max(random),
        "inputs_harm": -min(gains("low-inputs", low) + gains("random-inputs", low)),
        "code_low_ahead": picked("code-1M-low", "plain", last=True)
        - picked("code-1M-low", "uniform-inputs", last=True),
        "code_gain": start - picked("code-1M-low", "plain", last=False),
        **{
            f"prose{end}_{arm.split('-')[0]}_{what}": picked(
                f"prose-1M{end.replace('_', '-')}", arm, last=what == "last"
            )
            for end in ("", "_low")
            for arm in ("plain", "uniform-inputs")
            for what in ("last", "best")
        },
    }


def pictures(results: dict[str, dict[str, Any]]) -> dict[str, str]:
    """Files of pictures: test loss by epoch, and degradation, of the headline arms at the lowest rate of the plan."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    found = {n: one[min(one)] for n, r in results.items() if not n.endswith("-low") for one in [at_equal_rates(r)]}
    style: Any = {"svg.fonttype": "none", "svg.hashsalt": "entrodrop", "font.size": 9}
    files = {}
    with mpl.rc_context(style):
        for name, draw, size in (("curves", _curves, 3.4), ("degradation", _bars, 2.6)):
            figure = Figure(figsize=(9, size), layout="constrained")
            for axes, (title, arms) in zip(figure.subplots(1, len(found)), found.items(), strict=True):
                draw(axes, {a: c for a, c in arms.items() if ARMS[a].headline})
                axes.set_title(title.replace("-", ", "))
            if name == "curves":
                figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
            text = io.StringIO()
            figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
            files[f"study-{name}.svg"] = text.getvalue()
    return files


def _curves(axes: Any, arms: dict[str, Chosen]) -> None:
    for number, (arm, one) in enumerate(arms.items()):
        losses = one.test[:, :, 0]
        low, high = np.array([interval(at) for at in losses.T]).T
        epochs = np.arange(losses.shape[1])
        axes.plot(epochs, losses.mean(0), color=f"C{number}", label=arm, linewidth=1.3)
        axes.fill_between(epochs, low, high, color=f"C{number}", alpha=0.25, linewidth=0)
    axes.set_xlabel("epoch")
    axes.set_ylabel("test loss (nats a token)")


def _bars(axes: Any, arms: dict[str, Chosen]) -> None:
    for number, (arm, one) in enumerate(reversed(arms.items())):
        lost = one.last - one.best
        low, high = interval(lost)
        axes.barh(arm, lost.mean(), color=f"C{len(arms) - 1 - number}")
        axes.plot([low, high], [arm, arm], color="black", linewidth=1)
    axes.set_xlabel("nats lost after the best epoch")


def between(page: str, name: str, text: str) -> str:
    """The page with ``text`` between the two comments of that name."""
    begin, end = (f"<!-- {name}: {side} -->" for side in ("begin", "end"))
    head, rest = page.split(begin)
    return f"{head}{begin}\n\n{text}\n{end}{rest.split(end)[1]}"


def renewed(page: str, results: Path) -> tuple[str, dict[str, str]]:
    """The page with its figures made again, and the pictures by their file names."""
    paths = sorted(results.glob("*.json"))
    known = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in paths}
    said = FOUND.read_text(encoding="utf-8").format(**found_values(known))
    shown = {name: result for name, result in known.items() if "-1M" in name}
    return between(between(page, "found", said), "figures", figures(paths)), pictures(shown)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--print", nargs="+", type=Path, metavar="RESULTS.json", help="only print the tables of these")
    given = parser.parse_args()
    if given.print:
        raise SystemExit(print(figures(given.print)))
    text, drawn = renewed(PAGE.read_text(encoding="utf-8"), HERE / "results")
    for path, now in {PAGE: text, **{PAGE.with_name(name): svg for name, svg in drawn.items()}}.items():
        if not given.check:
            path.write_text(now, encoding="utf-8")
        elif not path.exists() or path.read_text(encoding="utf-8") != now:
            raise SystemExit(f"docs/{path.name} is not what study/results give: run python -m study.page")
