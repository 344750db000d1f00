"""The client for vLLM servers, against real ones, with everything going wrong that does go wrong."""

from __future__ import annotations

import http.client
import itertools
import json
import logging
import math
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from entrodrop_prep.backends.model import DTYPE, ModelInfo
from entrodrop_prep.backends.prefetch import PrefetchQueue, score_all
from entrodrop_prep.backends.server.backend import ServerBackend
from entrodrop_prep.backends.server.connect import PROBE_TOKENS
from entrodrop_prep.backends.server.http import server_urls
from entrodrop_prep.backends.server.request import request_body
from entrodrop_prep.errors import ConfigError, ScoreError
from entrodrop_prep.verification.run import verify
from helpers.closed_form import check as check_rows
from helpers.models import Markov, random_rows, rows_of, run_score, settings_for, shards, write_rows
from helpers.runs import finish, starter
from helpers.servers import Proxy, VllmServer, free_port, seeded_faults
from helpers.vllm import until
from helpers.warm import OFFLINE

pytestmark = pytest.mark.vllm

V, CONTEXT = 128, 256
KEY = "correct-horse-battery"
QUEUE = 6
Ids = np.ndarray[Any, np.dtype[np.int32]]


@dataclass
class Servers:
    """``plain``: the one of the session. ``guarded``: wants a key and holds few requests."""

    plain: VllmServer
    guarded: VllmServer


@pytest.fixture(scope="module")
def servers(
    closed_form: Markov, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Servers]:
    """Both started side by side."""
    folder = tmp_path_factory.mktemp("servers")
    guard = {"VLLM_API_KEY": KEY}
    with_queue = ("--max-num-queued-reqs", str(QUEUE))
    guarded = VllmServer(closed_form.directory, folder, *with_queue, environment=guard)
    try:
        yield Servers(request.getfixturevalue("vllm_server"), guarded.wait())
    finally:
        guarded.kill()


@pytest.fixture(autouse=True)
def no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ENTRODROP_API_KEY", raising=False)


Connect = Callable[..., ServerBackend]


@pytest.fixture
def connect(closed_form: Markov) -> Iterator[Connect]:
    """A backend on some servers (or proxies, or URLs), closed after the test."""
    backends = []

    def begin(*servers: Any, info: ModelInfo | None = None, model: Path | str | None = None, **settings: Any) -> Any:
        urls = tuple(server if isinstance(server, str) else server.url for server in servers)
        config = settings_for(
            "unused.jsonl",
            Path(model or closed_form.directory),
            closed_form.directory / "out",
            **{"backend": "server", "server": urls, "timeout": 60.0, "patience": 20.0, **settings},
        )
        backends.append(ServerBackend(config, info or ModelInfo(closed_form.directory.name, V, CONTEXT, "float32")))
        return backends[-1]

    yield begin
    for backend in backends:
        backend.close()


@pytest.fixture
def proxy() -> Iterator[Callable[..., Proxy]]:
    """A proxy in front of a server, closed after the test."""
    proxies = []

    def begin(server: VllmServer, *plan: Any) -> Proxy:
        proxies.append(Proxy(server.url, *plan))
        return proxies[-1]

    yield begin
    for one in proxies:
        one.close()


def ragged(count: int, *, longest: int = CONTEXT, seed: int = 0) -> list[Ids]:
    """Rows of 2 to ``longest`` tokens, both among them."""
    rng = np.random.default_rng(seed)
    lengths = [2, longest, *rng.integers(2, longest + 1, max(0, count - 2)).tolist()]
    return [rng.integers(0, V, n, dtype=np.int32) for n in lengths[:count]]


@dataclass
class Job:
    """Sequences of a shard, and what became of them."""

    index: int
    sequences: list[Ids]
    done: list[int] = field(default_factory=list)


def jobs_of(rows: list[Ids], size: int) -> list[Job]:
    return [Job(i, rows[start : start + size]) for i, start in enumerate(range(0, len(rows), size))]


