"""Verify: whatever is wrong with a directory is found, and nothing is said of one that is whole."""

from __future__ import annotations

import datetime
import decimal
import random
import shutil
from collections.abc import Callable, Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from entrodrop_prep import cli
from entrodrop_prep.config import MaterializeConfig
from entrodrop_prep.errors import EntrodropError, IntegrityError
from entrodrop_prep.export.materialize import materialize
from entrodrop_prep.store import digest, manifest
from entrodrop_prep.store.schema import scored_schema
from entrodrop_prep.store.scored import ScoredDataset
from entrodrop_prep.verification.run import verify
from helpers.models import run_score, write_rows
from helpers.scored import all_bytes, copy, manifest_of, reseal, rewrite_manifest, seal, some_rows, write_scored

Damage = Callable[[Path], object]
FIRST, SECOND = "shard-00000.parquet", "shard-00001.parquet"
MASKED_FIRST, MASKED_SECOND = "epoch_000/train-00000-of-00003.parquet", "epoch_000/train-00001-of-00003.parquet"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a scored and a masked directory; never written to by a test."""
    folder = tmp_path_factory.mktemp("made")
    write_scored(folder / "scored", some_rows(24, lengths=(2, 20)), with_id=True)
    config = MaterializeConfig(scored=str(folder / "scored"), out=str(folder / "masked"), epochs=2, rows_per_shard=12)
    materialize(config)
    return folder


@pytest.fixture
def scored(made: Path, tmp_path: Path) -> Path:
    return copy(made / "scored", tmp_path / "scored")


@pytest.fixture
def masked(made: Path, tmp_path: Path) -> Path:
    return copy(made / "masked", tmp_path / "masked")


def check_refused(directory: Path, capfd: Any, *words: str, against: Path | None = None) -> None:
    """verify exits with 2 and says why on stderr, in lines that begin with ``error:``."""
    capfd.readouterr()
    assert cli.run(["verify", str(directory), *(["--against", str(against)] if against else [])]) == 2
    printed = capfd.readouterr()
    lines = printed.err.splitlines()
    assert lines
    assert all(line.startswith("error: ") for line in lines)
    assert "error:" not in printed.out
    for word in words:
        assert word in printed.err


def check_not_used(directory: Path, out: Path) -> None:
    """materialize refuses the scored directory and writes nothing under a final name."""
    with pytest.raises(EntrodropError):
        materialize(MaterializeConfig(scored=str(directory), out=str(out), epochs=1))
    assert not out.exists() or not [p for p in out.rglob("*") if p.suffix == ".parquet" or p.name == "manifest.json"]


def flip(path: Path, place: int, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1 << bit
    path.write_bytes(data)


def swap(directory: Path, a: str, b: str) -> None:
    (directory / a).rename(directory / "between")
    (directory / b).rename(directory / a)
    (directory / "between").rename(directory / b)


# What holds.


def test_whole_directories_hold(made: Path, capfd: Any) -> None:
    for arguments in (["scored"], ["masked"], ["masked", "--against", "scored"]):
        places = [a if a.startswith("--") else str(made / a) for a in arguments]
        assert cli.run(["verify", *places]) == 0
        printed = capfd.readouterr()
        assert printed.err == ""
        assert printed.out.endswith(f"\nOK: verified {places[0]}\n")
        assert ("masks not checked" in printed.out) == (arguments == ["masked"])


def test_verify_writes_nothing(made: Path) -> None:
    before = all_bytes(made)
    assert not verify(str(made / "masked"), str(made / "scored")).findings
    assert not verify(str(made / "scored")).findings
    assert all_bytes(made) == before


def test_moved_and_copied_directories_hold(scored: Path, masked: Path, tmp_path: Path) -> None:
    (tmp_path / "deep" / "er").mkdir(parents=True)
    shutil.move(scored, tmp_path / "deep" / "er" / "renamed")
    shutil.move(masked, tmp_path / "other name")
    scored, masked = tmp_path / "deep" / "er" / "renamed", tmp_path / "other name"
    for name in (".state.json", ".lock"):
        (masked / name).unlink(missing_ok=True)
    assert not verify(str(scored)).findings
    assert not verify(str(masked), str(scored)).findings
    config = MaterializeConfig(scored=str(scored), out=str(masked), epochs=2, rows_per_shard=12)
    assert materialize(config).already_complete


def test_the_card_is_the_users(masked: Path, scored: Path) -> None:
    (masked / "README.md").write_text("Mine now.")
    assert not verify(str(masked), str(scored)).findings
    (masked / "README.md").unlink()
    assert not verify(str(masked), str(scored)).findings


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As ``made``, with scores that ``score`` made."""
    folder = tmp_path_factory.mktemp("real")
    model = Path(cli.__file__).parents[1] / "demo" / "model"
    lines = [{"text": "def f(x):\n    return x + 1\n" * n, "name": f"n{n}", "when": {"year": n}} for n in range(1, 9)]
    lines += [{"text": "", "name": f"empty{n}", "when": None} for n in range(4)]
    source = write_rows(folder / "rows.jsonl", lines)
    settings = {"max_length": 40, "overlap": 5, "rows_per_shard": 3, "id_column": "name", "keep_columns": ("when",)}
    run_score(source, model, folder / "scored", **settings)
    config = {"scored": str(folder / "scored"), "out": str(folder / "masked"), "epochs": 2}
    materialize(MaterializeConfig(**config, add_columns=("n_trainable",)))
    return folder


