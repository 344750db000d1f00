"""``--pack``: against the rules read literally, and what must hold of any packing."""

from __future__ import annotations

import functools
import logging
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from entrodrop_prep import cli
from entrodrop_prep.config import EXTRA_COLUMNS, MaterializeConfig, Recipe
from entrodrop_prep.errors import MismatchError, SourceError
from entrodrop_prep.export.materialize import MaterializeSummary, materialize
from entrodrop_prep.masking import packing
from entrodrop_prep.masking.packing import Bins, Segments, block_rows, cut, pack
from entrodrop_prep.store.rows import Rows
from entrodrop_prep.verification.run import verify
from helpers.mixtures import SOURCES, Given, naive_rows, rows_in, run_materialize
from helpers.scored import all_bytes, copy, manifest_of, rewrite_manifest, write_scored

TRAIN, MORE, HELD = SOURCES.values()
Members = list[tuple[int, int, int]]


# The rules, read literally.


def naive_pack(segments: Members, limit: int, block: int) -> list[Members]:
    """(place, start, stop) of each segment of each packed row."""
    result: list[Members] = []
    for k in sorted({place // block for place, _, _ in segments}):
        rows: list[Members] = []
        for place, start, stop in sorted(
            (s for s in segments if s[0] // block == k), key=lambda s: (s[1] - s[2], s[0], s[1])
        ):
            room = [limit - sum(b - a for _, a, b in row) for row in rows]
            fits = [(room[i], i) for i in range(len(rows)) if room[i] >= stop - start]
            if fits:
                rows[min(fits)[1]].append((place, start, stop))
            else:
                rows.append([(place, start, stop)])
        result += sorted(sorted(row) for row in rows)
    return result


def naive_epoch(rows: list[dict[str, Any]], limit: int, block: int) -> list[tuple[Any, ...]]:
    """Each packed row of ``naive_rows``: input_ids, attention_mask, labels, n_trainable, position_ids, seq_lengths."""
    segments = [
        (place, start, min(start + limit, len(r["ids"])))
        for place, r in enumerate(rows)
        for start in range(0, len(r["ids"]), limit)
    ]
    segments = [(p, a, b) for p, a, b in segments if any(rows[p]["trainable"][a + 1 : b])]
    result = []
    for members in naive_pack(segments, limit, block):
        ids: list[int] = []
        labels: list[int] = []
        spare: list[tuple[float, int, int]] = []
        for place, a, b in members:
            r = rows[place]
            gone = [t for t in range(a + 1, b) if r["dropped"][t]]
            spare += [(-r["entropy"][t], len(ids) + t - a, r["ids"][t]) for t in gone]
            ids += r["inputs"][a:b]
            labels += [-100, *r["labels"][a + 1 : b]]
        if all(x == -100 for x in labels):
            _, at, token = min(spare)
            ids[at] = labels[at] = token
        trainable = sum(sum(rows[p]["trainable"][a + 1 : b]) for p, a, b in members)
        lengths = [b - a for _, a, b in members]
        result.append((ids, [1] * len(ids), labels, trainable, [t for n in lengths for t in range(n)], lengths))
    return result


# The plan.

LENGTHS = st.lists(st.integers(1, 40), max_size=60)


def members_of(bins: Bins) -> list[Members]:
    s = bins.segments
    every = list(zip(s.position.tolist(), s.start.tolist(), s.stop.tolist(), strict=True))
    return [every[a:b] for a, b in pairwise(bins.offsets.tolist())]


@given(LENGTHS, st.integers(1, 30), st.integers(1, 25))
def test_a_plan_is_what_the_rules_say(lengths: list[int], limit: int, block: int) -> None:
    segments = cut(np.array(lengths, np.int64), limit)
    bins = pack(segments, limit, block)
    every = [(p, a, min(a + limit, n)) for p, n in enumerate(lengths) for a in range(0, n, limit)]
    assert members_of(bins) == naive_pack(every, limit, block)
    placed = sorted(s for row in members_of(bins) for s in row)
    assert placed == every  # every token once
    assert all(sum(b - a for _, a, b in row) <= limit for row in members_of(bins))
    assert bins.tokens() == sum(lengths)
    for k, (a, b) in enumerate(pairwise(bins.blocks.tolist())):
        assert all(p // block == k for row in members_of(bins)[a:b] for p, _, _ in row)
    assert bins.blocks[-1] == len(bins)


@given(st.lists(st.integers(1, 30), min_size=1, max_size=40), st.data())
def test_segments_that_are_left_out_are_left_out_of_the_plan_alone(lengths: list[int], data: st.DataObject) -> None:
    segments = cut(np.array(lengths, np.int64), 12)
    kept = np.array(data.draw(st.lists(st.booleans(), min_size=len(segments), max_size=len(segments))), bool)
    some = segments[kept]
    every = list(zip(some.position.tolist(), some.start.tolist(), some.stop.tolist(), strict=True))
    assert members_of(pack(some, 12, 7)) == naive_pack(every, 12, 7)


def test_a_segment_over_the_limit_is_a_bug() -> None:
    one = Segments(*(np.array([x]) for x in (0, 0, 9)))
    with pytest.raises(ValueError, match="longer than 8"):
        pack(one, 8, 5)


def test_it_fills_rows_better_than_next_fit() -> None:
    rng = np.random.default_rng(3)
    lengths = np.clip(rng.lognormal(5, 1, 20_000).astype(np.int64), 2, 2048)
    bins = pack(cut(lengths, 2048), 2048, block_rows(len(lengths), int(lengths.sum())))
    next_fit, room = 0, 0
    for n in lengths.tolist():
        if n > room:
            next_fit, room = next_fit + 1, 2048
        room -= n
    assert len(bins) < next_fit
    assert bins.tokens() / (2048 * len(bins)) > 0.99
    assert lengths.sum() / (2048 * next_fit) < 0.95


def test_a_block_is_about_four_million_tokens() -> None:
    assert block_rows(10_000_000, 4_000_000_000) == pytest.approx(10_486, abs=1)
    assert block_rows(3, 100_000_000) == 1
    assert block_rows(10, 100) > 10


# The files.


def run(made: Path, out: Path, **settings: Any) -> MaterializeSummary:
    return run_materialize(
        made / "train", out, **{"rows_per_shard": 7, "pack": 64, "add_columns": EXTRA_COLUMNS, **settings}
    )


def recipe_of(settings: dict[str, Any]) -> Recipe:
    return Recipe(epochs=2, **{k: v for k, v in settings.items() if k in Recipe.__dataclass_fields__})


KINDS: dict[str, tuple[dict[str, Given], dict[str, Any]]] = {
    "one": ({"source": Given(TRAIN)}, {}),
    "mixture": ({"a": Given(TRAIN, 1.5), "b": Given(MORE)}, {"scope": "source"}),
    "replay": ({"a": Given(TRAIN), "b": Given(MORE, 2, plain=True)}, {"target": "both"}),
}
SETTINGS: list[dict[str, Any]] = [
    {},
    {"pack": 9, "schedule": "constant", "max_rate": 1.0, "quantile": 1.0},
    {"pack": 9, "schedule": "constant", "max_rate": 1.0, "quantile": 1.0, "target": "both"},
    {"pack": 17, "target": "inputs", "shuffle": "none"},
    {"pack": 30, "progress": "row", "shuffle": "once", "schedule": "linear"},
]


def arguments(kind: str, made: Path) -> dict[str, Any]:
    if kind == "one":
        return {}
    if kind == "mixture":
        return {"scored": (f"a={made / 'train'}:1.5", f"b={made / 'more'}")}
    return {"scored": (f"a={made / 'train'}",), "plain": (f"b={made / 'more'}:2",)}


def against(kind: str, made: Path) -> list[str]:
    return [str(made / "train")] if kind == "one" else [f"a={made / 'train'}", f"b={made / 'more'}"]


@functools.cache
def rows_of(kind: str, number: int, epoch: int | None) -> list[dict[str, Any]]:
    """``naive_rows`` of one kind and settings."""
    sources, more = KINDS[kind]
    return naive_rows(sources, recipe_of({**more, **SETTINGS[number]}), epoch)


@pytest.mark.parametrize(
    ("kind", "number", "block_tokens"),
    [
        *[(list(KINDS)[number % 3], number, 1 << 22) for number in range(len(SETTINGS))],
        *[(list(KINDS)[(number + 1) % 3], number, 200) for number in range(len(SETTINGS))],
    ],
)
def test_packed_rows_are_what_the_rules_say(
    kind: str, number: int, block_tokens: int, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packing, "BLOCK_TOKENS", block_tokens)
    settings = {**KINDS[kind][1], **SETTINGS[number]}
    limit = settings.get("pack", 64)
    summary = run(made, tmp_path / "out", plain_config=True, **arguments(kind, made), **settings)
    recipe = recipe_of(settings)
    for epoch in (0, 1, None):
        whole = rows_of(kind, number, epoch)
        block = block_rows(len(whole), sum(len(r["ids"]) for r in whole))
        expected = naive_epoch(whole, limit, block)
        assert rows_in(tmp_path / "out" / ("plain" if epoch is None else f"epoch_{epoch:03d}")) == expected
        told = manifest_of(tmp_path / "out")["plain"] if epoch is None else summary.epochs[epoch]
        tokens = sum(len(row[0]) for row in expected)
        assert (told["rows"], told["tokens"]) == (len(expected), tokens)
        assert told["documents"] == sum(len(row[5]) for row in expected)
        assert told["utilisation"] == pytest.approx(tokens / (len(expected) * limit))
        assert told["labels_left"] == sum(x != -100 for row in expected for x in row[2])
        assert told["rows_cut"] == sum(len(r["ids"]) > limit for r in whole)
        pieces = sum(-(-len(r["ids"]) // limit) for r in whole)
        assert told["pieces_left_out"] == pieces - told["documents"]
        if epoch is not None:
            assert told["trainable"] == sum(row[3] for row in expected)
            assert told["trainable"] - told["labels_left"] == (told["dropped"] if recipe.target != "inputs" else 0)
            assert (block_tokens > 200) == (block > len(whole))
    assert not verify(str(tmp_path / "out"), against(kind, made)).findings


def test_the_tests_see_rows_that_lose_every_label(made: Path) -> None:
    """The rule that a packed row keeps a label is one that SETTINGS put to work."""
    rows, plain = (naive_epoch(rows_of("one", 1, epoch), 9, 10_000) for epoch in (1, None))
    bare = [(row, whole) for row, whole in zip(rows, plain, strict=True) if sum(x != -100 for x in row[2]) == 1]
    assert len(bare) > 5
    assert any(whole[3] > 1 for _, whole in bare)


def test_three_columns_unless_asked(made: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run(made, tmp_path / "extra")
    assert not [r for r in caplog.records if "see each other" in r.getMessage()]
    run(made, tmp_path / "out", add_columns=())
    assert [r for r in caplog.records if r.levelno == logging.WARNING and "see each other" in r.getMessage()]
    for epoch in range(2):
        rows = rows_in(tmp_path / "out" / f"epoch_{epoch:03d}")
        assert rows == [row[:3] for row in rows_in(tmp_path / "extra" / f"epoch_{epoch:03d}")]
    assert not verify(str(tmp_path / "out"), str(made / "train")).findings


def test_rows_that_are_cut_are_warned_of(made: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run(made, tmp_path / "long", pack=200)
    assert not [r for r in caplog.records if "are cut" in r.getMessage()]
    told = run(made, tmp_path / "short", pack=9).epochs[0]
    (warned,) = [r.getMessage() for r in caplog.records if "are cut" in r.getMessage()]
    assert f"{told['rows_cut']} rows are longer than --pack 9" in warned
    assert f"{told['pieces_left_out']} pieces" in warned
    assert told["pieces_left_out"] > 0


def test_a_multiple_is_of_packed_rows(made: Path, tmp_path: Path) -> None:
    run(made, tmp_path / "whole", plain_config=True)
    summary = run(made, tmp_path / "out", rows_multiple=4, plain_config=True)
    for name in ("epoch_000", "epoch_001", "plain"):
        whole, rows = rows_in(tmp_path / "whole" / name), rows_in(tmp_path / "out" / name)
        assert rows == whole[: len(whole) // 4 * 4]
    assert summary.epochs[0]["rows_left_out"] == len(rows_in(tmp_path / "whole" / "epoch_000")) % 4
    assert not verify(str(tmp_path / "out"), str(made / "train")).findings


def test_validation_rows_are_not_packed(made: Path, tmp_path: Path) -> None:
    run(made, tmp_path / "out", eval=str(made / "held"))
    assert all(row[5] == [len(row[0])] for row in rows_in(tmp_path / "out" / "validation"))
    given = [str(made / "train"), f"eval={made / 'held'}"]
    assert not verify(str(tmp_path / "out"), given).findings


def test_pieces_make_the_whole_and_missing_shards_are_made_again(made: Path, tmp_path: Path) -> None:
    whole, out = tmp_path / "whole", tmp_path / "out"
    settings = {"epochs": 4, "progress": "row", "pack": 40, "layout": ("concatenated", "jsonl")}
    run(made, whole, **settings)
    run(made, out, **{**settings, "layout": ()}, only_epochs="2-3")
    run(made, out, **settings)
    assert all_bytes(out, without=("README.md",)) == all_bytes(whole, without=("README.md",))
    for name in ("epoch_001/train-00002", "epoch_003/train-00000"):
        (file,) = out.glob(f"{name}*")
        file.unlink()
    (out / "manifest.json").unlink()
    run(made, out, **settings)
    assert all_bytes(out, without=("README.md",)) == all_bytes(whole, without=("README.md",))
    assert not verify(str(out), str(made / "train")).findings


@pytest.mark.parametrize("kind", ["one", "mixture"])
def test_file_and_group_sizes_change_nothing(
    kind: str, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from entrodrop_prep.export import epoch as epoch_module
    from entrodrop_prep.masking import columns
    from entrodrop_prep.store import scored

    monkeypatch.setattr(packing, "BLOCK_TOKENS", 300)
    run(made, tmp_path / "usual", **arguments(kind, made))
    monkeypatch.setattr(epoch_module, "GROUP_TOKENS", 100)
    monkeypatch.setattr(columns, "CHUNK_TOKENS", 70)
    monkeypatch.setattr(scored, "BATCH_TOKENS", 50)
    run(made, tmp_path / "small", **arguments(kind, made), rows_per_shard=3)
    for epoch in range(2):
        name = f"epoch_{epoch:03d}"
        assert rows_in(tmp_path / "small" / name) == rows_in(tmp_path / "usual" / name)
        files = (tmp_path / "small" / name).glob("*.parquet")
        assert max(pq.ParquetFile(file).num_row_groups for file in files) > 1
    told = [manifest_of(tmp_path / n)["epochs"] for n in ("usual", "small")]
    assert told[0] == told[1]
    assert not verify(str(tmp_path / "small"), against(kind, made)).findings


def test_packing_is_identity(made: Path, tmp_path: Path) -> None:
    run(made, tmp_path / "out")
    for change in ({"pack": 65}, {"pack": None}):
        with pytest.raises(MismatchError, match="pack was 64, now"):
            run(made, tmp_path / "out", **change)


def test_nothing_left_to_train_on(tmp_path: Path) -> None:
    """Two tokens a piece, and only those in front of each piece may be trained on."""
    n = 8
    rows = Rows(
        row_id=np.array([0]),
        window=np.zeros(1, np.int32),
        offsets=np.array([0, n]),
        input_ids=np.arange(20, 20 + n, dtype=np.int32),
        entropy=np.array([np.nan, *[1.0] * (n - 1)], np.float32),
        logprob=np.array([np.nan, *[-1.0] * (n - 1)], np.float32),
        loss_mask=np.array([t > 0 and t % 2 == 0 for t in range(n)]),
    )
    scored = write_scored(tmp_path / "scored", rows)
    values = {"scored": str(scored), "epochs": 2}
    with pytest.raises(SourceError, match="no row has anything to train on"):
        materialize(MaterializeConfig(out=str(tmp_path / "out"), pack=2, **values))
    materialize(MaterializeConfig(out=str(tmp_path / "other"), pack=3, **values))


def test_the_card_and_inspect_tell_of_it(made: Path, tmp_path: Path, capfd: Any) -> None:
    told = run(made, tmp_path / "out").epochs[0]
    text = (tmp_path / "out" / "README.md").read_text()
    assert "rows hold several documents, 64 tokens at most; `position_ids` and `seq_lengths` say" in text
    assert cli.run(["inspect", str(tmp_path / "out")]) == 0
    said = capfd.readouterr().out
    for line in (text, said):
        assert "documents" in line
        assert f"{told['utilisation']:.1%}" in line
    assert (
        cli.run(["materialize", str(made / "train"), "--out", str(tmp_path / "no"), "--epochs", "1", "--pack=1"]) == 2
    )
    assert "--pack" in capfd.readouterr().err


@pytest.mark.parametrize("figure", ["documents", "utilisation", "rows_cut", "pieces_left_out"])
def test_a_wrong_figure_is_found(figure: str, made: Path, tmp_path: Path) -> None:
    run(made, tmp_path / "whole", pack=20)
    out = copy(tmp_path / "whole", tmp_path / "out")
    epochs = manifest_of(out)["epochs"]
    epochs[1][figure] += 1
    rewrite_manifest(out, epochs=epochs)
    found = verify(str(out), str(made / "train")).findings
    assert any(("epoch 1" in f or "epochs[1]" in f) and figure in f for f in found), found
