"""Several sources in one epoch: against the rules read token by token, and what they promise of each other."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from entrodrop_prep import cli
from entrodrop_prep.config import MaterializeConfig, Recipe
from entrodrop_prep.errors import IntegrityError, MismatchError, SourceError
from entrodrop_prep.export.materialize import MaterializeSummary, materialize
from entrodrop_prep.masking import columns
from entrodrop_prep.masking.quantile import group_thresholds, high_rank, low_rank
from entrodrop_prep.store import digest, scored
from entrodrop_prep.verification.run import verify
from helpers.mixtures import FIGURES, Given, naive_mixture, rows_in, with_column
from helpers.scored import all_bytes, copy, manifest_of, reseal, rewrite_manifest, some_rows, write_scored

CODE, TEXT, OLD = some_rows(25), some_rows(40, seed=1, dtype=np.float16), some_rows(15, seed=2)
KINDS = ["web", "book", None]


def kind_of(row: int) -> str | None:
    return KINDS[row % 3]


GIVEN = {
    "code": Given(CODE, 2, values=kind_of),
    "text": Given(TEXT, 0.5, values=kind_of),
    "old": Given(OLD, 1.5, plain=True),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three scored directories; never written to by a test. ``old`` keeps no column and has no log-probabilities."""
    folder = tmp_path_factory.mktemp("sources")
    with_column(write_scored(folder / "code", CODE), "kind", pa.string(), kind_of)
    with_column(write_scored(folder / "text", TEXT, rows_per_shard=7, with_id=True), "kind", pa.string(), kind_of)
    write_scored(folder / "old", OLD, logprob=False)
    return folder


def arguments(made: Path) -> dict[str, Any]:
    return {"scored": [f"code={made / 'code'}:2", f"text={made / 'text'}:0.5"], "plain": [f"old={made / 'old'}:1.5"]}


def against(made: Path, *names: str) -> list[str]:
    return [f"{name}={made / name}" for name in names or GIVEN]


def run(out: Path, **settings: Any) -> MaterializeSummary:
    return materialize(MaterializeConfig(**{"out": str(out), "epochs": 2, **settings}))


# The rules, read literally.


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"shuffle": "once", "target": "both", "schedule": "constant"},
        {"shuffle": "none", "progress": "row", "rows_per_shard": 11},
        {"scope": "row", "target": "inputs", "schedule": "constant", "rows_per_shard": 1},
        {"scope": "source", "quantile": 0.3, "progress": "row", "max_rate": 1, "rows_per_shard": 13},
        {"scope": "source", "select": "high-entropy", "schedule": "constant"},
        {"scope": "column:kind", "schedule": "constant", "max_rate": 1, "target": "both"},
        {"scope": "column:kind", "select": "high-entropy", "quantile": 0.2, "schedule": "constant", "seed": 4},
        {"scope": "column:kind", "select": "random", "quantile": 0.9, "schedule": "constant"},
        {"select": "random", "target": "both", "schedule": "constant", "seed": 2**63 - 1},
        {"threshold": 1.1, "schedule": "constant", "keep_surprising": 1.5},
        {"quantile": 0, "schedule": "constant"},
        {"quantile": 1, "min_rate": 1, "max_rate": 1, "horizon": 3},
    ],
    ids=str,
)
def test_a_mixture_is_what_the_rules_say(settings: dict[str, Any], made: Path, tmp_path: Path) -> None:
    summary = run(tmp_path / "out", **arguments(made), **settings)
    recipe = Recipe(**{"epochs": 2, **{k: v for k, v in settings.items() if k in Recipe.__dataclass_fields__}})
    for e in summary.epochs:
        expected, figures = naive_mixture(GIVEN, recipe, e["epoch"])
        assert rows_in(tmp_path / "out" / e["folder"]) == expected
        assert e["sources"] == figures
        for name in FIGURES:
            assert e[name] == sum(f[name] for f in figures.values())
    report = verify(str(tmp_path / "out"), against(made))
    assert not report.findings
    assert report.notes[-1] == f"OK: verified {tmp_path / 'out'}"


