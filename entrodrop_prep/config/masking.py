"""Settings of ``materialize``, and the recipe file that holds those which decide the masks."""

from __future__ import annotations

import dataclasses
import difflib
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

from entrodrop_prep.config.expansion import bounded
from entrodrop_prep.config.settings import Setting, build, flag, is_number, validate
from entrodrop_prep.config.workers import CLAIM_TIMEOUT, GPUS_PER_WORKER, RAY, WORKER, WORKERS, check_worker
from entrodrop_prep.errors import ConfigError

EXTRA_COLUMNS = ("n_trainable", "position_ids", "seq_lengths")
"""What ``add_columns`` may name, in the order of the files' columns."""


class Selection(NamedTuple):
    """Which tokens may be dropped: those on one side of a threshold of a score."""

    score: Literal["entropy", "surprisal", "excess"] | None
    """What is compared, nats; None where any token may be dropped. Surprisal is -logprob; excess is the surprisal of
    these scores minus that of ``against_scores``."""
    high: bool = False
    """Whether those at the threshold and above are selected, else those at it and below."""


SELECTIONS = {
    "low-entropy": Selection("entropy"),
    "high-entropy": Selection("entropy", high=True),
    "random": Selection(None),
    "low-surprisal": Selection("surprisal"),
    "high-surprisal": Selection("surprisal", high=True),
    "low-excess": Selection("excess"),
    "high-excess": Selection("excess", high=True),
}
"""The values of ``select``."""

DRAWN = ("random", "uniform")
"""Values of ``drop_token`` that draw a token: from the corpus's frequencies, or each id as often as any other."""

if TYPE_CHECKING:
    Select = str
