"""What a masked dataset is made of, for those who write it and those who prove it: its identity, parts and tables."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa

from entrodrop_prep.config import MaterializeConfig
from entrodrop_prep.errors import ConfigError
from entrodrop_prep.export.columns import table_of
from entrodrop_prep.export.epoch import Layout, Part, ShardCounts, folder
from entrodrop_prep.export.identity import identity_of
from entrodrop_prep.masking import epoch_rows
from entrodrop_prep.masking.epoch_rows import EpochRows, Spec
from entrodrop_prep.masking.sources import AGAINST, SOURCE, Source, Sources, open_eval, open_sources
from entrodrop_prep.store.layout import PLAIN, VALIDATION
from entrodrop_prep.store.parallel import cores
from entrodrop_prep.store.schema import masked_schema
from entrodrop_prep.store.scored import ScoredDataset


@dataclass
class Job:
    """One run's sources and recipe; ``plan`` and ``open`` come before everything that needs rows."""

    sources: Sources
    config: MaterializeConfig
    validation: Sources | None

    @property
    def eval(self) -> ScoredDataset | None:
        """The scored directory that the validation rows have of their own."""
        return self.validation.all[0].scored if self.validation and self.config.eval is not None else None

    @property
    def directories(self) -> list[ScoredDataset]:
        """Every scored directory that is read."""
        return [*self._read, *(s.against for s in self.sources.all if s.against)]

    @property
    def _read(self) -> list[ScoredDataset]:
        """Those whose rows are written."""
        return [*(s.scored for s in self.sources.all), *([self.eval] if self.eval else [])]

    @property
    def jobs(self) -> int:
        """Threads that work at once."""
        return cores() if self.config.jobs == "auto" else int(self.config.jobs)

    @property
    def identity(self) -> dict[str, Any]:
        """What the masked files depend on."""
        if self.sources.named:
            described = {
                s.name: {
                    "scored": s.scored.content_digest,
                    "weight": s.weight,
                    **({"plain": True} if s.plain else {}),
                    **_against(s),
                }
                for s in self.sources.all
            }
            content: dict[str, Any] = {"sources": described}
        else:
            only = self.sources.all[0]
            content = {"scored": only.scored.content_digest, "source": SOURCE, **_against(only)}
        if self.eval:
            content[VALIDATION] = self.eval.content_digest
        return identity_of(content, self.config)

    @property
    def schema(self) -> pa.Schema:
        """Of the files that are written."""
        return masked_schema(self.config.add_columns)

    @property
    def cache_bytes(self) -> int:
        """About how many bytes the scored rows take on the disk while masked ones are made from them."""
        width = max((s.scored.score_dtype.itemsize for s in self.sources.masked), default=2)
        scores = width * (2 if self.config.needs_logprob else 1) + 4 * bool(self.config.against_scores)
        rows, tokens = (sum(e[n] for d in self._read for e in d.files) for n in ("rows", "tokens"))
        return int(tokens) * (6 + scores) + int(rows) * 24

    def plan(self, epochs: Iterable[int]) -> None:
        """What will be asked for. Raises ConfigError for what cannot be; no row is read."""
        every = sorted({*epochs, *([0] if self.config.plain_config else [])})
        self._specs = {"": Spec.of(self.sources, self.config, every)}
        if self.validation:
            self._specs[VALIDATION] = self.validation_spec(self.validation)

    def validation_spec(self, sources: Sources) -> Spec:
        """What decides the validation rows: whole, in the order of their sources, in one epoch."""
        whole = replace(
            self.config, pack=None, rows_multiple=None, shuffle="none", scope="corpus", keep_surprising=None
        )
        return Spec.of(sources, whole, [0])

    def open(self, directory: Path, *, shared: bool = False) -> None:
        """Read the scored rows, once, into temporary files, and compute what depends on more than one row.

        ``shared``: what another process wrote there, whole, is used.
        """
        for name, spec in self._specs.items():
            if not (shared and epoch_rows.is_written(directory / name, spec)):
                epoch_rows.write(directory / name, spec, lasting=shared, jobs=self.jobs)
        opened = {name: EpochRows(spec, directory / name) for name, spec in self._specs.items()}
        self.rows, self.validation_rows = opened[""], opened.get(VALIDATION)

    def parts(self, epochs: Iterable[int]) -> list[Part]:
        """The folders that ``epochs`` come with, in the order in which the manifest lists them."""
        packed = self.rows.packed
        parts = [Part(folder(e), self.layout(e), e, packed.get(e)) for e in epochs]
        if self.config.plain_config:
            parts.append(Part(PLAIN, self.layout(0), None, packed.get(0)))
        if self.validation_rows:
            parts.append(Part(VALIDATION, Layout.of(*self.validation_rows.size(0), self.config.rows_per_shard)))
        return parts

    def layout(self, epoch: int) -> Layout:
        """How an epoch's rows fall into files."""
        return layout_of(self.rows, epoch)

    def tables(self, part: Part, shard: int, counts: ShardCounts, every: int = 1) -> Iterator[pa.Table]:
        """The row groups of a file, or one of ``every`` so many; ``counts`` is filled on the way."""
        rows = self.rows if part.folder != VALIDATION or not self.validation_rows else self.validation_rows
        epoch, names = rows.epoch(part.epoch), [s.name for s in rows.sources.all]
        for positions in itertools.islice(part.layout.groups(shard), every // 2, None, every):
            made = epoch[positions]
            counts.add(made, names, packed=part.packed is not None)
            yield table_of(made.stored, self.schema)

    def counts(self, part: Part) -> ShardCounts:
        """Empty figures for a file of a part."""
        return ShardCounts(sources={} if self.sources.named and part.folder != VALIDATION else None)

    def beside(self, part: Part, rows: int, tokens: int) -> dict[str, Any]:
        """What the manifest says of a part that is packed, or cut to a multiple, and holds so many rows and tokens."""
        described: dict[str, Any] = {}
        if self.config.rows_multiple and part.epoch is not None:
            described["rows_left_out"] = part.layout.left_out
        if part.packed:
            described["utilisation"] = tokens / max(1, rows * part.packed.limit)
            described |= {"rows_cut": part.packed.rows_cut, "pieces_left_out": part.packed.pieces_left_out}
        return described


def _against(source: Source) -> dict[str, str]:
    return {AGAINST: source.against.content_digest} if source.against else {}


def layout_of(rows: EpochRows, epoch: int) -> Layout:
    """How an epoch's rows fall into files."""
    packed = rows.packed.get(epoch)
    size = (packed.rows, packed.tokens) if packed else rows.size(epoch)
    return Layout.of(*size, rows.config.rows_per_shard, rows.config.rows_multiple)


def open_job(config: MaterializeConfig) -> Job:
    """Open the scored directories that ``config`` names. Raises ConfigError for what does not go together."""
    sources = open_sources(config)
    return Job(sources, config, open_eval(config, sources))


def no_rows(config: MaterializeConfig, held_out: bool) -> ConfigError | None:
    """The error of a split that leaves no row to train on, or none that is ``held_out``; None without a split."""
    if config.eval_fraction is None:
        return None
    return ConfigError(
        f"--eval-fraction {config.eval_fraction:g} {'holds no row out' if held_out else 'leaves no row to train on'} "
        f"with --seed {config.seed}, of those that have anything to train on",
        fix=f"give a {'larger' if held_out else 'smaller'} one",
    )
