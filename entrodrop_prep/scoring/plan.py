"""What a scoring run will do, settled before a row is scored: source, tokenizer, row format, model, identity."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from entrodrop_prep.backends.identity import Weights, identify_weights, identity_name
from entrodrop_prep.backends.model import ModelInfo, inspect_model
from entrodrop_prep.config import ScoreConfig
from entrodrop_prep.config import identity as setting_identity
from entrodrop_prep.errors import ConfigError
from entrodrop_prep.scoring.extra_columns import infer_field
from entrodrop_prep.scoring.protected import stop_ids
from entrodrop_prep.scoring.tokenize import Encoder, RowFormat, detect_format
from entrodrop_prep.scoring.tokenizer import (
    Disagreement,
    added_ids,
    ends_itself,
    load_tokenizer,
    special_ids,
    tokenizer_digest,
    tokenizer_origin,
    vocabulary_disagreement,
)
from entrodrop_prep.scoring.windows import new_tokens
from entrodrop_prep.sources.formats import split_extension
from entrodrop_prep.sources.rows import Source
from entrodrop_prep.sources.source import open_source
from entrodrop_prep.store import digest
from entrodrop_prep.store.schema import RESERVED, SCORED, score_columns, scored_schema

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

TYPE_SAMPLE_ROWS = 1000
READ_BYTES = 2 << 20
"""Rows are read and tokenized in chunks of about so many bytes."""
_MASK = re.compile("mask|label|position_ids|seq_lengths", re.IGNORECASE)
"""Names of columns that trainers and packers write beside token ids."""
# Settings whose meaning is in the identity under another name: what they resolved to, not how they were written.
_RESOLVED = (
    "source",
    "model",
    "revision",
    "tokenizer",
    "chat_template",
    "dtype",
    "max_length",
    "long_documents",
    "split",
    "config",
    "source_revision",
    "text_column",
    "prompt_column",
    "completion_column",
    "messages_column",
    "train_on",
    "window_bos",
)


@dataclass(frozen=True)
class Plan:
    """Everything that a span of rows needs to become a shard, but the model itself."""

    config: ScoreConfig
    source: Source
    tokenizer: PreTrainedTokenizerBase
    row_format: RowFormat
    encoder: Encoder
    info: ModelInfo
    weights: Weights
    schema: pa.Schema
    columns: tuple[str, ...]
    max_length: int
    long_documents: str
    window_start: tuple[int, ...]
    disagreement: Disagreement
    identity: dict[str, Any]
    special_ids: list[int]
    tokenizer_origin: dict[str, str]

    @property
    def late_columns(self) -> tuple[str, ...]:
        """Columns that would matter and that the source does not have, as far as was seen: later rows may."""
        return tuple(name for name in self.row_format.decisive if name not in self.source.columns)

    @property
    def exact_units(self) -> bool:
        """Whether a span's share of the source can be told to the byte: not inside a compressed file."""
        return not any(split_extension(str(f["name"]))[1] for f in self.source.identity().get("files", []))

    @property
    def score_columns(self) -> tuple[str, ...]:
        """Names of the score columns, in the order in which the backend gives the scores of a sequence."""
        return score_columns(logprob=self.config.logprob)

    @property
    def fingerprint(self) -> str:
        """Digest of the identity."""
        return digest.of_json(self.identity)


