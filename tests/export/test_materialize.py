"""Materialize: against the contract read token by token, and what it promises of its directory."""

from __future__ import annotations

import json
import logging
import math
import multiprocessing
import platform
import re
import resource
import shutil
import signal
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from entrodrop_prep import cli
from entrodrop_prep.config import MaterializeConfig, Recipe
from entrodrop_prep.errors import ConfigError, DiskSpaceError, IntegrityError, MismatchError, OutputError, SourceError
from entrodrop_prep.export import epoch as epoch_module
from entrodrop_prep.masking import columns
from entrodrop_prep.store import manifest, scored
from entrodrop_prep.store import shards as shard_files
from entrodrop_prep.store.locks import locked
from entrodrop_prep.store.rows import Rows
from entrodrop_prep.verification.run import verify
from helpers.contract import SPECIAL, naive_rate, plain_rows
from helpers.mixtures import Given, Row, naive_mixture, rows_in
from helpers.mixtures import run_materialize as run
from helpers.scored import FIRST_PLAIN_ID, VOCABULARY, all_bytes, copy, some_rows, write_scored
from helpers.tokenizers import byte_bpe

TARGETS, SELECTS, SCOPES = ["labels", "inputs", "both"], ["low-entropy", "high-entropy", "random"], ["corpus", "row"]
SCHEDULES, PROGRESS = ["sigmoid", "linear", "cosine", "constant", "step"], ["epoch", "row"]
SHUFFLES = ["epoch", "once", "none"]
ROWS = some_rows(40)


def epoch_rows(out: Path, epoch: int) -> list[Row]:
    return rows_in(out / f"epoch_{epoch:03d}")


