"""A masked directory tells where it comes from: in its manifest, in the footer of each file, in its card."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from entrodrop_prep import MaterializeConfig, __version__, materialize
from entrodrop_prep.export.provenance import short_source
from entrodrop_prep.store import digest, manifest
from entrodrop_prep.store.schema import MASKED, SCORED
from entrodrop_prep.store.shards import read_footer
from helpers.models import random_rows, run_score, save_model, tiny_llama, words, write_rows
from helpers.scored import all_bytes


@pytest.fixture(scope="module")
def scored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Scores of a model, of 30 rows."""
    folder = tmp_path_factory.mktemp("scored")
    model = save_model(folder / "tiny", tiny_llama())
    rows = write_rows(folder / "rows.jsonl", [{"text": words(row)} for row in random_rows(30, 97, seed=1)])
    run_score(rows, model, folder / "out", rows_per_shard=10)
    run_score(rows, model, folder / "held", limit=6)
    return folder / "out"


def run(scored: Path, out: Path, **settings: Any) -> dict[str, Any]:
    materialize(MaterializeConfig(**{"scored": str(scored), "out": str(out), "epochs": 3, "horizon": 3, **settings}))
    return manifest.read(out, MASKED)


def footers(out: Path) -> dict[str, dict[str, Any]]:
    return {p.relative_to(out).as_posix(): read_footer(p).info for p in sorted(out.glob("*/*.parquet"))}


def test_the_manifest_stands_alone(scored: Path, tmp_path: Path) -> None:
    source = manifest.read(scored, SCORED)
    described = run(scored, tmp_path / "out", seed=5)
    told = described["scored"]
    assert told["identity"] == source["identity"]
    assert told["identity"]["source"]["files"][0]["name"] == "rows.jsonl"
    assert told["environments"] == [e["environment"] for e in source["environments"]]
    assert {"torch", "transformers", "backend", "device"} <= set(told["environments"][0])
    assert told["generator"] == described["generator"] == f"entrodrop-prep {__version__}"
    assert told["tokenizer"]["name"] == told["model"]["name"] == "tiny"
    assert described["recipe"]["seed"] == 5
    [environment] = described["environments"]
    assert environment["entrodrop_prep"] == __version__
    assert set(environment) == {"entrodrop_prep", "python", "pyarrow", "numpy"}
    card = (tmp_path / "out" / "README.md").read_text()
    for said in (
        told["identity"]["model"]["digest"],
        told["tokenizer"]["digest"],
        digest.of_json(described["identity"]),
        f"- scored with entrodrop-prep {__version__}, backend transformers, device cpu, ",
        f"- files written with entrodrop-prep {__version__}, numpy {environment['numpy']}, pyarrow ",
        *(f"{name} {told['environments'][0][name]}" for name in ("transformers", "torch", "tokenizers", "python")),
    ):
        assert said in card


def test_every_footer_stands_alone(scored: Path, tmp_path: Path) -> None:
    held, out = scored.parent / "held", tmp_path / "out"
    described = run(scored, out, eval=str(held), plain_config=True)
    found = footers(out)
    assert {name.split("/")[0] for name in found} == {"epoch_000", "epoch_001", "epoch_002", "plain", "validation"}
    for info in found.values():
        assert info["identity"] == described["identity"]
        assert info["fingerprint"] == digest.of_json(info["identity"])
        assert [p["name"] for p in info["provenance"]] == ["source", "validation"]
        for told, place in zip(info["provenance"], (scored, held), strict=True):
            source = manifest.read(place, SCORED)
            assert told["scores"] == source["content_digest"]
            assert told["source"] == source["identity"]["source"]
            for name in ("model", "tokenizer", "dtype"):
                assert told[name] == source["identity"][name]
            assert told["source_digest"] == source["source"]["digest"]
            assert told["generator"] == f"entrodrop-prep {__version__}"
            assert told["environments"] == [e["environment"] for e in source["environments"]]
        [environment] = described["environments"]
        assert info["environment"] == environment
        assert str(tmp_path) not in json.dumps(info)


def test_a_long_list_of_files_is_a_digest_in_a_footer() -> None:
    files = [{"name": f"{n}.jsonl", "size": n} for n in range(9)]
    few = {"kind": "files", "files": files[:8]}
    assert short_source(few) == few
    short = short_source({"kind": "files", "files": files})
    assert short == {"kind": "files", "files": {"number": 9, "digest": digest.of_json(files)}}


def test_versions_of_every_run_are_listed_once(scored: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = tmp_path / "whole"
    run(scored, whole)
    run(scored, tmp_path / "pieces", epochs=1)
    run(scored, tmp_path / "pieces", epochs=3)
    assert all_bytes(whole, without=("README.md",)) == all_bytes(tmp_path / "pieces", without=("README.md",))
    out = tmp_path / "out"
    [here] = run(scored, out, epochs=1)["environments"]
    newer = {**here, "pyarrow": "99.0"}
    for module in ("materialize", "provenance"):
        monkeypatch.setattr(f"entrodrop_prep.export.{module}.host_environment", lambda: newer)
    assert run(scored, out, epochs=2)["environments"] == [here, newer]
    (out / "manifest.json").unlink()  # as after a kill: the private note knows
    next(out.glob("epoch_001/*.parquet")).unlink()
    assert run(scored, out, epochs=2)["environments"] == [here, newer]
    assert run(scored, out, epochs=2, overwrite=True)["environments"] == [newer]
    for name, info in footers(out).items():
        assert info == {**footers(whole)[name], "environment": newer}, "each footer tells what wrote it, and no more"
