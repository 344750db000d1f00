"""What a masked dataset is made of, for those who write it and those who prove it: rows, order, masks, parts."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from entrodrop_prep.config import MaterializeConfig
from entrodrop_prep.export.epoch import Layout, Part, Piece, Reader, ShardCounts, folder
from entrodrop_prep.export.histogram import EntropyHistogram
from entrodrop_prep.export.order import Order, has_label, payload_bytes, tables_of, trainable_batches
from entrodrop_prep.export.packed import PackedReader, Packer
from entrodrop_prep.export.packing import PackedSize
from entrodrop_prep.export.plan import SOURCE, Corpus, identity_of, mask_plan, survey
from entrodrop_prep.export.sources import Sources
from entrodrop_prep.masking.counter import order_keys
from entrodrop_prep.masking.curriculum import row_rates
from entrodrop_prep.masking.mask import Masked, MaskPlan, apply, unmasked
from entrodrop_prep.store.layout import PLAIN, VALIDATION
from entrodrop_prep.store.rows import Rows, to_rows
from entrodrop_prep.store.schema import masked_schema
from entrodrop_prep.store.scored import ScoredDataset


@dataclass(frozen=True)
class Count:
    """Rows with something to train on, rows without, and the tokens of the former."""

    rows: int
    rows_without_loss: int
    tokens: int


class Job(ABC):
    """One run's rows and masks. ``survey`` comes before all that speaks of rows."""

    def __init__(self, sources: Sources, config: MaterializeConfig, validation: ScoredDataset | None) -> None:
        self.sources, self.config, self.validation = sources, config, validation
        self.validation_count: Count | None = None
        self._packer: Packer | None = None
        self._packed: dict[int, PackedSize] = {}

    @property
    def directories(self) -> list[ScoredDataset]:
        """Every scored directory that is read."""
        return [*(s.scored for s in self.sources.all), *([self.validation] if self.validation else [])]

    @property
    def identity(self) -> dict[str, Any]:
        """What the masked files depend on."""
        if self.sources.named:
            told = {
                s.name: {"scored": s.scored.content_digest, "weight": s.weight, **({"plain": True} if s.plain else {})}
                for s in self.sources.all
            }
            content: dict[str, Any] = {"sources": told}
        else:
            content = {"scored": self.sources.all[0].scored.content_digest, "source": SOURCE}
        if self.validation:
            content[VALIDATION] = self.validation.content_digest
        return identity_of(content, self.config)

    @property
    def schema(self) -> pa.Schema:
        """Of the files that are written."""
        return masked_schema(self.config.add_columns)

    def survey(self, epochs: Iterable[int]) -> None:
        """Read the scores for all that depends on more than one row."""
        every = sorted({*epochs, *([0] if self.config.plain_config else [])})
        self._survey(every)
        if self.config.pack:
            self._packer = Packer(self.order(Path()), self.config.pack)
            self._packed = {e: self._packer.size(e, *self.size(e)) for e in every if self.size(e)[0]}
        if self.validation:
            self.validation_count = count(self.validation)

    def parts(self, epochs: Iterable[int]) -> list[Part]:
        """The folders that ``epochs`` come with, in the order in which the manifest lists them."""
        parts = [Part(folder(e), self.layout(e), e, self._packed.get(e)) for e in epochs]
        if self.config.plain_config:
            parts.append(Part(PLAIN, self.layout(0), None, self._packed.get(0)))
        if self.validation_count:
            found = self.validation_count
            parts.append(Part(VALIDATION, Layout.of(found.rows, found.tokens, self.config.rows_per_shard)))
        return parts

    def reader(self, part: Part, order: Order, shards: list[int]) -> Reader | PackedReader:
        """The files of a part."""
        if part.folder == VALIDATION:
            return self._validation_reader(part, shards)
        epoch = part.epoch
        tables = partial(order.tables, epoch or 0)
        size = self.size(epoch or 0)

        def rates(place: int, n: int) -> NDArray[np.float64]:
            return np.zeros(n) if epoch is None else row_rates(self.config, epoch, place, n, size[0])

        def mask(table: pa.Table, rates: NDArray[np.float64]) -> list[Piece]:
            return self.pieces(table, epoch, rates)

        if self._packer is None:
            return Reader(self.schema, part.layout, shards, tables, rates, mask)
        whole, bins = Layout.of(*size, size[0]), self._packer.plan(epoch or 0, *size)
        return PackedReader(self.schema, part.layout, shards, tables, rates, mask, whole, bins)

    def counts(self, part: Part) -> ShardCounts:
        """Empty figures for a file of a part."""
        return ShardCounts(sources={} if self.sources.named and part.folder != VALIDATION else None)

    def _validation_reader(self, part: Part, shards: list[int]) -> Reader:
        if not self.validation:
            raise ValueError("there are no validation rows")
        batches = trainable_batches(self.validation, ["row_id", "window", "input_ids", "entropy", "loss_mask"])

        def whole(table: pa.Table, rates: NDArray[np.float64]) -> list[Piece]:
            rows = to_rows(table)
            return [Piece(VALIDATION, None, rows, unmasked(rows))]

        return Reader(self.schema, part.layout, shards, partial(tables_of, batches), _no_rates, whole)

    def layout(self, epoch: int) -> Layout:
        """How an epoch's rows fall into files."""
        packed = self._packed.get(epoch)
        rows, tokens = (packed.rows, packed.tokens) if packed else self.size(epoch)
        return Layout.of(rows, tokens, self.config.rows_per_shard, self.config.rows_multiple)

    # For rows that are made one by one, in any order.

    @property
    @abstractmethod
    def rows_identity(self) -> dict[str, Any]:
        """What ``once`` depends on."""

    @abstractmethod
    def once(self) -> Iterator[tuple[Rows, NDArray[np.int32]]]:
        """Every row that any epoch may hold, once, with [R] the number of its source: by (source, row_id, window)."""

    @abstractmethod
    def times(self, rows: pa.RecordBatch, epoch: int) -> NDArray[np.int64]:
        """[R] how often each row of ``once`` stands in ``epoch``, by its ``source``, ``row_id`` and ``window``."""

    @abstractmethod
    def keys(self, rows: pa.RecordBatch, epoch: int) -> NDArray[np.uint64]:
        """[R] sort keys of rows with ``source``, ``repeat``, ``row_id`` and ``window`` in the order of ``epoch``."""

    @abstractmethod
    def masked(self, rows: Rows, source: int, repeat: int, epoch: int, rates: NDArray[np.float64]) -> Masked:
        """Rows of one source, standing in ``epoch`` for the ``repeat``-th time, at drop rates ``rates`` [R]."""

    @property
    def surveyed(self) -> dict[str, Any]:
        """What ``survey`` found, as values that JSON keeps."""
        return {**self._found(), "packed": [[e, asdict(size)] for e, size in self._packed.items()]}

    def recall(self, surveyed: dict[str, Any]) -> None:
        """Take what ``survey`` of an equal job found for its own, but for ``spread``, which stays empty."""
        self._packed = {epoch: PackedSize(**size) for epoch, size in surveyed["packed"]}
        self._recall({name: value for name, value in surveyed.items() if name != "packed"})

    @abstractmethod
    def _found(self) -> dict[str, Any]: ...

    @abstractmethod
    def _recall(self, found: dict[str, Any]) -> None: ...

    def beside(self, part: Part, rows: int, tokens: int) -> dict[str, Any]:
        """What the manifest says of a part that is packed, or cut to a multiple, and holds so many rows and tokens."""
        told: dict[str, Any] = {}
        if self.config.rows_multiple and part.epoch is not None:
            told["rows_left_out"] = part.layout.left_out
        if part.packed:
            told["utilisation"] = tokens / max(1, rows * part.packed.limit)
            told |= {"rows_cut": part.packed.rows_cut, "pieces_left_out": part.packed.pieces_left_out}
        return told

    @property
    @abstractmethod
    def rows_without_loss(self) -> int:
        """Rows with nothing to train on, which are left out of every epoch."""

    @property
    @abstractmethod
    def told_tau(self) -> Any:
        """The thresholds as the manifest has them."""

    @property
    @abstractmethod
    def spread(self) -> EntropyHistogram:
        """How the entropies of the trainable tokens are spread, each row of a masked source taken once."""

    @property
    @abstractmethod
    def sorting_bytes(self) -> int:
        """About how many bytes are held on disk while the rows of an epoch are sorted."""

    @abstractmethod
    def size(self, epoch: int) -> tuple[int, int]:
        """Rows and tokens of an epoch."""

    @abstractmethod
    def order(self, tmp: Path) -> Order:
        """The row order that the recipe asks for."""

    @abstractmethod
    def pieces(self, table: pa.Table, epoch: int | None, rates: NDArray[np.float64]) -> list[Piece]:
        """Rows as they are trained on in ``epoch``; with nothing dropped where it is None."""

    @abstractmethod
    def _survey(self, epochs: list[int]) -> None: ...


