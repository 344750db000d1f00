"""Directories of bounds of the entropy, which 0.1.0 could store: every command refuses them in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from entrodrop_prep import MaskedRows, cli
from entrodrop_prep.config import MaterializeConfig, PushConfig
from entrodrop_prep.errors import UnsupportedError
from entrodrop_prep.export.materialize import materialize
from entrodrop_prep.publish.local import open_local
from entrodrop_prep.publish.plan import RemoteFile
from entrodrop_prep.publish.remote_state import stale
from entrodrop_prep.store import manifest
from entrodrop_prep.store.shards import read_footer, write_shard
from entrodrop_prep.store.unsupported import refuse_bounds
from entrodrop_prep.verification.run import verify
from helpers.scored import all_bytes, copy, rewrite_manifest, some_rows, write_scored

ROOT = Path(__file__).resolve().parents[2]
MODEL = str(ROOT / "entrodrop_prep" / "demo" / "model")
SCHEMA = "scored-bounds/1"
INSTANCES = ("finished", "begun", "shards")
"""With a manifest; with the note of an unfinished run and shards; with shards only."""


def write_bounds(directory: Path) -> None:
    """A finished directory of bounds as 0.1.0 wrote it: in place of ``entropy`` it has ``entropy_lo`` and ``_hi``."""
    write_scored(directory, some_rows(20))
    described = json.loads((directory / "manifest.json").read_bytes())
    identity = {**described["identity"], "schema": SCHEMA, "estimator": "topk", "top_k": 20}
    for index, entry in enumerate(e for e in described["files"] if "rows" in e):
        path = directory / entry["file"]
        table = pq.read_table(path)
        at = table.schema.get_field_index("entropy")
        field = table.schema.field(at)
        table = table.set_column(at, field.with_name("entropy_lo"), table.column(at))
        table = table.add_column(at + 1, field.with_name("entropy_hi"), table.column(at))
        schema = table.schema.with_metadata({**table.schema.metadata, b"schema": SCHEMA.encode()})
        schema = pa.schema(list(schema), {k: v for k, v in schema.metadata.items() if k != b"entrodrop"})
        info = {"schema": SCHEMA, "shard": index, "identity": identity}
        footer = write_shard(path, schema, [table.cast(schema)], info)
        entry |= manifest.file_entry(directory, path, content_digest=footer.content_digest)
    manifest.write(directory, {**described, "schema": SCHEMA, "identity": identity})


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the directories of bounds, an exact one, and masks of the exact one."""
    folder = tmp_path_factory.mktemp("unsupported")
    write_bounds(folder / "finished")
    for name in ("begun", "shards"):
        for path in sorted((folder / "finished").glob("shard-*.parquet")):
            (folder / name).mkdir(exist_ok=True)
            (folder / name / path.name).write_bytes(path.read_bytes())
    identity = json.loads((folder / "finished" / "manifest.json").read_bytes())["identity"]
    manifest.write_state(folder / "begun", {"schema": SCHEMA, "identity": identity})
    write_scored(folder / "exact", some_rows(20))
    materialize(MaterializeConfig(scored=str(folder / "exact"), out=str(folder / "masked"), epochs=1))
    (folder / "rows.jsonl").write_text('{"text": "some words"}\n')
    return folder


COMMANDS = [
    ["score", "rows.jsonl", "--model", MODEL, "--out", "D"],
    ["score", "rows.jsonl", "--model", MODEL, "--out", "D", "--overwrite"],
    ["materialize", "D", "--epochs", "1", "--out", "out"],
    ["materialize", "a=exact", "b=D:0.5", "--epochs", "1", "--out", "out"],
    ["materialize", "exact", "--plain", "b=D", "--epochs", "1", "--out", "out"],
    ["materialize", "exact", "--eval", "D", "--epochs", "1", "--out", "out"],
    ["materialize", "exact", "--epochs", "1", "--out", "D"],
    ["verify", "D"],
    ["verify", "masked", "--against", "D"],
    ["inspect", "D"],
    ["inspect", "D", "--row", "1"],
    ["recipe", "trl", "D"],
    ["push", "D", "someone/name"],
    ["push", "masked", "someone/name", "--include-scored", "D"],
]


