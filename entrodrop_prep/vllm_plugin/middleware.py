"""What reaches a vLLM server: the requests that scoring needs, each checked before the engine gets it.

vLLM's own check of token ids is left out with ``--skip-tokenizer-init``, and one id outside the vocabulary ends the
engine and the server with it. vLLM's own key leaves ``/pooling`` open.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import os
from typing import Any

from entrodrop_prep.vllm_plugin.request import MOST_BYTES, Limits, problem_of

OPEN = ("/health", "/ping")
"""Paths that say nothing but that the server is there: they need no key."""
READ = (*OPEN, "/version", "/v1/models", "/metrics", "/load")
SCORES = "/pooling"
METHODS = {**dict.fromkeys(READ, ("GET", "HEAD")), "/ping": ("GET", "HEAD", "POST"), SCORES: ("POST",)}
"""All paths that are served, and how."""
KEYS = ("VLLM_API_KEY", "ENTRODROP_API_KEY")
MOST_REFUSED = 8 * MOST_BYTES
SECONDS_TO_SEND = 60.0
"""In which the whole body of a request must have come."""
_KINDS = {401: "Unauthorized", 404: "NotFoundError", 503: "ServiceUnavailableError"}
_HEADERS = (b"host", b"connection", b"content-type", b"content-length", b"authorization", b"accept", b"user-agent")
"""Those of a request for scores that vLLM sees: others choose its id in the engine, for one."""


class ApiKeyMiddleware:
    """ASGI middleware: answers whatever is not a request that scoring needs, and lets the others through.

    401 without ``Authorization: Bearer`` and the key of the environment (VLLM_API_KEY or, where that is not set,
    ENTRODROP_API_KEY), if it has one; 404 and 405 outside ``METHODS``; for ``/pooling`` 400 with a reason where
    ``request.problem_of`` finds one, 413 for a body over ``MOST_BYTES``, 408 for one that does not come.
    """

    def __init__(self, app: Any) -> None:
        self.app = app
        key = next((key for key in (os.environ.get(name, "").strip() for name in KEYS) if key), None)
        self._wanted = f"Bearer {key}".encode() if key else None

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Let the request through, or answer it."""
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
            return
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        path = str(scope["path"]).removeprefix(str(scope.get("root_path") or ""))
        if path not in OPEN and not self._has_key(scope):
            await _answer(send, 401, "Unauthorized")
        elif path not in METHODS:
            await _answer(send, 404, "Not Found: this server gives token entropies, and nothing else")
        elif scope["method"] not in METHODS[path]:
            await _answer(send, 405, "Method Not Allowed")
        elif path != SCORES:
            await self.app(scope, receive, send)
        else:
            await self._score(scope, receive, send)

    def _has_key(self, scope: Any) -> bool:
        given = dict(scope["headers"]).get(b"authorization", b"")
        return self._wanted is None or hmac.compare_digest(given, self._wanted)

    async def _score(self, scope: Any, receive: Any, send: Any) -> None:
        """Read the body of a request for scores, check it, and let it through."""
        limits = _limits(scope)
        if limits is None:
            await _answer(send, 503, "the server does not give its vocabulary, so that ids cannot be checked")
            return
        try:
            body = await asyncio.wait_for(_read(receive), SECONDS_TO_SEND)
        except TimeoutError:
            await _answer(send, 408, f"the request did not come within {SECONDS_TO_SEND:g} s")
            return
        if body is None:
            await _answer(send, 413, f"the request has more than {MOST_BYTES >> 20} MiB")
            return
        problem = problem_of(body, limits)
        if problem is not None:
            await _answer(send, 400, problem)
            return
        sent = False

        async def again() -> Any:
            nonlocal sent
            if sent:
                return await receive()
            sent = True
            return {"type": "http.request", "body": body, "more_body": False}

        headers = [(name, value) for name, value in scope["headers"] if name in _HEADERS]
        await self.app({**scope, "headers": headers}, again, send)


def _limits(scope: Any) -> Limits | None:
    """What the server serves; None where this vLLM does not say it."""
    config = getattr(getattr(scope.get("app"), "state", None), "vllm_config", None)
    if config is None:
        return None
    model = config.model_config
    return Limits(int(model.get_vocab_size()), int(model.max_model_len))


async def _read(receive: Any) -> bytes | None:
    """A request's body; None for one of more than ``MOST_BYTES``.

    More is read and thrown away, up to ``MOST_REFUSED``: who still sends does not see the answer.
    """
    parts, size, more = [], 0, True
    while more and size <= MOST_REFUSED:
        message = await receive()
        part = message.get("body", b"")
        size += len(part)
        more = message.get("more_body", False)
        if size <= MOST_BYTES:
            parts.append(part)
        else:
            parts.clear()
    return b"".join(parts) if size <= MOST_BYTES else None


async def _answer(send: Any, status: int, message: str) -> None:
    """An error in one line of JSON, as vLLM gives it."""
    kind = _KINDS.get(status, "BadRequestError")
    body = json.dumps({"error": {"message": message, "type": kind, "code": status}}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
