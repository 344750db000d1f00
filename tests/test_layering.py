"""Imports point one way, and heavy packages load where they are used. Read from the source, nothing is imported.

Each rule is a function of a program's files, so that it is also shown to fail on a program that breaks it.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "entrodrop_prep"

ROOMS = (
    "terminal",
    "errors",
    "config",
    "hub",
    "store",
    "vllm_plugin",
    "sources",
    "backends",
    "scoring",
    "masking",
    "export",
    "training",
    "verification",
    "publish",
    "trainers",
    "demo",
    "cli",
    "__main__",
)
"""From the ground up: a room imports from those before it only, when it is loaded and when it is called."""

NOT_ALLOWED = {
    "masking": ("sources", "backends", "scoring", "hub", "vllm_plugin"),
    "export": ("sources", "backends", "scoring", "hub", "vllm_plugin"),
    "training": ("sources", "backends", "scoring", "vllm_plugin"),
    "publish": ("sources", "backends", "scoring", "vllm_plugin"),
    "vllm_plugin": ("terminal", "errors", "config", "hub", "store"),
}
"""Rooms between which only files on disk pass, beyond what ``ROOMS`` says."""

HEAVY = ("torch", "triton", "transformers", "datasets", "huggingface_hub", "vllm", "ray")
MAY_LOAD_HEAVY = (
    "backends.transformers",
    "training.stream",
    "backends.devices",
    "vllm_plugin.fused",
    "vllm_plugin.head",
    "vllm_plugin.models",
    "vllm_plugin.pooler",
)
LIGHT = {"": (), "errors": (), "terminal": (), "config": (), "cli": ("typer", f"{PACKAGE}.cli")}
"""What may be loaded beside the standard library and these rooms, so that ``--help`` answers at once."""


@dataclass(frozen=True)
class Import:
    """``name`` as imported; ``when`` it happens: ``load``, ``call`` (inside a function) or ``typing``."""

    module: str
    name: str
    when: str
    line: int

    def __str__(self) -> str:
        return f"{self.module}:{self.line} imports {self.name} ({self.when})"


class Program:
    """The modules of a package and what each imports."""

    def __init__(self, root: Path) -> None:
        self.files: dict[str, Path] = {}
        for file in sorted((root / PACKAGE).rglob("*.py")):
            parts = file.relative_to(root).with_suffix("").parts
            self.files[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
        self.trees = {name: ast.parse(file.read_text(encoding="utf-8")) for name, file in self.files.items()}
        self.imports = [
            i for name, tree in self.trees.items() for i in self._walk(tree, name, self._package(name), "load")
        ]

    def _package(self, module: str) -> str:
        return module if self.files[module].name == "__init__.py" else module.rpartition(".")[0]

    def _walk(self, node: ast.AST, module: str, package: str, when: str) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                yield from (Import(module, a.name, when, child.lineno) for a in child.names)
            elif isinstance(child, ast.ImportFrom):
                base = child.module or ""
                if child.level:
                    above = package.split(".")[: len(package.split(".")) - child.level + 1]
                    base = ".".join([*above, *([base] if base else [])])
                for a in child.names:
                    name = f"{base}.{a.name}"
                    yield Import(module, name if name in self.files else base, when, child.lineno)
            elif isinstance(child, ast.If) and _is_type_checking(child.test):
                yield from self._walk(ast.Module(child.body, []), module, package, "typing")
                yield from self._walk(ast.Module(child.orelse, []), module, package, when)
            elif isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
                yield from self._walk(child, module, package, "call" if when == "load" else when)
            else:
                yield from self._walk(child, module, package, when)

    def ours(self) -> list[Import]:
        """Imports of this package by itself that happen: those for types alone are left out."""
        return [i for i in self.imports if i.when != "typing" and inside(i.name, PACKAGE)]


def _is_type_checking(test: ast.expr) -> bool:
    return getattr(test, "id", getattr(test, "attr", None)) == "TYPE_CHECKING"


def inside(name: str, *packages: str) -> bool:
    """Whether a module is one of ``packages`` or below it."""
    return any(name == p or name.startswith(p + ".") for p in packages)


def room_of(module: str) -> str:
    """The first name below the package; empty for the package itself."""
    return module.partition(".")[2].partition(".")[0]


def rooms_point_one_way(program: Program) -> list[str]:
    wrong = [f"{name}: no such room" for name in {room_of(m) for m in program.files} - {*ROOMS, ""}]
    for i in program.ours():
        here, there = room_of(i.module), room_of(i.name)
        if "" in (here, there) or here == there:  # the package's own file has the version, and the names of all
            continue
        if (
            there not in ROOMS
            or here not in ROOMS
            or ROOMS.index(there) > ROOMS.index(here)
            or there in NOT_ALLOWED.get(here, ())
        ):
            wrong.append(str(i))
    return wrong


def no_module_imports_in_a_circle(program: Program) -> list[str]:
    graph: dict[str, set[str]] = {m: set() for m in program.files}
    for i in program.ours():
        if i.name in graph and PACKAGE not in (i.name, i.module) and i.name != i.module:
            graph[i.module].add(i.name)
    done: set[str] = set()
    wrong: list[str] = []

    def visit(module: str, path: tuple[str, ...]) -> None:
        if module in path:
            wrong.append(f"circle: {' -> '.join([*path[path.index(module) :], module])}")
        elif module not in done:
            for name in sorted(graph[module]):
                visit(name, (*path, module))
            done.add(module)

    for module in graph:
        visit(module, ())
    return wrong


def masking_is_pure(program: Program) -> list[str]:
    """NumPy, Arrow for what is stored, and the standard library."""
    return [
        str(i)
        for i in program.imports
        if room_of(i.module) == "masking" and not inside(i.name, PACKAGE, "numpy", "pyarrow") and not standard(i.name)
    ]


def the_plugin_knows_nothing_else_of_ours(program: Program) -> list[str]:
    """vLLM loads it in every process of every run."""
    allowed = (f"{PACKAGE}.vllm_plugin", "torch", "triton", "vllm", "numpy", "transformers")
    wrong = []
    for i in program.imports:
        if room_of(i.module) == "vllm_plugin":
            at_once = i.module.endswith(".plugin") and i.when == "load"
            if not standard(i.name) and (at_once or not inside(i.name, *allowed)):
                wrong.append(str(i))
    return wrong


def heavy_packages_load_where_they_are_used(program: Program) -> list[str]:
    may = [f"{PACKAGE}.{name}" for name in MAY_LOAD_HEAVY]
    return [str(i) for i in program.imports if i.when == "load" and inside(i.name, *HEAVY) and i.module not in may] + [
        str(i)
        for i in program.imports
        if i.when == "load" and inside(i.name, *may[:2]) and not inside(i.module, f"{PACKAGE}.training")
    ]


def declarations_are_light(program: Program) -> list[str]:
    rooms = [f"{PACKAGE}.{r}" for r in (*LIGHT, "sources.given_paths") if r not in ("", "cli")]
    wrong = []
    for i in program.imports:
        allowed = LIGHT.get(room_of(i.module))
        if allowed is None or i.when != "load" or standard(i.name) or i.name == PACKAGE:
            continue
        if not inside(i.name, *rooms, *allowed):
            wrong.append(str(i))
    return wrong


def product_code_has_no_asserts_broad_excepts_or_test_switches(program: Program) -> list[str]:
    wrong = [str(i) for i in program.imports if inside(i.name, "pytest", "hypothesis", "unittest")]
    for module, tree in program.trees.items():
        for node in ast.walk(tree):
            broad = isinstance(node, ast.ExceptHandler) and (
                node.type is None or (isinstance(node.type, ast.Name) and node.type.id == "Exception")
            )
            if broad or isinstance(node, ast.Assert):
                wrong.append(f"{module}:{getattr(node, 'lineno', 0)}")
    return wrong


def standard(name: str) -> bool:
    return name.split(".")[0] in sys.stdlib_module_names


RULES: dict[Callable[[Program], list[str]], list[tuple[str, str]]] = {
    rooms_point_one_way: [
        ("store/a.py", "from entrodrop_prep.masking import mask"),
        ("masking/a.py", "def f():\n    from entrodrop_prep import scoring"),
        ("export/a.py", "import entrodrop_prep.scoring.run"),
        ("scoring/a.py", "def f():\n    from entrodrop_prep.export import card"),
        ("vllm_plugin/a.py", "from entrodrop_prep.errors import ScoreError"),
        ("elsewhere/a.py", ""),
    ],
    no_module_imports_in_a_circle: [
        ("store/a.py", "def f():\n    from entrodrop_prep.store import b"),
        ("store/a.py", "from entrodrop_prep.store.b import x"),
    ],
    masking_is_pure: [("masking/a.py", "import torch"), ("masking/a.py", "def f():\n    import datasets")],
    the_plugin_knows_nothing_else_of_ours: [
        ("vllm_plugin/a.py", "def f():\n    from entrodrop_prep.config import ScoreConfig"),
        ("vllm_plugin/plugin.py", "import torch"),
    ],
    heavy_packages_load_where_they_are_used: [
        ("store/a.py", "from torch import nn"),
        ("backends/a.py", "from entrodrop_prep.backends.transformers import TransformersBackend"),
    ],
    declarations_are_light: [
        ("config/a.py", "import numpy"),
        ("cli.py", "from entrodrop_prep.scoring import run"),
        ("errors.py", "import pyarrow"),
    ],
    product_code_has_no_asserts_broad_excepts_or_test_switches: [
        ("store/a.py", "assert True"),
        ("store/a.py", "try:\n    pass\nexcept Exception:\n    pass"),
        ("store/a.py", "import pytest"),
    ],
}
"""Each rule, and files that break it."""


def test_the_source_was_found() -> None:
    program = Program(ROOT)
    assert {room_of(m) for m in program.files} == {*ROOMS, ""}
    found = {(i.module.partition(".")[2], i.name, i.when) for i in program.imports}
    assert ("scoring.run", "entrodrop_prep.scoring.plan", "load") in found
    assert ("backends.transformers", "torch", "load") in found
    assert {i.when for i in program.imports if inside(i.name, "torch")} == {"load", "call", "typing"}


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_program_keeps_the_rule(rule: Callable[[Program], list[str]]) -> None:
    assert rule(Program(ROOT)) == []


@pytest.mark.parametrize(
    ("rule", "file", "text"),
    [(rule, *case) for rule, cases in RULES.items() for case in cases],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_program_that_breaks_the_rule_is_found(
    rule: Callable[[Program], list[str]], file: str, text: str, tmp_path: Path
) -> None:
    for name in ROOMS:
        (tmp_path / PACKAGE / name).mkdir(parents=True)
        (tmp_path / PACKAGE / name / "__init__.py").write_text("")
    (tmp_path / PACKAGE / "__init__.py").write_text("")
    (tmp_path / PACKAGE / "store" / "b.py").write_text("from entrodrop_prep.store import a")
    assert rule(Program(tmp_path)) == []
    path = tmp_path / PACKAGE / file
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    assert rule(Program(tmp_path)) != []


def test_the_top_level_is_short() -> None:
    there = [p for p in (ROOT / PACKAGE).iterdir() if p.is_file() or any(p.glob("*.py"))]
    assert len([p for p in there if p.suffix != ".pyi"]) <= 20  # the stub of __init__.py is generated from it
