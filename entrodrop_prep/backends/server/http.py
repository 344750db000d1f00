"""One server: requests to it, and what each way to fail means."""

from __future__ import annotations

import ipaddress
import json
import os
from collections.abc import Sequence
from urllib.parse import urlsplit

import httpx

from entrodrop_prep.backends.server.deadline import bounded, within
from entrodrop_prep.errors import ConfigError
from entrodrop_prep.terminal.text import shown_url

KEY_VARIABLE = "ENTRODROP_API_KEY"
CONNECT_SECONDS = 5.0
HEALTH_SECONDS = 10.0
MOST_BYTES = 1 << 20
"""Of an answer that is not scores."""
KEPT_ALIVE_SECONDS = 2.0
"""Less than the 5 s after which vLLM closes an idle connection, or a request would meet one just closed."""
LONGEST_RETRY_AFTER = 30.0
BUSY, PASSING = (429, 503), (408, 502, 504)


class Trouble(Exception):
    """A request that brought nothing, where another may. ``str()`` is the reason, for people."""


class Gone(Trouble):
    """Nothing listens there, or no connection comes about."""


class Cut(Trouble):
    """The connection or something between ended before the answer did."""


class Slow(Trouble):
    """No answer in time."""


class Failed(Trouble):
    """The server failed at it."""


class Unusable(Failed):
    """Its answer cannot be used."""


class Busy(Trouble):
    """The server takes no more for now."""

    def __init__(self, reason: str, *, full: bool, retry_after: float) -> None:
        super().__init__(reason)
        self.full, self.retry_after = full, retry_after


class Denied(Exception):
    """The server will not do it, now or later."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status


def server_urls(given: Sequence[str]) -> list[str]:
    """The base URLs of ``--server``, each once, without a trailing ``/`` or ``/v1``. Raises ConfigError."""
    found: dict[str, None] = {}
    for text in given:
        try:
            parts = urlsplit(text.strip())
            port = parts.port
        except ValueError as e:  # what it says may hold a part of a password
            raise ConfigError(f"--server {shown_url(text)!r} is no URL", fix="write http://HOST:PORT") from e
        if parts.username is not None or parts.password is not None:
            raise ConfigError(
                "--server: a URL must not carry a user or a password",
                where=parts.hostname,
                fix=f"put the key into the environment variable {KEY_VARIABLE}",
            )
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
            raise ConfigError(f"--server {shown_url(text)!r} is not the URL of a server", fix="write http://HOST:PORT")
        host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
        path = parts.path.rstrip("/").removesuffix("/v1").rstrip("/")
        found[f"{parts.scheme}://{host}{f':{port}' if port is not None else ''}{path}"] = None
    if not found:
        raise ConfigError("--backend server needs --server", fix="give the URL of a server")
    return list(found)


def api_key() -> str | None:
    """The key for the servers, from the environment. Raises ConfigError for one that no header can carry."""
    key = os.environ.get(KEY_VARIABLE, "").strip()
    if not (key.isascii() and key.isprintable()):
        raise ConfigError(f"{KEY_VARIABLE} has characters that an HTTP header cannot carry", fix="check its value")
    return key or None


class Server:
    """A server at a base URL. Any number of threads may call its methods at once."""

    def __init__(self, url: str, key: str | None) -> None:
        self.url = url
        self._key = key
        headers = {"Accept-Encoding": "identity", **({"Authorization": f"Bearer {key}"} if key else {})}
        limits = httpx.Limits(keepalive_expiry=KEPT_ALIVE_SECONDS)
        try:
            client = httpx.Client(headers=headers, limits=limits, trust_env=not _is_this_machine(url))
            client.build_request("GET", url)
        except (httpx.InvalidURL, ValueError, ImportError) as e:  # the proxy's URL, too, which may have a password
            raise ConfigError(
                f"--server {url!r} cannot be used, or not through the proxy of the environment: {type(e).__name__}",
                fix="write http://HOST:PORT, and check HTTP_PROXY, HTTPS_PROXY and ALL_PROXY",
            ) from e
        self._client = bounded(client)

    def get(self, path: str, timeout: float = HEALTH_SECONDS) -> bytes:
        """The body of a small answer, all of it within ``timeout`` seconds. Raises Trouble or Denied."""
        return self._fetch("GET", path, None, timeout, MOST_BYTES)

    def post(self, path: str, body: bytes, timeout: float, most: int) -> bytes:
        """The answer to a JSON body, all of it within ``timeout`` seconds. Raises Trouble or Denied.

        An answer of more than ``most`` bytes counts as one that cannot be used.
        """
        return self._fetch("POST", path, body, timeout, max(most, MOST_BYTES))

    def unwell(self) -> str | None:
        """Why the server does not say that it is well; None if it does."""
        try:
            self.get("/health")
        except (Trouble, Denied) as e:
            return str(e)
        return None

    def close(self) -> None:
        """Close the connections. No request may be under way."""
        self._client.close()

    def _fetch(self, method: str, path: str, body: bytes | None, timeout: float, most: int) -> bytes:
        limits = httpx.Timeout(timeout, connect=min(timeout, CONNECT_SECONDS))
        headers = {} if body is None else {"Content-Type": "application/json"}
        answer = bytearray()
        try:
            with (
                within(timeout),
                self._client.stream(
                    method, self.url + path, content=body, headers=headers, timeout=limits, follow_redirects=False
                ) as response,
            ):
                for piece in response.iter_raw():  # not unpacked: a few bytes may stand for gigabytes
                    answer += piece
                    if len(answer) > most:
                        raise Unusable(f"it answers with more than {most:,} bytes")
        except (httpx.ConnectError, httpx.ConnectTimeout) as e:
            raise Gone(f"no connection: {self._shown(str(e) or 'timed out')}") from e
        except httpx.TimeoutException as e:
            raise Slow(f"no whole answer within {timeout:.3g} s") from e
        except httpx.RequestError as e:
            raise Cut(f"the connection ended: {self._shown(str(e) or type(e).__name__)}") from e
        if response.status_code != 200:
            self._refuse(response, bytes(answer))
        return bytes(answer)

    def _refuse(self, response: httpx.Response, answer: bytes) -> None:
        """Raise what a status other than 200 means."""
        status = response.status_code
        reason = f"HTTP {status}: {self._shown(_message(answer) or response.reason_phrase)}"
        if status in BUSY:
            raise Busy(reason, full=status == 503, retry_after=_seconds(response.headers.get("Retry-After", "")))
        if status in PASSING:
            raise Cut(reason)
        if status >= 500 and status != 501:
            raise Failed(reason)
        raise Denied(status, reason)

    def _shown(self, text: str) -> str:
        """A server's words, short, and without the key should it repeat it."""
        return " ".join((text.replace(self._key, "***") if self._key else text).split())[:300]


def _message(answer: bytes) -> str:
    """What an error's body says: vLLM's and FastAPI's JSON, or plain text."""
    text = answer[:4000].decode(errors="replace")
    try:
        found = json.loads(answer)
    except (ValueError, RecursionError):
        return text
    if isinstance(found, dict):
        found = found.get("error", found.get("detail", found.get("message", text)))
    if isinstance(found, dict):
        found = found.get("message", text)
    return str(found)


def _seconds(retry_after: str) -> float:
    """A Retry-After header in seconds; 0 without one (the form with a date is not used by servers under load)."""
    text = retry_after.strip()
    return min(float(text), LONGEST_RETRY_AFTER) if text.isdecimal() else 0.0


def _is_this_machine(url: str) -> bool:
    """Whether a URL leads to this machine, where no proxy of the environment may come between."""
    host = urlsplit(url).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
