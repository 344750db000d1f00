"""Names in a printed script or a file of settings are data there, whatever is in them."""

from __future__ import annotations

import ast
import shlex
import subprocess
from dataclasses import replace
from typing import Any

import pytest
import yaml

from entrodrop_prep.trainers import TRAINERS, recipe_of
from entrodrop_prep.trainers.facts import Epoch, Facts
from entrodrop_prep.trainers.notes import comment
from entrodrop_prep.trainers.quote import text, word

NAMES = [
    'x\nimport os; os.system("touch PWNED")\n#',
    "x\ntouch PWNED\n",
    "x\r\nmodel: other\n- a\n...\n---\nb: c",
    "x\x0b\x0cy\x85model: other\u2028model: other\u2029model: other",
    "'''\"\"\"\\\"\\'\\",
    '"; import os #',
    "$model ${masked} $$ $(touch PWNED) `touch PWNED` && touch PWNED; touch PWNED",
    "{{ x }} {% x %} %(x)s %s {x} {0}",
    "&a *a !!python/object/apply:os.system [x] {y: z} # ? : - |",
    "\x00\x07\x1b]0;title\x07\x1b[31m\x7f\x9b",
    "\u202egnp.exe\u2066\u200b\ufeff",
    "emoji \N{GRINNING FACE} \u65e5\u672c \udcff\udc80 {% endif %} {# x #}",
    "-x --y",
]
SCRIPTS = [name for name in TRAINERS if name not in ("axolotl", "llama-factory", "ms-swift")]
COLUMNS = {"plain": (), "columns": ("x",), "packed": ("x", "position_ids", "n_trainable")}


def facts(name: str, columns: tuple[str, ...] = ()) -> Facts:
    """Of a dataset in which every text is this name."""
    return Facts(
        directory=f"./{name}",
        epochs=(Epoch(name, 22, 440, 400, 390, 0.025), Epoch(name, 22, 440, 400, 300, 0.25)),
        target="both",
        drop_token=name,
        validation_rows=5,
        columns=tuple(name if c == "x" else c for c in columns),
        layouts=("concatenated",),
        packed=64 if "position_ids" in columns else None,
        longest=31,
        model=f"m/{name}",
        content_digest=f"{name}01234567",
        notes=(f"the model {name} differs.",),
    )


class _Strings(ast.NodeTransformer):
    """Every string becomes the same one."""

    def visit_Constant(self, node: ast.Constant) -> ast.Constant:
        return ast.Constant("") if isinstance(node.value, str) else node


def shape(script: str) -> str:
    return ast.dump(_Strings().visit(ast.parse(script)))


def constants(script: str) -> set[Any]:
    return {n.value for n in ast.walk(ast.parse(script)) if isinstance(n, ast.Constant)}


def printed(recipe: str) -> str:
    """What is redirected into a file: stdout writes escapes for what UTF-8 has no bytes for."""
    shown = recipe.encode("utf-8", "backslashreplace").decode()
    assert not [c for c in shown if not c.isprintable() and c != "\n"]
    return shown


@pytest.mark.parametrize("columns", COLUMNS.values(), ids=COLUMNS)
@pytest.mark.parametrize("trainer", SCRIPTS)
def test_a_script_is_the_same_program_for_every_name(trainer: str, columns: tuple[str, ...]) -> None:
    expected = shape(recipe_of(trainer, facts("harmless", columns)))
    for name in NAMES:
        script = printed(recipe_of(trainer, facts(name, columns)))
        assert shape(script) == expected, name
        assert {f"./{name}", f"m/{name}"} <= constants(script)


@pytest.mark.parametrize("trainer", ["axolotl", "llama-factory"])
def test_settings_have_the_same_keys_and_values_for_every_name(trainer: str) -> None:
    def renamed(value: Any, old: str, new: str) -> Any:
        if isinstance(value, dict):
            return {k: renamed(v, old, new) for k, v in value.items()}
        if isinstance(value, list):
            return [renamed(v, old, new) for v in value]
        return value.replace(old, new) if isinstance(value, str) else value

    harmless = yaml.safe_load(recipe_of(trainer, facts("harmless")))
    for name in NAMES:
        found = yaml.safe_load(printed(recipe_of(trainer, facts(name))))
        expected = dict(harmless)
        expected["output_dir"] = facts(name).out_of(trainer, facts(name).model)
        if trainer == "axolotl":
            expected["dataset_prepared_path"] = f"{expected['output_dir']}/prepared"
        assert found == renamed(expected, "harmless", name), name


@pytest.mark.parametrize("name", NAMES)
def test_a_script_for_bash_gives_the_trainer_the_same_words(name: str) -> None:
    named = replace(facts(name.replace("\x00", "")), content_digest="01234567")
    script = printed(recipe_of("ms-swift", named))
    harmless = recipe_of("ms-swift", replace(facts("harmless"), content_digest="01234567"))
    assert len(shlex.split(script, comments=True)) == len(shlex.split(harmless, comments=True))
    run = script.replace("swift pt", "printf '%s\\0'").encode()
    words = subprocess.run(["bash"], input=run, check=True, capture_output=True).stdout.split(b"\0")[:-1]
    given = {k.decode(): v.decode("utf-8", "surrogateescape") for k, v in zip(words[::2], words[1::2], strict=True)}
    assert given["--model"] == named.model
    assert given["--cached_dataset"] == f"{named.directory}/all_hf/train"
    assert given["--cached_val_dataset"] == f"{named.directory}/all_hf/validation"
    assert given["--output_dir"] == named.out_of("ms-swift", named.model)


def test_literals_and_comments_are_one_line() -> None:
    for name in NAMES:
        assert ast.literal_eval(text(name)) == name
        assert yaml.safe_load(text(name)) == name
        for line in comment(name, f"  {name}").splitlines():
            assert line == "#" or line.startswith("# ")
    assert text('a"b') == '"a\\"b"'
    assert word("it's") == "'it'\"'\"'s'"
    assert word("x\x1b'") == "$'x\\x1b\\x27'"