def test_real_scores_hold(real: Path) -> None:
    assert verify(str(real / "scored")).findings == []
    assert verify(str(real / "masked"), str(real / "scored")).findings == []


# What does not.

SCORED_DAMAGE: dict[str, tuple[Damage, str]] = {
    "truncated": (lambda d: (d / SECOND).write_bytes((d / SECOND).read_bytes()[:-40]), SECOND),
    "emptied": (lambda d: (d / FIRST).write_bytes(b""), FIRST),
    "swapped": (lambda d: swap(d, FIRST, SECOND), FIRST),
    "a folder": (lambda d: ((d / SECOND).unlink(), (d / SECOND).mkdir()), SECOND),
    "not Parquet": (lambda d: (d / FIRST).write_bytes(b"x" * (d / FIRST).stat().st_size), FIRST),
    "no tokenizer": (lambda d: shutil.rmtree(d / "tokenizer"), "tokenizer"),
    "no unigram": (lambda d: (d / "unigram.npy").unlink(), "unigram.npy"),
    "manifest longer": (lambda d: (d / "manifest.json").open("ab").write(b"\n"), "manifest"),
}


@pytest.mark.parametrize("name", SCORED_DAMAGE)
def test_damaged_scored_directory(name: str, scored: Path, tmp_path: Path, capfd: Any) -> None:
    damage, word = SCORED_DAMAGE[name]
    damage(scored)
    check_refused(scored, capfd, word)
    check_not_used(scored, tmp_path / "out")


MASKED_DAMAGE: dict[str, tuple[Damage, str]] = {
    "truncated": (lambda d: (d / MASKED_FIRST).write_bytes((d / MASKED_FIRST).read_bytes()[:-1]), MASKED_FIRST),
    "swapped": (lambda d: swap(d, MASKED_FIRST, MASKED_SECOND), MASKED_FIRST),
    "epochs swapped": (lambda d: swap(d, "epoch_000", "epoch_001"), MASKED_FIRST),
    "missing": (lambda d: (d / MASKED_SECOND).unlink(), MASKED_SECOND),
    "missing epoch": (lambda d: shutil.rmtree(d / "epoch_001"), "epoch_001"),
    "extra": (lambda d: shutil.copy(d / MASKED_FIRST, d / "epoch_000" / "train-x.parquet"), "train-x.parquet"),
    "extra epoch": (lambda d: copy(d / "epoch_000", d / "epoch_002"), "epoch_002"),
    "another version": (lambda d: rewrite_manifest(d, schema="masked/7"), "masked/7"),
}


@pytest.mark.parametrize("name", MASKED_DAMAGE)
def test_damaged_masked_directory(name: str, masked: Path, scored: Path, capfd: Any) -> None:
    damage, word = MASKED_DAMAGE[name]
    damage(masked)
    check_refused(masked, capfd, word)
    check_refused(masked, capfd, word, against=scored)