@pytest.mark.parametrize("instance", INSTANCES)
@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_bounds_are_refused(
    command: list[str],
    instance: str,
    made: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    here = copy(made, tmp_path / "here")
    monkeypatch.chdir(here)
    monkeypatch.setenv("HF_TOKEN", "hf_none")
    before = all_bytes(here)
    assert cli.run([instance if word == "D" else word.replace("=D", f"={instance}") for word in command]) == 2
    printed = capfd.readouterr().err
    assert printed.count("\n") == 1, printed
    assert f"{instance}/" in printed
    assert "it was made from bounds of the entropy" in printed
    assert "score the rows again" in printed
    assert all_bytes(here) == before


@pytest.mark.parametrize("instance", INSTANCES)
def test_the_library_refuses_them_too(instance: str, made: Path) -> None:
    place = str(made / instance)
    for call in (
        lambda: MaskedRows.open(place, epochs=1),
        lambda: MaskedRows.like(made / "masked", place),
        lambda: materialize(MaterializeConfig(scored=place, out=str(made / "out"), epochs=1)),
        lambda: verify(place),
    ):
        with pytest.raises(UnsupportedError, match="bounds of the entropy"):
            call()


@pytest.mark.parametrize("part", ["identity", "scored", "validation", "shards"])
@pytest.mark.parametrize("command", [["verify"], ["inspect"], ["recipe", "trl"], ["push"]], ids=" ".join)
def test_masks_from_bounds_are_refused(
    command: list[str],
    part: str,
    made: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_none")
    masked = copy(made / "masked", tmp_path / "masked")
    described = json.loads((masked / "manifest.json").read_bytes())
    identity = {**described["identity"], "bounds": "lo"}
    was_bounds = {"identity": {**described["scored"]["identity"], "schema": SCHEMA, "estimator": "topk"}}
    if part == "shards":
        for path in masked.glob("epoch_000/*.parquet"):
            info = {**read_footer(path).info, "identity": identity}
            table = pq.read_table(path)
            kept = {k: v for k, v in table.schema.metadata.items() if k != b"entrodrop"}
            write_shard(path, table.schema.with_metadata(kept), [table.replace_schema_metadata(kept)], info)
        (masked / "manifest.json").unlink()
        (masked / ".state.json").unlink()
    elif part == "identity":
        rewrite_manifest(masked, identity=identity)
    else:
        rewrite_manifest(masked, **{part: {**described.get(part, {}), **was_bounds}})
    more = ["someone/name"] if command == ["push"] else []
    assert cli.run([*command, str(masked), *more]) == 2
    printed = capfd.readouterr().err
    assert printed.count("\n") == 1, printed
    assert "it was made from bounds of the entropy" in printed


def test_a_published_directory_of_bounds_is_not_replaced(made: Path) -> None:
    local = open_local(PushConfig(directory=str(made / "exact"), repo="someone/name"))
    remote = {"manifest.json": RemoteFile(1, "0" * 40, None)}
    with pytest.raises(UnsupportedError, match=r"someone/name/manifest\.json: it was made from bounds"):
        stale(local, "someone/name", remote, lambda path: (made / "finished" / path).read_text())


@pytest.mark.parametrize("told", [None, [], "scored-bounds/1", 1, {"scored": [1, None, {"identity": [1]}]}, {}])
def test_what_tells_of_no_bounds(told: Any) -> None:
    refuse_bounds(told, "where")


def test_masks_from_exact_scores_of_0_1_0_are_read(made: Path, tmp_path: Path) -> None:
    """Their recipes say that no bound was taken."""
    masked = copy(made / "masked", tmp_path / "masked")
    recipe = json.loads((masked / "manifest.json").read_bytes())["recipe"]
    rewrite_manifest(masked, recipe={**recipe, "bounds": None})
    assert not verify(str(masked), str(made / "exact")).findings
    assert len(MaskedRows.like(masked, made / "exact")) == len(MaskedRows.like(made / "masked", made / "exact"))
    config = MaterializeConfig(scored=str(made / "exact"), out=str(masked), epochs=2, horizon=1)
    assert len(materialize(config).epochs) == 2
    assert not verify(str(masked), str(made / "exact")).findings
    rewrite_manifest(masked, recipe={**recipe, "bounds": "lo"})
    assert verify(str(masked)).findings
