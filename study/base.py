"""The tokenizer and the base models of the study, trained with ``transformers.Trainer`` on the general corpus."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast, Trainer, TrainingArguments

from study.corpus import Document
from study.network import HEAD

CONTEXT = 128
SIZES = {"toy": (1, 32), "0.1M": (2, 32), "0.3M": (3, 64), "1M": (4, 128)}
"""Layers and width."""
RATE, BATCH = 3e-3, 16


def train_tokenizer(texts: Iterable[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE with one special token, ``<|end|>``, that ends each document."""
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(texts, vocab_size=vocabulary, special_tokens=["<|end|>"], show_progress=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token="<|end|>", pad_token="<|end|>")
    tokenizer.model_max_length = CONTEXT
    return tokenizer


def train_base(out: Path, tokenizer: Any, corpus: Iterable[Document], size: str, most: int, passes: int) -> None:
    """A base model of ``size`` after ``passes`` over the first ``most`` tokens of ``corpus``, saved in ``out``."""
    ids: list[int] = []
    for _, text in corpus:
        ids += [*tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], tokenizer.eos_token_id]
        if len(ids) >= most:
            break
    rows = torch.tensor(ids[: most // CONTEXT * CONTEXT]).view(-1, CONTEXT)
    layers, width = SIZES[size]
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(tokenizer), n_positions=CONTEXT, n_layer=layers, n_embd=width, n_head=width // HEAD,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, eos_token_id=tokenizer.eos_token_id, bos_token_id=None,
    )  # fmt: skip
    arguments = TrainingArguments(
        output_dir=str(out), num_train_epochs=passes, per_device_train_batch_size=BATCH, learning_rate=RATE,
        warmup_steps=50, lr_scheduler_type="cosine", weight_decay=0.1, adam_beta2=0.95, save_strategy="no",
        report_to="none", seed=0, use_cpu=True, logging_steps=100, disable_tqdm=True,
    )  # fmt: skip
    data = [{"input_ids": row, "labels": row} for row in rows]
    trainer = Trainer(GPT2LMHeadModel(config), arguments, train_dataset=data)  # type: ignore[arg-type]
    trainer.train()
    trainer.save_model(str(out))
    tokenizer.save_pretrained(str(out))
