"""What a manifest, a shard's footer and the note of an unfinished run may say.

``manifest.read`` checks manifests against it, ``shards.read_footer`` footers, and ``schemas/manifest.json`` is made
from it. A key at the top of a manifest that is not declared here is let be: a later version may say more.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal

import pydantic
from pydantic import AfterValidator, BaseModel, Field, Strict

from entrodrop_prep.config import EXTRA_COLUMNS, RECIPE_FIELDS, MaterializeConfig, model_of
from entrodrop_prep.store.manifest_types import (
    ABSENT,
    BESIDE,
    DERIVED,
    PART,
    PICTURE,
    SHARD,
    Closed,
    Count,
    Described,
    Digest,
    File,
    ModelName,
    Object,
    Open,
    Positive,
    ScoredIdentity,
    Share,
    SourceRows,
    Text,
    Tokenizer,
    Versions,
    WeightsIdentity,
    each_once,
    file_name,
    in_order,
    problem_of,
)
from entrodrop_prep.store.schema import MASKED, SCORED


class Environment(Closed):
    """Versions, and the shards that were made with them."""

    environment: Versions
    shards: list[Count]


class _Manifest(Open):
    """What both kinds of directory have."""

    generator: Text
    content_digest: Annotated[Digest, Field(description="What the dataset is known by, whatever files hold it.")]
    manifest_digest: Annotated[Digest, Field(description="SHA-256 of this file's bytes with these 64 digits zeroed.")]
    files: list[File]


class ScoredManifest(_Manifest):
    """manifest.json of a scored directory."""

    schema_: Annotated[Literal["scored/1"], Field(alias="schema")]
    identity: ScoredIdentity
    environments: list[Environment] = []
    source: SourceRows
    model: ModelName
    tokenizer: Tokenizer
    counts: dict[str, Count]
    notes: Annotated[
        dict[str, Count], Field(description="What was warned of, and of how many rows; only where there was anything.")
    ] = {}

    @pydantic.model_validator(mode="after")
    def _files(self) -> ScoredManifest:
        each_once(e.file for e in self.files)
        shards = [e for e in self.files if re.fullmatch(SHARD, e.file)]
        if not shards:
            raise ValueError("files lists no shard")
        in_order("the shards", [(int(re.fullmatch(SHARD, e.file)[1]), e.file) for e in shards])  # type: ignore[index]
        for entry in self.files:
            has = (entry.rows, entry.tokens, entry.trainable_tokens, entry.content_digest)
            whole = None not in has if entry in shards else set(has) == {None}
            if not whole or entry.epoch is not None or entry.part is not None:
                raise ValueError(f"files does not say of {entry.file} what it says of such a file")
            if not re.fullmatch(f"{SHARD}|{BESIDE}", entry.file):
                raise ValueError(f"a scored directory has no file {entry.file}")
        if {"rows", "rows_read", "windows", "tokens", "trainable_tokens"} - self.counts.keys():
            raise ValueError("counts is not complete")
        return self


class DerivedFile(Closed):
    """A file that ``--layout`` derived from the epochs."""

    layout: Literal["concatenated", "jsonl"]
    file: Annotated[file_name(*DERIVED.values()), Field(description="Relative path.")]  # type: ignore[valid-type]
    bytes: Count
    sha256: Digest

    @pydantic.model_validator(mode="after")
    def _layout(self) -> DerivedFile:
        if not re.fullmatch(DERIVED[self.layout], self.file):
            raise ValueError(f"the layout {self.layout} has no file {self.file}")
        return self


class Provenance(Open):
    """What a masked directory says of a scored one that it was made from."""

    generator: Text
    identity: ScoredIdentity
    model: ModelName
    model_identity: WeightsIdentity
    source: SourceRows
    tokenizer: Tokenizer
    environments: list[Versions] = []


class Compared(Provenance):
    """Scores of the same rows that a source's were compared with."""

    content_digest: Digest


class Scored(Compared):
    """The one scored directory, which has no name."""

    against_scores: Compared = ABSENT


class NamedScored(Scored):
    """One of several."""

    name: Text
    weight: Annotated[float, Field(gt=0, le=1000)]
    plain: bool


