"""Rows of several sources in one epoch: how often each stands, its place, its threshold, its masks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from entrodrop_prep.errors import ConfigError
from entrodrop_prep.export.epoch import Piece
from entrodrop_prep.export.histogram import EntropyHistogram
from entrodrop_prep.export.job import Job, json_tau
from entrodrop_prep.export.order import Order, has_label, payload_bytes
from entrodrop_prep.export.plan import drop_token_id, protected_ids, replacements
from entrodrop_prep.export.sources import Source
from entrodrop_prep.masking.counter import CHOOSE, order_keys, rate_limit, stream_key, token_words
from entrodrop_prep.masking.mask import Masked, MaskPlan, apply, unmasked
from entrodrop_prep.masking.quantile import group_thresholds, quantile_of
from entrodrop_prep.store.rows import Rows, stored_scores, to_rows

MAX_VALUES = 1000
"""Values of a column that may have thresholds of their own."""
_LOW = 0xFFFFFFFF
_CORE = ["row_id", "window", "input_ids", "loss_mask"]


@dataclass
class _Counts:
    """What one pass over the rows tells of the mixture; rows and tokens are those of each epoch asked for."""

    rows: dict[int, int]
    tokens: dict[int, int]
    rows_without_loss: int = 0
    values: dict[Any, int] = field(default_factory=dict)
    """Value of the scope's column -> its place among the thresholds."""
    kind: str | None = None
    """The column's type."""
    spread: EntropyHistogram = field(default_factory=EntropyHistogram)


