"""What the Hub's refusals of a push mean, and what to do about them."""

from __future__ import annotations

from entrodrop_prep.hub.retry import Failure

_UNREACHABLE = ("the Hub at {endpoint} cannot be reached", "check the network and HF_ENDPOINT, and push again")
_OTHER = ("the Hub refuses", "see what it says, and push again")
_TROUBLE = ("the Hub has a failure of its own", "push again{later}")
_WORDS = {
    400: ("the Hub does not take the request", "see what it says"),
    401: (
        "the Hub does not accept the token",
        "log in again with `hf auth login`, or set HF_TOKEN to one that is valid",
    ),
    402: ("the Hub asks for payment", "see the plan of the account, or push to another"),
    403: ("the token may not do this", "use a token that may write to this repository, or push to one of your own"),
    404: ("the Hub does not find it, or not for this token", "check the name, the branch and the token's rights"),
    409: ("another change is going on there", "wait for it, and push again"),
    412: ("others keep committing to the branch", "push again{later}, or to a branch of your own with --branch"),
    413: (
        "the commit is too large for the Hub",
        "make the directory again with a larger --rows-per-shard: fewer files",
    ),
    429: ("the Hub limits how often it may be called", "push again{later}"),
}


def meaning(failure: Failure) -> tuple[str, str]:
    """What happened, and what to do; the former may name the ``{endpoint}``."""
    happened, fix = _WORDS.get(failure.status or 0, _OTHER if failure.status else _UNREACHABLE)
    if failure.status and failure.status >= 500:
        happened, fix = _TROUBLE
    return happened, fix.format(later=f" in {failure.retry_after:.0f} s" if failure.retry_after else " later")
