"""What is written is read as it is: by ``datasets``, pandas and pyarrow, and trained on by ``transformers.Trainer``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import pandas
import pyarrow.dataset
import pyarrow.parquet as pq
import pytest
import torch
from transformers import DataCollatorForSeq2Seq, LlamaForCausalLM, Trainer, TrainingArguments

from entrodrop_prep.config import MaterializeConfig
from entrodrop_prep.export.materialize import materialize
from helpers.models import tiny_llama
from helpers.scored import VOCABULARY, copy, some_rows, write_scored
from helpers.tokenizers import byte_bpe

COLUMNS = ["input_ids", "attention_mask", "labels"]
Row = dict[str, list[int]]


@pytest.fixture(scope="module")
def masked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three epochs of two files each."""
    folder = tmp_path_factory.mktemp("consume")
    write_scored(folder / "scored", some_rows(40, lengths=(2, 20)), rows_per_shard=16)
    settings = {"epochs": 3, "rows_per_shard": 30, "schedule": "linear", "max_rate": 1, "target": "both"}
    materialize(MaterializeConfig(scored=str(folder / "scored"), out=str(folder / "masked"), **settings))
    return folder / "masked"


@pytest.fixture
def cache(tmp_path: Path) -> dict[str, str]:
    return {"cache_dir": str(tmp_path / "cache")}


def rows_of(masked: Path, *epochs: int) -> list[Row]:
    files = [f for e in epochs for f in sorted((masked / f"epoch_{e:03d}").glob("*.parquet"))]
    assert len(files) == 2 * len(epochs)
    return [row for f in files for row in pq.read_table(f).to_pylist()]


# Readers.


@pytest.mark.parametrize("epoch", [0, 1, 2])
def test_load_dataset_reads_an_epoch(epoch: int, masked: Path, cache: dict[str, str]) -> None:
    loaded = datasets.load_dataset(str(masked), f"epoch_{epoch:03d}", **cache)
    assert list(loaded) == ["train"]
    assert loaded["train"].column_names == COLUMNS
    assert {n: str(f.feature.dtype) for n, f in loaded["train"].features.items()} == {
        "input_ids": "int32",
        "attention_mask": "int8",
        "labels": "int32",
    }
    assert loaded["train"].to_list() == rows_of(masked, epoch)


def test_load_dataset_reads_all_epochs_in_order(masked: Path, cache: dict[str, str]) -> None:
    loaded = datasets.load_dataset(str(masked), split="train", **cache)
    assert loaded.to_list() == rows_of(masked, 0, 1, 2)
    assert datasets.load_dataset(str(masked), "all", split="train", **cache).to_list() == loaded.to_list()
    names = datasets.get_dataset_config_names(str(masked))
    assert sorted(names) == ["all", "epoch_000", "epoch_001", "epoch_002"]


def test_more_than_ten_epochs_and_files_stay_in_order(tmp_path: Path, cache: dict[str, str]) -> None:
    write_scored(tmp_path / "scored", some_rows(13, lengths=(2, 9)))
    config = {"scored": str(tmp_path / "scored"), "out": str(tmp_path / "masked"), "epochs": 12, "rows_per_shard": 1}
    materialize(MaterializeConfig(**config))
    files = [f for e in range(12) for f in sorted((tmp_path / "masked" / f"epoch_{e:03d}").iterdir())]
    assert len(files) > 120
    expected = [row for f in files for row in pq.read_table(f).to_pylist()]
    assert datasets.load_dataset(str(tmp_path / "masked"), split="train", **cache).to_list() == expected
    assert list(datasets.load_dataset(str(tmp_path / "masked"), split="train", streaming=True)) == expected


def test_streaming(masked: Path) -> None:
    for name, epochs in (("epoch_002", [2]), (None, [0, 1, 2])):
        stream = datasets.load_dataset(str(masked), name, split="train", streaming=True)
        assert stream.column_names == COLUMNS
        assert list(stream) == rows_of(masked, *epochs)


def test_a_copied_directory_and_one_without_a_state_are_read(
    masked: Path, tmp_path: Path, cache: dict[str, str]
) -> None:
    moved = copy(masked, tmp_path / "my data")
    for name in (".state.json", ".lock", "manifest.json"):
        (moved / name).unlink()
    assert datasets.load_dataset(str(moved), "epoch_001", split="train", **cache).to_list() == rows_of(masked, 1)


