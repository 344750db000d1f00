"""What the Hub refuses to readers, in words: gated, private, missing, no such revision, out of reach."""

from __future__ import annotations

import logging
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

log = logging.getLogger(__name__)

ANSWER_SECONDS = 5.0
"""How long the Hub may take to say anything at all."""
QUIET_SECONDS = 0.5
"""After which it is said that the Hub is waited for."""
_ANSWERS: dict[str, bool] = {}
"""Endpoint -> whether it answered when this process first asked."""
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
    silent = (
        f"the Hub at {constants.ENDPOINT} cannot be reached",
        f"check the network and the id; a local path is written ./{name}",
    )
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
    not_cached = (LocalEntryNotFoundError, OfflineModeIsEnabled, ConnectionError)
    if _ANSWERS.get(constants.ENDPOINT) is False and any(isinstance(cause, not_cached) for cause in found):
        return f"{silent[0]}, and the {kind} is not in the cache", silent[1]
    absent = (LocalEntryNotFoundError, ConnectionError) if constants.HF_HUB_OFFLINE else (OfflineModeIsEnabled,)
    if any(isinstance(cause, absent) for cause in found):
        return (
            f"HF_HUB_OFFLINE is set and the {kind} is not in the cache",
            "unset it, or load it once online",
        )
    unanswered = [cause for cause in found if getattr(cause, "response", None) is None]
    if any(isinstance(cause, unreachable_errors()) for cause in unanswered):
        return silent
    return None


@contextmanager
def asking(kind: str, name: str) -> Iterator[None]:
    """Say that the Hub is asked for something; where it does not answer, the block sees only what is in the caches.

    The clients try again and again for minutes where a host is silent; this takes ``ANSWER_SECONDS``.
    """
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE or answers(kind, name):
        yield
        return
    log.warning("%s does not answer: looking for the %s in the cache", constants.ENDPOINT, kind)
    places: list[Any] = [constants, *(sys.modules[m] for m in ("datasets.config",) if m in sys.modules)]
    before = [module.HF_HUB_OFFLINE for module in places]
    was = os.environ.get("HF_HUB_OFFLINE")
    os.environ["HF_HUB_OFFLINE"] = "1"
    for module in places:
        module.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        for module, value in zip(places, before, strict=True):
            module.HF_HUB_OFFLINE = value
        os.environ.pop("HF_HUB_OFFLINE") if was is None else os.environ.update(HF_HUB_OFFLINE=was)


def answers(kind: str, name: str) -> bool:
    """Whether the Hub says anything; asked once a process. ``kind`` and ``name`` are what it is wanted for."""
    from huggingface_hub import constants

    if constants.ENDPOINT not in _ANSWERS:
        _ANSWERS[constants.ENDPOINT] = _answers(constants.ENDPOINT, f"the {kind} {name}")
    return _ANSWERS[constants.ENDPOINT]


def check_answers(kind: Literal["dataset", "model"], name: str) -> str | None:
    """What is wrong where the Hub does not answer and no cache knows of ``name``; None where there is hope."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE or answers(kind, name):
        return None
    hub = Path(constants.HF_HUB_CACHE, f"{kind}s--{name.replace('/', '--')}")
    prepared = Path(
        os.environ.get("HF_DATASETS_CACHE") or Path(constants.HF_HOME, "datasets"), name.replace("/", "___")
    )
    if hub.exists() or (kind == "dataset" and prepared.exists()):
        return None
    return f"the Hub at {constants.ENDPOINT} cannot be reached, and the {kind} is not in the cache"


def _answers(endpoint: str, wanted: str) -> bool:
    """Whether an HTTP server says anything; True where that is not for us to say, behind a proxy."""
    import http.client
    import ssl
    import urllib.parse
    import urllib.request

    url = urllib.parse.urlsplit(endpoint)
    if url.scheme not in ("http", "https") or not url.hostname:
        return True
    if url.scheme in urllib.request.getproxies() and not urllib.request.proxy_bypass(url.hostname):
        return True
    kind = http.client.HTTPSConnection if url.scheme == "https" else http.client.HTTPConnection
    connection = kind(url.hostname, url.port, timeout=ANSWER_SECONDS)
    answered = threading.Event()

    def ask() -> None:
        try:
            connection.request("HEAD", "/")
            connection.getresponse()
        except (ssl.SSLError, http.client.HTTPException):  # some answer: what it means is for the client to say
            pass
        except OSError:
            return
        finally:
            connection.close()
        answered.set()

    threading.Thread(target=ask, daemon=True).start()  # names may take longer to look up than any timeout says
    if not answered.wait(QUIET_SECONDS):
        log.info("contacting %s for %s", endpoint, wanted)
    return answered.wait(ANSWER_SECONDS)


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