class Single(Job):
    """One directory, every row once in every epoch."""

    _corpus: Corpus
    _plan: MaskPlan

    @property
    def _scored(self) -> ScoredDataset:
        return self.sources.all[0].scored

    def _survey(self, epochs: list[int]) -> None:
        self._corpus = survey(self._scored, self.config)
        self._plan = mask_plan(self._scored, self.config, self._corpus)

    @property
    def rows_without_loss(self) -> int:
        return self._corpus.rows_without_loss

    @property
    def told_tau(self) -> Any:
        return json_tau(self._corpus.tau)

    @property
    def spread(self) -> EntropyHistogram:
        return self._corpus.spread

    @property
    def sorting_bytes(self) -> int:
        scores = 2 if self._scored.has_logprob else 1
        return payload_bytes(self._corpus.rows, self._corpus.tokens, scores, self._scored.score_dtype)

    def size(self, epoch: int) -> tuple[int, int]:
        return self._corpus.rows, self._corpus.tokens

    def order(self, tmp: Path) -> Order:
        return Order(
            self._scored,
            shuffle=self.config.shuffle,
            seed=self.config.seed,
            source=self._plan.source,
            tmp=tmp,
            total_bytes=self.sorting_bytes,
        )

    @property
    def rows_identity(self) -> dict[str, Any]:
        return {"scored": self._scored.content_digest, "columns": self._columns}

    @property
    def _columns(self) -> list[str]:
        logprob = ["logprob"] if self.config.keep_surprising is not None else []
        return ["row_id", "window", "input_ids", "entropy", *logprob, "loss_mask"]

    def once(self) -> Iterator[tuple[Rows, NDArray[np.int32]]]:
        for batch in trainable_batches(self._scored, self._columns):
            yield to_rows(batch), np.zeros(batch.num_rows, np.int32)

    def times(self, rows: pa.RecordBatch, epoch: int) -> NDArray[np.int64]:
        return np.ones(rows.num_rows, np.int64)

    def keys(self, rows: pa.RecordBatch, epoch: int) -> NDArray[np.uint64]:
        row_id, window = (rows.column(n).to_numpy() for n in ("row_id", "window"))
        return order_keys(self.config.seed, SOURCE, epoch, row_id, window)

    def masked(self, rows: Rows, source: int, repeat: int, epoch: int, rates: NDArray[np.float64]) -> Masked:
        return apply(rows, self._plan, epoch, rates)

    def _found(self) -> dict[str, Any]:
        return {f.name: getattr(self._corpus, f.name) for f in fields(Corpus) if f.name != "spread"}

    def _recall(self, found: dict[str, Any]) -> None:
        self._corpus = Corpus(**found, spread=EntropyHistogram())
        self._plan = mask_plan(self._scored, self.config, self._corpus)

    def pieces(self, table: pa.Table, epoch: int | None, rates: NDArray[np.float64]) -> list[Piece]:
        rows = to_rows(table)
        return [Piece(SOURCE, None, rows, unmasked(rows) if epoch is None else apply(rows, self._plan, epoch, rates))]


def count(scored: ScoredDataset) -> Count:
    """Count a directory's rows, without its scores."""
    rows = windows = tokens = 0
    for batch in scored.batches(["input_ids", "loss_mask"]):
        lengths = np.diff(batch.column("input_ids").offsets.to_numpy())
        keep = has_label(batch.column("loss_mask"))
        windows += batch.num_rows
        rows += int(keep.sum())
        tokens += int(lengths[keep].sum())
    return Count(rows, windows - rows, tokens)


def json_tau(value: float | None) -> float | str | None:
    """Infinity has no JSON number; a threshold that selects none is told in words."""
    return value if value is None or abs(value) != float("inf") else "selects none"


def _no_rates(place: int, n: int) -> NDArray[np.float64]:
    return np.zeros(n)