class SourceWeight(Closed):
    """A named source in the identity."""

    scored: Digest
    weight: Annotated[float, Field(gt=0, le=1000)]
    plain: bool = False
    against_scores: Digest = ABSENT


class MaskedIdentity(Open):
    """What the masked files depend on; must match to continue a run."""

    schema_: Annotated[Literal["masked/1"], Field(alias="schema")]
    rows_per_shard: Positive
    compression: Text
    horizon: Positive
    scored: Digest = ABSENT
    against_scores: Digest = ABSENT
    sources: dict[str, SourceWeight] = ABSENT
    validation: Digest = ABSENT
    plain_config: bool = False
    add_columns: list[Annotated[Text, AfterValidator(lambda v: _one_of(v, EXTRA_COLUMNS))]] = []
    rows_multiple: Positive = ABSENT
    pack: Positive = ABSENT
    eval_fraction: Annotated[float, Field(gt=0, lt=1)] = ABSENT

    @pydantic.model_validator(mode="after")
    def _one(self) -> MaskedIdentity:
        if (self.scored is None) == (not self.sources):
            raise ValueError("should name either one scored directory or sources")
        return self


def _one_of(value: str, known: Iterable[str]) -> str:
    if value not in known:
        raise ValueError(f"should be one of {', '.join(known)}")
    return value


class Part(Open):
    """Figures of the rows in one folder."""

    rows: Count
    tokens: Count
    labels_left: Count
    documents: Count = ABSENT
    rows_left_out: Count = ABSENT
    utilisation: Share = ABSENT
    rows_cut: Count = ABSENT
    pieces_left_out: Count = ABSENT
    sources: dict[str, dict[str, Count]] = ABSENT


class Epoch(Part):
    """Figures of an epoch."""

    epoch: Annotated[int, Field(ge=0, le=65535)]
    folder: Text
    trainable: Count
    eligible: Count
    dropped: Count
    rate_min: Share
    rate_max: Share
    eligible_share: Share
    dropped_share: Share

    @pydantic.model_validator(mode="after")
    def _named(self) -> Epoch:
        if self.folder != f"epoch_{self.epoch:03d}":
            raise ValueError(f"epoch {self.epoch} has no folder {self.folder}")
        return self


class HeldOut(Part):
    """Figures of the split ``validation`` where its rows are held out of the sources."""

    rows_without_loss: Count


class Validation(HeldOut, Provenance):
    """Figures and origin of the split ``validation`` where it has scores of its own."""

    scored: Digest


class Histogram(Closed):
    """Trainable tokens by entropy: bin i counts those from i / bins_per_nat nats on, below the next bin; the 128th
    takes all above. Each row of a masked source counts once.
    """

    bins_per_nat: Positive
    counts: Annotated[list[Count], Field(max_length=128)]


Nats = Annotated[float, Field(allow_inf_nan=False)] | Literal["selects none"]


class ColumnThresholds(Closed):
    """The threshold of each value of a column."""

    column: Text
    values: list[Annotated[tuple[Any, Nats], Strict(False)]]