@pytest.mark.parametrize("name", [FIRST, SECOND])
def test_every_flipped_bit_of_a_scored_shard_is_found(name: str, scored: Path, tmp_path: Path) -> None:
    check_flips(scored, name, 60, tmp_path / "out")


def test_every_flipped_bit_of_a_scored_manifest_is_found(scored: Path, tmp_path: Path) -> None:
    check_flips(scored, "manifest.json", 150, tmp_path / "out")
    text = (scored / "manifest.json").read_text()
    at = text.index("manifest_digest")
    for place in [*range(at - 1, at + 90, 4), text.index('"schema": "scored') + 12, text.index("sha256") + 12]:
        for bit in (0, 5):
            check_flip(scored, "manifest.json", place, bit, tmp_path / "out")


@pytest.mark.parametrize("name", ["unigram.npy", "tokenizer/tokenizer.json", "tokenizer/tokenizer_config.json"])
def test_every_flipped_bit_beside_the_shards_is_found(name: str, scored: Path, tmp_path: Path) -> None:
    check_flips(scored, name, 20, tmp_path / "out")


@pytest.mark.parametrize("name", [MASKED_FIRST, "epoch_001/train-00002-of-00003.parquet", "manifest.json"])
def test_every_flipped_bit_of_a_masked_directory_is_found(name: str, masked: Path) -> None:
    check_flips(masked, name, 60, None)


def check_flips(directory: Path, name: str, count: int, out: Path | None) -> None:
    """At ``count`` random places, and at each of the last 24 bytes, where Parquet keeps its footer's length."""
    size, rng = (directory / name).stat().st_size, random.Random(name)
    places = {*rng.sample(range(size - 24), count), *range(size - 24, size)}
    for place in sorted(places):
        check_flip(directory, name, place, rng.randrange(8), out)


def check_flip(directory: Path, name: str, place: int, bit: int, out: Path | None) -> None:
    flip(directory / name, place, bit)
    try:
        found = verify(str(directory)).findings
    except EntrodropError as e:
        found = [str(e)]
    assert found, f"bit {bit} of byte {place} of {name}"
    if out is not None:
        check_not_used(directory, out)
    flip(directory / name, place, bit)


def test_flipped_bits_in_the_footer_are_no_bug(scored: Path) -> None:
    """Opening reads the first shard's footer before its bytes are checked: whatever it makes of it is our error."""
    size = (scored / FIRST).stat().st_size
    length = int.from_bytes((scored / FIRST).read_bytes()[-8:-4], "little")
    rng = random.Random(1)
    refused = 0
    for turn in range(1200):  # the high bit of a letter leaves text that is no text
        place, bit = rng.randrange(size - 8 - length, size), 7 if turn % 2 else rng.randrange(8)
        flip(scored / FIRST, place, bit)
        try:
            ScoredDataset(scored)
        except IntegrityError:
            refused += 1
        flip(scored / FIRST, place, bit)
    assert refused > 100


def test_an_unfinished_directory(scored: Path, masked: Path, tmp_path: Path, capfd: Any) -> None:
    (masked / "manifest.json").unlink()
    check_refused(masked, capfd, "not finished", "entrodrop materialize")
    (scored / "manifest.json").unlink()
    manifest.write_state(scored, {"schema": "scored/1"})
    check_refused(scored, capfd, "not finished", "entrodrop score")
    check_not_used(scored, tmp_path / "out")


# Changes whose digests were put right again: a forger's, or a bug's.


def edited(table: pa.Table, column: str, change: Callable[[list[list[Any]]], None]) -> pa.Table:
    values = table[column].to_pylist()
    change(values)
    index = table.schema.get_field_index(column)
    return table.set_column(index, table.schema.field(column), pa.chunked_array([pa.array(values, table[column].type)]))