def make_plan(
    config: ScoreConfig, known_files: dict[str, list[Any]] | None, begun: Mapping[str, Any] | None = None
) -> Plan:
    """Open and check everything a run needs, cheapest first.

    Args:
        config: the settings.
        known_files: what an earlier run noted of the model's files.
        begun: the identity of the directory that is continued, if it is: forms of rows that earlier versions had are
            kept where the settings leave them open.

    Raises:
        EntrodropError: the error of whatever does not fit.
    """
    info = inspect_model(config)
    if config.score_dtype == "auto":
        config = replace(config, score_dtype=_score_dtype(info, begun))
    source = open_source(
        config.source,
        split=config.split,
        split_given=config.split != "train",
        config=config.config,
        limit=config.limit,
        revision=_source_revision(config, info),
        stream=config.stream,
        text_rows=config.text_rows,
        max_row_bytes=config.max_row_bytes,
    )
    if config.text_rows == "line" and source.identity().get("format") != "text":
        raise ConfigError(
            "--text-rows line has no use: it is for .txt and .text files", where=source.name, fix="leave it out"
        )
    if source.identity().get("kind") == "hub":
        log.info("%s at commit %s", source.name, source.identity()["revision"])
    row_format = detect_format(source.columns, config)
    log.info("%s: %s", source.name, row_format.describe())
    _warn_of_unread(source, row_format)
    columns = _columns(config, source, row_format)
    source.check(columns)
    max_length = info.max_length(config.max_length)
    if config.overlap >= max_length:
        raise ConfigError(
            f"--overlap {config.overlap} is not below the longest row, {max_length} tokens", fix="lower --overlap"
        )
    origin = tokenizer_origin(config.tokenizer) if config.tokenizer else {"name": info.name}
    if info.commit and not config.tokenizer:
        origin["commit"] = info.commit
    tokenizer = load_tokenizer(
        config.tokenizer or config.model,
        revision=origin.get("commit") if config.tokenizer else info.commit or config.revision,
        trust_remote_code=config.trust_remote_code,
        chat_template_file=config.chat_template,
    )
    reference = tokenizer
    if config.tokenizer:
        reference = load_tokenizer(
            config.model,
            revision=info.commit or config.revision,
            trust_remote_code=config.trust_remote_code,
            chat_template_file=None,
        )
    long_documents = config.long_documents
    if long_documents == "auto":
        long_documents = "split" if row_format.is_plain else "drop"
    append_eos = config.append_eos
    if append_eos and row_format.kind in ("text", "prompt_completion", "alpaca"):
        if tokenizer.eos_token_id is None:
            log.warning("the tokenizer has no EOS token: texts end without one")
        elif ends_itself(tokenizer) and not (begun and begun.get("append_eos")):
            append_eos = False  # it resolves to that: the tokenizer adds EOS, whatever the setting says
    stops = stop_ids(config.model, info.commit, info.vocab_size)
    if config.tokenizer:
        stops = sorted({*stops, *stop_ids(config.tokenizer, origin.get("commit"), info.vocab_size)})
    start = _window_start(config, tokenizer, row_format) if long_documents == "split" else ()
    if start and begun and "window_bos" not in begun:
        log.info("windows after the first stay without BOS, as the directory was begun")
        start = ()
    if new_tokens(max_length, config.overlap, start) < 1:
        raise ConfigError(
            f"windows of {max_length} tokens have no room for new ones beside BOS and those of --overlap",
            fix="raise --max-length, lower --overlap, or add --window-bos off",
        )
    weights = identify_weights(config, info, known_files)
    info = replace(info, identity=identity_name(weights.identity))
    kept = _kept_fields(config, source, columns)
    encoder = Encoder(
        tokenizer,
        row_format,
        append_eos=append_eos,
        chat_template_kwargs=config.chat_template_kwargs,
        train_on=config.train_on,
        stops=stops,
        cut_to=None if long_documents == "split" else max_length,
    )
    appended = encoder.appended_turn_end()
    identity = {
        "schema": SCORED,
        "estimator": "exact",  # as it was when there was another
        **{k: v for k, v in setting_identity(config).items() if k not in _RESOLVED},
        "append_eos": append_eos,
        "source": source.identity(),
        "row_format": row_format.describe(),
        "model": weights.identity,
        "vocab_size": info.vocab_size,
        "dtype": info.dtype,
        "tokenizer": tokenizer_digest(tokenizer),
        "max_length": max_length,
        "long_documents": long_documents,
        "kept_types": [f"{f.name}: {f.type}" for f in kept],
        # Left out where it changes nothing, so that directories made before there was such a key can be continued.
        **({"window_bos": "on"} if start else {}),
        **({"train_on": config.train_on} if config.train_on != "all-turns" else {}),
        **({"appended_turn_end": appended} if appended else {}),
    }
    return Plan(
        config=config,
        source=source,
        tokenizer=tokenizer,
        row_format=row_format,
        info=info,
        weights=weights,
        columns=columns,
        encoder=encoder,
        schema=scored_schema(
            config.score_dtype,
            logprob=config.logprob,
            with_id=bool(config.id_column),
            kept=kept,
        ),
        max_length=max_length,
        long_documents=long_documents,
        window_start=start,
        disagreement=vocabulary_disagreement(tokenizer, reference, info.vocab_size),
        identity=identity,
        special_ids=sorted({*special_ids(tokenizer), *stops, *encoder.turn_end_ids()}),
        tokenizer_origin=origin,
    )