def run(backend: ServerBackend, jobs: list[Job], notice: Callable[[int], None] = lambda tokens: None) -> dict[int, Any]:
    """The scores of each job. ``notice`` is called with the number of tokens done so far."""
    feed, total = PrefetchQueue(jobs), 0

    def done(job: Job, tokens: int) -> None:
        nonlocal total
        job.done.append(tokens)
        total += tokens
        notice(total)

    found: dict[int, Any] = {}
    try:
        for job, scores in backend.score(feed, done):
            assert job.index not in found
            found[job.index] = scores
    finally:
        feed.close()
    assert sorted(found) == [job.index for job in jobs]
    for job in jobs:
        assert sum(job.done) == sum(map(len, job.sequences))
    return found


def check(model: Markov, sequences: list[Ids], scores: list[Any]) -> None:
    """The scores are the model's own."""
    assert len(scores) == len(sequences)
    for ids, (entropy, logprob) in zip(sequences, scores, strict=True):
        assert entropy.shape == logprob.shape == (len(ids) - 1,)
        assert entropy.dtype == logprob.dtype == np.float32
        assert np.abs(entropy - model.entropy[ids[:-1]]).max() <= 1e-4
        assert np.abs(logprob - model.logprob[ids[:-1], ids[1:]]).max() <= 1e-4


def check_all(model: Markov, jobs: list[Job], found: dict[int, Any]) -> None:
    for job in jobs:
        check(model, job.sequences, found[job.index])


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING and "entrodrop" in r.name]


# What servers give


def test_ragged_rows_have_the_models_scores(servers: Servers, connect: Connect, closed_form: Markov) -> None:
    backend = connect(servers.plain)
    rows = ragged(70)
    check(closed_form, rows, score_all(backend, rows))
    environment = backend.environment()
    assert environment.keys() == {"backend", "device", "vllm", "served_dtype"}
    assert environment["served_dtype"] == "unknown"  # no `entrodrop serve` has started it
    assert re.fullmatch(r"0\.\d+\..*", environment["vllm"])
    assert score_all(backend, []) == []
    check(closed_form, rows[:1], score_all(backend, rows[:1]))


def test_shards_of_any_size(
    servers: Servers, connect: Connect, closed_form: Markov, proxy: Callable[..., Proxy]
) -> None:
    between = proxy(servers.plain)
    backend = connect(between, batch_tokens=300)
    jobs = [*jobs_of(ragged(30, longest=60), 7), Job(5, []), Job(6, ragged(200, longest=3))]
    check_all(closed_form, jobs, run(backend, jobs))
    sizes = [n for _, n in between.posts()[1:]]
    assert sum(sizes) == 230  # none was sent twice
    assert max(sizes) == 64


def test_two_calls_do_not_mix(servers: Servers, connect: Connect, closed_form: Markov) -> None:
    backend = connect(servers.plain)
    first = backend.score(PrefetchQueue(jobs_of(ragged(90, longest=90), 8)), lambda job, tokens: None)
    check(closed_form, *((lambda job, scores: (job.sequences, scores))(*next(first))))
    first.close()
    jobs = jobs_of(ragged(20, seed=1), 4)
    check_all(closed_form, jobs, run(backend, jobs))


def test_reading_waits_for_the_servers(
    servers: Servers, connect: Connect, closed_form: Markov, proxy: Callable[..., Proxy]
) -> None:
    between = proxy(servers.plain)
    backend = connect(between, timeout=2.0)
    between.plan = lambda method, path, n: "stall" if method == "POST" else None
    jobs, taken = jobs_of(ragged(60, longest=20), 1), []

    def read() -> Iterator[Job]:
        for job in jobs:
            taken.append(job)
            yield job

    found: list[Any] = []
    feed = PrefetchQueue(read())
    reader = threading.Thread(target=lambda: found.extend(backend.score(feed, lambda job, tokens: None)), daemon=True)
    reader.start()
    time.sleep(1)
    assert 8 <= len(taken) <= 16
    between.plan = lambda method, path, n: None
    reader.join(30)
    feed.close()
    assert len(found) == len(taken) == 60
    for job, scores in found:
        check(closed_form, job.sequences, scores)


# One request never ends a server


