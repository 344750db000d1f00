"""Real vLLM servers on this machine, and a proxy between a client and a server that makes things go wrong."""

from __future__ import annotations

import atexit
import http.client
import itertools
import json
import os
import random
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from entrodrop_prep.backends.engines import own_temporary_files
from entrodrop_prep.vllm_plugin import leftovers
from helpers.vllm import VLLM

START_SECONDS = 180
PLUGIN = (
    *("--runner", "pooling"),
    *("--hf-overrides", json.dumps({"architectures": ["TokenEntropyLlamaForCausalLM"]})),
    "--no-enable-prefix-caching",
    *("--middleware", "entrodrop_prep.vllm_plugin.middleware.ApiKeyMiddleware"),
)
SMALL = (
    *("--dtype", "float32"),
    *("--max-num-batched-tokens", "64"),
    *("--max-num-seqs", "16"),
    *("--skip-tokenizer-init", "--enforce-eager", "--disable-uvicorn-access-log"),
)
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # a server still has an engine process, but no third one for the model
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "passive",
}


def free_port() -> int:
    """A port of 127.0.0.1 that nobody listens on."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


class VllmServer:
    """A vLLM server in a process group of its own. It starts at once; ``wait`` until it answers."""

    def __init__(
        self,
        model: Path,
        folder: Path,
        *options: str,
        plugin: bool = True,
        environment: dict[str, str] | None = None,
    ) -> None:
        self.model, self.port = model, free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = folder / f"server-{self.port}.log"
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
        command += ["--host", "127.0.0.1", "--port", str(self.port)]
        self._command = [*command, *(PLUGIN if plugin else ()), *SMALL, *options]
        self._environment = {**os.environ, **ENVIRONMENT, **(environment or {})}
        self._process: subprocess.Popen[bytes] | None = None
        atexit.register(self.kill)
        self.start()

    def start(self) -> None:
        """Start it, or start it again on the same port."""
        self._folder = Path(tempfile.mkdtemp(prefix="vllm-"))
        with self.log.open("ab") as log:
            self._process = VLLM.popen(
                self._command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**self._environment, **own_temporary_files(self._folder)},
                start_new_session=True,
            )

    def wait(self) -> VllmServer:
        """Until it is well; an AssertionError with the end of its log if it ends or takes too long."""
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline and self._process is not None and self._process.poll() is None:
            try:
                with urllib.request.urlopen(f"{self.url}/health", timeout=5):
                    return self
            except (urllib.error.URLError, OSError):
                time.sleep(0.1)
        raise AssertionError(f"the server does not start:\n{self.log.read_text(errors='replace')[-5000:]}")

    def kill(self) -> None:
        """SIGKILL for all its processes; back when none is left, nor what they would leave."""
        process, self._process = self._process, None
        if process is not None:
            kill_group(process, self._folder)


def kill_group(process: subprocess.Popen[bytes], folder: Path) -> None:
    """SIGKILL for all processes of a group, whose TMPDIR is ``folder``; back when none is left."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:  # a child may be born while its parent is being killed
        leftovers.kill(process.pid, folder)
        try:
            os.killpg(process.pid, 0)
        except ProcessLookupError:
            break
        process.poll()
        time.sleep(0.02)
    process.wait(30)


Fault = str | tuple[int, bytes] | None
"""What happens to a request.

None: it is passed on. ``reset``: the connection is reset. ``stall``: no answer comes. ``truncated``: the answer ends
in the middle. ``short``: 8 bytes of its end are missing, and nothing shows it. ``missing``: its first entropy is -1.
``500`` and so on: this status. A status and a body: these.
"""


