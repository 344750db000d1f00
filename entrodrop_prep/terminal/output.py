"""Where a command's words go: lines for people, log lines, warnings, progress, and with ``--json`` one object."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, TextIO

from entrodrop_prep.terminal.text import printable, without_secrets

_LIBRARIES = {
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_VERBOSITY": "error",
    "DATASETS_VERBOSITY": "error",
}
_quiet = False

Span = tuple[str, str]
"""Text, and its style: a name in ``STYLES``."""
STYLES = {
    "": ("", "", ""),
    "dropped": ("9;31", "⟦", "⟧"),
    "context": ("2", "", ""),
    "lowest": ("30;48;5;195", "⟦", "⟧"),
    "low": ("30;48;5;153", "⟦", "⟧"),
    "high": ("30;48;5;111", "", ""),
    "highest": ("30;48;5;69", "", ""),
}
"""Of each style the SGR code where the terminal has colour, and the marks around the text where it has none."""


def print_anything() -> None:
    """From now on a name that the terminal cannot show is printed as escapes: it is no reason to stop.

    Nor is a stream that was closed; the next file that is opened does not take its place.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "r+", encoding="utf-8"))  # noqa: SIM115 (as long as the process)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def say(line: str | Sequence[Span]) -> None:
    """Print a line that may hold names, or spans of text with their style: nothing in it acts on the terminal."""
    write(styled(without_secrets(line) if isinstance(line, str) else line, colour=coloured(sys.stdout)), sys.stdout)


def styled(line: str | Sequence[Span], *, colour: bool) -> str:
    """A line as it is printed. Without ``colour``, styles are marks, which the text itself then has not."""
    if isinstance(line, str):
        return printable(line)
    shown = ""
    for text, style in line:
        code, begin, end = STYLES[style]
        if colour:
            shown += f"\x1b[{code}m{printable(text)}\x1b[0m" if code and text else printable(text)
        else:
            text = printable(text).replace("⟦", "[").replace("⟧", "]")
            shown += begin + text + end if text else ""
    return shown.replace("⟧⟦", "")


def tell(kind: str, message: str) -> None:
    """Print an ``error`` or a ``warning`` to stderr, its first word in colour where the terminal has it."""
    write(f"{painted(f'{kind}:', '31' if kind == 'error' else '33', sys.stderr)} {message}", sys.stderr)


def write(line: str, stream: TextIO) -> None:
    """Print a line above whatever progress bar is on the terminal."""
    if "tqdm" in sys.modules:  # a bar there may be: it steps aside
        from tqdm import tqdm

        tqdm.write(line, file=stream)
    else:
        stream.write(f"{line}\n")
    stream.flush()


def coloured(stream: TextIO) -> bool:
    """Whether colour is wanted there: a terminal, and no NO_COLOR (https://no-color.org)."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def painted(text: str, code: str, stream: TextIO) -> str:
    """The text in the colour of an SGR code, such as ``31`` for red, where the stream shows colour."""
    return f"\x1b[{code}m{text}\x1b[0m" if coloured(stream) else text


def shows_progress() -> bool:
    """Whether progress is wanted at all."""
    return not _quiet


@contextlib.contextmanager
def command_output(*, quiet: bool = False, verbose: bool = False, as_json: bool = False) -> Iterator[dict[str, Any]]:
    """Direct what is said in the block, by this process and those it starts.

    Args:
        quiet: only warnings, errors and what ``as_json`` prints.
        verbose: libraries are heard too.
        as_json: what is put into the yielded dictionary is printed to stdout at the end, in one line, and nothing else;
            lines for people go to stderr.
    """
    global _quiet
    _quiet = quiet
    summary: dict[str, Any] = {}
    with _instead_of_stdout(quiet, as_json) as stdout:
        _set_up_logging(verbose)
        yield summary
    if as_json:
        print(json.dumps(summary, default=str, ensure_ascii=True), file=stdout, flush=True)


@contextlib.contextmanager
def _instead_of_stdout(quiet: bool, as_json: bool) -> Iterator[TextIO]:
    """Yields stdout as it was; in the block it is stderr, or nothing, for programs that are started too."""
    stdout = sys.stdout
    if not quiet and not as_json:
        yield stdout
        return
    stdout.flush()
    with open(os.devnull, "w", encoding="utf-8") as nothing:
        there = nothing if quiet else sys.stderr
        before = os.dup(1)
        os.dup2(nothing.fileno() if quiet else 2, 1)
        try:
            with contextlib.redirect_stdout(there):
                yield stdout
        finally:
            os.dup2(before, 1)
            os.close(before)


class _Lines(logging.Handler):
    """Notes to stdout, warnings and worse to stderr."""

    def emit(self, record: logging.LogRecord) -> None:
        line = self.format(record)
        if record.levelno < logging.WARNING:
            write(line, sys.stdout)
        else:
            tell("warning", line)


def _set_up_logging(verbose: bool) -> None:
    """What libraries say is heard only where they fail, or where ``verbose`` asks for it."""
    ours = logging.getLogger("entrodrop_prep")
    ours.handlers[:], ours.propagate = [_Lines()], False
    ours.setLevel(logging.DEBUG if verbose else logging.INFO)
    for handler in (*ours.handlers, logging.lastResort):  # the last: of libraries that set up none of their own
        if handler is not None:
            handler.setFormatter(_Printable("%(message)s"))
    if verbose:
        return
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
    for name, value in _LIBRARIES.items():
        os.environ.setdefault(name, value)


class _Printable(logging.Formatter):
    """Each message in one line, without secrets of URLs."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        return printable(without_secrets(super().formatMessage(record)))
