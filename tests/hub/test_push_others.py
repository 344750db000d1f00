"""What a push leaves alone in a repository, what of its own it takes away, and what stops it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from entrodrop_prep import MaterializeConfig, materialize
from helpers.hub import Fault, Hub
from helpers.pushes import (
    changed,
    commits_of,
    fails,
    front_of,
    holds,
    masked_directory,
    push,
    put_rows,
    start,
)
from helpers.scored import copy, some_rows, write_scored

pytestmark = pytest.mark.network


def verified(hub: Hub, home: Path, *arguments: str) -> tuple[int, str]:
    process = start(hub, home, "verify", *arguments)
    out, err = process.communicate()
    return process.returncode, out + err


# --- files of others


def test_folders_that_are_not_filled_are_not_ours(masked: Path, hub: Hub, tmp_path: Path) -> None:
    foreign = {
        "validation/validation-00000-of-00001.parquet": put_rows(1),
        "plain/train-mine.parquet": put_rows(2),
        "scored/shard-00000.parquet": put_rows(3),
        "shard-00000.parquet": put_rows(4),
    }
    repo = hub.create("alice/data", files=foreign)
    done = push(hub, tmp_path / "home", str(masked), "alice/data")
    assert done.returncode == 0, done.stderr
    assert {path: repo.read(path) for path in foreign} == foreign
    assert verified(hub, tmp_path / "home", "alice/data")[0] == 0


@pytest.mark.parametrize(
    ("kind", "foreign", "words"),
    [
        ("masked", {"manifest.json": b'{"mine": 1}\n'}, ("manifest.json", "rename it there")),
        ("masked", {"manifest.json": b"no JSON"}, ("manifest.json",)),
        ("masked", {"scored/manifest.json": b"[]"}, ("scored/manifest.json",)),
        ("masked", {"epoch_007/train-0.parquet": put_rows(1)}, ("epoch_007/train-0.parquet", "somebody else")),
        ("scored", {"shard-abc.parquet": put_rows(1)}, ("shard-abc.parquet", "somebody else")),
        ("masked", {"README.md": b"---\nconfigs:\n- config_name: all\n  data_files: x/*\n---\n"}, ("named all",)),
        ("scored", {"README.md": b"---\nconfigs:\n- config_name: scored\n  data_files: x/*\n---\n"}, ("named scored",)),
    ],
)
def test_what_would_be_lost_stops_the_push(
    kind: str, foreign: dict[str, bytes], words: tuple[str, ...], masked: Path, hub: Hub, tmp_path: Path
) -> None:
    repo = hub.create("alice/data", files=foreign)
    head = repo.head()
    fails(push(hub, tmp_path / "home", str(masked.parent / kind), "alice/data"), *words, "nothing was changed")
    assert repo.head() == head


def test_what_a_manifest_of_ours_lists_goes(masked: Path, hub: Hub, tmp_path: Path) -> None:
    """Of a scored directory too: a template of another tokenizer would be taken for this one's."""
    rows = some_rows(60, seed=3)
    first = write_scored(tmp_path / "first", rows, rows_per_shard=10)
    repo = hub.create("alice/scores", files={"notes.txt": b"mine", "tokenizer/chat_template.jinja": b"OLD"})
    assert push(hub, tmp_path / "home", str(first), "alice/scores").returncode == 0
    assert "shard-00005.parquet" in repo.files()
    done = push(hub, tmp_path / "home", str(masked.parent / "scored"), "alice/scores")
    assert done.returncode == 0, done.stderr
    listed = {e["file"] for e in json.loads((masked.parent / "scored" / "manifest.json").read_bytes())["files"]}
    assert set(repo.files()) - listed == {".gitattributes", "README.md", "manifest.json", "notes.txt"}
    assert len(commits_of(hub, "alice/scores")) == 2


