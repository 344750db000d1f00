"""The dataset card: README.md, which makes each epoch a configuration for ``datasets`` and tells what this is.

The file is the user's: only the YAML keys ``configs`` and the block between the two marks are ours.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from entrodrop_prep.config import RECIPE_FIELDS
from entrodrop_prep.errors import OutputError
from entrodrop_prep.export.epoch import OTHER_FILES, PLAIN, VALIDATION
from entrodrop_prep.shards import write_bytes

NAME = "README.md"
BEGIN = "<!-- entrodrop-prep: begin (rewritten by the tool) -->"
END = "<!-- entrodrop-prep: end -->"
_DESCRIPTION = "content digest"


def write_card(directory: Path, manifest: dict[str, Any]) -> None:
    """Write or renew README.md for a masked dataset's manifest. Raises OutputError for one that is not text."""
    path = directory / NAME
    try:
        before = path.read_text(encoding="utf-8") if path.exists() else ""
    except UnicodeDecodeError as e:
        raise OutputError("it is not UTF-8 text", where=str(path), fix="mend or remove it, and run again") from e
    front, text = _split(before)
    front = _renewed(front, _configs(manifest))
    block = f"{BEGIN}\n{_text(manifest)}\n{END}"
    end = text.rfind(END)
    begin = text.rfind(BEGIN, 0, max(end, 0))
    if begin >= 0:
        text = text[:begin] + block + text[end + len(END) :]
    else:
        text = f"{text.rstrip()}\n\n{block}\n" if text.strip() else f"# {directory.resolve().name}\n\n{block}\n"
    content = f"---\n{front}---\n\n{text.strip()}\n"
    if before != content:
        write_bytes(path, content.encode())


def _configs(manifest: dict[str, Any]) -> list[dict[str, Any]]:
    """``all`` = the epochs in order, the one default; then one configuration an epoch, and ``plain`` if it is there."""

    def files(names: list[str]) -> list[dict[str, Any]]:
        paths = [f"{name}/train-*.parquet" for name in names]
        train = {"split": "train", "path": paths if len(paths) > 1 else paths[0]}
        validation = {"split": VALIDATION, "path": OTHER_FILES[VALIDATION]}
        return [train, *([validation] if VALIDATION in manifest else [])]

    folders = [e["folder"] for e in manifest["epochs"]]
    told = {"description": f"{_DESCRIPTION} {manifest['content_digest']}"}
    return [
        {"config_name": "all", **told, "default": True, "data_files": files(folders)},
        *(
            {"config_name": name, **told, "data_files": files([name])}
            for name in [*folders, *([PLAIN] if PLAIN in manifest else [])]
        ),
    ]


def _split(content: str) -> tuple[str, str]:
    """YAML front matter, empty if there is none that can be read, and the text behind it."""
    import yaml

    found = re.match(r"---[ \t]*\n(.*?)^---[ \t]*(?:\n|\Z)", content, re.DOTALL | re.MULTILINE)
    if found:
        try:
            if isinstance(yaml.safe_load(found[1]) or {}, dict):
                return found[1], content[found.end() :].lstrip("\n")
        except yaml.YAMLError:
            pass
    return "", content


def _renewed(front: str, ours: list[dict[str, Any]]) -> str:
    """Front matter with our configurations in it; the user's own, and every other line, stay as they are."""
    import yaml

    meta = yaml.safe_load(front) or {}
    listed = meta.pop("configs", None)
    theirs = [c for c in listed if isinstance(c, dict) and not _is_ours(c)] if isinstance(listed, list) else []
    if any(c.get("default") for c in theirs):
        del ours[0]["default"]
    block = yaml.safe_dump({"configs": [*ours, *theirs]}, sort_keys=False, allow_unicode=True)
    old = re.search(r"^configs[ \t]*:.*\n(?:[ \t-].*\n)*", front, re.MULTILINE)
    start, stop = old.span() if old else (len(front), len(front))
    if (yaml.safe_load(front[:start] + front[stop:]) or {}) != meta:  # an unusual way to write a list: write all anew
        return block + yaml.safe_dump(meta, sort_keys=False, allow_unicode=True)
    return front[:start] + block + front[stop:]


def _is_ours(config: dict[str, Any]) -> bool:
    name, told = str(config.get("config_name")), str(config.get("description"))
    return bool(re.fullmatch(r"all|epoch_\d+", name)) or (name == PLAIN and told.startswith(_DESCRIPTION))


