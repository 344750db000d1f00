"""Reading from the Hub with the real clients, against the tests' Hub: sources, models, published datasets."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from entrodrop_prep import MaterializeConfig, materialize
from entrodrop_prep.store.manifest import read
from entrodrop_prep.store.schema import SCORED
from helpers.hub import READER, WRITER, Fault, Hub
from helpers.models import random_rows, rows_of, save_model, tiny_llama, words
from helpers.scored import all_bytes, copy, rewrite_manifest, some_rows, write_scored
from helpers.warm import CLIENT, MODEL_CLIENT

pytestmark = pytest.mark.network

SCRIPT = """
import contextlib, io, json, sys
from entrodrop_prep import cli
answers = []
for command in json.loads(sys.argv[1]):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = cli.run(command)
    answers.append([code, out.getvalue(), err.getvalue()])
print(json.dumps(answers))
"""


def run(hub: Hub, home: Path, *commands: list[str], token: str | None = WRITER, **environment: str) -> list[Any]:
    """Code, stdout and stderr of each command, all in one fresh process."""
    done = (MODEL_CLIENT if commands[0][0] == "score" else CLIENT).run(
        [sys.executable, "-c", SCRIPT, json.dumps(commands)],
        env={**hub.environment(home, token), **environment},
        capture_output=True,
        text=True,
        cwd=home.parent,
    )
    assert done.returncode == 0, done.stderr
    return list(json.loads(done.stdout.splitlines()[-1]))


def refused(answer: Any, *said: str) -> None:
    """A command ended with one line of error that says this."""
    code, _, err = answer
    lines = [line for line in err.splitlines() if not line.startswith("warning: ")]
    assert code == 2, answer
    assert len(lines) == 1, err
    assert lines[0].startswith("error: ")
    for words_ in said:
        assert words_ in lines[0]


def files_of(directory: Path, prefix: str = "") -> dict[str, bytes]:
    return {f"{prefix}{name}": data for name, data in all_bytes(directory).items() if not name.startswith(".")}


# Published datasets.


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A scored directory, and what was materialized from it."""
    folder = tmp_path_factory.mktemp("made")
    write_scored(folder / "scored", some_rows(40), rows_per_shard=9)
    materialize(
        MaterializeConfig(scored=str(folder / "scored"), out=str(folder / "masked"), epochs=2, layout=("jsonl",))
    )
    return folder


def test_a_published_dataset_is_proved(hub: Hub, made: Path, tmp_path: Path) -> None:
    files = {name: data for name, data in files_of(made / "masked").items() if not name.startswith("jsonl/")}
    alone = hub.create("alice/alone", files=files)
    hub.create("alice/both", files={**files, **files_of(made / "scored", "scored/")})
    hub.create("alice/scores", files=files_of(made / "scored"))
    hub.create("alice/stray", files={**files, "epoch_001/train-00007-of-00008.parquet": b"PAR1"})
    hub.create("alice/other", files={"README.md": b"nothing"})
    first = alone.head()
    alone.put({"notes.txt": b"later"})
    (tmp_path / "alice").mkdir()
    home = tmp_path / "home"
    answers = run(
        hub,
        home,
        ["verify", "alice/alone"],
        ["verify", "alice/alone", "--revision", first, "--against", str(made / "scored")],
        ["verify", "alice/alone", "--against", "alice/scores"],
        ["verify", "alice/both"],
        ["verify", "alice/scores"],
        ["verify", "alice/stray"],
        ["verify", "alice/other"],
        ["verify", "alice/alone", "--revision", "v9"],
        ["verify", "alice/missing"],
    )
    for (code, out, err), said in zip(
        answers, ["masks not checked", *["masks made again"] * 3, "3 shards"], strict=False
    ):
        assert code == 0, (out, err)
        if said != "3 shards":
            assert said in out
        assert out.splitlines()[0].startswith("alice/")
        assert "the dataset on the Hub at commit" in out
        assert out.splitlines()[-1].startswith("OK: verified alice/")
        assert "layout" not in out  # which no push brings
    assert alone.head() in answers[0][1]
    assert first in answers[1][1]
    assert answers[5][0] == 2
    assert "does not list this file" in answers[5][2]
    refused(answers[6], "alice/other", "no manifest.json")
    refused(answers[7], "no revision 'v9'", "a tag or a commit")
    refused(answers[8], "alice/missing", "no such dataset", "a local path is written ./alice/missing", "hf auth login")
    assert not list((home / "hub" / "datasets--alice--alone").rglob("notes.txt")), "more than needed was downloaded"