@pytest.mark.parametrize("select", ["low-entropy", "high-entropy"])
def test_a_column_of_one_directory(select: str, made: Path, tmp_path: Path) -> None:
    """Without a name: the source is called as ever, and the manifest has the shape it always had."""
    settings = {"scope": "column:kind", "select": select, "schedule": "constant"}
    run(tmp_path / "out", scored=str(made / "code"), **settings)
    expected, _ = naive_mixture({"source": Given(CODE, values=kind_of)}, Recipe(epochs=2, **settings), 1)
    assert rows_in(tmp_path / "out" / "epoch_001") == expected
    described = manifest_of(tmp_path / "out")
    assert described["identity"]["source"] == "source"
    assert described["scored"]["content_digest"] == described["identity"]["scored"]
    assert described["tau_nats"]["column"] == "kind"
    assert sorted(map(str, dict(described["tau_nats"]["values"]))) == sorted(map(str, KINDS))
    assert not verify(str(tmp_path / "out"), str(made / "code")).findings


@pytest.mark.parametrize(
    ("kind", "values"), [(pa.int16(), lambda r: r % 5 - 2), (pa.bool_(), lambda r: r % 2 == 0)], ids=["int16", "bool"]
)
def test_columns_of_other_types(kind: pa.DataType, values: Any, tmp_path: Path) -> None:
    with_column(write_scored(tmp_path / "scored", CODE), "level", kind, values)
    run(tmp_path / "out", scored=str(tmp_path / "scored"), scope="column:level", schedule="constant")
    recipe = Recipe(epochs=2, scope="column:level", schedule="constant")
    expected, _ = naive_mixture({"source": Given(CODE, values=values)}, recipe, 0)
    assert rows_in(tmp_path / "out" / "epoch_000") == expected


def test_one_source_without_a_name_is_what_it_was(tmp_path: Path) -> None:
    """Figures of a directory written before there were mixtures."""
    write_scored(tmp_path / "scored", some_rows(60), rows_per_shard=9)
    run(tmp_path / "m", scored=str(tmp_path / "scored"), epochs=3)
    described = manifest_of(tmp_path / "m")
    assert described["content_digest"] == "4973e8269e4affaa13181bd0d229d40c31bfb090542858b8cd5abc8573cdd3c3"
    later = ("entropy_histogram", "environments")
    rest = {k: v for k, v in described.items() if k not in ("files", "manifest_digest", *later)}
    for name in ("generator", "identity"):
        del rest["scored"][name]
    rest["recipe"]["bounds"] = None  # said so then
    assert digest.of_json(rest) == "1b65ab1f6abc1b7e4c60ea4d94fd83afc7d54ee97c747c3068a88d8a5c596b4e"


@pytest.mark.parametrize("groups", [1, 3, 16, 17, 400])
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_thresholds_of_groups_are_exact(groups: int, dtype: Any) -> None:
    rng = np.random.default_rng(groups)
    scores = rng.choice(np.array([*rng.normal(size=40), -0.0, 0.0, 1e-7, -1e-7, 60000]), 3000).astype(dtype)
    group = rng.integers(0, max(1, groups - 1), len(scores))  # the last group is empty
    for q in (0.0, 0.001, 0.3, 0.5, 1.0):
        for high in (False, True):
            found = group_thresholds(
                lambda: zip(np.array_split(scores, 7), np.array_split(group, 7), strict=True),
                dtype,
                groups,
                q,
                high=high,
            )
            for g in range(groups):
                mine = np.sort(scores[group == g]).tolist()
                rank = (high_rank if high else low_rank)(q, len(mine))
                assert found[g] == (mine[rank] if rank is not None else np.inf if high else -np.inf)


# What does not matter.


def test_the_order_of_the_arguments_changes_nothing(made: Path, tmp_path: Path) -> None:
    given = arguments(made)
    run(tmp_path / "a" / "out", **given)
    run(tmp_path / "b" / "out", **{k: v[::-1] for k, v in given.items()})
    assert all_bytes(tmp_path / "a") == all_bytes(tmp_path / "b")


