"""Deadlines for whole requests: httpx bounds each read, and a server may send one byte at a time."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpcore
import httpx

_now = threading.local()
"""``deadline``: when the request of this thread must be over, by ``time.monotonic``."""


PIECE = 1 << 14
"""Bytes that are written at a time."""


@contextmanager
def within(seconds: float) -> Iterator[None]:
    """Requests of this thread, by a client that ``bounded`` gave, raise httpx.TimeoutException after ``seconds``."""
    _now.deadline = time.monotonic() + seconds
    try:
        yield
    finally:
        _now.deadline = None


def bounded(client: httpx.Client) -> httpx.Client:
    """The client, whose connections heed ``within``: its proxies' too."""
    # httpx has no argument for httpcore's network_backend.
    for transport in (client._transport, *client._mounts.values()):
        if isinstance(transport, httpx.HTTPTransport):
            transport._pool._network_backend = _Backend(transport._pool._network_backend)
    return client


def _left(timeout: float | None) -> float | None:
    """Seconds that one read or write may take. Raises httpcore.ReadTimeout where there is no time left."""
    deadline = getattr(_now, "deadline", None)
    if deadline is None:
        return timeout
    left = float(deadline - time.monotonic())
    if left <= 0:
        raise httpcore.ReadTimeout("the deadline has passed")
    return left if timeout is None else min(timeout, left)


class _Backend(httpcore.NetworkBackend):
    def __init__(self, inner: httpcore.NetworkBackend) -> None:
        self._inner = inner

    def connect_tcp(self, host: str, port: int, *more: Any, **named: Any) -> httpcore.NetworkStream:
        return _Stream(self._inner.connect_tcp(host, port, *more, **named))

    def connect_unix_socket(self, path: str, *more: Any, **named: Any) -> httpcore.NetworkStream:
        return _Stream(self._inner.connect_unix_socket(path, *more, **named))

    def sleep(self, seconds: float) -> None:
        self._inner.sleep(seconds)


class _Stream(httpcore.NetworkStream):
    def __init__(self, inner: httpcore.NetworkStream) -> None:
        self._inner = inner

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        return self._inner.read(max_bytes, _left(timeout))

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        for start in range(0, len(buffer), PIECE):  # of a longer one each part would have the whole time
            self._inner.write(buffer[start : start + PIECE], _left(timeout))

    def close(self) -> None:
        self._inner.close()

    def start_tls(self, ssl_context: Any, *more: Any, **named: Any) -> httpcore.NetworkStream:
        return _Stream(self._inner.start_tls(ssl_context, *more, **named))

    def get_extra_info(self, info: str) -> Any:
        return self._inner.get_extra_info(info)
