"""Edits of one value of a manifest whose own digest was made right again: ``verify`` finds each of them."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from entrodrop_prep import cli
from entrodrop_prep.config import MaterializeConfig, PushConfig
from entrodrop_prep.errors import EntrodropError, IntegrityError
from entrodrop_prep.export.materialize import materialize
from entrodrop_prep.publish.local import open_local
from entrodrop_prep.store import manifest
from entrodrop_prep.training.rows import MaskedRows
from entrodrop_prep.verification.run import verify
from helpers.mixtures import run_materialize
from helpers.models import run_score, write_rows
from helpers.scored import copy as copied
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


DECIDE: list[tuple[tuple[Any, ...], Any]] = [
    (("tokenizer", "special_ids"), []),
    (("tokenizer", "eos_id"), 7),
    (("tokenizer", "pad_id"), 7),
    (("tokenizer", "vocabulary"), "0" * 64),
    (("model", "vocab_size"), 100_000),
    (("identity", "score_dtype"), "float16"),
    (("identity", "tokenizer"), "0" * 64),
    (("source", "digest"), "0" * 64),
    (("counts", "tokens"), 1),
    (("content_digest",), "0" * 64),
]
"""Of a scored manifest."""


SUMS = ("counts", "content_digest", "source")
"""What a cache does not depend on: it holds the rows of a content digest, and of shards that may be gone."""


@pytest.mark.parametrize(("path", "value"), DECIDE)
def test_no_masks_are_made_of_scores_whose_manifest_was_edited(
    path: tuple[Any, ...], value: Any, made: Path, tmp_path: Path
) -> None:
    """Nor are the scores pushed, nor rows made of what a cache holds of them."""
    scored, cache = copied(made / "scored", tmp_path / "scored"), made / "cache"
    MaskedRows.open(scored, epochs=1, cache_dir=cache)
    described = json.loads((scored / "manifest.json").read_bytes())
    manifest.write(scored, edited(described, (path, "set", value)))
    for use in (
        lambda: materialize(MaterializeConfig(scored=str(scored), out=str(tmp_path / "masked"), epochs=1)),
        lambda: open_local(PushConfig(directory=str(scored), repo="me/data")),
        lambda: MaskedRows.open(scored, epochs=1, cache_dir=cache),
    )[: 2 if path[0] in SUMS else 3]:
        with pytest.raises(IntegrityError, match=f"^{scored}"):
            use()
    assert not (tmp_path / "masked" / "manifest.json").exists()


def test_nothing_is_drawn_by_counts_that_are_not_those_of_the_tokens(made: Path, tmp_path: Path) -> None:
    scored = copied(made / "scored", tmp_path / "scored")
    recipe = MaterializeConfig(scored=str(scored), out=str(tmp_path / "masked"), epochs=1, target="inputs")
    materialize(recipe)
    counts = np.load(scored / "unigram.npy")
    np.save(scored / "unigram.npy", counts[::-1])
    described = json.loads((scored / "manifest.json").read_bytes())
    at = next(i for i, e in enumerate(described["files"]) if e["file"] == "unigram.npy")
    described["files"][at] = manifest.file_entry(scored, scored / "unigram.npy")
    manifest.write(scored, described)
    with pytest.raises(IntegrityError, match="it does not count the shards' tokens"):
        materialize(replace(recipe, out=str(tmp_path / "other")))


@pytest.mark.parametrize(
    "path",
    [
        *(("recipe", "max_rate"), ("epochs", 0, "dropped"), ("scored", "tokenizer", "eos_id"), ("identity", "seed")),
        *(("scored", "source", "name"), ("files", 0, "epoch"), ("content_digest",), ("environments",)),
    ],
)
def test_masks_whose_manifest_was_edited_are_not_pushed(path: tuple[Any, ...], made: Path, tmp_path: Path) -> None:
    masked = copied(made / "masked", tmp_path / "masked")
    described = json.loads((masked / "manifest.json").read_bytes())
    value = described
    for key in path:
        value = value[key]
    changed = f"{value[:-1]}0" if isinstance(value, str) else [] if isinstance(value, list) else value / 2 + 1
    manifest.write(masked, edited(described, (path, "set", type(value)(changed))))
    with pytest.raises(IntegrityError, match=f"^{masked}"):
        open_local(PushConfig(directory=str(masked), repo="me/data"))
