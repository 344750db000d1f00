"""The Hub's refusals as one line each: what happened and what to do, when something is read and when it is written."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

LOG_IN = "log in with `hf auth login` or set HF_TOKEN"
_AGAIN = "run the same command again later"
_TOKEN = "the Hub does not accept the token"
_RATE = "the Hub limits how often it may be called"


@dataclass(frozen=True)
class _Lines:
    """``(what happened, what to do)``, with places for values; None where it cannot happen."""

    read: tuple[str, str] | None = None
    write: tuple[str, str] | None = None


REFUSALS: dict[str | int, _Lines] = {
    "gated": _Lines(("access to the {kind} is restricted (gated)", f"accept its terms on {{page}}, then {LOG_IN}")),
    "disabled": _Lines(("the Hub has disabled access to the {kind}", "see {page}")),
    "missing": _Lines(
        (
            "the Hub has no such {kind}, or it is private and you may not read it",
            f"check the id; if the {{kind}} is private, {LOG_IN}; a local path is written ./{{name}}",
        )
    ),
    "revision": _Lines(("the {kind} has no revision {revision}", "give a branch, a tag or a commit of it")),
    "offline": _Lines(("HF_HUB_OFFLINE is set and the {kind} is not in the cache", "unset it, or load it once online")),
    "unreachable": _Lines(
        ("the Hub at {endpoint} cannot be reached", "check the network and the id; a local path is written ./{name}"),
        ("the Hub at {endpoint} cannot be reached", "check the network and HF_ENDPOINT, and push again"),
    ),
    400: _Lines(write=("the Hub does not take the request", "see what it says")),
    401: _Lines(
        (_TOKEN, "log in again with `hf auth login`, or correct or unset HF_TOKEN"),
        (_TOKEN, "log in again with `hf auth login`, or set HF_TOKEN to one that is valid"),
    ),
    402: _Lines(write=("the Hub asks for payment", "see the plan of the account, or push to another")),
    403: _Lines(
        ("the token may not read the {kind}", f"give it that right, or {LOG_IN} of an account that has it"),
        ("the token may not do this", "use a token that may write to this repository, or push to one of your own"),
    ),
    404: _Lines(
        write=("the Hub does not find it, or not for this token", "check the name, the branch and the token's rights")
    ),
    409: _Lines(write=("another change is in progress there", "wait for it, and push again")),
    412: _Lines(
        write=("others keep committing to the branch", "push again{later}, or to a branch of your own with --branch")
    ),
    413: _Lines(
        write=(
            "the commit is too large for the Hub",
            "make the directory again with a larger --rows-per-shard: fewer files",
        )
    ),
    429: _Lines((_RATE, f"{_AGAIN}; logged in, more calls are allowed"), (_RATE, "push again{later}")),
    500: _Lines(
        ("the Hub has a failure of its own ({status})", _AGAIN),
        ("the Hub has a failure of its own", "push again{later}"),
    ),
    "other": _Lines(write=("the Hub refuses", "see what it says, and push again")),
}
"""By the kind of refusal, or the HTTP status; 500 for every one above it too."""


def read_refusal(
    error: BaseException,
    kind: Literal["dataset", "model"],
    name: str,
    revision: str | None = None,
    *,
    silent: bool = False,
) -> tuple[str, str] | None:
    """What happened and what to do about it, for an error on reading from the Hub.

    Args:
        error: as it was raised; what it was raised from is looked at too.
        kind: what was read.
        name: its id on the Hub.
        revision: that was asked for.
        silent: whether the Hub did not answer when this process first called it.

    Returns:
        Two lines without a full stop; None where the error is neither an answer of the Hub nor the lack of one.
    """
    from huggingface_hub import constants

    case, status = _case(list(causes(error)), silent)
    lines = REFUSALS[case].read if case is not None else None
    if lines is None:
        return None
    values = {
        "kind": kind,
        "name": name,
        "page": f"{constants.ENDPOINT}/{'datasets/' if kind == 'dataset' else ''}{name}",
        "revision": repr(revision or "of that name"),
        "endpoint": constants.ENDPOINT,
        "status": status,
    }
    happened, fix = (line.format(**values) for line in lines)
    return (f"{happened}, and the {kind} is not in the cache" if case == "unreachable" and silent else happened), fix


def write_refusal(status: int | None, retry_after: float | None) -> tuple[str, str]:
    """What happened and what to do about it, for an answer to a push.

    Args:
        status: of the HTTP answer; None where none came.
        retry_after: seconds that the Hub asks to wait.

    Returns:
        Two lines; the first may name the ``{endpoint}``.
    """
    case: str | int = "unreachable" if not status else min(status, 500)
    lines = REFUSALS.get(case, REFUSALS["other"]).write or REFUSALS["other"].write or ("", "")
    return lines[0], lines[1].format(later=f" in {retry_after:.0f} s" if retry_after else " later")


def unreachable_errors() -> tuple[type[Exception], ...]:
    """What is raised where no answer came: by the HTTP library, httpx or in newer versions httpx2, or the system."""
    from huggingface_hub.errors import HfHubHTTPError

    roots = [base for base in HfHubHTTPError.__mro__ if base.__name__ == "HTTPError"]
    return (*roots, ConnectionError, TimeoutError)


def _case(chain: list[BaseException], silent: bool) -> tuple[str | int | None, int | None]:
    """The key of ``REFUSALS`` for what was read, and the HTTP status if there is one."""
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

    by_type = (
        (GatedRepoError, "gated"),
        (DisabledRepoError, "disabled"),
        (RepositoryNotFoundError, "missing"),
        (RevisionNotFoundError, "revision"),
    )
    for cause in chain:
        for error, case in by_type:
            if isinstance(cause, error):
                return case, None
    answers = [getattr(c, "response", None) if isinstance(c, HfHubHTTPError) else None for c in chain]
    for status in [answer.status_code for answer in answers if answer is not None]:
        if status >= 500 or (status in REFUSALS and REFUSALS[status].read):
            return min(status, 500), status
    if silent and any(isinstance(c, (LocalEntryNotFoundError, OfflineModeIsEnabled, ConnectionError)) for c in chain):
        return "unreachable", None
    absent = (LocalEntryNotFoundError, ConnectionError) if constants.HF_HUB_OFFLINE else (OfflineModeIsEnabled,)
    if any(isinstance(cause, absent) for cause in chain):
        return "offline", None
    if any(isinstance(c, unreachable_errors()) for c in chain if getattr(c, "response", None) is None):
        return "unreachable", None
    return None, None


def causes(error: BaseException) -> Iterator[BaseException]:
    """An error, what it was raised from, and so on."""
    seen: set[int] = set()
    found: BaseException | None = error
    while found is not None and id(found) not in seen:
        seen.add(id(found))
        yield found
        found = found.__cause__ or found.__context__
