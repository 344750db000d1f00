"""Train the small reference model that ships with the package, from scratch, on standard library source.

    python examples/train_demo_model.py                    # about 20 minutes on two cores
    python examples/train_demo_model.py --tokens 200000    # a trial

A byte-level BPE tokenizer and a Llama of under 2 million parameters learn the side of the split that
``entrodrop demo`` does not score (``entrodrop_prep/demo/corpus.py``). The result, with the figures on held-out files in
``MODEL_CARD.md``, is written to ``entrodrop_prep/demo/model``. Needs torch 2.9 or later (Muon). On a busy machine set
``OMP_WAIT_POLICY=passive``: threads that spin while they wait made it several times slower.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from entrodrop_prep.demo.corpus import documents

VOCABULARY = 2048
CONTEXT = 1024  # tokens
BATCH = 4  # windows of CONTEXT tokens a step
EOS = "<|endoftext|>"
PAD = "<|padding|>"
MAX_WEIGHT_BYTES = 4_000_000
MAX_FOLDER_BYTES = 4_200_000


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE; ids 0 and 1 are EOS and PAD, the rest is learned from ``texts``."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token=EOS, pad_token=PAD, clean_up_tokenization_spaces=False
    )


def new_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A Llama with random weights, drawn from torch's global generator."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=192,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def windows(encoded: list[torch.Tensor], generator: torch.Generator) -> Iterator[torch.Tensor]:
    """Batches [BATCH, CONTEXT] int64 of token ids without end: documents in a new order each epoch, end to end, cut."""
    while True:
        order = torch.randperm(len(encoded), generator=generator).tolist()
        stream = torch.cat([encoded[i] for i in order])
        shift = int(torch.randint(CONTEXT, (1,), generator=generator))
        count = (len(stream) - shift) // CONTEXT
        cut = stream[shift : shift + count * CONTEXT].view(count, CONTEXT)
        for rows in torch.randperm(count, generator=generator).split(BATCH):
            if len(rows) == BATCH:
                yield cut[rows]


def train(model: LlamaForCausalLM, batches: Iterator[torch.Tensor], tokens: int, peak_rate: float) -> int:
    """Muon for the layers' matrices, AdamW for embeddings and norms; returns the tokens seen.

    The rate warms up over the first 4 percent, then follows a cosine to 2 percent.
    """
    inner = {name: p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name}
    outer = [p for name, p in model.named_parameters() if name not in inner]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.Muon(inner.values(), lr=peak_rate, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(outer, lr=peak_rate, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    steps = max(1, tokens // (BATCH * CONTEXT))
    warmup = max(1, steps // 25)
    started, recent = time.monotonic(), math.log(VOCABULARY)
    model.train()
    for step in range(steps):
        cosine = 0.5 * (1 + math.cos(math.pi * max(0, step - warmup) / max(1, steps - warmup)))
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group["lr"] = peak_rate * min((step + 1) / warmup, 0.02 + 0.98 * cosine)
        ids = next(batches)
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        recent += 0.05 * (loss.item() - recent)
        if step % 50 == 0 or step == steps - 1:
            minutes = (time.monotonic() - started) / 60
            print(f"step {step + 1}/{steps}  loss {recent:.3f}  {minutes:.1f} min", flush=True)
    return steps * BATCH * CONTEXT


@torch.inference_mode()
def held_out_loss(folder: Path, dtype: torch.dtype) -> dict[str, float]:
    """Loss of the saved model on every held-out document, in nats a token and in bits a byte.

    Each document is cut into windows of CONTEXT tokens that begin again (no context from the window before); the first
    token of a window is not predicted, as anywhere in a causal model.
    """
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    nats, predicted, tokens, size = 0.0, 0, 0, 0
    for _, text in documents(held_out=True):
        ids = tokenizer(text, return_tensors="pt", verbose=False)["input_ids"][0]
        tokens += len(ids)
        size += len(text.encode())
        for window in ids.split(CONTEXT):
            logits = model(input_ids=window[None]).logits[0, :-1].float()
            nats += float(torch.nn.functional.cross_entropy(logits, window[1:], reduction="sum")) if len(logits) else 0
            predicted += len(logits)
    loss = nats / predicted
    bits = loss / math.log(2) * tokens / size
    return {"loss": loss, "perplexity": math.exp(loss), "bits_a_byte": bits, "tokens": tokens, "bytes": size}


def tidy(folder: Path) -> None:
    """Make the saved files small, readable by all, and loadable by transformers 4 too."""
    tokenizer, config = folder / "tokenizer.json", folder / "tokenizer_config.json"
    compact = json.dumps(json.loads(tokenizer.read_text("utf-8")), ensure_ascii=False, separators=(",", ":"))
    tokenizer.write_text(compact + "\n", "utf-8")
    values = json.loads(config.read_text("utf-8")) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    values.pop("backend", None)
    config.write_text(json.dumps(values, indent=2) + "\n", "utf-8")
    for file in folder.iterdir():
        file.chmod(0o644)


def card(figures: dict[str, float], settings: dict[str, object]) -> str:
    """MODEL_CARD.md."""
    return f"""---
