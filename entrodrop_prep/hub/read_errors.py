"""Whether the Hub answers, and errors on reading from it."""

from __future__ import annotations

import logging
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from entrodrop_prep.hub import refusals

log = logging.getLogger(__name__)

ANSWER_SECONDS = 5.0
"""How long the Hub may take to say anything at all."""
QUIET_SECONDS = 0.5
"""After which it is said that the Hub is waited for."""
_ANSWERS: dict[str, bool] = {}
"""Endpoint -> whether it answered when this process first asked."""


def refusal(
    error: BaseException, kind: Literal["dataset", "model"], name: str, revision: str | None = None
) -> tuple[str, str] | None:
    """``refusals.read_refusal``, knowing whether the Hub answered this process."""
    from huggingface_hub import constants

    silent = _ANSWERS.get(constants.ENDPOINT) is False
    return refusals.read_refusal(error, kind, name, revision, silent=silent)


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
    modules: list[Any] = [constants, *(sys.modules[m] for m in ("datasets.config",) if m in sys.modules)]
    before = [module.HF_HUB_OFFLINE for module in modules]
    was = os.environ.get("HF_HUB_OFFLINE")
    os.environ["HF_HUB_OFFLINE"] = "1"
    for module in modules:
        module.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        for module, value in zip(modules, before, strict=True):
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
