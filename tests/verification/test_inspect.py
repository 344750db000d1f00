"""``inspect --row``: the text of a row, and the tokens that each epoch drops."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from entrodrop_prep.config import MaterializeConfig
from entrodrop_prep.errors import ConfigError
from entrodrop_prep.export.materialize import materialize
from entrodrop_prep.terminal.output import styled
from entrodrop_prep.verification.inspect import show
from entrodrop_prep.verification.inspect_rows import QUARTERS
from helpers.scored import some_rows, write_scored

EPOCHS = 3


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A scored directory with names of rows, a masked one, and a packed one; never written to by a test."""
    folder = tmp_path_factory.mktemp("made")
    write_scored(folder / "scored", some_rows(30, lengths=(8, 20)), with_id=True)
    one = {"scored": str(folder / "scored"), "epochs": EPOCHS, "max_rate": 1.0}
    materialize(MaterializeConfig(out=str(folder / "masked"), **one))
    packed = {"pack": 64, "add_columns": ("position_ids",), "target": "both", "drop_token": "uniform"}
    materialize(MaterializeConfig(out=str(folder / "packed"), **one, **packed))
    materialize(MaterializeConfig(out=str(folder / "even"), **{**one, "epochs": 1}, rows_multiple=20))
    return folder


def labels_at(folder: Path, epoch: int, row: int) -> int:
    """How many labels the files have at a position of an epoch."""
    files = sorted((folder / f"epoch_{epoch:03d}").glob("*.parquet"))
    rows = [row for f in files for row in pq.read_table(f).column("labels").to_pylist()]
    return int((np.array(rows[row]) != -100).sum())


def test_what_is_dropped_is_what_the_files_lack(made: Path) -> None:
    heads = [line for line in show(str(made / "masked"), 4, against=[str(made / "scored")]) if line.startswith("-- ")]
    assert len(heads) == EPOCHS
    for epoch, head in enumerate(heads):
        found = re.fullmatch(r"-- epoch (\d), row 4: row_id \d+, (\d+) of (\d+) trainable tokens dropped", head)
        assert found
        assert int(found[1]) == epoch
        assert int(found[3]) - int(found[2]) == labels_at(made / "masked", epoch, 4)
    assert int(re.findall(r", (\d+) of", heads[-1])[0]) > 0


def test_a_row_by_its_place_in_the_source_and_by_its_name(made: Path) -> None:
    table = pq.read_table(sorted((made / "scored").glob("shard-*.parquet"))[0])
    name, row_id = table.column("id")[3].as_py(), table.column("row_id")[3].as_py()
    against = [str(made / "scored")]
    by_name = list(show(str(made / "masked"), name=name, against=against))
    assert by_name == list(show(str(made / "masked"), row_id=row_id, against=against))
    windows = pc.sum(pc.equal(table.column("id"), name)).as_py()
    assert sum(line.startswith("-- ") for line in by_name) == EPOCHS * windows
    one = list(show(str(made / "masked"), name=name, against=against, epoch=1))
    assert one == by_name[by_name.index(one[0]) :][: len(one)]
    assert sum(line.startswith("-- epoch 1, ") for line in one) == windows
    assert list(show(str(made / "scored"), name=name)) == list(show(str(made / "scored"), row_id))


def test_marks_and_replacements_stand_in_the_text(made: Path) -> None:
    against = [str(made / "scored")]
    plain = "\n".join(show(str(made / "masked"), row_id=3, epoch=EPOCHS - 1, against=against))
    replaced = "\n".join(show(str(made / "packed"), row_id=3, epoch=EPOCHS - 1, against=against))
    for text in (plain, replaced):
        assert text.count("⟦") == text.count("⟧") > 0
    assert "→" not in plain
    assert "→" in replaced


def test_json_values_are_those_of_the_files(made: Path) -> None:
    described = json.loads((made / "masked" / "manifest.json").read_bytes())
    found = show(str(made / "masked"), 4, against=[str(made / "scored")]).found
    assert found == json.loads(json.dumps(found))
    assert found["epochs"] == described["epochs"]
    assert found["counts"]["labels_left"] == sum(e["labels_left"] for e in described["epochs"])
    assert (found["settings"]["quantile"], found["settings"]["max_rate"]) == (0.5, 1.0)
    assert [row["epoch"] for row in found["rows"]] == list(range(EPOCHS))
    for row in found["rows"]:
        assert sum(token["label"] != -100 for token in row["tokens"]) == labels_at(made / "masked", row["epoch"], 4)
        assert all(token["label"] == -100 for token in row["tokens"] if token["dropped"])
    stored = show(str(made / "masked"), 4).found["rows"]
    pairs = [[(t["input_id"], t["label"]) for t in row["tokens"]] for row in found["rows"]]
    assert [[(t["input_id"], t["label"]) for t in row["tokens"]] for row in stored] == pairs