def test_scores_of_other_masks_go(masked: Path, hub: Hub, tmp_path: Path) -> None:
    """Those of the same masks stay; afterwards the published dataset holds."""
    home, scored = tmp_path / "home", str(masked.parent / "scored")
    other = masked_directory(tmp_path / "other", rows=30, epochs=2)
    assert push(hub, home, str(masked), "alice/data", "--include-scored", scored).returncode == 0
    repo = hub.repo("alice/data")
    files = set(repo.files())
    assert push(hub, home, str(masked), "alice/data", "--license", "mit").returncode == 0
    assert set(repo.files()) == files
    repo.put({"scored/notes.txt": b"mine"})
    done = push(hub, home, str(other), "alice/data")
    assert done.returncode == 0, done.stderr
    assert {path for path in repo.files() if path.startswith("scored/")} == {"scored/notes.txt"}
    code, said = verified(hub, home, "alice/data")
    assert code == 0, said


def test_the_kind_is_read_from_the_manifest(masked: Path, hub: Hub, tmp_path: Path) -> None:
    """A masked dataset of later epochs only is one too."""
    scored = str(masked.parent / "scored")
    materialize(MaterializeConfig(scored=scored, out=str(tmp_path / "late"), epochs=4, only_epochs="2-3"))
    assert push(hub, tmp_path / "home", str(tmp_path / "late"), "alice/data").returncode == 0
    head = hub.repo("alice/data").head()
    fails(push(hub, tmp_path / "home", scored, "alice/data"), "holds a masked dataset")
    assert hub.repo("alice/data").head() == head


