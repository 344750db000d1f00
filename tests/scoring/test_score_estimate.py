"""``score --dry-run``: the estimate of a run is what the run then takes, and nothing is written."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from entrodrop_prep import cli
from entrodrop_prep.errors import EntrodropError, MismatchError, OutputError
from entrodrop_prep.scoring import estimate as estimate_module
from entrodrop_prep.scoring.estimate import ScoreEstimate, estimate
from entrodrop_prep.sources import sample as sample_module
from entrodrop_prep.store import manifest
from helpers.models import FIRST_WORD, run_score, save_model, settings_for, shards, tiny_llama, words

V = 331
ROWS = 1200


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model") / "tiny", tiny_llama(V))


@pytest.fixture(autouse=True)
def short_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(estimate_module, "PROBE_SECONDS", 0.2)


@pytest.fixture
def few_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Samples of a small part of a small source."""
    monkeypatch.setattr(sample_module, "BLOCKS", 40)
    monkeypatch.setattr(sample_module, "BLOCK_BYTES", 1000)


def texts(count: int = ROWS) -> list[dict[str, Any]]:
    """Rows that get longer from the first to the last, so that the first ones say little of the others."""
    rng = np.random.default_rng(0)
    share = 1 / (np.arange(V - FIRST_WORD) + 3)
    sizes = (rng.gamma(2, 10, count) * np.linspace(0.3, 2, count)).astype(int) + 2
    drawn = [FIRST_WORD + rng.choice(len(share), n, p=share / share.sum()) for n in sizes]
    return [{"text": words(ids.tolist())} for ids in drawn]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Rows in the format that the name says; a folder of several files where it names one."""
    lines = [json.dumps(row) for row in rows]
    if path.name.endswith(".parquet"):
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=100)
    elif path.name.endswith(".csv"):
        path.write_text("text\n" + "".join(f'"{row["text"]}"\n' for row in rows))
    elif path.name.endswith(".json"):
        path.write_text("[" + ",\n".join(lines) + "]")
    elif path.name.endswith(".gz"):
        path.write_bytes(gzip.compress("".join(f"{line}\n" for line in lines).encode()))
    elif path.name == "folder":
        path.mkdir()
        for i in range(8):
            (path / f"part-{i}.jsonl").write_text("".join(f"{line}\n" for line in lines[i::8]))
    else:
        path.write_text("".join(f"{line}\n" for line in lines))
    return path


def everything(folder: Path) -> dict[str, tuple[int, int]]:
    """Time and size of all that is below a folder."""
    found = {str(p): p.stat() for p in sorted(folder.rglob("*"))}
    return {name: (s.st_mtime_ns, s.st_size) for name, s in found.items()}


def estimated(source: Path, model: Path, out: Path, **settings: Any) -> ScoreEstimate:
    """The estimate; whatever it is of, no file comes, goes or changes."""
    before = everything(out.parent), everything(model)
    found = estimate(settings_for(source, model, out, **settings))
    assert (everything(out.parent), everything(model)) == before
    assert all(line.isprintable() for line in found.lines)
    return found


def disk(out: Path) -> int:
    return sum(p.stat().st_size for p in out.rglob("*") if p.is_file())


@pytest.mark.parametrize("settings", [{}, {"rows_per_shard": 90, "dtype": "bfloat16"}, {"logprob": False, "limit": 70}])
def test_a_small_source_is_told_exactly(tmp_path: Path, model: Path, settings: dict[str, Any]) -> None:
    source = write(tmp_path / "rows.jsonl", [*texts(200), {"text": "w5"}])
    told = estimated(source, model, tmp_path / "out", append_eos=False, **settings)
    counts = run_score(source, model, tmp_path / "out", append_eos=False, **settings).counts
    assert (told.rows.value, told.tokens.value, told.trainable.value) == (
        counts["rows_read"],
        counts["tokens"],
        counts["trainable_tokens"],
    )
    assert told.rows.error == told.tokens.error == 0
    assert told.shards == len(shards(tmp_path / "out"))
    assert abs(told.disk.value / disk(tmp_path / "out") - 1) < 0.1


@pytest.mark.parametrize("name", ["a.jsonl", "folder", "a.parquet", "a.jsonl.gz", "a.csv", "a.json"])
def test_a_sample_is_of_the_whole_source(tmp_path: Path, model: Path, name: str, few_blocks: None) -> None:
    rows = texts()
    source = write(tmp_path / name, rows)
    told = estimated(source, model, tmp_path / "out")
    tokens = sum(len(row["text"].split()) + 1 for row in rows)
    assert abs(told.rows.value / ROWS - 1) <= max(0.02, told.rows.error) < 0.3
    assert abs(told.tokens.value / tokens - 1) <= max(0.02, told.tokens.error) < 0.3
    assert told.bad_share == 0  # no row is cut where a sample begins
    assert told.tokens.error or name in ("a.jsonl.gz", "a.csv", "a.json")  # these were read to their ends


def test_the_first_rows_alone_would_be_far_off(tmp_path: Path, model: Path, few_blocks: None) -> None:
    """What the test above would not show, if the source were the same everywhere."""
    sizes = [len(row["text"]) for row in texts()]
    assert np.mean(sizes[:300]) < 0.6 * np.mean(sizes)


@pytest.mark.parametrize("limit", [1100, 10 * ROWS])
@pytest.mark.parametrize("most", [100_000, 800])
def test_a_limit_does_not_make_rows(
    tmp_path: Path, model: Path, few_blocks: None, monkeypatch: pytest.MonkeyPatch, limit: int, most: int
) -> None:
    """The first rows are short; with ``most`` of 800 no more than these are looked at, but the rows are estimated."""
    monkeypatch.setattr(sample_module, "MOST_ROWS", most)
    rows = texts()
    told = estimated(write(tmp_path / "a.jsonl", rows), model, tmp_path / "out", limit=limit)
    read = rows[:limit]
    assert abs(told.rows.value / len(read) - 1) <= (0 if most > ROWS else 0.1)
    if most > ROWS:
        assert not told.beginning
        assert abs(told.tokens.value / sum(len(row["text"].split()) + 1 for row in read) - 1) <= told.tokens.error < 0.3


@pytest.mark.parametrize("rows_per_shard", [2000, 100])
def test_disk_from_a_sample(tmp_path: Path, model: Path, rows_per_shard: int, few_blocks: None) -> None:
    source = write(tmp_path / "a.jsonl", texts())
    told = estimated(source, model, tmp_path / "out", rows_per_shard=rows_per_shard)
    run_score(source, model, tmp_path / "out", rows_per_shard=rows_per_shard)
    assert abs(told.disk.value / disk(tmp_path / "out") - 1) < 0.1
    assert abs(told.shards - len(shards(tmp_path / "out"))) <= 1


def test_what_is_finished_counts(tmp_path: Path, model: Path) -> None:
    source = write(tmp_path / "rows.jsonl", texts(200))
    whole = estimated(source, model, tmp_path / "out", rows_per_shard=50)
    run_score(source, model, tmp_path / "out", rows_per_shard=50)
    shards(tmp_path / "out")[2].unlink()
    (tmp_path / "out" / manifest.NAME).unlink()
    left = estimated(source, model, tmp_path / "out", rows_per_shard=50)
    assert (whole.shards, whole.there, left.shards, left.there) == (4, 0, 4, 3)
    assert left.disk.value < 0.6 * whole.disk.value
    assert estimated(source, model, tmp_path / "out", rows_per_shard=50, overwrite=True).there == 0
    with pytest.raises(MismatchError, match="rows_per_shard was 50, now 60"):
        estimated(source, model, tmp_path / "out", rows_per_shard=60)


def test_bad_rows_are_counted(tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = texts(100)
    rows[50] = {"text": 5}
    source = write(tmp_path / "rows.jsonl", rows)
    told = estimated(source, model, tmp_path / "out")
    assert told.bad_share == 0.01
    assert any(line.startswith("bad rows: 1.00%; they stop the run") for line in told.lines)
    assert "rows.jsonl:51" in told.bad_example


def test_workers_share_shards(tmp_path: Path, model: Path) -> None:
    source = write(tmp_path / "rows.jsonl", texts(200))
    told = estimated(source, model, tmp_path / "out", rows_per_shard=20)
    assert told.shards == 10
    work = told.scoring.value
    for workers, shares in ((1, 10), (2, 5), (3, 4), (4, 3), (10, 1), (64, 1)):
        assert told.seconds(workers) == pytest.approx(told.start + work * shares / 10)
    (line,) = [line for line in told.lines if line.startswith("workers: ")]
    assert [part.split()[0] for part in line.removeprefix("workers: ").split(";")[0].split(", ")] == ["2", "4", "8"]


@pytest.mark.parametrize(
    "flags",
    [
        ["--max-length", "4000"],
        ["--text-column", "nothing"],
        ["--keep-columns", "nothing"],
        ["--model", "/no/such/model"],
        ["--overlap", "200"],
        ["--out", "/dev/null"],
        ["--out", "."],
        ["--device", "mps"],
        ["--backend", "server"],
    ],
)
def test_what_cannot_be_fails_as_in_the_run(
    tmp_path: Path, model: Path, flags: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    source = write(tmp_path / "rows.jsonl", texts(10))
    command = ["score", str(source), "--model", str(model), "--out", "out", "--backend", "transformers", *flags]
    said = []
    for more in (["--dry-run"], []):
        assert cli.run([*command, *more]) == 2
        said.append([line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")])
        if more:
            assert os.listdir(tmp_path) == ["rows.jsonl"]
    assert said[0] == said[1]
    assert len(said[0]) == 1


def test_a_place_inside_the_source_is_refused(tmp_path: Path, model: Path) -> None:
    source = write(tmp_path / "folder", texts(16))
    with pytest.raises(OutputError, match="cannot be inside its source"):
        estimate(settings_for(source, model, source / "out"))
    assert not (source / "out").exists()


def test_score_itself_refuses(tmp_path: Path, model: Path) -> None:
    source = write(tmp_path / "rows.jsonl", texts(10))
    with pytest.raises(ValueError, match="dry_run is for"):
        run_score(source, model, tmp_path / "out", dry_run=True)
    assert not (tmp_path / "out").exists()
    source.write_text('{"text": "w5"}\n')
    with pytest.raises(EntrodropError, match="no row of it can be scored"):
        estimated(source, model, tmp_path / "out", append_eos=False)