license: other
license_name: psf-2.0
license_link: https://docs.python.org/3/license.html
language: [code]
pipeline_tag: text-generation
---
# Demo reference model

A decoder of {figures["parameters"]:,} parameters (Llama architecture, tied embeddings, context {CONTEXT} tokens) with a
byte-level BPE tokenizer of {VOCABULARY:,} tokens. It scores the corpus of `entrodrop demo`, nothing else: **a demo
model**, too small to write code, to answer questions, or to choose which tokens of your own data to drop.

- **Data:** source of the CPython {settings["python"]} standard library (Python Software Foundation License Version 2),
  less the top-level modules held out by `is_held_out` in `entrodrop_prep/demo/corpus.py`:
  {figures["train_documents"]:,} documents, {figures["train_tokens"]:,} tokens. Weights and tokenizer learned from no \
other
  text.
- **Weights:** trained from scratch by `examples/train_demo_model.py` (seed {settings["seed"]}, peak learning rate
  {settings["rate"]}), {figures["seen"]:,} tokens seen, repeats counted. Stored as {settings["dtype"]} safetensors.
- **Licence:** weights and tokenizer are derived from that source and are given under the same Python Software \
Foundation
  License Version 2. Copyright (c) 2001 Python Software Foundation, all rights reserved; some of the files carry the
  notices of further authors, listed at https://docs.python.org/3/license.html.

## Held-out figures

On all {figures["held_out_documents"]:,} held-out documents ({figures["tokens"]:,} tokens, {figures["bytes"]:,} bytes),
in windows of {CONTEXT} tokens that begin again, with the weights as stored:

| | loss (nats a token) | perplexity | bits a byte |
|---|---|---|---|
| uniform, ln {VOCABULARY} | {math.log(VOCABULARY):.3f} | {VOCABULARY:,} | {figures["uniform_bits"]:.3f} |
| this model, computed in float32 | {figures["loss"]:.3f} | {figures["perplexity"]:.1f} | {figures["bits_a_byte"]:.3f} |
| this model, computed in {settings["dtype"]} | {figures["low_loss"]:.3f} | {figures["low_perplexity"]:.1f} | \
{figures["low_bits"]:.3f} |
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = Path(__file__).parents[1] / "entrodrop_prep/demo/model"
    parser.add_argument("--out", type=Path, default=default, help="folder to write (default: the package's model)")
    parser.add_argument("--tokens", type=int, default=5_000_000, help="tokens to train on, repeats counted")
    parser.add_argument("--rate", type=float, default=3e-3, help="peak learning rate")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    torch.manual_seed(options.seed)
    started = time.monotonic()
    texts = [text for _, text in documents(held_out=False)]
    tokenizer = train_tokenizer(texts)
    eos = tokenizer.eos_token_id
    encoded = [torch.tensor([*tokenizer(text, verbose=False)["input_ids"], eos]) for text in texts]
    train_tokens = sum(map(len, encoded))
    model = new_model(tokenizer)
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{parameters:,} parameters; {len(texts)} documents, {train_tokens:,} tokens", flush=True)
    generator = torch.Generator().manual_seed(options.seed)
    seen = train(model, windows(encoded, generator), options.tokens, options.rate)

    options.out.mkdir(parents=True, exist_ok=True)
    model.to(torch.bfloat16).save_pretrained(options.out)
    tokenizer.save_pretrained(options.out)
    tidy(options.out)
    minutes = (time.monotonic() - started) / 60

    figures = held_out_loss(options.out, torch.float32)
    low = held_out_loss(options.out, torch.bfloat16)
    figures |= {
        "low_loss": low["loss"],
        "low_perplexity": low["perplexity"],
        "low_bits": low["bits_a_byte"],
        "uniform_bits": math.log2(VOCABULARY) * figures["tokens"] / figures["bytes"],
        "parameters": parameters,
        "train_documents": len(texts),
        "train_tokens": train_tokens,
        "held_out_documents": sum(1 for _ in documents(held_out=True)),
        "seen": seen,
    }
    settings = {"python": platform.python_version(), "seed": options.seed, "rate": options.rate, "dtype": "bfloat16"}
    (options.out / "MODEL_CARD.md").write_text(card(figures, settings), "utf-8")
    print(
        f"{parameters:,} parameters, {seen:,} tokens seen in {minutes:.1f} min; held out: "
        f"{figures['loss']:.3f} nats a token, perplexity {figures['perplexity']:.1f}, "
        f"{figures['bits_a_byte']:.3f} bits a byte (uniform: ln {VOCABULARY} = {math.log(VOCABULARY):.3f}); "
        f"computed in bfloat16: {figures['low_loss']:.3f}"
    )
    weights = (options.out / "model.safetensors").stat().st_size
    total = sum(file.stat().st_size for file in options.out.iterdir())
    print(f"model.safetensors {weights:,} bytes, folder {total:,} bytes")
    if weights > MAX_WEIGHT_BYTES or total > MAX_FOLDER_BYTES:
        raise SystemExit("error: the model is too large to ship")


if __name__ == "__main__":
    main()