class Proxy:
    """Passes HTTP requests on to a server, and does to each what ``plan(method, path, sequences)`` says.

    Attributes:
        url: where it listens.
        faults: how often each fault was done.
        requests: (time, method, path, number of sequences) of each request.
        retry_after: sent with the status 429.
    """

    def __init__(self, upstream: str, plan: Callable[[str, str, int], Fault] = lambda method, path, n: None) -> None:
        self.plan = plan
        self.faults: Counter[str] = Counter()
        self.requests: list[tuple[float, str, str, int]] = []
        self.retry_after: str | None = None
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        address = urlsplit(upstream)
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                proxy._handle(self, (str(address.hostname), int(address.port or 80)))

            do_POST = do_GET

            def log_message(self, format: str, *args: Any) -> None:
                pass

        class Listener(ThreadingHTTPServer):
            daemon_threads, block_on_close = True, False

            def handle_error(self, request: Any, client_address: Any) -> None:
                pass  # clients that hang up are part of the tests

        self._listener = Listener(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._listener.server_address[1]}"
        threading.Thread(target=self._listener.serve_forever, args=(0.02,), daemon=True).start()

    def posts(self) -> list[tuple[float, int]]:
        """Time and number of sequences of each request for scores."""
        with self._lock:
            return [(when, n) for when, method, _, n in self.requests if method == "POST"]

    def close(self) -> None:
        """Stop listening: from now on connections are refused, and those that are open end."""
        self._stopped.set()
        self._listener.shutdown()
        self._listener.server_close()

    def _handle(self, handler: BaseHTTPRequestHandler, upstream: tuple[str, int]) -> None:
        body = handler.rfile.read(int(handler.headers.get("Content-Length", 0)))
        asked = json.loads(body) if body else {}
        count = len(asked.get("input") or asked.get("prompt") or ())
        with self._lock:
            self.requests.append((time.monotonic(), handler.command, handler.path, count))
            fault = "reset" if self._stopped.is_set() else self.plan(handler.command, handler.path, count)
            self.faults[str(fault)] += 1
        if fault == "stall":
            self._stopped.wait(60)
        if fault in ("reset", "stall"):
            _reset(handler)
            return
        if isinstance(fault, tuple):
            _answer(handler, *fault)
            return
        if isinstance(fault, str) and fault.isdecimal():
            more = {"Retry-After": self.retry_after} if self.retry_after and fault == "429" else {}
            _answer(handler, int(fault), json.dumps({"error": {"message": f"injected {fault}"}}).encode(), **more)
            return
        connection = http.client.HTTPConnection(*upstream, timeout=120)
        try:
            headers = {k: v for k, v in handler.headers.items() if k.lower() in ("content-type", "authorization")}
            connection.request(handler.command, handler.path, body or None, headers)
            response = connection.getresponse()
            status, answer = response.status, response.read()
        except (OSError, http.client.HTTPException):
            _answer(handler, 502, b"no upstream")
            return
        finally:
            connection.close()
        if fault == "short":
            answer = answer[:-8]
        elif fault == "missing":
            answer = struct.pack("<f", -1.0) + answer[4:]
        if fault == "truncated":
            handler.send_response(status)
            handler.send_header("Content-Length", str(len(answer) + 1))
            handler.end_headers()
            handler.wfile.write(answer[: len(answer) // 2])
            handler.close_connection = True
        else:
            _answer(handler, status, answer)


def seeded_faults(seed: int, kinds: Sequence[str], share: float) -> Callable[[str, str, int], Fault]:
    """A plan in which a share of the requests fails at random (of GET, a tenth of it), the kinds in turn."""
    rng = random.Random(seed)
    turns = itertools.cycle(rng.sample(kinds, len(kinds)))

    def plan(method: str, path: str, sequences: int) -> Fault:
        return next(turns) if rng.random() < (share if method == "POST" else share / 10) else None

    return plan


def _answer(handler: BaseHTTPRequestHandler, status: int, body: bytes, **headers: str) -> None:
    handler.send_response(status)
    for name, value in headers.items():
        handler.send_header(name, value)
    handler.send_header("Content-Length", str(len(body)))
    handler.end_headers()
    handler.wfile.write(body)


def _reset(handler: BaseHTTPRequestHandler) -> None:
    handler.close_connection = True
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    os.close(handler.connection.detach())
