"""Settings of ``score`` and ``serve``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from entrodrop_prep.config.settings import Setting, is_number, validate
from entrodrop_prep.config.workers import CLAIM_TIMEOUT, GPUS_PER_WORKER, RAY, WORKER, WORKERS, check_worker
from entrodrop_prep.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class ScoreConfig:
    """Settings of ``entrodrop score``: which rows, which model, how long documents are cut, how scores are stored."""

    source: Annotated[
        str,
        Setting(
            "What to score: a Hub dataset id, a save_to_disk directory, or local files: a file, a directory, a glob or "
            "an fsspec URL of Parquet, JSONL/JSON (.gz, .zst, .bz2, .xz too), CSV, Arrow or text (one row a file).",
            argument=True,
        ),
    ]
    model: Annotated[str, Setting("Reference model: a local directory or a Hub id. It is only read.")]
    out: Annotated[
        str,
        Setting("Directory for the scored shards, on a local or shared disk.", metavar="DIR", role="operation"),
    ]
    backend: Annotated[
        Literal["auto", "transformers", "vllm", "server"],
        Setting(
            "What computes the scores: transformers; vLLM, started here; or vLLM servers that run already. auto takes "
            "vLLM where it is installed and proven for the model's architecture, else transformers.",
            role="operation",
        ),
    ] = "auto"
    revision: Annotated[
        str | None,
        Setting(
            "Revision (branch, tag or commit) of the model on the Hub; where the model is a local directory, of the "
            "Hub dataset, as --source-revision.",
            default_text="the default branch",
            panel="Model",
        ),
    ] = None
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16", "auto"],
        Setting(
            "Number format the model runs in; auto takes the checkpoint's. The entropy is float32 arithmetic always.",
            panel="Model",
        ),
    ] = "auto"
    device: Annotated[
        Literal["auto", "cpu", "cuda", "mps"],
        Setting("Where the model runs; auto takes a GPU where there is one.", role="operation", panel="Model"),
    ] = "auto"
    tokenizer: Annotated[
        str | None,
        Setting(
            "Tokenizer you will train with: directory or Hub id. Every id in use must mean the same token to the "
            "model.",
            default_text="the model's",
            panel="Model",
        ),
    ] = None
    chat_template: Annotated[
        str | None,
        Setting(
            "Used instead of the tokenizer's chat template: a Jinja file, or chatml, a template that comes with this "
            "program (a file of that name goes first).",
            metavar="FILE|chatml",
            panel="Chats",
        ),
    ] = None
    chat_template_kwargs: Annotated[
        dict[str, Any] | None,
        Setting(
            "JSON object of variables for the chat template, e.g. '{\"enable_thinking\": false}'.",
            metavar="JSON",
            panel="Chats",
        ),
    ] = None
    split: Annotated[str, Setting("Split to read, where the source has splits.", panel="Hub datasets")] = "train"
    config: Annotated[
        str | None,
        Setting("Configuration (subset) of a Hub dataset.", metavar="NAME", panel="Hub datasets"),
    ] = None
    source_revision: Annotated[
        str | None,
        Setting(
            "Revision (branch, tag or commit) of a Hub dataset; what it resolves to is recorded.",
            metavar="TEXT",
            default_text="the default branch",
            panel="Hub datasets",
        ),
    ] = None
    stream: Annotated[
        bool,
        Setting(
            "Read a Hub dataset over the network as it is scored, and store nothing of it in the cache.",
            role="operation",
            panel="Hub datasets",
        ),
    ] = False
    text_rows: Annotated[
        Literal["document", "line"],
        Setting(
            "What of a text file (.txt, .text) is one row: the whole document, or each line.",
            role="operation",
            panel="Rows",
        ),
    ] = "document"
    max_row_bytes: Annotated[
        int,
        Setting(
            "Largest row that is read, in bytes as it is stored (decompressed). A larger one is a bad row, and is not "
            "held in memory.",
            metavar="BYTES",
            ge=1024,
            role="operation",
            default_text="33554432, 32 MiB",
            panel="Rows",
        ),
    ] = 32 << 20
    text_column: Annotated[str | None, Setting("Column of plain text.", default_text="detected", panel="Rows")] = None
    prompt_column: Annotated[str | None, Setting("Column of prompts.", default_text="detected", panel="Rows")] = None
    completion_column: Annotated[
        str | None, Setting("Column of completions.", default_text="detected", panel="Rows")
    ] = None
    messages_column: Annotated[
        str | None, Setting("Column of chat messages.", default_text="detected", panel="Chats")
    ] = None
    train_on: Annotated[
        Literal["all-turns", "last-turn"],
        Setting(
            "Which of a chat's assistant messages are trained on: all, or the last. A message with `train` false or "
            "`weight` 0 is not.",
            panel="Chats",
        ),
    ] = "all-turns"
    id_column: Annotated[
        str | None,
        Setting(
            "Column that names each row; it is kept as `id`, must be unique, and is shown in messages.", panel="Rows"
        ),
    ] = None
    keep_columns: Annotated[
        tuple[str, ...],
        Setting(
            "Source columns to carry into the scored shards. Their types are those of the first 1,000 rows; a later "
            "row of another type is a bad row.",
            metavar="A,B",
            panel="Rows",
        ),
    ] = ()
    limit: Annotated[int | None, Setting("Score only the first N rows.", ge=1)] = None
    max_length: Annotated[
        int | None,
        Setting("Longest row in tokens.", ge=2, default_text="the model's context, at most 4096"),
    ] = None
    long_documents: Annotated[
        Literal["auto", "split", "truncate", "drop", "error"],
        Setting(
            "What happens to rows over --max-length. auto splits plain and pre-tokenized text and drops (and lists) "
            "chats and prompt/completion rows: half a conversation is not a conversation.",
            panel="Long documents",
        ),
    ] = "auto"
    overlap: Annotated[
        int,
        Setting(
            "Tokens of the window before that each further window of a split document repeats as context. At least one "
            "is always repeated.",
            ge=0,
            panel="Long documents",
        ),
    ] = 0
    window_bos: Annotated[
        Literal["auto", "off"],
        Setting(
            "Whether further windows of a split document begin with the BOS token, as context. auto: where the "
            "document does.",
            panel="Long documents",
        ),
    ] = "auto"
    append_eos: Annotated[
        bool,
        Setting(
            "End plain text and plain completions with the EOS token where they do not already (chats never need it).",
            panel="Rows",
        ),
    ] = True
    rows_per_shard: Annotated[
        int,
        Setting(
            "Source rows in one shard: the unit of work, and the most that a killed run loses. One shard is held in "
            "memory: lower it for very long documents.",
            ge=1,
            panel="Scores",
        ),
    ] = 2000
    score_dtype: Annotated[
        Literal["auto", "float16", "float32"],
        Setting(
            "Number format the scores are stored in. float16 halves their size and keeps about three digits. auto "
            "takes it where the model runs in bfloat16 or float16, which give no more.",
            panel="Scores",
        ),
    ] = "auto"
    logprob: Annotated[bool, Setting("Store the log-probability of each token beside the entropy.", panel="Scores")] = (
        True
    )
    batch_tokens: Annotated[
        int,
        Setting(
            "Tokens in one forward pass, padding included. Halved on its own when memory runs out.",
            ge=1,
            role="operation",
            panel="Speed",
        ),
    ] = 8192
    compile: Annotated[
        bool,
        Setting(
            "Compile the model's layers, for --backend transformers on a CUDA GPU: twice as fast on an H100, after "
            "some 15 seconds.",
            role="operation",
            panel="Speed",
        ),
    ] = False
    engine_arg: Annotated[
        tuple[str, ...],
        Setting(
            "Option of the vLLM engine, such as tensor_parallel_size=2 or gpu_memory_utilization=0.8. May be repeated.",
            metavar="KEY=VALUE",
            role="operation",
            repeat=True,
            panel="vLLM",
        ),
    ] = ()
    replicas: Annotated[
        str,
        Setting(
            "vLLM engines to run side by side; auto starts one a GPU (or one a tensor-parallel group).",
            metavar="auto|N",
            role="operation",
            panel="vLLM",
        ),
    ] = "auto"
    logits_mib: Annotated[
        int | None,
        Setting(
            "Device memory in MiB for the logits that vLLM's engine reduces at a time.",
            ge=1,
            role="operation",
            default_text="1024, on a CPU 16",
            panel="vLLM",
        ),
    ] = None
    server: Annotated[
        tuple[str, ...],
        Setting(
            "vLLM servers with the plugin, as `entrodrop serve` starts them.",
            metavar="URL,URL",
            role="operation",
            panel="vLLM servers",
        ),
    ] = ()
    timeout: Annotated[
        float,
        Setting(
            "Seconds that a server's answer may take. Doubled when one takes longer.",
            gt=0,
            role="operation",
            panel="vLLM servers",
        ),
    ] = 60.0
    patience: Annotated[
        float,
        Setting(
            "Seconds without an answer from any server until the run stops.",
            gt=0,
            role="operation",
            panel="vLLM servers",
        ),
    ] = 120.0
    engine_timeout: Annotated[
        float,
        Setting(
            "Seconds without a finished step after which a vLLM engine counts as hung: it is ended, and its work goes "
            "to the others.",
            gt=0,
            role="operation",
            panel="vLLM",
        ),
    ] = 900.0
    self_check: Annotated[
        bool,
        Setting(
            "Before scoring with vLLM, score a fixed probe whole and in pieces, and against transformers where the "
            "model is small; stop at a difference.",
            role="operation",
            panel="vLLM",
        ),
    ] = True
    verbose: Annotated[bool, Setting("Show what the vLLM engine logs.", role="operation", panel="Terminal")] = False
    on_bad_row: Annotated[
        Literal["stop", "skip"],
        Setting(
            "Stop at the first bad row, or write it with the reason to rejected.jsonl and continue.",
            role="operation",
            panel="Rows",
        ),
    ] = "stop"
    worker: Annotated[str | None, WORKER] = None
    claim_timeout: Annotated[float, CLAIM_TIMEOUT] = 600.0
    ray: Annotated[str | None, RAY] = None
    workers: Annotated[int | None, WORKERS] = None
    gpus_per_worker: Annotated[int, GPUS_PER_WORKER] = 0
    dry_run: Annotated[
        bool,
        Setting(
            "Say how many rows and tokens there are, and what disk, memory and time scoring them takes, and stop. "
            "Nothing is written. Rows are sampled from all over the source, and some are scored.",
            role="operation",
        ),
    ] = False
    overwrite: Annotated[
        bool,
        Setting(
            "Throw away what an earlier run left in --out and start over.", role="operation", panel="Resume and workers"
        ),
    ] = False
    accept_environment_change: Annotated[
        bool,
        Setting(
            "Continue a run that was begun with other library versions or another device.",
            role="operation",
            panel="Resume and workers",
        ),
    ] = False
    trust_remote_code: Annotated[
        bool,
        Setting("Run Python code that comes with the model or the tokenizer.", role="operation", panel="Model"),
    ] = False
    allow_pickle: Annotated[
        bool,
        Setting("Also load weights that are not safetensors. A pickle can run code.", role="operation", panel="Model"),
    ] = False

    def __post_init__(self) -> None:
        validate(self)
        if bool(self.prompt_column) != bool(self.completion_column):
            raise ConfigError("--prompt-column and --completion-column go together", fix="give both or neither")
        chosen = [c for c in (self.text_column, self.prompt_column, self.messages_column) if c]
        if len(chosen) > 1:
            raise ConfigError(
                "--text-column, --prompt-column/--completion-column and --messages-column exclude each other",
                fix="give the columns of one row format",
            )
        if self.max_length is not None and self.overlap >= self.max_length:
            raise ConfigError(
                f"--overlap {self.overlap} is not below --max-length {self.max_length}",
                fix="a window must hold at least one token that the one before did not",
            )
        if len(set(self.keep_columns)) != len(self.keep_columns):
            raise ConfigError("--keep-columns names a column twice", fix="name each column once")
        check_worker(self)
        if self.replicas != "auto" and not (is_number(self.replicas) and int(self.replicas)):
            raise ConfigError(f"--replicas {self.replicas!r} is not understood", fix="give auto or a number of engines")
        if self.backend == "server" and not self.server:
            raise ConfigError(
                "--backend server needs --server", fix="give the URL of a server: `entrodrop serve` starts one"
            )
        if self.server and self.backend not in ("auto", "server"):
            raise ConfigError(f"--server and --backend {self.backend} exclude each other", fix="leave out one of them")
        if self.compile and (self.server or self.backend not in ("auto", "transformers")):
            raise ConfigError(
                "--compile applies to --backend transformers; vLLM compiles by itself", fix="leave it out"
            )
        for name in self.of_engines:
            if self.server:
                raise ConfigError(
                    f"{name} applies to engines started here, not of servers",
                    fix="leave it out, or give it to `entrodrop serve`",
                )
            if self.backend == "transformers":
                raise ConfigError(
                    f"{name} applies to vLLM's engines, --backend is transformers", fix="leave out one of them"
                )

    @property
    def of_engines(self) -> list[str]:
        """The flags given that only vLLM engines started here heed."""
        given = {
            "--engine-arg": bool(self.engine_arg),
            "--replicas": self.replicas != "auto",
            "--logits-mib": self.logits_mib is not None,
        }
        return [name for name, there in given.items() if there]


@dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """Settings of ``entrodrop serve``: which model, where it is served, and the engine's options."""

    model: Annotated[str, Setting("Reference model: a local directory or a Hub id.", argument=True)]
    host: Annotated[str, Setting("Address to listen on. Set ENTRODROP_API_KEY before you open it to others.")] = (
        "127.0.0.1"
    )
    port: Annotated[int, Setting("Port to listen on.", ge=1, le=65535)] = 8000
    revision: Annotated[
        str | None,
        Setting(
            "Revision (branch, tag or commit) of the model on the Hub.",
            default_text="the default branch",
            panel="Model",
        ),
    ] = None
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16", "auto"],
        Setting("Number format the model runs in; auto takes the checkpoint's.", panel="Model"),
    ] = "auto"
    max_length: Annotated[
        int | None,
        Setting("Longest row in tokens.", ge=2, default_text="the model's context, at most 4096", panel="vLLM"),
    ] = None
    batch_tokens: Annotated[int, Setting("Tokens in one forward pass.", ge=1, panel="vLLM")] = 8192
    engine_arg: Annotated[
        tuple[str, ...],
        Setting(
            "Option of the vLLM engine, such as tensor_parallel_size=2 or gpu_memory_utilization=0.8. May be repeated.",
            metavar="KEY=VALUE",
            repeat=True,
            panel="vLLM",
        ),
    ] = ()
    logits_mib: Annotated[
        int | None,
        Setting(
            "Device memory in MiB for the logits that are reduced at a time.",
            ge=1,
            default_text="as score's",
            panel="vLLM",
        ),
    ] = None
    trust_remote_code: Annotated[bool, Setting("Run Python code that comes with the model.", panel="Model")] = False
    allow_pickle: Annotated[
        bool, Setting("Also load weights that are not safetensors. A pickle can run code.", panel="Model")
    ] = False
    print_command: Annotated[bool, Setting("Print vLLM's own command line and stop.")] = False
    verbose: Annotated[bool, Setting("Show everything vLLM logs.", panel="Terminal")] = False

    def __post_init__(self) -> None:
        validate(self)
