"""Coverage-guided fuzzing of what reads outside data. It needs ``atheris`` beside what the tests need:

    PYTHONPATH=.:tests python tests/faults/fuzz.py SECONDS OUT [TARGET ...]

Each target reads bytes as one kind of outside data. An error of ours is an answer; any other exception, and an input
that takes longer than ``SLOW`` seconds of the processor, is a finding: it is kept in OUT with its input, once for each
place in the code. One line says how each target ended.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import random
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

SLOW = 5.0
MEMORY = "/dev/shm"
SEEDS: dict[str, list[bytes]] = {}
Target = Callable[[bytes], None]
CHAT = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]}
EXTENSIONS = ["jsonl", "json", "csv", "tsv", "txt", "parquet", "arrow", "jsonl.gz", "jsonl.zst", "csv.gz", "json.gz"]


def rows(folder: Path) -> Target:
    """A file of rows; the first byte says of which format."""
    import gzip

    import pyarrow as pa
    import pyarrow.parquet as pq

    from entrodrop_prep.sources.source import open_source

    table = pa.Table.from_pylist([{"text": f"row {n}", "n": n, "m": [{"role": "user"}]} for n in range(20)])
    pq.write_table(table, folder / "rows.parquet")
    with pa.ipc.new_file(folder / "rows.arrow", table.schema) as writer:
        writer.write_table(table)
    lines = b'{"text": "a b", "n": 1}\n{"text": "c"}\n'
    made = [lines, b'[{"a": 1}, {"b": [2]}]', b'a,b\n1,"x\ny"\n', b"a\tb\n1\t2\n", b"some\ntext\n"]
    made += [(folder / name).read_bytes() for name in ("rows.parquet", "rows.arrow")]
    made += [gzip.compress(lines), b"\x28\xb5\x2f\xfd\x04\x00", gzip.compress(made[2]), gzip.compress(made[1])]
    SEEDS["rows"] = [bytes([n]) + data for n, data in enumerate(made)]

    def run(data: bytes) -> None:
        path = folder / f"x.{EXTENSIONS[(data[0] if data else 0) % len(EXTENSIONS)]}"
        path.write_bytes(data[1:])
        try:
            source = open_source(str(path), split="train", split_given=False, config=None, limit=50, text_rows="line")
            first = source.read(0, 3, None)
            if first.next is not None:
                source.read(len(first.rows), 50, first.next)
        finally:
            path.unlink()

    return run


def chats(folder: Path) -> Target:
    """A row of any format as JSON, encoded with a tokenizer that has a template."""
    from entrodrop_prep.scoring.tokenize import detect_format
    from entrodrop_prep.sources.json_rows import parse_object
    from helpers.tokenizers import CHATML, byte_bpe

    tokenizer = byte_bpe(template=CHATML)
    call = {"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}
    more = [
        {**CHAT, "tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}], "system": "S"},
        {"messages": [CHAT["messages"][0], {"role": "assistant", "content": None, "tool_calls": [call]}]},
        {"messages": [{"role": "assistant", "content": [{"type": "text", "text": "x"}], "weight": 0}]},
        {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
        {"prompt": "a", "completion": "b"},
        {"prompt": CHAT["messages"][:1], "completion": CHAT["messages"][1:], "chat_template_kwargs": {"x": 1}},
        {"instruction": "a", "input": "b", "output": "c", "history": [["q", "r"]], "system": "s"},
        {"input_ids": [1, 2, 3], "labels": [-100, 2, 3], "attention_mask": [1, 1, 1], "completion_mask": [0, 1, 1]},
        {"text": "a b c"},
    ]
    SEEDS["chats"] = [json.dumps(row).encode() for row in [CHAT, *more]]
    settings = {"source": "x", "model": "x", "out": "x"}

    def run(data: bytes) -> None:
        from entrodrop_prep.config import ScoreConfig
        from entrodrop_prep.scoring.tokenize import Encoder

        row, reason = parse_object(data.decode("utf-8", "replace"))
        if reason is None and isinstance(row, dict):
            config = ScoreConfig(**settings)
            found = detect_format(list(row), config)
            Encoder(tokenizer, found, append_eos=True, chat_template_kwargs=None, cut_to=64).encode([row, row])

    return run


def templates(folder: Path) -> Target:
    """A chat template."""
    from entrodrop_prep.config import ScoreConfig
    from entrodrop_prep.scoring.tokenize import Encoder, detect_format
    from entrodrop_prep.scoring.tokenizer import load_tokenizer
    from helpers.tokenizers import CHATML, CHATML_MARKED, byte_bpe

    byte_bpe().save_pretrained(str(folder / "tokenizer"))
    plain = "{% for m in messages %}{{ m.role }}: {{ m['content'] }}\n{% endfor %}"
    words = (
        b"{% set x = namespace(n=0) %}{% if not loop.last and tools is defined %}{{ raise_exception('a') }}{% endif %}"
    )
    SEEDS["templates"] = [CHATML.encode(), CHATML_MARKED.encode(), plain.encode(), words]

    def run(data: bytes) -> None:
        (folder / "t.jinja").write_bytes(data)
        tokenizer = load_tokenizer(
            str(folder / "tokenizer"),
            revision=None,
            trust_remote_code=False,
            chat_template_file=str(folder / "t.jinja"),
        )
        found = detect_format(["messages"], ScoreConfig(source="x", model="x", out="x"))
        Encoder(tokenizer, found, append_eos=True, chat_template_kwargs=None).encode([CHAT])

    return run


def recipes(folder: Path) -> Target:
    """A recipe file."""
    from entrodrop_prep.config import MaterializeConfig

    SEEDS["recipes"] = [
        b"quantile: 0.5\nschedule: cosine\nmax_rate: 0.8\nseed: 3\n",
        b'{"rates": [0.1, 0.2], "target": "both", "drop_token": "random", "protect": "special", "scope": "row"}',
        b"threshold: 1.5\nkeep_surprising: 3.0\nprotect: [1, 2]\nrows_per_shard: 7\ncompression: zstd\nhorizon: 9\n",
        b"select: random\nprogress: row\nshuffle: once\na: &a [1]\nb: *a\n",
    ]

    def run(data: bytes) -> None:
        (folder / "r.yaml").write_bytes(data)
        MaterializeConfig.load(str(folder / "r.yaml"), scored="s", out="o", epochs=2)

    return run


JUNK = [
    None,
    True,
    -1,
    0,
    1,
    2**31,
    2**63,
    2**70,
    1.5,
    -0.0,
    1e308,
    "",
    "x",
    "../x",
    "\x1b[2J",
    "/etc/passwd",
    "a" * 300,
]
JUNK += [[], {}, [[]], [{}], {"": None}, ["x"], [1], {"x": {"y": []}}, "shard-00000.parquet", "\ud800", "\u202e"]


def changed(value: Any, rng: random.Random) -> Any:
    """JSON with something in it replaced, removed, added or doubled."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key = rng.choice(list(value))
        what = rng.random()
        if what < 0.1:
            return {k: v for k, v in value.items() if k != key}
        if what < 0.15:
            return {**value, rng.choice(["x", "bounds", "sources", "derived", "validation"]): rng.choice(JUNK)}
        return {**value, key: changed(value[key], rng)}
    if isinstance(value, list) and value and rng.random() < 0.9:
        n = rng.randrange(len(value))
        if rng.random() < 0.15:
            return value[:n] + value[n:] * 2
        return [*value[:n], changed(value[n], rng), *value[n + 1 :]]
    if isinstance(value, int) and rng.random() < 0.3:
        return value + rng.choice([-1, 1])
    return rng.choice(JUNK)