else:
    Select = Literal[tuple(SELECTIONS)]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What decides which tokens are dropped in which epoch, and what a dropped token looks like.

    Everything here but ``epochs`` is part of the masks' identity; ``epochs`` is so only through ``horizon``.
    """

    epochs: Annotated[int, Setting("Number of epochs to write.", ge=1, le=65535, role="operation")]
    target: Annotated[
        Literal["labels", "inputs", "both"],
        Setting(
            "What a dropped token loses: its label (-100), its input id (replaced), or both.", panel="What is dropped"
        ),
    ] = "labels"
    drop_token: Annotated[
        str,
        Setting(
            "Replacement for a dropped input id: random draws from the corpus's unigram distribution, uniform from the "
            "tokenizer's whole vocabulary, both without special tokens.",
            metavar="random|uniform|ID|TEXT",
            panel="What is dropped",
        ),
    ] = "random"
    select: Annotated[
        Select,
        Setting(
            "Which tokens may be dropped; high-entropy and random are control arms. Surprisal is -logprob; excess is "
            "the surprisal here minus that in --against-scores.",
            panel="What is dropped",
        ),
    ] = "low-entropy"
    quantile: Annotated[
        float | None,
        Setting(
            "Share of the trainable tokens that may be dropped: those of lowest entropy, surprisal or excess, with "
            "--select high-... those of highest; with --select random any may, at that share of the drop rate.",
            ge=0,
            le=1,
            default_text="0.5",
            panel="What is dropped",
        ),
    ] = None
    threshold: Annotated[
        float | None,
        Setting(
            "Entropy, surprisal or excess in nats, instead of --quantile: tokens at it or below may be dropped, with "
            "--select high-... those at it or above.",
            metavar="NATS",
            panel="What is dropped",
        ),
    ] = None
    scope: Annotated[
        str,
        Setting(
            "What the quantile is taken over: all trainable tokens, those of each row, of each source, or of each "
            "value of a kept column of the scored shards.",
            metavar="corpus|row|source|column:C",
            panel="What is dropped",
        ),
    ] = "corpus"
    protect: Annotated[
        str,
        Setting(
            "Tokens never dropped nor replaced: special ones and those that generation stops with, none, or a list.",
            metavar="special|none|ID,ID",
            panel="What is dropped",
        ),
    ] = "special"
    keep_surprising: Annotated[
        float | None,
        Setting(
            "Never drop a token whose -logprob exceeds this: the model was confident, and wrong.",
            ge=0,
            metavar="NATS",
            default_text="off",
            panel="What is dropped",
        ),
    ] = None
    schedule: Annotated[
        Literal["sigmoid", "linear", "cosine", "constant", "step"],
        Setting("How the drop rate grows with progress p from 0 to 1.", panel="Curriculum"),
    ] = "sigmoid"
    max_rate: Annotated[float, Setting("Highest drop rate of an eligible token.", ge=0, le=1, panel="Curriculum")] = 0.8
    min_rate: Annotated[float, Setting("Lowest drop rate of an eligible token.", ge=0, le=1, panel="Curriculum")] = 0.0
    steepness: Annotated[float, Setting("Slope K of the sigmoid, per unit of progress.", gt=0, panel="Curriculum")] = (
        10.0
    )
    midpoint: Annotated[
        float,
        Setting("Progress at which the sigmoid is half-way, or the step happens.", ge=0, le=1, panel="Curriculum"),
    ] = 0.5
    rates: Annotated[
        tuple[float, ...] | None,
        Setting(
            "Drop rate of each epoch in turn, instead of a schedule.",
            metavar="A,B,...",
            default_text="from the schedule",
            panel="Curriculum",
        ),
    ] = None
    progress: Annotated[
        Literal["epoch", "row"],
        Setting("Whether the rate is one number an epoch, or grows row by row in training order.", panel="Curriculum"),
    ] = "epoch"
    horizon: Annotated[
        int | None,
        Setting(
            "Number of epochs that the curriculum spans. With the same horizon, more epochs leave earlier ones as they "
            "are.",
            ge=1,
            le=65535,
            default_text="--epochs",
            panel="Curriculum",
        ),
    ] = None
    shuffle: Annotated[
        Literal["epoch", "once", "none"],
        Setting(
            "Row order: a new one each epoch, one for all epochs, or the source's. Trainers must then read in order.",
            panel="Rows",
        ),
    ] = "epoch"
    seed: Annotated[int, Setting("Seed of every random choice.", ge=0, le=2**63 - 1)] = 0

    @property
    def scope_column(self) -> str | None:
        """The column each of whose values has a threshold of its own, if ``scope`` names one."""
        kind, _, column = self.scope.partition(":")
        return column if kind == "column" and column else None

    @property
    def selection(self) -> Selection:
        """What ``select`` means."""
        return SELECTIONS[self.select]

    @property
    def needs_logprob(self) -> bool:
        """Whether log-probabilities decide anything."""
        return self.keep_surprising is not None or self.selection.score == "surprisal"

    def check(self) -> None:
        """Rules that span several fields. Raises ConfigError."""
        if self.threshold is not None and self.quantile is not None:
            raise ConfigError("--quantile and --threshold exclude each other", fix="give one of them")
        if self.threshold is not None and self.selection.score is None:
            raise ConfigError(
                f"--select {self.select} has no threshold", fix="give --quantile, the share that may be dropped"
            )
        if self.threshold is not None and self.threshold < 0 and self.selection.score != "excess":
            raise ConfigError(
                f"--threshold {self.threshold:g} is below 0, and {self.selection.score} never is",
                fix="give a number from 0 on",
            )
        if self.scope not in ("corpus", "row", "source") and self.scope_column is None:
            raise ConfigError(
                f"--scope {self.scope!r} is not understood", fix="give corpus, row, source, or column:C with a column C"
            )
        if self.threshold is not None and self.scope != "corpus":
            raise ConfigError(
                "--threshold is the same number for every row", fix=f"leave out --scope {self.scope}, or use --quantile"
            )
        if self.min_rate > self.max_rate:
            raise ConfigError(f"--min-rate {self.min_rate} is above --max-rate {self.max_rate}", fix="swap them")
        if self.drop_token != "random" and self.target == "labels":
            raise ConfigError(
                "--drop-token has no use with --target labels, which leaves the input as it is",
                fix="add --target inputs or --target both",
            )
        horizon = self.horizon or self.epochs
        if self.rates is not None:
            if len(self.rates) != horizon:
                raise ConfigError(
                    f"--rates gives {len(self.rates)} rates for {horizon} epochs",
                    fix="give one rate for each epoch of the horizon",
                )
            bad = [r for r in self.rates if not 0 <= r <= 1]
            if bad:
                raise ConfigError(f"--rates holds {bad[0]:g}", fix="a rate lies between 0 and 1")
            if self.progress == "row":
                raise ConfigError(
                    "--rates gives one rate an epoch, --progress row one a row", fix="leave out one of them"
                )
            defaults = {f.name: f.default for f in dataclasses.fields(Recipe)}
            for name in ("schedule", "max_rate", "min_rate", "steepness", "midpoint"):
                if getattr(self, name) != defaults[name]:
                    raise ConfigError(f"--rates and {flag(name)} exclude each other", fix="leave out one of them")
            if self.epochs > horizon:
                raise ConfigError(f"--rates covers {horizon} epochs, --epochs asks for {self.epochs}", fix="add rates")
        if self.protect not in ("special", "none"):
            for item in self.protect.split(","):
                if item.strip() != "special" and not is_number(item.strip()):
                    raise ConfigError(
                        f"--protect {self.protect!r} is not understood",
                        fix="give special, none, or token ids separated by commas",
                    )


@dataclass(frozen=True, kw_only=True)
class MaterializeConfig(Recipe):
    """Settings of ``entrodrop materialize``: a recipe, and where the result goes."""

    scored: Annotated[
        str | tuple[str, ...],
        Setting(
            "Scored directory; or several to mix, each as NAME=SCORED[:WEIGHT]. A WEIGHT of 2 puts each row twice into "
            "every epoch, 0.5 half of the rows, chosen again each epoch.",
            argument=True,
            role="operation",
            repeat=True,
            whole=True,
        ),
    ]
    out: Annotated[str, Setting("Directory for the masked dataset.", metavar="DIR", role="operation")]
    plain: Annotated[
        tuple[str, ...],
        Setting(
            "Source whose rows are mixed in and never masked (replay). May be repeated.",
            metavar="NAME=SCORED[:WEIGHT]",
            role="operation",
            repeat=True,
            whole=True,
            panel="Rows",
        ),
    ] = ()
    against_scores: Annotated[
        tuple[str, ...],
        Setting(
            "For --select low-excess and high-excess: scores of the same rows by another model, whose surprisal is "
            "subtracted. With several sources, once for each that is masked.",
            metavar="[NAME=]SCORED2",
            role="operation",
            repeat=True,
            whole=True,
            panel="What is dropped",
        ),
    ] = ()
    eval: Annotated[
        str | None,
        Setting(
            "Scored directory to write once, with all its labels, as the split `validation` of every configuration.",
            metavar="SCORED",
            role="operation",
        ),
    ] = None
    eval_fraction: Annotated[
        float | None,
        Setting(
            "Share of the rows to hold out, chosen by the seed, as the split `validation` instead of --eval: never "
            "masked, never trained on, in no threshold. Of several sources each masked one gives its share.",
            gt=0,
            lt=1,
            default_text="off",
        ),
    ] = None
    plain_config: Annotated[
        bool,
        Setting(
            "Write a configuration `plain` too: the rows of epoch 0 in its order, with nothing dropped.", panel="Rows"
        ),
    ] = False
    only_epochs: Annotated[
        str | None,
        Setting(
            "Write only these epochs, e.g. 2-5: the rest may be written elsewhere or later.",
            metavar="A-B",
            role="operation",
            default_text="all",
            panel="Rows",
        ),
    ] = None
    recipe: Annotated[
        str | None,
        Setting("YAML or JSON file of settings; flags beside it win.", metavar="FILE", role="operation"),
    ] = None
    layout: Annotated[
        tuple[Literal["epochs", "concatenated", "jsonl"], ...],
        Setting(
            "What to derive from the finished epochs: concatenated is one folder of all epochs in order, as Parquet "
            "and as `datasets` saves it to disk; jsonl is one text file an epoch. May be repeated, and added later.",
            metavar="epochs|concatenated|jsonl",
            role="operation",
            repeat=True,
            whole=True,
            default_text="epochs",
            panel="Files",
        ),
    ] = ("epochs",)
    add_columns: Annotated[
        tuple[Literal["n_trainable", "position_ids", "seq_lengths"], ...],
        Setting(
            "Columns beside the usual three: n_trainable (tokens before dropping), position_ids (from 0 in each "
            "document), seq_lengths (of the row's documents). Some trainers give every column to the model.",
            metavar="NAME,...",
            default_text="none",
            panel="Files",
        ),
    ] = ()
    pack: Annotated[
        int | None,
        Setting(
            "Pack the rows of each epoch into rows of at most this many tokens; longer ones are cut. Add "
            "--add-columns position_ids to keep their documents apart.",
            ge=2,
            metavar="TOKENS",
            default_text="off",
            panel="Rows",
        ),
    ] = None
    rows_multiple: Annotated[
        int | None,
        Setting(
            "Leave out the last rows of each epoch so that their number is a multiple of this, such as the global "
            "batch.",
            ge=1,
            metavar="N",
            default_text="off",
            panel="Rows",
        ),
    ] = None
    rows_per_shard: Annotated[int, Setting("Rows in one output file.", ge=1, panel="Files")] = 100_000
    compression: Annotated[
        Literal["zstd", "snappy", "none"], Setting("Compression of the Parquet files.", panel="Files")
    ] = "zstd"
    jobs: Annotated[
        str,
        Setting(
            "Files written at the same time, a thread for each; auto takes as many as there are processors. It changes "
            "no byte.",
            metavar="auto|N",
            role="operation",
            panel="Resume and workers",
        ),
    ] = "auto"
    push_to_hub: Annotated[
        str | None,
        Setting(
            "Dataset repository to push the finished directory to, as `entrodrop push` does by default: private.",
            metavar="USER/NAME",
            role="operation",
            panel="Hub",
        ),
    ] = None
    worker: Annotated[str | None, WORKER] = None
    claim_timeout: Annotated[float, CLAIM_TIMEOUT] = 600.0
    ray: Annotated[str | None, RAY] = None
    workers: Annotated[int | None, WORKERS] = None
    gpus_per_worker: Annotated[int, GPUS_PER_WORKER] = 0
    dry_run: Annotated[
        bool,
        Setting(
            "Say how many rows, tokens and dropped labels each epoch has, and what disk, memory and time writing them "
            "takes, and stop. Nothing is written but temporary files in TMPDIR: some files are made there.",
            role="operation",
        ),
    ] = False
    overwrite: Annotated[
        bool,
        Setting(
            "Throw away what an earlier run left in --out and start over.", role="operation", panel="Resume and workers"
        ),
    ] = False

    def __post_init__(self) -> None:
        validate(self)
        object.__setattr__(self, "add_columns", tuple(c for c in EXTRA_COLUMNS if c in self.add_columns))
        if not self.sources:
            raise ConfigError("SCORED is missing", fix="give a scored directory")
        self.check()
        if self.selection.score == "excess" and not self.against_scores:
            raise ConfigError(
                f"--select {self.select} compares two scored directories",
                fix="add --against-scores SCORED2, the same rows scored by another model",
            )
        if self.against_scores and self.selection.score != "excess":
            raise ConfigError(
                f"--against-scores has no use with --select {self.select}",
                fix="give --select low-excess or high-excess, or leave it out",
            )
        if self.eval is not None and self.eval_fraction is not None:
            raise ConfigError("--eval and --eval-fraction exclude each other", fix="leave out one of them")
        self.epochs_to_write()
        check_worker(self)
        if self.worker and self.push_to_hub:
            raise ConfigError(
                "--push-to-hub and --worker exclude each other", fix="push the finished directory with `entrodrop push`"
            )
        if self.jobs != "auto" and not (is_number(self.jobs) and int(self.jobs)):
            raise ConfigError(f"--jobs {self.jobs!r} is not understood", fix="give auto, or a number from 1 on")

    @property
    def sources(self) -> tuple[str, ...]:
        """``scored``, each of them."""
        return (self.scored,) if isinstance(self.scored, str) else self.scored

    def epochs_to_write(self) -> range:
        """The epochs this run writes. Raises ConfigError for a range that is not inside ``epochs``."""
        if self.only_epochs is None:
            return range(self.epochs)
        first, to, last = (part.strip() for part in self.only_epochs.partition("-"))
        last = last if to else first
        if not (is_number(first) and is_number(last)):
            raise ConfigError(f"--only-epochs {self.only_epochs!r} is not understood", fix="write it as 2 or 2-5")
        chosen = range(int(first), int(last) + 1)
        if not chosen or chosen[-1] >= self.epochs:
            raise ConfigError(
                f"--only-epochs {self.only_epochs} is not inside epochs 0 to {self.epochs - 1}",
                fix="epochs count from 0",
            )
        return chosen

    @classmethod
    def load(cls, recipe: str | None = None, **flags: Any) -> MaterializeConfig:
        """Settings from a recipe file (YAML or JSON) with ``flags`` laid over it. Raises ConfigError.

        A flag also replaces what it excludes: ``--threshold`` replaces the file's ``quantile``.
        """
        values = {**read_recipe(recipe), "recipe": recipe} if recipe else {}
        gone = {other for name in flags for other in _INSTEAD.get(name, ())}
        return build(cls, {**{name: value for name, value in values.items() if name not in gone}, **flags})


_INSTEAD = {
    "quantile": ("threshold",),
    "threshold": ("quantile",),
    "rates": ("schedule", "max_rate", "min_rate", "steepness", "midpoint"),
    "schedule": ("rates",),
}
"""Flag -> settings of a recipe file that have no say beside it."""


def _parsed(text: str) -> Any:
    """YAML, or JSON that YAML does not take (indented with tabs). Raises yaml.YAMLError."""
    import yaml

    try:
        return bounded(yaml.safe_load(text))
    except yaml.YAMLError:
        try:
            return json.loads(text)
        except ValueError:
            pass
        raise


def _names(text: str) -> list[str]:
    """The settings that YAML names, each as often as it does. Raises ValueError for 010 and 1:30, which it counts by 8
    and 60."""
    import yaml

    try:
        node: Any = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError:  # JSON, indented with tabs
        pairs: Any = json.loads(text, object_pairs_hook=list)
        return [str(name).replace("-", "_") for name, _ in pairs]
    for key, value in node.value:
        for scalar in value.value if isinstance(value, yaml.SequenceNode) else [value]:
            if scalar.tag in _NUMBERS and _ODD_NUMBER.match(scalar.value):
                raise ValueError(f"{key.value} is {scalar.value}, which YAML reads as {_parsed(scalar.value)}")
    return [str(key.value).replace("-", "_") for key, _ in node.value]


_NUMBERS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")
_ODD_NUMBER = re.compile(r"[-+]?(0[0-7_]|[0-9_.]+:)")
RECIPE_FIELDS = tuple(f.name for f in dataclasses.fields(Recipe))


def read_recipe(path: str) -> dict[str, Any]:
    """The settings in a recipe file, keys checked. Raises ConfigError naming the file and the key."""
    import yaml

    if os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path):
        raise ConfigError("cannot read the recipe: it is a pipe, socket or device", where=path, fix="check the path")
    try:
        text = Path(path).read_text(encoding="utf-8")
        values = _parsed(text)
    except OSError as e:
        raise ConfigError(f"cannot read the recipe: {e.strerror}", where=path, fix="check the path") from e
    except (yaml.YAMLError, ValueError, RecursionError) as e:
        raise ConfigError(f"the recipe is neither YAML nor JSON: {e}", where=path, fix="correct the file") from e
    if not isinstance(values, dict):
        raise ConfigError(
            "the recipe is not a table of settings", where=path, fix="write lines such as `quantile: 0.5`"
        )
    allowed = (*RECIPE_FIELDS, "rows_per_shard", "compression")
    try:
        names = _names(text)
    except ValueError as e:
        raise ConfigError(str(e), where=path, fix="write it as a plain decimal number") from e
    for n, name in enumerate(names):
        if name in names[:n]:
            raise ConfigError(f"it sets {name} twice", where=path, fix="leave one of the two")
    values = {str(key).replace("-", "_"): value for key, value in values.items()}
    for key in values:
        if key not in allowed:
            near = difflib.get_close_matches(key, allowed, n=1)
            fix = f"did you mean {near[0]}?" if near else f"settings are: {', '.join(allowed)}"
            raise ConfigError(f"unknown setting {key!r}", where=path, fix=fix)
    return values