def _warn_of_unread(source: Source, row_format: RowFormat) -> None:
    """Say so where columns that are not read may say what a row is, or what of it is trained on."""
    others = [name for name in source.columns if name not in row_format.columns]
    unread = [name for name in others if name in ("system", "history")]
    if unread and not row_format.is_plain:
        log.warning(
            "%s: column %r is not read: there is no place for it in rows of %s; give such rows as messages",
            *(source.name, unread[0], " and ".join(row_format.main)),
        )
    unread = [name for name in others if _MASK.search(name)]
    if unread and row_format.kind == "input_ids":
        log.warning(
            "%s: columns beside the token ids that are not read: %s; what is trained on is read from labels alone, or "
            "from completion_mask and assistant_masks (1: trained on), and each row is taken to be one document",
            *(source.name, ", ".join(unread)),
        )


def _score_dtype(info: ModelInfo, begun: Mapping[str, Any] | None) -> Any:
    """What ``--score-dtype auto`` is: what the directory was begun with, else no more digits than the model gives."""
    same = begun if begun and begun.get("dtype") == info.dtype else {}
    return same.get("score_dtype") or ("float32" if info.dtype == "float32" else "float16")


def _window_start(config: ScoreConfig, tokenizer: PreTrainedTokenizerBase, row_format: RowFormat) -> tuple[int, ...]:
    """Ids that further windows begin with where their document does: what the tokenizer puts before a text.

    A tokenizer that puts nothing there gives texts without BOS. Rows that come tokenized or from a chat template may
    begin with BOS all the same.
    """
    if config.window_bos == "off":
        return ()
    before, _ = added_ids(tokenizer)
    if before or row_format.kind == "text" or tokenizer.bos_token_id is None:
        return before
    return (int(tokenizer.bos_token_id),)


def _source_revision(config: ScoreConfig, info: ModelInfo) -> str | None:
    """The revision of the source: ``--revision`` is the model's where the model has any."""
    if config.source_revision is not None or config.revision is None or info.commit is not None:
        return config.source_revision
    return config.revision


def _columns(config: ScoreConfig, source: Source, row_format: RowFormat) -> tuple[str, ...]:
    """Columns to read. Raises ConfigError for one that is not there or whose name is taken."""
    extra = [*([config.id_column] if config.id_column else []), *config.keep_columns]
    for name in extra:
        if name not in source.columns:
            raise ConfigError(
                f"there is no column {name!r}", where=source.name, fix=f"its columns are: {', '.join(source.columns)}"
            )
    for name in config.keep_columns:
        if name in RESERVED:
            raise ConfigError(
                f"--keep-columns cannot keep a column called {name!r}: the scored dataset has its own",
                where=source.name,
                fix="rename it in the source",
            )
    return tuple(dict.fromkeys([*row_format.columns, *extra]))


def _kept_fields(config: ScoreConfig, source: Source, columns: tuple[str, ...]) -> list[pa.Field]:
    """Arrow fields of the kept columns, inferred from the first rows."""
    if not config.keep_columns:
        return []
    values: dict[str, list[Any]] = {name: [] for name in config.keep_columns}
    row, position = 0, None
    while row < TYPE_SAMPLE_ROWS:
        chunk = source.read(row, TYPE_SAMPLE_ROWS - row, position, columns, READ_BYTES)
        for found in (r.values for r in chunk.rows if r.values is not None):
            for name, cells in values.items():
                cells.append(found.get(name))
        row, position = row + len(chunk.rows), chunk.next
        if position is None:
            break
    return [infer_field(name, cells, source.name) for name, cells in values.items()]