class MaskedManifest(_Manifest):
    """manifest.json of a masked directory."""

    schema_: Annotated[Literal["masked/1"], Field(alias="schema")]
    identity: MaskedIdentity
    recipe: Annotated[Object, AfterValidator(lambda v: _recipe(v))]
    scored: Scored | Annotated[list[NamedScored], Field(min_length=1)]
    tau_nats: Nats | ColumnThresholds | dict[str, Nats] | None
    rows_without_loss: Count
    epochs: Annotated[list[Epoch], Field(min_length=1)]
    plain: Annotated[Part, Field(description="Figures of the configuration `plain`, if asked for.")] = ABSENT
    validation: Validation | HeldOut = ABSENT
    derived: list[DerivedFile] = []
    entropy_histogram: Histogram = ABSENT
    environments: Annotated[
        list[Versions], Field(description="Versions that the files were written with, each set of them once.")
    ] = []

    @pydantic.model_validator(mode="after")
    def _files(self) -> MaskedManifest:
        each_once([*(e.file for e in self.files), *(e.file for e in self.derived)])
        each_once(e.folder for e in self.epochs)
        parts: dict[str, list[tuple[int, str]]] = {}
        for entry in self.files:
            found = re.fullmatch(PART, entry.file)
            if not found and not re.fullmatch(PICTURE, entry.file):
                raise ValueError(f"a masked directory has no file {entry.file}")
            whole = None not in (entry.rows, entry.tokens, entry.content_digest)
            folder = entry.file.split("/")[0]
            label = folder if entry.epoch is None else f"epoch_{entry.epoch:03d}"
            if whole != bool(found) or (found and (label != folder or (entry.epoch is None) == (entry.part is None))):
                raise ValueError(f"files does not say of {entry.file} what it says of such a file")
            if found:
                parts.setdefault(folder, []).append((int(found[2]), entry.file))
                if found[3] != f"{sum(e.file.startswith(folder + '/') for e in self.files):05d}":
                    raise ValueError(f"files lists not all of {folder}, or too many: {entry.file}")
        for folder, shards in parts.items():
            in_order(folder, shards)
        if isinstance(self.validation, Validation) != (self.identity.validation is not None):
            raise ValueError("validation does not say which scores its rows are from, or says what identity does not")
        recorded = {e.folder for e in self.epochs} | {
            n for n in ("plain", "validation") if getattr(self, n) is not None
        }
        if recorded != parts.keys():
            raise ValueError(
                f"files and figures are not of the same folders: {', '.join(sorted(recorded ^ parts.keys()))}"
            )
        return self


def _recipe(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """Every setting of a recipe, each of its type."""
    types = _recipe_types()
    for name in types:
        if name not in values:
            raise ValueError(f"{name} is missing")
    for name, value in values.items():
        if name == "bounds" and value is None:  # of earlier versions, which took no bound for the entropy
            continue
        if name not in types:
            raise ValueError(f"this version knows no setting {name}")
        try:
            types[name].validate_python(value)
        except pydantic.ValidationError as e:
            raise ValueError(f"{name}: {e.errors()[0]['msg']}") from e
    return values


@functools.cache
def _recipe_types() -> dict[str, pydantic.TypeAdapter[Any]]:
    fields: dict[str, Any] = model_of(MaterializeConfig).model_fields
    return {name: pydantic.TypeAdapter(fields[name].rebuild_annotation()) for name in RECIPE_FIELDS}


class State(Open):
    """``.state.json``, which a run notes for its own continuation; a user may have written to it."""

    schema_: Annotated[Text, Field(alias="schema")]
    identity: Object = {}
    source: Object = {}
    model: dict[str, list[Any]] = {}
    environments: list[Versions] = []
    layouts: list[Text] = []
    parts: list[Literal["plain", "validation"]] = []
    files: list[Any] = []


class FooterSource(Open):
    """Of a scored shard, the rows that were read and where the next ones are."""

    digest: Digest
    next: Object | None
    units: Annotated[float, Field(ge=0)]


class FooterInfo(Open):
    """What the footer of a shard says, of a scored or a masked directory."""

    schema_: Annotated[Text, Field(alias="schema")] = ABSENT
    rows: Count
    content_digest: Digest
    shard: Count = 0
    fingerprint: Digest = ABSENT
    identity: Object = {}
    environment: Versions = {}
    counts: dict[str, Count] = {}
    notes: dict[str, Count] = {}
    described: Described = ABSENT
    rejected: list[Object] = []
    source: FooterSource = ABSENT
    epoch: Count = ABSENT
    part: Literal["plain", "validation"] = ABSENT
    rates: Annotated[list[Share], Field(min_length=2, max_length=2)] = ABSENT
    sources: dict[str, dict[str, Count]] = {}
    provenance: list[Object] = []


MODELS: dict[str, type[BaseModel]] = {SCORED: ScoredManifest, MASKED: MaskedManifest}


def problem(described: dict[str, Any]) -> str | None:
    """What is wrong with a manifest of a known schema: where in it, and why; None if nothing is."""
    return problem_of(MODELS[described["schema"]], described)
