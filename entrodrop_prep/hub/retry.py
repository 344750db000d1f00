"""Trying again what may pass, and saying what the Hub answered where it does not.

``huggingface_hub`` tries some calls again by itself and others never, the commit among them. Here every call is tried
again, a bounded number of times, after statuses that may pass and after failures of the connection.
"""

from __future__ import annotations

import json
import logging
import random
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TypeVar

from entrodrop_prep.errors import HubError
from entrodrop_prep.hub.credentials import without
from entrodrop_prep.hub.refusals import causes, unreachable_errors

log = logging.getLogger(__name__)
T = TypeVar("T")

PASSING = frozenset({408, 409, 412, 425, 429, 500, 502, 503, 504, 507, 520, 521, 522, 523, 524})
LONGEST_WAIT = 60.0
LONGEST_RETRY_AFTER = 900.0


@dataclass(frozen=True)
class Failure:
    """Why a call failed: ``status`` of the answer or None if there was none, what was said, seconds asked to wait."""

    status: int | None
    said: str
    retry_after: float | None = None

    @property
    def passing(self) -> bool:
        """Whether another try may go well."""
        return self.status is None or self.status in PASSING


class StoreError(ConnectionError):
    """The store for large files refused or was not reached: ``status`` of its answer, None where none is known."""

    def __init__(self, status: int | None, said: str) -> None:
        super().__init__(said)
        self.status = status


@dataclass(frozen=True)
class Retry:
    """``attempts`` tries more after the first; waits of ``seconds``, doubled each time, 50% to 150% of it at random.

    The Hub may repeat the ``token`` in what it says: neither what is logged nor what is raised holds it.
    """

    attempts: int
    seconds: float
    token: str = field(default="", repr=False)

    def __call__(self, doing: str, call: Callable[[], T], explain: Callable[[Failure], HubError]) -> T:
        """What ``call`` returns. Raises what ``explain`` makes of the last failure; what is no failure passes through.

        ``doing`` is for the line that is logged before each new try.
        """
        for attempt in range(self.attempts + 1):
            try:
                return call()
            except transport_errors() as e:
                failure = read(e)
            failure = replace(failure, said=without(failure.said, self.token))
            if not failure.passing or attempt == self.attempts:
                raise explain(failure)  # out here, where no context repeats what the Hub said
            wait = min(LONGEST_WAIT, self.seconds * 2**attempt) * random.uniform(0.5, 1.5)
            if failure.retry_after is not None:
                if failure.retry_after > LONGEST_RETRY_AFTER:
                    raise explain(failure)
                wait = max(wait, failure.retry_after)
            log.warning("%s: %s; trying again in %.1f s", doing, " ".join(failure.said.split()), wait)
            time.sleep(wait)
        raise ValueError("attempts is negative")


def transport_errors() -> tuple[type[Exception], ...]:
    """What calls of ``huggingface_hub`` raise when the Hub refuses or the way to it fails.

    Where its HTTP library reads an answer before it looks at the status, a proxy's page of HTML is a JSONDecodeError.
    """
    return (*unreachable_errors(), json.JSONDecodeError)


def read(error: BaseException) -> Failure:
    """What is known of a failure: the Hub's answer if there was one, else the error itself."""
    from huggingface_hub.errors import HfHubHTTPError

    for found in causes(error):
        response = getattr(found, "response", None) if isinstance(found, HfHubHTTPError) else None
        if response is not None:
            said = getattr(found, "server_message", None) or response.headers.get("X-Error-Message") or ""
            return Failure(response.status_code, f"{response.status_code} {said}".strip(), _seconds(response.headers))
    if isinstance(error, StoreError):
        return Failure(error.status, str(error))
    return Failure(None, f"{type(error).__name__}: {error}" if str(error) else type(error).__name__)


def _seconds(headers: Mapping[str, str]) -> float | None:
    """Retry-After, as a number of seconds or a date; or the Hub's own header of its rate limit."""
    from email.utils import parsedate_to_datetime

    text = (headers.get("Retry-After") or "").strip()
    if text.isdecimal():
        return float(text)
    if text:
        try:
            return max(0.0, parsedate_to_datetime(text).timestamp() - time.time())
        except (ValueError, OverflowError):
            return None
    reset = re.search(r"\br=0\s*;\s*t=(\d+)", headers.get("RateLimit") or "")
    return float(reset[1]) if reset else None