@pytest.mark.parametrize("shuffle", ["epoch", "once", "none"])
def test_internal_sizes_change_nothing(
    shuffle: str, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {**arguments(made), "shuffle": shuffle, "target": "both", "scope": "column:kind", "rows_per_shard": 17}
    run(tmp_path / "usual", **settings)
    for jobs, chunk, batch in (("1", 300, 1 << 20), ("2", 1 << 20, 1), ("5", 900, 90)):
        monkeypatch.setattr(columns, "CHUNK_TOKENS", chunk)
        monkeypatch.setattr(scored, "BATCH_TOKENS", batch)
        run(tmp_path / "other", overwrite=True, jobs=jobs, **settings)
        without = ("README.md",)
        assert all_bytes(tmp_path / "other", without=without) == all_bytes(tmp_path / "usual", without=without)


# What sources are to each other.


def by_ids(out: Path, epoch: int) -> dict[tuple[int, ...], list[tuple[int, ...]]]:
    """Labels of each row of an epoch, by its ids; sorted, for rows that stand more than once."""
    found: dict[tuple[int, ...], list[tuple[int, ...]]] = {}
    for ids, _, labels in rows_in(out / f"epoch_{epoch:03d}"):
        found.setdefault(tuple(ids), []).append(tuple(labels))
    return {ids: sorted(labels) for ids, labels in found.items()}


@pytest.fixture(scope="module")
def long_rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = some_rows(300, lengths=(60, 90), distinct=None)
    return write_scored(tmp_path_factory.mktemp("long") / "scored", rows, rows_per_shard=100)


def test_equal_rows_of_two_sources_are_independent(long_rows: Path, tmp_path: Path) -> None:
    """The same directory under two names: whether one drops a token tells nothing of the other."""
    half = {"quantile": 1, "schedule": "constant", "max_rate": 0.5, "epochs": 1, "protect": "none"}
    masks = []
    for name in ("a", "b"):
        run(tmp_path / name, scored=[f"{name}={long_rows}"], **half)
        masks.append(by_ids(tmp_path / name, 0))
    pairs = [
        (x != -100, y != -100) for ids in masks[0] for x, y in zip(masks[0][ids][0], masks[1][ids][0], strict=True)
    ]
    trainable = [(x, y) for x, y in pairs if x or y]  # dropped by both looks like not trainable
    both, n = sum(x and y for x, y in trainable), len(trainable)
    assert abs(both / n - 1 / 3) < 6 * (2 / 9 / n) ** 0.5
    run(tmp_path / "mixed", scored=[f"a={long_rows}", f"b={long_rows}"], **half)
    together = by_ids(tmp_path / "mixed", 0)
    assert together == {ids: sorted([*masks[0][ids], *masks[1][ids]]) for ids in masks[0]}


def test_other_sources_and_weights_change_no_mask(long_rows: Path, made: Path, tmp_path: Path) -> None:
    """With a threshold of its own, a source's rows are the same whatever stands beside them and how often."""
    settings = {"scope": "source", "schedule": "constant"}
    run(tmp_path / "alone", scored=[f"a={long_rows}"], **settings)
    run(tmp_path / "mixed", scored=[f"a={long_rows}:3", f"code={made / 'code'}"], **settings)
    for epoch in (0, 1):
        alone, mixed = by_ids(tmp_path / "alone", epoch), by_ids(tmp_path / "mixed", epoch)
        distinct = 0
        for ids, labels in alone.items():
            assert len(mixed[ids]) == 3
            assert labels[0] in mixed[ids]
            distinct += len(set(mixed[ids])) == 3
        assert distinct > 0.95 * len(alone)


def test_repeats_stand_apart(long_rows: Path, tmp_path: Path) -> None:
    run(tmp_path / "out", scored=[f"a={long_rows}:2"])
    rows = [tuple(ids) for ids, _, _ in rows_in(tmp_path / "out" / "epoch_000")]
    near = sum(a == b for a, b in pairwise(rows))
    assert near < 10


def test_a_fraction_chooses_anew_each_epoch(tmp_path: Path) -> None:
    rows = some_rows(3000, lengths=(3, 6))
    write_scored(tmp_path / "scored", rows, rows_per_shard=3000)
    seen = []
    for name, weight in (("a", 0.25), ("b", 1.25), ("c", 0.25)):
        summary = run(tmp_path / name, scored=[f"{name}={tmp_path / 'scored'}:{weight}"], epochs=3)
        n = run(tmp_path / "whole", scored=[f"whole={tmp_path / 'scored'}"], overwrite=True).epochs[0]["rows"]
        for e in summary.epochs:
            assert abs(e["rows"] / n - weight) < 6 * (0.25 * 0.75 / n) ** 0.5
        assert len({e["rows"] for e in summary.epochs}) > 1
        if weight < 1:
            seen += [set(by_ids(tmp_path / name, e)) for e in range(3)]
    for i in range(len(seen)):
        for j in range(i):
            share = len(seen[i] & seen[j]) / len(seen[i])
            assert abs(share - 0.25) < 0.08  # six sigma of some 750 rows, and some rows that are alike


def test_plain_rows_keep_every_label(made: Path, tmp_path: Path) -> None:
    settings = {"quantile": 1, "min_rate": 1, "max_rate": 1, "target": "both", "protect": "none"}
    summary = run(tmp_path / "out", **arguments(made), **settings)
    for e in summary.epochs:
        assert e["sources"]["old"]["labels_left"] == e["sources"]["old"]["trainable"] > 0
        assert e["sources"]["old"]["dropped"] == 0
        assert e["sources"]["code"]["labels_left"] == e["sources"]["code"]["rows"]


def test_a_plain_source_beside_one_without_a_name(made: Path, tmp_path: Path) -> None:
    run(tmp_path / "out", scored=str(made / "code"), plain=[f"old={made / 'old'}"])
    expected, _ = naive_mixture({"source": Given(CODE), "old": Given(OLD, plain=True)}, Recipe(epochs=2), 1)
    assert rows_in(tmp_path / "out" / "epoch_001") == expected
    named = [f"source={made / 'code'}", f"old={made / 'old'}"]
    assert not verify(str(tmp_path / "out"), named).findings


# Going on.


def test_pieces_and_more_epochs(made: Path, tmp_path: Path) -> None:
    settings = {**arguments(made), "horizon": 4, "rows_per_shard": 20, "progress": "row"}
    run(tmp_path / "whole", epochs=4, **settings)
    for piece in ("2", "0-1", "3-3"):
        run(tmp_path / "pieces", epochs=4, only_epochs=piece, **settings)
        assert not verify(str(tmp_path / "pieces"), against(made)).findings
    run(tmp_path / "grown", epochs=2, **settings)
    run(tmp_path / "grown", epochs=4, **settings)
    whole = all_bytes(tmp_path / "whole", without=("README.md",))
    for name in ("pieces", "grown"):
        assert all_bytes(tmp_path / name, without=("README.md",)) == whole
        assert run(tmp_path / name, epochs=4, **settings).already_complete


@pytest.mark.parametrize("shuffle", ["epoch", "none"])
def test_a_killed_run_goes_on(shuffle: str, made: Path, tmp_path: Path) -> None:
    settings = {**arguments(made), "epochs": 6, "rows_per_shard": 6, "shuffle": shuffle, "plain_config": True}
    settings |= {"eval": str(write_scored(tmp_path / "held", some_rows(9, seed=5)))}
    run(tmp_path / "whole", **settings)
    process = multiprocessing.get_context("fork").Process(target=run, args=(tmp_path / "out",), kwargs=settings)
    process.start()
    while process.is_alive() and len(list((tmp_path / "out").glob("epoch_*/*.parquet"))) < 20:
        time.sleep(0.0005)
    os.kill(process.pid or 0, signal.SIGKILL)
    process.join()
    assert not (tmp_path / "out" / "manifest.json").exists()
    assert len(list((tmp_path / "out").rglob("*.parquet"))) >= 20
    run(tmp_path / "out", **settings)
    without = ("README.md",)
    assert all_bytes(tmp_path / "out", without=without) == all_bytes(tmp_path / "whole", without=without)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"scored": ["code={0}/code:3", "text={0}/text:0.5"]}, "sources.code.weight was 2.0, now 3.0"),
        ({"scored": ["code={0}/text:2", "text={0}/text:0.5"]}, "sources.code.scored was"),
        ({"scored": ["code={0}/code:2"]}, "sources.text was"),
        ({"plain": []}, "sources.old was"),
        ({"scope": "source"}, 'scope was "corpus", now "source"'),
    ],
)
def test_another_mixture_is_another_dataset(change: dict[str, Any], words: str, made: Path, tmp_path: Path) -> None:
    run(tmp_path / "out", **arguments(made))
    changed = {k: [x.format(made) for x in v] if isinstance(v, list) else v for k, v in change.items()}
    with pytest.raises(MismatchError) as problem:
        run(tmp_path / "out", **{**arguments(made), **changed})
    assert words in str(problem.value)


