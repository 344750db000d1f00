"""docs/packing.md: its scripts run, every row arrives, and no document sees another; where one does, it shows."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DataCollatorForSeq2Seq, DataCollatorWithFlattening

from entrodrop_prep import ArrivalError, BatchCheck, check_batches, materialize
from entrodrop_prep.config import MaterializeConfig
from helpers.models import scored_documents

pytestmark = pytest.mark.training

PAGE = Path(__file__).resolve().parents[2] / "docs" / "packing.md"
SCRIPTS = re.findall(r"<!-- run: (\w+) -->\n```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
SCRIPTS.append(("packed", SCRIPTS[1][1].replace('"masked"', '"packed"')))  # as the page says
EPOCHS, LIMIT = 2, 40
WAYS = [f"{i}-{name}" for i, (name, _) in enumerate(SCRIPTS)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``base-model`` and, of its scores, ``masked`` and ``packed``."""
    folder = tmp_path_factory.mktemp("packing")
    scored_documents(folder)
    settings: dict[str, Any] = {"scored": str(folder / "scored"), "epochs": EPOCHS, "rows_per_shard": 5}
    settings |= {"schedule": "linear", "max_rate": 0.9, "target": "both"}
    materialize(MaterializeConfig(out=str(folder / "masked"), **settings))
    columns = ("position_ids", "seq_lengths")
    materialize(MaterializeConfig(out=str(folder / "packed"), pack=LIMIT, add_columns=columns, **settings))
    materialize(MaterializeConfig(out=str(folder / "bare"), pack=LIMIT, **settings))
    return folder


