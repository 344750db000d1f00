"""The scored directories that an epoch is mixed from: their names, how often their rows occur, and whether they fit."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa

from entrodrop_prep.config import MaterializeConfig, Recipe
from entrodrop_prep.errors import ConfigError
from entrodrop_prep.masking.counter import held_out
from entrodrop_prep.store.layout import VALIDATION
from entrodrop_prep.store.schema import RESERVED
from entrodrop_prep.store.scored import ScoredDataset
from entrodrop_prep.store.shards import local_directory

SOURCE = "source"
"""Name of a dataset in the masks' keys where there is only one."""
AGAINST = "against_scores"
"""Key of the scores compared with, in the identity and in the manifest."""
EVAL = "eval"
"""No source's name: ``verify --against eval=SCORED`` means the validation rows."""
MIN_WEIGHT, MAX_WEIGHT = 0.001, 100.0
_NAMED = re.compile(r"([A-Za-z0-9_-]{1,64})=(.+)", re.DOTALL)
_WEIGHTED = re.compile(r"(.+):(\d+(?:\.\d*)?|\.\d+)", re.DOTALL)


@dataclass(frozen=True)
class Split:
    """A part of a source's rows, by ``row_id``: the share ``fraction`` that is held out for validation, or the rest."""

    seed: int
    fraction: float
    held_out: bool


