"""What the Hub refuses to readers, in words: gated, private, missing, no such revision, out of reach."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Literal

REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9_][\w.-]*", re.ASCII)
"""``USER/NAME``."""
LOG_IN = "log in with `hf auth login` or set HF_TOKEN"


def refusal(
    error: BaseException, kind: Literal["dataset", "model"], name: str, revision: str | None = None
) -> tuple[str, str] | None:
    """What happened and what to do about it, if ``error`` or what caused it is an answer of the Hub, or its absence."""
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        DisabledRepoError,
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    page = f"{constants.ENDPOINT}/{'datasets/' if kind == 'dataset' else ''}{name}"
    found = list(_causes(error))
    for cause in found:
        if isinstance(cause, GatedRepoError):
            return f"access to the {kind} is restricted (gated)", f"accept its terms on {page}, then {LOG_IN}"
        if isinstance(cause, DisabledRepoError):
            return f"the Hub has disabled access to the {kind}", f"see {page}"
        if isinstance(cause, RepositoryNotFoundError):
            return (
                f"the Hub has no such {kind}, or it is private and you may not read it",
                f"check the id; if the {kind} is private, {LOG_IN}; a local path is written ./{name}",
            )
        if isinstance(cause, RevisionNotFoundError):
            return (
                f"the {kind} has no revision {revision or 'of that name'!r}",
                "give a branch, a tag or a commit of it",
            )
    for cause in found:
        response = getattr(cause, "response", None) if isinstance(cause, HfHubHTTPError) else None
        status = None if response is None else response.status_code
        if status == 401:
            return "the Hub does not accept the token", "log in again with `hf auth login`, or mend or unset HF_TOKEN"
        if status == 403:
            return f"the token may not read the {kind}", f"give it that right, or {LOG_IN} as who has it"
        if status == 429:
            return (
                "the Hub limits how often it may be called",
                "run the same command again later; logged in, more is let",
            )
        if status is not None and status >= 500:
            return f"the Hub has a failure of its own ({status})", "run the same command again later"
    absent = (LocalEntryNotFoundError, ConnectionError) if constants.HF_HUB_OFFLINE else (OfflineModeIsEnabled,)
    if any(isinstance(cause, absent) for cause in found):
        return (
            f"HF_HUB_OFFLINE is set and the {kind} is not in the cache",
            "unset it, or load it once online",
        )
    unanswered = [cause for cause in found if getattr(cause, "response", None) is None]
    if any(isinstance(cause, unreachable_errors()) for cause in unanswered):
        return (
            f"the Hub at {constants.ENDPOINT} cannot be reached",
            f"check the network and the id; a local path is written ./{name}",
        )
    return None


def unreachable_errors() -> tuple[type[Exception], ...]:
    """What is raised where no answer came: by the HTTP library, httpx or in newer versions httpx2, or the system."""
    from huggingface_hub.errors import HfHubHTTPError

    roots = [base for base in HfHubHTTPError.__mro__ if base.__name__ == "HTTPError"]
    return (*roots, ConnectionError, TimeoutError)


def _causes(error: BaseException) -> Iterator[BaseException]:
    """An error, what it was raised from, and so on."""
    seen: set[int] = set()
    found: BaseException | None = error
    while found is not None and id(found) not in seen:
        seen.add(id(found))
        yield found
        found = found.__cause__ or found.__context__
