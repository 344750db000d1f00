"""What a path is, told in one line and before anything heavy is imported; and a Hub that says nothing."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from entrodrop_prep import cli
from entrodrop_prep.config import read_recipe
from entrodrop_prep.errors import ConfigError, EntrodropError, SourceError
from entrodrop_prep.hub import read_errors as reading
from entrodrop_prep.sources import given_paths as places
from entrodrop_prep.sources.source import open_source

MISSING = [
    ["score", "nowhere.jsonl", "--model", "m", "--out", "o"],
    ["score", "rows.jsonl", "--model", "./nowhere", "--out", "o"],
    ["score", "rows.jsonl", "--model", "a/b/c", "--out", "o"],
    ["score", "rows.jsonl", "--model", "a--b", "--out", "o"],
    ["score", "rows.jsonl", "--model", "D", "--tokenizer", "rows.jsonl", "--out", "o"],
    ["score", "rows.jsonl", "--model", "m", "--chat-template", "nowhere.jinja", "--out", "o"],
    ["materialize", "nowhere", "--out", "m", "--epochs", "1"],
    ["materialize", "x=nowhere:2", "--out", "m", "--epochs", "1"],
    ["materialize", "S", "--recipe", "nowhere.yaml", "--out", "m"],
    ["verify", "nowhere"],
    ["verify", "a..b/c"],
    ["verify", "M", "--against", "nowhere"],
    ["push", "nowhere", "a/b"],
    ["inspect", "nowhere"],
    ["recipe", "trl", "nowhere"],
]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Directories that are known by their manifest alone, and rows."""
    monkeypatch.chdir(tmp_path)
    for name, schema in (("S", "scored/1"), ("M", "masked/1")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "manifest.json").write_text(json.dumps({"schema": schema}))
    (tmp_path / "U").mkdir()
    (tmp_path / "U" / ".state.json").write_text(json.dumps({"schema": "masked/1"}))
    (tmp_path / "M" / "epoch_000").mkdir()
    (tmp_path / "M" / "epoch_000" / "train-00000-of-00001.parquet").touch()
    (tmp_path / "D").mkdir()
    for name in ("rows.jsonl", "D/rows.jsonl"):
        (tmp_path / name).write_text('{"text": "x"}\n')
    return tmp_path


