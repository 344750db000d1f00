"""How fast scoring with transformers is on this machine's GPU, and how much of what the GPU can do that is.

    python benchmarks/gpu.py [--tokens 1000000] [--batch-tokens 8192 32768] [--profile]

Measures what memory and matrix units give, the reduction of the logits as share of the first, the product with the
head as share of the second and against float64, then scoring with a random model of the shape of Qwen3-0.6B in
bfloat16, one step after the other. Nothing is downloaded; on a GPU it takes some minutes, and without one everything
is toy size. Prints tables, and a JSON line of all figures.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

try:
    import numpy as np
    import torch
    import transformers

    from entrodrop_prep.backends.devices import compile_layers
    from entrodrop_prep.backends.model import inspect_model
    from entrodrop_prep.backends.prefetch import score_all
    from entrodrop_prep.backends.transformers import TransformersBackend
    from entrodrop_prep.config import ScoreConfig
    from entrodrop_prep.vllm_plugin import head as heads
    from entrodrop_prep.vllm_plugin.reduce import choose_reduction, entropy_and_logprob
except ImportError as e:
    raise SystemExit(f"error: {e}; install it, then run this again (pip install {e.name or 'entrodrop-prep'})") from e

Figures = dict[str, Any]
COMPILED = "layers compiled"
AT_ONCE = 8


@dataclass(frozen=True)
class Size:
    """What is measured.

    Attributes:
        side: of the square matrices that are multiplied.
        copied: bytes of the copy.
        vocab_size, width: of the head.
        rows: of logits, for the reduction; the last for the head.
        model: what Qwen3's configuration has beside these.
        longest: row that is scored.
        rounds: of each timing; the median counts.
    """

    side: int
    copied: int
    vocab_size: int
    width: int
    rows: tuple[int, ...]
    model: dict[str, int]
    longest: int
    rounds: int


GPU = Size(
    side=8192,
    copied=4 << 30,
    vocab_size=151_936,
    width=1024,
    rows=(256, 1766),
    model={"num_hidden_layers": 28, "intermediate_size": 3072, "num_attention_heads": 16, "num_key_value_heads": 8},
    longest=2048,
    rounds=15,
)
TOY = Size(
    side=256,
    copied=1 << 20,
    vocab_size=1003,
    width=64,
    rows=(8, 32),
    model={"num_hidden_layers": 2, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2},
    longest=64,
    rounds=3,
)


def seconds(work: Callable[[], Any], device: torch.device, rounds: int) -> float:
    """Median time of some calls, after two that do not count."""
    found = []
    for i in range(rounds + 2):
        if device.type == "cuda":
            begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begun.record()
            for _ in range(AT_ONCE):  # so that the GPU does not wait for each to be launched
                work()
            ended.record()
            ended.synchronize()
            one = begun.elapsed_time(ended) / 1e3 / AT_ONCE
        else:
            start = time.perf_counter()
            work()
            one = time.perf_counter() - start
        if i >= 2:
            found.append(one)
    return statistics.median(found)


def rates(size: Size, device: torch.device) -> Figures:
    """Bytes/s of a copy, read and written, and floating-point operations/s of matrix products."""
    source, target = torch.empty((2, size.copied), dtype=torch.uint8, device=device).random_()
    found: Figures = {"copy": 2 * size.copied / seconds(lambda: target.copy_(source), device, size.rounds)}
    operations = 2 * size.side**3
    for name, dtype, products in (
        ("bfloat16", torch.bfloat16, nullcontext),
        ("TF32", torch.float32, heads.tf32),
        ("float32", torch.float32, nullcontext),
    ):
        a, b = (torch.randn((size.side, size.side), device=device, dtype=dtype) for _ in range(2))
        with products():
            found[name] = operations / seconds(lambda a=a, b=b: a @ b, device, size.rounds)
    return found


def reductions(size: Size, device: torch.device, bandwidth: float) -> list[Figures]:
    """Each way to entropy and log-probability: time, and one reading of the logits as share of the copy's rate."""
    found = []
    ways = {"torch": entropy_and_logprob}
    fused, name = choose_reduction(device, size.vocab_size, torch.bfloat16)
    ways[name] = fused
    for dtype in (torch.float32, torch.bfloat16):
        for n in size.rows:
            logits = torch.randn((n, size.vocab_size), device=device).mul_(4).to(dtype)
            targets = torch.randint(size.vocab_size, (n,), device=device)
            few = logits[:16].double().log_softmax(-1)
            exact = torch.stack([-(few.exp() * few).sum(-1), few.gather(1, targets[:16, None])[:, 0]])
            for way, reduce in ways.items():
                error = float((torch.stack(reduce(logits[:16].clone(), targets[:16])) - exact).abs().max())
                taken = seconds(lambda f=reduce, z=logits, t=targets: f(z, t), device, size.rounds)
                share = logits.numel() * logits.element_size() / taken / bandwidth
                kind = str(dtype).removeprefix("torch.")
                found.append({"way": way, "logits": kind, "n": n, "ms": taken * 1e3, "share": share, "error": error})
    return found


