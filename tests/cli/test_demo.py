"""The demo on a part of its corpus: the whole path on real input, twice."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from entrodrop_prep.store.schema import SCORED, scored_schema
from entrodrop_prep.store.shards import write_shard
from helpers.ranks import TRAINING

pytestmark = pytest.mark.training

EPOCHS, TOKENS = 4, 40_000
DEMO = """
import sys
from entrodrop_prep.cli import main
from entrodrop_prep.demo import run
run.MAX_TOKENS, run.STEPS = int(sys.argv.pop(1)), 3
main()
"""


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, str]:
    """The directory, and what the first and the second run printed."""
    home = tmp_path_factory.mktemp("home")
    said = []
    for more in ([], ["--json"]):
        done = TRAINING.run(
            [sys.executable, "-c", DEMO, str(TOKENS), "demo", "--out", "out", *more],
            cwd=home,
            env={**os.environ, "HOME": str(home), "HF_HOME": str(home / "hf")},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        printed, notes = (done.stderr, done.stdout) if more else (done.stdout, done.stderr)
        said.append(printed)
        if more:
            assert json.loads(notes) == {"command": "demo", "directory": "out"}
        else:
            assert not [line for line in notes.splitlines() if not line.startswith("scoring: ")], notes
    return home / "out", said[0], said[1]


def test_it_scores_real_source_and_writes_every_epoch(ran: tuple[Path, str, str]) -> None:
    out, _, _ = ran
    documents = [json.loads(line) for line in (out / "corpus.jsonl").read_text().splitlines()]
    assert len(documents) > 10
    scored = json.loads((out / "scored" / "manifest.json").read_text())
    assert 0.9 * TOKENS < scored["counts"]["tokens"] < 1.01 * TOKENS  # an end for each document
    masked = json.loads((out / "masked" / "manifest.json").read_text())
    assert [e["epoch"] for e in masked["epochs"]] == list(range(EPOCHS))
    shares = [e["dropped_share"] for e in masked["epochs"]]
    assert shares == sorted(shares)
    assert shares[0] < 0.02 < 0.3 < shares[-1] < 0.5


def test_its_scores_take_little_room(ran: tuple[Path, str, str], tmp_path: Path) -> None:
    """In float16, as a model in half precision has them, in one shard, beside 8 kB that it says of itself."""
    tables = [pq.read_table(path) for path in sorted((ran[0] / "scored").glob("shard-*.parquet"))]
    table, schema = pa.concat_tables(tables), scored_schema("float16", with_id=True)
    tokens = len(table["input_ids"].combine_chunks().flatten())
    write_shard(tmp_path / "shard.parquet", schema, [table.cast(schema)], {"schema": SCORED})
    assert (tmp_path / "shard.parquet").stat().st_size <= 4.5 * tokens + 8_000
    group = pq.read_metadata(tmp_path / "shard.parquet").row_group(0)
    size = {c.path_in_schema: c.total_compressed_size for c in map(group.column, range(group.num_columns))}
    assert size["entropy.list.element"] <= 1.7 * tokens


def test_it_shows_what_is_dropped(ran: tuple[Path, str, str]) -> None:
    _, said, _ = ran
    stretches = re.findall(r"-- epoch (\d): (\d+)% of these dropped\n(.*?)(?=\n-- |\n== )", said, re.S)
    assert [int(epoch) for epoch, _, _ in stretches] == [0, 2, 3]
    shaded = [text.count("░") for _, _, text in stretches]
    assert shaded == sorted(shaded)
    assert shaded[-1] > 100


def test_it_trains_on_the_first_and_the_last_epoch(ran: tuple[Path, str, str]) -> None:
    _, said, _ = ran
    found = re.findall(r"epoch (\d): \d+ steps, mean loss ([\d.]+) over ([\d,]+) labels", said)
    assert [epoch for epoch, _, _ in found] == ["0", "3"]
    losses, labels = [float(x) for _, x, _ in found], [int(x.replace(",", "")) for _, _, x in found]
    assert labels[1] < 0.8 * labels[0]
    assert losses[0] < 5 < 7.6  # a trained model's loss; uniform is ln 2048
    assert losses[1] > losses[0]  # easy tokens are gone


def test_running_it_again_shows_the_same(ran: tuple[Path, str, str]) -> None:
    _, first, second = ran
    kept = [line for line in first.splitlines() if line.startswith(("epoch  ", "    ", "-- "))]
    assert kept
    assert set(kept) <= set(second.splitlines())


def test_its_masks_are_those_of_the_recipe(ran: tuple[Path, str, str]) -> None:
    from entrodrop_prep import verify

    out, _, _ = ran
    assert verify(str(out / "masked"), against=str(out / "scored")).findings == []


def test_a_lost_directory_ends_the_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is not made again underneath, as where a disk was unmounted."""
    from entrodrop_prep.demo import run
    from entrodrop_prep.errors import OutputError

    def lost(path: Path, *arguments: object) -> None:
        path.write_text('{"text": "def f(): pass", "name": "f"}\n')
        shutil.move(tmp_path / "out", tmp_path / "elsewhere")

    monkeypatch.setattr(run, "write_corpus", lost)
    with pytest.raises(OutputError, match="the directory was removed, renamed, replaced or unmounted"):
        run.demo(str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()