@pytest.fixture
def here(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("base-model", "masked", "packed", "bare"):
        (tmp_path / name).symlink_to(folder / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path


def trainer_of(way: str) -> Any:
    names: dict[str, Any] = {"__name__": "script"}
    exec(compile(SCRIPTS[WAYS.index(way)][1], str(PAGE), "exec"), names)
    return names["trainer"]


def everything(directory: Path) -> BatchCheck:
    epochs = json.loads((directory / "manifest.json").read_bytes())["epochs"]
    return BatchCheck(tuple(range(EPOCHS)), *(sum(e[n] for e in epochs) for n in ("rows", "tokens", "labels_left")))


def logits_of(model: Any, call: Callable[[], Any]) -> torch.Tensor:
    """[T, V] logits of the one line that ``call`` gives to the model, whatever loss is made of it."""
    noted: list[torch.Tensor] = []
    hook = model.model.register_forward_hook(lambda *args: noted.append(args[-1].last_hidden_state))
    model.eval()
    with torch.no_grad():
        call()
        hook.remove()
        (hidden,) = noted
        result: torch.Tensor = model.lm_head(hidden)[0]
    return result


def second_document_changes(model: Any, batch: dict[str, Any], run: Callable[[dict[str, Any]], Any]) -> bool:
    """Whether other tokens in the first document of a line change the logits of the second."""
    begins = torch.nonzero(batch["position_ids"][0] == 0).flatten().tolist()
    a, b = begins[1], [*begins, batch["input_ids"].shape[1]][2]
    other = {**batch, "input_ids": batch["input_ids"].clone()}
    other["input_ids"][0, :a] = (other["input_ids"][0, :a] + 1) % 90
    before, after = (logits_of(model, lambda x=x: run(x)) for x in (batch, other))
    assert not torch.equal(before[:a], after[:a])
    return not torch.equal(before[a:b], after[a:b])


@pytest.mark.parametrize(("way", "attention"), zip(WAYS, itertools.cycle(["sdpa", "eager"]), strict=False))
def test_the_page_keeps_documents_apart(way: str, attention: str, here: Path, capsys: Any) -> None:
    trainer = trainer_of(way)
    directory = here / way.split("-")[1]
    assert f"rows={everything(directory).rows}, " in capsys.readouterr().out
    assert check_batches(directory, trainer.get_train_dataloader()) == everything(directory)
    trainer.model.set_attn_implementation(attention)
    batch = dict(next(iter(trainer.get_train_dataloader())))
    assert (batch["position_ids"] == 0).sum() > 2
    compute = lambda given: trainer.compute_loss(trainer.model, dict(given))  # noqa: E731
    assert not second_document_changes(trainer.model, batch, compute)


@pytest.mark.parametrize(
    ("fault", "attention"),
    [("attention_mask", "eager"), ("position_ids", "sdpa"), ("cache", "sdpa"), ("cache", "eager")],
)
def test_what_the_page_warns_of_mixes_documents(fault: str, attention: str, here: Path) -> None:
    trainer = trainer_of(WAYS[2])
    model = trainer.model
    model.set_attn_implementation(attention)
    batch = dict(next(iter(trainer.get_train_dataloader())))

    def call(given: dict[str, Any]) -> Any:
        more: dict[str, Any] = {"use_cache": False}
        given = dict(given)
        if fault == "attention_mask":
            more["attention_mask"] = torch.ones_like(given["input_ids"])
        elif fault == "position_ids":
            del given["position_ids"]
        else:
            more["use_cache"] = True
        return model(**given, **more)

    assert second_document_changes(model, batch, call)
    assert not second_document_changes(model, batch, lambda given: model(**given, use_cache=False))


def rows_of(directory: Path) -> list[dict[str, Any]]:
    import pyarrow.parquet as pq

    return [row for f in sorted(directory.glob("epoch_*/*.parquet")) for row in pq.read_table(f).to_pylist()]


def test_positions_that_go_on_through_a_packed_row_are_caught(here: Path) -> None:
    rows = rows_of(here / "packed")
    batches = [DataCollatorWithFlattening()([dict(row) for row in rows[i : i + 2]]) for i in range(0, len(rows), 2)]
    with pytest.raises(ArrivalError, match="others behind them; look for an added EOS, or several rows in one line"):
        check_batches(here / "packed", batches)
    assert check_batches(here / "bare", batches) == everything(here / "bare")


def test_without_positions_a_packed_row_is_one_row(here: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(here / "base-model")
    collate = DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=-100)
    names = ("input_ids", "attention_mask", "labels")
    rows = [{n: row[n] for n in names} for row in rows_of(here / "packed")]
    batches = [collate(rows[i : i + 3]) for i in range(0, len(rows), 3)]
    assert check_batches(here / "packed", batches) == everything(here / "packed")


def flattened(rows: list[dict[str, Any]]) -> dict[str, Any]:
    names = ("input_ids", "labels", "position_ids")
    return {name: torch.tensor([[x for row in rows for x in row[name]]]) for name in names}


def test_any_one_change_in_a_packed_row_is_caught(here: Path) -> None:
    rows = rows_of(here / "packed")
    assert check_batches(here / "packed", [flattened(rows)]) == everything(here / "packed")
    number = next(i for i, row in enumerate(rows) if len(row["seq_lengths"]) > 1)
    for name in ("input_ids", "labels"):
        batch = flattened(rows)
        at = sum(len(row["input_ids"]) for row in rows[:number]) + rows[number]["seq_lengths"][0] + 1
        batch[name][0, at] += 1
        with pytest.raises(ArrivalError, match=f"epoch 0, row {number}, document 1"):
            check_batches(here / "packed", [batch])
    with pytest.raises(ArrivalError, match=r"rows are missing"):
        check_batches(here / "packed", [flattened(rows[:-1])])


def test_documents_that_changed_places_are_caught(here: Path) -> None:
    rows = rows_of(here / "packed")
    number = next(i for i, row in enumerate(rows) if len(row["seq_lengths"]) > 1)
    row, n = rows[number], rows[number]["seq_lengths"][0]
    rows[number] = {k: v[n:] + v[:n] for k, v in row.items() if k != "seq_lengths"}
    with pytest.raises(ArrivalError, match=f"epoch 0, row {number} .*missing|epoch 0, row {number}.*out of order"):
        check_batches(here / "packed", [flattened(rows)])
