"""What earlier versions wrote and this one does not read: bounds of the entropy, and masks made from them."""

from __future__ import annotations

import os
from typing import Any

from entrodrop_prep.errors import UnsupportedError


def refuse_bounds(described: Any, where: str | os.PathLike[str]) -> None:
    """Raises UnsupportedError where a manifest, a footer or the note of an unfinished run is of bounds.

    Args:
        described: the JSON value that was read, whatever it is.
        where: the file that it was read from.
    """
    for described_ in _objects(described):
        schema, estimator, bound = (described_.get(name) for name in ("schema", "estimator", "bounds"))
        if schema == "scored-bounds/1" or estimator == "topk" or bound in ("lo", "hi"):
            raise UnsupportedError(
                "it was made from bounds of the entropy (--estimator topk), which this version does not read",
                where=os.fspath(where),
                fix="score the rows again: the entropy itself is stored",
            )


def _objects(described: Any) -> list[dict[str, Any]]:
    """The objects that say what is described and what it was made from."""
    parts = [described]
    if isinstance(described, dict):
        scored = described.get("scored")
        parts += [*(scored if isinstance(scored, list) else [scored]), described.get("validation")]
    return [o for part in parts if isinstance(part, dict) for o in (part, part.get("identity")) if isinstance(o, dict)]
