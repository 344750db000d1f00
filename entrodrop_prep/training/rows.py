"""Masked rows by their position, made when they are asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from entrodrop_prep.config import RECIPE_FIELDS, MaterializeConfig, settings
from entrodrop_prep.errors import ConfigError, IntegrityError, SourceError
from entrodrop_prep.export.identity import config_of
from entrodrop_prep.export.job import layout_of, no_rows, open_job
from entrodrop_prep.masking.assembly import MaskedColumns, positions
from entrodrop_prep.masking.epoch_rows import EpochRows, Spec
from entrodrop_prep.masking.sources import AGAINST, SOURCE, compared_with
from entrodrop_prep.store import digest, manifest
from entrodrop_prep.store.layout import RECIPE, SCORED_FILES, SCORED_FOLDER, TOKENIZER, UNIGRAM
from entrodrop_prep.store.schema import MASKED, family
from entrodrop_prep.store.scored import ScoredDataset
from entrodrop_prep.store.shards import local_directory
from entrodrop_prep.training.cache import opened

if TYPE_CHECKING:
    import datasets

    from entrodrop_prep.training.stream import MaskedStream

Row = dict[str, Any]
"""``input_ids``, ``attention_mask`` and ``labels`` of one row, lists of T numbers, and what ``add_columns`` names."""

_NOWHERE = "nothing-is-written"
_OF_FILES = ("compression", "plain_config", "rows_per_shard")
"""Settings that say how files are written, not which rows."""


class MaskedRows:
    """The rows of all epochs, one after the other: row i is the i-th row of what ``materialize`` writes, bit for bit.

    Nothing is written but a cache: the scored rows as flat, uncompressed arrays, 9 bytes a token with float32 scores (7
    with float16), made by the first process of a machine and memory-mapped by all. A process holds 8 bytes a row and,
    for each of at most two epochs, 8 more (12 where rows are repeated) and, with ``pack``, 32 a document. Can be
    pickled; a copy opens the cache again.
    """

    def __init__(self, config: MaterializeConfig, cache_dir: str | Path | None = None, held_out: bool = False) -> None:
        """Prefer ``open``, ``like`` and ``from_hub``.

        Args:
            config: a recipe and its sources; of ``out`` and of what says how files are written nothing is used.
            cache_dir: where the cache is, or is made; default ``entrodrop`` in the cache of ``datasets``.
            held_out: the validation rows of ``eval`` or ``eval_fraction`` in their order instead, in one epoch.

        Raises:
            ConfigError: the settings do not fit the scores, or hold no row out.
            IntegrityError: the scores are damaged.
            SourceError: an epoch has no rows.
        """
        self._config, self._cache_dir = config, None if cache_dir is None else str(cache_dir)
        self._job, self._held_out = open_job(config), held_out
        if held_out and not self._job.validation:
            raise ConfigError("no rows are held out", fix="give eval_fraction, the share of the rows")
        spec = (
            self._job.validation_spec(self._job.validation)
            if held_out and self._job.validation
            else Spec.of(self._job.sources, config, range(config.epochs))
        )
        self._rows = opened(self._job, spec, cache_dir)
        self.columns = tuple(self._job.schema.names)
        """Names of a row's columns."""
        self.epoch_lengths = tuple(layout_of(self._rows, e).rows for e in spec.epochs)
        """Rows of each epoch."""
        if not all(self.epoch_lengths):
            raise no_rows(config, held_out) or SourceError(
                f"no row has anything to train on in epoch {self.epoch_lengths.index(0)}",
                where=", ".join(str(s.directory) for s in self._job.directories),
                fix="check loss masks, and weights so small that an epoch gets no row",
            )
        self._firsts = np.concatenate([np.zeros(1, np.int64), np.cumsum(self.epoch_lengths)])

    @classmethod
    def open(
        cls,
        scored: str | Path | Sequence[str],
        recipe: str | Path | None = None,
        *,
        plain: str | Sequence[str] = (),
        against_scores: str | Path | Sequence[str] = (),
        cache_dir: str | Path | None = None,
        **recipe_settings: Any,
    ) -> MaskedRows:
        """Rows as ``materialize`` with the same settings would write them.

        Args:
            scored: a scored directory, or several as ``NAME=SCORED[:WEIGHT]``.
            recipe: YAML or JSON file of settings.
            plain: a source whose rows are never masked, or several.
            against_scores: the scores compared with, for ``select`` low-excess and high-excess.
            cache_dir: see ``MaskedRows``.
            recipe_settings: those of a recipe, by name: ``epochs=4, quantile=0.3``; they win over the file. And those
                that change the rows: ``pack``, ``add_columns``, ``rows_multiple``, ``eval_fraction``.

        Raises:
            ConfigError: a setting is not known, and as ``MaskedRows`` does.
        """
        known = [*RECIPE_FIELDS, *(n for n in _identity_names() if n not in (*RECIPE_FIELDS, *_OF_FILES))]
        for name in recipe_settings:
            if name not in known:
                raise ConfigError(f"MaskedRows takes no setting {name!r}", fix=f"settings are: {', '.join(known)}")
        given: dict[str, Any] = {
            "scored": str(scored) if isinstance(scored, Path) else scored,
            "plain": (plain,) if isinstance(plain, str) else tuple(plain),
            AGAINST: against_scores,
        }
        file = None if recipe is None else str(recipe)
        config = MaterializeConfig.load(file, out=_NOWHERE, **given, **recipe_settings)
        return cls(config, cache_dir)

    @classmethod
    def like(
        cls,
        masked: str | Path,
        scored: str | Path | Mapping[str, str],
        *,
        against_scores: str | Path | Mapping[str, str] | None = None,
        cache_dir: str | Path | None = None,
    ) -> MaskedRows:
        """The rows of every epoch of a masked directory's recipe, from the scores that it was made from.

        Args:
            masked: what ``materialize`` wrote; only its manifest is read.
            scored: the scored directory; for named sources the directory of each by name.
            against_scores: in the same form the scores that these were compared with.
            cache_dir: see ``MaskedRows``.

        Raises:
            IntegrityError: these are other scores, and as ``MaskedRows`` does.
            ConfigError: the sources named are not those of the masked directory.
        """
        path = local_directory(str(masked))
        described = manifest.read(path, MASKED)
        was = {name: value for name, value in described["identity"].items() if name != "validation"}
        given, others = _by_name(scored), _by_name(against_scores)
        recorded = {n: s["scored"] for n, s in was["sources"].items()} if "sources" in was else {SOURCE: was["scored"]}
        for what, found, wanted in (("made from", given, recorded), ("compared with", others, compared_with(was))):
            if sorted(found) != sorted(wanted):
                names = [", ".join(sorted(n)) or "nothing" for n in (wanted, found)]
                fix = "give their directories by name" if "sources" in was else "give one directory"
                fix = fix if what == "made from" else "give against_scores as materialize had them"
                raise ConfigError(f"it was {what} {names[0]}, not {names[1]}", where=str(path), fix=fix)
            for name, position in found.items():
                if ScoredDataset(local_directory(position)).content_digest != wanted[name]:
                    raise IntegrityError(
                        f"{path} was not {what} it: the content digests differ", where=position, fix="give those scores"
                    )
        rows = cls(config_of(described, given, others, out=_NOWHERE), cache_dir)
        lines = manifest.differences(was, rows._job.identity)
        if lines:
            raise IntegrityError("its recipe does not give its identity: " + "; ".join(lines), where=str(path))
        return rows

    @classmethod
    def from_hub(
        cls,
        repo: str,
        revision: str | None = None,
        recipe: str | Path | None = None,
        *,
        token: str | None = None,
        cache_dir: str | Path | None = None,
        **recipe_settings: Any,
    ) -> MaskedRows:
        """Rows from a dataset repository that ``entrodrop push`` filled: its scores are fetched, no masked row.

        Args:
            repo: ``USER/NAME``: a scored directory with ``recipe.yaml``, or a masked one with ``scored/``.
            revision: branch, tag or commit; default the head of ``main``.
            recipe: YAML or JSON file instead of the repository's recipe.
            token: of the Hub; default the one that ``hf auth login`` or HF_TOKEN gave.
            cache_dir: see ``MaskedRows``. What is fetched is in the cache of ``huggingface_hub``.
            recipe_settings: those of a recipe, by name. They win over the repository's ``recipe.yaml``; a masked
                directory's own recipe they replace as a whole.

        Raises:
            HubError: the repository cannot be fetched.
            ConfigError: it holds no scores, or no recipe and none was given; and as ``open`` and ``like`` do.
        """
        from entrodrop_prep.store.published import download

        files = [manifest.NAME, RECIPE, UNIGRAM, f"{TOKENIZER}/*", SCORED_FILES, f"{SCORED_FOLDER}/*"]
        folder = download(repo, revision, files, token)
        if family(str(manifest.peek_schema(folder))) == "scored":
            stored = folder / RECIPE
            file = recipe or (stored if stored.exists() else None)
            if file is None and not recipe_settings:
                raise ConfigError(f"it holds scores and no {RECIPE}", where=repo, fix="give a recipe, or epochs=...")
            return cls.open(folder, file, cache_dir=cache_dir, **recipe_settings)
        scored = folder / SCORED_FOLDER
        if manifest.peek_schema(folder) is None or not scored.is_dir():
            fix = "push with --include-scored, or push the scored directory"
            raise ConfigError("it holds no scores to make masks from", where=repo, fix=fix)
        if recipe or recipe_settings:
            return cls.open(scored, recipe, cache_dir=cache_dir, **recipe_settings)
        return cls.like(folder, scored, cache_dir=cache_dir)

    def __reduce__(self) -> Any:
        return type(self), (self._config, self._cache_dir, self._held_out)

    def held_out(self) -> MaskedRows:
        """The rows that ``eval_fraction`` holds out, with all their labels, in their order: ``materialize`` writes them
        to ``validation/``. Raises ConfigError where there are none.
        """
        return type(self)(self._config, self._cache_dir, held_out=True)

    @property
    def epoch_rows(self) -> EpochRows:
        """The engine behind the rows."""
        return self._rows

    # Rows.

    def __len__(self) -> int:
        return int(self._firsts[-1])

    def __getitem__(self, position: int) -> Row:
        """The row at a position, counted through all epochs; from the end where it is negative. Raises IndexError."""
        at = position + len(self) if position < 0 else position
        if not 0 <= at < len(self):
            raise IndexError(f"there is no row {position} among {len(self)}")
        return self.__getitems__([at])[0]

    def __getitems__(self, positions: Sequence[int]) -> list[Row]:
        """Several rows at once, as a DataLoader asks for a batch."""
        columns = self.take(positions)
        return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]

    def take(self, positions: Sequence[int] | NDArray[np.int64]) -> dict[str, list[Any]]:
        """Several rows, column by column.

        Args:
            positions: [n] positions, counted through all epochs.

        Returns:
            Column -> n values: lists of a row's T tokens (``input_ids``, ``attention_mask``, ``labels``,
            ``position_ids``) or documents (``seq_lengths``), or numbers (``n_trainable``).

        Raises:
            IndexError: a position is outside 0 to ``len(self) - 1``.
        """
        wanted = np.asarray(positions, np.int64)
        if len(wanted) and not 0 <= wanted.min() <= wanted.max() < len(self):
            raise IndexError(f"positions {wanted.min()} to {wanted.max()} are not inside {len(self)} rows")
        once, back = np.unique(wanted, return_inverse=True)
        made: dict[str, list[Any]] = {name: [None] * len(once) for name in self.columns}
        epochs = np.searchsorted(self._firsts, once, side="right") - 1
        for epoch in np.unique(epochs).tolist():
            some = np.flatnonzero(epochs == epoch)
            stored = self._rows.epoch(epoch)[once[some] - self._firsts[epoch]].stored
            for name, column in made.items():
                column[some[0] : some[-1] + 1] = _values(stored, name)
        return {name: [column[i] for i in back.tolist()] for name, column in made.items()}

    def span(self, epoch: int | None = None) -> tuple[int, int]:
        """First position of an epoch, and the one after its last; of all epochs for None. Raises ConfigError."""
        if epoch is None:
            return 0, len(self)
        if not 0 <= epoch < len(self.epoch_lengths):
            raise ConfigError(f"there is no epoch {epoch}", fix=f"give 0 to {len(self.epoch_lengths) - 1}, or none")
        return int(self._firsts[epoch]), int(self._firsts[epoch + 1])

    # What trainers take.

    def dataset(self, epoch: int | None = None) -> datasets.Dataset:
        """A ``datasets.Dataset`` whose rows are made as they are read: of one epoch, or of all, one after the other.

        It has the columns of the files, so that trainers treat it as they treat ``load_dataset("masked")``; they hold
        only the position (8 bytes a row) until a row is read. Read it in order.
        Raises ConfigError for an epoch that is not there.
        """
        import datasets
        import pyarrow as pa

        first, stop = self.span(epoch)
        empty = {name: pa.nulls(stop - first, pa.int8()) for name in self.columns}
        table = pa.table(empty | {"input_ids": np.arange(first, stop)})
        rows = [self._job.identity, first, stop, *(["held out"] if self._held_out else [])]
        made = datasets.Dataset(table, fingerprint=digest.of_json(rows)[:16])
        made.set_transform(_Made(self))
        return made

    def stream(
        self,
        batch_size: int,
        *,
        rank: int = 0,
        world_size: int = 1,
        epoch: int | None = None,
        drop_last: bool = False,
    ) -> MaskedStream:
        """A torch ``IterableDataset`` of the rows in order for one of several ranks: see ``MaskedStream``."""
        from entrodrop_prep.training.stream import MaskedStream

        return MaskedStream(self, batch_size, rank=rank, world_size=world_size, epoch=epoch, drop_last=drop_last)


