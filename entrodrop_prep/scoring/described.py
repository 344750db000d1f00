"""What a scored directory says of where it comes from and no setting decides: names, licences, special tokens.

Every shard carries it in its footer, so that a manifest that was edited is found out.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from entrodrop_prep import __version__
from entrodrop_prep.scoring.plan import Plan
from entrodrop_prep.scoring.tokenizer import template_digest, vocabulary_digest
from entrodrop_prep.store.shards import Footer


def described(plan: Plan) -> dict[str, Any]:
    """The manifest's ``generator``, ``source`` (but for the digest of the rows), ``model`` and ``tokenizer``."""
    return {
        "generator": f"entrodrop-prep {__version__}",
        "source": {"name": plan.source.name, **({"card": plan.source.card} if plan.source.card else {})},
        "model": {"name": plan.info.name, "context": plan.info.context, "vocab_size": plan.info.vocab_size},
        "tokenizer": {
            "digest": plan.identity["tokenizer"],
            **plan.tokenizer_origin,
            "special_ids": plan.special_ids,
            "eos_id": plan.tokenizer.eos_token_id,
            "pad_id": plan.tokenizer.pad_token_id,
            "vocabulary": vocabulary_digest(plan.tokenizer),
            "chat_template": template_digest(plan.tokenizer),
        },
    }


def described_of(shards: Iterable[Footer], plan: Plan) -> dict[str, Any]:
    """What the first shard says that says it: a directory keeps the names that it was begun with."""
    recorded = (footer.info["described"] for footer in shards if "described" in footer.info)
    return next(recorded, None) or described(plan)
