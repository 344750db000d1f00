"""The ``entrodrop`` command: parse, call one function of the library, print.

Options are made from the settings in ``entrodrop_prep.config``. Nothing heavy is imported until a command runs.
"""

from __future__ import annotations

from entrodrop_prep.terminal.interrupt import INTERRUPTED, loaded  # isort: skip  (first: the others take time)

import dataclasses
import errno
import os
import shlex
import sys
import traceback
from contextlib import nullcontext
from types import TracebackType
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.exceptions import TyperException

from entrodrop_prep import __version__
from entrodrop_prep.cli.help import Program
from entrodrop_prep.cli.options import command
from entrodrop_prep.config import (
    MaterializeConfig,
    PushConfig,
    RecipeConfig,
    ScoreConfig,
    ServeConfig,
    build,
)
from entrodrop_prep.errors import EntrodropError
from entrodrop_prep.sources import given_paths as places
from entrodrop_prep.terminal.output import print_anything, say, tell
from entrodrop_prep.terminal.preemption import EXIT_CODE, Preempted, preemptible
from entrodrop_prep.terminal.text import one_line, printable, without_secrets

if TYPE_CHECKING:
    from entrodrop_prep.publish.push import PushSummary

app = typer.Typer(
    name="entrodrop",
    help="Entropy-guided token dropout as data preparation: score a corpus once with a frozen reference model, then "
    "write masked datasets, one an epoch, that trainers read unchanged.",
    cls=Program,
    context_settings={"help_option_names": ["--help", "-h"]},
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    epilog="$ entrodrop demo",
)


Directory = Annotated[str, typer.Argument(metavar="DIR", help="Scored or masked directory.")]


def _named(path: str) -> str:
    """A path as an argument in the shell."""
    return shlex.quote(f"./{path}" if path.startswith("-") else path)


@app.callback(invoke_without_command=True)
def _main(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and stop.", rich_help_panel="Terminal")
    ] = False,
) -> None:
    if version:
        print(f"entrodrop-prep {__version__}")
        raise typer.Exit()


def _check_score(config: ScoreConfig) -> None:
    """What can be said of the paths before anything heavy is imported. Raises the errors of ``places``."""
    if "://" in config.out:
        return
    if config.chat_template:
        places.check_template(config.chat_template)
    places.check_source(config.source, hub=True)
    places.check_model(config.model)
    if config.tokenizer:
        places.check_model(config.tokenizer, "tokenizer")


@command(
    app,
    "score",
    of=ScoreConfig,
    example="$ entrodrop score rows.jsonl --model Qwen/Qwen3-0.6B --out scored",
)
def score_command(**values: Any) -> Any:
    """Score every token of SOURCE with a frozen model: exact entropy and log-probability, into Parquet shards.

    Running the same command again continues a run that was stopped, and does nothing to a finished one.
    """
    config = build(ScoreConfig, values)
    _check_score(config)
    if config.dry_run:
        from entrodrop_prep.scoring.estimate import estimate

        found = estimate(config)
        for line in found.lines:
            say(line)
        return found
    with preemptible() if config.worker else nullcontext():
        from entrodrop_prep.scoring.run import score

        summary = score(config)
    c = summary.counts
    if summary.already_complete:
        say(f"already complete: {summary.directory}")
    left_out = [
        (c["short_rows"], "with fewer than two tokens"),
        (c["dropped_long_rows"], "over --max-length"),
        (c["bad_rows"], "bad"),
    ]
    print(
        f"{c['rows']:,} of {c['rows_read']:,} rows, {c['windows']:,} windows, {c['tokens']:,} tokens, "
        f"{c['trainable_tokens']:,} trainable"
    )
    for count, reason in left_out:
        if count:
            listed = "" if reason == "with fewer than two tokens" else ", listed in rejected.jsonl"
            print(f"left out: {count:,} rows {reason}{listed}")
    if c["truncated_rows"]:
        print(f"truncated: {c['truncated_rows']:,} rows")
    if c["rows_without_loss"]:
        tell("warning", f"{c['rows_without_loss']:,} rows have nothing to train on")
    if summary.scored_tokens:
        say(
            f"scored {summary.scored_tokens:,} tokens in {summary.seconds:.1f} s "
            f"({summary.scored_tokens / summary.seconds:,.0f} tokens/s) into {summary.directory}"
        )
    say(f"look at it: entrodrop report {_named(str(summary.directory))}")
    return summary


