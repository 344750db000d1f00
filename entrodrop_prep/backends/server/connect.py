"""Whether a server is the right one: its model, its vocabulary, its longest sequence, its plugin."""

from __future__ import annotations

import json
import os
import random
import re
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from entrodrop_prep.backends.agreement import disagreement
from entrodrop_prep.backends.model import DTYPE, IDENTITY, ModelInfo
from entrodrop_prep.backends.server.http import KEY_VARIABLE, Denied, Gone, Server, Trouble, Unusable
from entrodrop_prep.backends.server.request import PATH, answer_bytes, read_answer, request_body
from entrodrop_prep.config.names import user_path
from entrodrop_prep.errors import ConfigError, EntrodropError

if TYPE_CHECKING:
    from entrodrop_prep.backends import Scores

T = TypeVar("T")

PROBE_TOKENS = 32
CONNECT_DEADLINE = 10.0
"""Seconds in which a server that is there but does not answer well gets further chances."""


@dataclass(frozen=True)
class Checks:
    """What a server must be.

    Attributes:
        model: ``--model``.
        longest: tokens of the longest row.
        timeout: seconds that the first scores may take.
    """

    model: str
    info: ModelInfo
    longest: int
    timeout: float

    @property
    def probe(self) -> list[np.ndarray[Any, Any]]:
        """What every server scores when it is connected to: one row of at most ``PROBE_TOKENS`` tokens, the same."""
        generator = np.random.Generator(np.random.Philox(key=2))
        return [generator.integers(0, self.info.vocab_size, min(PROBE_TOKENS, self.longest), np.int32)]


@dataclass(frozen=True)
class Served:
    """What a server says of itself.

    Attributes:
        model: its id for requests.
        version: vLLM's.
        dtype: the number format it runs in; ``unknown`` where `entrodrop serve` has not started it.
        scores: those of the probe.
    """

    model: str
    version: str
    dtype: str
    scores: Scores


def connect(server: Server, checks: Checks) -> Served:
    """Check a server; the first request for scores is made.

    Raises:
        Trouble: it cannot be reached, or does not answer well.
        EntrodropError: it is the wrong server, or it wants a key.
    """
    deadline = time.monotonic() + CONNECT_DEADLINE
    try:
        _get(server, "/health", deadline)
        card, dtype = _card(_json(server, "/v1/models", deadline), checks)
        version = _version(server, deadline)
        model = str(card["id"])
        _check_length(card.get("max_model_len"), checks)
        probe = checks.probe
        body, most = request_body(model, probe), answer_bytes(probe)
        try:
            (scores,) = _steady(
                lambda: read_answer(server.post(PATH, body, checks.timeout, most), probe, checks.info), deadline
            )
        except Denied as e:
            if e.status in (401, 403):
                raise
            raise ConfigError(
                f"the server gives no token entropies ({e})",
                fix="start it with `entrodrop serve MODEL`: it needs the plugin and --runner pooling",
            ) from e
        except Unusable as e:
            raise ConfigError(str(e), fix="start it with `entrodrop serve MODEL`, MODEL being that of --model") from e
    except Denied as e:
        raise denied_error(e, server.url) from e
    except EntrodropError as e:
        raise type(e)(e.what, where=server.url, fix=e.fix) from e
    return Served(model, version, dtype, scores)


def check_same(server: Server, found: Served, first: Served, info: ModelInfo) -> None:
    """Two servers of a run score the same. Raises ConfigError where their scores of the probe differ."""
    differs = disagreement(first.scores, found.scores, info.dtype)
    if differs is not None:
        raise ConfigError(
            f"it scores otherwise than another server of this run: {differs}",
            where=server.url,
            fix="serve the same weights in the same number format everywhere, or leave that server out",
        )


