"""What goes wrong on the way of a push: one line says what it was, without the token, after tries that may help."""

from __future__ import annotations

import io
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import httpx
import pytest
from huggingface_hub.errors import HfHubHTTPError

from entrodrop_prep.errors import ConfigError, HubError
from entrodrop_prep.hub.retry import Failure, Retry, StoreError, read
from entrodrop_prep.publish import check, local
from entrodrop_prep.publish.client import _store_errors
from entrodrop_prep.publish.plan import LocalFile
from helpers.hub import WRITER, Fault, Hub
from helpers.pushes import ROOT, changed, commits_of, fails, push, start
from helpers.scored import copy

pytestmark = pytest.mark.network

CARD = b"---\nlicense: mit\n---\n# Mine\n\nWords of mine.\n"


# --- reading the card that is there


@pytest.mark.parametrize("kind", ["522", "reset"])
def test_a_card_that_cannot_be_read_once_is_read_again(kind: str, masked: Path, hub: Hub, tmp_path: Path) -> None:
    repo = hub.create("alice/data", files={"README.md": CARD})
    hub.faults.append(Fault("resolve", kind))
    done = push(hub, tmp_path / "home", str(masked), "alice/data")
    assert done.returncode == 0, done.stderr
    assert b"Words of mine." in repo.read("README.md")
    assert len(commits_of(hub, "alice/data")) == 1


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("403", ("403", "token that may write")),
        ("522", ("522", "failure of its own")),
        ("reset", ("cannot be reached",)),
    ],
)
def test_a_card_that_cannot_be_read_is_said(
    kind: str, words: tuple[str, ...], masked: Path, hub: Hub, tmp_path: Path
) -> None:
    hub.create("alice/data", files={"README.md": CARD})
    hub.faults.append(Fault("resolve", kind, times=99))
    fails(push(hub, tmp_path / "home", str(masked), "alice/data", "--retries", "1"), *words, "nothing was committed")
    assert commits_of(hub, "alice/data") == []


# --- the token


@pytest.mark.parametrize("call", ["whoami", "tree", "commit"])
def test_the_token_is_in_no_line_of_the_log(call: str, masked: Path, hub: Hub, tmp_path: Path) -> None:
    hub.faults.append(Fault(call, "503", times=1 if call != "commit" else 9, message=f"no, {WRITER}", retry_after=0))
    done = push(hub, tmp_path / "home", str(masked), "alice/data", "--retries", "1")
    assert done.returncode == (2 if call == "commit" else 0), done.stderr
    assert WRITER not in done.stdout + done.stderr
    assert ("[token]" in done.stderr) == (call != "tree")  # which the library tries again itself


def test_the_token_is_in_nothing_that_is_raised() -> None:
    def call() -> None:
        raise ConnectionError(f"not for {WRITER}")

    def explain(failure: Failure) -> HubError:
        return HubError(failure.said)

    retry = Retry(0, 0.0, WRITER)
    with pytest.raises(HubError) as caught:
        retry("asking", call, explain)
    error: BaseException | None = caught.value
    said = repr(retry)
    while error is not None:
        said += str(error)
        error = error.__cause__ or error.__context__
    assert "not for [token]" in said
    assert WRITER not in said


# --- the store for large files


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("401", ("does not accept the token",)),
        ("403", ("may not do this",)),
        ("404", ("does not find it",)),
    ],
)
def test_a_refusal_over_xet_is_told_and_not_tried_again(
    kind: str, words: tuple[str, ...], masked: Path, hub: Hub, tmp_path: Path
) -> None:
    hub.faults.append(Fault("xet-token", kind, times=99))
    done = push(hub, tmp_path / "home", str(masked), "alice/data", "--retries", "3", xet=True)
    fails(done, kind, *words, "sends only the rest")
    assert hub.count("xet-token") == 1


def test_what_the_store_raises_has_its_status() -> None:
    import hf_xet

    for error, status in (
        (
            RuntimeError("Network error: Request error: HTTP status client error (429 Too Many Requests), domain: x"),
            429,
        ),
        (RuntimeError("HTTP status server error (503 Service Unavailable)"), 503),
        (RuntimeError("error sending request"), None),
        (hf_xet.XetAuthenticationError("expired"), 401),
        (hf_xet.XetObjectNotFoundError("gone"), 404),
    ):
        with pytest.raises(StoreError) as caught, _store_errors():
            raise error
        failure = read(caught.value)
        assert failure.status == status
        assert failure.passing == (status not in (401, 404))
    with pytest.raises(PermissionError), _store_errors():
        raise PermissionError("of a file here")


