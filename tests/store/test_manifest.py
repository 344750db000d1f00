"""Manifests and footers that others wrote: what they may say, which files they may name, and what is opened."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import random
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from entrodrop_prep import cli
from entrodrop_prep.config import MaterializeConfig, PushConfig, ScoreConfig
from entrodrop_prep.errors import EntrodropError, IntegrityError
from entrodrop_prep.export.materialize import materialize
from entrodrop_prep.publish.local import open_local
from entrodrop_prep.scoring.run import score
from entrodrop_prep.store import inside, manifest
from entrodrop_prep.store.manifest_schema import problem
from entrodrop_prep.store.scored import ScoredDataset
from entrodrop_prep.store.shards import read_footer
from entrodrop_prep.trainers.facts import read_facts
from entrodrop_prep.training.rows import MaskedRows
from entrodrop_prep.verification.inspect import show
from entrodrop_prep.verification.run import verify
from helpers.scored import all_bytes, copy, rewrite_footer, rewrite_manifest

MODEL = Path(cli.__file__).parents[1] / "demo" / "model"
SHARD, FILE = "shard-00001.parquet", "epoch_001/train-00000-of-00001.parquet"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows, and a scored and a masked directory of them."""
    folder = tmp_path_factory.mktemp("manifests")
    rows = [{"text": "def f(x):\n    return x\n" * n} for n in range(1, 6)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    score(scoring(folder, folder / "scored"))
    materialize(masking(folder / "scored", folder / "masked"))
    return folder


def scoring(made: Path, out: Path) -> ScoreConfig:
    source = str(made / "rows.jsonl")
    model = {"model": str(MODEL), "backend": "transformers", "dtype": "float32"}
    return ScoreConfig(source=source, out=str(out), rows_per_shard=3, **model)


def masking(scored: Path, out: Path, **more: Any) -> MaterializeConfig:
    return MaterializeConfig(**{"scored": str(scored), "out": str(out), "epochs": 2} | more)


@pytest.fixture(params=["scored", "masked"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def directory(kind: str, made: Path, tmp_path: Path) -> Path:
    return copy(made / kind, tmp_path / kind)


@pytest.fixture(autouse=True)
def _no_hang() -> Iterator[None]:
    """A pipe that is opened would block for ever."""
    signal.signal(signal.SIGALRM, lambda *_: pytest.fail("it hangs"))
    signal.alarm(120)
    yield
    signal.alarm(0)


Command = Callable[[Path, Path], object]
COMMANDS: dict[str, dict[str, Command]] = {
    "scored": {
        "verify": lambda made, d: one_of(verify(str(d)).findings),
        "inspect": lambda made, d: list(show(str(d))),
        "inspect --row": lambda made, d: list(show(str(d), 0)),
        "materialize": lambda made, d: materialize(masking(d, d.parent / "new")),
        "verify --against": lambda made, d: one_of(verify(str(made / "masked"), str(d)).findings),
        "push": lambda made, d: open_local(PushConfig(directory=str(d), repo="me/data")),
        "loader": lambda made, d: MaskedRows.open(d, epochs=1, cache_dir=d.parent / "cache"),
        "score": lambda made, d: score(scoring(made, d)),
    },
    "masked": {
        "verify": lambda made, d: one_of(verify(str(d)).findings),
        "verify --against": lambda made, d: one_of(verify(str(d), str(made / "scored")).findings),
        "inspect": lambda made, d: list(show(str(d))),
        "inspect --row": lambda made, d: list(show(str(d), 0)),
        "materialize": lambda made, d: materialize(masking(made / "scored", d)),
        "push": lambda made, d: open_local(PushConfig(directory=str(d), repo="me/data")),
        "recipe": lambda made, d: read_facts(str(d)),
        "loader": lambda made, d: MaskedRows.like(d, made / "scored", cache_dir=d.parent / "cache"),
    },
}
ONLY_THE_MANIFEST = ("loader",)
"""Of a masked directory it reads no more."""


def one_of(findings: list[str]) -> None:
    for line in findings:
        raise IntegrityError(line)


def check_refused(kind: str, made: Path, directory: Path, *words: str, without: tuple[str, ...] = ()) -> None:
    """Every command that is given the directory says so in one line, and opens and changes nothing."""
    before = all_bytes(directory, without=(".state.json",))
    for name, command in COMMANDS[kind].items():
        if name in without:
            continue
        with pytest.raises(EntrodropError) as e:
            command(made, directory)
        line = str(e.value)
        assert "\n" not in line, name
        assert all(word in line for word in words), (name, line)
        assert all_bytes(directory, without=(".state.json",)) == before, name
    assert not list((directory.parent / "new").glob("epoch_*/*"))


# What a manifest may say.


def test_manifests_of_earlier_versions_are_read() -> None:
    stored = json.loads((Path(__file__).parent / "manifests_of_0.1.0.json").read_bytes())
    assert {name: problem(described) for name, described in stored.items()} == dict.fromkeys(stored)


HOSTILE: dict[str, tuple[bytes, str]] = {
    "lists in lists": (b"[" * 100_000, "nested more than 64 deep"),
    "objects in objects": (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "nested more than 64 deep"),
    "NaN": (b'{"schema": "scored/1", "counts": NaN}', "NaN"),
    "infinite": (b'{"schema": "scored/1", "counts": 1e999}', "too large"),
    "a huge integer": (b'{"schema": "scored/1", "n": 1' + b"0" * 40 + b"}", "64 bits"),
    "more digits than Python reads": (b'{"n": ' + b"9" * 5000 + b"}", "manifest is damaged"),
    "a key twice": (b'{"schema": "scored/1", "schema": "masked/1"}', "'schema' twice"),
    "not UTF-8": (b'{"schema": "\xff\xfe"}', "manifest is damaged"),
    "UTF-16": ('{"schema": "scored/1"}'.encode("utf-16"), "manifest is damaged"),
    "a number": (b"7", "no JSON object"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_what_is_no_manifest_is_one_line(name: str, kind: str, made: Path, directory: Path) -> None:
    data, word = HOSTILE[name]
    (directory / "manifest.json").write_bytes(data)
    check_refused(kind, made, directory, "manifest.json", word)


def at(described: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    """The manifest with another value at a place such as ``files.0.bytes``."""
    *way, last = [int(p) if p.isdecimal() else p for p in path.split(".")]
    parent: Any = described
    for part in way:
        parent = parent[part]
    parent[last] = value
    return described


WRONG: dict[str, list[tuple[str, Any]]] = {
    "scored": [
        ("files.0.bytes", "6122"),
        ("files.0.rows", -1),
        ("files.0.tokens", True),
        ("files.0.sha256", "0" * 63),
        ("files.0.content_digest", None),
        ("files.0", "shard-00000.parquet"),
        ("files", {}),
        ("identity", None),
        ("identity.rows_per_shard", 0),
        ("identity.model", {}),
        ("model.vocab_size", 2**40),
        ("model.vocab_size", 2048.0),
        ("tokenizer.special_ids", [1, 0]),
        ("tokenizer.eos_id", "0"),
        ("counts.rows", 2**63),
        ("environments.0.shards", "0"),
        ("source.name", 5),
        ("source.card", {"language": "en"}),
    ],
    "masked": [
        ("epochs.0.rows", "5"),
        ("epochs.0.rate_max", 1.5),
        ("epochs.1.epoch", 0),
        ("epochs.1.folder", "epoch_000/../epoch_001"),
        ("epochs", []),
        ("recipe.target", "label"),
        ("recipe.seed", -1),
        ("recipe", []),
        ("identity.add_columns", 5),
        ("identity.pack", None),
        ("identity.scored", "x"),
        ("scored", []),
        ("scored.tokenizer.special_ids", {}),
        ("scored.identity.source", {"kind": "hub"}),
        ("tau_nats", [1.0]),
        ("entropy_histogram.counts", [1] * 129),
        ("plain", None),
        ("derived", 1),
        ("derived", [{"layout": "jsonl", "file": "all/train-00000-of-00001.parquet", "bytes": 1, "sha256": "0" * 64}]),
    ],
}


@pytest.mark.parametrize(("kind", "path", "value"), [(k, p, v) for k, wrong in WRONG.items() for p, v in wrong])
def test_what_a_manifest_cannot_say_is_named(kind: str, path: str, value: Any, made: Path, tmp_path: Path) -> None:
    described = json.loads((made / kind / "manifest.json").read_bytes())
    manifest.write(tmp_path, at(described, path, value))
    with pytest.raises(IntegrityError) as e:
        manifest.read(tmp_path, f"{kind}/1")
    where = path.split(".")[0]
    assert str(e.value).startswith(f"{tmp_path / 'manifest.json'}: the manifest cannot be right: ")
    assert where in str(e.value)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    ("kind", "path"),
    [
        *(("scored", path) for path in ("identity", "files.0.bytes", "counts", "model")),
        *(("masked", path) for path in ("identity", "files.0.bytes", "recipe", "epochs.0.rows")),
    ],
)
def test_wrong_types_reach_no_command(path: str, kind: str, made: Path, directory: Path) -> None:
    described = json.loads((directory / "manifest.json").read_bytes())
    manifest.write(directory, at(described, path, "x"))
    check_refused(kind, made, directory, "manifest.json: the manifest cannot be right", path.split(".")[0])


def test_more_keys_at_the_top_are_let_be(directory: Path, kind: str) -> None:
    rewrite_manifest(directory, of_a_later_version={"x": 1}, **({"derived": 1} if kind == "scored" else {}))
    assert verify(str(directory)).findings == []


# Which files it may name.

NAMES = {
    "scored": [
        "../out.parquet",
        "/dev/zero",
        "tokenizer/../../x",
        "shard-00001.parquet\n",
        "a\\b",
        "tokenizer/\x1b[2J",
    ],
    "masked": ["../masked/" + FILE, "/etc/passwd", "epoch_001/../" + FILE, "./" + FILE, "README.md", ".state.json"],
}


@pytest.mark.parametrize(("kind", "name"), [(k, n) for k, names in NAMES.items() for n in names])
def test_names_that_lead_elsewhere_are_refused(kind: str, name: str, made: Path, tmp_path: Path) -> None:
    directory = copy(made / kind, tmp_path / kind)
    (tmp_path / "out.parquet").write_bytes(b"never read")
    described = json.loads((directory / "manifest.json").read_bytes())
    for entry in described["files"]:
        if entry["file"] in (SHARD, FILE):
            entry["file"] = name
    manifest.write(directory, described)
    check_refused(kind, made, directory, "no name of a file that this program writes there")


@pytest.mark.parametrize("change", ["twice", "left out", "another number"])
def test_files_are_listed_once_and_in_order(change: str, kind: str, made: Path, directory: Path) -> None:
    described = json.loads((directory / "manifest.json").read_bytes())
    files = described["files"]
    first = 0 if kind == "scored" else next(i for i, e in enumerate(files) if e["file"] == FILE)
    if change == "twice":
        files.insert(first, files[first])
    elif change == "left out":
        del files[first]
    else:
        files[first] = {**files[first], "file": files[first]["file"].replace("-00000", "-00007")}
    manifest.write(directory, described)
    check_refused(kind, made, directory, "manifest.json: the manifest cannot be right")


# What is opened of them.


def a_link(path: Path) -> None:
    target = path.parent.parent / f"outside-{path.name}"
    path.rename(target)
    path.symlink_to(target)


def a_link_inside(path: Path) -> None:
    path.rename(path.with_name(f".moved-{path.name}"))
    path.symlink_to(f".moved-{path.name}")


def a_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def a_device(path: Path) -> None:
    path.unlink()
    os.mknod(path, 0o600 | 0o020000, os.makedev(1, 5))


@pytest.mark.parametrize("change", [a_link, a_link_inside, a_pipe, a_folder, a_device])
def test_no_link_pipe_or_device_is_opened(
    change: Callable[[Path], None], kind: str, made: Path, directory: Path
) -> None:
    name = SHARD if kind == "scored" else FILE
    try:
        change(directory / name)
    except PermissionError:
        pytest.skip("only root makes a device")
    words = {"a_link": "symbolic link", "a_link_inside": "symbolic link", "a_pipe": "named pipe", "a_folder": "folder"}
    check_refused(kind, made, directory, name, words.get(change.__name__, "device"))


def test_no_folder_may_be_a_link(kind: str, made: Path, directory: Path) -> None:
    folder = directory / ("tokenizer" if kind == "scored" else "epoch_001")
    a_link(folder)
    check_refused(kind, made, directory, folder.name, "symbolic link")


@pytest.mark.parametrize("change", [a_link, a_pipe, a_folder])
def test_nor_the_manifest_itself(change: Callable[[Path], None], kind: str, made: Path, directory: Path) -> None:
    change(directory / "manifest.json")
    check_refused(kind, made, directory, "manifest.json")


def test_a_card_that_is_a_link_is_not_pushed(directory: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("secret")
    (directory / "README.md").unlink(missing_ok=True)
    (directory / "README.md").symlink_to(tmp_path / "secret")
    with pytest.raises(IntegrityError, match=r"README\.md: it is a symbolic link"):
        open_local(PushConfig(directory=str(directory), repo="me/data"))


def test_the_directory_itself_may_be_a_link(directory: Path, kind: str, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(directory)
    assert verify(str(tmp_path / "link")).findings == []


def test_links_of_the_hubs_cache_lead_to_its_own_blobs_alone(
    directory: Path, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    repository = tmp_path / "hub" / "datasets--me--data"
    snapshot, blobs = repository / "snapshots" / "abc", repository / "blobs"
    blobs.mkdir(parents=True)
    shutil.move(directory, snapshot)
    files = [p for p in snapshot.rglob("*") if p.is_file() and not p.name.startswith(".")]
    for number, path in enumerate(files):
        path.rename(blobs / str(number))
        path.symlink_to(os.path.relpath(blobs / str(number), path.parent))
    assert verify(str(snapshot)).findings == []
    name = SHARD if kind == "scored" else FILE
    blob = (snapshot / name).resolve()
    for place in (tmp_path / "elsewhere", repository / "snapshots" / "elsewhere", tmp_path / "hub" / "elsewhere"):
        shutil.copy(blob, place)
        (snapshot / name).unlink()
        (snapshot / name).symlink_to(place)
        assert "symbolic link" in verify(str(snapshot)).findings[0]
    (snapshot / name).unlink()
    (snapshot / name).symlink_to(blob)
    blob.rename(tmp_path / "moved")
    blob.symlink_to(tmp_path / "moved")
    assert "symbolic link" in verify(str(snapshot)).findings[0]


@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO])
def test_what_cannot_be_read_is_one_line(
    number: int, kind: str, made: Path, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, real = SHARD if kind == "scored" else FILE, os.lstat

    def failing(path: Any, *arguments: Any, **more: Any) -> os.stat_result:
        if str(path) == str(directory / name):
            raise OSError(number, os.strerror(number))
        return real(path, *arguments, **more)

    monkeypatch.setattr(inside.os, "lstat", failing)
    for command in COMMANDS[kind].values():
        with pytest.raises(EntrodropError, match=f"{name}: cannot be read: {os.strerror(number)}"):
            command(made, directory)


@pytest.mark.skipif(os.geteuid() != 0, reason="root gives up its rights for a while")
@pytest.mark.parametrize("name", ["manifest.json", "file"])
def test_what_may_not_be_read_is_one_line(name: str, kind: str, made: Path, directory: Path) -> None:
    path = directory / ((SHARD if kind == "scored" else FILE) if name == "file" else name)
    path.chmod(0)
    for folder in (directory, *directory.parents):
        if folder.stat().st_uid == 0 and folder != Path("/") and "pytest" in str(folder):
            folder.chmod(0o755)
    os.seteuid(65534)
    try:
        findings = verify(str(directory)).findings
    except EntrodropError as e:
        findings = [str(e)]
    finally:
        os.seteuid(0)
    assert findings == [f"{path}: cannot be read: Permission denied; check its permissions and the disk"]


# What lies beside them.


def test_strays_are_refused(kind: str, made: Path, directory: Path) -> None:
    if kind == "scored":
        strays = [directory / "shard-00002.parquet", directory / "tokenizer" / "chat_template.jinja"]
    else:
        strays = [directory / "epoch_009", directory / "epoch_001" / "train-00001-of-00002.parquet"]
    for stray in strays:
        source = directory / (SHARD if kind == "scored" else "epoch_001")
        if stray.name == "epoch_009":
            shutil.copytree(source, stray)
        else:
            shutil.copy(directory / (SHARD if kind == "scored" else FILE), stray)
        check_refused(kind, made, directory, stray.name, "does not list", without=ONLY_THE_MANIFEST)
        shutil.rmtree(stray) if stray.is_dir() else stray.unlink()


def test_a_missing_shard_is_not_blamed_on_its_neighbour(made: Path, tmp_path: Path) -> None:
    scored = copy(made / "scored", tmp_path / "scored")
    (scored / "shard-00000.parquet").unlink()
    assert [line.split(": ")[0] for line in verify(str(scored)).findings] == [str(scored / "shard-00000.parquet")]
    described = json.loads((scored / "manifest.json").read_bytes())
    rewrite_manifest(scored, files=described["files"][1:])
    (line,) = verify(str(scored)).findings
    assert "files lists shard-00001.parquet where number 0 of the shards is to be" in line


def test_a_damaged_tokenizer_is_one_line(made: Path, tmp_path: Path) -> None:
    scored = copy(made / "scored", tmp_path / "scored")
    path = scored / "tokenizer" / "tokenizer.json"
    data = path.read_bytes()
    for damaged in (data[:-1000] + b" " * 1000, b"{}" + b" " * (len(data) - 2)):
        path.write_bytes(damaged)
        with pytest.raises(IntegrityError, match="its bytes are not those"):
            list(show(str(scored), 0))
        described = json.loads((scored / "manifest.json").read_bytes())
        for entry in described["files"]:
            if entry["file"] == "tokenizer/tokenizer.json":
                entry["sha256"] = hashlib.sha256(damaged).hexdigest()
        manifest.write(scored, described)
        with pytest.raises(EntrodropError, match="cannot load the tokenizer"):
            list(show(str(scored), 0))
        assert "tokenizer" in verify(str(scored)).findings[0]


# Footers of unfinished directories.


def footer_places(path: Path) -> range:
    """Where in a file the footer's JSON stands."""
    data = path.read_bytes()
    text = pq.read_metadata(path).metadata[b"entrodrop"]
    first = data.index(text)
    return range(first, first + len(text))


def test_every_flipped_bit_of_a_footer_is_found(made: Path, directory: Path, kind: str) -> None:
    path, rng = directory / (SHARD if kind == "scored" else FILE), random.Random(2)
    data = path.read_bytes()
    for place in rng.sample(footer_places(path), 150):
        path.write_bytes(data[:place] + bytes([data[place] ^ 1 << rng.randrange(8)]) + data[place + 1 :])
        with pytest.raises(IntegrityError):
            read_footer(path)


def test_a_rerun_says_which_footer_is_damaged(made: Path, directory: Path, kind: str) -> None:
    """Of an unfinished directory, with and without its private note; nothing is finished over it."""
    (directory / "manifest.json").unlink()
    path = directory / (SHARD if kind == "scored" else FILE)
    data, places = path.read_bytes(), footer_places(path)
    at = data.index(b'"tokens":', places.start) + 9
    path.write_bytes(data[:at] + (b"8" if data[at : at + 1] != b"8" else b"9") + data[at + 1 :])
    command = COMMANDS[kind]["score" if kind == "scored" else "materialize"]
    for note in (True, False):
        if not note:
            (directory / ".state.json").unlink(missing_ok=True)
        with pytest.raises(IntegrityError, match=f"{path.name}: its footer is damaged: .*; remove it and run"):
            command(made, directory)
        assert not (directory / "manifest.json").exists()
    path.unlink()
    command(made, directory)
    assert verify(str(directory)).findings == []
    assert path.read_bytes() == data


def test_footers_without_a_digest_are_those_of_earlier_versions(made: Path, tmp_path: Path) -> None:
    """A directory that 0.1.0 began is finished; one that lost its digest since is not one of them."""
    scored = copy(made / "scored", tmp_path / "scored")
    (scored / "manifest.json").unlink()
    for path in scored.glob("shard-*.parquet"):
        rewrite_footer(path, lambda info: None)
    score(scoring(made, scored))
    assert verify(str(scored)).findings == []
    assert ScoredDataset(scored).content_digest == ScoredDataset(made / "scored").content_digest
    rewrite_footer(scored / SHARD, lambda info: info.update(footer_digesu="0" * 64))
    with pytest.raises(IntegrityError, match="its footer is damaged"):
        read_footer(scored / SHARD)
