"""EpochRows: the order of rows, any positions in any order, and that nothing else makes the rows of anyone."""

from __future__ import annotations

import ast
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

import entrodrop_prep
from entrodrop_prep import MaskedRows
from entrodrop_prep.config import MaterializeConfig
from entrodrop_prep.demo import run as demo
from entrodrop_prep.errors import DiskSpaceError
from entrodrop_prep.export import materialize as writer
from entrodrop_prep.export.job import Job, open_job
from entrodrop_prep.export.materialize import materialize
from entrodrop_prep.masking import columns, order
from entrodrop_prep.masking.columns import has_label
from entrodrop_prep.masking.counter import order_keys
from entrodrop_prep.masking.epoch_rows import EpochRows
from entrodrop_prep.verification.inspect import show
from entrodrop_prep.verification.run import verify
from helpers.scored import some_rows, write_scored

COUNT = 600
Place = tuple[int, int]


@pytest.fixture(scope="module")
def scored_at(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = some_rows(COUNT, lengths=(2, 9))
    return write_scored(tmp_path_factory.mktemp("order") / "scored", rows, rows_per_shard=170)


def opened(scored_at: Path, tmp: Path, **settings: Any) -> Job:
    values = {"epochs": 9, **settings}
    job = open_job(MaterializeConfig(scored=str(scored_at), out="nowhere", **values))
    job.plan(range(values["epochs"]))
    job.open(tmp)
    return job


def kept(rows: EpochRows) -> list[Place]:
    """(row_id, window) of all rows with something to train on, in the source's order."""
    arrays = rows.columns.arrays
    return list(zip(arrays["row_id"].tolist(), arrays["window"].tolist(), strict=True))


def places(rows: EpochRows, epoch: int) -> list[Place]:
    every = kept(rows)
    return [every[i] for i in rows.order(epoch).index.tolist()]


def test_order_is_by_key_row_and_window(scored_at: Path, tmp_path: Path) -> None:
    rows = opened(scored_at, tmp_path, seed=3).rows
    every = kept(rows)
    row_id, window = np.array([r for r, _ in every]), np.array([w for _, w in every], np.int32)
    for epoch in (0, 1, 7):
        keys = order_keys(3, "source", epoch, row_id, window).tolist()
        assert places(rows, epoch) == [place for _, place in sorted(zip(keys, every, strict=True))]


def test_equal_keys_stand_by_row_and_window(scored_at: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def few_keys(seed: int, source: str, epoch: int, row_id: Any, window: Any) -> Any:
        return order_keys(seed, source, epoch, row_id, window) & np.uint64(3 << 62)

    monkeypatch.setattr(order, "order_keys", few_keys)
    rows = opened(scored_at, tmp_path).rows
    every = kept(rows)
    keys = few_keys(0, "source", 0, np.array([r for r, _ in every]), np.array([w for _, w in every], np.int32)).tolist()
    assert places(rows, 0) == [place for _, place in sorted(zip(keys, every, strict=True))]


def test_what_each_shuffle_means(scored_at: Path, tmp_path: Path) -> None:
    anew, once, none = (opened(scored_at, tmp_path / s, shuffle=s).rows for s in ("epoch", "once", "none"))
    assert len(kept(anew)) < sum(e["rows"] for e in anew.sources.all[0].scored.files)
    assert places(anew, 0) != places(anew, 1) != places(anew, 2)
    assert places(once, 0) == places(once, 2) == places(anew, 0)
    assert places(none, 0) == places(none, 1) == kept(none)
    assert all(sorted(places(anew, e)) == kept(anew) for e in range(4))


@pytest.mark.parametrize("settings", [{}, {"pack": 20, "target": "both"}], ids=str)
def test_rows_do_not_depend_on_their_company(settings: dict[str, Any], scored_at: Path, tmp_path: Path) -> None:
    epoch = opened(scored_at, tmp_path, progress="row", schedule="linear", **settings).rows.epoch(8)
    whole = epoch[:].stored
    some = np.random.default_rng(0).permutation(len(epoch))[:50]
    made = epoch[some].stored
    for i, place in enumerate(some.tolist()):
        one, at = slice(*made.offsets[i : i + 2]), slice(*whole.offsets[place : place + 2])
        assert made.input_ids[one].tolist() == whole.input_ids[at].tolist()
        assert made.labels[one].tolist() == whole.labels[at].tolist()


def test_rows_that_are_read_some_at_a_time_are_the_same(
    scored_at: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    epoch = opened(scored_at, tmp_path, seed=5).rows.epoch(3)
    some = np.random.default_rng(1).integers(0, len(epoch), 200)
    whole = epoch[some].stored
    monkeypatch.setattr(columns, "_ROWS", 7)
    parts = epoch[some].stored
    for name in ("offsets", "input_ids", "labels"):
        np.testing.assert_array_equal(getattr(parts, name), getattr(whole, name))
    assert len(epoch[np.empty(0, np.int64)].stored.input_ids) == 0


def test_nothing_else_makes_masks() -> None:
    """``apply``, ``unmasked`` and the words of tokens are called where rows are made, and nowhere else."""
    makers = {"apply": 1, "unmasked": 1, "tokens_below": 1, "eligible_tokens": 2}
    package, found = Path(entrodrop_prep.__file__).parent, dict.fromkeys(makers, 0)
    for path in package.rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        imported = {a.name for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) for a in n.names}
        own = {n.name for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)}
        for call in (n for n in ast.walk(tree) if isinstance(n, ast.Call)):
            name = getattr(call.func, "id", getattr(call.func, "attr", ""))
            if name in makers and path.parent.name == "masking" and name in imported | own:
                found[name] += 1
            elif name in makers and name in imported:
                raise AssertionError(f"{path}:{call.lineno} calls {name}")
    assert found == makers


def test_one_function_makes_the_rows_of_all(scored_at: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = EpochRows.masked
    calls: list[int] = []

    def counted(self: EpochRows, epoch: int | None, positions: Any) -> Any:
        calls.append(len(positions))
        return made(self, epoch, positions)

    def count(work: Callable[[], Any]) -> int:
        calls.clear()
        work()
        return sum(calls)

    monkeypatch.setattr(EpochRows, "masked", counted)
    config = MaterializeConfig(scored=str(scored_at), out=str(tmp_path / "out"), epochs=2)
    rows = count(lambda: materialize(config))
    assert rows == sum(e["rows"] for e in json.loads((tmp_path / "out" / "manifest.json").read_bytes())["epochs"])
    assert count(lambda: verify(str(tmp_path / "out"), str(scored_at))) == rows
    loaded = MaskedRows.open(scored_at, epochs=2, cache_dir=tmp_path / "cache")
    assert count(lambda: loaded.take(range(len(loaded)))) == rows
    assert count(lambda: list(show(str(tmp_path / "out"), 3))) == 0  # what the files hold

    class Words:
        def decode(self, ids: Any) -> str:
            return "x" * len(ids)

    monkeypatch.setattr(demo, "SHOWN_FROM", 1)
    shown = MaterializeConfig(scored=str(scored_at), out=str(tmp_path / "shown"), epochs=demo.EPOCHS)
    assert count(lambda: demo._show_stretch(shown, Words())) == 4  # type: ignore[arg-type]


def test_the_scored_rows_lie_in_the_output_while_it_is_made_and_not_after(
    scored_at: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = MaterializeConfig(scored=str(scored_at), out=str(tmp_path / "out"), epochs=2, rows_per_shard=50)
    seen: list[int] = []
    write = writer.write_shard

    def full(path: Path, *arguments: Any, **options: Any) -> Any:
        files = [p for p in (tmp_path / "out" / writer.COLUMNS).rglob("*") if p.is_file()]
        seen.append(sum(p.stat().st_size for p in files if p.name != "columns.json"))
        if len(seen) == 7:
            raise DiskSpaceError("no space left", where=str(path))
        return write(path, *arguments, **options)

    monkeypatch.setattr(writer, "write_shard", full)
    with pytest.raises(DiskSpaceError):
        materialize(config)
    assert 0 < seen[0] <= open_job(config).cache_bytes
    assert not (tmp_path / "out" / writer.COLUMNS).exists()
    done = len(list((tmp_path / "out").rglob("*.parquet")))
    assert 0 < done < 20
    (tmp_path / "out" / writer.COLUMNS / "survey").mkdir(parents=True)  # as a run that was killed leaves it
    (tmp_path / "out" / writer.COLUMNS / "input_ids").write_bytes(b"x")
    materialize(config)
    assert not (tmp_path / "out" / writer.COLUMNS).exists()
    assert not verify(str(tmp_path / "out"), str(scored_at)).findings


def test_has_label_sees_slices_empty_rows_and_first_positions() -> None:
    loss = [[], [True], [True, False], [False, True], [True, True], [], [False, False, True], [False] * 3, [True]]
    array = pa.array(loss, pa.list_(pa.bool_()))
    expected = [any(x[1:]) for x in loss]
    assert has_label(array).tolist() == expected
    for first in range(len(loss)):
        for stop in range(first, len(loss) + 1):
            assert has_label(array.slice(first, stop - first)).tolist() == expected[first:stop]
