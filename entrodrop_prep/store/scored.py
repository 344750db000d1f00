"""A finished scored directory, as everything after scoring reads it."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from entrodrop_prep.errors import IntegrityError, ModelError
from entrodrop_prep.store import manifest
from entrodrop_prep.store.layout import TOKENIZER, UNIGRAM
from entrodrop_prep.store.schema import SCORED, check_schema, score_columns, scored_schema
from entrodrop_prep.store.scored_footers import disagreements, wrong_facts
from entrodrop_prep.store.shards import check_file_schema, read_batches, read_footer, reading

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BATCH_TOKENS = 1 << 18


class ScoredDataset:
    """A scored directory whose manifest holds.

    Raises IntegrityError on opening one that is unfinished, damaged or of another schema version.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.manifest = manifest.read(directory, SCORED)
        self.files: list[dict[str, Any]] = [e for e in self.manifest["files"] if "rows" in e]
        self.schema = self._schema()

    @property
    def content_digest(self) -> str:
        """What this dataset is known by, wherever it is."""
        return str(self.manifest["content_digest"])

    @property
    def vocab_size(self) -> int:
        """Columns of the reference model's logits."""
        return int(self.manifest["model"]["vocab_size"])

    @property
    def special_ids(self) -> list[int]:
        """Ids of the tokenizer's special tokens, ascending."""
        return list(self.manifest["tokenizer"]["special_ids"])

    @property
    def has_logprob(self) -> bool:
        """Whether log-probabilities were stored."""
        return "logprob" in self.schema.names

    @property
    def score_columns(self) -> tuple[str, ...]:
        """Names of the stored scores."""
        return score_columns(logprob=self.has_logprob)

    @property
    def score_dtype(self) -> np.dtype[Any]:
        """float16 or float32."""
        kind: np.dtype[Any] = np.dtype(self.schema.field("entropy").type.value_type.to_pandas_dtype())
        return kind

    @cached_property
    def unigram(self) -> np.ndarray[Any, np.dtype[np.int64]]:
        """[V] int64: how often each id occurs in the corpus, every token of a document counted once."""
        path = self.directory / UNIGRAM
        try:
            with reading(path):
                counts: np.ndarray[Any, np.dtype[np.int64]] = np.load(path, allow_pickle=False, mmap_mode="r")
        except ValueError as e:
            raise IntegrityError(f"the file is damaged: {e}", where=str(path), fix="score again") from e
        if counts.dtype != np.int64 or counts.shape != (self.vocab_size,):
            raise IntegrityError(
                f"it holds {counts.dtype} of shape {counts.shape}, not the counts of {self.vocab_size} ids",
                where=str(path),
                fix="score again",
            )
        return np.array(counts)

    def check(self) -> None:
        """Every file has the bytes it was finished with, no shard is there beside them, and ``check_footers``.

        Raises IntegrityError.

        Call it under ``locks.reading_lock``: the manifest must still be the one that was opened.
        """
        if manifest.read(self.directory, SCORED)["manifest_digest"] != self.manifest["manifest_digest"]:
            raise IntegrityError(
                "another run rewrote it since it was opened", where=str(self.directory), fix="run again"
            )
        for problem in manifest.changed_files(self.directory, self.manifest):
            raise problem
        for entry in self.files:
            check_file_schema(self.directory / entry["file"], self.schema)
        self.check_footers()

    def check_footers(self, *, first: bool = False) -> None:
        """What the manifest says is what the shards say of themselves, or the ``first`` one, which is there.

        Raises IntegrityError.
        """
        footers = [read_footer(self.directory / e["file"]) for e in self.files[: 1 if first else None]]
        for line in (wrong_facts if first else disagreements)(self.directory, self.manifest, footers, []):
            raise IntegrityError(line, fix="restore it, or score again")

    def look(self) -> None:
        """As ``check``, by sizes and schemas only: no row is read. Raises IntegrityError."""
        manifest.look(self.directory, self.manifest)
        for entry in self.files:
            check_file_schema(self.directory / entry["file"], self.schema)

    def batches(self, columns: list[str] | None = None) -> Iterator[pa.RecordBatch]:
        """All rows in order of (row_id, window), about 260,000 tokens at a time.

        Raises IntegrityError naming a shard that is not the one the manifest lists, whatever was renamed meanwhile.
        """
        for entry in self.files:
            path = self.directory / entry["file"]
            rows, content = rows_per_batch(self.files), entry["content_digest"]
            yield from read_batches(path, columns, rows, content_digest=content, use_threads=True)

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer stored beside the shards, its files checked. Its code, if it came with any, is not run.

        Raises IntegrityError for files that were changed or are missing, ModelError where it cannot be loaded.
        """
        from transformers import AutoTokenizer

        from entrodrop_prep.hub.loading import loading

        folder = self.directory / TOKENIZER
        listed = [e for e in self.manifest["files"] if e["file"].startswith(f"{TOKENIZER}/")]
        if not listed:
            raise IntegrityError("the manifest lists no tokenizer", where=str(self.directory), fix="score again")
        for entry in listed:
            manifest.check_file(self.directory, entry)
        try:
            with loading(str(folder), "tokenizer"):
                loaded: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(str(folder))
        except BaseException as e:
            if type(e) is not Exception:  # the library in Rust raises nothing else
                raise
            raise ModelError(f"cannot load the tokenizer: {e}", where=str(folder), fix="score again") from e
        return loaded

    def _schema(self) -> pa.Schema:
        if not self.files:
            raise IntegrityError("the manifest lists no shard", where=str(self.directory))
        path = self.directory / self.files[0]["file"]
        identity = self.manifest["identity"]
        make = partial(
            scored_schema,
            identity["score_dtype"],
            logprob=identity["logprob"],
            with_id=bool(identity["id_column"]),
        )
        try:
            with reading(path):
                found = pq.read_schema(path)
            core = make().names
            expected = make(kept=[f for f in found if f.name not in core])
            check_schema(found, expected, str(path))
        except UnicodeDecodeError as e:
            raise IntegrityError(
                f"the file is damaged: {e}", where=str(path), fix="remove it and run the command that made it again"
            ) from e
        return expected


def rows_per_batch(files: list[dict[str, Any]]) -> int:
    """Rows that hold about 260,000 tokens, by the rows and tokens that a manifest's entries of ``files`` say."""
    rows, tokens = (sum(e[name] for e in files) for name in ("rows", "tokens"))
    return int(np.clip(BATCH_TOKENS * rows // max(1, tokens), 1, 1 << 16))
