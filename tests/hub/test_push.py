"""``entrodrop push`` against a Hub on this machine, by the real clients in processes of their own."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from entrodrop_prep import MaterializeConfig, materialize
from entrodrop_prep.cli.results import RESULTS
from helpers.hub import READER, WRITER, Fault, Hub
from helpers.pushes import (
    FAST,
    ROOT,
    commits_of,
    fails,
    front_of,
    holds,
    loaded,
    local_rows,
    masked_directory,
    parquet_paths,
    push,
    put_rows,
    start,
    written,
)
from helpers.scored import copy, some_rows, write_scored
from helpers.warm import CLIENT

pytestmark = pytest.mark.network

FOREIGN = {"notes.txt": b"mine", "epoch_000/notes.txt": b"mine too", "other/train-0.parquet": put_rows(1)}


@pytest.fixture(scope="module")
def masked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return masked_directory(tmp_path_factory.mktemp("data"))


# --- the whole way


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """4 epochs with a shard of more than 1 MB in each."""
    folder = tmp_path_factory.mktemp("large")
    scored = write_scored(folder / "scored", some_rows(1_500, lengths=(180, 240)), rows_per_shard=1_500)
    settings = {"epochs": 4, "rows_per_shard": 1_600, "compression": "none", "shuffle": "once"}
    materialize(MaterializeConfig(scored=str(scored), out=str(folder / "masked"), **settings))
    sizes = [p.stat().st_size for p in (folder / "masked").glob("epoch_*/*.parquet")]
    assert sum(size > 1_000_000 for size in sizes) >= 4
    assert len(sizes) >= 8
    return folder / "masked"


COMPARED = """
import sys
import pyarrow as pa, pyarrow.parquet as pq
from datasets import load_dataset
local = pa.concat_tables([pq.read_table(f) for f in sys.argv[1:]])
whole = load_dataset("alice/data", "epoch_002", split="train").with_format("arrow")
streamed = load_dataset("alice/data", "epoch_002", split="train", streaming=True).with_format("arrow")
for found in (whole[:], pa.concat_tables(list(streamed.iter(batch_size=500)))):
    assert found.column_names == ["input_ids", "attention_mask", "labels"]
    for name in found.column_names:
        assert found[name].combine_chunks().flatten().equals(local[name].combine_chunks().flatten()), name
        assert found[name].combine_chunks().offsets.equals(local[name].combine_chunks().offsets), name
