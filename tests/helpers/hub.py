"""A small Hub on this machine, for tests: real HTTP, state on disk, tokens, and faults on demand.

    with Hub(tmp_path / "hub") as hub:
        hub.faults.append(Fault("commit", "lost"))
        subprocess.run([...], env={**os.environ, **hub.environment(tmp_path / "home")})
        hub.repo("alice/data").files()

It speaks what ``huggingface_hub`` and ``datasets`` need to create, push, tag, list and read repositories of datasets
and models. Clients find it by HF_ENDPOINT, which they read when imported: run them in processes of their own.

Large files go by LFS when HF_HUB_DISABLE_XET=1 (single or in parts of ``part_bytes``), and by Xet else: the client is
then sent to a local content store of its own making (``local://``), a folder of this Hub, so that chunking,
deduplication and reconstruction are the client's real ones and only the transport to the store is no HTTP.

What it does not do: pull requests, spaces, quotas, rate limits (but as faults), redirects to a CDN.
"""

from __future__ import annotations

import json
import os
import re
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import parse_qs, urlsplit

from helpers.hub_calls import Answer, Request, route
from helpers.hub_store import Refused, Repo, Store
from helpers.xet import XetStore

WRITER, READER = "hf_writersTokenForTests", "hf_readersTokenForTests"


@dataclass
class Fault:
    """What goes wrong with a call, ``times`` times, after it went well ``after`` times.

    ``kind``: a status such as "429"; "reset", the connection breaks before anything happens; "stall", ``seconds`` pass
    first; "lost", it happens (and then ``do``, if there is one), but the answer does not arrive; "before", ``do`` is
    called first, then it continues.
    """

    call: str
    kind: str
    times: int = 1
    after: int = 0
    retry_after: int | None = None
    message: str = "made to fail"
    code: str | None = None
    seconds: float = 0.0
    do: Callable[[], object] | None = None


@dataclass(frozen=True)
class Call:
    """One request as it came: ``name`` of the call, path, bytes of its body, status of the answer (0 for none)."""

    name: str
    method: str
    path: str
    received: int
    status: int