@pytest.mark.parametrize("kind", ["scored", "masked"])
@pytest.mark.parametrize("name", ["../../outside.parquet", "/etc/passwd", "epoch_000/../../outside.parquet"])
def test_a_manifest_on_the_hub_names_no_file_elsewhere(
    hub: Hub, made: Path, tmp_path: Path, kind: str, name: str
) -> None:
    directory = copy(made / kind, tmp_path / kind)
    files = json.loads((directory / "manifest.json").read_bytes())["files"]
    rewrite_manifest(directory, files=[{**files[0], "file": name}, *files[1:]])
    hub.create("alice/rows", files=files_of(directory))
    (answer,) = run(hub, tmp_path / "home", ["verify", "alice/rows"])
    refused(answer, "manifest.json", "is no name of a file that this program writes there")
    assert not list(tmp_path.rglob("outside.parquet"))


def test_a_flipped_byte_in_the_cache_is_found(hub: Hub, made: Path, tmp_path: Path) -> None:
    hub.create("alice/data", files=files_of(made / "masked"))
    home = tmp_path / "home"
    assert run(hub, home, ["verify", "alice/data"])[0][0] == 0
    shard = next((home / "hub").rglob("epoch_001/*.parquet")).resolve()
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.chmod(0o644)
    shard.write_bytes(data)
    again, offline = run(hub, home, ["verify", "alice/data"], ["verify", "alice/data"], HF_HUB_OFFLINE="1")
    for code, out, err in (again, offline):
        assert code == 2
        assert "epoch_001" in err
        assert "hf cache verify alice/data" in out
        assert out.splitlines()[-1].startswith("FAILED: ")


def test_a_directory_here_wins(hub: Hub, made: Path, tmp_path: Path) -> None:
    hub.create("made/masked", files={"README.md": b"another"})
    (tmp_path / "made").symlink_to(made)
    commands = [["verify", "made/masked"], ["verify", "made/masked", "--revision", "main"]]
    here, revised = run(hub, tmp_path / "home", *commands)
    assert here[0] == 0
    assert "the directory here, not a dataset on the Hub" in here[1]
    refused(revised, "--revision", "is a directory here")
    assert not hub.calls


def test_what_may_not_be_read_says_what_to_do(hub: Hub, made: Path, tmp_path: Path) -> None:
    hub.create("alice/data", files=files_of(made / "masked"))
    open_to = hub.create("alice/gated", private=False, files=files_of(made / "masked"))
    open_to.change(gated="auto")
    asked = [["verify", "alice/data"], ["verify", "alice/gated"]]
    for token in (None, READER):
        private, gated = run(hub, tmp_path / f"home-{token}", *asked, token=token)
        refused(private, "alice/data", "it is private and you may not read it", "hf auth login")
        refused(gated, "restricted (gated)", f"accept its terms on {hub.url}/datasets/alice/gated")
    refused(run(hub, tmp_path / "bad", asked[0], token="hf_noSuchTokenAtAll")[0], "does not accept the token")
    hub.faults.append(Fault("info", "503", times=99))
    refused(run(hub, tmp_path / "down", asked[0])[0], "a failure of its own (503)", "later")


def test_no_hub_at_all(hub: Hub, tmp_path: Path) -> None:
    command = ["verify", "alice/data"]
    refused(run(hub, tmp_path / "a", command, HF_ENDPOINT="http://127.0.0.1:1")[0], "cannot be reached", "./alice/data")
    refused(run(hub, tmp_path / "b", command, HF_HUB_OFFLINE="1")[0], "HF_HUB_OFFLINE is set")


# Sources and models.


TEXTS = [words(row) for row in random_rows(70, 97, seed=3)]
CARD = b"---\nlicense: cc-by-4.0\nlanguage:\n- en\n- no\n---\n# Words\n"


def parquet(texts: list[str]) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.table({"text": texts, "n": pa.array(range(len(texts)), pa.int16())}), buffer, row_group_size=9)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model") / "tiny", tiny_llama())


@pytest.fixture
def published(hub: Hub) -> str:
    """A dataset of two files, in its second commit; the first had other rows. Gives the second commit."""
    repo = hub.create("alice/words", files={"README.md": CARD, "data/train-00000-of-00001.parquet": parquet(TEXTS[:5])})
    files = {f"data/train-0000{i}-of-00002.parquet": parquet(TEXTS[i * 40 : 40 + i * 40]) for i in (0, 1)}
    return repo.put(files, delete=("data/train-00000-of-00001.parquet",))


def score_command(model: Path | str, out: Path, *more: str) -> list[str]:
    settings = ["--model", str(model), "--backend", "transformers", "--dtype", "float32", "--rows-per-shard", "16"]
    return ["score", "alice/words", "--out", str(out), *settings, "--keep-columns", "n", *more]


