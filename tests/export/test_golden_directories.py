"""Directories as they were written on 2026-11-26: the same settings give the same rows, figures and files for ever.

``golden_directories.json`` was written by ``python tests/test_golden_directories.py`` before the rows of an epoch were
made by position. Each case's manifest is compared without what names versions, and each file's rows by their content
digest; the bytes of the files too, where the versions of the libraries that wrote them are those of that day.
"""

from __future__ import annotations

import functools
import hashlib
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from entrodrop_prep.config import MaterializeConfig
from entrodrop_prep.export.materialize import materialize
from entrodrop_prep.store.digest import of_json
from entrodrop_prep.store.environment import host_environment
from entrodrop_prep.store.shards import read_footer
from entrodrop_prep.verification.run import verify
from helpers.mixtures import with_column
from helpers.scored import some_rows, write_scored

STORED = Path(__file__).with_name("golden_directories.json")
VERSIONED = {"generator", "environments", "environment", "manifest_digest", "bytes", "sha256"}
"""Names in manifests and footers of what may differ while the rows are the same."""
WITHOUT = {"recipe": {"bounds"}}
"""Settings that are no more, and were None."""

ONE: dict[str, Any] = {"scored": "one", "epochs": 3}
MIXED: dict[str, Any] = {"scored": ["one=one:2.5", "two=two"], "epochs": 3}
CASES: dict[str, dict[str, Any]] = {
    "one": ONE,
    "half-precision": {**ONE, "scored": "half", "rows_per_shard": 17, "compression": "snappy"},
    "inputs": {**ONE, "target": "inputs", "rows_per_shard": 9, "seed": 5},
    "both-by-row": {**ONE, "target": "both", "scope": "row", "progress": "row", "schedule": "linear", "max_rate": 1.0},
    "one-token": {**ONE, "target": "both", "drop_token": "100", "protect": "none", "rates": [0.2, 0.5, 1.0]},
    "high-entropy": {**ONE, "select": "high-entropy", "quantile": 0.3, "schedule": "constant", "compression": "none"},
    "random": {**ONE, "select": "random", "quantile": 0.7, "schedule": "step", "midpoint": 0.2, "protect": "20,21"},
    "threshold": {**ONE, "threshold": 1.5, "keep_surprising": 2.5, "schedule": "cosine", "target": "inputs"},
    "once": {**ONE, "shuffle": "once", "plain_config": True, "layout": ["concatenated", "jsonl"]},
    "none": {**ONE, "shuffle": "none", "progress": "row", "rows_multiple": 7, "eval": "two", "rows_per_shard": 20},
    "horizon": {**ONE, "horizon": 9, "only_epochs": "1-2", "add_columns": ["n_trainable", "position_ids"]},
    "packed": {**ONE, "pack": 24, "add_columns": ["n_trainable", "position_ids", "seq_lengths"], "rows_per_shard": 21},
    "packed-both": {**ONE, "pack": 64, "target": "both", "schedule": "constant", "max_rate": 1.0, "quantile": 1.0},
    "mixed": {**MIXED, "plain": ["chat=kept:0.4"], "rows_per_shard": 50, "plain_config": True, "target": "both"},
    "mixed-by-source": {**MIXED, "scope": "source", "shuffle": "once", "progress": "row", "keep_surprising": 1.0},
    "mixed-none": {**MIXED, "shuffle": "none", "eval": "half", "rows_multiple": 16, "scope": "row"},
    "mixed-packed": {**MIXED, "plain": ["chat=kept:1.7"], "pack": 30, "add_columns": ["seq_lengths"]},
    "one-named": {**ONE, "scored": ["a=one:1"], "target": "inputs"},
    "beside-plain": {**ONE, "plain": ["b=two:0.25"], "add_columns": ["n_trainable"]},
    "held-out": {**ONE, "eval_fraction": 0.25, "target": "both", "rows_per_shard": 11, "plain_config": True},
    "mixed-held-out": {**MIXED, "plain": ["chat=kept:0.4"], "eval_fraction": 0.1, "pack": 30, "seed": 3},
    "by-column": {**ONE, "scored": "kept", "scope": "column:kind", "quantile": 0.4},
    "mixed-by-column": {
        **ONE,
        "scored": ["a=kept", "b=more:0.5"],
        "scope": "column:kind",
        "target": "both",
        "pack": 50,
    },
}
EXTENDED = {"one": 2, "mixed": 1, "packed": 2}
"""Cases that are also written in two runs, the first of so many epochs."""


def write_sources(folder: Path) -> None:
    """The scored directories of all cases."""
    write_scored(folder / "one", some_rows(60), rows_per_shard=13)
    write_scored(folder / "two", some_rows(31, seed=4, lengths=(3, 60), distinct=None), rows_per_shard=8)
    write_scored(folder / "half", some_rows(45, seed=2, dtype=np.float16), logprob=False)
    kinds = ["law", "code", "chat"]
    for name, rows, value in (
        ("kept", some_rows(30, seed=6), lambda row: kinds[row % 3]),
        ("more", some_rows(26, seed=7), lambda row: None if row % 4 else "code"),
    ):
        with_column(write_scored(folder / name, rows), "kind", pa.string(), value)


