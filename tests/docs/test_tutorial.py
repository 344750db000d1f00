"""docs/tutorial.md: its commands, one after the other, on fewer rows and epochs."""

from __future__ import annotations

import re
import runpy
import shlex
import subprocess
from pathlib import Path

import pytest

from entrodrop_prep.cli import run

pytestmark = pytest.mark.training

ROOT = Path(__file__).resolve().parents[2]
SMALLER = (
    ("files[:16]", "files[:4]"),
    ("files[16:32]", "files[4:6]"),
    ("[:4000]", "[:1500]"),
    ("--epochs 10", "--epochs 2"),
)


def test_the_tutorial(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    page = (ROOT / "docs" / "tutorial.md").read_text(encoding="utf-8")
    for old, new in SMALLER:
        assert old in page
        page = page.replace(old, new)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setenv("MPLBACKEND", "svg")
    Path("entrodrop_prep").symlink_to(ROOT / "entrodrop_prep")
    for name, script in zip(
        ("rows.py", "curve.py"), re.findall(r"^```python\n(.*?)^```", page, re.M | re.S), strict=True
    ):
        Path(name).write_text(script)
    commands = re.findall(r"^\$ (.*)$", page, re.M)
    assert len(commands) > 10
    for command in commands:
        words, _, target = command.partition(" > ")
        program, *arguments = shlex.split(words)
        capsys.readouterr()
        if program == "entrodrop":
            assert run(arguments) in (0, None), command
        elif program == "python":
            runpy.run_path(arguments[0], run_name="__main__")
        else:
            subprocess.run([program, *arguments], check=True)
        if target:
            Path(target).write_text(capsys.readouterr().out)
    losses = [float(loss) for loss in re.findall(r" (\d\.\d{3})", capsys.readouterr().out)]
    assert len(losses) >= 2  # of both runs
    assert Path("curve.svg").stat().st_size > 1000
    assert Path("planned.html").exists()
