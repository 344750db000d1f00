"""The pictures of a report, as SVG that takes its colours from the page."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from hashlib import sha256
from typing import Any

import numpy as np
from numpy.typing import NDArray

from entrodrop_prep.masking.histogram import EntropyHistogram
from entrodrop_prep.verification.report.statistics import DENSITY_NATS

_NAMES = ("ink", "bar", "drop", "shade", "paper")
_COLOURS = {f"#01020{i}": f"var(--{name})" for i, name in enumerate(_NAMES)}
"""What matplotlib draws with, and what the page has for it in its light and its dark theme."""
INK, BAR, DROP, SHADE, PAPER = _COLOURS
_SIZE = (5.2, 2.9)
_STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "entrodrop",
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK),
}


@contextmanager
def _axes(x: str, y: str) -> Iterator[tuple[Any, Callable[[], str]]]:
    """Axes to draw on, and what gives the picture."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=_SIZE, layout="constrained")
        axes = figure.add_subplot()
        axes.set_xlabel(x)
        axes.set_ylabel(y)

        def svg() -> str:
            out = io.StringIO()
            figure.savefig(out, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
            return _inline(out.getvalue())

        yield axes, svg


def _inline(text: str) -> str:
    """An SVG file as an element of a page: its ids unlike those of the others, sized by the page."""
    text = text[text.index("<svg") :]
    name = sha256(text.encode()).hexdigest()[:8]
    for fixed, ours in _COLOURS.items():
        text = text.replace(fixed, ours)
    text = re.sub(r'(id="|url\(#|href="#)', rf"\g<1>c{name}-", text)
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    return re.sub(r'<svg ([^>]*?)width="[^"]*" height="[^"]*"', r'<svg role="img" \1', text, count=1)


def _percent(axis: Any) -> None:
    from matplotlib.ticker import PercentFormatter

    axis.set_major_formatter(PercentFormatter(1.0))


def _bins(spread: EntropyHistogram) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Tokens in each of B bins [B], and where the bins begin and end [B + 1] in nats."""
    summary = spread.summary()
    counts = np.array(summary["counts"] or [0], np.float64)
    return counts, np.arange(len(counts) + 1) / summary["bins_per_nat"]


def entropies(spread: EntropyHistogram, thresholds: list[float], eligible: tuple[float, float] | None) -> str:
    """How many trainable tokens have which entropy; ``eligible`` is shaded, the thresholds are lines."""
    counts, edges = _bins(spread)
    with _axes("entropy (nats)", "share of the trainable tokens") as (axes, svg):
        axes.bar(edges[:-1], counts / max(1.0, counts.sum()), np.diff(edges) * 0.92, align="edge", color=BAR)
        _mark(axes, thresholds, eligible, float(edges[-1]))
        _percent(axes.yaxis)
        return svg()


def cumulative(spread: EntropyHistogram, thresholds: list[float], eligible: tuple[float, float] | None) -> str:
    """The share of the trainable tokens whose entropy is at most so much."""
    counts, edges = _bins(spread)
    share = np.concatenate([[0.0], np.cumsum(counts) / max(1.0, counts.sum())])
    with _axes("entropy (nats)", "share with at most that") as (axes, svg):
        axes.plot(edges, share, color=BAR, linewidth=2)
        _mark(axes, thresholds, eligible, float(edges[-1]))
        for at in thresholds if len(thresholds) == 1 else []:
            below = float(np.interp(at, edges, share))
            axes.annotate(f"{below:.0%} below", (at, below), (6, -12), textcoords="offset points")
        axes.set_ylim(0, 1.02)
        _percent(axes.yaxis)
        return svg()


def _mark(axes: Any, thresholds: list[float], eligible: tuple[float, float] | None, right: float) -> None:
    axes.set_xlim(0, right)
    if eligible is not None:
        axes.axvspan(eligible[0], min(eligible[1], right), color=SHADE, zorder=0, linewidth=0)
    for at in thresholds:
        axes.axvline(at, color=DROP, linestyle="--", linewidth=1.5)


def density(counts: NDArray[np.int64], threshold: float | None) -> str:
    """Tokens by entropy and surprisal, darker for more, and what the quarters of the plane mean."""
    with _axes("entropy (nats)", "surprisal (nats)") as (axes, svg):
        filled = (int(np.flatnonzero(counts.sum(axis)).max(initial=0)) + 1 for axis in (1, 0))
        right, top = (bins * DENSITY_NATS / len(counts) for bins in filled)
        shown = np.where(counts > 0, np.log1p(counts.astype(np.float64)), np.nan).T
        axes.imshow(
            shown, origin="lower", extent=(0, DENSITY_NATS, 0, DENSITY_NATS), aspect="auto", cmap="viridis_r", vmin=0
        )
        if threshold is not None:
            axes.axvline(threshold, color=DROP, linestyle="--", linewidth=1.5)
        axes.plot([0, DENSITY_NATS], [0, DENSITY_NATS], color=INK, linewidth=1, linestyle=":")
        axes.set_xlim(0, right)
        axes.set_ylim(0, top)
        for x, y, text, side_of in (
            (0.02, 0.05, "easy", "left"),
            (0.02, 0.93, "surprising", "left"),
            (0.98, 0.05, "lucky", "right"),
            (0.98, 0.93, "hard", "right"),
        ):
            box = {"facecolor": PAPER, "edgecolor": "none", "pad": 2}
            axes.text(x, y, text, transform=axes.transAxes, ha=side_of, bbox=box)
        return svg()


def curriculum(rates: list[float], dropped: list[float]) -> str:
    """The planned drop rate of the eligible tokens, and the share of all trainable tokens dropped, by epoch."""
    with _axes("epoch", "share") as (axes, svg):
        epochs = np.arange(len(rates))
        axes.plot(epochs, rates, color=BAR, linewidth=2, marker="o", label="planned rate, of the eligible")
        axes.bar(epochs[: len(dropped)], dropped, 0.6, color=DROP, label="dropped, of the trainable")
        axes.set_ylim(0, 1.02)
        _percent(axes.yaxis)
        _whole(axes.xaxis)
        axes.legend(loc="upper left")
        return svg()


def labels_left(left: list[int]) -> str:
    """Labels that are trained on, by epoch."""
    from matplotlib.ticker import EngFormatter

    with _axes("epoch", "labels left") as (axes, svg):
        axes.bar(np.arange(len(left)), left, 0.6, color=BAR)
        axes.yaxis.set_major_formatter(EngFormatter(sep=""))
        _whole(axes.xaxis)
        return svg()


def _whole(axis: Any) -> None:
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(integer=True))