def test_a_dataset_is_scored_at_a_revision_and_as_a_stream(
    hub: Hub, published: str, model: Path, tmp_path: Path
) -> None:
    first = str(hub.repo("alice/words").log()[1]["id"])
    answers = run(
        hub,
        tmp_path / "home",
        score_command(model, tmp_path / "usual"),
        score_command(model, tmp_path / "stream", "--stream"),
        score_command(model, tmp_path / "old", "--source-revision", first),
        score_command(model, tmp_path / "older", "--revision", first, "--stream"),
        score_command(model, tmp_path / "limited", "--limit", "45", "--stream"),
        score_command(model, tmp_path / "none", "--source-revision", "v9"),
    )
    for code, out, err in answers[:5]:
        assert code == 0, (out, err)
    refused(answers[5], "no revision 'v9'")
    assert f"alice/words at commit {published}" in answers[0][1]
    usual, stream, old, older = (read(tmp_path / n, SCORED) for n in ("usual", "stream", "old", "older"))
    assert usual["identity"]["source"]["revision"] == published
    assert usual["source"]["card"] == {"license": "cc-by-4.0", "language": ["en", "no"]}
    assert usual["content_digest"] == stream["content_digest"]
    assert usual["source"] == stream["source"]
    assert usual["counts"]["rows_read"] == 70
    assert old["identity"]["source"]["revision"] == first
    assert old["counts"]["rows_read"] == 5
    assert old["content_digest"] == older["content_digest"]
    assert rows_of(tmp_path / "limited") == rows_of(tmp_path / "usual")[:45]


@pytest.mark.heavy
def test_a_stream_goes_on_where_it_was(hub: Hub, published: str, model: Path, tmp_path: Path) -> None:
    out, home = tmp_path / "out", tmp_path / "home"
    assert run(hub, home, score_command(model, out, "--stream"))[0][0] == 0
    before, digest = rows_of(out), read(out, SCORED)["content_digest"]
    assert [row["n"] for row in before] == [row["row_id"] % 40 for row in before]
    assert len(before) > 60
    for lost in (["shard-00003.parquet", "shard-00004.parquet"], ["shard-00001.parquet"], ["shard-00000.parquet"]):
        for name in [*lost, "manifest.json"]:
            (out / name).unlink()
        assert run(hub, home, score_command(model, out, "--stream"))[0][0] == 0
        assert rows_of(out) == before, lost
        assert read(out, SCORED)["content_digest"] == digest


@pytest.mark.heavy
def test_sources_and_models_that_may_not_be_read(hub: Hub, published: str, model: Path, tmp_path: Path) -> None:
    weights = hub.create("alice/tiny", "models", files=files_of(model))
    out = tmp_path / "out"
    private = [score_command(model, out), score_command(model, out, "--stream"), score_command("alice/tiny", out)]
    for answer, what in zip(
        run(hub, tmp_path / "a", *private, token=None), ("dataset", "dataset", "model"), strict=True
    ):
        refused(answer, f"no such {what}, or it is private", "hf auth login")
    assert not out.exists()
    code, _, err = run(hub, tmp_path / "b", score_command("alice/tiny", out))[0]
    assert code == 0, err
    scored = read(out, SCORED)
    assert scored["identity"]["model"] == {"hub_id": "alice/tiny", "commit": weights.head()}
    assert scored["tokenizer"]["name"] == "alice/tiny"
    assert scored["tokenizer"]["commit"] == weights.head()
    for repo in (weights, hub.repo("alice/words")):
        repo.change(private=False, gated="manual")
    for answer, kind in zip(
        run(hub, tmp_path / "c", *private, token=READER), ("datasets/", "datasets/", ""), strict=True
    ):
        name = "alice/words" if kind else "alice/tiny"
        refused(answer, "restricted (gated)", f"accept its terms on {hub.url}/{kind}{name}")
    missing = ["score", "alice/words", "--model", "alice/nothing", "--out", str(tmp_path / "no")]
    refused(run(hub, tmp_path / "d", missing)[0], "no such model", "check the id")


def test_revisions_and_streams_are_of_the_hub(model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from entrodrop_prep import cli

    (tmp_path / "rows.jsonl").write_text('{"text": "w7 w9"}\n')
    for option in (["--source-revision", "main"], ["--revision", "main"], ["--stream"]):
        command = [
            "score",
            str(tmp_path / "rows.jsonl"),
            "--model",
            str(model),
            "--out",
            str(tmp_path / "out"),
            *option,
        ]
        assert cli.run(command) == 2
        assert "has no use with files" in capfd.readouterr().err
