"""Imports point one way, and heavy packages load where they are used. Read from the source, nothing is imported."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "entrodrop_prep"
FILES = sorted(PACKAGE.rglob("*.py"))


def module_of(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(f): f for f in FILES}


@dataclass(frozen=True)
class Import:
    """``name`` as imported; ``when`` it happens: ``load``, ``call`` (inside a function) or ``typing``."""

    name: str
    when: str


def imports_of(module: str) -> list[Import]:
    file = MODULES[module]
    package = module if file.name == "__init__.py" else module.rpartition(".")[0]
    tree = ast.parse(file.read_text(encoding="utf-8"))
    return list(_walk(tree, package, "load"))


def _walk(node: ast.AST, package: str, when: str) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from (Import(a.name, when) for a in child.names)
        elif isinstance(child, ast.ImportFrom):
            base = child.module or ""
            if child.level:
                above = package.split(".")[: len(package.split(".")) - child.level + 1]
                base = ".".join([*above, *([base] if base else [])])
            for a in child.names:
                name = f"{base}.{a.name}"
                yield Import(name if name in MODULES else base, when)
        elif isinstance(child, ast.If) and _is_type_checking(child.test):
            yield from _walk(ast.Module(child.body, []), package, "typing")
            yield from _walk(ast.Module(child.orelse, []), package, when)
        elif isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            yield from _walk(child, package, "call" if when == "load" else when)
        else:
            yield from _walk(child, package, when)


def _is_type_checking(test: ast.expr) -> bool:
    return getattr(test, "id", getattr(test, "attr", None)) == "TYPE_CHECKING"


def inside(name: str, *packages: str) -> bool:
    return any(name == p or name.startswith(p + ".") for p in packages)


def ours(module: str, *, also: tuple[str, ...] = ("load", "call", "typing")) -> set[str]:
    return {i.name for i in imports_of(module) if inside(i.name, "entrodrop_prep") and i.when in also}


def in_package(name: str) -> list[str]:
    found = [m for m in MODULES if inside(m, f"entrodrop_prep.{name}")]
    assert found, f"there is no package {name}"
    return found


def test_the_source_was_found() -> None:
    assert {"entrodrop_prep.cli", "entrodrop_prep.scoring.run", "entrodrop_prep.export.materialize"} <= set(MODULES)
    assert "entrodrop_prep.scoring.plan" in ours("entrodrop_prep.scoring.run")
    heavy = {i for m in MODULES for i in imports_of(m) if inside(i.name, "torch")}
    assert Import("torch", "load") in heavy
    assert {i.when for i in heavy} == {"load", "call", "typing"}


def test_only_a_scored_directory_crosses_between_scoring_and_export() -> None:
    for one, other in (("scoring", "export"), ("export", "scoring")):
        for module in in_package(one):
            assert not [n for n in ours(module) if inside(n, f"entrodrop_prep.{other}")], module


def test_nothing_imports_the_loader() -> None:
    """A training process calls it; its rows know nothing of torch."""
    for module in MODULES:
        if not inside(module, "entrodrop_prep.loader"):
            loader = [n for n in ours(module, also=("load", "call")) if inside(n, "entrodrop_prep.loader")]
            assert not loader, f"{module}: {loader}"
    for module in in_package("loader"):
        assert "entrodrop_prep.loader.stream" not in ours(module, also=("load",)), module


def test_sample_is_pure_numpy() -> None:
    allowed = (
        "entrodrop_prep.sample",
        "entrodrop_prep.config",
        "entrodrop_prep.config.settings",
        "entrodrop_prep.errors",
    )
    for module in in_package("sample"):
        for i in imports_of(module):
            top = i.name.split(".")[0]
            assert top == "numpy" or top in sys.stdlib_module_names or inside(i.name, *allowed), f"{module}: {i.name}"


def test_backends_know_neither_scoring_nor_export() -> None:
    for module in in_package("backends"):
        assert not [n for n in ours(module) if inside(n, "entrodrop_prep.scoring", "entrodrop_prep.export")], module


def test_the_hub_is_behind_export_and_knows_no_scoring() -> None:
    for module in in_package("hub"):
        assert not [n for n in ours(module) if inside(n, "entrodrop_prep.scoring", "entrodrop_prep.backends")], module
    for module in MODULES:
        if not inside(module, "entrodrop_prep.hub", "entrodrop_prep.cli", "entrodrop_prep"):
            called = [n for n in ours(module) if inside(n, "entrodrop_prep.hub")]
            assert not called or module == "entrodrop_prep.export.materialize", module
            assert not [n for n in ours(module, also=("load",)) if inside(n, "entrodrop_prep.hub")], module


def test_recipes_stand_at_the_end() -> None:
    allowed = ("trainers", "manifest", "schema", "shards", "errors", "text", "export.card", "export.derived", "losses")
    for module in in_package("trainers"):
        also = ("scoring.tokenizer", "backends.model") if module.endswith(".trainers.model") else ()
        for name in ours(module):
            assert name == "entrodrop_prep" or inside(name, *(f"entrodrop_prep.{a}" for a in (*allowed, *also))), name
    for module in MODULES:
        if not inside(module, "entrodrop_prep.trainers", "entrodrop_prep.cli") and module != "entrodrop_prep":
            assert not [n for n in ours(module) if inside(n, "entrodrop_prep.trainers")], module


def test_losses_know_the_errors_alone() -> None:
    assert ours("entrodrop_prep.training.losses") == {"entrodrop_prep.errors"}


def test_what_the_hub_refuses_is_put_in_words_without_anything_of_ours() -> None:
    assert not ours("entrodrop_prep.hub.read_errors") - {"entrodrop_prep"}
    for module in [*in_package("scoring"), *in_package("backends")]:
        assert {n for n in ours(module) if inside(n, "entrodrop_prep.hub")} <= {"entrodrop_prep.hub.read_errors"}, (
            module
        )


def test_nothing_below_the_command_line_imports_it_or_the_demo() -> None:
    for module in MODULES:
        if inside(module, "entrodrop_prep.cli", "entrodrop_prep.__main__", "entrodrop_prep.demo", "entrodrop_prep"):
            continue
        assert not [n for n in ours(module) if inside(n, "entrodrop_prep.cli", "entrodrop_prep.demo")], module


@pytest.mark.parametrize("module", [f"entrodrop_prep{name}" for name in ("", ".config", ".errors", ".text")])
def test_declarations_load_the_standard_library_alone(module: str) -> None:
    for i in imports_of(module):
        if i.when == "load":
            top = i.name.split(".")[0]
            assert top == "entrodrop_prep" or top in sys.stdlib_module_names, f"{module}: {i.name}"


def test_the_command_line_loads_only_typer_and_the_declarations() -> None:
    allowed = (
        "typer",
        *(f"entrodrop_prep.{name}" for name in ("config", "settings", "errors", "interrupt", "places", "text")),
    )
    for i in imports_of("entrodrop_prep.cli"):
        if i.when == "load" and i.name != "entrodrop_prep":
            assert i.name.split(".")[0] in sys.stdlib_module_names or inside(i.name, *allowed), i.name


def test_the_engine_knows_nothing_else_of_ours() -> None:
    for module in in_package("engine"):
        for i in imports_of(module):
            top = i.name.split(".")[0]
            assert (
                top in ("torch", "vllm", "numpy", "transformers")
                or top in sys.stdlib_module_names
                or inside(i.name, "entrodrop_prep.engine")
            ), f"{module}: {i.name}"
    for i in imports_of("entrodrop_prep.engine.plugin"):
        if i.when == "load":
            assert i.name.split(".")[0] in sys.stdlib_module_names, i.name


def test_heavy_packages_load_where_they_are_used() -> None:
    inside_engines = ("entrodrop_prep.engine.models", "entrodrop_prep.engine.pooler", "entrodrop_prep.engine.reduce")
    for module in MODULES:
        if module in ("entrodrop_prep.backends.transformers", "entrodrop_prep.loader.stream", *inside_engines):
            continue
        heavy = [
            i
            for i in imports_of(module)
            if i.when == "load" and inside(i.name, "torch", "transformers", "datasets", "huggingface_hub")
        ]
        assert not heavy, f"{module}: {heavy}"


def test_transformers_backend_is_imported_by_name_only() -> None:
    for module in MODULES:
        if module != "entrodrop_prep.backends.transformers":
            assert "entrodrop_prep.backends.transformers" not in ours(module, also=("load",)), module


def test_no_import_cycles() -> None:
    graph = {m: ours(m, also=("load",)) - {m, "entrodrop_prep"} for m in MODULES}
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, f"cycle: {' -> '.join([*path[path.index(module) :], module])}"
        if module not in done:
            for name in sorted(graph.get(module, set())):
                visit(name, (*path, module))
            done.add(module)

    for module in graph:
        visit(module, ())


def test_product_code_has_no_asserts_broad_excepts_or_test_switches() -> None:
    for file in FILES:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            assert not isinstance(node, ast.Assert), f"{file.name}:{node.lineno}"
            if isinstance(node, ast.ExceptHandler):
                broad = node.type is None or (isinstance(node.type, ast.Name) and node.type.id == "Exception")
                assert not broad, f"{file.name}:{node.lineno}"
    for module in MODULES:
        for i in imports_of(module):
            assert not inside(i.name, "pytest", "hypothesis", "unittest"), module