def products(size: Size, device: torch.device, rate: float) -> list[Figures]:
    """Each way to the logits of a model in bfloat16: time, share of the bfloat16 rate, error of entropies in nats."""
    found = []
    n = size.rows[-1]
    hidden = torch.randn((n, size.width), device=device, dtype=torch.bfloat16)
    weight = torch.randn((size.vocab_size, size.width), device=device).mul_(4 * size.width**-0.5).bfloat16()
    exact = (hidden[:32].double() @ weight.double().t()).log_softmax(-1)
    exact = -(exact.exp() * exact).sum(-1)
    for name, way in head_ways(weight).items():
        logits = way(hidden)
        error = float(
            (entropy_and_logprob(logits[:32].clone(), torch.zeros(32, dtype=torch.int64, device=device))[0] - exact)
            .abs()
            .max()
        )
        taken = seconds(lambda f=way: f(hidden), device, size.rounds)
        share = 2 * n * weight.numel() / taken / rate
        found.append({"way": name, "n": n, "ms": taken * 1e3, "share": share, "error": error})
    return found


def head_ways(weight: torch.Tensor) -> dict[str, Callable[[torch.Tensor], torch.Tensor]]:
    """Logits of hidden states [n, D] and weights [V, D] in half precision."""

    def tf32(hidden: torch.Tensor) -> torch.Tensor:
        with heads.tf32():
            return hidden.float() @ weight.float().t()

    ways = {
        "bfloat16, rounded": lambda hidden: hidden @ weight.t(),
        "float32": lambda hidden: hidden.float() @ weight.float().t(),
        "TF32": tf32,
    }
    if weight.is_cuda:
        ways["bfloat16 to float32"] = lambda hidden: torch.mm(hidden, weight.t(), out_dtype=torch.float32)
    return ways


def make_model(directory: Path, size: Size) -> Path:
    """A random Qwen3 of this size, in bfloat16."""
    config = transformers.Qwen3Config(
        vocab_size=size.vocab_size,
        hidden_size=size.width,
        head_dim=size.width // size.model["num_attention_heads"] * 2,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        **size.model,
    )
    torch.manual_seed(0)
    transformers.Qwen3ForCausalLM(config).bfloat16().save_pretrained(directory)
    return directory


def make_rows(size: Size, tokens: int) -> list[np.ndarray[Any, Any]]:
    """Random rows, most of them some hundred tokens long, about so many tokens in all."""
    generator = np.random.default_rng(0)
    lengths: list[int] = []
    while sum(lengths) < tokens:
        lengths.append(int(np.clip(generator.lognormal(np.log(size.longest / 4), 0.8), 16, size.longest)))
    return [generator.integers(0, size.vocab_size, length, dtype=np.int32) for length in lengths]


@contextmanager
def head_of(backend: Any, way: str | None) -> Iterator[None]:
    """Within the block the model's head is computed in one of ``head_ways``, or as the program does it."""
    head = backend.model.get_output_embeddings()
    ours = head.forward
    if way is not None:
        product = head_ways(head.weight)[way]
        head.forward = lambda hidden: product(hidden.flatten(0, -2)).view(*hidden.shape[:-1], -1)
    try:
        yield
    finally:
        head.forward = ours


