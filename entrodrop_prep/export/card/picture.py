"""The card's picture: the entropies of the trainable tokens, and the share of them dropped in each epoch. An SVG file.

It is drawn from the manifest alone, and equal manifests give equal bytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from xml.sax.saxutils import escape

from entrodrop_prep.config.masking import SELECTIONS

NAME = "entropy.svg"
WIDTH, HEIGHT = 760, 270
_TOP, _FLOOR = 40, 220
_LEFT, _RIGHT = (50, 400), (480, 740)
_BAR, _LINE, _SHADE, _INK = "#4477aa", "#cc3311", "#fbe3dc", "#333333"


def picture(manifest: dict[str, Any]) -> bytes | None:
    """The picture of a dataset, of a scored one its left half; None where its manifest counts no entropies."""
    spread, epochs = manifest.get("entropy_histogram"), manifest.get("epochs", [])
    if spread is None:
        return None
    select = manifest.get("recipe", {}).get("select", "")
    parts = [*_spread(spread, thresholds_of(manifest.get("tau_nats")), select)]
    parts += _shares([(e["epoch"], e["dropped_share"]) for e in epochs]) if epochs else []
    width = WIDTH if epochs else _LEFT[1] + _LEFT[0]
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {HEIGHT}" width="{width}" height="{HEIGHT}" '
        f'font-family="sans-serif" font-size="12" fill="{_INK}">',
        f"<title>Entropy of the trainable tokens{', and share of them dropped by epoch' if epochs else ''}</title>",
        f'<rect width="{width}" height="{HEIGHT}" fill="#ffffff"/>',
        *parts,
        "</svg>",
    ]
    return "".join(f"{line}\n" for line in lines).encode()


def thresholds_of(tau: Any) -> list[float]:
    """Every threshold in nats in the manifest; those that select none are not on the axis."""
    if isinstance(tau, dict):
        values = [v for _, v in tau["values"]] if isinstance(tau.get("values"), list) else list(tau.values())
    else:
        values = [tau]
    return sorted({float(v) for v in values if isinstance(v, (int, float))})


def _spread(spread: dict[str, Any], thresholds: list[float], select: str) -> Iterator[str]:
    """Left: how many trainable tokens have which entropy; the thresholds, and which side of one is eligible."""
    counts, per_nat = spread["counts"], spread["bins_per_nat"]
    nats = max(1, -(-len(counts) // per_nat))
    left, right = _LEFT
    scale = (right - left) / nats
    top, total = max(counts, default=0) or 1, sum(counts) or 1
    yield _text((left + right) / 2, 22, "Entropy of the trainable tokens", size=14)
    selection = SELECTIONS.get(select)
    if selection is None or selection.score != "entropy":
        thresholds = []
    elif len(thresholds) == 1:
        at = left + min(thresholds[0], nats) * scale
        start, stop = (at, right) if selection.high else (left, at)
        yield _rect(start, _TOP, stop - start, _FLOOR - _TOP, _SHADE)
    for index, count in enumerate(counts):
        height = (_FLOOR - _TOP) * count / top
        if count:
            yield _rect(left + index * scale / per_nat, _FLOOR - height, scale / per_nat * 0.9, height, _BAR)
    for tau in thresholds:
        if tau <= nats:
            at = left + tau * scale
            yield f'<path d="M{at:.1f} {_TOP}V{_FLOOR}" stroke="{_LINE}" stroke-width="1.5" stroke-dasharray="4 3"/>'
    yield from _axes(left, right, f"{top / total:.0%}")
    for nat in range(0, nats + 1, -(-nats // 12)):
        yield _text(left + nat * scale, _FLOOR + 16, str(nat))
    label = "nats"
    if thresholds:
        label += f", threshold {thresholds[0]:.2f}" if len(thresholds) == 1 else f", {len(thresholds)} thresholds"
    yield _text((left + right) / 2, _FLOOR + 36, label)


def _shares(shares: list[tuple[int, float]]) -> Iterator[str]:
    """Right: the share of the trainable tokens that is dropped in each epoch."""
    left, right = _RIGHT
    top = max([0.1, *(-(-int(share * 1000) // 100) / 10 for _, share in shares)])
    width = (right - left) / len(shares)
    yield _text((left + right) / 2, 22, "Share of them dropped", size=14)
    for number, (epoch, share) in enumerate(shares):
        height = (_FLOOR - _TOP) * min(share / top, 1)
        if height:
            yield _rect(left + (number + 0.1) * width, _FLOOR - height, 0.8 * width, height, _LINE)
        if number % -(-len(shares) // 12) == 0:
            yield _text(left + (number + 0.5) * width, _FLOOR + 16, str(epoch))
    yield from _axes(left, right, f"{top:.0%}")
    yield _text((left + right) / 2, _FLOOR + 36, "epoch")


def _axes(left: int, right: int, top: str) -> Iterator[str]:
    yield f'<path d="M{left} {_TOP}V{_FLOOR}H{right}" fill="none" stroke="{_INK}"/>'
    yield _text(left - 6, _TOP + 4, top, anchor="end")
    yield _text(left - 6, _FLOOR + 4, "0", anchor="end")


def _rect(x: float, y: float, width: float, height: float, colour: str) -> str:
    return f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" fill="{colour}"/>'


def _text(x: float, y: float, words: str, *, size: int = 12, anchor: str = "middle") -> str:
    larger = f' font-size="{size}"' if size != 12 else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{larger}>{escape(words)}</text>'
