"""A command of the program from a function: its options from the settings, and those that every command has."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from typing import Annotated, Any, get_args, get_origin

import typer

from entrodrop_prep.cli.help import Command
from entrodrop_prep.cli.results import DRY_RUNS, RESULTS
from entrodrop_prep.config import Setting, flag, settings
from entrodrop_prep.config.settings import value_text
from entrodrop_prep.terminal.output import command_output


def command(
    app: typer.Typer, name: str, *, example: str, quiet: bool = True, of: type | None = None
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Make a function a command of ``app``.

    What the user left out is left out of the keyword arguments of a function ``of`` a settings class. What it returns,
    a dataclass or a dictionary with the fields in ``results.RESULTS``, is what ``--json`` prints; a command that is not
    there has no such option. A result whose ``ok`` is false ends the program with exit code 2.

    Args:
        app: the program.
        name: the command's.
        example: command lines that its help ends with.
        quiet: whether there is a ``--quiet``.
        of: settings class that the command has the options of; else they are those of the function's signature.
    """

    def wrap(function: Callable[..., Any]) -> Callable[..., Any]:
        own = _of_settings(of) if of else dict(inspect.signature(function, eval_str=True).parameters)
        parameters = {**own, **{p.name: p for p in _output_options(name, quiet) if p.name not in own}}

        def run(**values: Any) -> None:
            chosen = {n: bool(values.get(n)) for n in ("quiet", "verbose")}
            with command_output(**chosen, as_json=bool(values.get("json"))) as printed:
                given = {n: v for n, v in values.items() if n in own and (v is not None or of is None)}
                found = function(**given)
                if found is not None:
                    printed.update(command=name, **(found if isinstance(found, dict) else dataclasses.asdict(found)))
            if printed.get("ok") is False:
                raise typer.Exit(2)

        run.__name__, run.__doc__ = function.__name__, function.__doc__
        run.__signature__ = inspect.Signature(list(parameters.values()))  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in parameters.values()}
        app.command(name, cls=Command, epilog=example)(run)
        return function

    return wrap


def _output_options(command: str, quiet: bool) -> list[inspect.Parameter]:
    """The options on what is printed."""
    fields = ", ".join(RESULTS.get(command, ())) + "; with --dry-run its estimates" * (command in DRY_RUNS)
    helps = {
        "quiet": "Print only warnings and errors." if quiet else None,
        "verbose": "Print what libraries log, too.",
        "json": f"Print one JSON object to stdout when done, and nothing else there. Its fields: {fields}."
        if fields
        else "",
    }
    return [
        inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            default=False,
            annotation=Annotated[
                bool, typer.Option(flag(name), help=text, rich_help_panel="Terminal", show_default=False)
            ],
        )
        for name, text in helps.items()
        if text
    ]


def _of_settings(cls: type) -> dict[str, inspect.Parameter]:
    return {
        name: inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            default=inspect.Parameter.empty if s.argument else None,
            annotation=_annotation(name, kind, s, default),
        )
        for name, (kind, s, default) in settings(cls).items()
    }


def _annotation(name: str, kind: Any, s: Setting, default: Any) -> Any:
    """The typer annotation of one setting."""
    base = next((k for k in get_args(kind) if k is not type(None)), kind) if type(None) in get_args(kind) else kind
    if s.repeat:
        base = list[str]
    elif get_origin(base) in (tuple, dict) or base in (int, float):  # text here: the settings say what is wrong with it
        base = str
    if s.argument:
        base = list[str] if s.repeat else str
        return Annotated[base, typer.Argument(metavar=s.metavar or name.upper(), help=s.help, show_default=False)]
    silent = default is None or default == () or isinstance(default, bool) or default is dataclasses.MISSING
    text = s.default_text or ("" if silent else _plain(default))
    note = "  [required]" if default is dataclasses.MISSING else f"  [default: {text}]" if text else ""
    names = [flag(name)]
    if base is bool and default is True:
        names = [f"{flag(name)}/{s.off or '--no-' + name.replace('_', '-')}"]
        note = ""
    return Annotated[
        base | None,
        typer.Option(
            *names,
            help=s.help + _limits(s) + note,
            metavar=value_text(kind, s) or None,
            show_default=False,
            rich_help_panel=s.panel,
        ),
    ]


def _limits(s: Setting) -> str:
    if s.gt is not None and s.lt is not None:
        return f" (above {s.gt:g}, below {s.lt:g})"
    low = f"at least {s.ge:g}" if s.ge is not None else f"above {s.gt:g}" if s.gt is not None else ""
    if s.le is None or s.le > 1e9:
        return f" ({low})" if low and s.ge != 0 else ""
    return f" ({s.ge:g} to {s.le:g})" if s.ge is not None else ""


def _plain(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