def test_masks_put_right_again_are_found_against_the_scores_only(masked: Path, scored: Path, capfd: Any) -> None:
    file = masked / MASKED_SECOND
    table = pq.read_table(file)

    def exchange(labels: list[list[int]]) -> None:
        """One label less and another more: every figure stays."""
        ids = table["input_ids"].to_pylist()
        row = next(r for r, x in enumerate(labels) if -100 in x[1:] and sum(y != -100 for y in x) > 1)
        gone, back = labels[row].index(-100, 1), next(t for t, x in enumerate(labels[row]) if x != -100)
        labels[row][gone], labels[row][back] = ids[row][gone], -100

    reseal(masked, MASKED_SECOND, edited(table, "labels", exchange))
    assert not verify(str(masked)).findings
    check_refused(masked, capfd, MASKED_SECOND, "masks are not those of the recipe", against=scored)


def test_another_order_is_found_against_the_scores(masked: Path, scored: Path, capfd: Any) -> None:
    table = pq.read_table(masked / MASKED_FIRST)
    turned = table.take(pa.array(range(len(table) - 1, -1, -1)))
    reseal(masked, MASKED_FIRST, turned.replace_schema_metadata(table.schema.metadata))
    assert not verify(str(masked)).findings
    check_refused(masked, capfd, MASKED_FIRST, against=scored)


def test_another_recipe_in_the_manifest_is_found(masked: Path, scored: Path, capfd: Any) -> None:
    described = manifest_of(masked)
    rewrite_manifest(masked, recipe={**described["recipe"], "max_rate": 0.7})
    check_refused(masked, capfd, "max_rate", against=scored)


@pytest.mark.parametrize("figure", ["eligible", "dropped", "rate_max"])
def test_wrong_figures_are_found_against_the_scores(figure: str, masked: Path, scored: Path, capfd: Any) -> None:
    epochs = manifest_of(masked)["epochs"]
    epochs[1][figure] = epochs[1][figure] / 2 if figure == "rate_max" else epochs[1][figure] // 2
    rewrite_manifest(masked, epochs=epochs)
    check_refused(masked, capfd, "figures of epoch 1 are not those of its files", figure, against=scored)


MASKED_NONSENSE: dict[str, tuple[str, Callable[[list[list[Any]]], None]]] = {
    "a first token has a label": ("labels", lambda rows: rows[0].__setitem__(0, 20)),
    "a label is not its token": ("labels", lambda rows: rows[0].__setitem__(-1, 21)),
    "a row has no label": ("labels", lambda rows: rows.__setitem__(0, [-100] * len(rows[0]))),
    "outside the vocabulary": ("input_ids", lambda rows: rows[1].__setitem__(0, 5000)),
    "attention_mask is not 1": ("attention_mask", lambda rows: rows[1].__setitem__(0, 0)),
    "different lengths": ("attention_mask", lambda rows: rows[1].append(1)),
}


@pytest.mark.parametrize("finding", MASKED_NONSENSE)
def test_masked_nonsense_is_found_without_the_scores(finding: str, masked: Path, capfd: Any) -> None:
    column, change = MASKED_NONSENSE[finding]
    reseal(masked, MASKED_FIRST, edited(pq.read_table(masked / MASKED_FIRST), column, change))
    check_refused(masked, capfd, finding)


SCORED_NONSENSE: dict[str, tuple[str, Callable[[list[Any]], None]]] = {
    "outside the vocabulary": ("input_ids", lambda rows: rows[0].__setitem__(1, 440)),
    "a first token has a loss": ("loss_mask", lambda rows: rows[0].__setitem__(0, True)),
    "entropy is null where": ("entropy", lambda rows: rows[0].__setitem__(1, None)),
    "entropy holds a value that is none": ("entropy", lambda rows: rows[0].__setitem__(1, float("nan"))),
    "logprob holds a value that is none": ("logprob", lambda rows: rows[0].__setitem__(1, 2.0)),
    "or not null where it must": ("logprob", lambda rows: rows[0].__setitem__(0, -1.0)),
    "different lengths": ("entropy", lambda rows: rows[0].append(1.0)),
    "not in order": ("row_id", lambda rows: rows.__setitem__(0, rows[1])),
    "a row outside": ("row_id", lambda rows: rows.__setitem__(-1, 99)),
    "unigram.npy": ("input_ids", lambda rows: rows[0].__setitem__(1, rows[0][1] + 1)),
    "trainable_tokens": ("loss_mask", lambda rows: rows[0].__setitem__(-1, not rows[0][-1])),
}