def connect_all(servers: Sequence[Server], checks: Checks) -> list[Served | Trouble]:
    """Check several servers side by side. Raises EntrodropError as ``connect`` does, or where none can be reached."""
    found: list[Served | Trouble | EntrodropError | BaseException | None] = [None] * len(servers)

    def one(i: int) -> None:
        try:
            found[i] = connect(servers[i], checks)
        except BaseException as e:  # noqa: BLE001 - raised again below, by the one who waits
            found[i] = e

    threads = [threading.Thread(target=one, args=(i,), name="connecting", daemon=True) for i in range(len(servers))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    results: list[Served | Trouble] = []
    for result in found:
        if not isinstance(result, (Served, Trouble)):
            raise result or RuntimeError("a thread ended without a result")
        results.append(result)
    reached = [(server, result) for server, result in zip(servers, results, strict=True) if isinstance(result, Served)]
    for server, result in reached[1:]:
        check_same(server, result, reached[0][1], checks.info)
    if not reached:
        raise ConfigError(
            "no server can be reached: " + "; ".join(f"{s.url}: {r}" for s, r in zip(servers, results, strict=True)),
            fix="`entrodrop serve MODEL` starts one",
        )
    return results


def denied_error(denied: Denied, where: str, kind: type[EntrodropError] = ConfigError) -> EntrodropError:
    """The error for a request that a server will never do."""
    if denied.status in (401, 403):
        fix = f"put the server's key into the environment variable {KEY_VARIABLE}"
    elif denied.status == 413:
        fix = "lower --batch-tokens"
    elif denied.status == 404 and kind is ConfigError:
        fix = "check the URL: this is no vLLM server"
    else:
        fix = "look at the server's log: the same request would fail again"
    return kind(f"the server refuses: {denied}", where=where, fix=fix)


def backoff(failures: int) -> float:
    """Seconds to wait after so many failures in a row, 0.2 to 10, shortened at random so that not all come at once."""
    return random.uniform(0.5, 1.0) * float(min(10.0, 0.2 * 2.0 ** min(failures - 1, 10)))


def _steady(ask: Callable[[], T], deadline: float) -> T:
    """What ``ask`` gives; again after Trouble as long as there is time, unless more of the same must be expected."""
    failures = 0
    while True:
        try:
            return ask()
        except Trouble as e:
            failures += 1
            wait = backoff(failures)
            hopeless = isinstance(e, Gone) or (isinstance(e, Unusable) and failures == 3)
            if hopeless or time.monotonic() + wait > deadline:
                raise
            time.sleep(wait)


def _get(server: Server, path: str, deadline: float) -> bytes:
    """A small answer, which may take what is left until the deadline, but a second at least."""
    return _steady(lambda: server.get(path, max(1.0, deadline - time.monotonic())), deadline)


def _json(server: Server, path: str, deadline: float) -> Any:
    """A JSON answer. Raises ConfigError where it is something else."""
    answer = _get(server, path, deadline)
    try:
        return json.loads(answer)
    except (ValueError, RecursionError) as e:
        raise ConfigError(f"GET {path} does not answer with JSON", fix="check the URL: this is no vLLM server") from e


def _version(server: Server, deadline: float) -> str:
    """vLLM's version; ``unknown`` where something between hides it."""
    try:
        found = _json(server, "/version", deadline)
    except (Denied, ConfigError):
        return "unknown"
    version = found.get("version") if isinstance(found, dict) else None
    # It is recorded, so that nothing but a version is taken for one.
    return version if isinstance(version, str) and re.fullmatch(r"[\w.+-]{1,80}", version, re.ASCII) else "unknown"


def _card(listing: Any, checks: Checks) -> tuple[dict[str, Any], str]:
    """The entry of /v1/models that is the model asked for, and its number format. Raises ConfigError."""
    cards = listing.get("data") if isinstance(listing, dict) else None
    if not isinstance(cards, list) or not all(isinstance(c, dict) and "id" in c for c in cards):
        raise ConfigError("GET /v1/models does not list models", fix="check the URL: this is no vLLM server")
    names = [str(card["id"]) for card in cards]
    _check_weights(names, checks)
    dtype = _dtype(names, checks)
    bases: list[dict[str, Any]] = [card for card in cards if not card.get("parent")]  # the others are LoRA adapters
    for card in bases:
        if any(_same_model(str(name), checks) for name in (card["id"], card.get("root")) if name):
            return card, dtype
    raise ConfigError(
        f"it serves {', '.join(str(card['id']) for card in bases) or 'no model'}, not {checks.info.name}",
        fix="give the URL of a server of --model",
    )


def _same_model(served: str, checks: Checks) -> bool:
    """Whether a served id or path is ``--model``: the same name or path, or the same last part of one."""
    if served in (checks.model, checks.info.name):
        return True
    path = user_path(checks.model)
    if os.path.exists(path) and os.path.exists(served) and os.path.samefile(path, served):
        return True
    return served.rstrip("/").rsplit("/", 1)[-1] == checks.info.name.rstrip("/").rsplit("/", 1)[-1]


def _check_weights(served: list[str], checks: Checks) -> None:
    """A server that `entrodrop serve` started also lists its weights' digest. Raises ConfigError for another one."""
    named = [name for name in served if name.startswith(IDENTITY)]
    if named and checks.info.identity and checks.info.identity not in named:
        raise ConfigError(
            f"it serves other weights than those of {checks.info.name}: {named[0].removeprefix(IDENTITY)[:12]}..., "
            f"here they are {checks.info.identity.removeprefix(IDENTITY)[:12]}...",
            fix="serve the same model and revision, or give --model the one that is served",
        )


def _dtype(served: list[str], checks: Checks) -> str:
    """The number format that a server says it runs in, or ``unknown``. Raises ConfigError for another one."""
    named = [name.removeprefix(DTYPE) for name in served if name.startswith(DTYPE)]
    if named and checks.info.dtype not in named:
        raise ConfigError(
            f"it runs in {named[0]}, this run is to be in {checks.info.dtype}",
            fix=f"give --dtype {named[0]}, or serve it with --dtype {checks.info.dtype}",
        )
    return checks.info.dtype if named else "unknown"


def _check_length(most: Any, checks: Checks) -> None:
    if isinstance(most, int) and not isinstance(most, bool) and most < checks.longest:
        raise ConfigError(
            f"it takes at most {most} tokens, rows may have {checks.longest}",
            fix=f"use --max-length {most}, or start it with --max-model-len {checks.longest}",
        )
