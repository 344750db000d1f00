"""Nodes without a network: the commands run in a network namespace of their own that has nothing but a loopback.

The kernel counts there what any process of a run tries to send elsewhere, so a run must not even try. Where the system
keeps namespaces to itself, every Python process of a run notes and refuses such tries instead.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from helpers.models import Markov, random_rows, rows_of, words, write_rows
from helpers.pages import ROOT, console_lines
from helpers.servers import ENVIRONMENT

pytestmark = pytest.mark.network

ENTRODROP = str(Path(sys.executable).parent / "entrodrop")
HUB_ID = "org/base-model"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
NAMESPACE = ("unshare", "--net") if os.geteuid() == 0 else ("unshare", "--net", "--user", "--map-root-user")
HAS_NAMESPACES = subprocess.run([*NAMESPACE, "true"], stderr=subprocess.DEVNULL, check=False).returncode == 0
REFUSING = """
import os, sys

def refuse(event, arguments):
    if event == "socket.getaddrinfo":
        host = arguments[0]
    elif event == "socket.connect" and isinstance(arguments[1], tuple):
        host = arguments[1][0]
    else:
        return
    if host not in (None, "", "localhost", "::1", "0.0.0.0", "::") and not str(host).startswith("127."):
        with open(os.environ["ATTEMPTS"], "a") as f:
            f.write("Ip6OutNoRoutes 1\\n")
        raise OSError("no way out of this machine")

sys.addaudithook(refuse)
"""
INSIDE = """
import fcntl, pathlib, socket, struct, subprocess, sys
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
    fcntl.ioctl(s, 0x8914, struct.pack("16sH14x", b"lo", 1))  # SIOCSIFFLAGS, IFF_UP
assert [name for _, name in socket.if_nameindex()] == ["lo"]
assert len(pathlib.Path("/proc/net/route").read_text().splitlines()) == 1  # the heading
done = subprocess.run(sys.argv[2:])
counters = [p for p in map(pathlib.Path, ("/proc/net/snmp", "/proc/net/snmp6")) if p.exists()]
pathlib.Path(sys.argv[1]).write_text("".join(p.read_text() for p in counters))
sys.exit(done.returncode)
"""


@dataclass(frozen=True)
class Done:
    """How a run ended, and how often it tried to reach something beyond this machine, or to ask for a name."""

    code: int
    text: str
    attempts: int


def without_network(folder: Path, *command: str, **environment: str) -> Done:
    """Run a command in ``folder``, in a new network namespace."""
    counters = folder / "counters"
    counters.unlink(missing_ok=True)
    inherited = {k: v for k, v in (os.environ | ENVIRONMENT).items() if k not in ("HF_HUB_OFFLINE", "HF_HUB_CACHE")}
    inherited["HF_HOME"] = str(folder / "hf")
    wrapper = [*NAMESPACE, sys.executable, "-c", INSIDE, str(counters)]
    if not HAS_NAMESPACES:
        (folder / "site").mkdir(exist_ok=True)
        (folder / "site" / "sitecustomize.py").write_text(REFUSING, encoding="utf-8")
        inherited |= {"PYTHONPATH": str(folder / "site"), "ATTEMPTS": str(counters)}
        counters.touch()
        wrapper = []
    process = subprocess.Popen(
        [*wrapper, *command],
        cwd=folder,
        env={**inherited, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        text, _ = process.communicate(timeout=300)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert counters.exists(), text
    return Done(process.returncode, text, _attempts(counters.read_text(encoding="utf-8")))


def _attempts(counters: str) -> int:
    """Of /proc/net/snmp, where a line of names stands over one of values, and snmp6, where each line has both."""
    lines = [line.split() for line in counters.splitlines()]
    found = {line[0]: line[1] for line in lines if not line[0].endswith(":")}
    pairs = [line for line in lines if line[0].endswith(":")]
    for names, values in zip(pairs[::2], pairs[1::2], strict=True):
        found |= {names[0] + name: value for name, value in zip(names[1:], values[1:], strict=True)}
    # No way there; or a name server on this machine that does not answer.
    wanted = ("Ip:OutNoRoutes", "Ip6OutNoRoutes", "Udp:NoPorts", "Udp6NoPorts")
    return sum(int(found.get(name, 0)) for name in wanted)


@pytest.fixture(scope="module")
def node(closed_form: Markov, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with documents, a model, and the same model in a Hub cache as ``hf download`` leaves it."""
    folder = tmp_path_factory.mktemp("node")
    write_rows(folder / "corpus.jsonl", [{"text": words(ids)} for ids in random_rows(30, 128)])
    shutil.copytree(closed_form.directory, folder / "models" / "base-model")
    cached = folder / "hf" / "hub" / f"models--{HUB_ID.replace('/', '--')}"
    shutil.copytree(closed_form.directory, cached / "snapshots" / COMMIT)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(COMMIT, encoding="utf-8")
    return folder


def score(node: Path, model: str, backend: str, out: str, **environment: str) -> Done:
    arguments = ["corpus.jsonl", "--model", model, "--backend", backend, "--dtype", "float32", "--out", out]
    return without_network(node, ENTRODROP, "score", *arguments, **environment)


@pytest.mark.parametrize(
    ("backend", "model"),
    [("transformers", "models/base-model"), ("transformers", HUB_ID), ("vllm", HUB_ID)],
)
def test_score_needs_no_network(node: Path, backend: str, model: str) -> None:
    out = f"{backend}-{model.replace('/', '-')}"
    done = score(node, model, backend, out, HF_HUB_OFFLINE="1")
    assert done.code == 0, done.text
    assert len(rows_of(node / out)) == 30
    assert done.attempts == 0


def test_what_the_docs_say_for_such_a_node_needs_no_network(node: Path) -> None:
    """The scoring takes vLLM here; what follows it asks nobody, without being told not to."""
    printed = {}
    for line in console_lines(ROOT / "docs" / "clusters.md"):
        if "HF_HUB_OFFLINE" in line.environment or (line.arguments or [""])[0] in ("materialize", "verify"):
            assert line.words[0] == "entrodrop"
            done = without_network(node, ENTRODROP, *line.words[1:], **line.environment)
            assert done.code == 0, done.text
            assert done.attempts == 0, line.words
            printed[line.words[1]] = done.text
    assert list(printed) == ["score", "materialize", "verify"]
    assert "scoring with vllm" in printed["score"]
    assert printed["verify"].splitlines()[-1].startswith("OK: verified ")


def test_a_model_that_is_not_there_is_said_in_one_line(node: Path) -> None:
    done = score(node, "org/another-model", "transformers", "nowhere", HF_HUB_OFFLINE="1")
    assert done.code == 2
    assert "error: org/another-model: cannot load the model: " in done.text
    assert "Traceback" not in done.text
    assert done.attempts == 0


def test_attempts_are_counted(node: Path) -> None:
    for ask in ("socket.create_connection(('192.0.2.1', 80))", "socket.getaddrinfo('huggingface.co', 443)"):
        done = without_network(node, sys.executable, "-c", f"import socket; {ask}")
        assert done.code == 1
        assert done.attempts > 0, ask
