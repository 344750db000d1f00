"""What the program shows on terminals of several widths, in a pipe, under NO_COLOR, with --quiet and with --json."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import typer.main
from typer.exceptions import TyperException

from entrodrop_prep import cli
from entrodrop_prep.cli.help import PANELS, grouped
from entrodrop_prep.cli.results import DRY_RUNS, RESULTS
from entrodrop_prep.export.card.tables import aligned
from entrodrop_prep.terminal import progress
from helpers.models import random_rows, save_model, tiny_llama, words, write_rows
from helpers.scored import some_rows, write_scored

ESCAPE = re.compile(r"\x1b\[[0-9;]*m")
COLOUR = re.compile(r"\x1b\[(?:[0-9;]*;)?3[0-7]m")
PROGRAM: Any = typer.main.get_command(cli.app)
LONGEST = 120


def on_terminal(arguments: list[str], columns: int, code: str = "", **environment: str) -> str:
    """What a program prints on a terminal of so many columns: the command, or a piece of Python."""
    program = [sys.executable, "-c", code] if code else [sys.executable, "-m", "entrodrop_prep", *arguments]
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 50, columns, 0, 0))
    kept = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "COLUMNS", "LINES")}
    done = subprocess.Popen(
        program, stdin=slave, stdout=slave, stderr=slave, env={**kept, "TERM": "xterm-256color", **environment}
    )
    os.close(slave)
    shown = b""
    while True:
        try:
            piece = os.read(master, 1 << 16)
        except OSError:  # Linux says so where the other end is closed
            break
        if not piece:
            break
        shown += piece
    os.close(master)
    done.wait()
    return shown.decode().replace("\r\n", "\n")


def in_pipe(*arguments: str) -> subprocess.CompletedProcess[str]:
    program = [sys.executable, "-m", "entrodrop_prep", *arguments]
    return subprocess.run(program, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("columns", [80, LONGEST])
@pytest.mark.parametrize("command", ["", "score", "materialize"])
def test_help_on_a_terminal_has_panels_and_colour_and_fits(command: str, columns: int) -> None:
    shown = on_terminal([*([command] if command else []), "-h"], columns)
    assert COLOUR.search(shown)
    lines = [ESCAPE.sub("", line) for line in shown.splitlines()]
    assert max(map(len, lines)) == columns
    assert lines[0].startswith("Usage: entrodrop")
    titles = [line.split()[1] for line in lines if line.startswith("╭─ ")]
    of: Any = PROGRAM.commands.get(command, PROGRAM)
    names = [*(["Commands"] if not command else []), *grouped(of), "Example"]
    assert titles == [name.split()[0] for name in names]
    plain = "".join("".join(line.strip("│╭╰─╮╯ ").split()) for line in lines)
    for parameter in of.params:
        assert "".join((parameter.help or "").split())[:12] in plain


def test_no_color_leaves_the_panels_and_a_pipe_nothing() -> None:
    shown = on_terminal(["verify", "-h"], 80, NO_COLOR="1")
    assert "╭─" in shown
    assert not COLOUR.search(shown)
    piped = in_pipe("verify", "-h").stdout
    assert piped == in_pipe("verify", "--help").stdout
    assert piped.isascii()
    assert "\x1b" not in piped
    assert max(map(len, piped.splitlines())) <= 80


def test_errors_are_coloured_on_a_terminal_only() -> None:
    assert on_terminal(["verify", "nowhere"], 80).startswith("\x1b[31merror:\x1b[0m nowhere")
    assert on_terminal(["verify", "nowhere"], 80, NO_COLOR="1").startswith("error: nowhere")
    assert in_pipe("verify", "nowhere").stderr.startswith("error: nowhere")


def test_streams_that_were_closed_are_no_reason_to_stop(tmp_path: Path) -> None:
    code = (
        "import os, sys; from pathlib import Path; from entrodrop_prep import cli; "
        f"code = cli.run(['schema', '--write', {str(tmp_path / 'schemas')!r}]); "
        "Path(sys.argv[1]).write_text(f'{code} {[os.stat(n).st_rdev for n in range(3)]}')"
    )
    shell = f'exec "$0" -c "$1" {tmp_path / "found"} <&- >&- 2>&-'
    subprocess.run(["/bin/sh", "-c", shell, sys.executable, code], check=True)
    assert (tmp_path / "found").read_text() == f"0 {[os.stat(os.devnull).st_rdev] * 3}"


def test_a_path_that_begins_with_a_dash_is_named_so_that_it_can_be_copied() -> None:
    assert cli._named("-x y") == "'./-x y'"


def test_the_main_help_has_whole_sentences() -> None:
    shown = " ".join(in_pipe().stdout.split())
    assert "..." not in shown.partition("Commands:")[2].partition("Terminal:")[0]
    for command in PROGRAM.commands.values():
        assert " ".join(command.help.split("\n\n")[0].split()) in shown


@pytest.mark.parametrize("command", list(PROGRAM.commands))
def test_every_command_has_groups_and_an_example_that_parses(command: str) -> None:
    of = PROGRAM.commands[command]
    assert set(grouped(of)) <= set(PANELS)
    for line in of.epilog.splitlines():
        words = line.partition(" > ")[0].split()
        assert words[:3] == ["$", "entrodrop", command]
        of.make_context(command, words[3:], resilient_parsing=False)


def test_an_option_of_another_command_is_said_to_be_one(capfd: pytest.CaptureFixture[str]) -> None:
    """Every option in every command that has it not."""
    having: dict[str, list[str]] = {}
    for command, of in PROGRAM.commands.items():
        for name in dict.fromkeys(n for p in of.params for n in (*p.opts, *p.secondary_opts) if n.startswith("--")):
            having.setdefault(name, []).append(command)
    pairs = [(c, of, name) for c, of in PROGRAM.commands.items() for name in having if c not in having[name]]
    assert len(pairs) > 500
    for command, of, name in pairs:
        with pytest.raises(TyperException) as error:
            of.make_context(command, [name, "1"])
        assert cli.elsewhere(error.value, PROGRAM) == (
            f"No such option: {name}; it is an option of {', '.join(having[name])}"
        )
    assert cli.run(["score", "--epochs=3"]) == 2
    assert capfd.readouterr().err == "error: No such option: --epochs; it is an option of materialize, report\n"
    assert cli.run(["materialize", "--epochs"]) == 2
    assert capfd.readouterr().err == "error: Option '--epochs' requires an argument.\n"


def test_completion_can_be_had() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "entrodrop_prep", "--show-completion", "bash"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"},
    )
    assert "complete -o default -F _entrodrop_completion entrodrop" in done.stdout
    words = {"COMP_WORDS": "entrodrop score --ba", "COMP_CWORD": "2", "_ENTRODROP_COMPLETE": "complete_bash"}
    done = subprocess.run(
        [sys.executable, "-m", "entrodrop_prep"],
        capture_output=True,
        text=True,
        env={**os.environ, **words},
        check=False,
    )
    assert done.stdout.split() == ["--backend", "--batch-tokens"]


@pytest.fixture(scope="module")
def scored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("terminal") / "scored"
    write_scored(directory, some_rows(6, lengths=(3, 6)))
    return directory


def printed_json(capfd: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> dict[str, Any]:
    """The one object that a command prints, which must be all there is on stdout."""
    capfd.readouterr()
    assert cli.run([*arguments, "--json"]) == code, capfd.readouterr().err
    out = capfd.readouterr().out
    assert out.count("\n") == 1
    assert out.endswith("\n")
    found: dict[str, Any] = json.loads(out, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert found.pop("command") == arguments[0]
    return found


def test_json_is_all_there_is_on_stdout_and_has_the_fields_that_are_documented(
    scored: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    masked, model = str(tmp_path / "masked"), save_model(tmp_path / "model", tiny_llama())
    rows = write_rows(tmp_path / "rows.jsonl", [{"text": words(row)} for row in random_rows(4, 97)])
    score = [str(rows), "--model", str(model), "--out", str(tmp_path / "new"), "--backend", "transformers"]
    for command, arguments in [
        ("score", [*score, "--dry-run"]),
        ("score", score),
        ("score", score),
        ("materialize", [str(scored), "--epochs", "2", "--out", masked, "--dry-run"]),
        ("materialize", [str(scored), "--epochs", "2", "--out", masked]),
        ("verify", [masked, "--against", str(scored)]),
        ("inspect", [masked]),
        ("inspect", [str(scored)]),
        ("report", [masked, "--against", str(scored), "-o", str(tmp_path / "report.html")]),
        ("recipe", ["transformers", masked]),
        ("schema", ["--write", str(tmp_path / "schemas")]),
    ]:
        documented = (DRY_RUNS if "--dry-run" in arguments else RESULTS)[command]
        assert set(printed_json(capfd, command, *arguments)) == set(documented), command
    assert set(RESULTS) == {name for name, c in PROGRAM.commands.items() if any(p.name == "json" for p in c.params)}
    for command, fields in RESULTS.items():
        helped = next(p.help for p in PROGRAM.commands[command].params if p.name == "json")
        assert f"Its fields: {', '.join(fields)}" in helped


def test_json_of_what_is_wrong(scored: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for command in (["verify", "nowhere"], ["score", "nowhere.jsonl", "--out", "x"], ["inspect", "x", "--rows", "3"]):
        assert cli.run([*command, "--json"]) == 2
        said = capfd.readouterr()
        assert said.out == ""
        assert re.fullmatch(r"error: .*\n", said.err)
    broken = tmp_path / "broken"
    subprocess.run(["cp", "-r", str(scored), str(broken)], check=True)
    next(broken.glob("*.parquet")).unlink()
    done = in_pipe("verify", str(broken), "--json", "--quiet")
    found = json.loads(done.stdout)
    assert (done.returncode, found["ok"]) == (2, False)
    assert [f"error: {line}" for line in found["findings"]] == done.stderr.splitlines()


def test_quiet_says_nothing_where_all_is_well(scored: Path, tmp_path: Path) -> None:
    arguments = ["materialize", str(scored), "--epochs", "2", "--out", str(tmp_path / "masked")]
    done = in_pipe(*arguments, "--quiet")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert on_terminal([*arguments, "--quiet"], 80) == ""
    assert "already complete" in in_pipe(*arguments).stdout


def test_what_a_started_program_prints_is_not_on_stdout_beside_json() -> None:
    code = (
        "import subprocess\nfrom entrodrop_prep.terminal.output import command_output\n"
        "with command_output(as_json=True) as found:\n"
        "    print('for people')\n    subprocess.run(['echo', 'of a child'])\n    found['a'] = 1\nprint('after')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == '{"a": 1}\nafter\n'
    assert done.stderr == "for people\nof a child\n"


def test_log_lines_and_the_bar_do_not_tear_each_other() -> None:
    code = (
        "import logging, time\nfrom entrodrop_prep.terminal.output import command_output\n"
        "from entrodrop_prep.terminal.progress import Progress\n"
        "log = logging.getLogger('entrodrop_prep.x')\n"
        "with command_output(), Progress('score', 10, 'rows') as p:\n"
        "    for i in range(10):\n        time.sleep(0.11)\n        p.add(1, 100)\n"
        "        (log.info if i % 2 else log.warning)('line %d', i)\n"
    )
    shown = on_terminal([], 80, code, NO_COLOR="1")
    lines = [line.rpartition("\r")[2].replace("\x1b[A", "") for line in shown.split("\n")]
    said = [line for line in lines if "line" in line]
    assert said == [f"{'' if i % 2 else 'warning: '}line {i}" for i in range(10)]
    assert "score:  90%" in shown


def test_the_estimate_after_a_resume_counts_what_is_left_only() -> None:
    """990 of 1,000 rows were there; one of the other ten takes 0.15 s."""
    code = (
        "import time\nfrom entrodrop_prep.terminal.progress import Progress\n"
        "with Progress('score', 100_000, 'rows') as p:\n"
        "    time.sleep(1.2)\n    p.begin()\n    p.skip(99_000)\n"
        "    for i in range(8):\n        time.sleep(0.15)\n        p.add(1, 100)\n"
    )
    shown = on_terminal([], 80, code)
    left = [int(m) * 60 + int(s) for m, s in re.findall(r"<(\d+):(\d+)", shown)]
    assert 100 < left[-1] < 200


def test_a_log_says_how_much_time_is_left(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    clock = iter((0.0, 60.0, 100.0))  # seconds at the start and after 2 and 9 of 10 rows
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    with progress.Progress("score", 10, "rows") as shown:
        shown.add(2, 100)
        shown.add(7, 100)
    first, second = capsys.readouterr().err.splitlines()
    assert first.endswith(", about 4 min left")
    assert second.endswith(", less than a minute left")


def test_a_wide_table_goes_on_below() -> None:
    rows = [["epoch", *(f"column {i}" for i in range(12))], *([str(e), *["123,456,789"] * 12] for e in range(2))]
    lines = aligned(rows)
    assert max(map(len, lines)) <= 80
    assert len(lines) == 9
    assert [line.split()[0] for line in lines] == ["epoch", "0", "1"] * 3
    assert sum(line.count("123,456,789") for line in lines) == 24
