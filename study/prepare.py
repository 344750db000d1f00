"""From texts to arrays, by the product: base models, scores, and the rows of every arm, epoch and seed from the loader.

    python -m study.prepare OUT [--size 0.3M --size 1M] [--domain code --domain prose] [--again RESULTS.json]

OUT gets, for each domain and size, ``arrays-DOMAIN-SIZE/``: ``plain.npz`` (rows [R, T] of train, dev and test),
``rows.npz`` (what differs from them, see ``pack``) and ``start.pt`` (the base model's weights). ``study.train`` needs
nothing else.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from entrodrop_prep import MaskedRows
from entrodrop_prep.config import ScoreConfig
from entrodrop_prep.masking.assembly import MaskedColumns
from entrodrop_prep.scoring.run import score
from entrodrop_prep.store.rows import to_rows
from entrodrop_prep.store.scored import ScoredDataset
from study import base, corpus, train
from study.arms import ARMS, EPOCHS, rows_key

VOCABULARY, GENERAL_TOKENS, PASSES = 2048, 800_000, 2
PARTS = {"train": 40_000, "dev": 20_000, "test": 20_000}
CHAT_PARTS = {
    "task": {"train": 700, "dev": 1_200, "test": 1_200},
    "chat": {"train": 4_000, "dev": 2_000, "test": 2_000},
}
TEMPLATE = Path(__file__).with_name("chat.jinja")
SEEN_EPOCHS = 3


def prepare(
    out: Path,
    sizes: list[str],
    runs: list[train.Run],
    *,
    general: int = GENERAL_TOKENS,
    passes: int = PASSES,
    parts: dict[str, int] | None = None,
    epochs: int = EPOCHS,
    domains: tuple[str, ...] = corpus.DOMAINS,
    vocabulary: int = VOCABULARY,
    documents: int | None = None,
) -> None:
    """Write the arrays of ``domains`` and ``sizes``; a base model that is there is kept.

    ``documents``: how many of the general corpus are used.
    """
    known = corpus.general()[:documents]
    tokenizer = base.train_tokenizer((text for _, text in known), vocabulary)
    for size in sizes:
        if not (out / f"base-{size}" / "model.safetensors").exists():
            base.train_base(out / f"base-{size}", tokenizer, known, size, general, passes)
    for domain in domains:
        found = corpus.domain(domain)
        counts = {name: len(tokenizer(text, verbose=False)["input_ids"]) for name, text in found}
        wanted = parts or CHAT_PARTS.get(domain, PARTS)
        for part, kept in corpus.parts(found, wanted, counts).items():
            lines = [json.dumps(row(domain, *document)) for document in kept]
            (out / f"{domain}-{part}.jsonl").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        for size in sizes:
            started = time.monotonic()
            model, template = out / f"base-{size}", str(TEMPLATE) if domain in corpus.CHATS else None
            arrays_of(model, out, domain, size, runs, epochs, chat_template=template)
            torch.save(train.from_base(model), out / f"arrays-{domain}-{size}" / "start.pt")
            print(f"{domain} {size}: {time.monotonic() - started:.0f} s", flush=True)


def row(domain: str, name: str, text: str) -> dict[str, Any]:
    """A document as ``score`` reads it."""
    if domain not in corpus.CHATS:
        return {"id": name, "text": text}
    texts = zip(("user", "assistant"), text.split("\n"), strict=True)
    return {"id": name, "messages": [{"role": role, "content": content} for role, content in texts]}


def arrays_of(
    model: Path, out: Path, domain: str, size: str, runs: list[train.Run], epochs: int, **scoring: Any
) -> None:
    """Score a domain with ``model``, with settings of ``score``, and write the arrays that ``runs`` need."""
    target = out / f"arrays-{domain}-{size}"
    target.mkdir(exist_ok=True)
    plain, scored = {}, {}
    for part in corpus.PARTS:
        scored[part] = scored_by(model, out, domain, part, f"{part}-{size}", **scoring)
        plain |= {f"{part}_{name}": array for name, array in scored_arrays(scored[part]).items()}
    np.savez_compressed(target / "plain.npz", **plain)
    wanted = {(rows_key(r.arm, r.strength), r.seed): r for r in runs if ARMS[r.arm].recipe}
    if any(ARMS[r.arm].needs_seen for r in wanted.values()):
        seen = out / f"seen-{domain}-{size}"
        if not (seen / "model.safetensors").exists():
            train.save_seen(model, seen, train.from_base(model), plain, SEEN_EPOCHS)
        scored["seen"] = scored_by(seen, out, domain, "train", f"seen-{size}", **scoring)

    packed: dict[str, NDArray[Any]] = {}
    ids, labels = plain["train_ids"], plain["train_labels"]
    for (key, seed), run in wanted.items():
        recipe = ARMS[run.arm].rows(run.strength)
        directory = scored["seen" if ARMS[run.arm].scores == "seen" else "train"]
        more = {"against_scores": scored["seen"]} if "excess" in recipe["select"] else {}
        rows = MaskedRows.open(
            directory, epochs=epochs, seed=seed, shuffle="none", cache_dir=out / "cache", **recipe, **more
        )
        made = [padded(rows.epoch_rows.epoch(e)[:].stored, ids.shape) for e in range(epochs)]
        packed |= pack(f"{key}|{seed}", made, ids, labels)
    np.savez_compressed(target / "rows.npz", **packed)


def scored_by(model: Path, out: Path, domain: str, part: str, name: str, **scoring: Any) -> Path:
    """The scored directory of a part of a domain; ``scoring`` are settings of ``score``."""
    directory = out / f"scored-{domain}-{name}"
    usual = {"max_length": base.CONTEXT, "long_documents": "split", "backend": "transformers", "device": "cpu"}
    source = str(out / f"{domain}-{part}.jsonl")
    score(
        ScoreConfig(source=source, model=str(model), out=str(directory), score_dtype="float32", **{**usual, **scoring})
    )
    return directory


def scored_arrays(directory: Path) -> dict[str, NDArray[Any]]:
    """``ids`` [R, T] uint32, ``labels`` [R, T] int32, ``entropy`` [R, T] float32 of a scored directory's windows."""
    found: dict[str, list[Any]] = {"ids": [], "labels": [], "entropy": []}
    for batch in ScoredDataset(directory).batches():
        rows = to_rows(batch)
        for a, b in zip(rows.offsets[:-1].tolist(), rows.offsets[1:].tolist(), strict=True):
            if rows.trainable[a:b].any():
                found["ids"].append(rows.input_ids[a:b])
                found["labels"].append(np.where(rows.trainable[a:b], rows.input_ids[a:b], -100))
                found["entropy"].append(np.nan_to_num(rows.entropy[a:b]))
    kinds = {"ids": (np.uint32, 0), "labels": (np.int32, -100), "entropy": (np.float32, 0)}
    shape = len(found["ids"]), max(map(len, found["ids"]))
    return {n: _pad(found[n], shape, kind, fill) for n, (kind, fill) in kinds.items()}


