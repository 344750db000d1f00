"""The same bytes in every environment: hash seed, locale, time zone, umask, working directory, number of threads."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import entrodrop_prep
from helpers.scored import all_bytes

pytestmark = pytest.mark.faults

MODEL = Path(entrodrop_prep.__file__).parent / "demo" / "model"
ROOT = MODEL.parents[2]
USUAL = {"PYTHONHASHSEED": "0", "LC_ALL": "C.UTF-8", "TZ": "UTC", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
VARIANTS: dict[str, dict[str, str]] = {
    **{f"hash seed {n}": {"PYTHONHASHSEED": str(n)} for n in (1, 4294967295)},
    "hash seed at random": {"PYTHONHASHSEED": "random"},
    "plain C": {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    "German": {"LC_ALL": "de_DE.ISO-8859-1", "PYTHONUTF8": "0"},
    "Turkish": {"LC_ALL": "tr_TR.UTF-8"},
    **{f"zone {zone}": {"TZ": zone} for zone in ("Pacific/Kiritimati", "America/St_Johns")},
    **{f"{n} threads": {"OMP_NUM_THREADS": str(n)} for n in (2, 4)},
    "threads as torch likes": {"OMP_NUM_THREADS": ""},
    "umask 077": {},
    "umask 000": {},
    "another working directory": {},
}


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Text and chats with letters that locales treat in ways of their own."""
    source = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    text = Path(json.__file__).read_text() + "Iıİi ßẞ äöü ÿŸ 1.234,5 東京 🙂 "
    chunks = [text[211 * i : 211 * i + 90 + 40 * (i % 9)] + "ıİß" for i in range(60)]
    records = [{"prompt": chunk[:40], "completion": chunk[40:], "name": chunk[:3]} for chunk in chunks]
    source.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records), encoding="utf-8")
    return source


@pytest.fixture(scope="module")
def locales(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Where the locales of ``VARIANTS`` are; without the sources of locales the system's own must do."""
    folder = tmp_path_factory.mktemp("locales")
    for name in ("de_DE.ISO-8859-1", "tr_TR.UTF-8"):
        language, _, charset = name.partition(".")
        if shutil.which("localedef") and Path("/usr/share/i18n/locales", language).exists():
            subprocess.run(["localedef", "-i", language, "-f", charset, folder / name], check=True, capture_output=True)
    return {"LOCPATH": str(folder)} if any(folder.iterdir()) else {}


def made(folder: Path, rows: Path, environment: dict[str, str], name: str = "") -> dict[str, bytes]:
    """All bytes of a scored and a masked directory that processes in an environment make."""
    folder.mkdir()
    given, here = str(rows), folder
    if name == "another working directory":
        given, here = rows.name, rows.parent
    score = ["score", given, "--model", str(MODEL), "--out", str(folder / "scored"), "--backend", "transformers"]
    score += ["--device", "cpu", "--rows-per-shard", "16", "--max-length", "96", "--keep-columns", "name"]
    mask = ["materialize", str(folder / "scored"), "--out", str(folder / "masked"), "--epochs", "3"]
    mask += ["--rows-per-shard", "25", "--target", "both", "--layout", "jsonl"]
    for arguments in (score, mask):
        done = subprocess.run(
            [sys.executable, "-m", "entrodrop_prep", *arguments],
            cwd=here,
            env={**os.environ, **USUAL, **environment},
            umask=int(name.removeprefix("umask "), 8) if name.startswith("umask") else 0o022,
            capture_output=True,
        )
        assert done.returncode == 0, done.stderr.decode(errors="replace")
    return all_bytes(folder)


@pytest.fixture(scope="module")
def usual(rows: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    return made(tmp_path_factory.mktemp("usual") / "made", rows, {})


@pytest.mark.parametrize("name", VARIANTS)
def test_the_same_bytes(
    name: str, rows: Path, usual: dict[str, bytes], locales: dict[str, str], tmp_path: Path
) -> None:
    found = made(tmp_path / "made", rows, {**locales, **VARIANTS[name]}, name)
    assert found.keys() == usual.keys()
    assert [path for path, data in usual.items() if found[path] != data] == []
