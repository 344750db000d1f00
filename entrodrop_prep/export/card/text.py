"""What the card's block says of a masked dataset."""

from __future__ import annotations

import json
import re
import shlex
from typing import Any

from entrodrop_prep.export.card.escape import code, words
from entrodrop_prep.export.card.picture import NAME as PICTURE
from entrodrop_prep.export.card.tables import epoch_table, in_force, left_out, markdown, source_table
from entrodrop_prep.export.card.values import is_hub
from entrodrop_prep.masking.sources import AGAINST, compared_with
from entrodrop_prep.store import digest
from entrodrop_prep.store.layout import PLAIN, VALIDATION

NO_REPO = "path/or/repo"
REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9_][\w.-]*)?", re.ASCII)
PROGRAM, TITLE = "entrodrop_prep", "entrodrop-prep"


def block_text(manifest: dict[str, Any], repo: str = NO_REPO) -> str:
    """What the block says; ``repo`` is what its commands and code load."""
    scored = manifest["scored"]
    several = isinstance(scored, list)
    select = manifest["recipe"].get("select", "low-entropy")
    dropped = _DROPPED.get(select, "Tokens of " + words(select).replace("-", " "))
    extra = [code(name) for name in manifest["identity"].get("add_columns", [])]
    more = f", with {', '.join(extra)}" if extra else ""
    return "\n".join(
        [
            "Training data with entropy-guided token dropout applied in the data: one masked copy of the corpus for "
            f"each epoch, made by {words(manifest['generator'])}. {dropped} "
            "are dropped from training, more of them in later epochs. Rows are `input_ids`, `attention_mask` and "
            f"`labels` (unshifted, -100 = no loss){more}.",
            "",
            *(_picture() if "entropy_histogram" in manifest else []),
            *markdown(epoch_table(manifest["epochs"])),
            "",
            *([*markdown(source_table(manifest["epochs"])), ""] if several else []),
            "Shares are of the trainable tokens.",
            "",
            "## How it was made",
            "",
            *(_sources(scored) if several else origin(scored)),
            *_packing(manifest),
            *(f"- {line}" for line in left_out(manifest["epochs"])),
            *_others(manifest),
            *_recipe(manifest),
            *versions("files written with", manifest.get("environments", [])),
            "",
            "The method is EntroDrop (Entropy-Guided Token Dropout, "
            "[arXiv 2512.23422](https://arxiv.org/abs/2512.23422)): dropping tokens of low entropy, by a sigmoidal "
            "curriculum. Its authors had no part in this. Every number above is a choice of the dataset's author, "
            "or a default of the tool's own, not the paper's.",
            "",
            *_training(manifest, repo),
            "",
            *_verifying(manifest, repo),
            "",
            "## What it is not",
            "",
            "It is no new text: every row is a row of the sources, in the tokens of one tokenizer, and of no use with "
            "another. The entropies are those of one model in one number format. Nothing here shows that training on "
            "it prevents overfitting: compare with training on all tokens, with dropping random tokens, and with "
            "stopping early.",
        ]
    )


_DROPPED = {
    "low-entropy": "Tokens that a reference model finds easy to predict",
    "random": "Tokens chosen at random",
    "low-excess": "Tokens that the reference model predicts no worse than another model, or hardly so,",
    "high-excess": "Tokens that the reference model predicts much worse than another model",
}


def _picture() -> list[str]:
    return [f"![Entropy of the trainable tokens, and the share of them dropped in each epoch]({PICTURE})", ""]


def _training(manifest: dict[str, Any], repo: str) -> list[str]:
    """How to train with it."""
    first, quoted = manifest["epochs"][0]["folder"], json.dumps(repo)
    return [
        "## How to train with it",
        "",
        "```python",
        "from datasets import load_dataset",
        "",
        f'epoch = load_dataset({quoted}, {json.dumps(first)}, split="train")   # one epoch',
        f'every = load_dataset({quoted}, split="train")              # all epochs, one after the other',
        "```",
        "",
        "The rows are in the order to train on. Read them in order, once (`num_train_epochs=1` and "
        '`train_sampling_strategy="sequential"` of `transformers`), do not shuffle them across epochs, and use a '
        "collator that keeps the labels, such as `DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=-100)`. "
        "`entrodrop recipe transformers DIR` prints a whole script.",
    ]


def _verifying(manifest: dict[str, Any], repo: str) -> list[str]:
    """How to prove it."""
    compared = " --against-scores SCORED2" if compared_with(manifest["identity"]) else ""
    digests, quoted = f"The content digest is {code(manifest['content_digest'])}.", shlex.quote(repo)
    return [
        "## How to verify it",
        "",
        "```bash",
        f"entrodrop verify {quoted}                    # the files are those of manifest.json",
        f"entrodrop verify {quoted} --against SCORED{compared}   # and the masks follow from the scores",
        "```",
        "",
        f"{digests} `manifest.json` holds the digest of every file, the recipe, and where everything came from.",
    ]


