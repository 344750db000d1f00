"""What the card says of a scored directory, in YAML and in prose."""

from __future__ import annotations

import json
import shlex

from entrodrop_prep.export.card.escape import code, words
from entrodrop_prep.export.card.front import Front, scored_configs
from entrodrop_prep.export.card.picture import NAME as PICTURE
from entrodrop_prep.export.card.text import origin
from entrodrop_prep.export.card.values import scored_infos, values_of
from entrodrop_prep.export.provenance import summary_of
from entrodrop_prep.store.scored import ScoredDataset

CONFIG = "scored"


def scored_front(scored: ScoredDataset) -> Front:
    """Its front matter."""
    rows = sum(int(entry["rows"]) for entry in scored.files)
    return Front(
        scored_configs(CONFIG, scored.content_digest),
        scored_infos(CONFIG, scored),
        values_of([summary_of(scored)], rows),
    )


def scored_text(scored: ScoredDataset, repo: str, *, with_recipe: bool) -> str:
    """What the block says; ``with_recipe``: the recipe is beside the scores."""
    described, counts = scored.manifest, scored.manifest["counts"]
    logprob = " and log-probability" if scored.has_logprob else ""
    picture = ["![Entropy of the trainable tokens](" + PICTURE + ")", ""] if "entropy_histogram" in described else []
    settings = "" if with_recipe else ", epochs=4"
    columns = ", ".join(code(name) for name in scored.schema.names)
    return "\n".join(
        [
            f"The tokens of a corpus with their entropy{logprob} under a reference model, in nats, made by "
            f"{words(described['generator'])}: {counts['rows']:,} rows, {counts['tokens']:,} tokens, "
            f"{counts['trainable_tokens']:,} of them trainable. Masked datasets with entropy-guided token dropout are "
            f"made from it. Columns are {columns}; value t of each list belongs to token t, and its scores to the "
            "prediction of token t from the tokens before it.",
            "",
            *picture,
            "## How it was made",
            "",
            *origin(summary_of(scored)),
            "",
            "## How to make masks from it",
            "",
            "Row by row in training, from the recipe " + ("beside it" if with_recipe else "that you give") + ":",
            "",
            "```python",
            "from entrodrop_prep import MaskedRows",
            "",
            f"rows = MaskedRows.from_hub({json.dumps(repo)}{settings})",
            "```",
            "",
            "Or as files, once: `entrodrop materialize DIR --out masked --epochs 4`, where DIR is a copy of this "
            "repository.",
            "",
            "The method is EntroDrop (Entropy-Guided Token Dropout, "
            "[arXiv 2512.23422](https://arxiv.org/abs/2512.23422)); its authors had no part in this.",
            "",
            "## How to verify it",
            "",
            "```bash",
            f"entrodrop verify {shlex.quote(repo)}   # the files are those of manifest.json",
            "```",
            "",
            f"The content digest is {code(scored.content_digest)}.",
            "",
            "## What it is not",
            "",
            "It is no new text, and of no use with another tokenizer. The scores are those of one model in one number "
            "format.",
        ]
    )
