"""``entrodrop report``: one page that shows a directory's scores, what its masks drop, and rows token by token."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from entrodrop_prep import __version__
from entrodrop_prep.config import MaterializeConfig
from entrodrop_prep.config.names import user_path
from entrodrop_prep.errors import ConfigError, OutputError
from entrodrop_prep.export.card.picture import thresholds_of
from entrodrop_prep.masking.curriculum import epoch_rates
from entrodrop_prep.masking.epoch_rows import EpochRows
from entrodrop_prep.masking.quantile import quantile_of
from entrodrop_prep.store.disk import check_regular, renamed_file, scratch, writing
from entrodrop_prep.store.layout import VALIDATION
from entrodrop_prep.store.schema import family
from entrodrop_prep.store.scored import ScoredDataset
from entrodrop_prep.store.shards import local_directory
from entrodrop_prep.training.rows import MaskedRows
from entrodrop_prep.verification.masks import masks_of
from entrodrop_prep.verification.report import charts
from entrodrop_prep.verification.report.rows import Shown, add_masks, sample, surprising
from entrodrop_prep.verification.report.statistics import (
    SEEN_NATS,
    Group,
    Key,
    Statistics,
    read_masks,
    read_scores,
)
from entrodrop_prep.verification.run import kind_of

_PAGE = Path(__file__).parent / "page"
_MARK = b'<meta name="generator" content="entrodrop report">'
MOST_STRINGS, MOST_SURPRISING = 30, 12
SEEN_RATIO, SEEN_SHARE = 0.85, 0.05


def report(
    directory: str | Path,
    out: str | Path = "report.html",
    *,
    against: str | Sequence[str] | None = None,
    against_scores: Sequence[str] = (),
    recipe: str | None = None,
    epochs: int | None = None,
    rows: int = 24,
    seed: int = 0,
) -> Path:
    """Write the report of a scored or masked directory: one HTML file that loads nothing.

    Args:
        directory: scored, or masked.
        out: the file; an earlier report is replaced, another file is not.
        against: of a masked directory the scored ones it was made from, ``SCORED`` or ``NAME=SCORED``.
        against_scores: the scores that these were compared with, ``SCORED2`` or ``NAME=SCORED2``.
        recipe: of a scored directory the YAML or JSON file of settings that masks would be made with.
        epochs: of a scored directory how many epochs are shown; default those of the recipe, else 4.
        rows: how many rows are shown token by token, chosen at random.
        seed: of the choice.

    Returns:
        The file.

    Raises:
        ConfigError: settings that do not go together, a masked directory without ``against``.
        IntegrityError: the directory is damaged, or was not made from these scores.
        OutputError: the file cannot be written, or is not an earlier report.
    """
    path, target = local_directory(str(directory)), user_path(str(out))
    _check_target(target)
    masked = family(kind_of(path)) != "scored"
    with scratch() as cache:
        if masked:
            if recipe or epochs:
                raise ConfigError("a masked directory has its recipe and epochs", fix="leave out --recipe and --epochs")
            described, masks = masks_of(path, against, against_scores, cache)
        else:
            if against:
                raise ConfigError("--against is for masked directories", fix="leave it out")
            described = ScoredDataset(path).manifest
            chosen: dict[str, Any] = {"epochs": epochs} if epochs else {} if recipe else {"epochs": 4}
            masks = MaskedRows.open(path, recipe, against_scores=against_scores, cache_dir=cache, **chosen)
        page = _page(path, described, masks.epoch_rows, masked=masked, count=rows, seed=seed)
    with writing(target), renamed_file(target) as file:
        file.write(page.encode("utf-8"))
    return target


def _check_target(target: Path) -> None:
    """Raises OutputError for a file that is not an earlier report: nothing of the user's is replaced."""
    if check_regular(target):
        with target.open("rb") as file:
            if _MARK not in file.read(1000):
                raise OutputError(
                    "it is there and no report of this program", where=str(target), fix="choose another file"
                )


def _page(path: Path, described: dict[str, Any], rows: EpochRows, *, masked: bool, count: int, seed: int) -> str:
    import jinja2

    config = rows.config
    shown, found = _read(rows, count, seed)
    thresholds = thresholds_of(rows.threshold_summary)
    eligible = _eligible(config, thresholds)
    rates = epoch_rates(config).tolist()
    tokenizer = rows.sources.all[0].scored.tokenizer()
    vocab = max(s.scored.vocab_size for s in rows.sources.all)
    counts, trainable = read_masks(rows, config.epochs, vocab)
    figures = described.get("epochs", []) if masked else []
    env = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_PAGE), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True
    )
    values: dict[str, Any] = {
        "title": f"entrodrop report: {path.name}",
        "lead": _lead(masked, config),
        "warnings": _warnings(found),
        "facts": _facts(described, found, config, thresholds, masked),
        "sample": f"{len(shown)} of {len(rows.columns):,} rows, chosen at random (seed {seed}). Move the slider to see "
        "which tokens each epoch drops.",
        "replaces": config.target != "labels",
        "surprising": surprising(shown, MOST_SURPRISING),
        "charts": _charts(found, thresholds if config.selection.score == "entropy" else [], eligible, rates, figures),
        "tables": _tables(found, described, counts, tokenizer, trainable),
        "version": __version__,
        "style": (_PAGE / "style.css").read_text(encoding="utf-8"),
        "script": (_PAGE / "view.js").read_text(encoding="utf-8"),
        "data": _json(_view(shown, rates, found, config, rows)),
    }
    return env.get_template("page.html.j2").render(values)


