"""A server asks for the key that the environment has, whoever started it."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from entrodrop_prep.engine.guard import Guard


def status(guard: Guard, path: str, key: str | None) -> int:
    headers = [] if key is None else [(b"authorization", f"Bearer {key}".encode())]
    sent: list[dict[str, Any]] = []

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    asyncio.run(guard({"type": "http", "path": path, "headers": headers}, None, send))
    return int(sent[0]["status"])


async def served(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200})


@pytest.mark.parametrize(
    "environment",
    [
        {"ENTRODROP_API_KEY": "horse"},
        {"VLLM_API_KEY": "horse"},
        {"VLLM_API_KEY": "horse", "ENTRODROP_API_KEY": "mule"},
        {"VLLM_API_KEY": "", "ENTRODROP_API_KEY": " horse\n"},
    ],
)
def test_all_but_health_wants_the_key(environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("VLLM_API_KEY", "ENTRODROP_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    assert status(Guard(served), "/pooling", None) == 200
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    guard = Guard(served)
    for path in ("/pooling", "/v1/models", "/v1/completions"):
        assert [status(guard, path, key) for key in ("horse", "mule", "", None)] == [200, 401, 401, 401]
    assert status(guard, "/health", None) == 200
