"""The types that manifests and footers are made of, and what is said of a value that does not have its type.

A name of a file must be one that this program writes. Objects that are ``Open`` may say more than is declared here, as
those of a later version do; what is declared must be as declared.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from itertools import pairwise
from typing import Annotated, Any, Literal

import pydantic
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PlainValidator, StringConstraints, WithJsonSchema

SHARD = r"shard-(\d{5,})\.parquet"
BESIDE = r"unigram\.npy|rejected\.jsonl|tokenizer/[^\x00-\x1f\x7f\\*?\[\]]+"
"""Of a scored directory; a tokenizer names its files as it likes."""
PART = r"(epoch_\d{3,}/train|plain/train|validation/validation)-(\d{5,})-of-(\d{5,})\.parquet"
PICTURE = r"entropy\.svg"
DERIVED = {
    "concatenated": r"all/train-\d{5,}-of-\d{5,}\.parquet|all_hf/dataset_dict\.json|"
    r"all_hf/(train|validation)/(data-\d{5,}-of-\d{5,}\.arrow|state\.json|dataset_info\.json)",
    "jsonl": r"jsonl/(epoch_\d{3,}|validation)\.jsonl",
}


def _text(value: Any) -> str:
    """Any text, those that are no UTF-8 among them: a name of the source's may hold anything."""
    if not isinstance(value, str):
        raise ValueError("should be text")
    return value


def is_written(name: Any, *patterns: str) -> bool:
    """Whether this program writes a file of such a name, relative and in POSIX form; by default in any directory."""
    return (
        isinstance(name, str)
        and re.fullmatch("|".join(patterns or (SHARD, BESIDE, PART, PICTURE)), name) is not None
        and all(part.strip(".") and part.isprintable() for part in name.split("/"))
    )


def file_name(*patterns: str) -> Any:
    """The type of a file's name, of those that this program writes."""
    pattern = "|".join(patterns)

    def check(name: str) -> str:
        if not is_written(name, *patterns):
            raise ValueError("is no name of a file that this program writes there")
        return name

    return Annotated[Text, AfterValidator(check), WithJsonSchema({"type": "string", "pattern": f"^({pattern})$"})]


Text = Annotated[Any, PlainValidator(_text), WithJsonSchema({"type": "string"})]
Digest = Annotated[str, StringConstraints(pattern="^[0-9a-f]{64}$")]
Count = Annotated[int, Field(ge=0, lt=2**63)]
Positive = Annotated[int, Field(ge=1, lt=2**63)]
Ids = Annotated[int, Field(ge=0, lt=2**31)]
Share = Annotated[float, Field(ge=0, le=1)]
Object = dict[str, Any]
ABSENT: Any = None
"""Where a key may be left out, which is not to be null."""
Versions = dict[str, Text]


class Open(BaseModel):
    """More keys than these may be there."""

    model_config = ConfigDict(strict=True, extra="allow")


class Closed(BaseModel):
    """No other keys."""

    model_config = ConfigDict(strict=True, extra="forbid")


class File(Closed):
    """A file, in ``files``. ``part`` replaces the epoch for what is beside the epochs."""

    file: Annotated[file_name(SHARD, BESIDE, PART, PICTURE), Field(description="Relative path.")]  # type: ignore[valid-type]
    bytes: Count
    sha256: Digest
    rows: Count = ABSENT
    tokens: Count = ABSENT
    trainable_tokens: Count = ABSENT
    content_digest: Digest = ABSENT
    epoch: Count = ABSENT
    part: Literal["plain", "validation"] = ABSENT


class ModelName(Open):
    """The reference model."""

    name: Text
    context: Positive | None
    vocab_size: Annotated[int, Field(ge=1, lt=2**31)]


