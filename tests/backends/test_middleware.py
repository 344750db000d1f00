"""What a server lets through to vLLM: requests that scoring needs, with the key, and nothing that ends an engine."""

from __future__ import annotations

import asyncio
import json
from types import SimpleNamespace
from typing import Any

import pytest

from entrodrop_prep.vllm_plugin import middleware as module
from entrodrop_prep.vllm_plugin.middleware import ApiKeyMiddleware
from entrodrop_prep.vllm_plugin.request import FIELDS, MOST_BYTES, MOST_SEQUENCES, Limits, problem_of

LIMITS = Limits(vocab_size=100, longest=8)
GOOD: dict[str, Any] = {"model": "m", "input": [[1, 99, 0], [5]], "task": "token_classify", "embed_dtype": "float32"}
MODEL = SimpleNamespace(get_vocab_size=lambda: 100, max_model_len=8)
APP = SimpleNamespace(state=SimpleNamespace(vllm_config=SimpleNamespace(model_config=MODEL)))


def ask(
    guard: ApiKeyMiddleware, path: str, *body: bytes, key: str | None = None, method: str = "GET", **more: Any
) -> int:
    """The status of the answer to a request whose body comes in parts."""
    headers = [] if key is None else [(b"authorization", f"Bearer {key}".encode())]
    parts = [{"type": "http.request", "body": part, "more_body": True} for part in body]
    parts.append({"type": "http.request", "body": b"", "more_body": False})
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        return parts.pop(0) if parts else {"type": "http.disconnect"}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    scope = {"type": "http", "path": path, "headers": headers, "method": method, "app": APP, **more}
    asyncio.run(guard(scope, receive, send))
    if sent[0]["status"] >= 400:
        error = json.loads(sent[1]["body"])["error"]
        assert error["code"] == sent[0]["status"]
        assert error["message"].isprintable()
    return int(sent[0]["status"])


class Served:
    """Notes what vLLM would get."""

    def __init__(self) -> None:
        self.bodies: list[bytes] = []
        self.headers: list[tuple[bytes, bytes]] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.headers = scope["headers"]
        if scope["method"] == "POST":
            self.bodies.append((await receive())["body"])
        await send({"type": "http.response.start", "status": 200})


@pytest.fixture(autouse=True)
def no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("VLLM_API_KEY", "ENTRODROP_API_KEY"):
        monkeypatch.delenv(name, raising=False)


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
    assert ask(ApiKeyMiddleware(Served()), "/v1/models") == 200
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    guard = ApiKeyMiddleware(Served())
    for path in ("/v1/models", "/version", "/metrics"):
        assert [ask(guard, path, key=key) for key in ("horse", "mule", "", None)] == [200, 401, 401, 401]
    assert ask(guard, "/pooling", json.dumps(GOOD).encode(), method="POST") == 401
    assert ask(guard, "/health") == 200


def test_what_scoring_needs_is_served_and_nothing_else() -> None:
    guard = ApiKeyMiddleware(Served())
    body = json.dumps(GOOD).encode()
    for path in ("/health", "/ping", "/version", "/v1/models", "/metrics", "/load"):
        assert (
            ask(guard, path) == ask(guard, path, method="HEAD") == ask(guard, "/gate" + path, root_path="/gate") == 200
        )
        assert ask(guard, path, method="DELETE") == 405
    for path in ("/v1/embeddings", "/tokenize", "/classify", "/invocations", "/pooling/", "//pooling", "/docs", ""):
        assert ask(guard, path, body, method="POST") == 404
    assert ask(guard, "/pooling") == 405
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    asyncio.run(guard({"type": "websocket", "path": "/v1/realtime", "headers": []}, None, send))
    assert sent == [{"type": "websocket.close", "code": 1008}]


