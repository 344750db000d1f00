"""One server as the dispatcher sees it: whether it is up, and how much it may have at once."""

from __future__ import annotations

import time

from entrodrop_prep.backends.server.connect import Served, backoff
from entrodrop_prep.backends.server.http import Busy, Server, Trouble

IN_FLIGHT = 4
"""Requests to one server at a time."""
GROWTH = 8
"""Answers in a row after which a server that was full is given more at once."""


class ServerState:
    """A server, and how it is doing.

    Attributes:
        served: None while it is down.
        window: sequences that may be in flight: fewer after it was full, more again as it answers.
        busy: sequences in flight.
    """

    def __init__(self, server: Server, found: Served | Trouble, most: int) -> None:
        self.server = server
        self.served = found if isinstance(found, Served) else None
        self.reason = "no answer yet" if self.served else str(found)
        self.most = self.window = IN_FLIGHT * most
        self.busy = 0
        self.failures, self.good = 0, 0  # in a row
        self.failed_at = self.ready_at = 0.0
        self.threads = IN_FLIGHT + 1

    def room(self, now: float) -> int:
        """Sequences that it may be sent in one request."""
        if self.served is None or now < self.ready_at:
            return 0
        return max(0, min(max(1, self.window // IN_FLIGHT), self.window - self.busy))

    def answered(self) -> None:
        """It has done well; after some time it gets more at once again."""
        self.failures = 0
        self.good += 1
        if self.good >= GROWTH:
            self.good = 0
            self.window = min(self.most, self.window + max(1, self.window // 4))

    def failed(self, trouble: Trouble, sent_at: float, longest_pause: float) -> None:
        """It gets nothing for a moment, a longer one each time. Requests that were out together count once."""
        self.reason = str(trouble)
        if sent_at <= self.failed_at:
            return
        self.failed_at, self.good = time.monotonic(), 0
        if isinstance(trouble, Busy) and trouble.full and self.window > 1:
            self.window //= 2
            self.failures = 0
        self.failures += 1
        pause = min(backoff(self.failures), longest_pause)
        self.ready_at = self.failed_at + max(pause, trouble.retry_after if isinstance(trouble, Busy) else 0.0)
