"""What real trainers give their model is what was written, and where it is not, ``check_batches`` says why."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForCausalLM, DataCollatorWithFlattening, LlamaForCausalLM
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling as PaddingFree

from entrodrop_prep import ArrivalError, BatchCheck, check_batches, materialize, recording
from entrodrop_prep.config import MaterializeConfig
from entrodrop_prep.errors import ConfigError, IntegrityError
from entrodrop_prep.store.schema import masked_schema
from entrodrop_prep.store.shards import write_shard
from entrodrop_prep.trainers import recipe
from helpers.gradients import check_trained, trained_positions
from helpers.models import scored_documents
from helpers.recipes import run_recipe, watch_text
from helpers.scored import copy, seal

pytestmark = pytest.mark.training

DOCS = Path(__file__).resolve().parents[2] / "docs"
TRAINERS = ("transformers", "trl", "lightning")
EPOCHS, ROWS, BATCH = 3, 22, 4  # 22 rows: batches straddle epochs, and the last one is short
Rows = list[dict[str, list[int]]]
Batches = list[dict[str, Any]]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """For each target a folder with ``base-model`` and, of its scores, ``masked``: two files an epoch, ragged rows."""
    folder = tmp_path_factory.mktemp("arrival")
    model = scored_documents(folder, rows=ROWS, held=5)
    made = {}
    for target in ("labels", "inputs"):
        made[target] = folder / target
        made[target].mkdir()
        (made[target] / "base-model").symlink_to(model)
        settings: dict[str, Any] = {"schedule": "linear", "max_rate": 0.9, "rows_per_shard": 12, "target": target}
        settings |= {"eval": str(folder / "held"), "plain_config": True}  # files that are no epoch's
        out = str(made[target] / "masked")
        materialize(MaterializeConfig(scored=str(folder / "scored"), out=out, epochs=EPOCHS, **settings))
    return made


@pytest.fixture(params=["labels", "inputs"])
def target(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def here(target: str, folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of the target as the current one, where the scripts of the docs find what they name."""
    for name in ("base-model", "masked"):
        (tmp_path / name).symlink_to(folders[target] / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path


only_labels = pytest.mark.parametrize("target", ["labels"], indirect=True)


def rows_of(masked: Path) -> Rows:
    files = [f for e in range(EPOCHS) for f in sorted((masked / f"epoch_{e:03d}").iterdir())]
    assert len(files) == 2 * EPOCHS
    return [row for f in files for row in pq.read_table(f).to_pylist()]


def everything(masked: Path) -> BatchCheck:
    """What must have arrived, by the manifest."""
    epochs = json.loads((masked / "manifest.json").read_bytes())["epochs"]
    sums = [sum(e[name] for e in epochs) for name in ("rows", "tokens", "labels_left")]
    return BatchCheck(tuple(range(EPOCHS)), *sums)


def scripts(page: str) -> list[str]:
    found = re.findall(r"^```python\n(.*?)^```", (DOCS / page).read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    assert found
    return found


# --- real trainers


@pytest.mark.parametrize("trainer", TRAINERS)
def test_what_the_recipe_trains_on_is_what_was_written(trainer: str, target: str, here: Path) -> None:
    rows = rows_of(here / "masked")
    dropped = [i for i, r in enumerate(rows) if r["labels"][1:] != r["input_ids"][1:]]
    assert len(dropped) > ROWS, "there is nothing to lose"
    _, batches, trained = watch_text(recipe(trainer, "masked"))
    assert check_batches("masked", batches) == everything(here / "masked")
    assert check_trained(batches, trained) == everything(here / "masked").labels


@only_labels
@pytest.mark.parametrize("trainer", TRAINERS)
def test_one_label_flipped_in_what_a_trainer_reads_is_caught(trainer: str, here: Path) -> None:
    """Its own check holds, as its files are whole; the run is compared with the files that should have been read."""
    masked = copy(here / "masked", here / "changed")
    name, row = flip(masked)
    seal(masked, name)
    _, batches, trained = watch_text(recipe(trainer, "changed"))
    assert check_trained(batches, trained) == everything(here / "masked").labels - 1
    with pytest.raises(ArrivalError, match=rf"epoch 1, row {row}, position \d+ .*label -100 came, \d+ was written"):
        check_batches("masked", batches)
    place = ROWS + row
    size = len(batches[0]["labels"])
    right = rows_of(here / "masked")[place]["labels"]
    labels = batches[place // size]["labels"]
    labels[place % size, : len(right)] = right
    with pytest.raises(AssertionError, match=f"batch {place // size}"):
        check_trained(batches, trained)


def test_lightning_epoch_by_epoch(target: str, here: Path) -> None:
    names, _ = run_recipe("lightning")
    exec(compile(scripts("trainers/lightning.md")[-1], "lightning.md", "exec"), names)
    assert names["arrived"] == everything(here / "masked")


WRONG = {
    "labels made again": (
        "transformers",
        {
            "DataCollatorForSeq2Seq, ": "DataCollatorForLanguageModeling, ",
            "DataCollatorForSeq2Seq(": "DataCollatorForLanguageModeling(",
            "label_pad_token_id=-100": "mlm=False",
            "batch_size=4": "batch_size=1",
        },
        r"epoch 0, row 0, position 0 \(batch 0\): label \d+ came, -100 was written; the labels were made again",
    ),
    "labels made again under TRL": (
        "trl",
        {
            "from itertools import islice\n": "from itertools import islice\nimport transformers\n",
            "processing_class=": "data_collator=transformers.DataCollatorForLanguageModeling(tokenizer, mlm=False), "
            "processing_class=",
            "batch_size=4": "batch_size=1",
        },
        r"epoch 0, row 0, position 0 \(batch 0\): label \d+ came, -100 was written; the labels were made again",
    ),
    "labels made again under Lightning": (
        "lightning",
        {
            ", DataCollatorForSeq2Seq\n": ", DataCollatorForLanguageModeling\n",
            "DataCollatorForSeq2Seq(": "DataCollatorForLanguageModeling(",
            "label_pad_token_id=-100": "mlm=False",
            "rows, batch_size=16": "rows, batch_size=1",
        },
        r"epoch 0, row 0, position 0 \(batch 0\): label \d+ came, -100 was written; the labels were made again",
    ),
    "shuffled": (
        "transformers",
        {'train_sampling_strategy="sequential",': ""},
        "epoch 0, row 0 .*rows are out of order",
    ),
    "two passes": (
        "transformers",
        {"num_train_epochs=1": "num_train_epochs=2"},
        "batch 17: every row came, and then epoch 0, row 0 again",
    ),
    "last batch dropped": (
        "transformers",
        {"report_to=[]": "report_to=[], dataloader_drop_last=True"},
        f"epoch 2, row {ROWS - 2}: the batches end before it; 2 rows are missing",
    ),
    "stopped early": (
        "transformers",
        {"report_to=[]": "report_to=[], max_steps=2"},
        f"epoch 1, row 10: the batches end before it; {EPOCHS * ROWS - 32} rows are missing",
    ),
    "rows left out": (
        "transformers",
        {'load_dataset(MASKED, split="train")': 'load_dataset(MASKED, split="train").select(range(3, 66))'},
        "epoch 0, row 0 .*: 3 rows are missing: epoch 0, row 3 came in its place",
    ),
    "rows cut": ("trl", {"max_length=None": "max_length=8"}, r"the row was cut to 8 of its \d+ tokens; .*length limit"),
    "packed": ("trl", {"packing=False": "packing=True", "max_length=None": "max_length=64"}, "rows are out of order"),
    "shuffled by TRL": ("trl", {"shuffle_dataset=False": "shuffle_dataset=True"}, "rows are out of order"),
    "shuffled under TRL": ("trl", {'train_sampling_strategy="sequential",': ""}, "rows are out of order"),
    "shuffled by the loader": ("lightning", {"shuffle=False": "shuffle=True"}, "rows are out of order"),
}


@only_labels
@pytest.mark.parametrize("name", WRONG)
def test_a_trainer_set_up_wrong_is_caught(name: str, here: Path) -> None:
    trainer, changes, said = WRONG[name]
    with pytest.raises(ArrivalError, match=said):
        check_batches("masked", run_recipe(trainer, *changes.items())[1])


@only_labels
def test_the_lines_of_the_training_page(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names, _ = run_recipe("transformers", ("trainer.train(", "dict("))
    before, during = scripts("training.md")[:2]
    exec(compile(before, "training.md", "exec"), names)
    assert names["arrived"] == everything(here / "masked")
    exec(compile(during, "training.md", "exec"), names)
    assert names["arrived"].rows == 3 * 4 * BATCH  # four batches a step
    assert names["arrived"].epochs == (0, 1, 2)
    assert "BatchCheck(epochs=(0, 1, 2)" in capsys.readouterr().out


# --- batches in every form


def padded(rows: Rows, *, left: bool, mask: bool = True, pad: int = 0) -> dict[str, Any]:
    size = max(len(r["labels"]) for r in rows) + 1
    fill = {"input_ids": pad, "labels": -100, "attention_mask": 0}
    made = {
        name: np.array(
            [
                [value] * (size - len(r[name])) * left + r[name] + [value] * (size - len(r[name])) * (not left)
                for r in rows
            ]
        )
        for name, value in fill.items()
    }
    if not mask:
        del made["attention_mask"]
    return made


def padding_free(rows: Rows, **options: Any) -> Any:
    return PaddingFree(pad_token_id=0, padding_free=True, **options)(rows)


FORMS: dict[str, Callable[[Rows], Any]] = {
    "right": lambda rows: padded(rows, left=False),
    "left": lambda rows: padded(rows, left=True),
    "right, no mask": lambda rows: padded(rows, left=False, mask=False),
    "right, no mask, padded with a word": lambda rows: padded(
        rows, left=False, mask=False, pad=rows[0]["input_ids"][-1]
    ),
    "positions beside a mask": lambda rows: {
        **(batch := padded(rows, left=False)),
        "position_ids": np.arange(batch["labels"].shape[1])[None],
    },
    "flattened": lambda rows: DataCollatorWithFlattening()([{n: r[n] for n in ("input_ids", "labels")} for r in rows]),
    "padding-free": padding_free,
    "padding-free, filled up": lambda rows: padding_free(rows, pad_to_multiple_of=64),
    "lists": lambda rows: {n: v.tolist() for n, v in padded(rows, left=False).items()},
    "no attention mask but its name": lambda rows: {**padded(rows, left=False, mask=False), "attention_mask": None},
}


def batches_of(rows: Rows, form: str) -> Iterator[dict[str, Any]]:
    for i in range(0, len(rows), BATCH):
        yield dict(FORMS[form](rows[i : i + BATCH]))


@pytest.mark.parametrize("form", FORMS)
def test_rows_in_order_pass_in_every_form(form: str, target: str, here: Path) -> None:
    assert check_batches("masked", batches_of(rows_of(here / "masked"), form)) == everything(here / "masked")


def test_one_row_a_batch_without_a_batch_dimension(target: str, here: Path) -> None:
    batches = ({n: torch.tensor(v) for n, v in row.items()} for row in rows_of(here / "masked"))
    assert check_batches(here / "masked", batches) == everything(here / "masked")


@only_labels
@pytest.mark.parametrize("form", FORMS)
def test_any_one_change_is_caught(form: str, here: Path) -> None:
    """Every label and every id of a row, one after the other."""
    rows = rows_of(here / "masked")
    place = next(i for i, r in enumerate(rows) if i > 2 * ROWS and i % BATCH == 1 and 6 < len(r["labels"]) < 14)
    for name in ("input_ids", "labels"):
        for t in range(len(rows[place][name])):
            changed = [*rows]
            values = list(rows[place][name])
            values[t] = {-100: 5, 5: 6}.get(values[t], 5 if name == "input_ids" else -100)
            changed[place] = {**rows[place], name: values}
            if name == "labels" and t == 0 and ("flattened" in form or "free" in form):
                continue  # these collators write -100 there themselves
            with pytest.raises(ArrivalError, match=f"epoch 2, row {place - 2 * ROWS}"):
                check_batches("masked", batches_of(changed, form))


@only_labels
def test_causes_are_told(here: Path) -> None:
    rows = rows_of(here / "masked")

    def said(change: Callable[[dict[str, list[int]]], dict[str, list[int]]], form: str = "right") -> str:
        with pytest.raises(ArrivalError) as caught:
            check_batches("masked", batches_of([change(dict(r)) for r in rows], form))
        return str(caught.value)

    def with_(row: dict[str, list[int]], ids: list[int], labels: list[int]) -> dict[str, list[int]]:
        return {"input_ids": ids, "labels": labels, "attention_mask": [1] * len(ids)}

    def first_gone(r: dict[str, list[int]]) -> dict[str, list[int]]:
        first = next(t for t, label in enumerate(r["labels"]) if label != -100)
        return {**r, "labels": [-100] * (first + 1) + r["labels"][first + 1 :]}

    long = [r for r in rows if sum(x != -100 for x in r["labels"]) > 1]
    assert long[0] is rows[0]
    assert "shifted" in said(lambda r: {**r, "labels": [*r["labels"][1:], -100]})
    assert "its first label is gone" in said(first_gone)
    assert "the row lost all its labels" in said(lambda r: {**r, "labels": [-100] * len(r["labels"])})
    assert "the row lost all its labels" in said(lambda r: {**r, "labels": [-100] * len(r["labels"])}, "flattened")
    assert "made again from the input ids" in said(lambda r: {**r, "labels": r["input_ids"]}, "left")
    assert "an added EOS" in said(lambda r: with_(r, [*r["input_ids"], 1], [*r["labels"], -100]))
    assert "others behind them" in said(lambda r: with_(r, [*r["input_ids"], 1], [*r["labels"], 1]), "right, no mask")
    assert "an added BOS" in said(lambda r: with_(r, [1, *r["input_ids"]], [-100, *r["labels"]]))
    assert "lost its first 1 of" in said(lambda r: with_(r, r["input_ids"][1:], r["labels"][1:]))
    assert "position 1: id 2 came" in said(lambda r: with_(r, [r["input_ids"][0], 2, *r["input_ids"][2:]], r["labels"]))


@only_labels
def test_epochs_that_change_places_are_rows_out_of_order(here: Path) -> None:
    rows = rows_of(here / "masked")
    swapped = rows[ROWS : 2 * ROWS] + rows[:ROWS] + rows[2 * ROWS :]
    with pytest.raises(ArrivalError, match=r"epoch 0, row 0 .*epoch 1, row 0 came"):
        check_batches("masked", batches_of(swapped, "right"))
    assert check_batches("masked", batches_of(swapped, "right"), epochs=[1, 0, 2]).epochs == (1, 0, 2)
    assert check_batches("masked", batches_of(rows[:ROWS] * 2, "right"), epochs=[0, 0]).rows == 2 * ROWS
    with pytest.raises(ConfigError, match=r"epoch 3 is not there; it has \[0, 1, 2\]"):
        check_batches("masked", [], epochs=[0, 3])


@only_labels
def test_without_a_row_nothing_is_proved(here: Path) -> None:
    for complete in (True, False):
        with pytest.raises(ArrivalError, match="no row came"):
            check_batches("masked", [], complete=complete)


@only_labels
def test_batches_that_cannot_be_compared_are_named(here: Path) -> None:
    good = padded(rows_of(here / "masked")[:BATCH], left=False)
    for change, said in (
        ({"labels": None}, "batch 0: it has no labels"),
        ({"input_ids": None}, "batch 0: it has no input_ids"),
        ({"labels": good["labels"][:, 1:]}, r"batch 0: labels are \(4, \d+\), input_ids are"),
        (
            {"attention_mask": good["attention_mask"][:, None, None]},
            r"attention_mask is int64 of shape \(4, 1, 1, \d+\)",
        ),
        ({"input_ids": [[1, 2], [3]]}, "batch 0: input_ids is ragged"),
        (
            {"labels": good["labels"] * (good["labels"] != -100)},
            r"batch 0, line \d, position \d+: attention_mask is 0 and",
        ),
    ):
        with pytest.raises(ArrivalError, match=said):
            check_batches("masked", [{**good, **change}])


@only_labels
def test_padding_in_front_that_no_mask_hides_is_caught(here: Path) -> None:
    batches = [padded(rows_of(here / "masked")[:BATCH], left=True, mask=False)]
    with pytest.raises(ArrivalError, match=r"others before them; .*padding without an attention_mask"):
        check_batches("masked", batches, complete=False)


# --- the files


def flip(masked: Path) -> tuple[str, int]:
    """Take one label out of the second file of epoch 1; its name and the row's place in the epoch."""
    file = sorted((masked / "epoch_001").iterdir())[1]
    rows = pq.read_table(file).to_pylist()
    place = next(i for i, r in enumerate(rows) if sum(x != -100 for x in r["labels"]) > 1)
    position = max(t for t, x in enumerate(rows[place]["labels"]) if x != -100)
    rows[place]["labels"][position] = -100
    write_shard(file, masked_schema(), [pa.Table.from_pylist(rows, schema=masked_schema())], {})
    return file.relative_to(masked).as_posix(), 12 + place


@only_labels
def test_one_label_changed_in_a_file_is_caught(here: Path) -> None:
    masked = copy(here / "masked", here / "changed")
    batches = list(batches_of(rows_of(masked), "right"))
    name, row = flip(masked)
    with pytest.raises(IntegrityError, match=re.escape(name)):  # whatever reached the model
        check_batches(masked, batches_of(rows_of(masked), "right"))
    seal(masked, name)
    with pytest.raises(ArrivalError, match=rf"epoch 1, row {row}, position \d+ .*label \d+ came, -100 was written"):
        check_batches(masked, batches)


# --- the recorder


@only_labels
def test_only_what_trains_is_recorded(here: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained("base-model")
    batch = {n: torch.tensor(v) for n, v in padded(rows_of(here / "masked")[:BATCH], left=False).items()}
    with recording(model) as batches:
        model(**batch)
        with torch.no_grad():
            model(**batch)
        model(batch["input_ids"], batch["attention_mask"], labels=batch["labels"])
        batch["labels"].fill_(-100)  # notes are copies
    model(**batch)
    assert len(batches) == 2
    for noted in batches:
        assert check_batches("masked", [noted], complete=False).rows == BATCH
    assert not model._forward_pre_hooks


@only_labels
def test_the_gradient_check_can_fail(here: Path) -> None:
    """A loss that ignores the masks trains positions that the labels leave out."""
    model = LlamaForCausalLM.from_pretrained("base-model")
    batch = {n: torch.tensor(v) for n, v in padded(rows_of(here / "masked")[-BATCH:], left=False).items()}
    unmasked = {**batch, "labels": batch["input_ids"]}
    trained = trained_positions(model, lambda: model(**unmasked).loss)
    assert not torch.equal(trained[:, :-1], batch["labels"][:, 1:] != -100)