def origin(scored: dict[str, Any]) -> list[str]:
    """Where the rows come from, and with what they were scored."""
    tokenizer = scored["tokenizer"]
    commit = f"commit {words(tokenizer['commit'])}, " if "commit" in tokenizer else ""
    licence = scored["source"].get("card", {}).get("license")
    dtype = f", {words(scored['identity']['dtype'])}" if "dtype" in scored.get("identity", {}) else ""
    return [
        f"- source: {_source(scored)}" + (f", licence {words(_plain(licence))}" if licence else ""),
        f"- reference model: {words(scored['model']['name'])} ({_identity(scored['model_identity'])})",
        f"- tokenizer: {words(tokenizer.get('name', 'of the model'))} ({commit}digest {code(tokenizer['digest'])})",
        f"- scores: content digest {code(scored['content_digest'])}{dtype}",
        *versions("scored with", scored.get("environments", [])),
        *(
            f"- compared with {line.removeprefix('- ')}"
            for line in (origin(scored[AGAINST])[1:] if AGAINST in scored else [])
        ),
    ]


def versions(what: str, environments: list[dict[str, str]]) -> list[str]:
    """A line for each set of versions, this program's first."""
    recorded = [sorted(e.items(), key=lambda item: (item[0] != PROGRAM, item[0])) for e in environments]
    return [f"- {what} {words(', '.join(f'{n} {v}'.replace(PROGRAM, TITLE, 1) for n, v in e))}" for e in recorded]


def _source(scored: dict[str, Any]) -> str:
    """A source by its name and what it is known by."""
    name, recorded = scored["source"]["name"], scored.get("identity", {}).get("source", {})
    if is_hub(scored):
        revision = f" at commit {words(recorded['revision'])}" if recorded.get("revision") else ""
        linked = f"[{name}](https://huggingface.co/datasets/{name})" if REPO_ID.fullmatch(name) else words(name)
        return f"{linked}{revision}, {words(recorded['config'])}, split {words(recorded['split'])}"
    return f"{words(name)} (digest of its rows {code(scored['source']['digest'])})"


def _recipe(manifest: dict[str, Any]) -> list[str]:
    """The settings, the seed among them, and what the run is known by."""
    settings = ", ".join(f"{k} {words(v)}" for k, v in in_force(manifest).items())
    return [f"- recipe: {settings}", f"- fingerprint: `{digest.of_json(manifest['identity'])}`"]


def _plain(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _sources(scored: list[dict[str, Any]]) -> list[str]:
    """As ``origin``, of each source."""
    lines = []
    for s in scored:
        often = f"weight {s['weight']:g}{', never masked' if s['plain'] else ''}"
        lines += [f"- source {code(s['name'])}, {often}:", *(f"  {line}" for line in origin(s))]
    return lines


def _packing(manifest: dict[str, Any]) -> list[str]:
    """What a reader must know of packed rows."""
    limit = manifest["identity"].get("pack")
    if not limit:
        return []
    apart = [c for c in ("position_ids", "seq_lengths") if c in manifest["identity"].get("add_columns", [])]
    recorded = f"{' and '.join(map(code, apart))} say where each begins" if apart else "nothing says where each begins"
    return [
        f"- packed: rows hold several documents, {limit:,} tokens at most; {recorded}; *filled* is the share of a "
        "row's tokens that are used"
    ]


def _others(manifest: dict[str, Any]) -> list[str]:
    """What is beside the epochs."""
    lines = []
    if PLAIN in manifest:
        lines.append(
            f"- configuration `plain`: {manifest[PLAIN]['rows']:,} rows in the order of epoch 0, nothing dropped"
        )
    if VALIDATION in manifest:
        recorded, share = manifest[VALIDATION], manifest["identity"].get("eval_fraction")
        rows = f"- split `validation`: {recorded['rows']:,} rows"
        if share is None:
            of = f"of {words(recorded['source']['name'])} with all their labels; "
            lines.append(f"{rows} {of}scores: content digest {code(recorded['scored'])}")
        else:
            lines.append(f"{rows} with all their labels, {share:.3g} of each masked source, in no epoch")
    layouts = {entry["layout"] for entry in manifest.get("derived", [])}
    if "concatenated" in layouts:
        lines.append(
            "- `all/` and `all_hf/` (never pushed): all epochs in order, as Parquet files and for "
            "`datasets.load_from_disk`"
        )
    if "jsonl" in layouts:
        lines.append("- `jsonl/` (never pushed): each epoch as a JSONL file")
    return lines


def _identity(identity: dict[str, str]) -> str:
    return f"commit {words(identity['commit'])}" if "commit" in identity else f"digest {code(identity['digest'])}"
