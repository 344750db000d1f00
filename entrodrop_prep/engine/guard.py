"""A key for every request to a vLLM server: vLLM's own guard leaves ``/pooling`` open."""

from __future__ import annotations

import hmac
import os
from typing import Any

OPEN = ("/health", "/ping")
"""Paths that say nothing but that the server is there."""
KEYS = ("VLLM_API_KEY", "ENTRODROP_API_KEY")
REFUSAL = b'{"error": {"message": "Unauthorized", "type": "Unauthorized", "code": 401}}'


class Guard:
    """ASGI middleware: 401 for what does not carry ``Authorization: Bearer`` with the key of the environment, if any.

    The key is in VLLM_API_KEY or, where that is not set, ENTRODROP_API_KEY.
    """

    def __init__(self, app: Any) -> None:
        self.app = app
        key = next((key for key in (os.environ.get(name, "").strip() for name in KEYS) if key), None)
        self._wanted = f"Bearer {key}".encode() if key else None

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Let the request through, or answer it with 401."""
        if self._lets_through(scope):
            await self.app(scope, receive, send)
            return
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(REFUSAL)).encode())]
        await send({"type": "http.response.start", "status": 401, "headers": headers})
        await send({"type": "http.response.body", "body": REFUSAL})

    def _lets_through(self, scope: Any) -> bool:
        if self._wanted is None or scope["type"] != "http" or scope["path"] in OPEN:
            return True
        given = dict(scope["headers"]).get(b"authorization", b"")
        return hmac.compare_digest(given, self._wanted)
