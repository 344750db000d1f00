"""The masked rows of any epoch, by position: the one engine behind files, their proof, the loader and the demo."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from entrodrop_prep import __version__
from entrodrop_prep.config import MaterializeConfig, identity
from entrodrop_prep.masking.arrays import NAME, Arrays, stored, write_arrays
from entrodrop_prep.masking.assembly import MaskedColumns, Packed, SegmentBatch, assemble, hold
from entrodrop_prep.masking.columns import Columns, taken, write_columns
from entrodrop_prep.masking.curriculum import rates_at
from entrodrop_prep.masking.mask import Masked, apply, eligible_tokens, unmasked
from entrodrop_prep.masking.order import Order, bins_of, cut_rows, order_of, order_varies, size_of
from entrodrop_prep.masking.packing import Bins, PackedSize
from entrodrop_prep.masking.plan import Tokens, mask_plans, threshold_summary, thresholds
from entrodrop_prep.masking.sources import Sources
from entrodrop_prep.store import digest
from entrodrop_prep.store.parallel import in_order
from entrodrop_prep.store.rows import Rows

T = TypeVar("T")

_FORMAT = 2
"""Of the files; those of 0.1.0 had none."""
_KEPT = 2
"""Epochs whose order is kept: a batch may hold the end of one and the start of the next."""


@dataclass(frozen=True)
class Made:
    """Rows as they are stored, and what masking did to them."""

    stored: MaskedColumns
    rates: tuple[float, float]
    """Lowest and highest drop rate among them."""
    counts: list[tuple[int, int, list[int]]]
    """Of each source among them: its number, its documents, and their ``assembly.FIGURES``."""


@dataclass(frozen=True)
class Spec:
    """What decides the rows: sources, a recipe, the epochs that will be asked for."""

    sources: Sources
    config: MaterializeConfig
    epochs: tuple[int, ...]
    tokens: Tokens

    @classmethod
    def of(cls, sources: Sources, config: MaterializeConfig, epochs: Iterable[int]) -> Spec:
        """Raises ConfigError for a token that cannot be protected or dropped to."""
        return cls(sources, config, tuple(epochs), Tokens.of(sources, config))

    @property
    def column(self) -> str | None:
        """The column whose values have thresholds."""
        return self.config.scope_column if self.config.selection.score is not None else None

    @property
    def columns_name(self) -> str:
        """A name for the columns that the rows are made from."""
        read = [
            [
                *(s.scored.content_digest, s.plain),
                *([s.against.content_digest] if s.against else []),
                *([s.name, asdict(s.split)] if s.split else []),
            ]
            for s in self.sources.all
        ]
        return digest.of_json([_FORMAT, read, self.column, self.config.needs_logprob])[:32]

    @property
    def survey_name(self) -> str:
        """A name for what depends on the recipe."""
        weights = [[s.name, s.weight] for s in self.sources.all]
        settings = [__version__, weights, identity(self.config), self.config.epochs, self.epochs]
        return f"survey-{digest.of_json(settings)[:32]}"


class EpochRows:
    """The masked rows of all epochs of a recipe: ``rows.epoch(e)[positions]``.

    What is read of the scored directories is in a folder of files, see ``masking.columns``. Threads may share it.
    """

    def __init__(self, spec: Spec, directory: Path) -> None:
        """Open what ``write`` wrote. Raises IntegrityError where it is not there, or damaged."""
        self.sources, self.config = spec.sources, spec.config
        self.columns = Columns(directory)
        self._flags = Arrays(directory / spec.survey_name)
        facts = self._flags.facts
        self._taus = None if facts["taus"] is None else np.array(facts["taus"], np.float64)
        self._sizes = {epoch: (rows, tokens) for epoch, rows, tokens in facts["sizes"]}
        self.packed = {epoch: PackedSize(**size) for epoch, size in facts["packed"]}
        """Of each epoch, where rows are packed."""
        self._plans = mask_plans(self.sources, self.config, spec.tokens, self._taus)
        self._orders: dict[int, Order] = {}
        self._bins: dict[int, Bins] = {}
        self._lock = threading.RLock()

    @property
    def rows_without_loss(self) -> int:
        """Rows with nothing to train on, which are left out of every epoch."""
        return int(self.columns.facts["rows_without_loss"])

    @property
    def threshold_summary(self) -> Any:
        """The thresholds as the manifest has them."""
        return threshold_summary(self.sources, self.config, self._taus, self.columns.facts["values"])

    def size(self, epoch: int) -> tuple[int, int]:
        """Rows and tokens of an epoch, before they are packed."""
        return self._sizes[epoch]

    def epoch(self, number: int | None) -> Epoch:
        """The rows of an epoch; for None those of epoch 0 with nothing dropped."""
        return Epoch(self, number)

    def order(self, epoch: int) -> Order:
        """The order of an epoch, before its rows are packed."""
        varies = order_varies(self.sources, self.config)
        return self._kept(
            self._orders, epoch if varies else 0, lambda e: order_of(self.sources, self.config, self.columns, e)
        )

    def bins(self, epoch: int) -> Bins:
        """What is in each packed row of an epoch."""
        limit = self.config.pack or 0
        return self._kept(self._bins, epoch, lambda e: bins_of(self.columns, limit, self.order(e), self.size(e)))

    def masked(
        self, epoch: int | None, positions: NDArray[np.int64]
    ) -> Iterator[tuple[NDArray[np.int64], Rows, Masked, NDArray[np.float64], int]]:
        """``(which of positions, their rows, as trained on, their rates, their source)`` at positions of the order.

        Those of one source and repeat come together. Nothing else makes masks.
        """
        order = self.order(epoch or 0)
        rates = np.zeros(len(positions))
        if epoch is not None:
            rates = rates_at(self.config, epoch, positions, len(order.index))
        index = order.index[positions]
        part = self.columns.arrays["source"][index].astype(np.int64) << 32
        if order.repeat is not None:
            part |= order.repeat[positions]
        found = [int(part[0])] if len(part) and (part == part[0]).all() else np.unique(part).tolist()
        for one in found:
            some = np.arange(len(part)) if len(found) == 1 else np.flatnonzero(part == one)
            rows = self.columns.take(index[some], self._flags)
            if epoch is None or self.sources.all[one >> 32].plain:
                made = unmasked(rows)
            else:
                made = apply(rows, self._plans[one >> 32, one & 0xFFFFFFFF], epoch, rates[some])
            yield some, rows, made, rates[some], one >> 32

    def _kept(self, made: dict[int, T], epoch: int, make: Callable[[int], T]) -> T:
        """What was made for an epoch, or is made now; that of the epoch made first goes."""
        with self._lock:
            if epoch not in made:
                if len(made) == _KEPT:
                    del made[next(iter(made))]
                made[epoch] = make(epoch)
            return made[epoch]


class Epoch:
    """The rows of one epoch by position, from 0, as they are stored: packed where the recipe says so."""

    def __init__(self, rows: EpochRows, number: int | None) -> None:
        self._rows, self._number = rows, number

    def __len__(self) -> int:
        packed = self._rows.packed.get(self._number or 0)
        return packed.rows if packed else self._rows.size(self._number or 0)[0]

    def __getitem__(self, positions: slice | NDArray[np.int64]) -> Made:
        """The rows at ``positions`` [n], or of a range, in their order."""
        positions = np.arange(*positions.indices(len(self))) if isinstance(positions, slice) else positions
        return self._packed(positions) if self._rows.config.pack else self._whole(positions)

    def _whole(self, positions: NDArray[np.int64]) -> Made:
        parts = list(self._rows.masked(self._number, positions))
        wants = "n_trainable" in self._rows.config.add_columns
        ids = _joined([m.input_ids for _, _, m, _, _ in parts], np.int32)
        labels = _joined([m.labels for _, _, m, _, _ in parts], np.int32)
        lengths = _joined([r.lengths for _, r, _, _, _ in parts], np.int64)
        trainable = _joined([m.trainable for _, _, m, _, _ in parts] if wants else [], np.int64)
        if len(parts) > 1:
            back = np.argsort(np.concatenate([some for some, *_ in parts]))
            starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
            ids, labels = taken(ids, starts, back), taken(labels, starts, back)
            lengths, trainable = lengths[back], trainable[back] if wants else trainable
        offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
        documents = np.arange(len(positions) + 1)
        counts: dict[int, list[list[int]]] = {}
        for _, rows, made, _, source in parts:
            counts.setdefault(source, []).append([len(rows.row_id), *made.figures])
        rates = np.concatenate([r for _, _, _, r, _ in parts]) if parts else np.ones(1)
        return Made(
            MaskedColumns(offsets, ids, labels, trainable, lengths, documents),
            (float(rates.min()), float(rates.max())),
            [(source, (total := np.sum(c, axis=0).tolist())[0], total[1:]) for source, c in counts.items()],
        )

    def _packed(self, positions: NDArray[np.int64]) -> Made:
        bins = self._rows.bins(self._number or 0)
        ends = zip(bins.offsets[positions].tolist(), bins.offsets[positions + 1].tolist(), strict=True)
        segments = bins.segments[np.concatenate([np.arange(a, b) for a, b in ends])]
        whole = np.unique(segments.position)
        held = []
        for some, rows, masked, rates, source in self._rows.masked(self._number, whole):
            number = np.full(len(whole), -1)
            number[some] = np.arange(len(some))
            row = number[np.searchsorted(whole, segments.position)]
            mine = row >= 0
            held.append(hold(rows, masked, rates, source, row[mine], segments[mine]))
        together = SegmentBatch.joined(held, len(segments), int(segments.lengths.sum()))
        runs = np.split(positions, np.flatnonzero(np.diff(positions) != 1) + 1)
        return _made(Packed.joined([assemble(together, bins, int(run[0]), int(run[-1]) + 1) for run in runs]))


def _made(packed: Packed) -> Made:
    numbers = np.unique(packed.source).tolist()
    figures = {n: packed.figures[packed.source == n] for n in numbers}
    rates = (float(packed.rates.min()), float(packed.rates.max()))
    return Made(packed.stored, rates, [(n, len(f), f.sum(axis=0).tolist()) for n, f in figures.items()])


def _joined(arrays: list[NDArray[Any]], kind: Any) -> NDArray[Any]:
    return arrays[0] if len(arrays) == 1 else np.concatenate([np.empty(0, kind), *arrays])


# What is written once.


def has_columns(directory: Path) -> bool:
    """Whether the scored rows were read. Raises IntegrityError where they are damaged."""
    return stored(directory / NAME) is not None


def is_written(directory: Path, spec: Spec) -> bool:
    """Whether ``EpochRows`` finds what it needs. Raises IntegrityError where it is damaged."""
    return has_columns(directory) and stored(directory / spec.survey_name / NAME) is not None


def write(directory: Path, spec: Spec, *, lasting: bool, jobs: int) -> None:
    """Write what ``EpochRows`` opens, as far as it is missing: the columns, and in a folder what the recipe gives.

    Args:
        directory: made if it is not there.
        spec: its sources are read where the columns are missing.
        lasting: see ``arrays.write_arrays``.
        jobs: threads.

    Raises EntrodropError for scores that are damaged, and for what cannot be in the recipe.
    """
    sources, config = spec.sources, spec.config
    if not has_columns(directory):
        how = {"logprob": config.needs_logprob, "unigram": spec.tokens.unigram is not None}
        write_columns(directory, sources, column=spec.column, **how, lasting=lasting, jobs=jobs)
    columns = Columns(directory)
    taus = thresholds(sources, config, columns, jobs)
    plans = mask_plans(sources, config, spec.tokens, taus)

    def flags(span: tuple[int, int]) -> dict[str, NDArray[Any]]:
        rows, source = columns.span(*span), int(columns.arrays["source"][span[0]])
        marks = rows.trainable.view(np.uint8)
        if not sources.all[source].plain:
            marks = marks + 2 * eligible_tokens(rows, plans[source, 0]).view(np.uint8)
        return {"flags": marks}

    sizes, packed = [], []
    for epoch in spec.epochs:
        sizes.append([epoch, *(size := size_of(sources, config, columns, epoch))])
        if config.pack and size[0]:
            order = order_of(sources, config, columns, epoch)
            bins, (rows_cut, pieces) = bins_of(columns, config.pack, order, size), cut_rows(columns, config.pack, order)
            settings = PackedSize(config.pack, len(bins), bins.tokens(), rows_cut, pieces - len(bins.segments))
            packed.append([epoch, asdict(settings)])
    facts = {"taus": None if taus is None else taus.tolist(), "sizes": sizes, "packed": packed}
    write_arrays(directory / spec.survey_name, in_order(flags, columns.chunks(), jobs), facts, lasting=lasting)
    columns.arrays.release()
