"""What a name that a user gave can mean: a path here, or a repository on the Hub."""

from __future__ import annotations

import os
from pathlib import Path


def user_path(name: str) -> Path:
    """A path with ``~`` as the user's home; one that means no user's home stays as it is."""
    return Path(os.path.expanduser(name))


def only_a_path(name: str) -> bool:
    """Whether the name of a model or a tokenizer can only be a path: it is no ``name`` or ``owner/name``."""
    return name.startswith((".", "/", "~")) or name.count("/") > 1 or "\\" in name


def is_repo_id(name: str) -> bool:
    """Whether a name is ``USER/NAME`` by the Hub client's own rule."""
    return "/" in name and is_hub_name(name)


def is_hub_name(name: str) -> bool:
    """Whether a name is ``NAME`` or ``USER/NAME`` by the Hub client's own rule."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True