# Mistakes.


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["a={0}/code", "{0}/text"], ["no name", "NAME=SCORED"]),
        (["{0}/code", "{0}/text"], ["no name"]),
        (["a={0}/code", "a={0}/text"], ["two sources", "'a'"]),
        (["a={0}/code", "--plain", "a={0}/text"], ["two sources", "'a'"]),
        (["a={0}/code", "--plain", "{0}/text"], ["no name"]),
        (["a.b={0}/code", "c={0}/text"], ["a.b=", "no name"]),
        (["eval={0}/code"], ["'eval'"]),
        (["a={0}/code:0"], ["weight", "'a'", "0.001 to 100"]),
        (["a={0}/code:101"], ["weight", "101"]),
        (["a={0}/code:-1"], ["code:-1", "the weight '-1'"]),
        (["a={0}/code:1e1"], ["the weight '1e1'", "NAME=SCORED:2"]),
        (["{0}/code:2"], ["needs a name", "write NAME=", "code:2"]),
        (["a={0}/nowhere", "b={0}/code"], ["nowhere", "no such directory"]),
        (["a={0}/code", "--plain", "b={0}/other"], ["different tokenizers", "/code", "/other"]),
        (["a={0}/code", "b={0}/large"], ["different vocabulary sizes", "/code", "/large"]),
        (["a={0}/code", "--eval", "{0}/other"], ["different tokenizers", "/other"]),
        (["a={0}/code", "b={0}/old", "--keep-surprising", "1"], ["/old", "--keep-surprising"]),
        (["{0}/code", "--scope", "column:colour"], ["column:colour", "kept columns are: kind"]),
        (["a={0}/code", "b={0}/old", "--scope", "column:kind"], ["column:kind", "/old", "--keep-columns"]),
        (["{0}/code", "--scope", "column:row_id"], ["column:row_id"]),
        (["{0}/code", "--scope", "column:"], ["--scope", "column:C"]),
        (["{0}/code", "--scope", "corpse"], ["--scope", "corpse"]),
        (["{0}/code", "--scope", "source", "--threshold", "1"], ["--threshold", "--scope source"]),
        (["{0}/code", "--scope", "column:kind", "--threshold", "1"], ["--threshold", "--scope"]),
        (["{0}/many", "--scope", "column:n"], ["column:n", "more than 1,000"]),
        (["{0}/floats", "--scope", "column:n"], ["column:n", "double"]),
        (["a={0}/code", "b={0}/numbers", "--scope", "column:kind"], ["column:kind", "int64", "text"]),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else "",
)
def test_mistakes_are_told(given: list[str], words: list[str], made: Path, tmp_path: Path, capfd: Any) -> None:
    shutil.copytree(made, tmp_path / "in")
    other = copy(made / "code", tmp_path / "in" / "other")
    rewrite_manifest(other, tokenizer={**manifest_of(other)["tokenizer"], "digest": "1" * 64})
    large = copy(made / "code", tmp_path / "in" / "large")
    rewrite_manifest(large, model={**manifest_of(large)["model"], "vocab_size": 500})
    lots = some_rows(1200, lengths=(2, 3))
    with_column(write_scored(tmp_path / "in" / "many", lots, rows_per_shard=400), "n", pa.int64(), lambda r: r)
    with_column(write_scored(tmp_path / "in" / "floats", CODE), "n", pa.float64(), float)
    with_column(write_scored(tmp_path / "in" / "numbers", CODE), "kind", pa.int64(), lambda r: r % 3)
    command = ["materialize", *(x.format(tmp_path / "in") for x in given), "--out", str(tmp_path / "out")]
    capfd.readouterr()
    assert cli.run([*command, "--epochs", "2"]) == 2
    printed = capfd.readouterr()
    assert printed.out == "" or "more than 1,000" in words  # which only reading the rows tells
    assert printed.err.startswith("error: ")
    assert printed.err.count("\n") == 1
    for word in words:
        assert word in printed.err
    assert not (tmp_path / "out").exists() or not all_bytes(tmp_path / "out")