def test_a_bad_request_is_refused_and_the_server_lives(servers: Servers, connect: Connect, closed_form: Markov) -> None:
    (probe,) = ragged(1, longest=32)
    good = json.loads(request_body(str(servers.plain.model), [probe]))

    def post(body: bytes, path: str = "/pooling") -> tuple[int, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", servers.plain.port, timeout=60)
        try:
            connection.request("POST", path, body, {"Content-Type": "application/json"})
            answer = connection.getresponse()
            return answer.status, answer.read()
        finally:
            connection.close()

    inputs: list[Any] = [[[1, -5, 3]], [[V]], [[2**63]], [[1.5]], [["a"]], [[[1]]], "text", [], [[]], [[1] * 257]]
    for given in inputs:
        status, answer = post(json.dumps({**good, "input": given}).encode())
        assert status == 400, given
        assert "input" in json.loads(answer)["error"]["message"]
    for body in (b"", b"[" * 10**6, b"\xff", json.dumps({**good, "priority": 1}).encode()):
        assert post(body)[0] == 400
    for path in ("/tokenize", "/v1/embeddings", "/classify", "/score", "/invocations"):
        assert post(json.dumps({"input": [-1], "prompt": [-1], "tokens": [-1]}).encode(), path)[0] == 404
    assert post(b'{"input": [[' + b"1," * (33 << 20) + b"1]]}")[0] == 413
    status, answer = post(json.dumps(good).encode())
    assert status == 200
    assert len(answer) == 8 * len(probe)
    rows = ragged(3)
    check(closed_form, rows, score_all(connect(servers.plain), rows))


@pytest.mark.parametrize("row", [(math.nan, -1.0), (4.9, -1.0)])
def test_a_server_that_answers_out_of_range_is_refused(
    servers: Servers, connect: Connect, proxy: Callable[..., Proxy], row: tuple[float, float]
) -> None:
    good = np.full((PROBE_TOKENS, 2), [1.0, -1.0], "<f4")
    good[-1, 1] = V
    bad = good.copy()
    bad[7] = row
    between = proxy(servers.plain, lambda method, path, n: (200, bad.tobytes()) if method == "POST" else None)
    with pytest.raises(ConfigError, match="its answer cannot be used"):
        connect(between)
    between.plan = lambda method, path, n: (200, good.tobytes()) if method == "POST" else None
    connect(between)


def test_what_a_server_says_of_itself_is_not_recorded_unless_it_is_a_version(
    servers: Servers, connect: Connect, proxy: Callable[..., Proxy]
) -> None:
    for said, recorded in (
        *((bad, "unknown") for bad in ("1\x1b[31m\nx", "x" * 1000, ["1"], "a b")),
        ("0.32.0+cpu", "0.32.0+cpu"),
    ):
        answer = (200, json.dumps({"version": said}).encode())
        between = proxy(servers.plain, lambda method, path, n, a=answer: a if path == "/version" else None)
        assert connect(between).environment()["vllm"] == recorded


# Failures that pass


def test_every_fault_by_chance(
    servers: Servers, connect: Connect, closed_form: Markov, proxy: Callable[..., Proxy]
) -> None:
    kinds = ("500", "502", "503", "504", "408", "429", "reset", "stall", "truncated", "short", "missing")
    between = [proxy(servers.plain, seeded_faults(seed, kinds, 0.4)) for seed in (1, 2)]
    backend = connect(*between, timeout=1.5, batch_tokens=100)
    jobs = jobs_of(ragged(300, longest=40), 40)
    check_all(closed_form, jobs, run(backend, jobs))
    assert set(kinds) <= {kind for one in between for kind in one.faults}


def test_a_full_queue_gets_less_at_once(
    servers: Servers, connect: Connect, closed_form: Markov, proxy: Callable[..., Proxy], monkeypatch: Any
) -> None:
    monkeypatch.setenv("ENTRODROP_API_KEY", KEY)
    between = proxy(servers.guarded)
    backend = connect(between)
    jobs = jobs_of(ragged(128, longest=30), 64)
    check_all(closed_form, jobs, run(backend, jobs))
    sizes = [n for _, n in between.posts()[1:]]
    assert max(sizes) == 64
    assert max(sizes[len(sizes) // 2 :]) <= QUEUE


def test_retry_after_is_kept(
    servers: Servers, connect: Connect, closed_form: Markov, proxy: Callable[..., Proxy]
) -> None:
    between = proxy(servers.plain)
    between.retry_after = "2"
    backend = connect(between)
    answers = itertools.chain(["429"], itertools.repeat(None))
    between.plan = lambda method, path, n: next(answers) if method == "POST" else None
    rows = ragged(3)
    check(closed_form, rows, score_all(backend, rows))
    first, second = [when for when, _ in between.posts()[1:]]
    assert 2 <= second - first < 5


def test_a_slow_server_gets_more_time(
    servers: Servers, connect: Connect, closed_form: Markov, proxy: Callable[..., Proxy]
) -> None:
    between = proxy(servers.plain)
    backend = connect(between, timeout=1.0, patience=2.0)
    answers = itertools.chain(["stall", "stall"], itertools.repeat(None))
    between.plan = lambda method, path, n: next(answers) if method == "POST" else None
    rows = ragged(3)
    check(closed_form, rows, score_all(backend, rows))
    times = [when for when, _ in between.posts()[1:]]
    assert times[1] - times[0] >= 1
    assert times[2] - times[1] >= 2


def test_an_engine_that_dies_is_a_server_that_is_down(
    servers: Servers, connect: Connect, closed_form: Markov, proxy: Callable[..., Proxy], caplog: Any
) -> None:
    between = proxy(servers.plain)
    backend = connect(between, servers.plain)
    between.plan = lambda method, path, n: "500" if method == "POST" else "503"  # what vLLM says until it ends
    jobs = jobs_of(ragged(60, longest=60), 10)
    check_all(closed_form, jobs, run(backend, jobs))
    (down,) = warnings(caplog)
    assert down == f"the server {between.url} is down: HTTP 500: injected 500, and then HTTP 503: injected 503"


def test_a_server_that_comes_back_as_another_is_not_used(
    servers: Servers, connect: Connect, closed_form: Markov, proxy: Callable[..., Proxy], caplog: Any
) -> None:
    between = proxy(servers.plain)
    backend = connect(between, patience=4.0)
    between.plan = lambda method, path, n: "reset"
    rows = ragged(10)

    def change() -> None:
        time.sleep(1)
        other = json.dumps({"version": "0.1.0"}).encode()
        between.plan = lambda method, path, n: (200, other) if path == "/version" else None

    changing = threading.Thread(target=change)
    changing.start()
    with pytest.raises(ScoreError, match=r"no server has answered for 4 s: .*it runs vLLM 0\.1\.0 now, this run was"):
        score_all(backend, rows)
    changing.join()
    down, other = warnings(caplog)
    assert "is down" in down
    assert other.startswith(f"not used again: {between.url}: it runs vLLM 0.1.0 now")
    between.plan = lambda method, path, n: None


# Failures that stay


@pytest.mark.parametrize("fault", ["reset", "503", "refused"])
def test_nobody_is_left(servers: Servers, connect: Connect, proxy: Callable[..., Proxy], fault: str) -> None:
    between = [proxy(servers.plain), proxy(servers.plain)]
    backend = connect(*between, patience=2.0)
    jobs = jobs_of(ragged(300, longest=40), 20)
    stopped = 0.0

    def stop(tokens: int) -> None:
        nonlocal stopped
        if tokens > 1000 and not stopped:
            stopped = time.monotonic()
            for one in between:
                one.plan = lambda method, path, n: fault
                if fault == "refused":
                    one.close()

    with pytest.raises(ScoreError) as caught:
        run(backend, jobs, stop)
    assert 2 <= time.monotonic() - stopped < 60
    text = str(caught.value)
    assert text.startswith(f"no server has answered for 2 s: {between[0].url}: ")
    assert f"; {between[1].url}: " in text
    assert text.endswith("; finished shards are kept: run the same command again when they are back")
    words = {"reset": "the connection ended", "503": "HTTP 503: injected 503", "refused": "Connection refused"}
    assert words[fault] in text


def test_a_run_goes_on_when_servers_are_back(
    servers: Servers, closed_form: Markov, proxy: Callable[..., Proxy], tmp_path: Path
) -> None:
    rows = random_rows(60, V, longest=40, seed=5)
    source = write_rows(tmp_path / "rows.jsonl", [{"input_ids": ids} for ids in rows])
    between, posts = proxy(servers.plain), itertools.count()
    settings = {"backend": "server", "server": (between.url,), "patience": 2.0, "rows_per_shard": 5}

    def until_some_are_scored(method: str, path: str, n: int) -> str | None:
        return "reset" if method == "POST" and next(posts) > 9 else None

    between.plan = until_some_are_scored
    out = tmp_path / "out"
    with pytest.raises(ScoreError, match=r"no server has answered for 2 s: .* run the same command again"):
        run_score(source, closed_form.directory, out, **settings)
    kept = {path.name: path.read_bytes() for path in shards(out)}
    assert 1 <= len(kept) < 12
    assert not (out / "manifest.json").exists()
    between.plan = lambda method, path, n: None
    run_score(source, closed_form.directory, out, **settings)
    assert len(shards(out)) == 12
    assert {path.name: path.read_bytes() for path in shards(out) if path.name in kept} == kept
    check_rows(rows_of(out), rows, closed_form)
    assert verify(str(out)).findings == []


def test_a_batch_whose_answers_cannot_be_used(servers: Servers, connect: Connect, proxy: Callable[..., Proxy]) -> None:
    between = [proxy(servers.plain), proxy(servers.plain)]
    backend = connect(*between)
    faults = itertools.cycle(["500", "missing", "short", "500"])
    for one in between:
        one.plan = lambda method, path, n: next(faults) if method == "POST" else None
    with pytest.raises(ScoreError) as caught:
        run(backend, [Job(7, ragged(5))])
    assert re.fullmatch(
        r"http://[0-9.:]+, shard 7, its sequences 0 to 4: 8 answers cannot be used, the last one: "
        "HTTP 500: injected 500; look at the server's log; finished shards are kept",
        str(caught.value),
    )
    assert [len(one.posts()) for one in between] == [1 + 4, 1 + 4]


def test_a_batch_that_is_always_too_slow(servers: Servers, connect: Connect, proxy: Callable[..., Proxy]) -> None:
    between = proxy(servers.plain)
    backend = connect(between, timeout=0.3, patience=1.0)
    before = len(between.posts())  # more than one where the machine is slow
    between.plan = lambda method, path, n: "stall" if method == "POST" else None
    with pytest.raises(
        ScoreError, match=r"shard 7, its sequences 0 to 4: no whole answer within 4\.8 s; raise --timeout"
    ):
        run(backend, [Job(7, ragged(5))])
    assert len(between.posts()) == before + 5


def test_what_is_refused_is_not_tried_again(servers: Servers, connect: Connect, proxy: Callable[..., Proxy]) -> None:
    between = proxy(servers.plain)
    backend = connect(between)
    jobs = [Job(3, [*ragged(2), np.zeros(CONTEXT + 1, np.int32)])]
    with pytest.raises(ScoreError, match=rf"shard 3, its sequences 0 to 2: .*HTTP 400: .*{CONTEXT}.*; look at"):
        run(backend, jobs)
    assert len(between.posts()) == 2
    backend = connect(between)
    between.plan = lambda method, path, n: (413, b"<p>too big") if method == "POST" else None
    with pytest.raises(ScoreError, match=r"the server refuses: HTTP 413: <p>too big; lower --batch-tokens"):
        score_all(backend, ragged(1))
    assert len(between.posts()) == 4


def test_an_error_comes_after_what_was_finished_before(
    servers: Servers, connect: Connect, closed_form: Markov, proxy: Callable[..., Proxy]
) -> None:
    backend = connect(servers.plain)
    jobs = [Job(0, ragged(3)), Job(1, [np.zeros(CONTEXT + 1, np.int32)] * 30)]
    started = threading.Event()

    def read() -> Iterator[Job]:
        yield jobs[0]
        started.wait(20)
        yield jobs[1]

    feed = PrefetchQueue(read())
    scores = backend.score(feed, lambda job, tokens: None)
    job, first = next(scores)
    check(closed_form, job.sequences, first)
    started.set()
    with pytest.raises(ScoreError, match="shard 1, its sequences 0 to 29:"):
        next(scores)
    feed.close()


INTERRUPTED = """
import sys
import numpy as np
from entrodrop_prep.backends.prefetch import score_all
from entrodrop_prep.backends.model import ModelInfo
from entrodrop_prep.backends.server.backend import ServerBackend
from entrodrop_prep.config import ScoreConfig
url, model = sys.argv[1:]
config = ScoreConfig(source="x", model=model, out="x", backend="server", server=(url,))
backend = ServerBackend(config, ModelInfo("markov", 128, 256, "float32"))
print("connected", flush=True)
sys.stdin.readline()
try:
    score_all(backend, [np.zeros(9, np.int32)])
finally:
    backend.close()
"""


def test_control_c_ends_it(servers: Servers, proxy: Callable[..., Proxy]) -> None:
    between = proxy(servers.plain)
    with OFFLINE.popen(
        [sys.executable, "-c", INTERRUPTED, between.url, str(servers.plain.model)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline() == "connected\n", process.stderr.read()
        before = len(between.posts())
        between.plan = lambda method, path, n: "stall"
        process.stdin.write("go\n")
        process.stdin.flush()
        while len(between.posts()) == before:
            time.sleep(0.01)
        start = time.monotonic()
        process.send_signal(signal.SIGINT)
        process.wait(60)
        assert time.monotonic() - start < 15
        assert process.returncode != 0
        assert "KeyboardInterrupt" in process.stderr.read()


# Servers that are not the right ones


def test_servers_that_cannot_be_reached(
    servers: Servers, connect: Connect, closed_form: Markov, monkeypatch: Any, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("entrodrop_prep.backends.server.connect.CONNECT_DEADLINE", 2.0)
    closed = f"http://127.0.0.1:{free_port()}"
    backend = connect(closed, servers.plain)
    (warning,) = warnings(caplog)
    assert warning.startswith(f"continuing without the server {closed}: no connection: ")
    rows = ragged(5)
    check(closed_form, rows, score_all(backend, rows))
    with socket.create_server(("127.0.0.1", 0)) as silent:
        other = f"http://127.0.0.1:{silent.getsockname()[1]}"
        start = time.monotonic()
        with pytest.raises(ConfigError) as caught:
            connect(closed, other)
    assert time.monotonic() - start < 60
    assert re.fullmatch(
        rf"no server can be reached: {closed}: no connection: .*refused; {other}: no whole answer within 2 s; "
        "`entrodrop serve MODEL` starts one",
        str(caught.value),
    )


def test_another_model(servers: Servers, connect: Connect, closed_form: Markov, tmp_path: Path) -> None:
    info = ModelInfo("other", V, CONTEXT, "float32")
    with pytest.raises(ConfigError, match=rf"{servers.plain.url}: it serves .*markov, not other; give the URL"):
        connect(servers.plain, servers.guarded, info=info, model=tmp_path / "other")
    (tmp_path / "link").symlink_to(closed_form.directory)
    connect(servers.plain, info=ModelInfo("link", V, CONTEXT, "float32"), model=tmp_path / "link")
    connect(servers.plain, info=ModelInfo("someone/markov", V, CONTEXT, "float32"), model="someone/markov")


def other_scores(by: float) -> Callable[[str, str, int], Any]:
    """A plan: the answer to the probe is that of other weights, or of other arithmetic."""
    entropy = np.full((PROBE_TOKENS, 2), [1.0 + by, -1.0], "<f4")
    entropy[-1, 1] = V
    return lambda method, path, n: (200, entropy.tobytes()) if method == "POST" else None


def test_servers_that_score_otherwise(
    servers: Servers, connect: Connect, closed_form: Markov, proxy: Callable[..., Proxy], caplog: Any
) -> None:
    one, other = proxy(servers.plain, other_scores(0)), proxy(servers.plain, other_scores(0.01))
    connect(one, proxy(servers.plain, other_scores(0.0005)))
    says = rf"{other.url}: it scores otherwise than another server of this run: the entropy of token 1 is 1\.01000"
    with pytest.raises(ConfigError, match=says) as e:
        connect(one, other)
    assert "serve the same weights" in str(e.value)
    backend = connect(servers.plain, other_now := proxy(servers.plain), patience=4.0)
    other_now.plan = lambda method, path, n: "reset"  # it goes down, and comes back with other weights
    jobs = jobs_of(ragged(60, longest=60), 10)
    check_all(closed_form, jobs, run(backend, jobs))
    other_now.plan = other_scores(0)
    assert until(lambda: any("not used again" in text for text in warnings(caplog)), 20)
    assert f"{other_now.url}: it scores otherwise than another server of this run" in warnings(caplog)[-1]


def test_the_number_format_that_serve_names(connect: Connect, servers: Servers, proxy: Callable[..., Proxy]) -> None:
    names = json.dumps({"data": [{"id": str(servers.plain.model)}, {"id": f"{DTYPE}bfloat16"}]}).encode()
    between = proxy(servers.plain, lambda method, path, n: (200, names) if path == "/v1/models" else None)
    with pytest.raises(ConfigError, match=r"it runs in bfloat16, this run is to be in float32; give --dtype bfloat16"):
        connect(between)
    same = connect(between, info=ModelInfo("markov", V, CONTEXT, "bfloat16"))
    assert same.environment()["served_dtype"] == "bfloat16"


def test_another_vocabulary(servers: Servers, connect: Connect) -> None:
    info = ModelInfo("markov", V + 1, CONTEXT, "float32")
    wrong = rf"{servers.plain.url}: .*its vocabulary is {V} tokens, the model has {V + 1}; "
    with pytest.raises(ConfigError, match=wrong):
        connect(servers.plain, info=info)


def check_no_plugin(connect: Connect, server: Any) -> None:
    with pytest.raises(
        ConfigError,
        match=rf"^{server.url}: the server gives no token entropies \(HTTP 404: Not Found\); "
        "start it with `entrodrop serve MODEL`.*$",
    ):
        connect(server)


def test_no_plugin(servers: Servers, connect: Connect, proxy: Callable[..., Proxy]) -> None:
    answer = (404, b'{"detail":"Not Found"}')  # as the server of the next test does
    check_no_plugin(connect, proxy(servers.plain, lambda method, path, n: answer if method == "POST" else None))


@pytest.mark.heavy
def test_no_plugin_in_a_server(connect: Connect, closed_form: Markov, tmp_path: Path) -> None:
    stock = VllmServer(closed_form.directory, tmp_path, plugin=False)
    try:
        check_no_plugin(connect, stock.wait())
    finally:
        stock.kill()


def test_no_vllm_server(servers: Servers, connect: Connect, proxy: Callable[..., Proxy]) -> None:
    between = proxy(servers.plain, lambda method, path, n: (404, b"no such page"))
    with pytest.raises(ConfigError, match="the server refuses: HTTP 404: no such page; check the URL"):
        connect(between)
    between.plan = lambda method, path, n: (200, b"<html>")
    with pytest.raises(ConfigError, match=f"{between.url}: GET /v1/models does not answer with JSON; check the URL"):
        connect(between)


def test_too_short_for_the_rows(servers: Servers, connect: Connect) -> None:
    info = ModelInfo("markov", V, 1024, "float32")
    with pytest.raises(
        ConfigError,
        match=rf"it takes at most {CONTEXT} tokens, rows may have 1024; "
        rf"use --max-length {CONTEXT}, or start it with --max-model-len 1024",
    ):
        connect(servers.plain, info=info)
    connect(servers.plain, info=info, max_length=CONTEXT)


def test_a_key(
    servers: Servers, connect: Connect, closed_form: Markov, monkeypatch: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    refused = r"the server refuses: HTTP 401: Unauthorized; put the server's key into .* ENTRODROP_API_KEY"
    with pytest.raises(ConfigError, match=refused):
        connect(servers.guarded)
    for wrong in ("wrong-horse", "wrong horse\n"):
        monkeypatch.setenv("ENTRODROP_API_KEY", wrong)
        with pytest.raises(ConfigError, match=refused) as caught:
            connect(servers.guarded, servers.plain)
        assert "horse" not in str(caught.value)
    monkeypatch.setenv("ENTRODROP_API_KEY", "wr\u00f6ng horse")
    with pytest.raises(ConfigError, match="ENTRODROP_API_KEY has characters") as caught:
        connect(servers.guarded)
    assert "horse" not in str(caught.value)
    monkeypatch.setenv("ENTRODROP_API_KEY", KEY)
    backend = connect(servers.guarded, servers.plain)
    rows = ragged(20)
    check(closed_form, rows, score_all(backend, rows))
    assert "horse" not in caplog.text


def test_a_key_that_a_server_repeats_is_not_shown(
    servers: Servers, connect: Connect, proxy: Callable[..., Proxy], monkeypatch: Any
) -> None:
    monkeypatch.setenv("ENTRODROP_API_KEY", KEY)
    between = proxy(servers.plain, lambda method, path, n: (403, f"no entry for {KEY}".encode()))
    with pytest.raises(ConfigError, match=r"HTTP 403: no entry for \*\*\*; put the server's key"):
        connect(between)


def test_urls() -> None:
    given = ["http://a:8000/", "http://a:8000/v1", " http://a:8000/v1/", "https://B.example/gate/v1", "http://[::1]:80"]
    assert server_urls(given) == ["http://a:8000", "https://b.example/gate", "http://[::1]:80"]
    for bad in ("a:8000", "localhost", "ftp://a", "http://", "http://a:port", "http://a/?x=1", "http://a/#x", ""):
        with pytest.raises(ConfigError, match=r"--server"):
            server_urls([bad])
    with pytest.raises(ConfigError, match=r"must not carry a user or a password; put the key into .*API_KEY") as caught:
        server_urls(["http://me:secret@a:8000"])
    assert "secret" not in str(caught.value)
    with pytest.raises(ConfigError):
        server_urls([])


# Servers that die. The last one stays dead.


def test_a_server_that_is_started_again_is_used_again(
    servers: Servers, connect: Connect, closed_form: Markov, monkeypatch: Any, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("ENTRODROP_API_KEY", KEY)
    backend = connect(servers.guarded, patience=120.0)
    killed = False

    def kill(tokens: int) -> None:
        nonlocal killed
        if tokens > 3000 and not killed:
            killed = True
            servers.guarded.kill()
            servers.guarded.start()

    jobs = jobs_of(ragged(100), 20)
    check_all(closed_form, jobs, run(backend, jobs, kill))
    assert killed
    down, back = warnings(caplog)
    assert down.startswith(f"the server {servers.guarded.url} is down: ")
    assert back == f"the server {servers.guarded.url} is back"


def test_what_a_killed_server_had_goes_to_the_other(
    servers: Servers, connect: Connect, closed_form: Markov, monkeypatch: Any, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("ENTRODROP_API_KEY", KEY)
    backend = connect(servers.plain, servers.guarded)
    killed = False

    def kill(tokens: int) -> None:
        nonlocal killed
        if tokens > 3000 and not killed:
            killed = True
            servers.guarded.kill()

    jobs = jobs_of(ragged(600, longest=100), 20)
    check_all(closed_form, jobs, run(backend, jobs, kill))
    assert killed
    (down,) = warnings(caplog)
    assert down.startswith(f"the server {servers.guarded.url} is down: ")


def test_workers_share_servers_and_a_directory(vllm_server: VllmServer, closed_form: Markov, tmp_path: Path) -> None:
    """One is killed, another comes: the rows are those of one run, their scores those of the model."""
    rows = [{"input_ids": ids} for ids in random_rows(160, V, longest=60)]
    source = write_rows(tmp_path / "rows.jsonl", rows)
    settings: dict[str, Any] = {"backend": "server", "server": (vllm_server.url,), "rows_per_shard": 8}
    run_score(source, closed_form.directory, tmp_path / "one", **settings)
    start, out = starter(), tmp_path / "many"
    settings |= {"source": str(source), "model": str(closed_form.directory), "out": str(out), "dtype": "float32"}
    killed, other = (start("score", {**settings, "worker": f"{i}/2"}) for i in range(2))
    until(lambda: len(shards(out)) > 1 if out.exists() else False)
    killed.kill()
    killed.join()
    assert killed.exitcode == -signal.SIGKILL
    assert not (out / "manifest.json").exists()
    finish(other, start("score", {**settings, "worker": "0/1"}))
    for one, many in zip(rows_of(tmp_path / "one"), rows_of(out), strict=True):
        for name in ("row_id", "window", "input_ids", "loss_mask"):
            assert one[name] == many[name]
        for name in ("entropy", "logprob"):
            np.testing.assert_allclose(one[name][1:], many[name][1:], atol=1e-4)
    assert not verify(str(out)).findings
