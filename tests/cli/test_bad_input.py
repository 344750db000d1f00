"""Every mistake of the table is answered with its line and exit code 2, and changes and finishes nothing."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

import pytest

from entrodrop_prep import cli
from helpers.bad_input import CASES, Case, world
from helpers.hub import WRITER
from helpers.scored import all_bytes

EVERY = [(f"{section}: {case.given or case.command}", case) for section, cases in CASES.items() for case in cases]

UNFINISHED = {".state.json", "shard-00000.parquet"}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    world(folder)
    return folder


@pytest.mark.parametrize(("name", "case"), EVERY, ids=[name for name, _ in EVERY])
def test_a_mistake_is_one_line_and_code_2(
    name: str,
    case: Case,
    whole: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    here = tmp_path / "here"
    shutil.copytree(whole, here)
    monkeypatch.chdir(here)
    monkeypatch.setenv("HF_TOKEN", WRITER)
    if case.make:
        case.make()
    before = all_bytes(here)
    capsys.readouterr()
    assert cli.run(shlex.split(case.command)) == 2
    err = capsys.readouterr().err
    found = [line for line in err.splitlines() if line.startswith("error: ")]
    wanted = ".*".join(re.escape(part) for part in case.message.split("…"))
    assert len(found) == 1, err
    assert re.fullmatch(wanted, found[0].removeprefix("error: ")), found[0]
    assert err.splitlines()[-1] == found[0]
    assert "Traceback" not in err
    assert not (here / "sprung").exists(), "code that came with the input was run"
    after = all_bytes(here)
    assert {name: after.get(name) for name in before} == before
    assert {Path(name).name for name in after.keys() - before.keys()} <= UNFINISHED


def test_the_table_is_long() -> None:
    assert len(EVERY) >= 80
    assert len({name for name, _ in EVERY}) >= 80
