"""Published datasets: what a repository on the Hub holds of a scored or masked directory, in the client's cache."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from entrodrop_prep.config.names import is_repo_id, user_path
from entrodrop_prep.errors import ConfigError, HubError, IntegrityError
from entrodrop_prep.hub.read_errors import asking, refusal
from entrodrop_prep.hub.refusals import unreachable_errors
from entrodrop_prep.store import manifest
from entrodrop_prep.store.layout import OTHER_FILES, SCORED_FILES, SCORED_FOLDER, SHARD_FILES
from entrodrop_prep.store.schema import MASKED, SCORED, family


@dataclass(frozen=True)
class Published:
    """A repository at a commit: ``directory`` holds its files, ``scored`` the scores published with it, if any."""

    repo: str
    commit: str
    directory: Path
    scored: Path | None


def is_published(name: str, revision: str | None) -> bool:
    """Whether a name means a dataset on the Hub: a local path wins. Raises ConfigError for a path's revision."""
    local = os.path.lexists(user_path(name))
    if local and revision is not None:
        raise ConfigError(
            f"--revision {revision}: {name} is a directory here, and has none",
            fix="leave it out, or run where no directory has the name of the dataset on the Hub",
        )
    return not local and is_repo_id(name)


def fetch(repo: str, revision: str | None = None, *, with_scored: bool = True) -> Published:
    """Download what the manifest of a published dataset lists, and what is where it should list it.

    Raises HubError where the Hub refuses or cannot be reached, IntegrityError where the repository holds no dataset
    of this program.
    """
    wanted = [manifest.NAME, *([f"{SCORED_FOLDER}/{manifest.NAME}"] if with_scored else [])]
    directory = download(repo, revision, wanted)
    if not (directory / manifest.NAME).is_file():
        raise IntegrityError(
            f"the dataset on the Hub has no {manifest.NAME}",
            where=repo,
            fix="give one that `entrodrop push` made, or a directory here",
        )
    commit, wanted = directory.name, _wanted(directory)
    scored = directory / SCORED_FOLDER
    if with_scored and (scored / manifest.NAME).is_file():
        wanted += [f"{SCORED_FOLDER}/{name}" for name in _wanted(scored)]
    download(repo, commit, wanted)
    return Published(repo, commit, directory, scored if with_scored and (scored / manifest.NAME).is_file() else None)


def _wanted(directory: Path) -> list[str]:
    """The files that a manifest lists, and the patterns of those that it would."""
    kind = family(manifest.peek_schema(directory) or "")
    described = manifest.read(directory, MASKED if kind == "masked" else SCORED)
    listed = [e["file"] for e in described["files"]]
    others = [pattern for name, pattern in OTHER_FILES.items() if name in described]
    return [*listed, *([SHARD_FILES, *others] if kind == "masked" else [SCORED_FILES])]


def download(repo: str, revision: str | None, patterns: list[str], token: str | None = None) -> Path:
    """The files of a dataset on the Hub that fit ``patterns``: the folder of the snapshot, which the commit names.

    Raises HubError where the Hub refuses or cannot be reached and the cache of ``huggingface_hub`` has it not.
    """

    from huggingface_hub import snapshot_download

    errors: tuple[type[Exception], ...] = (*unreachable_errors(), OSError, ValueError)
    try:
        with asking("dataset", repo):
            found = snapshot_download(
                repo, repo_type="dataset", revision=revision, allow_patterns=patterns, token=token
            )
    except errors as e:
        lines = refusal(e, "dataset", repo, revision)
        happened, fix = lines or (f"it cannot be loaded: {e}", "check the name and the network")
        raise HubError(happened, where=repo, fix=fix) from e
    return Path(found)
