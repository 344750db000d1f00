"""Servers that drip, lie or never answer, and URLs and answers that are not used."""

from __future__ import annotations

import contextlib
import math
import re
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from entrodrop_prep.backends.model import ModelInfo
from entrodrop_prep.backends.plugin_response import problem_of
from entrodrop_prep.backends.server.connect import Checks, connect
from entrodrop_prep.backends.server.http import (
    LONGEST_RETRY_AFTER,
    Busy,
    Cut,
    Denied,
    Server,
    Slow,
    Trouble,
    Unusable,
    server_urls,
)
from entrodrop_prep.errors import ConfigError
from helpers.models import Markov

V, CONTEXT = 128, 256
PROBE = np.arange(1, 33, dtype=np.int32)


def checks(info: ModelInfo) -> Checks:
    return Checks(info.name, info, CONTEXT, 60.0)


@pytest.fixture
def info(closed_form: Markov) -> ModelInfo:
    return ModelInfo(closed_form.directory.name, V, CONTEXT, "float32")


# Answers that no plugin gives


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ((math.nan, -1.0), "logits are not finite"),
        ((math.inf, -1.0), "an entropy is inf"),
        ((-0.5, -1.0), "logits are not finite"),
        ((math.log(V) + 0.01, -1.0), r"an entropy is 4\.862 nats, where the vocabulary has room for 4\.852"),
        ((1.0, 0.5), "a log-probability is above zero"),
        ((1.0, math.nan), "a log-probability is above zero, or is no number"),
        ((1.0, math.inf), "a log-probability is above zero"),
    ],
)
def test_an_answer_out_of_range(row: tuple[float, float], says: str) -> None:
    raw = np.full((32, 2), [1.0, -1.0], "<f4")
    raw[-1, 1] = V
    assert problem_of(raw, [32], V) is None
    raw[7] = row
    assert re.search(says, problem_of(raw, [32], V) or "")


# Servers that take their time

Talk = Callable[[socket.socket], None]


@pytest.fixture
def talker() -> Iterator[Callable[[Talk], str]]:
    """A server that does one thing with every connection; its URL."""
    stopped, listeners = threading.Event(), []

    def begin(talk: Talk) -> str:
        listener = socket.create_server(("127.0.0.1", 0))
        listeners.append(listener)

        def serve(connection: socket.socket) -> None:
            with connection, contextlib.suppress(OSError):
                connection.recv(1 << 16)
                talk(connection)

        def accept() -> None:
            with contextlib.suppress(OSError):
                while not stopped.is_set():
                    threading.Thread(target=serve, args=(listener.accept()[0],), daemon=True).start()

        threading.Thread(target=accept, daemon=True).start()
        return f"http://127.0.0.1:{listener.getsockname()[1]}"

    yield begin
    stopped.set()
    for listener in listeners:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()


def drip(start: bytes, piece: bytes) -> Talk:
    """A start, and then a piece 50 times a second for a minute."""

    def talk(connection: socket.socket) -> None:
        connection.sendall(start)
        for _ in range(3000):
            connection.sendall(piece)
            time.sleep(0.02)

    return talk


OK = b"HTTP/1.1 200 OK\r\n"


@pytest.mark.parametrize(
    "talk",
    [
        drip(OK + b"X-Header: ", b"x"),
        drip(OK, b"X-A: b\r\n"),
        drip(b"", b"HTTP/1.1 102 Processing\r\n\r\n"),
        drip(OK + b"Content-Length: 1000000000000000000\r\n\r\n", b"x"),
        drip(OK + b"Transfer-Encoding: chunked\r\n\r\n", b"1\r\nx\r\n"),
        drip(OK + b"Transfer-Encoding: chunked\r\n\r\n1;", b"x"),
        drip(b"HTTP/1.1 500 No\r\nContent-Length: 1000\r\n\r\n", b"x"),
    ],
)
def test_a_whole_answer_has_the_timeout_not_each_byte(talk: Talk, talker: Callable[[Talk], str]) -> None:
    server = Server(talker(talk), None)
    begun = time.monotonic()
    with pytest.raises(Slow, match=r"no whole answer within 0\.4 s"):
        server.post("/pooling", b"{}", 0.4, 8)
    assert time.monotonic() - begun < 15
    server.close()