@command(
    app,
    "serve",
    of=ServeConfig,
    quiet=False,
    example="$ entrodrop serve Qwen/Qwen3-0.6B --port 8000",
)
def serve_command(**values: Any) -> None:
    """Serve MODEL with vLLM for scoring, here or from other machines, until Ctrl-C.

    Prints vLLM's own command line first, for those who start it by other means, and a line when it is ready.
    """
    config = build(ServeConfig, values)
    from entrodrop_prep.backends.serve import serve

    serve(config, say)


@command(
    app,
    "materialize",
    of=MaterializeConfig,
    example="$ entrodrop materialize scored --epochs 4 --out masked",
)
def materialize_command(**values: Any) -> Any:
    """Write the masked dataset of each epoch from a SCORED directory, or a mixture of several.

    A mask depends only on the seed, the row, the token, the epoch, the scores and the recipe. Running the same command
    again continues a run that was stopped; with the same --horizon, more --epochs add to a finished one.
    """
    config = MaterializeConfig.load(**values)
    for text in (*config.sources, *config.plain, *config.against_scores, *([config.eval] if config.eval else [])):
        places.check_named(text, "scored")
    if config.dry_run:
        from entrodrop_prep.export.estimate import estimate

        found = estimate(config)
        for line in found.lines:
            say(line)
        return found
    with preemptible() if config.worker else nullcontext():
        from entrodrop_prep.export.card import aligned, epoch_table, left_out, source_table
        from entrodrop_prep.masking.sources import without_weight
        from entrodrop_prep.masking.study import finding
        from entrodrop_prep.publish.materialize import materialize

        summary = materialize(config)
    if summary.already_complete:
        say(f"already complete: {summary.directory}")
    print("\n".join([*aligned(epoch_table(summary.epochs)), *left_out(summary.epochs)]))
    if any("sources" in e for e in summary.epochs):
        print("\n".join(aligned(source_table(summary.epochs), keys=2)))
    if summary.written_tokens:
        say(
            f"wrote {summary.written_tokens:,} tokens in {summary.seconds:.1f} s "
            f"({summary.written_tokens / max(summary.seconds, 1e-9):,.0f} tokens/s) into {summary.directory}"
        )
    if found_by_study := finding(config):
        say(found_by_study)
    sources = " ".join(f"--against {shlex.quote(without_weight(s))}" for s in (*config.sources, *config.plain))
    sources += "".join(f" --against-scores {shlex.quote(s)}" for s in config.against_scores)
    say(f"look at it: entrodrop report {_named(str(summary.directory))} {sources}")
    if summary.pushed:
        _say_pushed(summary.pushed)
    return summary


@command(
    app,
    "push",
    of=PushConfig,
    example="$ entrodrop push masked USER/NAME",
)
def push_command(**values: Any) -> Any:
    """Push a finished directory to a dataset repository on the Hub, in one commit, and load it back from there.

    The token is that of HF_TOKEN, of `hf auth login`, or on stdin. Running the same command again sends what is
    missing, and does nothing where nothing is.
    """
    config = build(PushConfig, values)
    places.check_directory(config.directory)
    if config.include_scored:
        places.check_directory(config.include_scored, "scored")
    if config.recipe:
        places.check_file(config.recipe, "--recipe", "recipe")
    from entrodrop_prep.publish.push import push

    summary = push(config)
    _say_pushed(summary)
    return summary


def _say_pushed(summary: PushSummary) -> None:
    if summary.already_there:
        say(f"already there: {summary.repo} at {summary.commit}")
    else:
        say(f"{summary.files:,} files, {summary.uploaded_bytes:,} bytes, in commit {summary.commit} of {summary.repo}")
    if summary.tag:
        say(f"tag {summary.tag}")
    print("loaded back and compared; load it with")
    say(f"  {summary.load}")


Against = Annotated[
    list[str] | None,
    typer.Option(
        "--against",
        metavar="[NAME=]SCORED",
        help="Scored directory that a masked DIR was made from; of several sources one NAME=SCORED for each, "
        "eval=SCORED for the rows of --eval. May be repeated.",
    ),
]
AgainstScores = Annotated[
    list[str] | None,
    typer.Option(
        "--against-scores",
        metavar="[NAME=]SCORED2",
        help="Scored directory that those of --against were compared with (--select low-excess, high-excess); as "
        "`materialize` was given it.",
    ),
]


