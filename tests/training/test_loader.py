"""Rows made on the fly are those that ``materialize`` writes, whoever reads them, and wherever one resumes."""

from __future__ import annotations

import itertools
import logging
import multiprocessing
import pickle
from collections.abc import Callable
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from torch.utils.data import DataLoader
from torchdata.stateful_dataloader import StatefulDataLoader

from entrodrop_prep import MaskedLoader, MaskedRows, MaskedStream
from entrodrop_prep.config import MaterializeConfig
from entrodrop_prep.errors import ConfigError, IntegrityError, OutputError, SourceError
from entrodrop_prep.export.materialize import materialize
from entrodrop_prep.masking import arrays
from helpers.mixtures import Row, rows_in, with_column
from helpers.scored import copy, some_rows, write_scored

EPOCHS = 3
STEEP: dict[str, Any] = {"epochs": EPOCHS, "schedule": "linear", "max_rate": 1}
"""Masks that differ from epoch to epoch."""


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three scored directories, two of them with a kept column, one in float16."""
    folder = tmp_path_factory.mktemp("loader")
    for seed, (name, dtype) in enumerate((("one", np.float32), ("two", np.float32), ("three", np.float16))):
        write_scored(folder / name, some_rows(26 + seed, seed=seed, lengths=(2, 24), dtype=dtype))
    for name in ("one", "two"):
        with_column(folder / name, "lang", pa.string(), lambda row: ("de", "en", None)[row % 3])
    return folder


MIXED = ("b={}/one:1.5", "a={}/two:0.6")
CASES: dict[str, dict[str, Any]] = {
    "labels": {},
    "inputs": {"target": "inputs"},
    "both, row by row": {"target": "both", "progress": "row"},
    "another seed and a longer horizon": {"target": "both", "seed": 7, "horizon": 5},
    "one order": {"shuffle": "once", "progress": "row"},
    "the source's order": {"shuffle": "none", "progress": "row"},
    "each row its threshold": {"scope": "row", "quantile": 0.3, "keep_surprising": 2.0},
    "each value its threshold": {"scope": "column:lang", "target": "both"},
    "high entropy": {"select": "high-entropy", "protect": "none"},
    "random": {"select": "random", "drop_token": "20", "target": "inputs"},
    "a threshold in nats": {"threshold": 1.0},
    "half precision": {"scored": "{}/three", "target": "both"},
    "columns on request, and a multiple": {
        "add_columns": "n_trainable,position_ids,seq_lengths",
        "rows_multiple": 4,
        "progress": "row",
    },
    "packed": {"pack": 40, "target": "both", "progress": "row", "add_columns": "position_ids"},
    "packed, rows cut": {"pack": 7, "add_columns": "n_trainable,position_ids,seq_lengths", "rows_multiple": 3},
    "packed, one order": {"pack": 64, "shuffle": "once", "target": "inputs"},
    "packed, a mixture": {"scored": MIXED, "pack": 30, "target": "both", "progress": "row"},
    "a mixture": {"scored": MIXED, "target": "both", "progress": "row"},
    "a mixture with replay": {"scored": MIXED, "plain": ("replay={}/three:2.25",), "scope": "source", "target": "both"},
    "a mixture by column": {"scored": MIXED, "plain": ("c={}/three",), "scope": "column:lang", "keep_surprising": 3.0},
    "a mixture in one order": {"scored": MIXED, "shuffle": "once"},
    "some rows held out": {"eval_fraction": 0.3, "target": "both", "progress": "row"},
    "some of a mixture held out": {"scored": MIXED, "plain": ("replay={}/three",), "eval_fraction": 0.3, "pack": 40},
    "a mixture in the sources' order": {"scored": MIXED, "shuffle": "none", "progress": "row"},
}


def settings_of(case: str, given: Path) -> dict[str, Any]:
    """``scored`` and recipe of a case."""
    settings = {**STEEP, "scored": "{}/one", **CASES[case]}
    for name in ("scored", "plain"):
        if name in settings:
            texts = settings[name]
            filled = [t.format(given) for t in ([texts] if isinstance(texts, str) else texts)]
            settings[name] = filled[0] if isinstance(texts, str) else tuple(filled)
    return settings


def written(out: Path, settings: dict[str, Any], **more: Any) -> list[list[Row]]:
    """Write a masked directory; the rows of each of its epochs."""
    materialize(MaterializeConfig(**settings, out=str(out), rows_per_shard=9, **more))
    return [rows_in(out / f"epoch_{e:03d}") for e in range(settings["epochs"])]


def tuples(rows: Any) -> list[Row]:
    """(input_ids, attention_mask, labels) of each row, and what other columns it has."""
    return [tuple(row.values()) for row in rows]


# Random access.


@pytest.mark.parametrize("case", CASES)
def test_rows_are_those_of_the_files(case: str, given: Path, tmp_path: Path) -> None:
    settings = settings_of(case, given)
    epochs = written(tmp_path / "masked", settings)
    expected = [row for epoch in epochs for row in epoch]
    rows = MaskedRows.open(**settings, cache_dir=tmp_path / "cache")

    assert rows.epoch_lengths == tuple(map(len, epochs))
    assert len({str(e) for e in epochs}) == EPOCHS
    assert tuples(rows.__getitems__(range(len(rows)))) == expected
    scattered = np.random.default_rng(0).permutation(len(expected)).tolist()
    assert tuples(rows.__getitems__(scattered)) == [expected[i] for i in scattered]
    assert tuples(rows) == expected
    for e in range(EPOCHS):
        assert tuples(rows.dataset(e)) == epochs[e]
    every = rows.dataset()
    assert every.column_names[:3] == ["input_ids", "attention_mask", "labels"]
    assert len(every.column_names) == len(expected[0])
    assert tuples(every) == expected
    assert every[-3:]["labels"] == [row[2] for row in expected[-3:]]

    scored: Any = {"source": settings["scored"]}
    if not isinstance(settings["scored"], str):
        texts = [*settings["scored"], *settings.get("plain", ())]
        scored = {t.partition("=")[0]: t.partition("=")[2].rsplit(":", 1)[0] for t in texts}
    alike = MaskedRows.like(tmp_path / "masked", scored, cache_dir=tmp_path / "cache")
    assert tuples(pickle.loads(pickle.dumps(alike))) == expected


def test_a_recipe_file_and_settings_over_it(given: Path, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("epochs: 2\nquantile: 0.2\ntarget: both\nrows_per_shard: 4\n")
    settings = {"scored": str(given / "one"), "recipe": str(tmp_path / "recipe.yaml"), "quantile": 0.8}
    materialize(MaterializeConfig.load(**settings, out=str(tmp_path / "masked")))
    expected = [row for e in range(2) for row in rows_in(tmp_path / "masked" / f"epoch_{e:03d}")]
    rows = MaskedRows.open(given / "one", tmp_path / "recipe.yaml", quantile=0.8, cache_dir=tmp_path)
    assert tuples(rows) == expected
    other = MaskedRows.open(given / "one", tmp_path / "recipe.yaml", cache_dir=tmp_path)
    assert tuples(other) != expected


def test_like_takes_a_directory_with_other_parts_and_without_its_epochs(given: Path, tmp_path: Path) -> None:
    settings = {**STEEP, "scored": str(given / "one")}
    epochs = written(tmp_path / "masked", settings, plain_config=True, eval=str(given / "two"), compression="none")
    only = copy(tmp_path / "masked", tmp_path / "only")
    for file in only.rglob("*.parquet"):
        file.unlink()
    rows = MaskedRows.like(only, given / "one", cache_dir=tmp_path / "cache")
    assert tuples(rows) == [row for epoch in epochs for row in epoch]


def test_one_plain_source_may_be_a_text(given: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {**STEEP, "scored": [f"a={given}/one"], "cache_dir": tmp_path}
    one = MaskedRows.open(**settings, plain=f"b={given}/two")
    assert tuples(one) == tuples(MaskedRows.open(**settings, plain=[f"b={given}/two"]))


def test_places_that_are_not_there(given: Path, tmp_path: Path) -> None:
    rows = MaskedRows.open(given / "one", **STEEP, cache_dir=tmp_path)
    assert rows[-1] == rows[len(rows) - 1]
    assert rows.__getitems__([]) == []
    for place in (len(rows), -len(rows) - 1):
        with pytest.raises(IndexError, match="there is no row"):
            rows[place]
    with pytest.raises(IndexError, match="not inside"):
        rows.take([0, len(rows)])
    for epoch in (-1, EPOCHS):
        with pytest.raises(ConfigError, match=f"there is no epoch {epoch}"):
            rows.dataset(epoch)


# The cache.


def test_the_scored_rows_are_read_once(
    given: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")
    scored = copy(given / "one", tmp_path / "scored")
    caplog.set_level(logging.INFO, "entrodrop_prep")
    first = tuples(MaskedRows.open(scored, **STEEP))
    assert [r.message for r in caplog.records if "caching" in r.message]
    (cached,) = (tmp_path / "datasets" / "entrodrop").iterdir()
    (scored / "shard-00001.parquet").unlink()
    caplog.clear()
    assert tuples(MaskedRows.open(copy(scored, tmp_path / "moved"), **STEEP)) == first
    assert not caplog.records
    assert tuples(MaskedRows.open(scored, **STEEP, quantile=0.3)) != first  # from the cached rows
    assert [cached] == list(cached.parent.iterdir())
    with pytest.raises(IntegrityError, match="the file is missing"):  # log-probabilities were not cached
        MaskedRows.open(scored, **STEEP, keep_surprising=1.0)


@pytest.mark.parametrize("name", ["entropy", "columns.json"])
def test_a_cache_that_was_cut_short(name: str, given: Path, tmp_path: Path) -> None:
    first = tuples(MaskedRows.open(given / "one", **STEEP, cache_dir=tmp_path))
    (file,) = tmp_path.glob(f"*/{name}")
    if name == "columns.json":  # as a run that was killed leaves it
        file.unlink()
        assert tuples(MaskedRows.open(given / "one", **STEEP, cache_dir=tmp_path)) == first
    else:
        file.write_bytes(file.read_bytes()[:-4])
        with pytest.raises(IntegrityError, match="the cached rows are damaged"):
            MaskedRows.open(given / "one", **STEEP, cache_dir=tmp_path)


def test_a_flipped_bit_of_the_cache_is_found(given: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In any file, at its ends and in between, in blocks of which several make a file."""
    monkeypatch.setattr(arrays, "BLOCK", 64)
    settings: dict[str, Any] = {**STEEP, "target": "both", "keep_surprising": 2.0}
    first = tuples(MaskedRows.open(given / "one", **settings, cache_dir=tmp_path))
    rng, flipped = np.random.default_rng(0), 0
    files = [file for file in sorted(tmp_path.rglob("*")) if file.is_file() and file.name != ".lock"]
    assert {"input_ids", "logprob", "flags", "columns.json"} < {file.name for file in files}
    assert len([file for file in files if file.name == "columns.json"]) == 2
    for file in files:
        data = file.read_bytes()
        for place in {0, 64, len(data) - 1, *rng.integers(0, len(data), 8).tolist()}:
            changed = bytearray(data)
            changed[place] ^= 1 << int(rng.integers(8))
            file.write_bytes(changed)
            again = {**settings, "seed": flipped} if file.name in ("entropy", "logprob", "loss_mask") else settings
            with pytest.raises(IntegrityError, match=f"{file}: the cached rows are damaged; remove {file.parent}"):
                tuples(MaskedRows.open(given / "one", **again, cache_dir=tmp_path))
            flipped += 1
        file.write_bytes(data)
    assert flipped > 80
    assert tuples(MaskedRows.open(given / "one", **settings, cache_dir=tmp_path)) == first


