"""What a push puts into a repository: files of a finished directory, proved whole, and where each goes."""

from __future__ import annotations

import logging
import posixpath
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from entrodrop_prep.config import PushConfig, read_recipe
from entrodrop_prep.errors import ConfigError, IntegrityError
from entrodrop_prep.export.card import PICTURE, masked_card, read_card, scored_card
from entrodrop_prep.export.card.picture import picture
from entrodrop_prep.publish.plan import LocalFile
from entrodrop_prep.store import inside, manifest
from entrodrop_prep.store.layout import RECIPE, SCORED_FOLDER
from entrodrop_prep.store.schema import MASKED, family
from entrodrop_prep.store.scored import ScoredDataset
from entrodrop_prep.store.shards import local_directory
from entrodrop_prep.verification.masked import footer_findings
from entrodrop_prep.verification.run import kind_of

log = logging.getLogger(__name__)

FILES_IN_A_FOLDER, FILES_IN_A_COMMIT, FILE_BYTES = 10_000, 100, 50_000_000_000
_PICTURE = re.compile(r"!\[[^\]]*\]\((?!\w+:|/)([^)\s]+)\)")


@dataclass(frozen=True)
class Local:
    """A directory to push: path in the repository -> file, without the card.

    ``card`` is the card's text so far: README.md with our parts of it made from the manifest as it is now, whatever
    the file says.
    """

    directory: Path
    kind: str
    manifest: dict[str, Any]
    files: dict[str, LocalFile]
    card: str

    @property
    def content_digest(self) -> str:
        """What the directory is known by."""
        return str(self.manifest["content_digest"])

    @property
    def smallest(self) -> tuple[str, list[dict[str, Any]]]:
        """The configuration with the fewest bytes, and the manifest's entries of its files in order."""
        parts: dict[str, list[dict[str, Any]]] = {}
        for entry in self.manifest["files"]:
            folder = entry["file"].rpartition("/")[0] if self.kind == "masked" else SCORED_FOLDER
            if "rows" in entry and (self.kind == "scored" or re.fullmatch(r"epoch_\d+", folder)):
                parts.setdefault(folder, []).append(entry)
        return min(parts.items(), key=lambda part: sum(e["bytes"] for e in part[1]))


def open_local(config: PushConfig) -> Local:
    """Open what is to be pushed and check every byte of it. Raises IntegrityError, ConfigError, OutputError."""
    directory = local_directory(config.directory)
    found = _masked(directory, config) if family(kind_of(directory)) == "masked" else _scored(directory, config)
    _check_limits(found.files)
    return found


def _masked(directory: Path, config: PushConfig) -> Local:
    if config.recipe:
        raise ConfigError("--recipe goes with a scored directory", fix="leave it out: the manifest has the recipe")
    described = manifest.read(directory, MASKED)
    for problem in manifest.changed_files(directory, described):
        raise problem
    for line in footer_findings(directory, described, []):
        raise IntegrityError(line, fix="restore it, or make it again")
    card = masked_card(read_card(directory), described, title=directory.resolve().name, repo=config.repo)
    files = _pictures(directory, described, card) | _listed(directory, described)
    if config.include_scored:
        files |= _scored_beside(config.include_scored, described)
    return Local(directory, "masked", described, files, card)


def _scored_beside(given: str, described: dict[str, Any]) -> dict[str, LocalFile]:
    """The scored directory that the masks were made from, under ``scored/``."""
    scored = ScoredDataset(local_directory(given))
    if isinstance(described["scored"], list):
        raise ConfigError(
            "--include-scored takes the scores of one source, the masks were made from several",
            fix="push each scored directory to a repository of its own",
        )
    if scored.content_digest != described["scored"]["content_digest"]:
        raise ConfigError(
            f"the masks were not made from {given}: the content digests differ",
            fix="give --include-scored the directory that they were made from",
        )
    scored.check()
    return {f"{SCORED_FOLDER}/{name}": file for name, file in _listed(scored.directory, scored.manifest).items()}


def _scored(directory: Path, config: PushConfig) -> Local:
    if config.include_scored:
        raise ConfigError("--include-scored goes with a masked directory", fix="leave it out")
    scored = ScoredDataset(directory)
    scored.check()
    files = _listed(directory, scored.manifest)
    if config.recipe:
        read_recipe(config.recipe)
        files[RECIPE] = LocalFile.of(Path(config.recipe))
    title, recipe = config.repo.partition("/")[2], bool(config.recipe)
    card = scored_card(read_card(directory), scored, title=title, repo=config.repo, with_recipe=recipe)
    return Local(directory, "scored", scored.manifest, _pictures(directory, scored.manifest, card) | files, card)


def _pictures(directory: Path, described: dict[str, Any], card: str) -> dict[str, LocalFile]:
    """Ours, drawn from the manifest as the card is written from it, and those of the user that the card shows."""
    found = {}
    for name in map(posixpath.normpath, _PICTURE.findall(card)):
        path = directory / name
        if name.startswith("../") or not path.is_file():
            continue
        try:
            inside.status_below(directory, name)
        except IntegrityError as e:
            log.warning("the picture %s is not pushed: %s", name, e.what)
            continue
        found[name] = LocalFile.of(path)
    drawn = picture(described)
    return found if drawn is None else {**found, PICTURE: LocalFile.of(drawn)}


def _listed(directory: Path, described: dict[str, Any]) -> dict[str, LocalFile]:
    """The files that a manifest lists, whose bytes were checked, and the manifest itself."""
    found = {e["file"]: LocalFile(directory / e["file"], e["bytes"], e["sha256"]) for e in described["files"]}
    return {**found, manifest.NAME: LocalFile.of(directory / manifest.NAME)}


def _check_limits(files: dict[str, LocalFile]) -> None:
    """What the Hub takes and what it advises (huggingface.co/docs/hub/storage-limits). Raises ConfigError."""
    fix = "make the directory again with another --rows-per-shard"
    for path, file in files.items():
        if file.size > FILE_BYTES:
            raise ConfigError(f"{path} has {file.size / 1e9:.0f} GB, the Hub takes files of up to 50 GB", fix=fix)
    folder, most = Counter(path.rpartition("/")[0] for path in files).most_common(1)[0]
    if most > FILES_IN_A_FOLDER:
        raise ConfigError(
            f"{folder or 'the directory'} has {most:,} files, the Hub takes {FILES_IN_A_FOLDER:,} in a folder", fix=fix
        )
    if len(files) > FILES_IN_A_COMMIT:
        log.warning(
            "%s files in one commit: the Hub advises at most %d; fewer and larger ones come of a larger "
            "--rows-per-shard",
            f"{len(files):,}",
            FILES_IN_A_COMMIT,
        )