def _read(rows: EpochRows, count: int, seed: int) -> tuple[list[Shown], Statistics]:
    chosen = sample(rows, count, seed)
    by_number: dict[int, Shown] = {}
    tokenizers = {n: s.scored.tokenizer() for n, s in enumerate(rows.sources.all)}

    def keep(key: Key, scored: Any, table: Any) -> None:
        source = rows.sources.all[key[0]]
        name = f"{source.name} " if rows.sources.named else ""
        window = f", window {key[2]}" if key[2] else ""
        label = f"{name}row {key[1]}{window}"
        if "id" in table.schema.names:
            label += f", {table.column('id')[0].as_py()}"
        by_number[chosen[key]] = Shown(label, scored, tokenizers[key[0]], set(source.scored.special_ids))

    found = read_scores(rows, set(chosen), keep)
    add_masks(by_number, rows, rows.config.epochs)
    return [by_number[number] for number in sorted(by_number)], found


def _lead(masked: bool, config: MaterializeConfig) -> str:
    if masked:
        return f"A masked dataset of {config.epochs} epochs: which tokens are dropped from training, when and why."
    return (
        f"Scores of a corpus, and what the recipe below would drop from training in {config.epochs} epochs. "
        "Nothing has been masked yet."
    )


def _eligible(config: MaterializeConfig, thresholds: list[float]) -> tuple[float, float] | None:
    """From and to which entropy tokens may be dropped, where one threshold says so."""
    selection = config.selection
    if len(thresholds) != 1 or selection.score != "entropy":
        return None
    return (thresholds[0], float("inf")) if selection.high else (0.0, thresholds[0])


def _warnings(found: Statistics) -> list[str]:
    total = found.total
    if not found.has_surprisal or not total.tokens:
        return []
    lines = []
    if total.surprisal < SEEN_RATIO * total.entropy:
        lines.append(
            "The reference model is right more often than it is sure: its surprisal is "
            f"{total.surprisal / total.tokens:.2f} nats a token, its entropy {total.entropy / total.tokens:.2f}. It "
            "may have been trained on this data; its entropies then say less of what is predictable. (Our rule.)"
        )
    if found.seen_rows > SEEN_SHARE * total.rows:
        lines.append(
            f"{found.seen_rows:,} of {total.rows:,} rows are predicted almost wholly (under {SEEN_NATS:g} nats a "
            "token): the reference model has probably seen them, or they are copies of one another."
        )
    return lines


def _facts(
    described: dict[str, Any], found: Statistics, config: MaterializeConfig, thresholds: list[float], masked: bool
) -> list[tuple[str, str]]:
    scored = described["scored"] if masked else described
    first = scored[0] if isinstance(scored, list) else scored
    names = ", ".join(s["source"]["name"] for s in (scored if isinstance(scored, list) else [scored]))
    mean = found.total.entropy / max(1, found.total.tokens)
    selection = f"{config.select}, " + (
        f"threshold {config.threshold:g} nats" if config.threshold is not None else f"quantile {quantile_of(config):g}"
    )
    facts = [
        ("Source", names),
        ("Reference model", first["model"]["name"]),
        ("Trainable tokens", f"{found.total.tokens:,} in {found.total.rows:,} rows"),
        ("Mean entropy", f"{mean:.3f} nats"),
        *([("Mean surprisal", f"{found.total.surprisal / max(1, found.total.tokens):.3f} nats")] * found.has_surprisal),
        ("Selection", selection),
        ("Threshold", ", ".join(f"{t:.3f}" for t in thresholds[:5]) + (" nats" if thresholds else "none")),
        ("Curriculum", f"{config.schedule}, rate {config.min_rate:g} to {config.max_rate:g}, {config.epochs} epochs"),
        ("Target", config.target),
        *([("Packed", f"rows of at most {config.pack:,} tokens")] if config.pack else []),
        *([("Held out", f"{held['rows']:,} rows, not in this report")] if (held := described.get(VALIDATION)) else []),
        ("Seed of the masks", str(config.seed)),
        ("Content digest", str(described["content_digest"])[:16] + "…"),
    ]
    return facts