def write_case(sources: Path, out: Path, name: str, **changes: Any) -> None:
    """Materialize one case."""
    values = {**CASES[name], **changes}

    def placed(text: str) -> str:
        label, _, rest = text.rpartition("=")
        return f"{label}={sources / rest}" if label else str(sources / rest)

    for setting in ("scored", "plain", "eval"):
        if setting in values:
            given = values[setting]
            values[setting] = placed(given) if isinstance(given, str) else [placed(text) for text in given]
    materialize(MaterializeConfig(**values, out=str(out)))


def lasting(value: Any, name: str = "") -> Any:
    """A manifest or a footer without what may differ."""
    if isinstance(value, dict):
        gone = VERSIONED | WITHOUT.get(name, set())
        return {k: lasting(v, k) for k, v in value.items() if k not in gone}
    return [lasting(v) for v in value] if isinstance(value, list) else value


def described(out: Path) -> dict[str, Any]:
    """What is compared of a directory: of each file, and of the manifest."""
    found = json.loads((out / "manifest.json").read_bytes())
    files: dict[str, Any] = {}
    for path in sorted(p for p in out.rglob("*") if p.is_file() and p.suffix in (".parquet", ".jsonl")):
        sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
        content = {}
        if path.suffix == ".parquet":
            info = read_footer(path).info
            groups = pq.read_metadata(path)
            sizes = [groups.row_group(i).num_rows for i in range(groups.num_row_groups)]
            content = {"content": info["content_digest"], "groups": sizes, "footer": of_json(lasting(info))[:32]}
        files[path.relative_to(out).as_posix()] = {"sha256": sha256, **content}
    derived = [e["file"] for e in found.pop("derived", [])]
    found["files"] = [e for e in found["files"] if "rows" in e]
    return {"manifest": of_json(lasting(found))[:32], "derived": of_json(sorted(derived))[:32], "files": files}


def compared(found: dict[str, Any]) -> dict[str, Any]:
    """``described``, without the bytes of files that other versions wrote than those of the stored ones."""
    if host_environment() == STORED_ENVIRONMENT:
        return found
    files = {n: {k: v for k, v in f.items() if k != "sha256" or n.endswith("jsonl")} for n, f in found["files"].items()}
    return {**found, "files": files}


@functools.cache
def stored() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(STORED.read_text(encoding="ascii"))
    return found


STORED_ENVIRONMENT = stored()["environment"] if STORED.exists() else {}


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("golden")
    write_sources(folder)
    return folder


def against_of(sources: Path, name: str) -> list[str]:
    """What ``verify --against`` is given."""
    case = CASES[name]
    given = [case["scored"]] if isinstance(case["scored"], str) else case["scored"]
    pairs = [text.split(":")[0].rpartition("=") for text in (*given, *case.get("plain", ()))]
    named = [
        f"{label or 'source'}={sources / place}" if label or len(pairs) > 1 else str(sources / place)
        for label, _, place in pairs
    ]
    return [*named, *([f"eval={sources / case['eval']}"] if "eval" in case else [])]


@pytest.mark.parametrize("name", CASES)
def test_it_is_written_as_ever_and_verified(name: str, sources: Path, tmp_path: Path) -> None:
    write_case(sources, tmp_path / "out", name)
    assert compared(described(tmp_path / "out")) == compared(stored()["cases"][name])
    report = verify(str(tmp_path / "out"), against_of(sources, name))
    assert not report.findings


@pytest.mark.parametrize("name", EXTENDED)
def test_it_is_extended_and_continued_as_ever(name: str, sources: Path, tmp_path: Path) -> None:
    horizon = CASES[name].get("horizon", CASES[name]["epochs"])
    out = tmp_path / "out"
    write_case(sources, out, name, epochs=EXTENDED[name], horizon=horizon)
    write_case(sources, out, name)
    assert compared(described(out)) == compared(stored()["cases"][name])
    gone = sorted(out.rglob("*.parquet"))[1::2]
    for path in gone:
        path.unlink()
    (out / "manifest.json").unlink()
    write_case(sources, out, name)
    assert compared(described(out)) == compared(stored()["cases"][name])


def test_the_comparison_can_fail(sources: Path, tmp_path: Path) -> None:
    write_case(sources, tmp_path / "out", "one", seed=1)
    found = compared(described(tmp_path / "out"))
    assert found["manifest"] != stored()["cases"]["one"]["manifest"]
    assert found["files"] != compared(stored()["cases"]["one"])["files"]


def main() -> None:
    """Write ``golden_directories.json``."""
    with tempfile.TemporaryDirectory() as tmp:
        write_sources(Path(tmp))
        found = {}
        for name in CASES:
            write_case(Path(tmp), Path(tmp) / "out", name)
            found[name] = described(Path(tmp) / "out")
            shutil.rmtree(Path(tmp) / "out")
    value = {"environment": host_environment(), "cases": found}
    STORED.write_text(json.dumps(value, indent=1, sort_keys=True) + "\n", encoding="ascii")


if __name__ == "__main__":
    main()