def directories(folder: Path) -> tuple[Path, Path]:
    """A scored and a masked directory."""
    from entrodrop_prep.config import MaterializeConfig
    from entrodrop_prep.export.materialize import materialize
    from helpers.scored import some_rows, write_scored

    write_scored(folder / "scored", some_rows(24, lengths=(2, 20)))
    materialize(MaterializeConfig(scored=str(folder / "scored"), out=str(folder / "masked"), epochs=2))
    return folder / "scored", folder / "masked"


def read_one(rng: random.Random, scored: Path, masked: Path, out: Path) -> None:
    """One of what reads finished directories."""
    from entrodrop_prep.config import MaterializeConfig
    from entrodrop_prep.errors import EntrodropError
    from entrodrop_prep.export.materialize import materialize
    from entrodrop_prep.trainers import recipe
    from entrodrop_prep.training.rows import MaskedRows
    from entrodrop_prep.verification.inspect import show
    from entrodrop_prep.verification.report import report
    from entrodrop_prep.verification.run import verify

    def loaded() -> None:
        MaskedRows.open(scored, epochs=2, cache_dir=out / "cache").take([0, 1])

    calls: list[Callable[[], Any]] = [
        lambda: verify(str(scored)),
        lambda: verify(str(masked), str(scored)),
        lambda: list(show(str(scored), 0)),
        lambda: list(show(str(masked), 0)),
        lambda: recipe("trl", str(masked)),
        lambda: report(str(scored), str(out / "report.html")),
        lambda: materialize(MaterializeConfig(scored=str(scored), out=str(out / "new"), epochs=2)),
        loaded,
    ]
    try:
        rng.choice(calls)()
    except EntrodropError as e:
        assert str(e)  # noqa: PT017
    shutil.rmtree(out, ignore_errors=True)


