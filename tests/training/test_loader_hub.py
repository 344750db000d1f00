"""Rows from a repository on the Hub: over HTTP, with the Hub's own client, in a process of its own."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from entrodrop_prep import materialize
from entrodrop_prep.config import MaterializeConfig
from helpers.hub import WRITER, Fault, Hub
from helpers.mixtures import rows_in
from helpers.scored import some_rows, write_scored
from helpers.warm import CLIENT

pytestmark = pytest.mark.network

REPO = "alice/rows"
RECIPE: dict[str, Any] = {"epochs": 2, "schedule": "linear", "max_rate": 1, "target": "both"}
READ = """
import json, sys
from entrodrop_prep import EntrodropError, MaskedRows
for arguments in json.loads(sys.argv[1]):
    try:
        rows = MaskedRows.from_hub(**arguments)
        print(json.dumps([[r["input_ids"], r["attention_mask"], r["labels"]] for r in rows]))
    except EntrodropError as e:
        print(json.dumps(f"{type(e).__name__}: {e}"))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``scored``, and ``masked`` and ``other`` made from it, the latter with another quantile."""
    folder = tmp_path_factory.mktemp("hub-rows")
    write_scored(folder / "scored", some_rows(20, lengths=(3, 20)))
    for name, more in (("masked", {}), ("other", {"quantile": 0.9})):
        settings = {"scored": str(folder / "scored"), "out": str(folder / name), **RECIPE, **more}
        materialize(MaterializeConfig(**settings))
    (folder / "recipe.yaml").write_text("".join(f"{name}: {value}\n" for name, value in RECIPE.items()))
    return folder


def files_of(directory: Path, under: str = "") -> dict[str, bytes]:
    found = {p.relative_to(directory).as_posix(): p.read_bytes() for p in directory.rglob("*") if p.is_file()}
    return {under + name: data for name, data in found.items() if not name.startswith(".")}


def read(hub: Hub, home: Path, *given: dict[str, Any], token: str | None = WRITER, offline: bool = False) -> list[Any]:
    """For each set of arguments what ``from_hub`` gives, or the line of its error; in one new process."""
    environment = hub.environment(home, token) | ({"HF_HUB_OFFLINE": "1"} if offline else {})
    arguments = [{"repo": REPO, "cache_dir": str(home / "rows"), **one} for one in given]
    command = [sys.executable, "-c", READ, json.dumps(arguments)]
    done = CLIENT.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    came = [json.loads(line) for line in done.stdout.splitlines()]
    return [one if isinstance(one, str) else [tuple(row) for row in one] for one in came]


def written(directory: Path) -> list[Any]:
    return [row for e in range(RECIPE["epochs"]) for row in rows_in(directory / f"epoch_{e:03d}")]


def fetched(hub: Hub) -> set[str]:
    return {c.path.split("/resolve/")[1].partition("/")[2] for c in hub.calls if "/resolve/" in c.path}


def test_a_scored_directory_with_a_recipe(hub: Hub, folder: Path, tmp_path: Path) -> None:
    files = {**files_of(folder / "scored"), "notes/large.bin": b"0" * 1000}
    repo = hub.create(REPO, files={**files, "recipe.yaml": (folder / "recipe.yaml").read_bytes()})
    home, other = tmp_path / "home", {"quantile": 0.9}
    assert read(hub, home, {}, other) == [written(folder / "masked"), written(folder / "other")]
    assert {"recipe.yaml", "unigram.npy", "shard-00001.parquet"} < fetched(hub)
    assert "notes/large.bin" not in fetched(hub)
    hub.forget()
    assert read(hub, home, {}, offline=True) == [written(folder / "masked")]  # from the cache
    assert not hub.calls
    repo.put({}, delete=("recipe.yaml",))
    without, given = read(hub, home, {}, RECIPE)
    assert without == "ConfigError: alice/rows: it holds scores and no recipe.yaml; give a recipe, or epochs=..."
    assert given == written(folder / "masked")


def test_a_masked_directory_with_its_scores(hub: Hub, folder: Path, tmp_path: Path) -> None:
    home = tmp_path / "home"
    repo = hub.create(REPO, files={**files_of(folder / "masked"), **files_of(folder / "scored", "scored/")})
    alike, changed = read(hub, home, {}, {**RECIPE, "quantile": 0.9})
    assert alike == written(folder / "masked")
    assert changed == written(folder / "other")
    assert "scored/shard-00001.parquet" in fetched(hub)
    assert not any(name.startswith("epoch_") for name in fetched(hub))

    second = repo.put(files_of(folder / "other"))
    repo.put({}, delete=tuple(files_of(folder / "scored", "scored/")))
    pinned, bare = read(hub, tmp_path / "other home", {"revision": second}, {})
    assert pinned == written(folder / "other")
    assert bare.startswith("ConfigError: alice/rows: it holds no scores to make masks from; push with --include-scored")


def test_a_byte_flipped_on_the_way(hub: Hub, folder: Path, tmp_path: Path) -> None:
    files = files_of(folder / "scored")
    data = bytearray(files["shard-00001.parquet"])
    data[len(data) // 2] ^= 1
    hub.create(REPO, files={**files, "shard-00001.parquet": bytes(data)})
    (said,) = read(hub, tmp_path / "home", {"epochs": 2})
    assert said.startswith("IntegrityError: ")
    assert "shard-00001.parquet: its bytes are not those the manifest was written for" in said


def test_what_cannot_be_had(hub: Hub, folder: Path, tmp_path: Path) -> None:
    hub.create(REPO, files=files_of(folder / "scored"))
    known: list[tuple[dict[str, Any], str]] = [
        (
            {"repo": "alice/nothing"},
            "alice/nothing: the Hub has no such dataset, or it is private",
        ),
        ({"revision": "v9"}, "alice/rows: the dataset has no revision 'v9'; give a branch, a tag or a commit"),
        ({"repo": "a/b/c"}, "a/b/c: it cannot be loaded: "),
    ]
    for line, (_, said) in zip(read(hub, tmp_path / "home", *(a for a, _ in known)), known, strict=True):
        assert line.startswith(f"HubError: {said}"), line
        assert "\n" not in line
    settings = {"epochs": 2}
    (line,) = read(hub, tmp_path / "home", settings, token=None)
    assert line.startswith("HubError: alice/rows: the Hub has no such dataset, or it is private")
    (line,) = read(hub, tmp_path / "home", settings, offline=True)
    assert line.startswith("HubError: alice/rows: HF_HUB_OFFLINE is set and the dataset is not in the cache")
    hub.faults.append(Fault("info", "403", times=100))
    (line,) = read(hub, tmp_path / "home", settings)
    assert line.startswith("HubError: alice/rows: the token may not read the dataset")