class _Made:
    """From positions to rows, for the columns that were not removed."""

    def __init__(self, rows: MaskedRows) -> None:
        self._rows = rows

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        if "input_ids" not in batch:
            raise ConfigError(
                f"a trainer removed input_ids, and kept {', '.join(batch)}", fix="set remove_unused_columns=False"
            )
        made = self._rows.take(batch["input_ids"])
        return {name: made.get(name, values) for name, values in batch.items()}


def _values(stored: MaskedColumns, column: str) -> list[Any]:
    """A column of [R] rows as Python values: lists of a row's tokens or documents, or numbers."""
    if column == "n_trainable":
        return list(stored.trainable.tolist())
    offsets = stored.documents if column == "seq_lengths" else stored.offsets
    spans = list(pairwise(offsets.tolist()))
    if column == "attention_mask":
        return [[1] * (b - a) for a, b in spans]
    flat: dict[str, Callable[[], NDArray[Any]]] = {
        "input_ids": lambda: stored.input_ids,
        "labels": lambda: stored.labels,
        "position_ids": lambda: positions(stored.lengths),
        "seq_lengths": lambda: stored.lengths,
    }
    values = flat[column]()
    return [values[a:b].tolist() for a, b in spans]


def _by_name(directories: str | Path | Mapping[str, str] | None) -> dict[str, str]:
    if directories is None:
        return {}
    return {n: str(p) for n, p in (directories if isinstance(directories, Mapping) else {SOURCE: directories}).items()}


def _identity_names() -> list[str]:
    """Settings that a masked directory's identity holds."""
    return [name for name, (_, setting, _) in settings(MaterializeConfig).items() if setting.role == "identity"]