def test_a_quota_is_said_once(masked: Path, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(body: dict[str, Any]) -> None:
        for told in body["objects"]:
            told.pop("actions", None)
            told["error"] = {"code": 507, "message": f"storage quota of {WRITER} exceeded"}

    changed(monkeypatch, "lfs-batch", full)
    done = push(hub, tmp_path / "home", str(masked), "alice/data")
    fails(done, "storage quota of [token] exceeded", "make room", "sends only the rest")
    assert hub.count("lfs-batch") == 1


# --- what is here


def test_a_file_that_is_gone_meanwhile_is_said(masked: Path, hub: Hub, tmp_path: Path) -> None:
    copied = copy(masked, tmp_path / "masked")
    hub.faults.append(Fault("tree", "before", do=lambda: (copied / "epoch_001").rename(copied / "moved")))
    fails(push(hub, tmp_path / "home", str(copied), "alice/data"), "epoch_001/train-00000", "is gone", "restore it")
    repo = hub.create("alice/again", files={"manifest.json": (masked / "manifest.json").read_bytes()})
    head = repo.head()
    copied = copy(masked, tmp_path / "again")
    hub.faults.append(Fault("tree", "before", do=(copied / "manifest.json").unlink))
    fails(push(hub, tmp_path / "home", str(copied), "alice/again"), "manifest.json", "missing")
    assert repo.head() == head


def test_no_source_is_said_before_a_repository_is_made(hub: Hub, tmp_path: Path) -> None:
    command = ["materialize", str(tmp_path / "nowhere"), "--out", str(tmp_path / "out"), "--epochs", "2"]
    process = start(hub, tmp_path / "home", *command, "--push-to-hub", "alice/data")
    _, err = process.communicate()
    assert process.returncode == 2
    assert "no such directory" in err
    assert hub.calls == []


def test_who_is_not_told_may_push(masked: Path, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changed(monkeypatch, "whoami", lambda body: body["auth"].update(accessToken=None))
    assert push(hub, tmp_path / "home", str(masked), "alice/data").returncode == 0


def test_an_owner_who_lets_nothing_be_public_is_told(
    masked: Path, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changed(monkeypatch, "create-repo", lambda body: hub.repo(body["name"]).change(private=True))
    done = push(hub, tmp_path / "home", str(masked), "alice/data", "--public", "--license", "mit")
    fails(done, "is private, this push is public", "it was made so just now", "--private")


@pytest.mark.parametrize("way", ["card", "option"])
def test_an_unknown_licence_is_none(way: str, masked: Path, hub: Hub, tmp_path: Path) -> None:
    copied = copy(masked, tmp_path / "masked")
    readme = copied / "README.md"
    if way == "card":
        readme.write_text(readme.read_text().replace("---\n", "---\nlicense: unknown\n", 1))
    more = ["--license", "unknown"] if way == "option" else []
    fails(push(hub, tmp_path / "home", str(copied), "alice/data", "--public", *more), "licence", "--license")
    assert hub.calls == []
    done = push(hub, tmp_path / "home", str(copied), "alice/data", *more)
    assert done.returncode == 0, done.stderr
    assert "the licence of the data is not known" in done.stderr


def test_keys_that_are_no_text_are_refused_in_words(masked: Path, hub: Hub, tmp_path: Path) -> None:
    """Dates go up; a key that is a number makes a card that no client can read."""
    copied = copy(masked, tmp_path / "masked")
    readme = copied / "README.md"
    card = readme.read_text()
    hub.create("alice/data", files={"README.md": CARD})
    readme.write_text(card.replace("---\n", "---\nreleased: 2024-01-01\n", 1))
    done = push(hub, tmp_path / "home", str(copied), "alice/data")
    assert done.returncode == 0, done.stderr
    assert b"released: 2024-01-01" in hub.repo("alice/data").read("README.md")
    readme.write_text(card.replace("---\n", "---\n1: x\n", 1))
    fails(push(hub, tmp_path / "home", str(copied), "alice/data"), "refuses the card", "nothing was committed")


def test_what_the_hub_does_not_take_is_said_before(caplog: Any) -> None:
    def files(number: int, size: int, folder: str = "epoch_000") -> dict[str, LocalFile]:
        return {f"{folder}/{n}": LocalFile(b"", size, "") for n in range(number)}

    local._check_limits(files(100, 50_000_000_000))
    assert caplog.text == ""
    local._check_limits(files(101, 1))
    assert "101 files in one commit" in caplog.text
    with pytest.raises(ConfigError, match=r"epoch_000/0 has 50 GB.*--rows-per-shard"):
        local._check_limits(files(1, 50_000_000_001))
    local._check_limits(files(10_000, 1) | files(10_000, 1, "epoch_001"))
    with pytest.raises(ConfigError, match="epoch_000 has 10,001 files"):
        local._check_limits(files(10_001, 1))


# --- loading it back


def test_a_folder_of_the_repositorys_name_proves_nothing(masked: Path, hub: Hub, tmp_path: Path) -> None:
    """``load_dataset`` prefers it: the proof is made where there is none."""
    shutil.copytree(masked, tmp_path / "cwd" / "alice" / "data")
    hub.faults.append(Fault("resolve", "404", times=99))
    arguments = ["alice/data", "alice/data", "--tag", "v1", "--retries", "0"]
    done = push(hub, tmp_path / "home", *arguments, cwd=str(tmp_path / "cwd"))
    fails(done, "cannot be loaded back", "the tag was not set")
    assert hub.repo("alice/data").meta["tags"] == {}


def test_a_check_that_is_killed_is_said(masked: Path, hub: Hub, tmp_path: Path) -> None:
    killed = threading.Event()

    def kill() -> None:
        for found in Path("/proc").glob("[0-9]*"):
            try:
                command = (found / "cmdline").read_bytes()
                environment = (found / "environ").read_bytes()
            except OSError:
                continue
            if b"entrodrop_prep.publish.check" in command and hub.url.encode() in environment:
                os.kill(int(found.name), signal.SIGKILL)
                killed.set()

    hub.faults.append(Fault("resolve", "before", do=kill))
    done = push(hub, tmp_path / "home", str(masked), "alice/data", "--tag", "v1", popen=subprocess.Popen)
    assert killed.is_set()
    fails(done, "ended by signal 9", "the tag was not set")


def test_wrong_counts_are_not_tried_again(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """Nor is anything else that ``datasets`` says of what it got."""
    from datasets.exceptions import DatasetGenerationError, NonMatchingSplitsSizesError

    for error, code in ((NonMatchingSplitsSizesError, 1), (DatasetGenerationError, 3), (ConnectionError, 3)):

        def fail(asked: Any, error: type[Exception] = error) -> None:
            raise error("said")

        monkeypatch.setattr(check, "difference", fail)
        monkeypatch.setattr(sys, "stdin", io.StringIO("{}"))
        assert check._main() == code
        assert f"{error.__name__}: said" in capsys.readouterr().err


def test_the_process_that_checks_is_cold(masked: Path, hub: Hub, tmp_path: Path) -> None:
    """No cache that the caller's environment names is used, nor filled."""
    environment = {**hub.environment(tmp_path / "home"), "PYTHONPATH": str(ROOT)}
    environment["HUGGINGFACE_HUB_CACHE"] = str(tmp_path / "cache")
    done = push(hub, tmp_path / "home", str(masked), "alice/data", env=environment, popen=subprocess.Popen)
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("asked", "seconds"),
    [
        *[("7", 7.0), ("٣", 3.0), ("Mon, 01 Jan 2001 00:00:00 GMT", 0.0)],
        *[(asked, None) for asked in ("²", "-5", "nan", "x", "Mon, 01 Jan 2001 00:00:00 +" + "9" * 30)],
        ("Mon, 01 Jan 99999 00:00:00 -0000", None),
    ],
)
def test_any_pause_that_is_asked_for_is_read(asked: str, seconds: float | None) -> None:
    answer = httpx.Response(429, headers=[(b"Retry-After", asked.encode())], request=httpx.Request("GET", "http://x"))
    assert read(HfHubHTTPError("no", response=answer)).retry_after == seconds