def test_a_file_that_a_gitignore_keeps_out_is_said(
    masked: Path, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ignore(body: dict[str, Any]) -> None:
        for file in body["files"]:
            file["shouldIgnore"] = file["path"] == "manifest.json"

    changed(monkeypatch, "preupload", ignore)
    fails(push(hub, tmp_path / "home", str(masked), "alice/data"), ".gitignore", "manifest.json", "nothing was commit")
    assert commits_of(hub, "alice/data") == []


# --- the tag


def test_a_tag_is_never_left_on_other_data(masked: Path, hub: Hub, tmp_path: Path) -> None:
    """Neither on an older push's, nor on a commit that somebody tags meanwhile; a tag at the head is no hindrance."""
    other, home = masked_directory(tmp_path / "other", rows=40, epochs=2, seed=9), tmp_path / "home"
    assert push(hub, home, str(masked), "alice/data", "--tag", "v1").returncode == 0
    repo = hub.repo("alice/data")
    head = repo.head()
    hub.forget()
    fails(push(hub, home, str(other), "alice/data", "--tag", "v1"), "the tag v1", head, "choose another --tag")
    assert (repo.head(), repo.meta["tags"], hub.uploaded()) == (head, {"v1": head}, 0)
    assert push(hub, home, str(masked), "alice/data", "--tag", "v1").returncode == 0
    assert push(hub, home, str(masked), "alice/data", "--tag", "v1b").returncode == 0
    hub.faults.append(Fault("tag", "before", do=lambda: repo.change(tags={**repo.meta["tags"], "v2": head})))
    fails(push(hub, home, str(other), "alice/data", "--tag", "v2"), f"the tag v2 is on {head}", "loaded back")
    assert repo.meta["tags"] == {"v1": head, "v1b": head, "v2": head}
    assert holds(hub, "alice/data", other)


def test_the_tag_is_looked_at_before_a_branch_is_made(masked: Path, hub: Hub, tmp_path: Path) -> None:
    repo = hub.create("alice/data", files={"x.txt": b"1"})
    repo.change(tags={"v1": repo.head()})
    repo.put({"y.txt": b"2"})
    done = push(hub, tmp_path / "home", str(masked), "alice/data", "--branch", "new", "--tag", "v1")
    fails(done, "the tag v1", "nothing was changed")
    assert set(repo.meta["branches"]) == {"main"}


def test_a_commit_behind_ours_is_taken_if_it_has_all_of_it(masked: Path, hub: Hub, tmp_path: Path) -> None:
    """As docs/hub.md says: the answer to ours was lost, and somebody else committed at once."""
    hub.faults.append(Fault("commit", "lost", do=lambda: hub.repo("alice/data").put({"their.txt": b"x"})))
    done = push(hub, tmp_path / "home", str(masked), "alice/data", "--tag", "v1")
    assert done.returncode == 0, done.stderr
    repo = hub.repo("alice/data")
    assert len(commits_of(hub, "alice/data")) == 1
    assert repo.meta["tags"] == {"v1": repo.head()}
    assert holds(hub, "alice/data", masked)


# --- the card


def test_the_card_is_renewed_from_the_manifest(masked: Path, hub: Hub, tmp_path: Path) -> None:
    """Counts that were edited, front matter or a whole README that is gone, do not go up so; the directory stays."""
    for name, edit in {
        "gone": None,
        "bare": lambda card: "# My data\n\nno front matter\n",
        "wrong": lambda card: card.replace("num_examples: ", "num_examples: 9"),
    }.items():
        copied = copy(masked, tmp_path / name)
        readme = copied / "README.md"
        if edit is None:
            readme.unlink()
        else:
            readme.write_text(edit(readme.read_text()))
        before = readme.read_text() if edit else None
        done = push(hub, tmp_path / "home", str(copied), f"alice/{name}")
        assert done.returncode == 0, done.stderr
        assert (readme.read_text() if edit else None) == before
        card = hub.repo(f"alice/{name}").read("README.md")
        assert front_of(card)["dataset_info"] == front_of((masked / "README.md").read_bytes())["dataset_info"]
        assert f'load_dataset("alice/{name}", "epoch_000"'.encode() in card
        assert f"entrodrop verify alice/{name} ".encode() in card
        assert b"path/or/repo" not in card
        assert (b"no front matter" in card) == (name == "bare")


def test_pictures_by_any_path(masked: Path, hub: Hub, tmp_path: Path) -> None:
    copied = copy(masked, tmp_path / "masked")
    for name in ("a.png", "b.png"):
        (copied / name).write_bytes(b"\x89PNG\0" + name.encode())
    (tmp_path / "c.png").write_bytes(b"\x89PNG\0")
    (copied / "img").mkdir()
    with (copied / "README.md").open("a") as f:
        f.write("\n![a](./a.png) ![b](img/../b.png) ![c](../c.png) ![c](..)\n")
    done = push(hub, tmp_path / "home", str(copied), "alice/data")
    assert done.returncode == 0, done.stderr
    assert {p for p in hub.repo("alice/data").files() if p.endswith(".png")} == {"a.png", "b.png"}
    again = push(hub, tmp_path / "home", str(copied), "alice/data")
    assert "already there" in again.stdout


def test_a_scored_directory_has_a_whole_card(masked: Path, hub: Hub, tmp_path: Path) -> None:
    scored, home = masked.parent / "scored", tmp_path / "home"
    described = json.loads((scored / "manifest.json").read_bytes())
    done = push(hub, home, str(scored), "alice/scores")
    assert done.returncode == 0, done.stderr
    card = hub.repo("alice/scores").read("README.md")
    front = front_of(card)
    [info], [config] = front["dataset_info"], front["configs"]
    assert (info["config_name"], config["config_name"], config["default"]) == ("scored", "scored", True)
    assert {"name": "entropy", "list": "float32"} in info["features"]
    assert info["splits"][0]["num_examples"] == sum(e["rows"] for e in described["files"] if "rows" in e)
    assert front["size_categories"] == ["n<1K"]
    assert "entrodrop" in front["tags"]
    for said in (described["model"]["name"], 'MaskedRows.from_hub("alice/scores", epochs=4)', "verify alice/scores"):
        assert said.encode() in card
    assert "already there" in push(hub, home, str(scored), "alice/scores").stdout
