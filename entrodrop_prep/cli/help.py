"""The help of a command: its options in groups, in panels and colour on a terminal, plain text elsewhere."""

from __future__ import annotations

import io
import re
import shutil
import sys
from typing import TYPE_CHECKING, Any

from typer.core import TyperCommand, TyperGroup

from entrodrop_prep.terminal.output import coloured

if TYPE_CHECKING:
    from rich.table import Table

PANELS = (
    "Arguments",
    "Main",
    "Rows",
    "Hub datasets",
    "Chats",
    "Long documents",
    "What is dropped",
    "Curriculum",
    "Files",
    "Model",
    "Scores",
    "Speed",
    "vLLM",
    "vLLM servers",
    "Hub",
    "Access and retries",
    "Resume and workers",
    "Terminal",
)
"""The groups of options in the order in which help and docs show them, the common ones first."""
WIDEST, NAMES = 120, 30
_NOTE = r"\[(?:default: .*|required)\]$"
_LIMITS = r"\((?:at least|above|[\d.]+ to) [^()]*\)"
_SPACE = "\ue000"
"""A space at which no line ends, until the help is written."""


def grouped(command: Any) -> dict[str, list[Any]]:
    """Name of each group -> its parameters, as declared."""
    found: dict[str, list[Any]] = {}
    others = "Terminal" if isinstance(command, TyperGroup) else "Main"
    for p in command.params:
        name = p.rich_help_panel or (others if p.param_type_name == "option" else "Arguments")
        found.setdefault(name, []).append(p)
    return {name: found[name] for name in sorted(found, key=PANELS.index)}


def names_of(parameter: Any) -> str:
    """``--out, -o FILE``, ``--logprob / --no-logprob``, or an argument's name in capitals."""
    if parameter.param_type_name == "argument":
        return str(parameter.metavar or parameter.name.upper())
    either = " / ".join([", ".join(parameter.opts), *parameter.secondary_opts])
    return either if parameter.is_flag else f"{either} {parameter.metavar}"


def first_sentence(text: str) -> str:
    """Of a command's help, for the list of commands."""
    return re.split(r"(?<=\.)\s", " ".join(text.split("\n\n")[0].split()))[0]


class _Help:
    """What a command and the program itself have in common."""

    def collect_usage_pieces(self: Any, ctx: Any) -> list[str]:
        """``SOURCE [OPTIONS]``."""
        arguments = [p.metavar or p.name.upper() for p in self.params if p.param_type_name == "argument"]
        return [*arguments, "[OPTIONS]", *(["COMMAND ..."] if isinstance(self, TyperGroup) else [])]

    def format_help(self: Any, ctx: Any, formatter: Any) -> None:
        """Write the help into ``formatter``."""
        sections = {
            name: [(names_of(p), re.sub(f"{_NOTE}|{_LIMITS}", _whole, p.help or "")) for p in parameters]
            for name, parameters in grouped(self).items()
        }
        sections.setdefault("Terminal", []).append((", ".join(ctx.help_option_names), "Show this and stop."))
        if isinstance(self, TyperGroup):
            commands = [(name, first_sentence(c.help or "")) for name, c in self.commands.items()]
            sections = {"Commands": commands, **sections}
        about = [" ".join(part.split()) for part in (self.help or "").split("\n\n")]
        usage = f"Usage: {ctx.command_path} {' '.join(self.collect_usage_pieces(ctx))}"
        examples = (self.epilog or "").splitlines()
        if sys.stdout.isatty():
            formatter.write(_panels(usage, about, sections, examples))
        else:
            _plain(formatter, usage, about, sections, examples)
        formatter.buffer[:] = [piece.replace(_SPACE, " ") for piece in formatter.buffer]


def _whole(note: re.Match[str]) -> str:
    """A short note on limits or the default, which stays in one line."""
    return note[0].replace(" ", _SPACE) if len(note[0]) < NAMES else note[0]


class Command(_Help, TyperCommand):
    """A command with this help."""


class Program(_Help, TyperGroup):
    """The program with this help."""


def _plain(
    formatter: Any, usage: str, about: list[str], sections: dict[str, list[tuple[str, str]]], examples: list[str]
) -> None:
    formatter.write(f"{usage}\n")
    for part in about:
        formatter.write_paragraph()
        with formatter.indentation():
            formatter.write_text(part)
    for name, rows in sections.items():
        with formatter.section(name):
            formatter.write_dl(rows, col_max=NAMES)
    if examples:
        with formatter.section("Example"):
            formatter.write("".join(f"  {line}\n" for line in examples))


def _panels(usage: str, about: list[str], sections: dict[str, list[tuple[str, str]]], examples: list[str]) -> str:
    from rich.console import Console
    from rich.padding import Padding
    from rich.panel import Panel
    from rich.text import Text

    width = min(shutil.get_terminal_size().columns, WIDEST)
    written = io.StringIO()
    console = Console(
        file=written, force_terminal=True, width=width, no_color=not coloured(sys.stdout), highlight=False
    )
    console.print(Text(usage, style="bold"))
    for part in about:
        console.print(Padding(Text(part), (1, 1, 0, 1)))
    console.print()
    for name, rows in sections.items():
        console.print(Panel(_table(rows), title=name, title_align="left", border_style="dim"))
    if examples:
        lines = Text("\n".join(examples), no_wrap=True, overflow="ignore")
        console.print(Panel(lines, title="Example", title_align="left", border_style="dim"))
    return written.getvalue()


def _table(rows: list[tuple[str, str]]) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(width=min(NAMES, max(len(name) for name, _ in rows)))
    table.add_column(ratio=1)
    for name, about in rows:
        names = Text(name if len(name) <= NAMES else name.replace("|", " | "))
        names.stylize("yellow")
        names.highlight_regex(r"(?<!\S)--?[a-z][\w-]*|^[a-z]+$", "bold cyan")
        text = Text(about)
        text.highlight_regex(_NOTE, "dim")
        table.add_row(names, text)
    return table
