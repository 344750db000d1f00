"""Losses that give a token the weight it has in training on the whole data, however many beside it were dropped.

A mean over the labels left divides by fewer tokens, the more were dropped, so that each survivor weighs up to
1 / (1 - dropped) times as much. These divide by the trainable tokens before dropping: the rows' column ``n_trainable``
(``materialize --add-columns n_trainable``). The loss of a batch is then

    sum of -log p(x_t | x_<t) over the labels left  /  sum of n_trainable over its rows
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from entrodrop_prep.errors import ConfigError

if TYPE_CHECKING:
    import torch

COLUMN = "n_trainable"
_IGNORE = -100


def trainable_token_loss(logits: torch.Tensor, labels: torch.Tensor, n_trainable: torch.Tensor | int) -> torch.Tensor:
    """Cross-entropy in nats, summed over the labels left and divided by the trainable tokens before dropping.

    Args:
        logits: [B, T, V]; those at t predict token t+1. The reduction is float32.
        labels: [B, T] token ids, unshifted, -100 = no loss.
        n_trainable: [B] trainable tokens of each row before dropping, or their sum.
    """
    import torch

    summed = torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1).float(),
        labels[:, 1:].flatten().to(logits.device),
        ignore_index=_IGNORE,
        reduction="sum",
    )
    return summed / torch.as_tensor(n_trainable, device=logits.device).sum()


def summed_loss(outputs: Any, labels: torch.Tensor, num_items_in_batch: torch.Tensor | int) -> torch.Tensor:
    """``trainable_token_loss`` as ``compute_loss_func``, for models whose loss takes no ``num_items_in_batch``."""
    return trainable_token_loss(outputs.logits, labels, num_items_in_batch)


class TrainableTokenLoss:
    """Makes a trainer divide by the trainable tokens before dropping: ``class T(TrainableTokenLoss, Trainer): pass``.

    For ``transformers.Trainer`` and TRL's ``SFTTrainer``. They sum a loss over the labels and divide it by a number of
    items that they count over an optimizer step, all its batches and processes; this puts the sum of ``n_trainable``
    instead. Evaluation stays a mean over the labels.

    The column must reach the trainer: ``remove_unused_columns=False``, and a collator that keeps it, such as
    ``DataCollatorForSeq2Seq``. It is taken out before the model sees the batch. With ``average_tokens_across_devices``
    (on by default) the sum is that of all processes. A model that does not take ``num_items_in_batch`` needs
    ``compute_loss_func=summed_loss``.
    """

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], torch.Tensor | int | None]:
        """The batches of an optimizer step, and the trainable tokens of all of them. Raises ConfigError."""
        trainer: Any = self
        batches, labels = super().get_batch_samples(epoch_iterator, num_batches, device)  # type: ignore[misc]
        if not batches:
            return batches, labels
        if labels is None:
            raise ConfigError(
                "the model's loss takes no num_items_in_batch",
                where=type(trainer.model).__name__,
                fix="give the trainer compute_loss_func=entrodrop_prep.training.losses.summed_loss",
            )
        if trainer.args.n_gpu > 1:
            raise ConfigError(
                f"one process drives {trainer.args.n_gpu} GPUs",
                fix="start one process for each: torchrun or accelerate",
            )
        count = sum(_counts(batch).sum() for batch in batches).to(device)
        if trainer.args.average_tokens_across_devices and trainer.args.world_size > 1:
            alike = (
                trainer.get_tp_size() * trainer.get_cp_size() * trainer.get_sp_size()
            )  # processes that share a batch
            count = trainer.accelerator.gather(count).sum() // alike
        return batches, count

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """The trainer's own, of a batch without the column."""
        return super().compute_loss(model, {k: v for k, v in inputs.items() if k != COLUMN}, *args, **kwargs)  # type: ignore[misc]


def _counts(batch: Any) -> Any:
    if COLUMN not in batch:
        raise ConfigError(
            f"the batches have no column {COLUMN}",
            fix=f"make the rows with `materialize --add-columns {COLUMN}`, and keep the column: "
            "remove_unused_columns=False and DataCollatorForSeq2Seq",
        )
    return batch[COLUMN]
