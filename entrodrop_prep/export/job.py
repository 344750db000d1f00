"""What a masked dataset is made of, for those who write it and those who prove it: rows, order, masks, parts."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from entrodrop_prep.config import MaterializeConfig
from entrodrop_prep.export.epoch import PLAIN, VALIDATION, Layout, Part, Piece, Reader, ShardCounts, folder
from entrodrop_prep.export.order import Order, has_label, payload_bytes, tables_of, trainable_batches
from entrodrop_prep.export.plan import SOURCE, Corpus, identity_of, mask_plan, open_share, survey
from entrodrop_prep.export.sources import Sources
from entrodrop_prep.sample.curriculum import row_rates
from entrodrop_prep.sample.mask import MaskPlan, apply, unmasked
from entrodrop_prep.scored import ScoredDataset, to_rows


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

    def survey(self, epochs: Iterable[int]) -> None:
        """Read the scores for all that depends on more than one row."""
        self._survey(sorted({*epochs, *([0] if self.config.plain_config else [])}))
        if self.validation:
            self.validation_count = count(self.validation)

    def parts(self, epochs: Iterable[int]) -> list[Part]:
        """The folders that ``epochs`` come with, in the order in which the manifest lists them."""
        parts = [Part(folder(e), self.layout(e), e) for e in epochs]
        if self.config.plain_config:
            parts.append(Part(PLAIN, self.layout(0)))
        if self.validation_count:
            found = self.validation_count
            parts.append(Part(VALIDATION, Layout.of(found.rows, found.tokens, self.config.rows_per_shard)))
        return parts

    def reader(self, part: Part, order: Order, shards: list[int]) -> Reader:
        """The files of a part."""
        if part.folder == VALIDATION:
            return self._validation_reader(part, shards)
        epoch = part.epoch
        tables = partial(order.tables, epoch or 0)
        if epoch is None:
            return Reader(part.layout, shards, tables, _no_rates, lambda table, rates: self.pieces(table, None, rates))
        return Reader(
            part.layout,
            shards,
            tables,
            lambda place, n: row_rates(self.config, epoch, place, n, part.layout.rows),
            lambda table, rates: self.pieces(table, epoch, rates),
        )

    def counts(self, part: Part) -> ShardCounts:
        """Empty figures for a file of a part."""
        return ShardCounts(sources={} if self.sources.named and part.folder != VALIDATION else None)

    def _validation_reader(self, part: Part, shards: list[int]) -> Reader:
        if not self.validation:
            raise ValueError("there are no validation rows")
        score = self.validation.score_columns[0]
        batches = trainable_batches(self.validation, ["row_id", "window", "input_ids", score, "loss_mask"])

        def whole(table: pa.Table, rates: NDArray[np.float64]) -> list[Piece]:
            rows = to_rows(table, score)
            return [Piece(VALIDATION, None, rows, unmasked(rows))]

        return Reader(part.layout, shards, partial(tables_of, batches), _no_rates, whole)

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
    def open_share(self) -> float | None:
        """See ``plan.open_share``."""

    @property
    @abstractmethod
    def sorting_bytes(self) -> int:
        """About how many bytes are held on disk while the rows of an epoch are sorted."""

    @abstractmethod
    def layout(self, epoch: int) -> Layout:
        """How an epoch's rows fall into files."""

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
    def open_share(self) -> float | None:
        return open_share(self._scored, self._plan)

    @property
    def sorting_bytes(self) -> int:
        return payload_bytes(self._scored, self._corpus.tokens)

    def layout(self, epoch: int) -> Layout:
        return Layout.of(self._corpus.rows, self._corpus.tokens, self.config.rows_per_shard)

    def order(self, tmp: Path) -> Order:
        return Order(
            self._scored,
            shuffle=self.config.shuffle,
            seed=self.config.seed,
            source=self._plan.source,
            tmp=tmp,
            total_bytes=self.sorting_bytes,
        )

    def pieces(self, table: pa.Table, epoch: int | None, rates: NDArray[np.float64]) -> list[Piece]:
        rows = to_rows(table, self._scored.score)
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