def epoch_table(epochs: list[dict[str, Any]]) -> list[list[str]]:
    """The per-epoch figures as text, header first."""
    rows = [["epoch", "drop rate", "rows", "tokens", "trainable", "eligible", "dropped", "labels left"]]
    for e in epochs:
        low, high = f"{e['rate_min']:.3f}", f"{e['rate_max']:.3f}"
        rows.append(
            [
                str(e["epoch"]),
                low if low == high else f"{low} to {high}",
                f"{e['rows']:,}",
                f"{e['tokens']:,}",
                f"{e['trainable']:,}",
                f"{e['eligible_share']:.1%}",
                f"{e['dropped_share']:.1%}",
                f"{e['labels_left']:,}",
            ]
        )
    return rows


def source_table(epochs: list[dict[str, Any]]) -> list[list[str]]:
    """The figures of each source in each epoch as text, header first."""
    rows = [["epoch", "source", "rows", "tokens", "trainable", "dropped", "labels left"]]
    for e in epochs:
        for name, s in sorted(e.get("sources", {}).items()):
            figures = [f"{s[n]:,}" for n in ("rows", "tokens", "trainable", "dropped", "labels_left")]
            rows.append([str(e["epoch"]), name, *figures])
    return rows


def aligned(rows: list[list[str]]) -> list[str]:
    """A table as lines, cells set right in columns."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]


def _text(manifest: dict[str, Any]) -> str:
    """What the block says."""
    recipe, scored = manifest["recipe"], manifest["scored"]
    lines = _markdown(epoch_table(manifest["epochs"]))
    if isinstance(scored, list):
        lines += ["", *_markdown(source_table(manifest["epochs"]))]
    settings = ", ".join(f"{k} {recipe[k]}" for k in RECIPE_FIELDS if recipe.get(k) is not None)
    first = manifest["epochs"][0]["folder"]
    return "\n".join(
        [
            "Training data with entropy-guided token dropout (the method of arXiv 2512.23422) applied in the data: one "
            f"masked copy of the corpus for each epoch, made by {manifest['generator']}. Rows are `input_ids`, "
            "`attention_mask` and `labels` (unshifted, -100 = no loss), and stand in the order to train on: read them "
            "in order, do not shuffle, and do not rebuild the labels.",
            "",
            "```python",
            "from datasets import load_dataset",
            "",
            f'epoch = load_dataset("path/or/repo", "{first}", split="train")   # one epoch',
            'every = load_dataset("path/or/repo", split="train")              # all epochs, one after the other',
            "```",
            "",
            *lines,
            "",
            "Shares are of the trainable tokens.",
            "",
            *(_sources(scored) if isinstance(scored, list) else _origin(scored)),
            *_others(manifest),
            *([_bounds(manifest)] if recipe.get("bounds") else []),
            f"- recipe: {settings}. Defaults are this tool's own, not the paper's.",
        ]
    )


def _markdown(table: list[list[str]]) -> list[str]:
    lines = [f"| {' | '.join(row)} |" for row in table]
    lines.insert(1, "|" + " ---: |" * len(table[0]))
    return lines


def _origin(scored: dict[str, Any]) -> list[str]:
    """Where the rows come from."""
    return [
        f"- source: {scored['source']['name']}",
        f"- reference model: {scored['model']['name']} ({_identity(scored['model_identity'])})",
        f"- scores: content digest `{scored['content_digest']}`",
    ]


def _sources(scored: list[dict[str, Any]]) -> list[str]:
    """As ``_origin``, of each source."""
    lines = []
    for s in scored:
        often = f"weight {s['weight']:g}{', never masked' if s['plain'] else ''}"
        lines += [f"- source `{s['name']}`, {often}:", *(f"  {line}" for line in _origin(s))]
    return lines


def _others(manifest: dict[str, Any]) -> list[str]:
    """What stands beside the epochs."""
    lines = []
    if PLAIN in manifest:
        lines.append(
            f"- configuration `plain`: {manifest[PLAIN]['rows']:,} rows in the order of epoch 0, nothing dropped"
        )
    if VALIDATION in manifest:
        told = manifest[VALIDATION]
        lines.append(
            f"- split `validation`: {told['rows']:,} rows of {told['source']['name']} with all their labels; scores: "
            f"content digest `{told['scored']}`"
        )
    return lines


def _bounds(manifest: dict[str, Any]) -> str:
    """What is said of masks that were made from bounds."""
    name = {"lo": "lower", "hi": "upper"}[manifest["recipe"]["bounds"]]
    text = f"- entropy: its {name} bound, from the top k of a stock vLLM server (experimental)"
    if "open_share" in manifest:
        text += f"; the bounds leave open whether {manifest['open_share']:.1%} of the trainable tokens may be dropped"
    return text


def _identity(identity: dict[str, str]) -> str:
    return f"commit {identity['commit']}" if "commit" in identity else f"digest `{identity['digest']}`"
