"""The wheel holds the package and nothing else, and declares all that it needs."""

from __future__ import annotations

import ast
import importlib.metadata
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "entrodrop_prep"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
INPUTS = ("pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", "cli.py")
FOLDERS = ("entrodrop_prep", "docs", "examples", "schemas", "scripts", "tests")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy of the tree, so that nothing is left in it."""
    folder = tmp_path_factory.mktemp("wheel")
    tree = folder / "tree"
    tree.mkdir()
    for name in INPUTS:
        shutil.copy2(ROOT / name, tree / name)
    for name in FOLDERS:
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(tree)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = folder.glob("*.whl")
    return built


def test_only_the_package_is_in_it(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    tops = {name.split("/")[0] for name in names}
    assert {t for t in tops if not t.endswith(".dist-info")} == {"entrodrop_prep"}
    assert len(tops) == 2
    inside = {name.removeprefix("entrodrop_prep/") for name in names if name.startswith("entrodrop_prep/")}
    code = {p.relative_to(PACKAGE).as_posix() for p in PACKAGE.rglob("*.py")}
    model = {p.relative_to(PACKAGE).as_posix() for p in (PACKAGE / "demo" / "model").iterdir()}
    folders = [PACKAGE / name for name in ("scoring/templates", "trainers/templates", "verification/report/page")]
    templates = {p.relative_to(PACKAGE).as_posix() for folder in folders for p in folder.iterdir()}
    assert {"scoring/templates/chatml.jinja", "trainers/templates/trl.py.j2"} <= templates
    assert inside == code | model | templates | {"py.typed", "__init__.pyi"}
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert sum(p.stat().st_size for p in (PACKAGE / "demo" / "model").iterdir()) < 4 << 20


def test_it_runs_with_only_what_the_help_needs(wheel: Path, tmp_path: Path) -> None:
    venv = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(venv)], check=True)
    python = venv / "bin" / "python"
    subprocess.run(
        [sys.executable, "-m", "pip", "--python", str(python), "install", "-q", "--no-deps", "--no-index", str(wheel)],
        check=True,
        capture_output=True,
    )
    (site,) = (venv / "lib").glob("python*/site-packages")
    for name in _with_requirements("typer", without={"pydantic"}):
        _copy_distribution(name, site)
    done = subprocess.run([str(venv / "bin" / "entrodrop"), "--help"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "materialize" in done.stdout
    where = subprocess.run(
        [str(python), "-c", "import entrodrop_prep; print(entrodrop_prep.__file__)"],
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
    )
    assert Path(where.stdout.strip()).is_relative_to(venv)
    module = [str(python), "-m", "entrodrop_prep", "--help"]
    assert subprocess.run(module, capture_output=True, text=True, check=True).stdout == done.stdout


def _with_requirements(name: str, without: set[str]) -> set[str]:
    """A distribution and those it needs, as far as they are installed."""
    found, queue = set(), [name]
    while queue:
        name = queue.pop()
        if name in found or name in without:
            continue
        try:
            requires = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:  # for another platform or Python
            continue
        found.add(name)
        queue += [re.split(r"[\s;<>=!~\[(]", r)[0] for r in requires if "extra ==" not in r]
    return found


def _copy_distribution(name: str, site: Path) -> None:
    for file in importlib.metadata.files(name) or []:
        source, target = Path(str(file.locate())), site / str(file)
        if ".." not in file.parts and source.is_file():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, target)


def _imported() -> set[str]:
    """Top-level names of every third-party import of the package, wherever in the code it stands."""
    tops = set()
    for file in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                tops |= {a.name.split(".")[0] for a in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                tops.add((node.module or "").split(".")[0])
    return tops - set(sys.stdlib_module_names) - {"entrodrop_prep"}


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", re.split(r"[\s;<>=!~\[(]", name)[0]).lower()


def test_every_import_is_declared() -> None:
    extras = [r for name, extra in PROJECT["optional-dependencies"].items() if name != "test" for r in extra]
    declared = {"triton", *(_normal(r) for r in [*PROJECT["dependencies"], *extras])}  # comes with torch for GPUs
    provided = importlib.metadata.packages_distributions()
    for top in sorted(_imported()):
        by = {_normal(d) for d in provided.get(top, [top])}
        assert by & declared, f"{top} is imported, and {' or '.join(sorted(by))} is not declared"


def test_every_declared_dependency_is_imported() -> None:
    provided = importlib.metadata.packages_distributions()
    used = {_normal(d) for top in _imported() for d in provided.get(top, [])}
    assert {_normal(r) for r in PROJECT["dependencies"]} <= used