@command(
    app,
    "verify",
    example="$ entrodrop verify masked --against scored",
)
def verify_command(
    directory: Directory,
    against: Against = None,
    against_scores: AgainstScores = None,
    revision: Annotated[
        str | None,
        typer.Option(
            "--revision",
            metavar="TEXT",
            help="Branch, tag or commit of a dataset on the Hub.  [default: the default branch]",
        ),
    ] = None,
) -> dict[str, Any]:
    """Prove that a scored or masked directory is whole and unchanged; with --against, that its masks are right.

    DIR may be a dataset on the Hub, USER/NAME, too: what its manifest lists is downloaded into the cache of
    huggingface_hub and checked there. Where its scores are published with it, its masks are proved from them.

    Exits with 0 and the line "OK: verified DIR", or with 2 and a line on each thing that is wrong.
    """
    places.check_directory(directory, hub=True)
    for text in (*(against or ()), *(against_scores or ())):
        places.check_named(text, "scored", hub=True)
    from entrodrop_prep.verification.run import verify

    found = verify(directory, against or None, revision, against_scores or ())
    for line in found.notes:
        say(line)
    for finding in found.findings:
        tell("error", printable(without_secrets(finding)))
    return {"directory": directory, "ok": not found.findings, **dataclasses.asdict(found)}


@command(
    app,
    "inspect",
    quiet=False,
    example="$ entrodrop inspect masked\n$ entrodrop inspect masked --row 0 --against scored",
)
def inspect_command(
    directory: Directory,
    row: Annotated[
        int | None,
        typer.Option(
            "--row",
            metavar="N",
            min=0,
            help="Show one row: of a scored directory that with row_id N, its position in the source, token by token; "
            "of a masked one that at position N of each epoch's order. Both count from 0.",
        ),
    ] = None,
    row_id: Annotated[
        int | None,
        typer.Option("--row-id", metavar="N", min=0, help="Show the row at position N of the source, from 0."),
    ] = None,
    name: Annotated[
        str | None, typer.Option("--id", metavar="TEXT", help="Show the row with this name in the --id-column.")
    ] = None,
    epoch: Annotated[
        int | None,
        typer.Option("--epoch", metavar="N", min=0, help="Show this epoch alone.  [default: all of them]"),
    ] = None,
    ids: Annotated[
        bool,
        typer.Option(
            "--ids", help="Show ids in place of text: of scores a table of the tokens, of masks ids and labels."
        ),
    ] = False,
    against: Against = None,
    against_scores: AgainstScores = None,
) -> dict[str, Any]:
    """Say what a scored or masked directory holds, or show one of its rows.

    A scored row is shown as text, its tokens in colours of their entropy. With --against, a masked one is too, dropped
    tokens marked.
    """
    places.check_directory(directory)
    for text in (*(against or ()), *(against_scores or ())):
        places.check_named(text, "scored")
    from entrodrop_prep.verification.inspect import show

    inspected = show(
        directory,
        row,
        row_id=row_id,
        name=name,
        epoch=epoch,
        ids=ids,
        against=against,
        against_scores=against_scores or (),
    )
    for line in inspected.lines:
        say(line)
    return inspected.found


@command(
    app,
    "report",
    example="$ entrodrop report masked --against scored",
)
def report_command(
    directory: Directory,
    out: Annotated[
        str, typer.Option("--out", "-o", metavar="FILE", help="The page; an earlier report there is replaced.")
    ] = "report.html",
    against: Against = None,
    against_scores: AgainstScores = None,
    recipe: Annotated[
        str | None,
        typer.Option(
            "--recipe", metavar="FILE", help="Of a scored directory the settings of its masks.  [default: the defaults]"
        ),
    ] = None,
    epochs: Annotated[
        int | None,
        typer.Option(
            "--epochs",
            metavar="N",
            min=1,
            help="Of a scored directory the epochs to show.  [default: the recipe's, or 4]",
        ),
    ] = None,
    rows: Annotated[int, typer.Option("--rows", metavar="N", min=0, max=500, help="Rows to show token by token.")] = 24,
    seed: Annotated[int, typer.Option("--seed", metavar="N", min=0, help="Of the choice of these rows.")] = 0,
) -> dict[str, Any]:
    """Write one page that shows the scores, what the masks drop in each epoch, and rows token by token.

    It is a single file that loads nothing from a network. Of a scored directory it shows what a recipe would drop.
    """
    places.check_directory(directory)
    for text in (*(against or ()), *(against_scores or ())):
        places.check_named(text, "scored")
    if recipe:
        places.check_file(recipe, "--recipe", "recipe")
    from entrodrop_prep.verification.report import report

    compared = against_scores or ()
    page = report(
        directory, out, against=against, against_scores=compared, recipe=recipe, epochs=epochs, rows=rows, seed=seed
    )
    say(f"wrote {page}")
    return {"report": page}