def test_a_part_of_the_epochs(tmp_path: Path, cache: dict[str, str]) -> None:
    write_scored(tmp_path / "scored", some_rows(9))
    config = {"scored": str(tmp_path / "scored"), "out": str(tmp_path / "masked"), "epochs": 4}
    materialize(MaterializeConfig(**config, only_epochs="2-3"))
    assert datasets.get_dataset_config_names(str(tmp_path / "masked")) == ["all", "epoch_002", "epoch_003"]
    loaded = datasets.load_dataset(str(tmp_path / "masked"), split="train", **cache)
    assert len(loaded) == 2 * len(datasets.load_dataset(str(tmp_path / "masked"), "epoch_003", split="train", **cache))


def test_plain_parquet_readers(masked: Path) -> None:
    folder = masked / "epoch_001"
    frame = pandas.read_parquet(folder)
    assert [{n: frame[n][i].tolist() for n in COLUMNS} for i in range(len(frame))] == rows_of(masked, 1)
    assert pyarrow.dataset.dataset(folder).to_table().to_pylist() == rows_of(masked, 1)
    assert pq.read_table(folder).to_pylist() == rows_of(masked, 1)
    assert datasets.Dataset.from_parquet(str(folder / "*.parquet"), keep_in_memory=True).to_list() == rows_of(masked, 1)


# A trainer.


class Recorder(LlamaForCausalLM):
    """A model that notes what reaches it."""

    def forward(self, input_ids: Any = None, attention_mask: Any = None, labels: Any = None, **more: Any) -> Any:
        for ids, mask, row in zip(input_ids, attention_mask, labels, strict=True):
            size = int(mask.sum())
            assert (row[size:] == -100).all()
            self.seen.append({"input_ids": ids[:size].tolist(), "labels": row[:size].tolist()})
        output = super().forward(input_ids=input_ids, attention_mask=attention_mask, labels=labels, **more)
        self.losses.append((float(output.loss.detach()), int((labels[:, 1:] != -100).sum())))
        return output


@pytest.fixture
def model() -> Recorder:
    torch.manual_seed(0)
    made = Recorder(tiny_llama(VOCABULARY))
    made.seen, made.losses = [], []
    return made


def test_trainer_trains_on_the_files_in_order(
    masked: Path, model: Recorder, tmp_path: Path, cache: dict[str, str]
) -> None:
    """Every label reaches the model, row by row in the order of the files, and the model learns from them."""
    rows = datasets.load_dataset(str(masked), split="train", **cache)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(tmp_path / "run"),
            num_train_epochs=1,
            train_sampling_strategy="sequential",
            per_device_train_batch_size=4,
            learning_rate=5e-3,
            report_to=[],
            save_strategy="no",
            use_cpu=True,
            disable_tqdm=True,
            remove_unused_columns=True,
            dataloader_pin_memory=False,
        ),
        train_dataset=rows,
        data_collator=DataCollatorForSeq2Seq(byte_bpe(), label_pad_token_id=-100),
    )
    result = trainer.train()
    assert model.seen == [{"input_ids": r["input_ids"], "labels": r["labels"]} for r in rows_of(masked, 0, 1, 2)]
    assert result.global_step == -(-len(rows) // 4)
    assert all(not torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert all(loss == loss for loss, _ in model.losses)
    assert sum(x[0] for x in model.losses[-10:]) < sum(x[0] for x in model.losses[:10])


def test_masked_positions_get_no_gradient(masked: Path, model: Recorder) -> None:
    """The gradient of the loss by the logits is zero at the places that predict a masked token, and nowhere else."""
    collator = DataCollatorForSeq2Seq(byte_bpe(), label_pad_token_id=-100)
    rows = [{n: r[n] for n in COLUMNS} for r in rows_of(masked, 2)]
    dropped = 0
    for first in range(0, len(rows), 8):
        batch = collator(rows[first : first + 8])
        output = model(**batch)
        output.logits.retain_grad()
        output.loss.backward()
        gradient = output.logits.grad.abs().sum(-1)
        trained = batch["labels"][:, 1:] != -100
        assert ((gradient[:, :-1] > 0) == trained).all()
        assert (gradient[:, -1] == 0).all()
        dropped += int((~trained & (batch["attention_mask"][:, 1:] == 1)).sum())
    assert dropped > 50