@dataclass(frozen=True)
class Source:
    """One of the directories. ``plain`` rows are never masked."""

    name: str
    scored: ScoredDataset
    weight: float = 1.0
    plain: bool = False
    against: ScoredDataset | None = None
    """Scores of the same rows, whose surprisal is subtracted."""
    split: Split | None = None
    """Which of the rows are the source's; None for all."""

    def rows_of(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        """Those rows of a batch of the scored directory that are the source's."""
        if self.split is None:
            return batch
        row_id = batch.column("row_id").to_numpy()
        held = held_out(self.split.seed, self.name, self.split.fraction, row_id)
        return batch.filter(pa.array(held == self.split.held_out))

    @property
    def times(self) -> int:
        """How often every row occurs in every epoch."""
        return int(self.weight)

    @property
    def share(self) -> float:
        """The share of the rows that occur once more, chosen again each epoch."""
        return self.weight - self.times

    def key_name(self, repeat: int) -> str:
        """The name under which a row has its random numbers the ``repeat``-th time (from 0) it occurs in an epoch."""
        return self.name if repeat == 0 else f"{self.name}#{repeat}"


@dataclass(frozen=True)
class Sources:
    """All sources of a run by name, ascending; ``named`` unless there is one directory given without a name."""

    all: tuple[Source, ...]
    named: bool

    @property
    def masked(self) -> list[Source]:
        """Those whose rows are masked."""
        return [s for s in self.all if not s.plain]


def named_path(text: str) -> tuple[str | None, str]:
    """Name and path of ``NAME=PATH``; no name where the text does not begin with one."""
    found = _NAMED.fullmatch(text)
    return (found[1], found[2]) if found else (None, text)


def without_weight(text: str) -> str:
    """``NAME=SCORED[:WEIGHT]`` as ``verify --against`` takes it; a path without a name is returned as it is."""
    name, path = named_path(text)
    return text if name is None else f"{name}={_weighted(path)[0]}"


def open_sources(config: MaterializeConfig) -> Sources:
    """Open what ``config`` names. Raises ConfigError for names, weights or directories that do not go together."""
    texts = [*((text, False) for text in config.sources), *((text, True) for text in config.plain)]
    given = [(text, *named_path(text), plain) for text, plain in texts]
    alone = len(config.sources) == 1 and given[0][1] is None
    opened: list[Source] = []
    for index, (text, name, rest, plain) in enumerate(given):
        if alone and index == 0:
            _check_weight(rest, named=False)
            opened.append(Source(SOURCE, _open(rest)))
            continue
        if name is None:
            raise ConfigError(
                f"{text!r} has no name",
                fix="write NAME=SCORED or NAME=SCORED:WEIGHT; a name is letters, digits, _ and -, 64 at most",
            )
        path, weight = _weighted(rest)
        _check_weight(path, named=True)
        if name == EVAL:
            raise ConfigError("no source can have the name 'eval'", where=text, fix="choose another")
        if not MIN_WEIGHT <= weight <= MAX_WEIGHT:
            raise ConfigError(
                f"the weight of source {name!r} is {weight:g}", fix=f"give one from {MIN_WEIGHT:g} to {MAX_WEIGHT:g}"
            )
        opened.append(Source(name, _open(path), weight, plain))
    for one, other in zip(sorted(opened, key=_name), sorted(opened, key=_name)[1:], strict=False):
        if one.name == other.name:
            raise ConfigError(f"two sources have the name {one.name!r}", fix="give each a name of its own")
    opened = [_part_of(source, config, held_out=False) for source in _with_against(opened, config)]
    sources = Sources(tuple(sorted(opened, key=_name)), named=not (alone and len(opened) == 1))
    check_tokenizers(s.scored for s in sources.all)
    _check_column(sources.masked, config)
    for source in sources.masked:
        _check_logprob(source.scored, config)
    return sources


def _with_against(opened: list[Source], config: MaterializeConfig) -> list[Source]:
    """The sources with the scores that theirs are compared with. Raises ConfigError where these do not fit."""
    if not config.against_scores:
        return opened
    masked = [s.name for s in opened if not s.plain]
    named = [(text, *named_path(text)) for text in config.against_scores]
    given = dict((SOURCE, text) if masked == [SOURCE] != [name] else (name, path) for text, name, path in named)
    if len(config.against_scores) != len(masked) or set(given) != set(masked):
        raise ConfigError(
            f"{len(masked)} sources are masked ({', '.join(masked)}), and --against-scores is given "
            f"{len(config.against_scores)} times",
            fix="give it once" if masked == [SOURCE] else "give --against-scores NAME=SCORED2 once for each of them",
        )
    return [s if s.plain else replace(s, against=_other(s.scored, given[s.name])) for s in opened]


def _other(scored: ScoredDataset, path: str) -> ScoredDataset:
    """The scores to compare with. Raises ConfigError where their rows cannot be those of ``scored``."""
    other = _open(path)
    check_tokenizers([scored, other])
    for one in (scored, other):
        if not one.has_logprob:
            raise ConfigError(
                "the excess needs log-probabilities, and the scored dataset has none",
                where=str(one.directory),
                fix="score again without --no-logprob",
            )
    sizes = [[one.manifest["counts"][name] for name in ("windows", "tokens")] for one in (scored, other)]
    if sizes[0] != sizes[1]:
        raise ConfigError(
            f"--against-scores has {sizes[1][0]:,} windows of {sizes[1][1]:,} tokens, {scored.directory} "
            f"{sizes[0][0]:,} of {sizes[0][1]:,}",
            where=str(other.directory),
            fix="score the same source with the same tokenizer, template and windows",
        )
    return other


def _part_of(source: Source, config: MaterializeConfig, *, held_out: bool) -> Source:
    """The rows of a source that are held out, or the others; all of a plain one, of which none are held out."""
    if config.eval_fraction is None or source.plain:
        return source
    return replace(source, split=Split(config.seed, config.eval_fraction, held_out))


def open_eval(config: MaterializeConfig, sources: Sources) -> Sources | None:
    """The validation rows: of a scored directory of their own, or those that are held out of the masked sources.

    Raises ConfigError where the directory's tokenizer is another.
    """
    if config.eval is not None:
        scored = _open(config.eval)
        check_tokenizers([sources.all[0].scored, scored])
        return Sources((Source(VALIDATION, scored, plain=True),), named=True)
    if config.eval_fraction is None:
        return None
    held = [_part_of(source, config, held_out=True) for source in sources.masked]
    return Sources(tuple(replace(s, weight=1.0, plain=True, against=None) for s in held), sources.named)


def check_tokenizers(directories: Iterable[ScoredDataset]) -> None:
    """Raises ConfigError naming two directories whose token ids or vocabularies are not the same."""
    first, *others = directories
    for other in others:
        for what, one, two in (
            ("tokenizers", first.manifest["tokenizer"]["digest"], other.manifest["tokenizer"]["digest"]),
            ("vocabulary sizes", first.vocab_size, other.vocab_size),
        ):
            if one != two:
                raise ConfigError(
                    f"{first.directory} and {other.directory} have different {what}",
                    fix="score both with the same --tokenizer and a model of the same vocabulary",
                )


def _name(source: Source) -> str:
    return source.name


def _open(path: str) -> ScoredDataset:
    return ScoredDataset(local_directory(path))


def _weighted(text: str) -> tuple[str, float]:
    """Path and weight of ``PATH[:WEIGHT]``."""
    found = _WEIGHTED.fullmatch(text)
    return (found[1], float(found[2])) if found else (text, 1.0)


def _check_weight(path: str, *, named: bool) -> None:
    """Raises ConfigError where the path of a source that is not there is another one's with a weight behind it."""
    directory, _, weight = path.rpartition(":")
    if not directory or local_directory(path).exists() or not local_directory(directory).is_dir():
        return
    if named:
        raise ConfigError(
            f"the weight {weight!r} is not a number such as 2 or 0.5", where=path, fix="write NAME=SCORED:2"
        )
    raise ConfigError("a source with a weight needs a name", where=path, fix=f"write NAME={path}")


def spec(name: str, path: str, weight: float) -> str:
    """The argument that names a source."""
    return f"{name}={path}:{weight!r}"


def compared_with(identity: Mapping[str, Any]) -> dict[str, str]:
    """Name -> content digest of the scores that those of a masked directory's sources were compared with."""
    recorded = identity.get("sources") or {SOURCE: identity}
    return {name: one[AGAINST] for name, one in recorded.items() if AGAINST in one}


def arguments(
    identity: dict[str, Any], given: Mapping[str, str], against: Mapping[str, str] | None = None
) -> dict[str, list[str]]:
    """The sources of a masked directory as ``materialize`` takes them, and what they were compared with.

    ``given`` and ``against`` are their directories by name.
    """
    if "sources" not in identity:
        found = {"scored": [f"./{given[SOURCE]}" if named_path(given[SOURCE])[0] else given[SOURCE]]}
        return found | ({AGAINST: [against[SOURCE]]} if against else {})
    masked, plain = (
        [
            spec(n, given[n], recorded["weight"])
            for n, recorded in identity["sources"].items()
            if recorded.get("plain", False) == p
        ]
        for p in (False, True)
    )
    found = {"scored": masked, "plain": plain}
    return found | ({AGAINST: [f"{n}={path}" for n, path in against.items()]} if against else {})


def _check_logprob(scored: ScoredDataset, recipe: Recipe) -> None:
    if recipe.needs_logprob and not scored.has_logprob:
        what = f"--select {recipe.select}" if recipe.keep_surprising is None else "--keep-surprising"
        raise ConfigError(
            f"{what} needs log-probabilities, and the scored dataset has none",
            where=str(scored.directory),
            fix="score again without --no-logprob, or leave it out",
        )


def _check_column(masked: list[Source], recipe: Recipe) -> None:
    """Raises ConfigError where the column of ``--scope`` is missing, or not of one type that can be compared."""
    column, before = recipe.scope_column, ""
    for source in masked if column is not None else ():
        where = str(source.scored.directory)
        kept = [name for name in source.scored.schema.names if name not in RESERVED]
        if column not in kept:
            raise ConfigError(
                f"--scope column:{column}: there is no such column",
                where=where,
                fix=f"kept columns are: {', '.join(kept)}" if kept else "score with --keep-columns: none was kept",
            )
        kind = source.scored.schema.field(column).type
        recorded = "text" if pa.types.is_string(kind) or pa.types.is_large_string(kind) else ""
        recorded = "integer" if pa.types.is_integer(kind) else "bool" if pa.types.is_boolean(kind) else recorded
        if recipe.selection.score is not None and (not recorded or before not in ("", recorded)):
            raise ConfigError(
                f"--scope column:{column}: it is {kind}" + (f", elsewhere {before}" if recorded else ""),
                where=where,
                fix="give a column of text, whole numbers or booleans, of one type in all sources",
            )
        before = recorded