def manifests(folder: Path) -> Target:
    """A manifest that says something else, with a digest that is right."""
    scored, masked = directories(folder)
    SEEDS["manifests"] = [bytes([n]) * 8 for n in range(200)]

    def run(data: bytes) -> None:
        from entrodrop_prep.store import manifest

        rng = random.Random(data)
        directory = rng.choice([scored, masked])
        before = (directory / "manifest.json").read_bytes()
        described = json.loads(before)
        for _ in range(rng.randrange(1, 4)):
            described = changed(described, rng)
        try:
            if isinstance(described, dict):
                manifest.write(directory, described)
            else:
                (directory / "manifest.json").write_text(json.dumps(described))
            read_one(rng, scored, masked, folder / "out")
        finally:
            (directory / "manifest.json").write_bytes(before)

    return run


def shards(folder: Path) -> Target:
    """Shards of finished directories with bytes changed; half of them with a manifest that lists them so."""
    scored, masked = directories(folder)
    SEEDS["shards"] = [bytes([n]) * 8 for n in range(200)]

    def run(data: bytes) -> None:
        from entrodrop_prep.store import manifest

        rng = random.Random(data)
        directory = rng.choice([scored, masked])
        path = rng.choice(sorted(directory.rglob("*.parquet")))
        described, before = (directory / "manifest.json").read_bytes(), path.read_bytes()
        new = bytearray(before)
        for _ in range(rng.randrange(1, 4)):
            tail = rng.random() < 0.7  # the footer
            new[rng.randrange(len(new) * 2 // 3 if tail else 0, len(new))] = rng.randrange(256)
        if rng.random() < 0.1:
            new = new[: rng.randrange(len(new))]
        try:
            path.write_bytes(new)
            if rng.random() < 0.5:
                listed = json.loads(described)
                for entry in listed["files"]:
                    if directory / entry["file"] == path:
                        entry |= manifest.file_entry(directory, path)
                manifest.write(directory, listed)
            read_one(rng, scored, masked, folder / "out")
        finally:
            path.write_bytes(before)
            (directory / "manifest.json").write_bytes(described)

    return run


def answers(folder: Path) -> Target:
    """What a server answers: its list of models, its version, scores, refusals."""
    import numpy as np

    from entrodrop_prep.backends.model import ModelInfo
    from entrodrop_prep.backends.server import http
    from entrodrop_prep.backends.server.connect import Checks, connect
    from entrodrop_prep.backends.server.request import read_answer

    info = ModelInfo("m", 128, 256, "float32")
    sequences = [np.arange(1, 5, dtype=np.int32), np.arange(1, 3, dtype=np.int32)]
    good = np.full((6, 2), [1.0, -1.0], "<f4")
    good[[3, 5], 1] = 128
    listing = {"data": [{"id": "m", "root": "/m", "max_model_len": 256, "owned_by": "entrodrop:plugin;float32"}]}
    SEEDS["answers"] = [
        b"\0" + good.tobytes(),
        b"\1" + json.dumps(listing).encode(),
        b"\2" + b'{"version": "0.31.0"}',
        b"\3" + b'{"error": {"message": "no", "type": "x"}}',
        b"\4" + b"120",
    ]

    def run(data: bytes) -> None:
        kind, body = (data[0] % 5 if data else 0), data[1:]
        if kind == 0:
            with contextlib.suppress(http.Trouble):
                read_answer(body, sequences, info)
        elif kind == 3:
            http._message(body)
        elif kind == 4:
            http._seconds(body.decode("latin-1"))
        else:
            usual = {"/v1/models": json.dumps(listing).encode(), "/version": b'{"version": "0.31.0"}', "/health": b""}
            usual["/v1/models" if kind == 1 else "/version"] = body
            server = SimpleNamespace(
                url="http://x", get=lambda path, *a, **k: usual.get(path, body), post=lambda *a, **k: body
            )
            with contextlib.suppress(http.Trouble, http.Denied):
                connect(server, Checks("m", info, 256, 0.1))  # type: ignore[arg-type]

    return run


def cards(folder: Path) -> Target:
    """A card of the user's, on disk or on the Hub, and what a push makes of it."""
    from entrodrop_prep.export.card import clashing_configs, license_of, masked_card, merged_card, with_license
    from entrodrop_prep.store.manifest import read
    from entrodrop_prep.store.schema import MASKED

    _, masked = directories(folder)
    described = read(masked, MASKED)
    own = (masked / "README.md").read_text()
    front = (
        "---\nlicense: mit\nconfigs:\n- config_name: mine\n  data_files: x\ndataset_info:\n- config_name: a\n---\n# T\n"
    )
    SEEDS["cards"] = [
        own.encode(),
        front.encode(),
        b"# T\n<!-- entrodrop -->\n",
        b"---\n- a\n---\n",
        b"---\na: &x [*x]\n---",
    ]

    def run(data: bytes) -> None:
        text = data.decode("utf-8", "replace")
        license_of(text)
        with_license(text, "mit")
        clashing_configs(own, text)
        merged = merged_card(own, text)
        assert merged_card(own, merged) == merged, "merging twice changes the card"
        masked_card(text, described, title="t")

    return run


def configs(folder: Path) -> Target:
    """A model's config.json and its index of weights."""
    from entrodrop_prep.backends.config_file import check_config
    from entrodrop_prep.backends.model import inspect_model
    from entrodrop_prep.backends.weight_files import weight_files
    from entrodrop_prep.config import ScoreConfig
    from helpers.models import save_model, tiny_llama

    model = save_model(folder / "model", tiny_llama(61))
    good = (model / "config.json").read_bytes()
    index = b'{"metadata": {}, "weight_map": {"a": "model.safetensors"}}'
    SEEDS["configs"] = [b"\0" + good, b"\1" + index, b"\1" + b'{"weight_map": {"a": "../x"}}']

    def run(data: bytes) -> None:
        target = model / "model.safetensors.index.json"
        if data[:1] == b"\1":
            target.write_bytes(data[1:])
        else:
            (model / "config.json").write_bytes(data[1:])
        try:
            check_config(model / "config.json", str(model))
            config = ScoreConfig(source="x", model=str(model), out="x")
            inspect_model(config)
            weight_files(config, model)
        finally:
            target.unlink(missing_ok=True)
            (model / "config.json").write_bytes(good)

    return run


TARGETS = {f.__name__: f for f in (rows, chats, templates, recipes, manifests, shards, answers, cards, configs)}


def fuzz(name: str, seconds: float, out: Path) -> None:
    """One target, in a process of its own."""
    import atheris

    from entrodrop_prep.errors import EntrodropError

    with atheris.instrument_imports(include=["entrodrop_prep"]):
        folder = Path(tempfile.mkdtemp(prefix=f"fuzz-{name}-", dir=MEMORY if os.path.isdir(MEMORY) else None))
        target = TARGETS[name](folder)
        for seed in SEEDS[name][:40]:  # what is imported on the way is imported, and instrumented, now
            with contextlib.suppress(Exception):
                target(seed)
    corpus = folder / "corpus"
    corpus.mkdir()
    for n, seed in enumerate(SEEDS[name]):
        (corpus / f"seed-{n}").write_bytes(seed)
    begun, done, places, last = time.monotonic(), 0, set[str](), [0.0]
    devnull = os.open(os.devnull, os.O_WRONLY)
    shown = os.dup(2)
    os.dup2(devnull, 1)
    os.dup2(devnull, 2)

    def found(what: str, data: bytes, text: str) -> None:
        if what not in places:
            places.add(what)
            last[0] = time.monotonic() - begun
            (out / f"{name}-{len(places):03d}.txt").write_text(f"{what}\n{last[0]:.0f} s\n{text}\n{data!r}\n")
            (out / f"{name}-{len(places):03d}.bin").write_bytes(data)

    def one(data: bytes) -> None:
        nonlocal done
        start = time.process_time()
        if time.monotonic() - begun > seconds:
            os.write(
                shown,
                f"{name}: {done} inputs in {time.monotonic() - begun:.0f} s, {len(places)} findings, the last after "
                f"{last[0]:.0f} s\n".encode(),
            )
            shutil.rmtree(folder, ignore_errors=True)
            os._exit(0)
        done += 1
        try:
            target(data)
        except (EntrodropError, UnicodeEncodeError) as e:
            assert isinstance(e, EntrodropError) or "surrogates" in str(e)  # noqa: PT017 - of the harness
        except Exception as e:  # noqa: BLE001 - that is what is looked for
            where = [f for f in traceback.extract_tb(e.__traceback__) if "entrodrop_prep" in f.filename]
            at = f"{where[-1].filename}:{where[-1].lineno}" if where else "here"
            found(f"{type(e).__name__} {at}", data, traceback.format_exc())
        if time.process_time() - start > SLOW:
            found(f"slow {int(time.process_time() - start)}", data, "")

    limits = ("-max_len=20000", "-timeout=120", "-rss_limit_mb=8000", f"-artifact_prefix={out}/")
    atheris.Setup([sys.argv[0], str(corpus), *limits], one)
    atheris.Fuzz()


def main(arguments: list[str]) -> None:
    """SECONDS in all, shared by the targets."""
    seconds, out, *names = arguments
    names = names or list(TARGETS)
    Path(out).mkdir(parents=True, exist_ok=True)
    for name in names:
        process = multiprocessing.get_context("spawn").Process(
            target=fuzz, args=(name, float(seconds) / len(names), Path(out))
        )
        process.start()
        process.join()


if __name__ == "__main__":
    main(sys.argv[1:])