def test_a_request_for_scores_reaches_vllm_as_it_came() -> None:
    served = Served()
    body = json.dumps(GOOD).encode()
    own = [(b"content-type", b"application/json"), (b"x-request-id", b"1"), (b"x-data-parallel-rank", b"9")]
    assert ask(ApiKeyMiddleware(served), "/pooling", body[:7], body[7:], method="POST", headers=own) == 200
    assert served.bodies == [body]
    assert served.headers == own[:1]
    assert ask(ApiKeyMiddleware(served), "/pooling", b'{"input": [100]}', method="POST") == 400
    assert (
        ask(ApiKeyMiddleware(served), "/pooling", body, method="POST", app=SimpleNamespace(state=SimpleNamespace()))
        == 503
    )
    assert len(served.bodies) == 1


def test_a_body_that_is_too_long_or_does_not_come(monkeypatch: pytest.MonkeyPatch) -> None:
    served = Served()
    piece = bytes(1 << 20)
    assert ask(ApiKeyMiddleware(served), "/pooling", *[piece] * (MOST_BYTES >> 20), b"x", method="POST") == 413
    monkeypatch.setattr(module, "MOST_REFUSED", MOST_BYTES)
    assert ask(ApiKeyMiddleware(served), "/pooling", *[piece] * 100, method="POST") == 413  # the rest is not read
    monkeypatch.setattr(module, "SECONDS_TO_SEND", 0.05)

    async def never() -> Any:
        await asyncio.sleep(60)

    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "path": "/pooling", "headers": [], "method": "POST", "app": APP}
    asyncio.run(ApiKeyMiddleware(served)(scope, never, send))
    assert sent[0]["status"] == 408
    assert served.bodies == []


@pytest.mark.parametrize(
    "given",
    [
        *([[1, -1]], [[1], [100]], [[2**31]], [[2**63]], [[-(2**63)]], [[10**4000]]),
        *([[1.0]], [[True]], [[None]], [["1"]], [[[1]]], [{"prompt": [1]}], ["text"], "text", 1, {}, None),
        *([], [[]], [[1], []], [[1], 2], [1, [2]], [[1] * 9], [[1]] * (MOST_SEQUENCES + 1)),
    ],
)
def test_input_that_would_end_an_engine(given: Any) -> None:
    problem = problem_of(json.dumps({**GOOD, "input": given}).encode(), LIMITS)
    assert problem is not None
    assert "input" in problem
    assert len(problem) < 100


@pytest.mark.parametrize(
    "body",
    [
        *(b"", b"[", b"\xff\xfe", b"[]", b"1", b"null", b"[" * 100_000, b'{"input":' * 100_000, b'{"input": [[NaN]]}'),
        *(b'{"input": [[1e999]]}', b'{"input": [[1]], "input": [[-1]]}', b'{"input": [' + b"9" * 5000 + b"]}"),
    ],
)
def test_a_body_that_is_no_request(body: bytes) -> None:
    assert problem_of(body, LIMITS) is not None


@pytest.mark.parametrize(
    "more",
    [
        *({"truncate_prompt_tokens": 1}, {"priority": 1}, {"request_id": "x"}, {"messages": []}, {"data": 1}),
        *({"task": "embed"}, {"task": ["token_classify"]}, {"add_special_tokens": 1}, {"model": 1}, {"user": {}}),
        *({"\x1b]0;x\x07": 1}, {"x" * 10**6: 1}),
    ],
)
def test_fields_that_scoring_does_not_need(more: dict[str, Any]) -> None:
    problem = problem_of(json.dumps({**GOOD, **more}).encode(), LIMITS)
    assert problem is not None
    assert problem.isprintable()
    assert len(problem) < 250


def test_requests_that_are_right() -> None:
    for given in ([0, 99], [[1]], [[1] * 8] * MOST_SEQUENCES):
        assert problem_of(json.dumps({"input": given}).encode(), LIMITS) is None
    assert problem_of(json.dumps(GOOD).encode(), LIMITS) is None
    assert set(GOOD) <= set(FIELDS)