def test_paths_with_signs_in_them(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    odd = copy(made / "code", tmp_path / "a=b,c:2")
    for number, text in enumerate((f"./{odd.name}", str(odd))):
        run(tmp_path / f"one-{number}", scored=text)
        assert manifest_of(tmp_path / f"one-{number}")["identity"]["source"] == "source"
        assert not verify(str(tmp_path / f"one-{number}"), text).findings
        assert not verify(str(tmp_path / f"one-{number}"), odd.name).findings
    run(tmp_path / "named", scored=[f"x={odd.name}:1", f"y={odd.name}/", f"z={odd}:0.5"])
    told = manifest_of(tmp_path / "named")["identity"]["sources"]
    assert {name: s["weight"] for name, s in told.items()} == {"x": 1, "y": 1, "z": 0.5}
    assert not verify(str(tmp_path / "named"), [f"{n}={odd.name}" for n in "xyz"]).findings


def test_nothing_to_train_on(tmp_path: Path) -> None:
    rows = some_rows(5)
    rows.loss_mask[:] = False
    write_scored(tmp_path / "scored", rows)
    with pytest.raises(SourceError, match="no row has anything to train on"):
        run(tmp_path / "out", scored=[f"a={tmp_path / 'scored'}"])


# What is said, read and proved.


def test_a_source_that_no_epoch_has_is_named(made: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    few = write_scored(tmp_path / "few", some_rows(3))
    run(tmp_path / "out", scored=[f"few={few}:0.001", f"code={made / 'code'}"], epochs=2)
    assert ["no epoch has a row of few" in r.getMessage() for r in caplog.records if r.levelname == "WARNING"] == [True]


def test_what_is_said(made: Path, tmp_path: Path, capfd: Any) -> None:
    given = arguments(made)
    command = ["materialize", *given["scored"], "--plain", given["plain"][0], "--scope", "source"]
    assert cli.run([*command, "--epochs", "2", "--out", str(tmp_path / "out")]) == 0
    described = manifest_of(tmp_path / "out")
    assert [(s["name"], s["weight"], s["plain"]) for s in described["scored"]] == [
        ("code", 2.0, False),
        ("old", 1.5, True),
        ("text", 0.5, False),
    ]
    assert set(described["tau_nats"]) == {"code", "text"}
    said = capfd.readouterr().out
    assert cli.run(["inspect", str(tmp_path / "out")]) == 0
    printed = capfd.readouterr().out
    card = (tmp_path / "out" / "README.md").read_text()
    for told in ("weight 1.5, never masked", "weight 0.5"):
        assert told in printed
        assert told in card
    for e in described["epochs"]:
        for name, s in e["sources"].items():
            figures = [f"{s[n]:,}" for n in ("rows", "tokens", "trainable", "dropped", "labels_left")]
            cells = [str(e["epoch"]), name, *figures]
            assert f"| {' | '.join(cells)} |" in card
            assert cells in [line.split() for line in printed.splitlines()]
            assert cells in [line.split() for line in said.splitlines()]
    last = max(e["rows"] for e in described["epochs"]) - 1
    assert cli.run(["inspect", str(tmp_path / "out"), "--row", str(last)]) == 0
    assert cli.run(["inspect", str(tmp_path / "out"), "--row", str(last + 1)]) == 2


def test_load_dataset_reads_a_mixture(made: Path, tmp_path: Path) -> None:
    run(tmp_path / "out", **arguments(made), rows_per_shard=20)
    loaded = datasets.load_dataset(str(tmp_path / "out"), split="train", cache_dir=str(tmp_path / "cache"))
    rows = [*rows_in(tmp_path / "out" / "epoch_000"), *rows_in(tmp_path / "out" / "epoch_001")]
    assert [(r["input_ids"], r["attention_mask"], r["labels"]) for r in loaded] == rows


@pytest.fixture
def mixed(made: Path, tmp_path: Path) -> Path:
    run(tmp_path / "mixed", **arguments(made), rows_per_shard=25)
    return tmp_path / "mixed"


def test_a_tampered_mixture_is_found(mixed: Path, made: Path) -> None:
    name = manifest_of(mixed)["files"][1]["file"]
    table = pq.read_table(mixed / name)
    turned = table.take(pa.array(range(len(table) - 1, -1, -1)))
    reseal(mixed, name, turned)
    assert not verify(str(mixed)).findings
    findings = verify(str(mixed), against(made)).findings
    assert len(findings) == 1
    assert f"{name}: its masks are not those of the recipe" in findings[0]


def test_a_changed_manifest_is_found(mixed: Path, made: Path) -> None:
    described = manifest_of(mixed)
    weights = json.loads(json.dumps(described["identity"]))
    weights["sources"]["code"]["weight"] = 1.0
    rewrite_manifest(mixed, identity=weights)
    assert verify(str(mixed), against(made)).findings
    epochs = json.loads(json.dumps(described["epochs"]))
    epochs[1]["sources"]["old"]["eligible"] += 1
    rewrite_manifest(mixed, identity=described["identity"], epochs=epochs)
    assert any("epoch 1" in f and "(sources)" in f for f in verify(str(mixed), against(made)).findings)
    epochs[1]["sources"]["old"]["rows"] += 1
    rewrite_manifest(mixed, epochs=epochs)
    assert any("epoch 1" in f for f in verify(str(mixed)).findings)


def test_what_the_masks_are_proved_from(mixed: Path, made: Path, capfd: Any) -> None:
    options = [part for text in against(made) for part in ("--against", text)]
    assert cli.run(["verify", str(mixed), *options]) == 0
    assert cli.run(["verify", str(mixed)]) == 0
    for wrong, words in (
        (against(made, "code", "text"), ["code, old, text", "--against NAME=SCORED"]),
        ([*against(made), f"more={made / 'code'}"], ["more"]),
        ([str(made / "code")], ["--against NAME=SCORED"]),
        ([*against(made, "code", "old"), f"text={made / 'code'}"], ["it was not made from"]),
        ([*against(made, "code", "old"), f"text={made / 'nowhere'}"], ["nowhere"]),
    ):
        capfd.readouterr()
        assert cli.run(["verify", str(mixed), *(p for text in wrong for p in ("--against", text))]) == 2
        printed = capfd.readouterr().err
        for word in words:
            assert word in printed
    run(mixed.parent / "single", scored=str(made / "code"))
    assert verify(str(mixed.parent / "single"), against(made, "code", "text")).findings
    with pytest.raises(IntegrityError):
        verify(str(made / "code"), [str(made / "code")])