def test_what_is_not_there_is_said_before_anything_heavy_is_imported(here: Path) -> None:
    code = (
        "import json, sys, time; from entrodrop_prep.cli import run\n"
        "for arguments in json.loads(sys.argv[1]):\n"
        "    began = time.process_time(); code = run(arguments); took = time.process_time() - began\n"
        "    assert code == 2 and took < 5, (arguments, code, took)\n"
        "heavy = {'numpy', 'pyarrow', 'torch', 'datasets', 'transformers', 'pandas', 'vllm'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    ran = subprocess.run([sys.executable, "-c", code, json.dumps(MISSING)], capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr
    said = ran.stderr.splitlines()
    assert len(said) == len(MISSING)
    for line in said:
        assert line.startswith("error: ")
        assert "o such" in line or "it is a file" in line, line


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["score", "S", "--model", "m", "--out", "o"], "S: it is a scored directory, whose rows were scored"),
        (["score", "U", "--model", "m", "--out", "o"], "U: it is a masked directory, whose rows were scored already"),
        (["score", "M/epoch_*/*.parquet", "--model", "m", "--out", "o"], "it is in a masked directory"),
        (["score", "rows.jsonl", "--model", "S", "--out", "o"], "S: it is a scored directory, not a model"),
        (
            ["materialize", "rows.jsonl", "--out", "o", "--epochs", "1"],
            "rows.jsonl: it is a file, not a scored directory; make one",
        ),
        (["materialize", "a=S", "b=M:0.5", "--out", "o", "--epochs", "1"], "M: it is a masked directory"),
        (
            ["materialize", "S", "--plain", "c=D", "--out", "o", "--epochs", "1"],
            "D: it is a directory of data (rows.jsonl), not a scored",
        ),
        (["push", "D", "a/b"], "D: it is a directory of data (rows.jsonl), not a scored or a masked directory"),
        (["push", "M", "a/b", "--include-scored", "U"], "U: it is a masked directory; give the scored directory"),
        (["push", "S", "a--b/c"], "'a--b/c' is no name of a repository"),
        (["push", "S", "a/b.git"], "'a/b.git' is no name of a repository"),
        (["push", "S", "a/\x1b[2J\n"], "'a/\\x1b[2J\\n' is no name of a repository"),
        (["verify", "M", "--against", "U"], "U: it is a masked directory; give the scored directory"),
        (["inspect", "D"], "D: it is a directory of data"),
    ],
)
def test_another_kind_of_directory_is_named(
    here: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    assert cli.run(arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert said in line


@pytest.mark.parametrize("name", ["a..b/c", "-a/b", "a/b.git", "a--b/c", "x" * 97, "a b/c", "a/b\n", "\u00e4/b", "a/"])
def test_names_of_repositories_follow_the_clients_rule(name: str, here: Path) -> None:
    assert not places.is_repo_id(name)
    with pytest.raises(EntrodropError, match="no such directory"):
        places.check_directory(name, hub=True)
    with pytest.raises(SourceError, match=r"no Hub dataset id|no such file"):
        open_source(name, split="train", split_given=False, config=None, limit=None)


@pytest.fixture
def silent_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[str]:
    """A host that takes connections and never says anything."""
    from huggingface_hub import constants

    with socket.create_server(("127.0.0.1", 0)) as server:
        endpoint = f"http://127.0.0.1:{server.getsockname()[1]}"
        monkeypatch.setattr(constants, "ENDPOINT", endpoint)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setattr(reading, "ANSWER_SECONDS", 0.2)
        monkeypatch.setattr(reading, "QUIET_SECONDS", 0.1)
        yield endpoint


def test_a_hub_that_says_nothing(
    silent_hub: str, here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    began = time.monotonic()
    assert cli.run(["score", "user/name", "--model", "m", "--out", "o"]) == 2
    assert cli.run(["score", "rows.jsonl", "--model", "user/model", "--out", "o"]) == 2
    assert time.monotonic() - began < 60
    told = capsys.readouterr()
    assert told.out == f"contacting {silent_hub} for the dataset user/name\n"
    assert told.err.splitlines()[0].startswith(f"error: user/name: the Hub at {silent_hub} cannot be reached, and the")
    assert told.err.splitlines()[1].startswith(f"error: user/model: the Hub at {silent_hub} cannot be reached")
    (here / "hub" / "models--user--model").mkdir(parents=True)
    places.check_model("user/model")  # the cache may do
    from huggingface_hub import constants

    with reading.asking("model", "user/model"):
        assert constants.HF_HUB_OFFLINE
        assert os.environ["HF_HUB_OFFLINE"] == "1"
    assert not constants.HF_HUB_OFFLINE


@pytest.mark.parametrize("kind", ["pipe", "device"])
@pytest.mark.parametrize(
    "command",
    [
        ["score", "rows.jsonl", "--model", "m", "--out", "o", "--chat-template"],
        ["materialize", "S", "--out", "o", "--recipe"],
        ["push", "S", "a/b", "--recipe"],
    ],
    ids=lambda command: command[0],
)
def test_a_file_that_never_ends_is_not_read(
    command: list[str], kind: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    os.mkfifo(here / "pipe")
    given = "/dev/zero" if kind == "device" else "pipe"
    before = signal.signal(signal.SIGALRM, lambda *_: pytest.fail("it hangs"))
    signal.alarm(60)
    try:
        assert cli.run([*command, given]) == 2
        with pytest.raises(ConfigError, match="it is a pipe, socket or device"):
            read_recipe(given)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    assert f"error: {given}: cannot read the " in capsys.readouterr().err
