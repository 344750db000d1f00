"""The command line as a user meets it, and the library behind it."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import typer.main

import entrodrop_prep
from entrodrop_prep.cli import app
from entrodrop_prep.config import MaterializeConfig, ScoreConfig, flag, settings
from helpers.scored import some_rows, write_scored
from helpers.warm import CLIENT, OFFLINE

ROOT = Path(__file__).resolve().parents[2]
ENTRODROP = Path(sys.executable).parent / "entrodrop"
WAYS = {
    "entrodrop": [str(ENTRODROP)],
    "python -m": [sys.executable, "-m", "entrodrop_prep"],
    "python cli.py": [sys.executable, str(ROOT / "cli.py")],
}
COMMANDS = ("score", "serve", "materialize", "push", "verify", "inspect", "report", "recipe", "schema", "demo")
HEAVY = ("torch", "transformers", "datasets", "huggingface_hub", "pyarrow", "numpy", "pydantic", "vllm", "ray")


def run(*arguments: str, way: str = "entrodrop", cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*WAYS[way], *arguments], capture_output=True, text=True, cwd=cwd, check=False)


def inspected(directory: Path, *arguments: str) -> list[str]:
    command = [*WAYS["python -m"], "inspect", str(directory), *arguments]
    done = OFFLINE.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    return list(done.stdout.splitlines())


def commands() -> dict[str, Any]:
    group: Any = typer.main.get_command(app)
    return dict(group.commands)


def test_the_commands_are_the_public_ones() -> None:
    assert tuple(commands()) == COMMANDS


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_every_command(command: str) -> None:
    done = run(command, "--help")
    assert done.returncode == 0
    assert done.stderr == ""
    words = "".join(done.stdout.split())
    for parameter in commands()[command].params:
        for name in [*parameter.opts, *parameter.secondary_opts]:
            assert (name if name.startswith("-") else parameter.metavar or name.upper()) in words
    assert "None" not in done.stdout


def test_all_ways_to_start_it_are_the_same() -> None:
    shown = {way: run("--help", way=way).stdout for way in WAYS}
    assert len(set(shown.values())) == 1
    assert all(command in shown["entrodrop"] for command in COMMANDS)
    errors = {run("score", "--nope", way=way).stderr for way in WAYS}
    assert len(errors) == 1


def test_no_arguments_show_the_help() -> None:
    alone, asked = run(), run("--help")
    assert (alone.returncode, alone.stdout, alone.stderr) == (0, asked.stdout, "")


def test_version() -> None:
    done = run("--version")
    assert (done.returncode, done.stdout) == (0, f"entrodrop-prep {entrodrop_prep.__version__}\n")


@pytest.mark.parametrize("arguments", [["--help"], [], ["score", "--help"], ["demo", "--help"], ["--version"]])
def test_help_loads_nothing_heavy(arguments: list[str]) -> None:
    """Typer itself loads pydantic to parse the options of a command."""
    heavy = HEAVY if arguments in (["--help"], []) else [name for name in HEAVY if name != "pydantic"]
    code = (
        "import sys, json\nfrom entrodrop_prep.cli import run\n"
        f"code = run({arguments!r})\n"
        f"print(json.dumps([code, [m for m in {heavy!r} if m in sys.modules]]), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stderr) == [0, []]


def test_help_is_quick() -> None:
    """In time of the processor, which a busy machine lengthens little."""

    def seconds() -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        run("--help")
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    assert min(seconds() for _ in range(3)) < 0.8


@pytest.mark.parametrize(("command", "cls"), [("score", ScoreConfig), ("materialize", MaterializeConfig)])
def test_every_setting_has_exactly_one_flag(command: str, cls: type) -> None:
    parameters = commands()[command].params
    assert [p.name for p in parameters if p.name in settings(cls)] == list(settings(cls))
    used = Counter(name for p in parameters for name in [*p.opts, *p.secondary_opts])
    assert set(used.values()) == {1}
    for parameter in (p for p in parameters if p.name in settings(cls)):
        kind, setting, default = settings(cls)[parameter.name]
        if setting.argument:
            assert parameter.opts == [parameter.name]
            continue
        assert parameter.opts == [flag(parameter.name)]
        off = [f"--no-{parameter.name.replace('_', '-')}"]
        assert parameter.secondary_opts == (off if kind is bool and default is True else [])


def test_a_mistake_is_one_line_and_code_2(tmp_path: Path) -> None:
    """As a process; all others are in test_bad_input.py."""
    done = run("materialize", "nowhere", "--out", "o", "--epochs", "2", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: nowhere: no such directory; give a scored directory\n"


def test_a_reader_that_goes_away_is_no_traceback() -> None:
    done = subprocess.run(
        ["bash", "-c", f"{ENTRODROP} score --help | head -1"], capture_output=True, text=True, check=True
    )
    assert done.stderr == ""


def test_schema_writes_the_schemas(tmp_path: Path) -> None:
    done = run("schema", "--write", "out", cwd=tmp_path)
    assert done.returncode == 0
    assert sorted(done.stdout.split()) == sorted(f"out/{p.name}" for p in (tmp_path / "out").iterdir())


# --- the library


def test_a_row_is_a_row_id_in_a_scored_directory_and_a_place_in_a_masked_one(tmp_path: Path) -> None:
    write_scored(tmp_path / "scored", some_rows(20, lengths=(3, 6)))
    config = {"scored": str(tmp_path / "scored"), "out": str(tmp_path / "masked"), "epochs": 2, "rows_per_shard": 7}
    entrodrop_prep.materialize(MaterializeConfig(**config))
    scored = [row for f in sorted((tmp_path / "scored").glob("*.parquet")) for row in pq.read_table(f).to_pylist()]
    windows = [row["input_ids"] for row in scored if row["row_id"] == 17]
    assert len(windows) == 3
    assert scored[17]["row_id"] < 17
    lines = inspected(tmp_path / "scored", "--row", "17", "--ids")[1:]
    assert [int(line.split()[2]) for line in lines] == [i for ids in windows for i in ids]
    lines = inspected(tmp_path / "masked", "--row", "17")
    for epoch in range(2):
        files = sorted((tmp_path / "masked" / f"epoch_{epoch:03d}").glob("*.parquet"))
        row = [row for f in files for row in pq.read_table(f).to_pylist()][17]
        assert lines[2 * epoch].startswith(f"epoch {epoch}, row 17: ")
        assert [int(pair.split("->")[0]) for pair in lines[2 * epoch + 1].split()] == row["input_ids"]


FUNCTIONS = ("score", "materialize", "verify", "inspect", "push")


def in_a_new_process(code: str) -> str:
    """What is printed where none of the package's modules has been imported, and warnings are errors."""
    code = f"import warnings\nwarnings.filterwarnings('error', module='entrodrop_prep')\n{code}"
    done = CLIENT.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return str(done.stdout)