def _charts(
    found: Statistics,
    thresholds: list[float],
    eligible: tuple[float, float] | None,
    rates: list[float],
    figures: list[dict[str, Any]],
) -> list[dict[str, str]]:
    one = thresholds[0] if len(thresholds) == 1 else None
    made = [
        {
            "title": "Entropy of the trainable tokens",
            "text": "Dashed: the threshold. Shaded: tokens that may be dropped.",
            "svg": charts.entropies(found.spread, thresholds, eligible),
        },
        {
            "title": "Share of the tokens by entropy",
            "text": "How many tokens have at most that entropy. Ties at the threshold are all eligible.",
            "svg": charts.cumulative(found.spread, thresholds, eligible),
        },
    ]
    if found.has_surprisal:
        made.append(
            {
                "title": "Entropy against surprisal",
                "text": "Easy: sure and right. Surprising: sure and wrong. Lucky: unsure and right. Hard: unsure and "
                "wrong. On the dotted line a model is as wrong as it expects to be.",
                "svg": charts.density(found.density, one),
            }
        )
    made.append(
        {
            "title": "Curriculum",
            "text": "The planned drop rate of the eligible tokens"
            + (", and the share of all trainable tokens that was dropped." if figures else "."),
            "svg": charts.curriculum(rates, [e["dropped_share"] for e in figures]),
        }
    )
    if figures:
        made.append(
            {
                "title": "Labels left",
                "text": "How many labels each epoch trains on.",
                "svg": charts.labels_left([e["labels_left"] for e in figures]),
            }
        )
    return made


def _tables(
    found: Statistics, described: dict[str, Any], counts: Any, tokenizer: Any, trainable: int
) -> list[dict[str, Any]]:
    tables = []
    most = counts[1].argsort(kind="stable")[::-1][:MOST_STRINGS]
    strings = [
        [_visible(str(tokenizer.decode([int(i)]))), f"{i}", f"{counts[1, i]:,}", f"{counts[1, i] / counts[0, i]:.1%}"]
        for i in most.tolist()
        if counts[1, i]
    ]
    if strings:
        share = counts[1].sum() / max(1, trainable)
        tables.append(
            {
                "title": "Most often dropped",
                "text": f"Over all epochs {share:.1%} of the trainable tokens are dropped.",
                "rows": [["token", "id", "dropped", "of the eligible"], *strings],
            }
        )
    for kind, groups in found.groups.items():
        rows = [_group_row(value, group, found) for value, group in _ordered(kind, groups)]
        head = [kind, "rows", "trainable tokens", "mean entropy", *(["mean surprisal"] * found.has_surprisal)]
        tables.append({"title": f"By {kind}", "text": "", "rows": [head, *rows]})
    left = described.get("counts", {})
    reasons = {
        "short_rows": "fewer than two tokens",
        "dropped_long_rows": "longer than --max-length",
        "bad_rows": "cannot be used (rejected.jsonl)",
        "rows_without_loss": "nothing to train on",
        "truncated_rows": "truncated, not left out",
    }
    rows = [[text, f"{left[name]:,}"] for name, text in reasons.items() if left.get(name)]
    if rows:
        tables.append({"title": "Rows left out", "text": "", "rows": [["why", "rows"], *rows]})
    return tables


def _ordered(kind: str, groups: dict[str, Group]) -> list[tuple[str, Group]]:
    if kind == "length":
        return sorted(groups.items(), key=lambda item: int(item[0].split(" ")[0].replace(",", "")))
    return sorted(groups.items(), key=lambda item: -item[1].tokens)


def _group_row(value: str, group: Group, found: Statistics) -> list[str]:
    tokens = max(1, group.tokens)
    surprisal = [f"{group.surprisal / tokens:.3f}"] * found.has_surprisal
    return [_visible(value), f"{group.rows:,}", f"{group.tokens:,}", f"{group.entropy / tokens:.3f}", *surprisal]


def _visible(text: str) -> str:
    """A token's text with what cannot be seen written out."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text).replace(" ", "␣")


def _view(
    shown: list[Shown], rates: list[float], found: Statistics, config: MaterializeConfig, rows: EpochRows
) -> dict[str, Any]:
    """What the page's script reads: scores in thousandths of a nat, masks as bits."""
    formats = {str(s.scored.manifest["identity"].get("row_format", "")) for s in rows.sources.all}
    tops = [
        [max(s.data[name], default=0) for s in shown if s.data[name] is not None] for name in ("entropy", "surprisal")
    ]
    return {
        "rows": [{**s.data, "flags": s.flags.tolist()} for s in shown],
        "rates": rates,
        "turns": any("chat" in f or "completion" in f for f in formats),
        "top_entropy": max(1000, min(6000, max(tops[0], default=0))),
        "top_surprisal": max(1000, min(8000, max(tops[1], default=0))),
    }


def _json(value: Any) -> str:
    """JSON that ends no script element and starts no comment."""
    text = json.dumps(value, ensure_ascii=True, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
