"""The order of rows: by (key, row_id, window), a new one each epoch, and nothing else decides it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from entrodrop_prep.export import order
from entrodrop_prep.export.order import Order, has_label, payload_bytes
from entrodrop_prep.masking.counter import order_keys
from entrodrop_prep.store import scored
from entrodrop_prep.store.scored import ScoredDataset
from helpers.scored import some_rows, write_scored

COUNT = 2000
Place = tuple[int, int]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> ScoredDataset:
    rows = some_rows(COUNT, lengths=(2, 9))
    return ScoredDataset(write_scored(tmp_path_factory.mktemp("order") / "scored", rows, rows_per_shard=170))


def places(dataset: ScoredDataset, tmp: Path, epochs: list[int], **settings: Any) -> list[list[Place]]:
    """(row_id, window) of each row of each epoch, in order."""
    rows, tokens = (sum(e[n] for e in dataset.files) for n in ("rows", "tokens"))
    total = payload_bytes(rows, tokens, 2, dataset.score_dtype)
    values = {"shuffle": "epoch", "seed": 0, "source": "source", "tmp": tmp / "order", "total_bytes": total, **settings}
    made, result = Order(dataset, **values), []
    for epoch in epochs:
        found: list[Place] = []
        for first, table in made.tables(epoch, lambda first, stop: True):
            assert first == len(found)
            found += zip(table["row_id"].to_pylist(), table["window"].to_pylist(), strict=True)
        result.append(found)
    made.close()
    assert not (tmp / "order").exists()
    return result


def kept(dataset: ScoredDataset) -> list[Place]:
    """(row_id, window) of the rows with something to train on, in the source's order."""
    return [
        (row, window)
        for batch in dataset.batches()
        for row, window, loss in zip(
            *(batch.column(n).to_pylist() for n in ("row_id", "window", "loss_mask")), strict=True
        )
        if any(loss[1:])
    ]


def test_order_is_by_key_row_and_window(dataset: ScoredDataset, tmp_path: Path) -> None:
    rows = kept(dataset)
    row_id, window = np.array([r for r, _ in rows]), np.array([w for _, w in rows], np.int32)
    for epoch, found in zip((0, 1, 7), places(dataset, tmp_path, [0, 1, 7], seed=3), strict=True):
        keys = order_keys(3, "source", epoch, row_id, window).tolist()
        assert found == [place for _, place in sorted(zip(keys, rows, strict=True))]