@pytest.mark.parametrize("finding", SCORED_NONSENSE)
def test_scored_nonsense_is_found(finding: str, scored: Path, capfd: Any) -> None:
    column, change = SCORED_NONSENSE[finding]
    reseal(scored, FIRST, edited(pq.read_table(scored / FIRST), column, change))
    check_refused(scored, capfd, finding)


def test_a_column_too_many_or_of_another_type_is_found(scored: Path, masked: Path, tmp_path: Path, capfd: Any) -> None:
    table = pq.read_table(masked / MASKED_FIRST)
    more = table.append_column("position_ids", table["input_ids"]).replace_schema_metadata(table.schema.metadata)
    reseal(masked, MASKED_FIRST, more)
    check_refused(masked, capfd, MASKED_FIRST, "columns")
    table = pq.read_table(scored / SECOND)
    half = scored_schema("float16", with_id=True)
    columns = [pc.cast(table[f.name], f.type, safe=False) for f in half]
    reseal(scored, SECOND, pa.table(columns, schema=half))
    check_refused(scored, capfd, SECOND, "entropy")
    check_not_used(scored, tmp_path / "out")


def changed(value: Any, *path: Any) -> Any:
    """A copy with another value at one place."""
    if not path:
        return not value if isinstance(value, bool) else value + 1 if isinstance(value, int) else f"{value}x"
    copied = dict(value) if isinstance(value, dict) else list(value)
    copied[path[0]] = changed(copied[path[0]], *path[1:])
    return copied


def test_what_a_manifest_says_is_compared_with_the_footers(real: Path, tmp_path: Path, capfd: Any) -> None:
    """Every count, digest and version of a scored directory, changed under a digest that was made new."""
    scored = copy(real / "scored", tmp_path / "scored")
    described = manifest_of(scored)
    versions = [("environments", 0, "environment", name) for name in described["environments"][0]["environment"]]
    counts = [("counts", name) for name in described["counts"]]
    assert len(counts) == 10
    files = [("files", 1, name) for name in ("rows", "tokens", "trainable_tokens", "bytes", "sha256")]
    shards = [("environments", 0, "shards", 0), ("source", "digest"), ("identity", "score_dtype")]
    for path in [*versions, *counts, *files, *shards, ("identity", "overlap"), ("identity", "id_column")]:
        rewrite_manifest(scored, **{path[0]: changed(described, *path)[path[0]]})
        check_refused(scored, capfd)
    rewrite_manifest(scored, **{**described, "identity": changed(described["identity"], "overlap")})
    seal(scored)
    check_refused(scored, capfd, "the identity is not that of shard 0")
    rewrite_manifest(scored, **described)
    assert not verify(str(scored)).findings


@pytest.mark.parametrize(
    "path",
    [
        ("epochs", 1, "folder"),
        ("epochs", 1, "epoch"),
        ("identity", "add_columns", 0),
        ("files", 1, "epoch"),
        ("files", 1, "tokens"),
    ],
)
def test_a_masked_manifest_with_names_that_are_none_is_a_finding(
    path: tuple[Any, ...], real: Path, tmp_path: Path, capfd: Any
) -> None:
    masked = copy(real / "masked", tmp_path / "masked")
    described = manifest_of(masked)
    rewrite_manifest(masked, **changed(described, *path))
    check_refused(masked, capfd)


def test_files_in_each_others_place_are_found_under_new_digests(made: Path, masked: Path, capfd: Any) -> None:
    """As a run that was continued over a mistaken copy once finished."""
    swap(masked, MASKED_FIRST, MASKED_SECOND)
    seal(masked, MASKED_FIRST, MASKED_SECOND)
    check_refused(
        masked, capfd, "by its footer it is epoch_000/train-00001", "by its footer it is epoch_000/train-00000"
    )