class Mixture(Job):
    """Several sources, or one whose thresholds are those of a column's values."""

    _counted: _Counts
    _taus: NDArray[np.float64] | None

    # What is read.

    @cached_property
    def _dtype(self) -> np.dtype[Any]:
        """Of all scores: float32 holds every float16 exactly."""
        return np.result_type(*(s.scored.score_dtype for s in self.sources.masked))

    @cached_property
    def _with_logprob(self) -> bool:
        return self.config.keep_surprising is not None

    @cached_property
    def _column(self) -> str | None:
        """The column whose values have thresholds."""
        return self.config.scope_column if self.config.select != "random" else None

    @cached_property
    def sorted_schema(self) -> pa.Schema:
        """Of the rows that are put in order."""
        scores = pa.list_(pa.field("element", pa.from_numpy_dtype(self._dtype)))
        lists = {n: self.sources.all[0].scored.schema.field(n) for n in ("input_ids", "loss_mask")}
        return pa.schema(
            [
                pa.field("source", pa.int32()),
                pa.field("repeat", pa.int32()),
                *([pa.field("group", pa.int32())] if self._column else []),
                pa.field("row_id", pa.int64()),
                pa.field("window", pa.int32()),
                lists["input_ids"],
                pa.field("entropy", scores),
                *([pa.field("logprob", scores)] if self._with_logprob else []),
                lists["loss_mask"],
            ]
        )

    @cached_property
    def rows_per_batch(self) -> int:
        """Rows that hold about 260,000 tokens or less, whichever source they are of."""
        return min(s.scored.rows_per_batch for s in self.sources.all)

    def batches(self, epoch: int) -> Iterator[pa.RecordBatch]:
        """The rows of an epoch, by (source, row_id, window, repeat)."""
        for index, batch in self._read():
            times = self._times(self.sources.all[index], batch, epoch) * has_label(batch.column("loss_mask"))
            picked = np.repeat(np.arange(len(times)), times)
            repeat = np.arange(len(picked)) - np.repeat(np.cumsum(times) - times, times)
            for first in range(0, len(picked), max(1, len(times))):
                some = slice(first, first + max(1, len(times)))
                yield self._taken(index, batch.take(pa.array(picked[some])), repeat[some])

    def _read(self) -> Iterator[tuple[int, pa.RecordBatch]]:
        """The stored rows of each source in turn, with its number."""
        for index, source in enumerate(self.sources.all):
            masks = not source.plain
            columns = [
                *_CORE,
                *(["entropy"] if masks else []),
                *(["logprob"] if masks and self._with_logprob else []),
                *([self._column] if masks and self._column else []),
            ]
            for batch in source.scored.batches(columns):
                yield index, batch

    def _taken(self, index: int, batch: pa.RecordBatch, repeat: NDArray[np.int64]) -> pa.RecordBatch:
        """Rows of source ``index`` with the columns of ``sorted_schema``."""
        source, n = self.sources.all[index], batch.num_rows
        made: dict[str, pa.Array] = {
            "source": pa.array(np.full(n, index, np.int32)),
            "repeat": pa.array(repeat.astype(np.int32)),
        }
        if self._column:
            made["group"] = pa.array(np.zeros(n, np.int32) if source.plain else self._groups(batch))
        made["entropy"] = self._scores(batch, None if source.plain else "entropy")
        if self._with_logprob:
            made["logprob"] = self._scores(batch, None if source.plain else "logprob")
        arrays = [made[name] if name in made else batch.column(name) for name in self.sorted_schema.names]
        return pa.RecordBatch.from_arrays(arrays, schema=self.sorted_schema)

    def _scores(self, batch: pa.RecordBatch, name: str | None) -> pa.Array:
        """A column of scores in the common type; all null for rows that are never masked."""
        offsets = batch.column("input_ids").offsets
        first, tokens = offsets[0].as_py(), len(batch.column("input_ids").flatten())
        values = (
            np.full(tokens, np.nan, self._dtype) if name is None else stored_scores(batch, name).astype(self._dtype)
        )
        return pa.ListArray.from_arrays(
            pc.subtract(offsets, first),
            pa.array(values, mask=np.isnan(values)),
            type=self.sorted_schema.field("entropy").type,
        )

    def _times(self, source: Source, batch: pa.RecordBatch, epoch: int) -> NDArray[np.int64]:
        """[R] how often each row stands in an epoch."""
        times = np.full(batch.num_rows, source.times, np.int64)
        if source.share:
            where = batch.column("row_id").to_numpy(), batch.column("window").to_numpy(), np.ones(len(times), np.int64)
            words = token_words(stream_key(self.config.seed, CHOOSE, source.name), *where, epoch)
            times += words < rate_limit(np.array([source.share]))
        return times

    def _groups(self, batch: pa.RecordBatch) -> NDArray[np.int32]:
        """[R] the place of each row's value of the column among the thresholds."""
        coded = batch.column(self._column).dictionary_encode(null_encoding="encode")
        places = np.array([self._counted.values[v] for v in coded.dictionary.to_pylist()] or [0], np.int32)
        found: NDArray[np.int32] = places[coded.indices.to_numpy()]
        return found

    # What depends on more than one row.

    def _survey(self, epochs: list[int]) -> None:
        self._counted = _Counts(dict.fromkeys(epochs, 0), dict.fromkeys(epochs, 0))
        for source in self.sources.all:
            column = None if source.plain else self._column
            score = [] if source.plain else ["entropy"]
            for batch in source.scored.batches([*_CORE, *score, *([column] if column else [])]):
                if not source.plain:
                    rows = to_rows(batch)
                    self._counted.spread.add(rows.entropy[rows.trainable])
                keep = has_label(batch.column("loss_mask"))
                self._counted.rows_without_loss += int((~keep).sum())
                lengths = np.diff(batch.column("input_ids").offsets.to_numpy())
                for epoch in epochs if source.share else epochs[:1]:
                    times = self._times(source, batch, epoch) * keep
                    for e in [epoch] if source.share else epochs:
                        self._counted.rows[e] += int(times.sum())
                        self._counted.tokens[e] += int((times * lengths).sum())
                if column:
                    self._add_values(source, batch.column(column).filter(pa.array(keep)))
        self._taus = self._thresholds()
        _ = self._plans  # raises for what cannot be protected or dropped to, before anything is written

    def _add_values(self, source: Source, column: pa.Array) -> None:
        """Give every new value of the scope's column a place."""
        kind = column.type
        wide = {"integer": pa.types.is_integer(kind), "bool": pa.types.is_boolean(kind), "text": _is_text(kind)}
        told = next((name for name, holds in wide.items() if holds), "")
        before = self._counted.kind
        if not told or before not in (None, told):
            raise ConfigError(
                f"--scope column:{self._column}: it is {kind}" + (f", elsewhere {before}" if told else ""),
                where=str(source.scored.directory),
                fix="give a column of text, whole numbers or booleans, of one type in all sources",
            )
        self._counted.kind = told
        values = self._counted.values
        for value in column.unique().to_pylist():
            values.setdefault(value, len(values))
        if len(values) > MAX_VALUES:
            raise ConfigError(
                f"--scope column:{self._column} has more than {MAX_VALUES:,} values",
                where=str(source.scored.directory),
                fix="give a column with fewer",
            )

    def _thresholds(self) -> NDArray[np.float64] | None:
        """Of the corpus, of each masked source, or of each value; None where the recipe needs none."""
        recipe, masked = self.config, self.sources.masked
        if recipe.threshold is not None or recipe.select == "random" or recipe.scope == "row":
            return None
        groups = {"corpus": 1, "source": len(masked)}.get(recipe.scope, len(self._counted.values))

        def chunks() -> Iterator[tuple[NDArray[Any], NDArray[Any]]]:
            for index, source in enumerate(masked):
                extra = ["entropy", *([self._column] if self._column else [])]
                for batch in source.scored.batches([*_CORE, *extra]):
                    batch = batch.filter(pa.array(has_label(batch.column("loss_mask"))))
                    rows = to_rows(batch)
                    if self._column:
                        group = np.repeat(self._groups(batch), rows.lengths)[rows.trainable]
                    else:
                        group = np.full(int(rows.trainable.sum()), index if groups > 1 else 0)
                    yield rows.entropy[rows.trainable].astype(self._dtype), group

        return group_thresholds(chunks, self._dtype, groups, quantile_of(recipe), high=recipe.select == "high-entropy")

    @cached_property
    def _plans(self) -> dict[tuple[int, int], MaskPlan]:
        """Of each (source, repeat); none of plain sources."""
        recipe, masked = self.config, self.sources.masked
        unigram = np.sum([s.scored.unigram for s in masked], axis=0)
        one = masked[0].scored
        protected, draws = protected_ids(one, recipe.protect), replacements(one, recipe, unigram)
        replacement = drop_token_id(one, recipe, unigram)
        plans = {}
        for index, source in enumerate(self.sources.all):
            for repeat in range(0 if source.plain else source.times + bool(source.share)):
                plans[index, repeat] = MaskPlan(
                    recipe=recipe,
                    source=source.key_name(repeat),
                    tau=self._tau_of(source),
                    protected=protected,
                    unigram=draws,
                    drop_token_id=replacement,
                    taus=self._taus if self._column else None,
                )
        return plans

    def _tau_of(self, source: Source) -> float | None:
        """The one threshold of a masked source, if it has one."""
        if self.config.threshold is not None:
            return self.config.threshold
        if self._taus is None or self._column:
            return None
        return float(self._taus[self.sources.masked.index(source) if self.config.scope == "source" else 0])

    # What is told and made of it.

    @property
    def rows_without_loss(self) -> int:
        return self._counted.rows_without_loss

    @property
    def told_tau(self) -> Any:
        if self._taus is None:
            return self.config.threshold
        told = [json_tau(float(t)) for t in self._taus]
        if self._column:
            return {"column": self._column, "values": [[v, told[i]] for v, i in self._counted.values.items()]}
        if self.config.scope == "source":
            return {s.name: t for s, t in zip(self.sources.masked, told, strict=True)}
        return told[0]

    @property
    def spread(self) -> EntropyHistogram:
        return self._counted.spread

    @property
    def sorting_bytes(self) -> int:
        scores = 2 if self._with_logprob else 1
        rows, tokens = max(self._counted.rows.values()), max(self._counted.tokens.values())
        return payload_bytes(rows, tokens, scores, self._dtype)

    def size(self, epoch: int) -> tuple[int, int]:
        return self._counted.rows[epoch], self._counted.tokens[epoch]

    def order(self, tmp: Path) -> Order:
        return MixedOrder(self, tmp)

    @property
    def rows_identity(self) -> dict[str, Any]:
        told = [[s.scored.content_digest, None if s.plain else "entropy"] for s in self.sources.all]
        return {"sources": told, "logprob": self._with_logprob, "group": self._column}

    def once(self) -> Iterator[tuple[Rows, NDArray[np.int32]]]:
        for index, batch in self._read():
            batch = batch.filter(pa.array(has_label(batch.column("loss_mask"))))
            taken = self._taken(index, batch, np.zeros(batch.num_rows, np.int64))
            rows, source = to_rows(taken), taken.column("source").to_numpy()
            yield replace(rows, group=taken.column("group").to_numpy()) if self._column else rows, source

    def times(self, rows: pa.RecordBatch, epoch: int) -> NDArray[np.int64]:
        source = rows.column("source").to_numpy()
        times = np.empty(len(source), np.int64)
        for index, one in enumerate(self.sources.all):
            first, stop = np.searchsorted(source, [index, index + 1]).tolist()
            times[first:stop] = self._times(one, rows.slice(first, stop - first), epoch)
        return times

    def keys(self, rows: pa.RecordBatch, epoch: int) -> NDArray[np.uint64]:
        source, repeat, row_id, window = (rows.column(n).to_numpy() for n in ("source", "repeat", "row_id", "window"))
        keys = np.empty(len(row_id), np.uint64)
        part = source.astype(np.int64) << 32 | repeat
        for one in np.unique(part).tolist():
            name = self.sources.all[one >> 32].key_name(one & _LOW)
            some = part == one
            keys[some] = order_keys(self.config.seed, name, epoch, row_id[some], window[some])
        return keys

    def masked(self, rows: Rows, source: int, repeat: int, epoch: int, rates: NDArray[np.float64]) -> Masked:
        if self.sources.all[source].plain:
            return unmasked(rows)
        return apply(rows, self._plans[source, repeat], epoch, rates)

    def _found(self) -> dict[str, Any]:
        counted = self._counted
        return {
            "rows": list(counted.rows.items()),
            "tokens": list(counted.tokens.items()),
            "rows_without_loss": counted.rows_without_loss,
            "values": list(counted.values),
            "kind": counted.kind,
            "taus": None if self._taus is None else self._taus.tolist(),
        }

    def _recall(self, found: dict[str, Any]) -> None:
        values = {value: place for place, value in enumerate(found["values"])}
        rows, tokens = dict(found["rows"]), dict(found["tokens"])
        self._counted = _Counts(rows, tokens, found["rows_without_loss"], values, found["kind"])
        self._taus = None if found["taus"] is None else np.array(found["taus"], np.float64)
        _ = self._plans

    def pieces(self, table: pa.Table, epoch: int | None, rates: NDArray[np.float64]) -> list[Piece]:
        table = table.combine_chunks()
        source, repeat = (table.column(n).to_numpy() for n in ("source", "repeat"))
        part = source.astype(np.int64) << 32 | repeat
        found = np.unique(part)
        result = []
        for one in found.tolist():
            places = np.flatnonzero(part == one)
            some = table if len(found) == 1 else table.take(pa.array(places))
            rows = to_rows(some)
            if self._column:
                rows = replace(rows, group=some.column("group").to_numpy())
            index = one >> 32
            masked = unmasked(rows) if epoch is None else self.masked(rows, index, one & _LOW, epoch, rates[places])
            result.append(Piece(self.sources.all[index].name, places, rows, masked))
        return result


class MixedOrder(Order):
    """The rows of one epoch of a mixture, by (key, source, row_id, window, repeat)."""

    ties = ("source", "row_id", "window", "repeat")

    def __init__(self, mixture: Mixture, tmp: Path) -> None:
        config = mixture.config
        super().__init__(
            mixture.sources.all[0].scored,
            shuffle=config.shuffle,
            seed=config.seed,
            source="",
            tmp=tmp,
            total_bytes=mixture.sorting_bytes,
        )
        self._mixture = mixture

    @property
    def rows_per_batch(self) -> int:
        return self._mixture.rows_per_batch

    @property
    def varies(self) -> bool:
        return any(s.share for s in self._mixture.sources.all)

    def schema(self) -> pa.Schema:
        return self._mixture.sorted_schema

    def batches(self, epoch: int) -> Iterator[pa.RecordBatch]:
        return self._mixture.batches(epoch)

    def keys(self, batch: pa.RecordBatch, epoch: int) -> NDArray[np.uint64]:
        return self._mixture.keys(batch, epoch)


def _is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))
