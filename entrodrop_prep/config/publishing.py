"""Settings of ``push``."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated

from entrodrop_prep.config.settings import Setting, validate
from entrodrop_prep.errors import ConfigError

REF = re.compile(r"[A-Za-z0-9][\w./-]*", re.ASCII)
LICENSE = re.compile(r"[a-z0-9][a-z0-9.+-]*")


@dataclass(frozen=True, kw_only=True)
class PushConfig:
    """Settings of ``entrodrop push``."""

    directory: Annotated[
        str, Setting("Scored or masked directory, finished.", argument=True, metavar="DIR", role="operation")
    ]
    repo: Annotated[
        str, Setting("Dataset repository on the Hub.", argument=True, metavar="USER/NAME", role="operation")
    ]
    private: Annotated[
        bool,
        Setting(
            "Visibility of a repository that is made; one that is there must have it already. [default: private]",
            role="operation",
            off="--public",
        ),
    ] = True
    branch: Annotated[
        str, Setting("Branch to commit to; made from main if it is not there.", metavar="NAME", role="operation")
    ] = "main"
    tag: Annotated[
        str | None,
        Setting("Tag to set on the commit once it was loaded back.", metavar="NAME", role="operation"),
    ] = None
    commit_message: Annotated[
        str | None,
        Setting(
            "First line of the commit's message.",
            metavar="TEXT",
            role="operation",
            default_text="what is pushed and its digest",
        ),
    ] = None
    license: Annotated[
        str | None,
        Setting(
            "Licence of the data, by the Hub's identifier (apache-2.0, cc-by-4.0, other, ...).",
            metavar="ID",
            role="operation",
            default_text="that of README.md",
        ),
    ] = None
    include_scored: Annotated[
        str | None,
        Setting(
            "Scored directory that the masks were made from, to publish with them under scored/.",
            metavar="SCORED",
            role="operation",
        ),
    ] = None
    recipe: Annotated[
        str | None,
        Setting("Recipe file to publish beside a scored directory, as recipe.yaml.", metavar="FILE", role="operation"),
    ] = None
    token_stdin: Annotated[
        bool, Setting("Read the token from the first line of stdin.", role="operation", panel="Access and retries")
    ] = False
    retries: Annotated[
        int,
        Setting(
            "How often a call is tried again after a passing failure.",
            ge=0,
            le=100,
            role="operation",
            panel="Access and retries",
        ),
    ] = 6
    retry_seconds: Annotated[
        float,
        Setting(
            "Wait before the first new try; it doubles up to a minute. The Hub's own Retry-After wins.",
            ge=0,
            metavar="S",
            role="operation",
            panel="Access and retries",
        ),
    ] = 2.0
    timeout: Annotated[
        float,
        Setting(
            "Seconds without a byte from the Hub that count as a failure.",
            gt=0,
            metavar="S",
            role="operation",
            panel="Access and retries",
        ),
    ] = 300.0

    def __post_init__(self) -> None:
        validate(self)
        from entrodrop_prep.config.names import is_repo_id

        if not is_repo_id(self.repo):
            raise ConfigError(
                f"{self.repo!r} is no name of a repository",
                fix="write it USER/NAME, of letters, digits, `-`, `_` and `.`",
            )
        for name, value in (("--branch", self.branch), ("--tag", self.tag)):
            if value is not None and (not REF.fullmatch(value) or ".." in value):
                raise ConfigError(f"{name} {value!r} is no name for it", fix="use letters, digits, `-`, `_` and `.`")
        if self.license is not None and not LICENSE.fullmatch(self.license):
            raise ConfigError(
                f"--license {self.license!r} is no identifier of a licence",
                fix="write it as the Hub does, such as apache-2.0 or cc-by-4.0, or other",
            )
        if self.commit_message is not None and not self.commit_message.strip():
            raise ConfigError("--commit-message is empty", fix="leave it out, or say something")