@pytest.mark.parametrize(
    ("asked", "seconds"),
    [
        *[(b"7", 7.0), (b"9" * 5000, LONGEST_RETRY_AFTER), ("٣".encode(), 3.0)],
        *[
            (asked, 0.0)
            for asked in (b"", b"-5", b"1e9", b"nan", b"inf", b"\xb2", b"\xff", b"Wed, 31 Feb 9999", b"1 2")
        ],
    ],
)
def test_a_server_cannot_ask_for_any_pause(asked: bytes, seconds: float, talker: Callable[[Talk], str]) -> None:
    answer = b"HTTP/1.1 429 Busy\r\nContent-Length: 0\r\nRetry-After: " + asked + b"\r\n\r\n"
    server = Server(talker(lambda connection: connection.sendall(answer)), None)
    with pytest.raises(Busy) as caught:
        server.post("/pooling", b"{}", 5, 8)
    assert caught.value.retry_after == seconds
    server.close()


def test_a_server_that_does_not_read(talker: Callable[[Talk], str]) -> None:
    server = Server(talker(lambda connection: time.sleep(20)), None)
    begun = time.monotonic()
    with pytest.raises(Slow):
        server.post("/pooling", bytes(64 << 20), 0.4, 8)
    assert time.monotonic() - begun < 15
    server.close()


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (OK + b"Content-Length: 5000000\r\n\r\n" + bytes(5_000_000), Unusable),
        (OK + b"Content-Length: -1\r\n\r\n", Cut),
        (OK + b"Content-Length: 4\r\nContent-Length: 5\r\n\r\nabcde", Cut),
        (OK + b"X: " + bytes(300_000), Cut),
        (b"SSH-2.0-OpenSSH\r\n", Cut),
        (b"HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1:9/\r\nContent-Length: 0\r\n\r\n", Denied),
        (b"HTTP/1.1 400 Bad\r\nContent-Length: 100000\r\n\r\n" + b"[" * 100_000, Denied),
    ],
)
def test_answers_that_are_none(answer: bytes, error: type[Exception], talker: Callable[[Talk], str]) -> None:
    server = Server(talker(lambda connection: connection.sendall(answer)), None)
    with pytest.raises(error) as caught:
        server.post("/pooling", b"{}", 5.0, 8)
    assert len(str(caught.value)) < 400
    server.close()


def test_a_packed_answer_is_not_unpacked(talker: Callable[[Talk], str]) -> None:
    import gzip

    packed = gzip.compress(bytes(50 << 20))
    head = OK + f"Content-Encoding: gzip\r\nContent-Length: {len(packed)}\r\n\r\n".encode()
    server = Server(talker(lambda connection: connection.sendall(head + packed)), None)
    assert server.post("/pooling", b"{}", 5.0, 8) == packed
    server.close()


def test_a_server_that_never_connects(info: ModelInfo, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("entrodrop_prep.backends.server.http.CONNECT_SECONDS", 0.5)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        waiting = []
        for _ in range(3):  # fill its queue
            waiting.append(socket.socket())
            waiting[-1].setblocking(False)
            waiting[-1].connect_ex(listener.getsockname())
        begun = time.monotonic()
        with pytest.raises(Trouble):
            connect(Server(f"http://127.0.0.1:{listener.getsockname()[1]}", None), checks(info))
        assert time.monotonic() - begun < 30
        for one in waiting:
            one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            one.close()


def test_urls_with_secrets_are_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    for bad in (
        *("http://u:S3cr3t@h:1", "http://u:S3cr3t@h:port", "http://u:S3/cr3t@h", "http://h/?sig=S3cr3t"),
        *("http://h/#S3cr3t", "ftp://u:S3cr3t@h"),
    ):
        with pytest.raises(ConfigError, match="--server") as caught:
            server_urls([bad])
        assert "3cr3t" not in str(caught.value)
        assert "S3" not in str(caught.value)
    for proxy in ("http://u:S3cr3t@127.0.0.1:port", "nonsense://u:S3cr3t@h:1"):
        monkeypatch.setenv("ALL_PROXY", proxy)
        with pytest.raises(ConfigError, match="the proxy of the environment") as caught:
            Server("http://somewhere.invalid:1", None)
        assert "S3cr3t" not in str(caught.value)
    monkeypatch.setenv("ALL_PROXY", "http://u:S3cr3t@127.0.0.1:9")
    with pytest.raises(Trouble) as gone:
        Server("http://somewhere.invalid:1", None).get("/health")
    assert "S3cr3t" not in str(gone.value)