def test_a_scored_row_is_text_by_its_entropies_and_with_ids_a_table(made: Path) -> None:
    rows = [r for f in sorted((made / "scored").glob("shard-*.parquet")) for r in pq.read_table(f).to_pylist()]
    windows = [row for row in rows if row["row_id"] == 3]
    inspected = show(str(made / "scored"), 3)
    for row, found in zip(windows, inspected.found["rows"], strict=True):
        assert [t["id"] for t in found["tokens"]] == row["input_ids"]
        for name in ("entropy", "logprob", "loss_mask"):
            assert [t[name] for t in found["tokens"]] == row[name]
    styles = [style for line in inspected.lines if not isinstance(line, str) for text, style in line if text.strip()]
    assert set(styles) == {"", "context", *QUARTERS}
    spans = [span for line in inspected.lines if not isinstance(line, str) for span in line if span[1] in QUARTERS]
    for row in windows:
        entropies = np.array([h for h, yes in zip(row["entropy"], row["loss_mask"], strict=True) if yes])
        below = (entropies[:, None] > np.quantile(entropies, (0.25, 0.5, 0.75))).sum(axis=1)
        assert [style for _, style in spans[: len(below)]] == [QUARTERS[n] for n in below.tolist()]
        del spans[: len(below) + len(QUARTERS)]  # the line that explains the colours
    text = "\n".join(inspected)
    assert text.count("⟦") == text.count("⟧") > 0
    for row in windows:
        entropies = [h for h, yes in zip(row["entropy"], row["loss_mask"], strict=True) if yes]
        edges = ", ".join(f"{edge:.3f}" for edge in np.quantile(entropies, (0.25, 0.5, 0.75)))
        assert f"entropy in quarters, at {edges} nats" in text
    table = list(show(str(made / "scored"), 3, ids=True))
    assert [int(line.split()[2]) for line in table[1:]] == [i for row in windows for i in row["input_ids"]]


@pytest.mark.parametrize("colour", [False, True])
def test_what_a_row_holds_neither_acts_on_the_terminal_nor_looks_like_a_mark(colour: bool) -> None:
    line = [("a\x1b[2Jb⟦c⟧", "dropped"), ("\u202ed", ""), ("", "low"), ("e", "highest")]
    shown = styled(line, colour=colour)
    assert "\\x1b[2J" in shown
    assert "\u202e" not in shown
    if colour:
        assert re.findall(r"\x1b\[[0-9;]*m", shown) == ["\x1b[9;31m", "\x1b[0m", "\x1b[30;48;5;69m", "\x1b[0m"]
    else:
        assert "\x1b" not in shown
        assert shown == "⟦a\\x1b[2Jb[c]⟧\\u202ede"


@pytest.mark.parametrize(
    ("directory", "asked", "said"),
    [
        ("masked", {"row": 0, "row_id": 0}, "exclude each other"),
        ("masked", {"ids": True}, "are of one row"),
        ("masked", {"row": 0, "epoch": 9}, "it has epochs 0, 1, 2"),
        ("masked", {"row_id": 0}, "a masked directory holds no scores"),
        ("masked", {"name": "nobody", "against": True}, "no such row"),
        ("masked", {"row": 99, "against": True}, "an epoch has rows 0 to"),
        ("even", {"row": 20, "against": True}, "an epoch has rows 0 to 19"),  # of more that --rows-multiple left out
        ("packed", {"row": 0, "against": True}, "a packed row holds several documents"),
        ("scored", {"row": 0, "epoch": 1}, "are for masked directories"),
    ],
)
def test_what_is_refused(made: Path, directory: str, asked: dict[str, object], said: str) -> None:
    options = {k: [str(made / "scored")] if k == "against" else v for k, v in asked.items()}
    with pytest.raises(ConfigError, match=said):
        list(show(str(made / directory), **options))  # type: ignore[arg-type]
