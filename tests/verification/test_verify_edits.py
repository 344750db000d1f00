"""Edits of one value of a manifest whose own digest was made right again: ``verify`` finds each of them."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from entrodrop_prep import cli
from entrodrop_prep.errors import EntrodropError
from entrodrop_prep.store import manifest
from entrodrop_prep.verification.run import verify
from helpers.mixtures import run_materialize
from helpers.models import run_score, write_rows
from helpers.scored import without_digests

MODEL = Path(cli.__file__).parents[1] / "demo" / "model"
EDITS = 80
"""Of each manifest; ``make test-heavy`` makes every one."""
Edit = tuple[tuple[Any, ...], str, Any]

PROVED_BY_NEW_SHARDS = {("model", "name"), ("model", "context"), ("source", "name"), ("tokenizer", "name")}
"""Of a directory of 0.1.0, whose shards do not tell these: names for people, which nothing else follows from."""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A scored directory with a rejected row and a kept column, and a masked one with plain and validation rows."""
    folder = tmp_path_factory.mktemp("edits")
    rows = [{"text": "def f(x):\n    return x\n" * n, "name": f"n{n}", "stars": n} for n in range(1, 5)]
    lines = [*rows, {"text": None, "name": "bad", "stars": 0}]
    source = write_rows(folder / "rows.jsonl", lines)
    settings = {"max_length": 24, "id_column": "name", "keep_columns": ("stars",), "on_bad_row": "skip"}
    run_score(source, MODEL, folder / "scored", **settings)
    run_score(source, MODEL, folder / "held", **settings, limit=2)
    more = {"eval": str(folder / "held"), "plain_config": True, "rows_multiple": 2, "layout": ("jsonl",)}
    run_materialize(folder / "scored", folder / "masked", **more)
    return folder


def paths(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Every value in a manifest with the keys and indices on its way."""
    if path:
        yield path, value
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in children:
        yield from paths(child, (*path, key))


def edits(described: dict[str, Any]) -> Iterator[Edit]:
    """Numbers one more and less, texts altered, truths flipped, items dropped and doubled, keys removed."""
    for path, value in paths(described):
        if isinstance(value, bool):
            yield path, "set", not value
        elif isinstance(value, (int, float)):
            yield from ((path, "set", value + by) for by in (1, -1))
        elif isinstance(value, str):
            changed = (value + "x", value[:-1] + chr(ord(value[-1]) ^ 1) if value else "y", "")
            yield from ((path, "set", text) for text in changed if text != value)
        elif value is None:
            yield from ((path, "set", other) for other in (1, "x"))
        elif isinstance(value, list) and value:
            yield from ((path, "set", other) for other in (value[1:], value[:-1], [*value, value[-1]]))
        if isinstance(path[-1], str):
            yield path, "remove", None


def edited(described: dict[str, Any], edit: Edit) -> dict[str, Any]:
    path, how, value = edit
    changed: Any = copy.deepcopy(described)
    parent = changed
    for key in path[:-1]:
        parent = parent[key]
    if how == "remove":
        del parent[path[-1]]
    else:
        parent[path[-1]] = value
    return dict(changed)


def unnoticed(directory: Path, against: list[str] | None, count: int | None) -> list[Edit]:
    """Which of ``count`` random edits of a manifest, or of all, ``verify`` says nothing of."""
    data = (directory / "manifest.json").read_bytes()
    described = json.loads(data)
    del described["manifest_digest"]
    every = list(edits(described))
    missed = []
    for edit in random.Random(directory.name).sample(every, count or len(every)):
        manifest.write(directory, edited(described, edit))
        try:
            found = verify(str(directory)).findings or (verify(str(directory), against).findings if against else [])
        except EntrodropError as e:
            found = [str(e)]
        assert all("\n" not in line for line in found)
        if not found:
            missed.append(edit)
    (directory / "manifest.json").write_bytes(data)
    assert not verify(str(directory), against).findings
    return missed


COUNTS = [EDITS, pytest.param(None, marks=pytest.mark.heavy, id="every one")]


@pytest.mark.parametrize("count", COUNTS)
def test_every_edit_of_a_scored_manifest_is_found(count: int | None, made: Path) -> None:
    assert unnoticed(made / "scored", None, count) == []


@pytest.mark.parametrize("count", COUNTS)
def test_every_edit_of_a_masked_manifest_is_found(count: int | None, made: Path) -> None:
    assert unnoticed(made / "masked", [str(made / "scored"), f"eval={made / 'held'}"], count) == []


def test_what_shards_of_an_earlier_version_do_not_tell_is_said(made: Path, tmp_path: Path) -> None:
    """The same directory as 0.1.0 wrote it: it holds, and the note names what is not checked."""
    old = without_digests(made / "scored", tmp_path / "scored")
    assert b"footer_digest" not in pq.read_metadata(old / "shard-00000.parquet").metadata[b"entrodrop"]
    report = verify(str(old))
    assert report.findings == []
    assert any("not checked: names of source and model" in note for note in report.notes)
    missed = unnoticed(old, None, 60)
    assert {edit[0] for edit in missed} <= PROVED_BY_NEW_SHARDS