print(len(local))
"""


@pytest.mark.parametrize("xet", [False, True], ids=["lfs", "xet"])
def test_large_shards_go_up_once_and_load_back(large: Path, tmp_path: Path, xet: bool) -> None:
    total = sum(p.stat().st_size for p in large.glob("epoch_*/*.parquet"))
    with Hub(tmp_path / "hub", part_bytes=None if xet else 400_000) as hub:
        done = push(hub, tmp_path / "home", str(large), "alice/data", "--tag", "v1", xet=xet)
        assert done.returncode == 0, done.stderr
        assert holds(hub, "alice/data", large)
        if xet:
            assert hub.count("lfs-batch") == 0
            assert hub.uploaded() < 0.8 * total  # the ids of each epoch are the same: their chunks are kept once
        else:
            assert hub.count("lfs-part", 200) > 12
            assert hub.uploaded() == total
        assert hub.repo("alice/data").meta["tags"] == {"v1": hub.repo("alice/data").head()}
        before = hub.uploaded()
        again = push(hub, tmp_path / "home", str(large), "alice/data", "--tag", "v1", "--json", xet=xet)
        assert again.returncode == 0, again.stderr
        assert "already there" in again.stderr
        found = json.loads(again.stdout)
        assert found.keys() == {"command", *RESULTS["push"]}
        assert (found["already_there"], found["commit"]) == (True, hub.repo("alice/data").head())
        assert hub.uploaded() == before
        assert hub.count("commit") == 1
        files = [str(p) for p in sorted((large / "epoch_002").glob("*.parquet"))]
        command, environment = [sys.executable, "-c", COMPARED, *files], hub.environment(tmp_path / "fresh", xet=xet)
        fresh = CLIENT.run(command, env=environment, capture_output=True, text=True)
        assert fresh.returncode == 0, fresh.stderr
        assert int(fresh.stdout) == json.loads((large / "manifest.json").read_bytes())["epochs"][2]["rows"]


# --- what is committed, and what is left alone


def test_the_rest_of_a_repository_stays_as_it_is(masked: Path, hub: Hub, tmp_path: Path) -> None:
    """Files of others stay; shards that are no longer made go, in the same commit; the card keeps what it said."""
    card = b"---\nlicense: cc-by-4.0\nmy_key: 1\n---\n\n# My data\n\nWords of mine.\n"
    stale = {f"epoch_000/train-0000{n}-of-00009.parquet": put_rows(n) for n in range(2)}
    stale |= {"epoch_007/train-00000-of-00001.parquet": put_rows(7)}
    before = {"schema": "masked/1", "files": [{"file": path} for path in stale]}
    earlier = {**stale, "manifest.json": json.dumps(before).encode()}
    repo = hub.create("alice/data", files={**FOREIGN, **earlier, "README.md": card})
    done = push(hub, tmp_path / "home", str(masked), "alice/data", "--commit-message", "masked dataset, mine")
    assert done.returncode == 0, done.stderr
    assert "licence" not in done.stderr
    assert len(commits_of(hub, "alice/data")) == 1
    assert repo.log()[0]["title"] == "masked dataset, mine"
    assert {path: repo.read(path) for path in FOREIGN} == FOREIGN
    files = repo.files()
    assert not set(stale) & set(files)
    assert {p for p in files if p.endswith(".parquet")} == parquet_paths(masked) | {"other/train-0.parquet"}
    front = front_of(repo.read("README.md"))
    assert (front["license"], front["my_key"]) == ("cc-by-4.0", 1)
    assert [c["config_name"] for c in front["configs"]] == ["all", *(f"epoch_00{n}" for n in range(4))]
    assert b"Words of mine." in repo.read("README.md")
    assert loaded(hub, tmp_path / "fresh", "alice/data", "epoch_001", streaming=False) == local_rows(
        masked / "epoch_001"
    )


def test_only_what_is_the_datasets_own_goes_up(masked: Path, hub: Hub, tmp_path: Path) -> None:
    """No note for continuing, no lock, no leftovers, no other layouts of the same rows."""
    copied = copy(masked, tmp_path / "masked")
    (copied / ".lock").touch()
    (copied / "jsonl").mkdir()
    (copied / "jsonl" / "epoch_000.jsonl").write_text("{}\n")
    (copied / "epoch_000" / ".tmp-train-9.parquet.part").write_bytes(b"half")
    (copied / ".state.json").write_text("{}")
    assert push(hub, tmp_path / "home", str(copied), "alice/data").returncode == 0
    assert set(hub.repo("alice/data").files()) == {
        *parquet_paths(masked),
        *(".gitattributes", "README.md", "entropy.svg", "manifest.json"),
    }


def test_another_recipe_replaces_the_first(hub: Hub, tmp_path: Path) -> None:
    first, second = (masked_directory(tmp_path / n, epochs=e, seed=s) for n, e, s in (("a", 4, 0), ("b", 2, 1)))
    assert push(hub, tmp_path / "home", str(first), "alice/data").returncode == 0
    assert push(hub, tmp_path / "home", str(second), "alice/data").returncode == 0
    assert holds(hub, "alice/data", second)
    assert len(commits_of(hub, "alice/data")) == 2
    configs = front_of(hub.repo("alice/data").read("README.md"))["configs"]
    assert [c["config_name"] for c in configs] == ["all", "epoch_000", "epoch_001"]


def test_scores_beside_their_masks(masked: Path, hub: Hub, tmp_path: Path) -> None:
    scored = masked.parent / "scored"
    done = push(hub, tmp_path / "home", str(masked), "alice/data", "--include-scored", str(scored))
    assert done.returncode == 0, done.stderr
    repo = hub.repo("alice/data")
    for path in ("manifest.json", "unigram.npy", "shard-00000.parquet", "tokenizer/tokenizer.json"):
        assert repo.read(f"scored/{path}") == (scored / path).read_bytes()
    other = write_scored(tmp_path / "other", some_rows(30, seed=1))
    fails(push(hub, tmp_path / "home", str(masked), "alice/data", "--include-scored", str(other)), "content digests")
    fails(push(hub, tmp_path / "home", str(scored), "alice/x", "--include-scored", str(scored)), "masked directory")


def test_a_scored_directory_with_its_recipe(masked: Path, hub: Hub, tmp_path: Path) -> None:
    scored, recipe = masked.parent / "scored", tmp_path / "mine.yaml"
    recipe.write_text("epochs: 3\nquantile: 0.3\n")
    done = push(hub, tmp_path / "home", str(scored), "alice/scores", "--recipe", str(recipe), "--license", "mit")
    assert done.returncode == 0, done.stderr
    repo = hub.repo("alice/scores")
    assert repo.read("recipe.yaml") == recipe.read_bytes()
    assert repo.read("shard-00001.parquet") == (scored / "shard-00001.parquet").read_bytes()
    assert front_of(repo.read("README.md"))["license"] == "mit"
    assert not (scored / "README.md").exists()
    fails(push(hub, tmp_path / "home", str(masked), "alice/scores"), "holds a scored dataset")
    fails(push(hub, tmp_path / "home", str(masked), "alice/x", "--recipe", str(recipe)), "scored directory")
    recipe.write_text("epoks: 3\n")
    fails(push(hub, tmp_path / "home", str(scored), "alice/scores", "--recipe", str(recipe)), "epoks")


def test_a_branch_of_its_own(masked: Path, hub: Hub, tmp_path: Path) -> None:
    repo = hub.create("alice/data", files=FOREIGN)
    head = repo.head()
    done = push(hub, tmp_path / "home", str(masked), "alice/data", "--branch", "try/1", "--tag", "v1")
    assert done.returncode == 0, done.stderr
    assert repo.head() == head
    assert repo.meta["tags"] == {"v1": repo.head("try/1")}
    assert parquet_paths(masked) <= set(repo.files("try/1"))
    fails(push(hub, tmp_path / "home", str(masked), "alice/data", "--tag", "v1"), "tag v1", "--tag")
    assert repo.head() == head


def test_materialize_pushes_what_it_wrote(masked: Path, hub: Hub, tmp_path: Path) -> None:
    scored = str(masked.parent / "scored")
    command = ["materialize", scored, "--out", str(tmp_path / "out"), "--epochs", "2", "--push-to-hub", "alice/data"]
    process = start(hub, tmp_path / "home", *command)
    out, err = process.communicate()
    assert process.returncode == 0, err
    assert 'load_dataset("alice/data", "epoch_00' in out
    assert hub.repo("alice/data").private
    assert holds(hub, "alice/data", tmp_path / "out")
    refused = [*command[:3], str(tmp_path / "never"), *command[4:-1], "bob/data"]
    process = start(hub, tmp_path / "home", *refused)
    out, err = process.communicate()
    fails(subprocess.CompletedProcess(refused, process.returncode, out, err), "403", "bob/data")
    assert not (tmp_path / "never").exists()


# --- visibility, licence, token


def test_private_unless_told_otherwise(masked: Path, hub: Hub, tmp_path: Path) -> None:
    home = tmp_path / "home"
    assert push(hub, home, str(masked), "alice/a").returncode == 0
    assert hub.repo("alice/a").private
    fails(push(hub, home, str(masked), "alice/b", "--public"), "--license")
    assert hub.count("whoami") == 1
    assert push(hub, home, str(masked), "alice/b", "--public", "--license", "mit").returncode == 0
    assert not hub.repo("alice/b").private
    assert front_of(hub.repo("alice/b").read("README.md"))["license"] == "mit"
    fails(push(hub, home, str(masked), "alice/a", "--public", "--license", "mit"), "is private", "--private")
    fails(push(hub, home, str(masked), "alice/b"), "is public", "--public")
    assert hub.repo("alice/a").private
    assert not hub.repo("alice/b").private
    assert len(commits_of(hub, "alice/a")) == 1


def test_an_unknown_licence_is_said(masked: Path, hub: Hub, tmp_path: Path) -> None:
    done = push(hub, tmp_path / "home", str(masked), "alice/a")
    assert "warning: the licence of the data is not known" in done.stderr
    copied = copy(masked, tmp_path / "masked")
    card = (copied / "README.md").read_text()
    (copied / "README.md").write_text(card.replace("---\n", "---\nlicense: mit\n", 1))
    done = push(hub, tmp_path / "home", str(copied), "alice/b", "--public")
    assert done.returncode == 0, done.stderr
    assert "licence" not in done.stderr


@pytest.mark.parametrize("way", ["environment", "login", "stdin"])
def test_the_token_is_never_written(way: str, masked: Path, hub: Hub, tmp_path: Path) -> None:
    """Nor shown, in a run that fails after the Hub repeated it in its answer; files with binary content included."""
    home, out = tmp_path / "home", copy(masked, tmp_path / "masked")
    more: dict[str, Any] = {"token": WRITER if way == "environment" else None}
    if way == "login":
        home.mkdir()
        (home / "token").write_text(WRITER)
    hub.faults += [Fault("commit", "400", times=9, message=f"no, {WRITER}"), Fault("preupload", "500")]
    extra = ["--token-stdin"] if way == "stdin" else []
    done = push(hub, home, str(out), "alice/data", *extra, stdin=WRITER + "\n" if way == "stdin" else None, **more)
    fails(done, "[token]")
    assert hub.count("commit", 400) == 1
    assert WRITER not in done.stdout + done.stderr
    files = written(home, out, tmp_path / "hub")
    assert len(files) > 20
    named = [name for name, data in files.items() if WRITER.encode() in data]
    assert named == ([str(home / "token")] if way == "login" else [])
    hub.forget()
    done = push(hub, home, str(out), "alice/data", *extra, stdin=WRITER + "\n" if way == "stdin" else None, **more)
    assert done.returncode == 0, done.stderr
    files = written(home, out, tmp_path / "hub")
    assert [name for name, data in files.items() if WRITER.encode() in data] == named


def test_without_a_token_nothing_is_asked(masked: Path, hub: Hub, tmp_path: Path) -> None:
    fails(push(hub, tmp_path / "home", str(masked), "alice/a", token=None), "hf auth login", "HF_TOKEN")
    fails(push(hub, tmp_path / "home", str(masked), "alice/a", "--token-stdin", stdin="\n"), "stdin is empty")
    assert hub.calls == []


# --- refusals


@pytest.mark.parametrize(
    ("token", "repo", "words"),
    [
        ("hf_wrong", "alice/a", ("401", "hf auth login")),
        (READER, "bob/a", ("may only read",)),
        (WRITER, "bob/a", ("403", "rights", "one of your own")),
    ],
)
def test_who_may_not_push_is_told(
    token: str, repo: str, words: tuple[str, ...], masked: Path, hub: Hub, tmp_path: Path
) -> None:
    fails(push(hub, tmp_path / "home", str(masked), repo, token=token), *words, "nothing was changed")
    assert hub.count("create-repo", 200) == 0


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (Fault("commit", "403", message="storage limit reached"), ("403 storage limit", "token that may write")),
        (Fault("commit", "404", code="RepoNotFound"), ("404", "check the name")),
        (Fault("commit", "413"), ("too large", "--rows-per-shard")),
        (Fault("commit", "409", times=9), ("another change", "push again")),
        (Fault("commit", "412", times=9), ("others keep committing", "--branch")),
        (Fault("commit", "429", times=9, retry_after=0), ("limits how often", "push again")),
        (Fault("commit", "429", retry_after=5_000), ("limits how often", "in 5000 s")),
        (Fault("commit", "503", times=9), ("failure of its own", "push again")),
        (Fault("commit", "reset", times=9), ("cannot be reached", "HF_ENDPOINT")),
        (Fault("validate-yaml", "400", message="no such licence"), ("refuses the card", "no such licence", "---")),
        (Fault("lfs-verify", "422", times=99), ("422", "sends only the rest")),
    ],
    ids=lambda value: f"{value.call}-{value.kind}" if isinstance(value, Fault) else "",
)
def test_a_refusal_says_what_happened_what_is_kept_and_what_to_do(
    fault: Fault, words: tuple[str, ...], masked: Path, hub: Hub, tmp_path: Path
) -> None:
    hub.faults.append(fault)
    done = push(hub, tmp_path / "home", str(masked), "alice/data", "--retries", "2")
    fails(done, *words, "kept" if fault.call != "validate-yaml" else "nothing was committed")
    assert commits_of(hub, "alice/data") == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["alice/../x"], ("no name of a repository",)),
        (["alice/a", "--license", "My Own"], ("no identifier",)),
        (["alice/a", "--tag", "a b"], ("--tag",)),
        (["alice/a", "--commit-message", " "], ("--commit-message",)),
        (["alice/a", "--timeout", "0"], ("--timeout",)),
    ],
)
def test_wrong_options_stop_before_anything(
    arguments: list[str], words: tuple[str, ...], masked: Path, hub: Hub, tmp_path: Path
) -> None:
    fails(push(hub, tmp_path / "home", str(masked), *arguments), *words)
    assert hub.calls == []


def test_a_directory_that_does_not_hold_is_not_pushed(masked: Path, hub: Hub, tmp_path: Path) -> None:
    copied = copy(masked, tmp_path / "masked")
    next(copied.glob("epoch_001/*.parquet")).unlink()
    fails(push(hub, tmp_path / "home", str(copied), "alice/a"), "missing")
    assert hub.calls == []


def test_a_dataset_that_comes_back_different_is_not_tagged(masked: Path, hub: Hub, tmp_path: Path) -> None:
    """Between the commit and the check every epoch becomes the first one."""

    def spoil() -> None:
        repo = hub.repo("alice/data")
        path = repo.folder / "commits" / f"{repo.head()}.json"
        commit = json.loads(path.read_bytes())
        files = commit["files"]
        for name in files:
            if name.startswith("epoch_"):
                files[name] = files["epoch_000" + name[len("epoch_000") :]]
        path.write_text(json.dumps(commit))

    hub.faults.append(Fault("resolve", "before", do=spoil))
    done = push(hub, tmp_path / "home", str(masked), "alice/data", "--tag", "v1")
    fails(done, "loaded back, rows 0 to", "the tag was not set")
    assert hub.repo("alice/data").meta["tags"] == {}


def test_ctrl_c_says_how_to_go_on(masked: Path, hub: Hub, tmp_path: Path) -> None:
    hub.faults.append(Fault("lfs-put", "stall", times=99, seconds=5))
    process = start(hub, tmp_path / "home", "push", str(masked), "alice/data", *FAST)
    until = time.monotonic() + 60
    while not hub.count("lfs-batch") and time.monotonic() < until:
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGINT)
    _, err = process.communicate()
    assert process.returncode == 130, err
    assert re.search(r"^interrupted: ", err, re.MULTILINE)
    assert "Traceback" not in err


def test_the_commands_of_the_page_run(masked: Path, hub: Hub, tmp_path: Path) -> None:
    """Those of docs/hub.md, one after the other, in a folder that holds what they name."""
    folder, programs = tmp_path / "folder", tmp_path / "programs"
    for path in (folder, programs):
        path.mkdir()
    for name in ("masked", "scored"):
        copy(masked.parent / name, folder / name)
    (folder / "token.txt").write_text(WRITER + "\n")
    (folder / "recipe.yaml").write_text("epochs: 4\n")
    CLIENT.program(programs / "entrodrop", "-m", "entrodrop_prep")
    environment = {**hub.environment(tmp_path / "home"), "PYTHONPATH": str(ROOT)}
    environment["PATH"] = f"{programs}{os.pathsep}{environment['PATH']}"
    page = (ROOT / "docs" / "hub.md").read_text(encoding="utf-8")
    commands = re.findall(r"^\$ (.*)$", "".join(re.findall(r"<!-- run -->\n```console\n(.*?)```", page, re.S)), re.M)
    assert len(commands) >= 3
    for command in commands:
        done = subprocess.run(["bash", "-c", command], cwd=folder, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{command}: {done.stderr}"
        assert "load_dataset(" in done.stdout
    assert set(hub.repo("alice/masked").meta["tags"]) == {"v1"}
    assert "recipe.yaml" in hub.repo("alice/scores").files()
