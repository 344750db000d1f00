"""What commands show on terminals of 80 and 120 columns, under NO_COLOR and in a pipe, as it was looked at.

``recorded/`` has it, with ␛ for escape; times, speeds, sizes and digests are normalised. Where a change is meant,
``PYTHONPATH=tests python tests/cli/test_recorded.py`` writes it again: look at the difference.
"""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import shutil
import struct
import subprocess
import sys
import tempfile
import termios
import threading
from pathlib import Path

import pytest

from entrodrop_prep.config import MaterializeConfig
from entrodrop_prep.export.materialize import materialize
from helpers.scored import some_rows, write_scored
from helpers.warm import OFFLINE

ROOT = Path(__file__).resolve().parents[2]
RECORDED = Path(__file__).with_name("recorded")
RUN = """
import json, shlex, sys
from entrodrop_prep.cli import run
for line in json.loads(sys.argv[1]):
    print(f"$ entrodrop {line}", flush=True)
    code = run(shlex.split(line))
    if code:
        print(f"(exit code {code})", flush=True)
"""
SHOWN = [
    "--help",
    "score --help",
    "verify masked --against scored",
    "inspect masked",
    "inspect masked --row 2 --epoch 2 --against scored",
    "inspect scored --row 3",
    "score --epochs 3",
]
MADE = [
    "materialize scored --epochs 3 --eval-fraction 0.2 --out new",
    "materialize a=scored:2 b=more --epochs 2 --out mixed",
    "materialize scored --epochs 3 --out masked",
    "inspect mixed",
    "inspect scored",
    "inspect scored --row 1 --ids",
    "score nowhere.jsonl --model nowhere --out scored",
]
"""Commands of which one recording is enough."""
KINDS = {"terminal-80": 80, "terminal-120": 120, "no-color": 80, "pipe": None}
"""Name of each recording -> columns of the terminal."""


def data(folder: Path) -> Path:
    """Two scored directories, and a masked one."""
    write_scored(folder / "scored", some_rows(40, lengths=(4, 30)), with_id=True)
    write_scored(folder / "more", some_rows(25, seed=3, lengths=(4, 30)), with_id=True)
    config = {"scored": str(folder / "scored"), "out": str(folder / "masked"), "epochs": 3, "eval_fraction": 0.2}
    materialize(MaterializeConfig(**config))
    return folder


def shown(kind: str, place: Path) -> str:
    """What the commands print in a folder, one after the other."""
    columns = KINDS[kind]
    kept = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "COLUMNS", "LINES")}
    environment = {**kept, "PYTHONPATH": str(ROOT), "TERM": "xterm-256color", "HF_HUB_OFFLINE": "1"}
    if kind == "no-color":
        environment["NO_COLOR"] = "1"
    command = [sys.executable, "-c", RUN, json.dumps([*SHOWN, *(MADE if kind == "terminal-80" else [])])]
    if columns is None:
        done = OFFLINE.run(command, cwd=place, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        return normal(done.stdout.decode())
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 50, columns, 0, 0))
    pieces: list[bytes] = []
    reader = threading.Thread(target=lambda: pieces.extend(iter(lambda: read(master), b"")))
    process = OFFLINE.popen(command, cwd=place, env=environment, stdin=slave, stdout=slave, stderr=slave)
    os.close(slave)
    reader.start()
    process.wait()
    reader.join()
    os.close(master)
    return normal(b"".join(pieces).decode().replace("\r\n", "\n"))


def read(master: int) -> bytes:
    try:
        return os.read(master, 1 << 16)
    except OSError:  # Linux says so where the other end is closed
        return b""


def normal(text: str) -> str:
    """Without what differs from run to run; of a line that was written over, what is left."""
    lines = [line.rpartition("\r")[2].replace("\x1b[A", "").rstrip(" ") for line in text.split("\n")]
    text = "\n".join(lines).replace("\x1b", "␛")
    text = re.sub(r"^study of .*$", "study of ...", text, flags=re.MULTILINE)
    text = re.sub(r"\b[0-9a-f]{64}\b", "0123abcd" * 8, text)
    text = re.sub(r"[\d.,]+ tokens/s", "N tokens/s", text)
    text = re.sub(r"\b[\d.,]+ ([kMGT]i?B|bytes)\b", r"N \1", text)
    return re.sub(r"\b[\d.,]+ (s|min|h)\b", r"N \1", text)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return data(tmp_path_factory.mktemp("recorded"))


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_shown_as_it_was_looked_at(kind: str, place: Path) -> None:
    found = shown(kind, place)
    assert found == (RECORDED / f"{kind}.txt").read_text(encoding="utf-8"), "record it again if it is meant to differ"


@pytest.mark.parametrize("kind", KINDS)
def test_no_line_of_ours_is_cut(kind: str) -> None:
    """A line that is wider than the terminal is a message or a row's text, never a table, a bar or a panel."""
    lines = [re.sub(r"␛\[[0-9;]*m", "", line) for line in (RECORDED / f"{kind}.txt").read_text().splitlines()]
    wide = [line for line in lines if len(line) > (KINDS[kind] or 80)]
    assert not [line for line in wide if re.match(r"\s*(epoch|\d+ )|[│╭╰]", line)]


def main() -> None:
    """Write ``recorded/``."""
    with tempfile.TemporaryDirectory() as tmp:
        shutil.rmtree(RECORDED, ignore_errors=True)
        RECORDED.mkdir()
        place = data(Path(tmp))
        for kind in KINDS:
            (RECORDED / f"{kind}.txt").write_text(shown(kind, place), encoding="utf-8")


if __name__ == "__main__":
    main()