class Tokenizer(Open):
    """The tokenizer in ``tokenizer/``."""

    digest: Text
    special_ids: list[Ids]
    eos_id: Ids | None
    pad_id: Ids | None
    name: Text = ""
    commit: Text = ""
    vocabulary: Digest = ABSENT
    chat_template: Digest | None = None
    stored: Annotated[
        Digest | None,
        Field(description="The digest once saved, where it is another; null: it needs code of its own to be loaded."),
    ] = None

    @pydantic.model_validator(mode="after")
    def _ascending(self) -> Tokenizer:
        if any(a >= b for a, b in pairwise(self.special_ids)):
            raise ValueError("special_ids should be ascending")
        return self


class SourceCard(Open):
    """What the card of a source on the Hub says."""

    license: Text | list[Text] | None = None
    license_name: Text | None = None
    license_link: Text | None = None
    language: list[Text] = []


class SourceName(Open):
    """The rows that were scored, by name."""

    name: Text
    card: SourceCard = SourceCard()


class SourceRows(SourceName):
    """The same, with the digest of the rows."""

    digest: Digest


class SourceIdentity(Open):
    """What the source is known by."""

    kind: Text = ""
    dataset: Text = ""
    config: Text | None = None
    split: Any = None
    revision: Text | None = None

    @pydantic.model_validator(mode="after")
    def _complete(self) -> SourceIdentity:
        if self.kind == "hub" and {"dataset", "config", "split"} - self.model_fields_set:
            raise ValueError("should have the dataset on the Hub, its configuration and split")
        return self


class Described(Open):
    """What no setting decides, as every scored shard says it."""

    generator: Text
    source: SourceName
    model: ModelName
    tokenizer: Tokenizer


class WeightsIdentity(Open):
    """What the weights are known by: a commit or a digest."""

    commit: Text = ABSENT
    digest: Text = ABSENT

    @pydantic.model_validator(mode="after")
    def _known(self) -> WeightsIdentity:
        if self.commit is None and self.digest is None:
            raise ValueError("should have a commit or a digest")
        return self


class ScoredIdentity(Open):
    """What the content of a scored directory depends on; must match to continue a run."""

    schema_: Annotated[Literal["scored/1"], Field(alias="schema")]
    score_dtype: Text
    logprob: bool
    id_column: Text | None
    rows_per_shard: Positive
    row_format: Text
    dtype: Text
    model: WeightsIdentity
    source: SourceIdentity = SourceIdentity()
    vocab_size: Positive = ABSENT
    tokenizer: Text = ABSENT


def each_once(names: Iterable[str]) -> None:
    for name, times in Counter(names).items():
        if times > 1:
            raise ValueError(f"{name} is listed twice")


def in_order(folder: str, shards: list[tuple[int, str]]) -> None:
    for index, (number, name) in enumerate(shards):
        if number != index:
            raise ValueError(f"files lists {name} where number {index} of {folder} is to be")


def problem_of(model: type[BaseModel], value: Any) -> str | None:
    """What is wrong with a value: where in it, and why; None if nothing is."""
    try:
        model.model_validate(value)
    except pydantic.ValidationError as e:
        found = [(_location(error["loc"], value), error) for error in e.errors(include_url=False)]
        at, error = max(
            found, key=lambda one: len(one[0])
        )  # of several kinds that it may be, the one it comes closest to
        text = "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in at).lstrip(".")
        said = str(error["msg"]).removeprefix("Value error, ")
        plain = isinstance(error["input"], (str, int, float, type(None)))
        problem_text = f"{said[:1].lower()}{said[1:]}" + (f", not {error['input']!r:.60}" if plain else "")
        return f"{text}: {problem_text}" if text else problem_text
    return None


def _location(loc: tuple[int | str, ...], value: Any) -> list[int | str]:
    """Keys and indices on the way to an error; the names of the kinds that were tried are left out."""
    found: list[int | str] = []
    for i, part in enumerate(loc):
        if isinstance(value, dict) and (part in value or i == len(loc) - 1):
            value = value.get(part)
        elif isinstance(value, list) and isinstance(part, int) and part < len(value):
            value = value[part]
        else:
            continue
        found.append(part)
    return found
