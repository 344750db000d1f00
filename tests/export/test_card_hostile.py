"""Names in a card show as they are: no HTML, no heading, no table cell and no key of the front matter comes of one."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import DatasetCard

from entrodrop_prep import MaterializeConfig, materialize
from entrodrop_prep.export.card import END, masked_card, read_card, scored_card
from entrodrop_prep.export.card.escape import code, words
from entrodrop_prep.export.card.front import split_card
from entrodrop_prep.store.manifest import read
from entrodrop_prep.store.schema import MASKED
from entrodrop_prep.store.scored import ScoredDataset
from helpers.scored import some_rows, write_scored

NAMES = [
    "a\n\n## Injected\n\n<img src=x onerror=alert(1)>",
    "x | y | z\n| a | b |",
    "`` ` ``` </code><script>alert(1)</script>",
    "[x](javascript:alert(1)) ![y](http://h/p.png) <http://h>",
    f"{END}\n---\nlicense: mit\n---\n# Title",
    "\x1b]0;t\x07\u202e\u2028# x",
    '"); import os; os.system("x") #',
    "**bold** _it_ ~~s~~ &lt;b&gt; \\",
    "'; touch PWNED; '",
]
KEPT = {"schema", "file", "sha256", "folder", "bounds", "kind"}
"""Values that the program itself goes by."""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    write_scored(folder / "scored", some_rows(20), rows_per_shard=10)
    write_scored(folder / "held", some_rows(9, seed=1))
    for out, names in (("one", [""]), ("two", ["a=", "b="])):
        scored = tuple(f"{name}{folder / 'scored'}" for name in names)
        more = {} if out == "two" else {"eval": str(folder / "held")}
        materialize(MaterializeConfig(scored=scored, out=str(folder / out), epochs=2, **more))
    return folder


def renamed(value: Any, name: str, key: str = "") -> Any:
    """A manifest in which every text but ``KEPT`` is this name."""
    if isinstance(value, dict):
        return {k: renamed(v, name, k) for k, v in value.items()}
    if isinstance(value, list):
        return [renamed(v, name, key) for v in value]
    return name if isinstance(value, str) and key not in KEPT else value


def shape(card: str) -> list[str]:
    """Lines that Markdown goes by: what each begins with, and the cells of tables."""
    text = re.sub(r"<!-- entrodrop-prep: [^>]*-->", "<!--", split_card(card)[1])
    assert not re.findall("<(?!!--)", text)
    assert not [c for c in text if not c.isprintable() and c != "\n"]
    lines = text.splitlines()
    return [
        re.match(r"\s*(#+|- |```\w*|!\[|<!--|\||\w)?", line)[0] + "|" * len(re.findall(r"(?<!\\)\|", line))
        for line in lines
    ]  # type: ignore[index]


def front(card: str) -> dict[str, Any]:
    return dict(yaml.safe_load(split_card(card)[0]))


@pytest.mark.parametrize("which", ["one", "two"])
def test_a_masked_dataset(which: str, made: Path) -> None:
    manifest = read(made / which, MASKED)
    harmless = masked_card("", renamed(manifest, "x"), title="x", repo="u/n")
    for name in NAMES:
        card = masked_card("", renamed(manifest, name), title=name, repo="u/n")
        assert shape(card) == shape(harmless), name
        assert front(card).keys() == front(harmless).keys()
        assert DatasetCard(card).data.to_dict().keys() == DatasetCard(harmless).data.to_dict().keys()
        assert masked_card(card, renamed(manifest, name), title=name, repo="u/n") == card
        assert f'load_dataset("u/n", "{manifest["epochs"][0]["folder"]}"' in card


def test_a_scored_directory(made: Path) -> None:
    scored = ScoredDataset(made / "scored")
    plain = copy.deepcopy(scored.manifest)
    scored.manifest = {
        **scored.manifest,
        "source": {**plain["source"], "name": "x"},
        "model": {**plain["model"], "name": "x"},
    }
    harmless = scored_card("", scored, title="x", repo="u/n", with_recipe=False)
    for name in NAMES:
        for part in ("source", "model"):
            scored.manifest[part]["name"] = name
        card = scored_card("", scored, title=name, repo="u/n", with_recipe=False)
        assert shape(card) == shape(harmless), name


def test_what_is_shown() -> None:
    assert words("my_rows-2024.jsonl") == "my_rows-2024.jsonl"
    assert words("_x_ a*b <i>&amp;") == "\\_x\\_ a\\*b &lt;i&gt;&amp;amp;"
    assert words("a\nb\x1b") == "a\\\\nb\\\\x1b"
    assert words("https://u:S3cr3t@h/x?sig=S3cr3t") == "https://h/x?..."
    assert (code("ab12"), code("a`b"), code("<b>"), code("")) == ("`ab12`", "a\\`b", "&lt;b&gt;", "")


def test_yaml_that_grows(made: Path, tmp_path: Path) -> None:
    """Aliases of aliases, and nesting without end: front matter that cannot be read is the user's text."""
    manifest = read(made / "one", MASKED)
    bomb = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 60))
    for block in (bomb, "a: &a [*a]\n", "a: " + "[" * 20_000 + "]" * 20_000 + "\n", "a: " + "{b: " * 5000 + "\n"):
        (tmp_path / "README.md").write_text(f"---\n{block}---\n\n# Mine\n")
        card = masked_card(read_card(tmp_path), manifest, title="x")
        assert "# Mine" in card
        assert front(card)["configs"][0]["config_name"] == "all"