def padded(rows: MaskedColumns, shape: tuple[int, ...]) -> tuple[NDArray[Any], NDArray[Any]]:
    """Ids and labels of rows as arrays of ``shape``."""
    filled = np.arange(shape[1]) < np.diff(rows.offsets)[:, None]
    ids, labels = np.zeros(shape, np.uint32), np.full(shape, -100, np.int32)
    ids[filled], labels[filled] = rows.input_ids, rows.labels
    return ids, labels


def _pad(rows: list[Any], shape: tuple[int, ...], kind: Any, fill: int) -> NDArray[Any]:
    if len(rows) != shape[0]:
        raise ValueError(f"{len(rows)} rows, not {shape[0]}")
    made = np.full(shape, fill, kind)
    for row, values in zip(made, rows, strict=True):
        row[: len(values)] = values
    return made


def pack(
    key: str, made: list[tuple[NDArray[Any], NDArray[Any]]], ids: NDArray[Any], labels: NDArray[Any]
) -> dict[str, NDArray[Any]]:
    """What differs from the plain rows: bits of changed inputs and lost labels [E, R*T/8], and the new ids in order."""
    changed = np.array([a != ids for a, _ in made]).reshape(len(made), -1)
    lost = np.array([b != labels for _, b in made]).reshape(len(made), -1)
    if not all((b[b != labels] == -100).all() for _, b in made):
        raise ValueError("a label is another token's")
    new = np.concatenate([a.ravel()[c] for (a, _), c in zip(made, changed, strict=True)])
    return {f"{key}|changed": np.packbits(changed, axis=1), f"{key}|lost": np.packbits(lost, axis=1), f"{key}|new": new}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--size", action="append", default=None)
    parser.add_argument("--domain", action="append", default=None, choices=(*corpus.DOMAINS, *corpus.CHATS))
    train.options(parser)
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    domains = tuple(given.domain or corpus.DOMAINS)
    prepare(given.out, given.size or ["0.3M", "1M"], train.wanted(given), domains=domains)