def test_damaged_scores_are_not_cached(given: Path, tmp_path: Path) -> None:
    scored = copy(given / "one", tmp_path / "scored")
    path = scored / "shard-00002.parquet"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(IntegrityError, match="its bytes are not those"):
        MaskedRows.open(scored, **STEEP, cache_dir=tmp_path / "cache")
    assert not list((tmp_path / "cache").glob("*/*"))


def _read(scored: str, cache: str, out: str) -> None:
    Path(out).write_bytes(pickle.dumps(tuples(MaskedRows.open(scored, **STEEP, cache_dir=cache))))


def test_several_processes_make_one_cache(given: Path, tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    arguments = [(str(given / "one"), str(tmp_path / "cache"), str(tmp_path / f"{i}.pickle")) for i in range(4)]
    processes = [context.Process(target=_read, args=a) for a in arguments]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [p.exitcode for p in processes] == [0] * 4
    expected = tuples(MaskedRows.open(given / "one", **STEEP, cache_dir=tmp_path / "other"))
    assert all(pickle.loads(Path(a[2]).read_bytes()) == expected for a in arguments)


def test_what_cannot_be(given: Path, tmp_path: Path) -> None:
    one = str(given / "one")
    with pytest.raises(ConfigError, match="takes no setting 'rows_per_shard'"):
        MaskedRows.open(one, epochs=2, rows_per_shard=3, cache_dir=tmp_path)
    with pytest.raises(ConfigError, match="--epochs is missing"):
        MaskedRows.open(one, cache_dir=tmp_path)
    with pytest.raises(ConfigError, match="no such column"):
        MaskedRows.open(one, epochs=2, scope="column:topic", cache_dir=tmp_path)
    with pytest.raises(IntegrityError, match="no such directory"):
        MaskedRows.open(tmp_path / "nowhere", epochs=2, cache_dir=tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="give another cache_dir"):
        MaskedRows.open(one, epochs=2, cache_dir=tmp_path / "file")
    unlabelled = some_rows(6)
    unlabelled.loss_mask[:] = False
    with pytest.raises(SourceError, match="no row has anything to train on in epoch 0"):
        MaskedRows.open(write_scored(tmp_path / "empty", unlabelled), epochs=2, quantile=0, cache_dir=tmp_path)
    with pytest.raises(SourceError, match=r"no row has anything to train on in epoch \d.*weights so small"):
        MaskedRows.open([f"a={one}:0.001"], epochs=40, cache_dir=tmp_path)
    for text, said in (
        (f"{one}:2", f"a source with a weight needs a name; write NAME={one}:2"),
        (f"a={one}:1e1", "'1e1'"),
    ):
        with pytest.raises(ConfigError, match=said):
            MaskedRows.open([text], epochs=2, cache_dir=tmp_path)

    settings = settings_of("a mixture", given)
    written(tmp_path / "mixed", settings)
    with pytest.raises(ConfigError, match="made from a, b, not source; give their directories by name"):
        MaskedRows.like(tmp_path / "mixed", one)
    with pytest.raises(IntegrityError, match="the content digests differ"):
        MaskedRows.like(tmp_path / "mixed", {"a": one, "b": one})


# The stream: any number of ranks and workers.


def naive_steps(rows: list[Row], batch: int, ranks: int, drop_last: bool = False) -> list[list[list[Row]]]:
    """For each rank its batches: global batches in order, the rows of the last shared out one by one."""
    result: list[list[list[Row]]] = [[] for _ in range(ranks)]
    for first in range(0, len(rows), batch * ranks):
        some = rows[first : first + batch * ranks]
        sizes = [batch] * ranks
        if len(some) < batch * ranks:
            if drop_last:
                break
            sizes = [0] * ranks
            for i in range(len(some)):
                sizes[i % ranks] += 1
        for rank in range(ranks):
            mine = some[sum(sizes[:rank]) : sum(sizes[: rank + 1])]
            result[rank] += [mine] if mine else []
    return result


@pytest.fixture(scope="module")
def mixed(given: Path) -> tuple[MaskedRows, list[list[Row]]]:
    """A mixture's rows, its sources of different size in every epoch."""
    rows = MaskedRows.open(**settings_of("a mixture", given), cache_dir=given / "cache")
    ends = np.cumsum(rows.epoch_lengths).tolist()
    everything = tuples(rows)
    return rows, [everything[a:b] for a, b in itertools.pairwise([0, *ends])]


@pytest.mark.parametrize(("ranks", "workers"), [(1, 0), (2, 1), (1, 2), (2, 4)])
def test_batches_do_not_depend_on_workers(ranks: int, workers: int, mixed: tuple[MaskedRows, list[list[Row]]]) -> None:
    rows, epochs = mixed
    expected = naive_steps([row for epoch in epochs for row in epoch], 4, ranks)
    for rank in range(ranks):
        stream = rows.stream(4, rank=rank, world_size=ranks)
        loader = DataLoader(stream, batch_size=4, num_workers=workers, collate_fn=tuples)
        assert list(loader) == expected[rank]
        assert len(loader) == len(expected[rank])


@pytest.mark.parametrize(("batch", "ranks"), [(1, 1), (3, 2), (5, 3), (64, 2), (2, 7), (500, 3)])
@pytest.mark.parametrize("drop_last", [False, True])
def test_no_row_is_lost_and_none_comes_twice(
    batch: int, ranks: int, drop_last: bool, mixed: tuple[MaskedRows, list[list[Row]]]
) -> None:
    rows, epochs = mixed
    for e, epoch in enumerate(epochs):
        expected = naive_steps(epoch, batch, ranks, drop_last)
        for rank in range(ranks):
            stream = rows.stream(batch, rank=rank, world_size=ranks, epoch=e, drop_last=drop_last)
            loader = MaskedLoader(stream, collate_fn=tuples)
            assert list(loader) == expected[rank]
            assert len(loader) == len(expected[rank])
            assert len(stream) == sum(map(len, expected[rank]))
        came = sum(len(b) for r in expected for b in r)
        assert came == (len(epoch) // (batch * ranks) * batch * ranks if drop_last else len(epoch))


def test_the_comparison_can_fail(mixed: tuple[MaskedRows, list[list[Row]]]) -> None:
    """Another batch size than the stream's, several workers: the order is lost, as the page says."""
    rows, epochs = mixed
    everything = [row for epoch in epochs for row in epoch]
    for size, right in ((4, True), (3, False)):
        loader = DataLoader(rows.stream(4), batch_size=size, num_workers=2, collate_fn=tuples)
        assert ([row for batch in loader for row in batch] == everything) == right


@pytest.mark.parametrize("options", [{}, {"num_workers": 2}, {"num_workers": 2, "persistent_workers": True}])
def test_set_epoch_reaches_the_workers(options: dict[str, Any], mixed: tuple[MaskedRows, list[list[Row]]]) -> None:
    rows, epochs = mixed
    stream = rows.stream(4, epoch=0)
    options |= {"collate_fn": tuples}
    for loader in (MaskedLoader(stream, **options), DataLoader(stream, 4, **options)):
        for e in (0, 2, 1, 1):
            stream.set_epoch(e)
            assert len(loader) == -(-len(epochs[e]) // 4)
            assert [row for batch in loader for row in batch] == epochs[e]


def test_a_stream_of_all_epochs_has_no_other(mixed: tuple[MaskedRows, list[list[Row]]]) -> None:
    rows, epochs = mixed
    stream = rows.stream(4)
    stream.set_epoch(0)  # as trainers do with their one epoch
    assert tuples(stream) == [row for epoch in epochs for row in epoch]
    with pytest.raises(ConfigError, match="all epochs in one pass"):
        stream.set_epoch(1)
    with pytest.raises(ConfigError, match="there is no epoch 3"):
        rows.stream(4, epoch=0).set_epoch(3)
    with pytest.raises(ConfigError, match="there is no epoch 3"):
        rows.stream(4, epoch=3)
    for bad in ({"batch_size": 0}, {"batch_size": 1, "rank": 2, "world_size": 2}, {"batch_size": 1, "rank": -1}):
        with pytest.raises(ConfigError):
            rows.stream(**bad)
    for name in ("batch_size", "shuffle", "sampler"):
        with pytest.raises(ConfigError, match=f"takes no {name}"):
            MaskedLoader(stream, **{name: 1})


def test_a_map_style_loader(mixed: tuple[MaskedRows, list[list[Row]]]) -> None:
    rows, epochs = mixed
    everything = [row for epoch in epochs for row in epoch]
    every = pickle.loads(ForkingPickler.dumps(rows.dataset()))  # as a process that is not forked gets it
    for dataset, workers in ((rows, 0), (rows, 2), (every, 0)):
        loader = DataLoader(dataset, 4, num_workers=workers, collate_fn=tuples)
        assert [row for batch in loader for row in batch] == everything


def test_packed_rows_in_several_blocks_by_workers_and_going_on(
    given: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("entrodrop_prep.masking.packing.BLOCK_TOKENS", 120)
    settings = settings_of("packed, a mixture", given)
    every = [row for epoch in written(tmp_path / "masked", settings) for row in epoch]
    rows = MaskedRows.open(**settings, cache_dir=tmp_path / "cache")
    monkeypatch.setattr("entrodrop_prep.masking.packing.BLOCK_TOKENS", 1 << 22)
    in_one_block = MaskedRows.open(**settings, cache_dir=tmp_path / "other")
    assert tuples(in_one_block) != every
    monkeypatch.setattr("entrodrop_prep.masking.packing.BLOCK_TOKENS", 120)
    expected = naive_steps(every, 3, 2)
    for workers in (1, 2, 4):
        for rank in (0, 1):
            loader = MaskedLoader(rows.stream(3, rank=rank, world_size=2), num_workers=workers, collate_fn=tuples)
            assert list(loader) == expected[rank]
    came, state = begun(MaskedLoader(rows.stream(3, world_size=2), num_workers=2, collate_fn=tuples), 4)
    assert came == expected[0][:4]
    again = MaskedLoader(rows.stream(5), num_workers=1, collate_fn=tuples)
    again.load_state_dict(state)
    assert [row for batch in again for row in batch] == every[4 * 6 :]


# Going on.


def begun(loader: Any, batches: int) -> tuple[list[Any], dict[str, Any]]:
    """The first batches of a loader, and its state then; its workers have gone further."""
    iterator = iter(loader)
    came = [next(iterator) for _ in range(batches)]
    return came, pickle.loads(pickle.dumps(loader.state_dict()))


@pytest.mark.parametrize(
    ("batches", "epoch", "workers"), [(0, None, 2), (1, None, 0), (7, None, 2), (0, 1, 0), (1, 1, 2), (7, 1, 2)]
)
def test_stateful_dataloader_goes_on(
    batches: int, epoch: int | None, workers: int, mixed: tuple[MaskedRows, list[list[Row]]]
) -> None:
    rows, epochs = mixed
    every = [row for e in epochs for row in e] if epoch is None else epochs[epoch]
    expected = naive_steps(every, 3, 2)[1]

    def loader(epoch: int | None) -> Any:
        stream = rows.stream(3, rank=1, world_size=2, epoch=epoch)
        return StatefulDataLoader(stream, batch_size=3, num_workers=workers, collate_fn=tuples)

    came, state = begun(loader(epoch), batches)
    assert came == expected[:batches]
    again = loader(None if epoch is None else 0)  # the epoch is in the state
    again.load_state_dict(state)
    assert list(again) == expected[batches:]
    if epoch is None:
        assert list(again) == expected  # and the next pass is a whole one


NUMBERS = [(3, 2, 2), (2, 3, 1), (7, 1, 0)]


@pytest.mark.parametrize(("batch", "ranks", "workers"), NUMBERS)
@pytest.mark.parametrize("epoch", [None, 1])
def test_a_masked_loader_goes_on_with_other_numbers(
    epoch: int | None, batch: int, ranks: int, workers: int, mixed: tuple[MaskedRows, list[list[Row]]]
) -> None:
    rows, epochs = mixed
    every = [row for e in epochs for row in e] if epoch is None else epochs[epoch]
    done = 5
    first = MaskedLoader(rows.stream(3, rank=1, world_size=2, epoch=epoch), num_workers=2, collate_fn=tuples)
    came, state = begun(first, done)
    assert came == naive_steps(every, 3, 2)[1][:done]
    assert state == {"epoch": epoch, "rows": done * 3 * 2, "batches": done}

    rest = naive_steps(every[done * 3 * 2 :], batch, ranks)
    for rank in range(ranks):
        stream = rows.stream(batch, rank=rank, world_size=ranks, epoch=None if epoch is None else 0)
        loader = MaskedLoader(stream, num_workers=workers, collate_fn=tuples)
        loader.load_state_dict(state)
        assert len(loader) == done + len(rest[rank])
        came, then = begun(loader, 2)
        assert came == rest[rank][:2]
        assert then["rows"] == done * 3 * 2 + 2 * batch * ranks
        loader.load_state_dict(state)
        if epoch is not None:
            loader.set_epoch(epoch)  # as a loop over epochs does
        assert list(loader) == rest[rank]
        assert len(loader) == done + len(rest[rank])
        assert list(loader) == naive_steps(every, batch, ranks)[rank]  # the next pass is a whole one


def test_a_state_at_the_end_of_an_epoch(mixed: tuple[MaskedRows, list[list[Row]]]) -> None:
    rows, epochs = mixed
    loader = MaskedLoader(rows.stream(4, epoch=1), collate_fn=tuples)
    assert [r for b in loader for r in b] == epochs[1]
    state = loader.state_dict()
    assert state["rows"] == len(epochs[1])

    again = MaskedLoader(rows.stream(4, epoch=0), collate_fn=tuples)
    again.load_state_dict(state)
    came = []
    for e in range(state["epoch"], EPOCHS):
        again.set_epoch(e)
        came.append([r for b in again for r in b])
    assert came == [[], epochs[2]]

    anew = MaskedLoader(rows.stream(4, epoch=2), collate_fn=tuples)  # made for the next epoch: that one is over
    anew.load_state_dict(state)
    assert [r for b in anew for r in b] == epochs[2]

    loader.set_epoch(2)
    assert loader.state_dict() == {"epoch": 2, "rows": 0, "batches": 0}


def test_states_of_other_streams(mixed: tuple[MaskedRows, list[list[Row]]]) -> None:
    rows, epochs = mixed
    makers: list[Callable[[MaskedStream], Any]] = [lambda s: s, MaskedLoader]
    for make in makers:
        for epoch, state in (
            (0, {"epoch": None, "rows": 3, "batches": 1}),
            (None, {"epoch": 0, "rows": 3, "batches": 1}),
            (0, {"epoch": 0, "rows": len(epochs[0]) + 1, "batches": 1}),
            (0, {"epoch": EPOCHS, "rows": 0, "batches": 0}),
        ):
            with pytest.raises(ConfigError):
                make(rows.stream(3, epoch=epoch)).load_state_dict(state)


@pytest.mark.parametrize(("batch", "ranks", "workers"), [(5, 1, 2), (3, 2, 2), (3, 1, 1)])
def test_stateful_dataloader_with_other_numbers_is_refused(
    batch: int, ranks: int, workers: int, mixed: tuple[MaskedRows, list[list[Row]]]
) -> None:
    """A worker's own place means other rows then: some would be lost, and some come twice."""
    rows, _ = mixed
    first = StatefulDataLoader(rows.stream(3), batch_size=3, num_workers=2, collate_fn=tuples)
    _, state = begun(first, 5)
    stream = rows.stream(batch, world_size=ranks)
    again = StatefulDataLoader(stream, batch_size=batch, num_workers=workers, collate_fn=tuples)
    again.load_state_dict(state)
    numbers = f"batch_size={batch}, world_size={ranks}, num_workers={workers}"
    said = rf"(?s)batch_size=3, world_size=1, num_workers=2, this is {numbers}.*MaskedLoader"
    with pytest.raises(ConfigError, match=said):
        list(again)


def test_a_state_of_workers_is_no_state_of_a_process(mixed: tuple[MaskedRows, list[list[Row]]]) -> None:
    rows, _ = mixed
    numbers = {"batch_size": 3, "world_size": 1, "num_workers": 2}
    with pytest.raises(ConfigError, match="num_workers=2, this is no workers; use MaskedLoader"):
        rows.stream(3).load_state_dict({"epoch": None, "rows": 6, **numbers})


def test_a_stream_has_no_place_while_workers_make_its_rows(mixed: tuple[MaskedRows, list[list[Row]]]) -> None:
    rows, epochs = mixed
    stream = rows.stream(4, epoch=1)
    for loader in (DataLoader(stream, 4, num_workers=2, collate_fn=tuples), MaskedLoader(stream, num_workers=2)):
        assert stream.state_dict() == {"epoch": 1, "rows": 0}
        loader.collate_fn = tuples
        next(iter(loader))
        with pytest.raises(ConfigError, match="use MaskedLoader and its state_dict"):
            stream.state_dict()
        stream.seek(1, 0)
    assert tuples(stream) == epochs[1]
    assert stream.state_dict() == {"epoch": 1, "rows": len(epochs[1])}


def test_a_plain_dataloader_with_workers_does_not_go_on(mixed: tuple[MaskedRows, list[list[Row]]]) -> None:
    """Its workers would begin every later pass in the middle too."""
    rows, epochs = mixed
    stream = rows.stream(4, epoch=1)
    stream.load_state_dict({"epoch": 1, "rows": 8})
    with pytest.raises(ConfigError, match=r"(?s)a plain DataLoader with workers cannot resume .*use MaskedLoader"):
        list(DataLoader(stream, 4, num_workers=2, collate_fn=tuples))
    stream.load_state_dict({"epoch": 1, "rows": 8})
    loader = DataLoader(stream, 4, collate_fn=tuples)
    assert [row for batch in loader for row in batch] == epochs[1][8:]
    assert [row for batch in loader for row in batch] == epochs[1]


def test_a_stream_alone_goes_on(mixed: tuple[MaskedRows, list[list[Row]]]) -> None:
    rows, epochs = mixed
    stream = rows.stream(4, epoch=1)
    assert stream.state_dict() == {"epoch": 1, "rows": 0}
    iterator = iter(stream)
    came = tuples(itertools.islice(iterator, 8))
    assert stream.state_dict() == {"epoch": 1, "rows": 8}
    again = rows.stream(5, epoch=0)
    again.load_state_dict(stream.state_dict())
    assert came + tuples(again) == epochs[1]