class Hub:
    """The server, on a free port. Everything but the list of faults and the log of calls is on disk."""

    def __init__(self, root: Path, *, part_bytes: int | None = None, page: int = 1000) -> None:
        self.store = Store(root)
        self.xet = XetStore(root / "xet")
        self.tokens = {WRITER: ("alice", "write"), READER: ("bob", "read")}
        self.part_bytes, self.page = part_bytes, page
        self.faults: list[Fault] = []
        self.calls: list[Call] = []
        self._lock = threading.Lock()

    def __enter__(self) -> Hub:
        hub = self

        class Handler(_Handler):
            server_hub = hub

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def environment(self, home: Path, token: str | None = WRITER, *, xet: bool = False) -> dict[str, str]:
        """What a client must be started with; ``home`` becomes its cache. The caller's own settings are gone."""
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING_FACE_"))}
        said = {"HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_HUB_DISABLE_TELEMETRY": "1"}
        if token is not None:
            said["HF_TOKEN"] = token
        if not xet:
            said["HF_HUB_DISABLE_XET"] = "1"
        said["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"  # as commands do before they import what is imported here already
        return {**kept, **said}

    def repo(self, name: str, kind: str = "datasets") -> Repo:
        return self.store.repo(kind, name)

    def create(self, name: str, kind: str = "datasets", *, private: bool = True, files: Any = None) -> Repo:
        """A repository that is there already, with files of someone's."""
        repo = self.store.create(kind, name, private=private)
        if files:
            repo.put(files)
        return repo

    def count(self, name: str, status: int | None = None) -> int:
        """How often a call came, with that answer if one is given."""
        return sum(c.name == name and status in (None, c.status) for c in self.calls)

    def uploaded(self) -> int:
        """Bytes of large files that arrived: over HTTP, and in the Xet store."""
        return sum(c.received for c in self.calls if c.name in ("lfs-put", "lfs-part")) + self.xet.stored_bytes()

    def forget(self) -> None:
        """Start counting again."""
        self.calls.clear()
        self.faults.clear()

    def summary(self) -> Counter[tuple[str, int]]:
        return Counter((c.name, c.status) for c in self.calls)

    def note(self, call: Call) -> None:
        with self._lock:
            self.calls.append(call)

    def fault(self, name: str) -> Fault | None:
        """The fault that strikes this call, if one does."""
        with self._lock:
            for fault in self.faults:
                if fault.call == name and fault.times > 0:
                    if fault.after > 0:
                        fault.after -= 1
                        continue
                    fault.times -= 1
                    return fault
        return None


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_hub: Hub

    def log_message(self, *_: object) -> None:
        pass

    def _handle(self) -> None:
        parts = urlsplit(self.path)
        body = self._body()
        path = parts.path
        name, run = route(self.command, path)
        hub = self.server_hub
        received, status, fault = len(body), 0, hub.fault(name)
        try:
            if fault and fault.kind == "reset":
                return self._break()
            if fault and fault.kind == "stall":
                time.sleep(fault.seconds)
            if fault and fault.kind == "before" and fault.do:
                fault.do()
            try:
                if fault and fault.kind.isdigit():
                    raise Refused(int(fault.kind), fault.code, fault.message)
                user, role = self._who()
                request = Request(self.command, path, parse_qs(parts.query), self.headers, body, user, role)
                answer = run(hub, request)
            except Refused as e:
                answer = Answer(e.body or {"error": e.message}, {"X-Error-Message": e.message}, e.status)
                if e.code:
                    answer.headers["X-Error-Code"] = e.code
                if fault and fault.retry_after is not None:
                    answer.headers["Retry-After"] = str(fault.retry_after)
            if fault and fault.kind == "lost":
                if fault.do:
                    fault.do()
                return self._break()
            status = answer.status
        finally:
            hub.note(Call(name, self.command, self.path, received, status))
        self._send(answer)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _handle

    def _who(self) -> tuple[str | None, str | None]:
        given = self.headers.get("Authorization")
        if given is None:
            return None, None
        known = self.server_hub.tokens.get(given.removeprefix("Bearer "))
        if known is None:
            raise Refused(401, None, "Invalid credentials in Authorization header")
        return known

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            chunks = []
            while size := int(self.rfile.readline(), 16):
                chunks.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(chunks)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _break(self) -> None:
        """Close the connection the hard way: the other side sees a reset."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()
        self.close_connection = True
        self.rfile, self.wfile = _Nothing(), _Nothing()  # type: ignore[assignment]

    def _send(self, answer: Answer) -> None:
        data = (
            b""
            if answer.file
            else answer.body
            if isinstance(answer.body, bytes)
            else json.dumps(answer.body, default=str).encode()
        )
        first, size, status = 0, len(data), answer.status
        if answer.file:
            size = total = answer.file.stat().st_size
            asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
            if asked:
                first, last = int(asked[1]), min(int(asked[2] or total - 1), total - 1)
                if first >= total:
                    size, status = 0, 416
                    answer.headers["Content-Range"] = f"bytes */{total}"
                else:
                    size, status = last - first + 1, 206
                    answer.headers["Content-Range"] = f"bytes {first}-{last}/{total}"
        self.send_response(status)
        kind = "application/octet-stream" if answer.file else "application/json"
        for name, value in {"Content-Type": kind, "Content-Length": str(size), **answer.headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD" or not size:
            return
        if answer.file:
            with answer.file.open("rb") as f:
                f.seek(first)
                self.wfile.write(f.read(size))
        else:
            self.wfile.write(data)


class _Nothing:
    """Stands where a stream was, after the connection was broken."""

    closed = True

    def flush(self) -> None: ...

    def close(self) -> None: ...