@pytest.fixture(scope="module")
def scored_at(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_scored(tmp_path_factory.mktemp("scored") / "scored", ROWS)


# The contract, read literally.


def check(rows: Rows, scored_at: Path, out: Path, **settings: Any) -> None:
    """Files and figures of every epoch are those of the naive reading."""
    naive = {k: settings.pop(k) for k in ("protected", "drop_id") if k in settings}
    summary = run(scored_at, out, **settings)
    recipe = Recipe(**{"epochs": 2, **{k: v for k, v in settings.items() if k in Recipe.__dataclass_fields__}})
    assert [e["epoch"] for e in summary.epochs] == list(range(recipe.epochs))
    for e in summary.epochs:
        expected, counts = naive_mixture({"source": Given(rows)}, recipe, e["epoch"], **naive)
        assert epoch_rows(out, e["epoch"]) == expected
        assert {k: e[k] for k in counts["source"]} == counts["source"]


@pytest.mark.parametrize(
    ("number", "target", "select", "scope", "schedule"),
    [(n, *modes, SCHEDULES[n % len(SCHEDULES)]) for n, modes in enumerate(product(TARGETS, SELECTS, SCOPES))],
)
def test_every_mode_is_what_the_contract_says(
    number: int, target: str, select: str, scope: str, schedule: str, scored_at: Path, tmp_path: Path
) -> None:
    check(
        ROWS,
        scored_at,
        tmp_path / "out",
        target=target,
        select=select,
        scope=scope,
        schedule=schedule,
        progress=PROGRESS[number % 2],
        shuffle=SHUFFLES[number // 2 % 3],
        max_rate=0.95,
        seed=number,
        rows_per_shard=[7, 1000, 1][number % 3],
    )


@pytest.mark.parametrize(
    "settings",
    [
        {"quantile": 0},
        {"quantile": 1, "max_rate": 1, "min_rate": 1},
        {"quantile": 0.21, "scope": "row"},
        {"quantile": 0.3, "select": "high-entropy", "max_rate": 1},
        {"threshold": 0.8, "schedule": "constant"},
        {"threshold": 3.04, "select": "high-entropy", "schedule": "constant"},
        {"threshold": 0.0, "schedule": "constant", "max_rate": 1},
        {"keep_surprising": 1.5, "max_rate": 1, "schedule": "constant"},
        {"rates": (0.0, 0.25, 1.0), "epochs": 3},
        {"rates": (0.1, 0.2, 0.9, 1.0), "epochs": 2, "horizon": 4},
        {"horizon": 1, "epochs": 3},
        {"horizon": 7, "progress": "row", "schedule": "linear"},
        {"protect": "none", "protected": set(), "quantile": 1, "max_rate": 1, "schedule": "constant"},
        {"protect": "20,30,31", "protected": {20, 30, 31}, "quantile": 1, "max_rate": 1, "schedule": "constant"},
        {"protect": "special,40", "protected": SPECIAL | {40}, "quantile": 1, "schedule": "constant"},
        {"target": "inputs", "drop_token": "77", "drop_id": 77, "schedule": "constant"},
        {"target": "both", "drop_token": "e", "drop_id": byte_bpe().convert_tokens_to_ids("e"), "quantile": 1},
        {"seed": 2**63 - 1, "steepness": 3.5, "midpoint": 0.2, "min_rate": 0.1, "max_rate": 0.4},
        {"schedule": "step", "midpoint": 0.75, "min_rate": 0.25, "max_rate": 0.25},
    ],
    ids=str,
)
def test_every_setting_is_what_the_contract_says(settings: dict[str, Any], scored_at: Path, tmp_path: Path) -> None:
    check(ROWS, scored_at, tmp_path / "out", **settings)


def test_half_precision_scores_without_logprob(tmp_path: Path) -> None:
    rows = some_rows(30, seed=5, dtype=np.float16, distinct=None)
    at = write_scored(tmp_path / "scored", rows, logprob=False, with_id=True, rows_per_shard=30)
    check(rows, at, tmp_path / "out", quantile=0.37, scope="corpus", target="both", schedule="constant")


# What the files do not depend on.


def test_file_size_changes_nothing_else(scored_at: Path, tmp_path: Path) -> None:
    for size in (1, 5, 13, 1000):
        run(scored_at, tmp_path / str(size), rows_per_shard=size, target="both", progress="row", max_rate=0.95)
        files = len(list((tmp_path / str(size) / "epoch_001").iterdir()))
        assert files == math.ceil(len(epoch_rows(tmp_path / "1", 1)) / size)
        assert all(epoch_rows(tmp_path / str(size), e) == epoch_rows(tmp_path / "1", e) for e in (0, 1))


def test_scored_shard_size_changes_nothing(scored_at: Path, tmp_path: Path) -> None:
    run(scored_at, tmp_path / "8", target="both")
    for size in (1, 3, 40):
        write_scored(tmp_path / f"scored-{size}", ROWS, rows_per_shard=size)
        run(tmp_path / f"scored-{size}", tmp_path / str(size), target="both")
        assert all(epoch_rows(tmp_path / str(size), e) == epoch_rows(tmp_path / "8", e) for e in (0, 1))


@pytest.mark.parametrize("shuffle", SHUFFLES)
def test_internal_sizes_change_nothing(
    shuffle: str, scored_at: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"shuffle": shuffle, "progress": "row", "target": "both", "rows_per_shard": 9}
    run(scored_at, tmp_path / "usual", **settings)
    for jobs, chunk, batch in (("1", 300, 1 << 20), ("2", 1 << 20, 1), ("3", 1, 90), ("auto", 5000, 333)):
        monkeypatch.setattr(columns, "CHUNK_TOKENS", chunk)
        monkeypatch.setattr(columns, "MAPPED_BYTES", chunk)
        monkeypatch.setattr(scored, "BATCH_TOKENS", batch)
        run(scored_at, tmp_path / "other", overwrite=True, jobs=jobs, **settings)
        assert all_bytes(tmp_path / "other", without=("README.md",)) == all_bytes(
            tmp_path / "usual", without=("README.md",)
        )
    monkeypatch.setattr(epoch_module, "GROUP_TOKENS", 50)
    run(scored_at, tmp_path / "groups", **settings)
    assert pq.read_metadata(min((tmp_path / "groups" / "epoch_000").iterdir())).num_row_groups > 1
    assert all(epoch_rows(tmp_path / "groups", e) == epoch_rows(tmp_path / "usual", e) for e in (0, 1))


def test_rows_are_exactly_three_plain_columns(scored_at: Path, tmp_path: Path) -> None:
    run(scored_at, tmp_path / "out")
    files = sorted((tmp_path / "out").rglob("*.parquet"))
    assert [f.relative_to(tmp_path / "out").as_posix() for f in files] == [
        "epoch_000/train-00000-of-00001.parquet",
        "epoch_001/train-00000-of-00001.parquet",
    ]
    for file in files:
        schema = pq.read_schema(file)
        assert schema.names == ["input_ids", "attention_mask", "labels"]
        assert [t.value_type for t in schema.types] == [pa.int32(), pa.int8(), pa.int32()]
        assert all(pa.types.is_list(t) for t in schema.types)
        assert sum(c.null_count for c in pq.read_table(file).columns) == 0


@pytest.mark.parametrize("compression", ["zstd", "snappy", "none"])
def test_compression(compression: str, scored_at: Path, tmp_path: Path) -> None:
    run(scored_at, tmp_path / "out", compression=compression)
    metadata = pq.read_metadata(tmp_path / "out" / "epoch_000" / "train-00000-of-00001.parquet")
    columns = [metadata.row_group(0).column(i) for i in range(3)]
    assert columns[0].compression == {"zstd": "ZSTD", "snappy": "SNAPPY", "none": "UNCOMPRESSED"}[compression]
    assert all(c.has_offset_index and c.has_column_index for c in columns)
    ids, mask, labels = (set(c.encodings) - {"RLE"} for c in columns)
    tabled = {"PLAIN", "RLE_DICTIONARY"}  # the dictionary itself is plain
    assert ids == (tabled if compression == "none" else {"BYTE_STREAM_SPLIT"})
    assert labels == ({"PLAIN"} if compression == "zstd" else tabled)
    assert mask == {"PLAIN"}
    run(scored_at, tmp_path / "usual")
    assert epoch_rows(tmp_path / "out", 1) == epoch_rows(tmp_path / "usual", 1)


def test_files_of_other_encodings_are_read_verified_and_continued(
    scored_at: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As version 0.1.0 wrote them."""
    lists = ["input_ids.list.element", "labels.list.element"]
    with monkeypatch.context() as earlier:
        earlier.setattr(shard_files, "encodings", lambda schema, compression: {"use_dictionary": lists})
        run(scored_at, tmp_path / "out", epochs=3, rows_per_shard=20)

    def digests() -> dict[str, str]:
        paths = sorted((tmp_path / "out").rglob("*.parquet"))
        return {str(p.relative_to(tmp_path)): shard_files.read_footer(p).content_digest for p in paths}

    before = digests()
    assert run(scored_at, tmp_path / "out", epochs=3, rows_per_shard=20).already_complete
    gone = sorted((tmp_path / "out").rglob("*.parquet"))[1::2]
    for path in gone:
        path.unlink()
    (tmp_path / "out" / "manifest.json").unlink()
    assert not run(scored_at, tmp_path / "out", epochs=3, rows_per_shard=20).already_complete
    assert digests() == before
    found = {
        "RLE_DICTIONARY" in pq.read_metadata(p).row_group(0).column(0).encodings
        for p in (tmp_path / "out").rglob("*.parquet")
    }
    assert found == {True, False}
    assert not verify(str(tmp_path / "out"), [str(scored_at)]).findings


# More epochs, pieces, and running again.


def test_more_epochs_leave_the_earlier_ones_as_they_are(scored_at: Path, tmp_path: Path) -> None:
    run(scored_at, tmp_path / "out", epochs=2, horizon=5, progress="row")
    before = all_bytes(tmp_path / "out", without=("README.md", "manifest.json", "entropy.svg"))
    summary = run(scored_at, tmp_path / "out", epochs=4, horizon=5, progress="row")
    after = all_bytes(tmp_path / "out")
    assert {k: v for k, v in after.items() if k in before} == before
    assert summary.written_tokens == sum(e["tokens"] for e in summary.epochs[2:])
    run(scored_at, tmp_path / "whole", epochs=4, horizon=5, progress="row")
    assert all_bytes(tmp_path / "whole", without=("README.md",)) == all_bytes(tmp_path / "out", without=("README.md",))
    assert [c["config_name"] for c in front_matter(tmp_path / "out")["configs"]][1:] == [
        f"epoch_{e:03d}" for e in range(4)
    ]
    assert not verify(str(tmp_path / "out"), str(scored_at)).findings


def test_fewer_epochs_than_are_there_take_none_away(scored_at: Path, tmp_path: Path) -> None:
    run(scored_at, tmp_path / "out", epochs=3, horizon=3)
    before = all_bytes(tmp_path / "out")
    assert run(scored_at, tmp_path / "out", epochs=1, horizon=3).already_complete
    assert all_bytes(tmp_path / "out") == before


def test_another_horizon_is_another_dataset(scored_at: Path, tmp_path: Path) -> None:
    run(scored_at, tmp_path / "out", epochs=2)
    with pytest.raises(MismatchError, match=r"horizon was 2, now 3; add --horizon 2 to add epochs"):
        run(scored_at, tmp_path / "out", epochs=3)


def test_pieces_make_the_whole(scored_at: Path, tmp_path: Path) -> None:
    run(scored_at, tmp_path / "whole", epochs=5, progress="row")
    for piece in ("3", "0-1", "4-4", "2-3"):
        run(scored_at, tmp_path / "pieces", epochs=5, only_epochs=piece, progress="row")
        assert not verify(str(tmp_path / "pieces"), str(scored_at)).findings
    assert all_bytes(tmp_path / "pieces", without=("README.md",)) == all_bytes(
        tmp_path / "whole", without=("README.md",)
    )
    assert front_matter(tmp_path / "pieces") == front_matter(tmp_path / "whole")


def test_pieces_written_elsewhere_are_joined_by_copying(scored_at: Path, tmp_path: Path) -> None:
    run(scored_at, tmp_path / "whole", epochs=4)
    run(scored_at, tmp_path / "here", epochs=4, only_epochs="0-1")
    run(scored_at, tmp_path / "there", epochs=4, only_epochs="2-3")
    for folder in ("epoch_002", "epoch_003"):
        shutil.copytree(tmp_path / "there" / folder, tmp_path / "here" / folder)
    summary = run(scored_at, tmp_path / "here", epochs=4)
    assert summary.written_tokens == 0
    assert all_bytes(tmp_path / "here", without=("README.md",)) == all_bytes(tmp_path / "whole", without=("README.md",))


def stats(out: Path) -> dict[str, tuple[int, int, int]]:
    found = {p.relative_to(out).as_posix(): p.stat() for p in sorted(out.rglob("*")) if p.name != ".lock"}
    return {k: (s.st_mtime_ns, s.st_size, s.st_ino) for k, s in found.items()}


def test_running_again_changes_nothing(scored_at: Path, tmp_path: Path) -> None:
    first = run(scored_at, tmp_path / "out")
    before, bytes_before = stats(tmp_path / "out"), all_bytes(tmp_path / "out")
    again = run(scored_at, tmp_path / "out")
    assert again.already_complete
    assert again.epochs == first.epochs
    assert stats(tmp_path / "out") == before
    assert all_bytes(tmp_path / "out") == bytes_before


def test_running_again_does_not_read_the_scores(scored_at: Path, tmp_path: Path) -> None:
    copy(scored_at, tmp_path / "scored")
    run(tmp_path / "scored", tmp_path / "out")
    for shard in sorted((tmp_path / "scored").glob("*.parquet"))[1:]:
        shard.write_bytes(b"")
    assert run(tmp_path / "scored", tmp_path / "out").already_complete


def test_a_moved_scored_directory_is_the_same(scored_at: Path, tmp_path: Path) -> None:
    run(scored_at, tmp_path / "out")
    copy(scored_at, tmp_path / "elsewhere")
    assert run(tmp_path / "elsewhere", tmp_path / "out").already_complete


def test_a_missing_file_is_made_again(scored_at: Path, tmp_path: Path) -> None:
    run(scored_at, tmp_path / "out", rows_per_shard=10)
    before = all_bytes(tmp_path / "out")
    for name in ("epoch_000/train-00001-of-00005.parquet", "epoch_001/train-00004-of-00005.parquet", "README.md"):
        (tmp_path / "out" / name).unlink()
    run(scored_at, tmp_path / "out", rows_per_shard=10)
    assert all_bytes(tmp_path / "out") == before
    (tmp_path / "out" / "README.md").unlink()
    assert run(scored_at, tmp_path / "out", rows_per_shard=10).already_complete
    assert all_bytes(tmp_path / "out") == before


@pytest.mark.parametrize("lose_manifest", [False, True])
def test_a_damaged_file_is_not_taken_over(lose_manifest: bool, scored_at: Path, tmp_path: Path) -> None:
    run(scored_at, tmp_path / "out", horizon=4)
    file = tmp_path / "out" / "epoch_000" / "train-00000-of-00001.parquet"
    data = bytearray(file.read_bytes())
    data[len(data) // 3] ^= 4
    file.write_bytes(data)
    if lose_manifest:
        (tmp_path / "out" / "manifest.json").unlink()
    with pytest.raises(IntegrityError, match=re.escape("epoch_000/train-00000-of-00001.parquet")):
        run(scored_at, tmp_path / "out", horizon=4, epochs=3)
    file.unlink()
    run(scored_at, tmp_path / "out", horizon=4, epochs=3)
    run(scored_at, tmp_path / "whole", horizon=4, epochs=3)
    assert all_bytes(tmp_path / "out", without=("README.md",)) == all_bytes(tmp_path / "whole", without=("README.md",))


@pytest.mark.parametrize("other", ["epoch_000/train-00002", "epoch_001/train-00001"])
@pytest.mark.parametrize("lose_manifest", [True, False])
def test_a_file_in_the_place_of_another_is_not_taken_over(
    other: str, lose_manifest: bool, scored_at: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    settings = {"rows_per_shard": 11, "horizon": 3}
    run(scored_at, out, **settings)
    expected = all_bytes(out)
    place, (taken,) = next(out.glob("epoch_000/train-00001-*")), out.glob(f"{other}-*")
    shutil.copy(taken, place)
    if lose_manifest:
        (out / "manifest.json").unlink()
    with pytest.raises(IntegrityError, match=f"{place.name}: by its footer it is {other}"):
        run(scored_at, out, **settings, epochs=2 if lose_manifest else 3)
    place.unlink()
    run(scored_at, out, **settings)
    assert all_bytes(out) == expected


def test_the_private_note_is_not_needed_to_tell_whose_an_unfinished_directory_is(
    scored_at: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    run(scored_at, out, rows_per_shard=11)
    expected = all_bytes(out)
    for name in ("manifest.json", ".state.json"):
        (out / name).unlink()
    next(out.glob("epoch_001/*")).unlink()
    with pytest.raises(MismatchError, match="rows_per_shard was 11, now 12"):
        run(scored_at, out, rows_per_shard=12)
    run(scored_at, out, rows_per_shard=11)
    assert all_bytes(out) == expected


def test_what_an_overwriting_run_was_killed_over_goes_too(scored_at: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(scored_at, out, rows_per_shard=11, plain_config=True)
    (out / "manifest.json").unlink()
    manifest.write_state(out, {"schema": "masked/1", "parts": ["plain"], "layouts": []})
    run(scored_at, out, seed=2)
    run(scored_at, tmp_path / "whole", seed=2)
    assert all_bytes(out, without=("README.md",)) == all_bytes(tmp_path / "whole", without=("README.md",))


def test_leftovers_are_removed_and_nothing_else(scored_at: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(scored_at, out, rows_per_shard=11)
    expected = all_bytes(out)
    (out / "mine" / "epoch_000").mkdir(parents=True)
    for folder in (out / "mine", out / "mine" / "epoch_000"):
        (folder / ".tmp-notes.part").write_text("mine")
    for name in ("epoch_001/.tmp-train-00000-of-00004.parquet.part", ".tmp-README.md.part"):
        (out / name).write_text("x")
    run(scored_at, out, rows_per_shard=11)
    mine = {"mine/.tmp-notes.part": b"mine", "mine/epoch_000/.tmp-notes.part": b"mine"}
    assert all_bytes(out) == expected | mine


def test_the_picture_is_proved_and_made_again(scored_at: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(scored_at, out, horizon=5)
    expected, picture = all_bytes(out), out / "entropy.svg"
    for damage in (picture.unlink, lambda: picture.write_bytes(b""), lambda: picture.write_bytes(b"<svg/>")):
        damage()
        assert any("entropy.svg" in finding for finding in verify(str(out)).findings)
        run(scored_at, out, horizon=5)
        assert all_bytes(out) == expected
    run(scored_at, out, epochs=4, horizon=5)
    run(scored_at, tmp_path / "whole", epochs=4, horizon=5)
    assert not verify(str(out), str(scored_at)).findings
    assert (out / "manifest.json").read_bytes() == (tmp_path / "whole" / "manifest.json").read_bytes()
    (out / "README.md").unlink()
    run(scored_at, out, epochs=4, horizon=5, layout="jsonl")
    assert not verify(str(out)).findings
    listed = [e["file"] for e in json.loads((out / "manifest.json").read_bytes())["files"]]
    assert listed.count("entropy.svg") == 1


def test_another_recipe_is_refused_with_the_names_of_what_differs(scored_at: Path, tmp_path: Path) -> None:
    run(scored_at, tmp_path / "out")
    before = all_bytes(tmp_path / "out")
    with pytest.raises(MismatchError) as problem:
        run(scored_at, tmp_path / "out", seed=3, target="both", quantile=0.25, rows_per_shard=5)
    for text in ("seed was 0, now 3", 'target was "labels", now "both"', "quantile was 0.5, now 0.25"):
        assert text in str(problem.value)
    assert "rows_per_shard was 100000, now 5" in str(problem.value)
    assert "max_rate" not in str(problem.value)
    other = write_scored(tmp_path / "other", some_rows(9, seed=8))
    with pytest.raises(MismatchError, match="scored was"):
        run(other, tmp_path / "out")
    assert all_bytes(tmp_path / "out") == before


def test_the_default_quantile_may_be_named(scored_at: Path, tmp_path: Path) -> None:
    run(scored_at, tmp_path / "out")
    assert run(scored_at, tmp_path / "out", quantile=0.5, horizon=2).already_complete


def test_overwrite(scored_at: Path, tmp_path: Path) -> None:
    run(scored_at, tmp_path / "out", epochs=4, rows_per_shard=9)
    (tmp_path / "out" / "notes.txt").write_text("mine")
    run(scored_at, tmp_path / "out", epochs=2, seed=4, overwrite=True)
    run(scored_at, tmp_path / "fresh", epochs=2, seed=4)
    assert (tmp_path / "out" / "notes.txt").read_text() == "mine"
    without = ("README.md", "notes.txt")
    assert all_bytes(tmp_path / "out", without=without) == all_bytes(tmp_path / "fresh", without=without)
    assert not (tmp_path / "out" / "epoch_003").exists()


def test_overwrite_with_a_mistake_takes_nothing_away(
    scored_at: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(scored_at, tmp_path / "out")
    before = all_bytes(tmp_path / "out")
    with pytest.raises(ConfigError):
        run(scored_at, tmp_path / "out", overwrite=True, protect="99999")
    with pytest.raises(ConfigError):
        run(scored_at, tmp_path / "out", overwrite=True, target="both", drop_token="no such token")
    free = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free._replace(free=100))
    with pytest.raises(DiskSpaceError):
        run(scored_at, tmp_path / "out", overwrite=True, epochs=60000)
    assert all_bytes(tmp_path / "out") == before


# The recipe file.


@pytest.mark.parametrize("kind", ["yaml", "json"])
def test_recipe_file(kind: str, scored_at: Path, tmp_path: Path) -> None:
    values = {"epochs": 3, "quantile": 0.3, "max-rate": 0.9, "target": "both", "rates": [0, 0.5, 1], "shuffle": "once"}
    values.pop("max-rate")
    file = tmp_path / f"recipe.{kind}"
    file.write_text(yaml.safe_dump(values) if kind == "yaml" else json.dumps(values, indent=1))
    config = MaterializeConfig.load(str(file), scored=str(scored_at), out=str(tmp_path / "a"), quantile=0.6)
    assert (config.epochs, config.quantile, config.rates) == (3, 0.6, (0.0, 0.5, 1.0))
    command = ["materialize", str(scored_at), "--recipe", str(file), "--quantile", "0.6"]
    assert cli.run([*command, "--out", str(tmp_path / "a")]) == 0
    run(scored_at, tmp_path / "b", epochs=3, quantile=0.6, target="both", rates=(0, 0.5, 1), shuffle="once")
    assert all_bytes(tmp_path / "a", without=("README.md",)) == all_bytes(tmp_path / "b", without=("README.md",))


def test_a_flag_takes_the_place_of_what_it_excludes(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text("quantile: 0.3\nrates: [0.1, 0.2]\n")
    given: dict[str, Any] = {"scored": "s", "out": "o", "epochs": 2}
    config = MaterializeConfig.load(str(file), **given, threshold=1.5, schedule="linear", max_rate=0.4)
    assert (config.quantile, config.threshold, config.rates, config.max_rate) == (None, 1.5, None, 0.4)
    file.write_text("threshold: 1.5\nschedule: linear\nmax_rate: 0.4\n")
    config = MaterializeConfig.load(str(file), **given, quantile=0.2, rates=(0.1, 0.2))
    assert (config.quantile, config.threshold, config.rates) == (0.2, None, (0.1, 0.2))
    with pytest.raises(ConfigError, match="exclude each other"):
        MaterializeConfig.load(str(file), **given, threshold=1.0, quantile=0.2)
    file.write_text("threshold: 1.5\nquantile: 0.2\n")
    with pytest.raises(ConfigError, match="exclude each other"):
        MaterializeConfig.load(str(file), **given)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("epochs: 2\nshufle: once", r"did you mean shuffle\?"),
        ("out: x", r"unknown setting 'out'"),
        ("quantile: true", r"--quantile True"),
        ("rates: [true, 0.1]", r"--rates \[True, 0.1\]: should not be true or false"),
        ("x: " + "[" * 3000, r"neither YAML nor JSON"),
    ],
)
def test_bad_recipe_file(text: str, message: str, scored_at: Path, tmp_path: Path, capfd: Any) -> None:
    (tmp_path / "recipe.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        MaterializeConfig.load(str(tmp_path / "recipe.yaml"), scored=str(scored_at), out="x", epochs=2)
    check_refused(scored_at, tmp_path, ["--recipe", str(tmp_path / "recipe.yaml")], capfd)


# Rows that are left out, and labels that are saved.


def test_rows_with_nothing_to_train_on_are_left_out_and_counted(scored_at: Path, tmp_path: Path) -> None:
    run(scored_at, tmp_path / "out")
    described = json.loads((tmp_path / "out" / "manifest.json").read_bytes())
    bare = sum(not any(r["trainable"]) for r in plain_rows(ROWS))
    assert bare > 2
    assert described["rows_without_loss"] == bare
    assert all(e["rows"] == len(ROWS.row_id) - bare for e in described["epochs"])


def test_nothing_to_train_on_at_all(tmp_path: Path) -> None:
    rows = some_rows(5)
    rows.loss_mask[:] = False
    with pytest.raises(SourceError, match="no row has anything to train on"):
        run(write_scored(tmp_path / "scored", rows), tmp_path / "out")
    assert not (tmp_path / "out" / "manifest.json").exists()


@pytest.mark.parametrize("target", ["labels", "both"])
def test_every_row_keeps_a_label(target: str, scored_at: Path, tmp_path: Path) -> None:
    settings = {"quantile": 1, "max_rate": 1, "schedule": "constant", "protect": "none", "target": target}
    check(ROWS, scored_at, tmp_path / "out", protected=set(), **settings)
    rows = epoch_rows(tmp_path / "out", 0)
    assert all(sum(x != -100 for x in labels) == 1 for _, _, labels in rows)


# What is said of the result.


def test_figures_agree_with_the_files(scored_at: Path, tmp_path: Path, capfd: Any) -> None:
    out = tmp_path / "out"
    command = ["materialize", str(scored_at), "--out", str(out), "--epochs", "3", "--rows-per-shard", "11"]
    assert cli.run([*command, "--progress", "row"]) == 0
    printed = [line.split() for line in capfd.readouterr().out.splitlines()]
    described = json.loads((out / "manifest.json").read_bytes())
    plain = [r for r in plain_rows(ROWS) if any(r["trainable"])]
    trainable = sum(sum(r["trainable"]) for r in plain)
    for e in described["epochs"]:
        rows = epoch_rows(out, e["epoch"])
        left = sum(x != -100 for _, _, labels in rows for x in labels)
        assert e["rows"] == len(rows) == sum(f["rows"] for f in described["files"] if f.get("epoch") == e["epoch"])
        assert e["tokens"] == sum(len(ids) for ids, _, _ in rows)
        assert e["tokens"] == sum(f["tokens"] for f in described["files"] if f.get("epoch") == e["epoch"])
        assert e["trainable"] == trainable
        assert e["labels_left"] == left
        assert e["dropped"] == trainable - left
        assert e["dropped_share"] == e["dropped"] / trainable
        assert e["eligible_share"] == e["eligible"] / trainable
        assert e["folder"] == f"epoch_{e['epoch']:03d}"
        recipe = Recipe(epochs=3)
        ends = [naive_rate(recipe, (e["epoch"] + (i + 0.5) / len(rows)) / 3) for i in (0, len(rows) - 1)]
        assert [e["rate_min"], e["rate_max"]] == pytest.approx(ends)
        figures = [f"{e['rows']:,}", f"{e['tokens']:,}", f"{trainable:,}", f"{e['eligible_share']:.1%}"]
        figures += [f"{e['dropped_share']:.1%}", f"{left:,}"]
        assert next(line for line in printed if line[:1] == [str(e["epoch"])])[-6:] == figures
        card = (out / "README.md").read_text()
        assert f"| {' | '.join(figures)} |" in card
    assert described["recipe"]["epochs"] == 3
    assert (
        described["tau_nats"]
        == sorted(h for r in plain for h, yes in zip(r["entropy"], r["trainable"], strict=True) if yes)[
            math.ceil(trainable / 2) - 1
        ]
    )


def test_a_curriculum_that_hardly_drops_anything_warns(
    scored_at: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    for number, (settings, warns) in enumerate(
        [
            ({}, False),
            ({"max_rate": 0.009}, True),
            ({"max_rate": 0.011, "schedule": "constant"}, False),
            ({"horizon": 1000}, True),
            ({"horizon": 1000, "progress": "row"}, True),
            ({"rates": (0, 0.005)}, True),
            ({"schedule": "step", "midpoint": 1}, True),
            ({"schedule": "linear", "max_rate": 0.011, "progress": "row"}, False),
        ]
    ):
        caplog.clear()
        run(scored_at, tmp_path / str(number), **settings)
        assert ("highest drop rate" in caplog.text) == warns, settings


def test_a_drop_token_that_the_model_hardly_knows_warns(
    scored_at: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    used = int(ROWS.input_ids[ROWS.input_ids >= FIRST_PLAIN_ID][0])
    run(scored_at, tmp_path / "used", target="inputs", drop_token=str(used))
    assert "untrained" not in caplog.text
    run(scored_at, tmp_path / "added", target="inputs", drop_token="<think>")
    assert "untrained" in caplog.text


# Disk space.


def test_too_little_space_is_said_before_the_first_byte(
    scored_at: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    real = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: real._replace(free=4096))
    with pytest.raises(DiskSpaceError, match=r"only 4\.1 kB are free"):
        run(scored_at, tmp_path / "out", epochs=4)
    assert all_bytes(tmp_path / "out") == {}
    monkeypatch.setattr(shutil, "disk_usage", lambda path: real._replace(free=10**6))
    run(scored_at, tmp_path / "out", epochs=4)
    assert "for the scored rows while it runs" in caplog.text
    monkeypatch.setattr(shutil, "disk_usage", lambda path: real._replace(free=0))
    assert run(scored_at, tmp_path / "out", epochs=4).already_complete


def test_the_estimate_is_on_the_safe_side(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    at = write_scored(tmp_path / "scored", some_rows(400, lengths=(200, 400), distinct=None), rows_per_shard=100)
    for compression in ("zstd", "snappy", "none"):
        caplog.clear()
        run(at, tmp_path / compression, compression=compression, target="both", schedule="constant")
        written = sum(p.stat().st_size for p in (tmp_path / compression).rglob("*.parquet"))
        said = caplog.text.split(" to write")[0].split("about ")[-1]
        amount, unit = said.split(" ")
        assert float(amount) * {"kB": 1e3, "MB": 1e6}[unit] >= 0.98 * written


@pytest.mark.parametrize(("rows", "per_shard"), [(1, 9), (10, 1), (40, 30), (300, 25)])
@pytest.mark.parametrize("compression", ["zstd", "snappy", "none"])
def test_the_estimate_counts_what_a_file_takes(
    rows: int, per_shard: int, compression: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a set so small that its tokens are the least of it, the whole directory fits into the estimate."""
    at = write_scored(tmp_path / "scored", some_rows(rows, lengths=(2, 4)))
    real, free = shutil.disk_usage(tmp_path), [0, 1 << 30]  # the second is looked at first, for the scored rows
    monkeypatch.setattr(shutil, "disk_usage", lambda path: real._replace(free=free.pop()))
    settings = {"compression": compression, "rows_per_shard": per_shard, "target": "both", "shuffle": "none"}
    with pytest.raises(DiskSpaceError, match=r"about ([\d.]+) kB to write, but only 0 B") as e:
        run(at, tmp_path / "out", **settings)
    said = float(str(e.value).split("about ")[1].split(" ")[0]) * 1000
    monkeypatch.undo()
    run(at, tmp_path / "out", **settings)
    written = sum(p.stat().st_size for p in (tmp_path / "out").rglob("*") if p.is_file())
    assert written <= said <= written + 20_000 + 0.6 * written


def run_out_of_space(scored_at: Path, out: Path, limit: int) -> None:
    """What a forked process does: no file may grow beyond ``limit`` bytes."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    with pytest.raises(DiskSpaceError, match="no space left"):
        run(scored_at, out, rows_per_shard=900)


@pytest.mark.parametrize("limit", [30_000, 1000])
def test_no_space_left_on_the_way(limit: int, tmp_path: Path) -> None:
    at = write_scored(tmp_path / "scored", some_rows(2000, distinct=None), rows_per_shard=500)
    process = multiprocessing.get_context("fork").Process(target=run_out_of_space, args=(at, tmp_path / "out", limit))
    process.start()
    process.join()
    assert process.exitcode == 0
    left = {name for name in all_bytes(tmp_path / "out") if name != ".state.json"}
    assert not left
    run(at, tmp_path / "out", rows_per_shard=900)
    run(at, tmp_path / "whole", rows_per_shard=900)
    assert all_bytes(tmp_path / "out", without=("README.md",)) == all_bytes(tmp_path / "whole", without=("README.md",))


def test_two_runs_at_once_are_refused(scored_at: Path, tmp_path: Path) -> None:
    with locked(tmp_path / "out"), pytest.raises(OutputError, match="another run is writing here"):
        run(scored_at, tmp_path / "out")
    run(scored_at, tmp_path / "out")


# Wrong options.


def check_refused(scored_at: Path, tmp_path: Path, options: list[str], capfd: Any, *words: str) -> None:
    """One line on stderr, exit code 2, nothing written."""
    out = tmp_path / "refused"
    epochs = [] if "--epochs" in options else ["--epochs", "2"]
    capfd.readouterr()
    assert cli.run(["materialize", str(scored_at), "--out", str(out), *epochs, *options]) == 2
    printed = capfd.readouterr()
    assert printed.out == ""
    errors = [line for line in printed.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert printed.err.splitlines()[-1] == errors[0]
    assert not all(word in printed.err for word in ("Traceback", "File"))
    for word in words:
        assert word in errors[0]
    assert not out.exists() or all_bytes(out) == {}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--epochs", "0"], ["--epochs"]),
        (["--epochs", "70000"], ["--epochs"]),
        (["--epochs", "two"], ["--epochs"]),
        (["--quantile", "-0.1"], ["--quantile"]),
        (["--threshold", "-1"], ["--threshold"]),
        (["--threshold", "inf"], ["--threshold"]),
        (["--threshold", "0.5", "--scope", "row"], ["--threshold", "--scope"]),
        (["--threshold", "0.5", "--select", "random"], ["--select random"]),
        (["--rates", "0.1,nan"], ["--rates"]),
        (["--rates", "0.1,0.2", "--progress", "row"], ["--rates", "--progress"]),
        (["--rates", "0.1,0.2", "--schedule", "linear"], ["--rates", "--schedule"]),
        (["--rates", "0.1,0.2", "--horizon", "2", "--epochs", "3"], ["--rates", "--epochs"]),
        (["--max-rate", "2"], ["--max-rate"]),
        (["--steepness", "0"], ["--steepness"]),
        (["--midpoint", "1.5"], ["--midpoint"]),
        (["--horizon", "0"], ["--horizon"]),
        (["--only-epochs", "1-2"], ["--only-epochs", "0 to 1"]),
        (["--only-epochs", "1-0"], ["--only-epochs"]),
        (["--only-epochs", "a-b"], ["--only-epochs"]),
        (["--only-epochs", "-1"], ["--only-epochs"]),
        (["--seed", "-1"], ["--seed"]),
        (["--seed", str(2**63)], ["--seed"]),
        (["--target", "label"], ["--target"]),
        (["--select", "lowest"], ["--select"]),
        (["--shuffle", "yes"], ["--shuffle"]),
        (["--compression", "gzip"], ["--compression"]),
        (["--rows-per-shard", "0"], ["--rows-per-shard"]),
        (["--protect", "-3"], ["--protect"]),
        (["--protect", str(VOCABULARY)], ["--protect", str(VOCABULARY)]),
        (["--protect", "1,99999"], ["--protect", "99999"]),
        (["--drop-token", "30"], ["--drop-token", "--target"]),
        (["--target", "inputs", "--drop-token", "<pad>"], ["--drop-token", "pad"]),
        (["--target", "both", "--drop-token", "</s>"], ["--drop-token", "EOS"]),
        (["--target", "both", "--drop-token", "1"], ["--drop-token", "EOS"]),
        (["--target", "both", "--drop-token", "two words of text"], ["--drop-token", "tokens"]),
        (["--target", "both", "--drop-token", ""], ["--drop-token"]),
        (["--keep-surprising", "-1"], ["--keep-surprising"]),
        (["--epoch", "3"], ["--epoch"]),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else str(value),
)
def test_wrong_options(options: list[str], words: list[str], scored_at: Path, tmp_path: Path, capfd: Any) -> None:
    check_refused(scored_at, tmp_path, options, capfd, *words)


def test_keep_surprising_needs_logprob(tmp_path: Path, capfd: Any) -> None:
    at = write_scored(tmp_path / "scored", some_rows(9), logprob=False)
    check_refused(at, tmp_path, ["--keep-surprising", "2"], capfd, "--keep-surprising", "--no-logprob")


def test_wrong_places(scored_at: Path, tmp_path: Path, capfd: Any) -> None:
    (tmp_path / "empty").mkdir()
    check_refused(tmp_path / "empty", tmp_path, [], capfd, "an empty directory, not a scored directory")
    with pytest.raises(OutputError):
        run(scored_at, scored_at)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("mine")
    with pytest.raises(OutputError, match=r"something else \(thesis.tex\)"):
        run(scored_at, tmp_path / "full")
    with pytest.raises(OutputError):
        run(scored_at, tmp_path / "full", overwrite=True)
    assert (tmp_path / "full" / "thesis.tex").read_text() == "mine"
    with pytest.raises(OutputError, match="not a directory"):
        run(scored_at, tmp_path / "full" / "thesis.tex")
    run(scored_at, tmp_path / "masked")
    with pytest.raises(IntegrityError, match="masked/1"):
        run(tmp_path / "masked", tmp_path / "again")


# README.md, the dataset card.


def front_matter(out: Path) -> dict[str, Any]:
    return dict(yaml.safe_load((out / "README.md").read_text().split("---\n")[1]))


def test_the_card_keeps_what_the_user_wrote(scored_at: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(scored_at, out, epochs=2, horizon=4)
    card = (out / "README.md").read_text()
    head, front, text = card.split("---\n", 2)
    front = (
        "# our licence\nlicense: cc-by-4.0\nlanguage:\n- no\n- en\n"
        + front
        + "- config_name: mine\n  data_files: extra/*.parquet\ntags: [entropy,   dropout]   # two\n"
    )
    (out / "README.md").write_text(f"{head}---\n{front}---\n{text}\n## Thanks\n\nTo all.\n")
    mine = (out / "README.md").read_bytes()
    run(scored_at, out, epochs=2, horizon=4)
    assert (out / "README.md").read_bytes() == mine
    run(scored_at, out, epochs=3, horizon=4)
    renewed = (out / "README.md").read_text()
    for text in ("# our licence\nlicense: cc-by-4.0\nlanguage:\n- no\n- en\n", "tags: [entropy,   dropout]   # two\n"):
        assert text in renewed
    assert renewed.endswith("\n## Thanks\n\nTo all.\n")
    assert renewed.count("entrodrop-prep: begin") == 1
    names = [c["config_name"] for c in front_matter(out)["configs"]]
    assert sorted(names) == ["all", "epoch_000", "epoch_001", "epoch_002", "mine"]
    assert [c["config_name"] for c in front_matter(out)["configs"] if c.get("default")] == ["all"]
    assert not verify(str(out)).findings


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Just text.\n",
        "---\nconfigs: everything\n---\nText.\n",
        "---\nconfigs:\n- a\n- b: 1\n---\nText.\n",
        "---\nnot: [yaml\n---\nText.\n",
        "---\n- a list\n---\nText.\n",
        "---\nconfigs: []\nlicense: mit\n---\nText.\n",
        "---\r\nlicense: mit\r\n---\r\nText.\r\n",
        "Begin <!-- entrodrop-prep: end --> and <!-- entrodrop-prep: begin (rewritten by the tool) --> turned round",
    ],
)
def test_any_card_is_taken_over(text: str, scored_at: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(scored_at, out, epochs=1, horizon=4)
    (out / "README.md").write_bytes(text.encode())
    run(scored_at, out, epochs=2, horizon=4)
    renewed = (out / "README.md").read_text()
    meta = front_matter(out)
    assert {"all", "epoch_000", "epoch_001"} <= {c.get("config_name") for c in meta["configs"]}
    if "mit" in text:
        assert meta["license"] == "mit"
    if "Text." in text:
        assert "Text." in renewed
    run(scored_at, out, epochs=3, horizon=4)
    assert (out / "README.md").read_text().count("entrodrop-prep: begin") == 1 + text.count("entrodrop-prep: begin")


def test_a_card_that_is_not_text_is_refused(scored_at: Path, tmp_path: Path) -> None:
    run(scored_at, tmp_path / "out", epochs=1, horizon=4)
    (tmp_path / "out" / "README.md").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(OutputError, match=r"README\.md"):
        run(scored_at, tmp_path / "out", epochs=2, horizon=4)


def test_nothing_tells_of_this_machine(scored_at: Path, tmp_path: Path) -> None:
    run(scored_at, tmp_path / "out")
    for name, data in all_bytes(tmp_path / "out").items():
        assert str(tmp_path).encode() not in data, name
        assert str(scored_at).encode() not in data, name
        parquet = name.endswith(".parquet")
        said = json.dumps(shard_files.read_footer(tmp_path / "out" / name).info).encode() if parquet else data
        assert platform.node().encode() not in said, name  # compressed bytes may happen to hold a short name
        assert not re.search(rb"20\d\d-\d\d-\d\d", data) or parquet, name
    run(scored_at, tmp_path / "deeper" / "elsewhere" / "out")
    assert all_bytes(tmp_path / "out") == all_bytes(tmp_path / "deeper" / "elsewhere" / "out")
