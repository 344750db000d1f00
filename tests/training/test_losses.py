"""Losses over the trainable tokens before dropping, compared with naive sums in float64, step by step."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, Trainer
from trl import SFTTrainer

from entrodrop_prep.errors import ConfigError
from entrodrop_prep.training.losses import TrainableTokenLoss, summed_loss, trainable_token_loss
from helpers.models import save_model, tiny_llama
from helpers.ranks import run_ranks
from programs import train_losses
from programs.train_losses import BATCH, RATE, Ours, trained, trainer_of

pytestmark = pytest.mark.training

Row = dict[str, Any]
ROWS = 22


def make_rows(count: int = ROWS, vocabulary: int = 97) -> list[Row]:
    """Ragged rows; in later ones more labels are gone. Every third row begins with a prompt of two tokens."""
    rng = np.random.default_rng(0)
    rows = []
    for i in range(count):
        ids = rng.integers(3, vocabulary, rng.integers(4, 20))
        trainable = np.arange(len(ids)) >= (3 if i % 3 == 0 else 1)
        kept = trainable & (rng.random(len(ids)) >= i / count)
        kept[-1] = True
        rows.append(
            {
                "input_ids": ids.tolist(),
                "attention_mask": [1] * len(ids),
                "labels": np.where(kept, ids, -100).tolist(),
                "n_trainable": int(trainable.sum()),
            }
        )
    return rows


def step_loss(model: Any, rows: Sequence[Row], *, mean: bool = False) -> torch.Tensor:
    """The loss of an optimizer step, row by row and token by token, in the model's number format."""
    total = torch.zeros((), dtype=torch.float64)
    for row in rows:
        logprob = model.lm_head(model.model(torch.tensor([row["input_ids"]])).last_hidden_state)[0].log_softmax(-1)
        for t in range(1, len(row["labels"])):
            if row["labels"][t] != -100:
                total = total - logprob[t - 1, row["labels"][t]]
    left = sum(label != -100 for row in rows for label in row["labels"])
    return total / (left if mean else sum(row["n_trainable"] for row in rows))


def naively_trained(model: Path, rows: list[Row], per_step: int, *, mean: bool = False) -> dict[str, torch.Tensor]:
    """Weights after plain gradient descent in float64, ``per_step`` rows a step, and the losses of the steps."""
    net = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64)
    losses = []
    for start in range(0, len(rows), per_step):
        loss = step_loss(net, rows[start : start + per_step], mean=mean)
        grads = torch.autograd.grad(loss, list(net.parameters()))
        losses.append(loss.detach())
        with torch.no_grad():
            for parameter, grad in zip(net.parameters(), grads, strict=True):
                parameter -= RATE * grad
    return {n: p.detach() for n, p in net.named_parameters()} | {"losses": torch.stack(losses)}


class OursOfTrl(TrainableTokenLoss, SFTTrainer):
    pass


def assert_same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(found[name].double(), value, rtol=2e-5, atol=2e-6, msg=lambda m, n=name: f"{n}: {m}")


def differ(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> bool:
    return not torch.allclose(found["losses"].double(), wanted["losses"], rtol=1e-2)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("losses") / "model", tiny_llama(), scale=3.0)