@command(
    app,
    "recipe",
    of=RecipeConfig,
    quiet=False,
    example="$ entrodrop recipe transformers masked > train.py",
)
def recipe_command(**values: Any) -> dict[str, Any]:
    """Print a ready configuration that trains on a masked directory as it was written: a script, or a file of settings.

    Redirect it into a file and run that.
    """
    config = build(RecipeConfig, values)
    places.check_directory(config.directory, "masked")
    from entrodrop_prep.trainers import recipe

    text = recipe(config.trainer, config.directory, config.train_model, config)
    print(text, end="")
    return {"trainer": config.trainer, "recipe": text}


@command(
    app,
    "schema",
    example="$ entrodrop schema --write schemas",
)
def schema_command(
    write: Annotated[str, typer.Option("--write", metavar="DIR", help="Directory for the JSON Schema files.")],
) -> dict[str, Any]:
    """Write the JSON Schemas of scored rows, masked rows, manifests and recipes."""
    from entrodrop_prep.store.json_schemas import write_schemas

    files = write_schemas(write)
    for path in files:
        say(str(path))
    return {"files": files}


@command(
    app,
    "demo",
    example="$ entrodrop demo",
)
def demo_command(
    out: Annotated[str, typer.Option("--out", metavar="DIR", help="Directory for what the demo makes.")] = "demo-out",
) -> dict[str, Any]:
    """Run the whole path on real input: score this Python's own library, write 4 epochs, train on two of them."""
    from entrodrop_prep.demo.run import demo

    demo(out)
    return {"directory": out}


def run(arguments: list[str]) -> int:
    """Run one command line; returns the exit code. User mistakes become one line on stderr and code 2."""
    print_anything()
    try:
        return int(app(_with_values(arguments) or ["--help"], prog_name="entrodrop", standalone_mode=False) or 0)
    except EntrodropError as e:
        message = str(e)
    except TyperException as e:
        message = one_line(elsewhere(e, typer.main.get_command(app)) or e.format_message().replace("Value error, ", ""))
    tell("error", message)
    return 2


def _with_values(arguments: list[str]) -> list[str]:
    """``--ray`` may stand without its ADDRESS, which typer knows no option to do: it is then empty."""
    after = [*arguments[1:], "-"]
    return [
        f"{word}=" if word == "--ray" and n.startswith("-") else word for word, n in zip(arguments, after, strict=False)
    ]


def elsewhere(error: TyperException, program: Any) -> str | None:
    """What to say of an option that other commands of the program have."""
    if not hasattr(error, "possibilities"):  # those it might have been: no other error has them
        return None
    name = getattr(error, "option_name", None)
    options = {c: [n for p in of.params for n in (*p.opts, *p.secondary_opts)] for c, of in program.commands.items()}
    owners = ", ".join(command for command, names in options.items() if name in names)
    return f"No such option: {name}; it is an option of {owners}" if owners else None


def _show_bug(kind: type[BaseException], error: BaseException, tb: TracebackType | None) -> None:
    """A traceback, whose message may hold what a file, a template or a server says."""
    for part in traceback.format_exception(kind, error, tb):
        for line in part.splitlines():
            print(printable(without_secrets(line)), file=sys.stderr)


def main() -> None:
    """Entry point of the ``entrodrop`` command."""
    sys.excepthook = _show_bug
    try:
        code = run(sys.argv[1:])
    except KeyboardInterrupt:
        code = 130
    except OSError as e:
        if e.errno not in (errno.EPIPE, errno.ENOSPC):
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the reader is gone, or has no room
        code = 1
        if e.errno == errno.ENOSPC:
            tell("error", "no space left for what is printed; free some, or print elsewhere")
            code = 2
    except Preempted as e:
        print(e, file=sys.stderr)
        code = EXIT_CODE
    if code == 130:
        print(INTERRUPTED, file=sys.stderr)
    sys.exit(code)


loaded()