def test_wrong_scores_to_prove_from(made: Path, masked: Path, scored: Path, capfd: Any) -> None:
    check_refused(masked, capfd, "it is a masked directory", against=made / "masked")
    flip(scored / SECOND, 300, 2)
    check_refused(masked, capfd, SECOND, against=scored)


def test_inspect_refuses_what_is_damaged(scored: Path, masked: Path, capfd: Any) -> None:
    for directory in (scored, masked):
        assert cli.run(["inspect", str(directory)]) == 0
        assert cli.run(["inspect", str(directory), "--row", "1"]) == 0
        assert cli.run(["inspect", str(directory), "--row", "100000"]) == 2
        flip(directory / "manifest.json", 200, 1)
        capfd.readouterr()
        assert cli.run(["inspect", str(directory)]) == 2
        assert capfd.readouterr().err.startswith("error: ")


def test_content_digests_do_not_depend_on_batches_or_files(tmp_path: Path) -> None:
    """For every type that a kept column may have, with nulls at every level."""
    rng = random.Random(0)
    day, moment = datetime.date(2024, 2, 29), datetime.datetime(2024, 2, 29, 12, 30)
    kinds: dict[str, tuple[pa.DataType, list[Any]]] = {
        "integer": (pa.int64(), [1, -5]),
        "number": (pa.float64(), [0.5, float("nan")]),
        "flag": (pa.bool_(), [True, False]),
        "text": (pa.string(), ["", "Grüße", "a"]),
        "bytes": (pa.binary(), [b"\xff\x00", b""]),
        "day": (pa.date32(), [day]),
        "moment": (pa.timestamp("us"), [moment]),
        "moment in a zone": (pa.timestamp("us", "UTC"), [moment]),
        "time": (pa.time64("us"), [moment.time()]),
        "duration": (pa.duration("us"), [datetime.timedelta(1, 2, 3)]),
        "decimal": (pa.decimal128(8, 2), [decimal.Decimal("1.25")]),
        "nothing": (pa.null(), []),
        "list": (pa.list_(pa.timestamp("us")), [[], [moment, None], [None]]),
        "lists": (pa.list_(pa.list_(pa.string())), [[], [None, ["a", None]], [[]]]),
        "struct": (pa.struct([("a", pa.date32()), ("b", pa.string())]), [{"a": day, "b": None}, {"a": None, "b": "x"}]),
        "structs": (pa.list_(pa.struct([("a", pa.int64())])), [[], [None, {"a": None}], [{"a": 2}]]),
        "map": (pa.map_(pa.string(), pa.int64()), [[], [("a", 1), ("b", None)]]),
    }
    schema = pa.schema([pa.field(name, kind) for name, (kind, _) in kinds.items()])
    table = pa.table([pa.array(rng.choices([None, *v], k=200), kind) for kind, v in kinds.values()], schema=schema)
    pq.write_table(table, tmp_path / "table.parquet")
    edges = [0, 1, 1, 63, 130, 200]
    with pq.ParquetFile(tmp_path / "table.parquet") as file:
        found = {
            digest_of(schema, parts)
            for parts in (
                [table],
                [table.slice(a, b - a) for a, b in pairwise(edges)],
                file.iter_batches(batch_size=7),
                file.iter_batches(batch_size=1000),
            )
        }
    assert len(found) == 1
    for name in schema.names:
        if name != "nothing":
            index = schema.get_field_index(name)
            other = table.set_column(index, schema.field(name), table[name].take(pa.array(range(199, -1, -1))))
            assert digest_of(schema, [other]) not in found


def digest_of(schema: pa.Schema, parts: Iterable[Any]) -> str:
    content = digest.ContentDigest(schema)
    for part in parts:
        content.update(part)
    return content.hexdigest()


def test_row_ids_beyond_the_shards_do_not_matter(tmp_path: Path) -> None:
    """Rows that were left out of the source leave gaps, and whole shards may be empty."""
    rows = some_rows(6)
    rows.row_id[:] = np.array([1, 2, 5, 9, 9, 9, 30, 50])
    assert not verify(str(write_scored(tmp_path / "scored", rows, rows_per_shard=4))).findings