@pytest.mark.parametrize(("cls", "accumulate"), [(Ours, 1), (OursOfTrl, 3)])
def test_trainers_divide_by_the_trainable_tokens(cls: Any, accumulate: int, model: Path, tmp_path: Path) -> None:
    rows = make_rows()
    wanted = naively_trained(model, rows, BATCH * accumulate)
    found = trained(trainer_of(cls, model, rows, tmp_path, gradient_accumulation_steps=accumulate))
    assert len(found["losses"]) == -(-ROWS // (BATCH * accumulate))
    assert_same(found, wanted)
    assert differ(found, naively_trained(model, rows, BATCH * accumulate, mean=True))


@pytest.mark.parametrize(("cls", "parent"), [(Ours, Trainer), (OursOfTrl, SFTTrainer)])
def test_without_the_mixin_it_is_a_mean_over_the_labels_left(
    cls: Any, parent: Any, model: Path, tmp_path: Path
) -> None:
    rows = [{k: v for k, v in row.items() if k != "n_trainable"} for row in make_rows()]
    wanted = naively_trained(model, make_rows(), 3 * BATCH, mean=True)
    assert_same(trained(trainer_of(parent, model, rows, tmp_path, gradient_accumulation_steps=3)), wanted)


@pytest.mark.parametrize("cls", [Ours, OursOfTrl])
def test_a_model_that_takes_no_count(cls: Any, model: Path, tmp_path: Path) -> None:
    rows = make_rows()
    more = {"loss_kwargs": False, "gradient_accumulation_steps": 3}
    with pytest.raises(
        ConfigError, match=r"LlamaForCausalLM: .*compute_loss_func=entrodrop_prep.training.losses.summed_loss"
    ):
        trained(trainer_of(cls, model, rows, tmp_path, **more))
    found = trained(trainer_of(cls, model, rows, tmp_path, compute_loss_func=summed_loss, **more))
    assert_same(found, naively_trained(model, rows, 3 * BATCH))


@pytest.mark.parametrize("cls", [Ours, OursOfTrl])
def test_a_lost_column_is_an_error(cls: Any, model: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no column n_trainable; .*remove_unused_columns=False"):
        trained(trainer_of(cls, model, make_rows(), tmp_path, remove_unused_columns=True))


@pytest.mark.parametrize("cls", [Ours, OursOfTrl])
def test_evaluation_stays_a_mean_over_the_labels(cls: Any, model: Path, tmp_path: Path) -> None:
    rows = make_rows()
    trainer = trainer_of(cls, model, rows, tmp_path, per_device_eval_batch_size=ROWS)
    found = trainer.evaluate(trainer.train_dataset)["eval_loss"]
    net = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64)
    assert found == pytest.approx(float(step_loss(net, rows, mean=True)), rel=1e-5)


def test_two_processes_share_a_step(model: Path, tmp_path: Path) -> None:
    rows = make_rows(24)  # no row is given twice to fill up a batch
    rows_file, out = tmp_path / "rows.json", tmp_path / "out"
    rows_file.write_text(json.dumps(rows))
    run_ranks(Path(train_losses.__file__), model, rows_file, out)
    found = torch.load(tmp_path / "out.pt")
    assert found.pop("processes") == 2
    assert_same(found, naively_trained(model, rows, 2 * 3 * BATCH))


# --- the plain function


def test_the_plain_function_is_the_naive_sum() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 7, 11, generator=generator)
    labels = torch.randint(0, 11, (3, 7), generator=generator)
    labels[0, :5] = labels[1, 2] = labels[2, 6] = -100
    counts = torch.tensor([6, 5, 4])
    logprob = logits.double().log_softmax(-1)
    wanted = sum(-float(logprob[b, t - 1, labels[b, t]]) for b in range(3) for t in range(1, 7) if labels[b, t] != -100)
    found = trainable_token_loss(logits, labels, counts)
    assert float(found) == pytest.approx(wanted / 15, rel=1e-6)
    assert float(trainable_token_loss(logits, labels, 15)) == float(found)
    assert float(trainable_token_loss(logits.bfloat16(), labels, counts)) == pytest.approx(wanted / 15, rel=1e-2)


def test_a_dropped_label_leaves_the_weight_of_the_others() -> None:
    """The worked numbers of docs/training.md: four trainable tokens, of which two are dropped."""
    logits = torch.zeros(1, 5, 3)
    labels = torch.tensor([[-100, 0, 1, 2, 0]])
    dropped = torch.tensor([[-100, 0, -100, 2, -100]])

    def weights(loss: Any) -> list[float]:
        """Gradient by the logit of the label at each position, in units of that of a lone token: softmax - 1."""
        leaf = logits.clone().requires_grad_()
        loss(leaf).backward()
        return [round(float(leaf.grad[0, t - 1, labels[0, t]]) / (1 / 3 - 1), 6) for t in range(1, 5)]

    def mean(of: torch.Tensor) -> Any:
        return lambda x: torch.nn.functional.cross_entropy(x[0, :-1], of[0, 1:])

    assert weights(mean(labels)) == [0.25, 0.25, 0.25, 0.25]
    assert weights(mean(dropped)) == [0.5, 0, 0.5, 0]
    assert weights(lambda x: trainable_token_loss(x, dropped, torch.tensor([4]))) == [0.25, 0, 0.25, 0]