def scoring(size: Size, device: torch.device, rate: float, tokens: int, batches: list[int], profile: bool) -> Figures:
    """Tokens/s of the backend, one step after the other, and its share of the matrix units' rate."""
    rows = make_rows(size, tokens)
    count = sum(map(len, rows))
    with tempfile.TemporaryDirectory() as tmp:
        model = str(make_model(Path(tmp), size))
        config = ScoreConfig(source="-", model=model, out="-", device=device.type, backend="transformers")
        backend: Any = TransformersBackend(config, inspect_model(config))
    parameters = backend.model.num_parameters()
    ours = backend.reduce
    steps: list[tuple[str, str | None, Any, int, bool]] = [
        ("head in float32, torch's reduction", "float32", entropy_and_logprob, batches[0], True),
        ("head in TF32", "TF32", entropy_and_logprob, batches[0], True),
        ("head as it is", None, entropy_and_logprob, batches[0], True),
        (f"reduction by {backend.reduction}", None, ours, batches[0], True),
        ("without a mask", None, ours, batches[0], False),
        *((f"batches of {b:,} tokens", None, ours, b, False) for b in batches[1:]),
    ]
    found: Figures = {"model": parameters, "tokens": count, "chunked": backend.chunked_head, "steps": []}
    if device.type == "cuda":
        steps += [(f"{COMPILED}, {b:,} tokens", None, ours, b, False) for b in batches]
    for name, way, reduce, batch, masked in steps:
        backend.reduce, backend.batch_tokens, backend.masked = reduce, batch, masked
        if name.startswith(COMPILED) and not backend.compiled:
            backend.compiled = True
            compile_layers(backend.model, model)
        with head_of(backend, way):
            begun = time.perf_counter()
            score_all(backend, rows[:200])
            start = time.perf_counter() - begun
            begun = time.perf_counter()
            score_all(backend, rows)
            speed = count / (time.perf_counter() - begun)
        share = 2 * parameters * speed / rate
        found["steps"].append({"step": name, "tokens_per_second": speed, "share": share, "first_seconds": start})
    if profile:
        show_profile(backend, rows, device)
    return found


def show_profile(backend: Any, rows: list[np.ndarray[Any, Any]], device: torch.device) -> None:
    """What takes the time of scoring some rows."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as record

    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    begun = time.perf_counter()
    with record(activities=kinds) as found:
        score_all(backend, rows[:400])
    taken = time.perf_counter() - begun
    sort = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    print(found.key_averages().table(sort_by=sort, row_limit=40, max_name_column_width=60))
    print(f"{taken:.3f} s in all\n")


def table(title: str, lines: list[Figures]) -> None:
    """Rows of figures as text."""
    print(title)
    shown = [[f"{v:.3g}" if isinstance(v, float) and v < 1000 else f"{v:,.0f}" if not isinstance(v, str) else v
              for v in line.values()] for line in lines]  # fmt: skip
    heads = list(lines[0])
    widths = [max(len(row[i]) for row in [heads, *shown]) for i in range(len(heads))]
    for row in [heads, *shown]:
        print(
            "  "
            + "  ".join(
                cell.rjust(w) if i else cell.ljust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
            )
        )
    print()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=None, help="scored in each step; by default some seconds' worth")
    parser.add_argument("--batch-tokens", type=int, nargs="+", default=[8192, 32768])
    parser.add_argument("--profile", action="store_true", help="show what takes the time of scoring")
    options = parser.parse_args()
    logging.basicConfig(format="%(message)s")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    size, tokens = (GPU, 600_000) if device.type == "cuda" else (TOY, 1500)
    name = torch.cuda.get_device_name() if device.type == "cuda" else device.type
    line: Figures = {
        "benchmark": "gpu",
        "device": name,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    with torch.inference_mode():
        line["rates"] = rates(size, device)
        table("bytes/s of a copy, operations/s of products", [line["rates"]])
        line["reductions"] = reductions(size, device, line["rates"]["copy"])
        table("reduction; share: of the copy's rate, reading the logits once", line["reductions"])
        line["heads"] = products(size, device, line["rates"]["bfloat16"])
        table("product with the head; share: of bfloat16's rate; error: of entropies, nats", line["heads"])
    line["scoring"] = scoring(
        size, device, line["rates"]["bfloat16"], options.tokens or tokens, options.batch_tokens, options.profile
    )
    table("scoring; share: 2 * parameters * tokens/s of bfloat16's rate", line["scoring"]["steps"])
    print(json.dumps(line, default=str))


if __name__ == "__main__":
    main()
