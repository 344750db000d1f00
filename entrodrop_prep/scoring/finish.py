"""From finished shards to a finished directory: counts, tokenizer, rejected rows, manifest."""

from __future__ import annotations

import io
import json
import logging
from pathlib import Path
from typing import Any

import numpy as np

from entrodrop_prep.errors import IntegrityError, ModelError, SourceError
from entrodrop_prep.scoring.described import described_of
from entrodrop_prep.scoring.notes import note_counts, say
from entrodrop_prep.scoring.plan import Plan
from entrodrop_prep.scoring.span import COUNTS
from entrodrop_prep.scoring.tokenizer import load_tokenizer, tokenizer_digest
from entrodrop_prep.store import digest, manifest
from entrodrop_prep.store.digest import ContentDigest
from entrodrop_prep.store.layout import REJECTED, TOKENIZER, UNIGRAM
from entrodrop_prep.store.ownership import Contents, Owned
from entrodrop_prep.store.rows import to_rows, token_counts
from entrodrop_prep.store.schema import SCORED
from entrodrop_prep.store.shards import Footer, check_file_schema, read_batches

log = logging.getLogger(__name__)

MANY = 0.05


def shard_name(index: int) -> str:
    """``shard-00000.parquet`` and so on."""
    return f"shard-{index:05d}.parquet"


def _misplaced(name: str, info: dict[str, Any]) -> str | None:
    index = int(name.removeprefix("shard-").removesuffix(".parquet"))
    return None if info.get("shard") == index else f"by its footer it is {shard_name(info.get('shard', 0))}"


CONTENTS = Contents(SCORED, (UNIGRAM, REJECTED), (TOKENIZER,), _misplaced)


def finish(plan: Plan, out: Path, shards: list[tuple[Path, Footer]]) -> dict[str, Any]:
    """Read every shard once more, count its tokens, and write what makes the directory whole."""
    counts = dict.fromkeys(COUNTS, 0)
    unigram = np.zeros(plan.info.vocab_size, np.int64)
    files, rejected, sources = [], [], []
    environments: dict[str, dict[str, Any]] = {}
    for index, (path, footer) in enumerate(shards):
        if index and shards[index - 1][1].info["source"]["next"] is None:
            raise IntegrityError("no row of the source belongs to it", where=str(path), fix="remove it and run again")
        if path.name != shard_name(index):
            raise IntegrityError("the shard is missing", where=str(out / shard_name(index)), fix="run again")
        if footer.info["shard"] != index:
            raise IntegrityError(
                f"by its footer it is {shard_name(footer.info['shard'])}",
                where=str(path),
                fix="remove it and run again",
            )
        _count_tokens(path, plan, footer, unigram)
        for name in COUNTS:
            counts[name] += footer.info["counts"][name]
        rejected += footer.info["rejected"]
        sources.append(footer.info["source"]["digest"])
        key = digest.of_json(footer.info["environment"])
        environments.setdefault(key, {"environment": footer.info["environment"], "shards": []})["shards"].append(index)
        files.append(
            manifest.file_entry(
                out,
                path,
                rows=footer.rows,
                tokens=footer.info["counts"]["tokens"],
                trainable_tokens=footer.info["counts"]["trainable_tokens"],
                content_digest=footer.content_digest,
            )
        )
    if not counts["rows"]:
        raise SourceError(
            f"nothing is left to score: of {counts['rows_read']} rows {counts['short_rows']} have fewer than two "
            f"tokens, {counts['dropped_long_rows']} are too long, {counts['bad_rows']} are bad",
            where=plan.source.name,
            fix="check the column and the limits",
        )
    owned = Owned(out, CONTENTS)
    buffer = io.BytesIO()
    np.save(buffer, unigram)
    owned.write(UNIGRAM, buffer.getvalue())
    lines = [json.dumps(entry, sort_keys=True, ensure_ascii=False) + "\n" for entry in rejected]
    if lines:
        owned.write(REJECTED, "".join(lines).encode("utf-8", "backslashreplace"))
    _save_tokenizer(plan, owned)
    extra = [out / UNIGRAM, *([out / REJECTED] if lines else []), *sorted((out / TOKENIZER).rglob("*"))]
    notes = note_counts(footer.info.get("notes", {}) for _, footer in shards)
    say(notes)
    recorded = described_of((footer for _, footer in shards), plan)
    described = {
        "schema": plan.identity["schema"],
        "generator": recorded["generator"],
        "identity": plan.identity,
        "environments": list(environments.values()),
        "source": {**recorded["source"], "digest": digest.of_json(sources)},
        "model": recorded["model"],
        "tokenizer": {**recorded["tokenizer"], **_stored(plan, out)},
        "counts": counts,
        **({"notes": notes} if notes else {}),
        "content_digest": digest.of_json({"identity": plan.identity, "shards": [f["content_digest"] for f in files]}),
        "files": files + [manifest.file_entry(out, p) for p in extra if p.is_file()],
    }
    owned.settle(described)
    written = manifest.write(out, described)
    _warn_of_losses(plan.source.name, counts)
    return written


def _warn_of_losses(name: str, counts: dict[str, int]) -> None:
    """Say so where more rows than ``MANY`` of all give nothing to train on."""
    lost = {
        "bad": counts["bad_rows"],
        "of fewer than two tokens": counts["short_rows"],
        "over --max-length": counts["dropped_long_rows"],
        "without anything to train on": counts["rows_without_loss"],
    }
    total = sum(lost.values())
    if total > MANY * counts["rows_read"]:
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in lost.items() if count)
        log.warning(
            *("%s: %.1f%% of the rows are lost, %s of %s: %s", name, 100 * total / counts["rows_read"]),
            *(f"{total:,}", f"{counts['rows_read']:,}", reasons),
        )


def _count_tokens(path: Path, plan: Plan, footer: Footer, unigram: np.ndarray[Any, Any]) -> None:
    """Add a shard's tokens to the counts, each token of a document once; check its content digest on the way."""
    check_file_schema(path, plan.schema)
    content = ContentDigest(plan.schema)
    for batch in read_batches(path):
        content.update(batch)
        unigram += token_counts(to_rows(batch), len(unigram))
    if content.hexdigest() != footer.content_digest:
        raise IntegrityError("its rows are not those that were written", where=str(path), fix="remove it and run again")


def _save_tokenizer(plan: Plan, owned: Owned) -> None:
    """The tokenizer as later stages and trainers load it; written beside and renamed, so that it is whole."""
    with owned.writing_folder(TOKENIZER, {}) as tmp:
        if plan.tokenizer.is_fast:  # of a full disk its own save says no more than a bare Exception: find out before
            (tmp / "tokenizer.json").write_text(plan.tokenizer.backend_tokenizer.to_str(pretty=True), encoding="utf-8")
        plan.tokenizer.save_pretrained(str(tmp))


def _stored(plan: Plan, out: Path) -> dict[str, str | None]:
    """The digest of the tokenizer as it is loaded again, where that is not the one it had; None if it is not loaded."""
    try:
        again = load_tokenizer(str(out / TOKENIZER), revision=None, trust_remote_code=False, chat_template_file=None)
    except ModelError:
        return {"stored": None}
    found = tokenizer_digest(again)
    return {} if found == plan.identity["tokenizer"] else {"stored": found}
