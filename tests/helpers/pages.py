"""The commands in the console blocks of a documentation page, and what the command line makes of them."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer.main

from entrodrop_prep.cli import app
from entrodrop_prep.config import MaterializeConfig, PushConfig, ScoreConfig, ServeConfig, build

ROOT = Path(__file__).resolve().parents[2]
CONFIGS: dict[str, type] = {
    **{"score": ScoreConfig, "serve": ServeConfig, "materialize": MaterializeConfig},
    "push": PushConfig,
}
IMAGE = re.compile(r"entrodrop-prep:\w+$")


@dataclass(frozen=True)
class Line:
    """A command line of a page: the variables set before it, and its words."""

    environment: dict[str, str]
    words: list[str]

    @property
    def arguments(self) -> list[str] | None:
        """Those of the ``entrodrop`` in it, be it started by itself, in an image or as an image's entry point."""
        if "entrodrop" in self.words:
            return self.words[self.words.index("entrodrop") + 1 :]
        if self.words[:2] == ["docker", "run"]:
            image = next(i for i, word in enumerate(self.words) if IMAGE.match(word))
            return self.words[image + 1 :]
        return None


def console_lines(page: Path) -> list[Line]:
    """The lines behind ``$`` of a page, in order."""
    found = []
    for block in re.findall(r"^```console\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL):
        for text in re.findall(r"^\$ ((?:.*\\\n)*.*)$", block, re.MULTILINE):
            words = shlex.split(text.replace("\\\n", " "))
            environment = {}
            while match := re.match(r"([A-Z_]+)=(.*)", words[0]):
                environment[match[1]] = match[2]
                words = words[1:]
            found.append(Line(environment, words))
    return found


def settings_of(arguments: list[str]) -> Any:
    """What the command line makes of the arguments of ``entrodrop``, checked as a run would. Raises as a run would."""
    group: Any = typer.main.get_command(app)
    name, *rest = arguments
    values = {k: v for k, v in group.commands[name].make_context(name, rest).params.items() if v is not None}
    if name not in CONFIGS:
        return values
    return build(CONFIGS[name], {k: v for k, v in values.items() if k not in ("quiet", "verbose", "json")})