def test_equal_keys_stand_by_row_and_window(
    dataset: ScoredDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def few_keys(seed: int, source: str, epoch: int, row_id: Any, window: Any) -> Any:
        return order_keys(seed, source, epoch, row_id, window) & np.uint64(3 << 62)

    monkeypatch.setattr(order, "order_keys", few_keys)
    monkeypatch.setattr(order, "BUCKET_BYTES", 30_000)
    (found,) = places(dataset, tmp_path, [0])
    rows = kept(dataset)
    keys = few_keys(0, "source", 0, np.array([r for r, _ in rows]), np.array([w for _, w in rows], np.int32)).tolist()
    assert found == [place for _, place in sorted(zip(keys, rows, strict=True))]


@pytest.mark.parametrize("shuffle", ["epoch", "once", "none"])
def test_every_row_stands_once(shuffle: str, dataset: ScoredDataset, tmp_path: Path) -> None:
    rows = kept(dataset)
    assert len(rows) < sum(e["rows"] for e in dataset.files)
    for found in places(dataset, tmp_path, [0, 1], shuffle=shuffle):
        assert sorted(found) == rows


def test_what_each_shuffle_means(dataset: ScoredDataset, tmp_path: Path) -> None:
    anew = places(dataset, tmp_path, [0, 1, 2])
    once = places(dataset, tmp_path, [0, 1, 2], shuffle="once")
    none = places(dataset, tmp_path, [0, 1, 2], shuffle="none")
    assert anew[0] != anew[1] != anew[2] != anew[0]
    assert once[0] == once[1] == once[2] == anew[0]
    assert none[0] == none[1] == none[2] == kept(dataset)
    assert places(dataset, tmp_path, [2, 0, 2]) == [anew[2], anew[0], anew[2]]


@pytest.mark.parametrize(
    ("bucket", "batch"), [(500, 1 << 20), (64 << 20, 1 << 20), (9000, 64), (200_000, 1), (4000, 1)]
)
def test_sizes_change_nothing(
    bucket: int, batch: int, dataset: ScoredDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual = places(dataset, tmp_path, [1, 3])
    monkeypatch.setattr(order, "BUCKET_BYTES", bucket)
    monkeypatch.setattr(scored, "BATCH_TOKENS", batch)
    if batch > 1:
        assert places(dataset, tmp_path, [1, 3]) == usual
    else:
        assert places(dataset, tmp_path, [3]) == usual[1:]


def test_more_buckets_than_files_may_be_open(
    dataset: ScoredDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual = places(dataset, tmp_path, [1, 3, 1])
    last = len(usual[0]) - 1
    monkeypatch.setattr(order, "BUCKET_BYTES", 9000)
    for files in (3, 7, 16):
        monkeypatch.setattr(order, "MAX_FILES", files)
        assert places(dataset, tmp_path, [1, 3, 1]) == usual
        few = Order(dataset, shuffle="epoch", seed=0, source="source", tmp=tmp_path / "few", total_bytes=10**6)
        end = [table.slice(len(table) - 1) for _, table in few.tables(1, lambda a, b: a <= last < b)][-1]
        assert usual[0][last] == (end["row_id"][0].as_py(), end["window"][0].as_py())
        assert len(list((tmp_path / "few").glob("*.arrow"))) <= files
        assert len(list((tmp_path / "few" / "split").glob("*.arrow"))) <= files
        few.close()
        assert not (tmp_path / "few").exists()


def test_few_files_are_open(dataset: ScoredDataset, tmp_path: Path) -> None:
    """With 300 buckets, in a process that may open 200 files."""
    made = f"""
import resource
from pathlib import Path
from entrodrop_prep.export import order
from entrodrop_prep.store.scored import ScoredDataset

order.BUCKET_BYTES = 1000
scored = ScoredDataset(Path({str(dataset.directory)!r}))
made = order.Order(scored, shuffle="epoch", seed=0, source="s", tmp=Path({str(tmp_path / "o")!r}), total_bytes=300_000)
resource.setrlimit(resource.RLIMIT_NOFILE, (200, 200))
print(sum(len(table) for _, table in made.tables(0, lambda first, stop: True)))
"""
    done = subprocess.run([sys.executable, "-c", made], capture_output=True, text=True, check=False)
    assert done.stdout.split() == [str(len(kept(dataset)))], done.stderr


def test_shard_sizes_change_nothing(dataset: ScoredDataset, tmp_path: Path) -> None:
    other = ScoredDataset(write_scored(tmp_path / "scored", some_rows(COUNT, lengths=(2, 9)), rows_per_shard=COUNT))
    assert places(other, tmp_path, [4]) == places(dataset, tmp_path, [4])


def test_parts_that_are_not_wanted_may_be_left_out(
    dataset: ScoredDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (whole,) = places(dataset, tmp_path, [2])
    monkeypatch.setattr(order, "BUCKET_BYTES", 20_000)
    first, stop = 700, 705
    for shuffle, rows in (("epoch", whole), ("none", kept(dataset))):
        made = Order(dataset, shuffle=shuffle, seed=0, source="source", tmp=tmp_path / "order", total_bytes=10**6)
        seen: dict[int, Place] = {}
        for place, table in made.tables(2, lambda a, b: a < stop and first < b):
            pairs = zip(table["row_id"].to_pylist(), table["window"].to_pylist(), strict=True)
            seen |= {place + i: pair for i, pair in enumerate(pairs)}
        made.close()
        assert [seen[i] for i in range(first, stop)] == rows[first:stop]
        assert shuffle == "none" or len(seen) < len(rows)


def test_has_label_sees_slices_empty_rows_and_first_positions() -> None:
    loss = [[], [True], [True, False], [False, True], [True, True], [], [False, False, True], [False] * 3, [True]]
    array = pa.array(loss, pa.list_(pa.bool_()))
    expected = [any(x[1:]) for x in loss]
    assert has_label(array).tolist() == expected
    for first in range(len(loss)):
        for stop in range(first, len(loss) + 1):
            assert has_label(array.slice(first, stop - first)).tolist() == expected[first:stop]