@pytest.mark.parametrize("names", [FUNCTIONS, FUNCTIONS[::-1]], ids=["forwards", "backwards"])
def test_the_functions_are_functions_in_whatever_order_they_are_met(names: tuple[str, ...]) -> None:
    listed = ", ".join(names)
    out = in_a_new_process(f"from entrodrop_prep import {listed}\nprint(all(map(callable, ({listed},))))")
    assert out == "True\n"


@pytest.mark.parametrize(
    "module", ["scoring.run", "verification.run", "verification.inspect", "training.check_batches", "cli"]
)
def test_the_functions_are_functions_after_their_modules_were_imported(module: str) -> None:
    code = (
        f"import entrodrop_prep.{module}\nimport entrodrop_prep as e\n"
        f"print([n for n in {FUNCTIONS!r} if not callable(getattr(e, n))])"
    )
    assert in_a_new_process(code) == "[]\n"


def test_importing_the_package_loads_nothing_heavy() -> None:
    code = f"import sys, entrodrop_prep, entrodrop_prep.errors\nprint([m for m in {HEAVY!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_every_public_name_is_there() -> None:
    for name in entrodrop_prep.__all__:
        assert getattr(entrodrop_prep, name) is not None
    assert set(entrodrop_prep.__all__) <= set(dir(entrodrop_prep))
    with pytest.raises(AttributeError, match="nope"):
        _ = entrodrop_prep.nope
