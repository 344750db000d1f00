"""Pushing a finished directory to a dataset repository: one commit, whole or not at all, that can be loaded back.

The files go up as they are on disk, first to large file storage in batches, then all of them in one commit that also
deletes what an earlier push left and this one no longer makes. What is there already, by its digest, is not sent: so a
push that was stopped resumes, and one that was finished sends nothing. A commit whose answer got lost is found again by
what the branch holds then.
"""

from __future__ import annotations

import logging
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from entrodrop_prep.config import PushConfig
from entrodrop_prep.errors import ConfigError, HubError
from entrodrop_prep.export.card import NAME as CARD
from entrodrop_prep.export.card import clashing_configs, is_known, license_of, merged_card, with_license
from entrodrop_prep.hub.credentials import find_token
from entrodrop_prep.hub.retry import Retry
from entrodrop_prep.publish.check import check_arrived
from entrodrop_prep.publish.client import Client
from entrodrop_prep.publish.local import Local, open_local
from entrodrop_prep.publish.plan import Changes, LocalFile, RemoteFile, batches, changes
from entrodrop_prep.publish.remote_state import stale
from entrodrop_prep.store.locks import reading_lock
from entrodrop_prep.store.shards import local_directory
from entrodrop_prep.terminal.progress import Progress

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd

log = logging.getLogger(__name__)

BATCH_BYTES, BATCH_FILES = 256_000_000, 16


@dataclass(frozen=True)
class PushSummary:
    """Where a directory is now. ``uploaded_bytes`` counts the files of the commit, 0 where none was needed."""

    repo: str
    commit: str
    tag: str | None
    files: int
    uploaded_bytes: int
    already_there: bool
    load: str


def push(config: PushConfig) -> PushSummary:
    """Push a finished scored or masked directory to the Hub.

    Args:
        config: the settings, those of ``entrodrop push``.

    Returns:
        The repository and the commit that holds the directory, and what was uploaded.

    Raises:
        EntrodropError: see ``entrodrop_prep.errors``; a HubError says what is kept. The directory is not changed.
    """
    target = Target.of(config)
    with _read(config):
        local = open_local(config)
        target.check_license(local.card)
        target.open()
        return target.push(local)


def push_to(target: Target) -> PushSummary:
    """Push the directory of an opened target, which was not there yet when it was opened. Raises as ``push`` does."""
    with _read(target.config):
        local = open_local(target.config)
        target.check_license(local.card)
        return target.push(local)


def _read(config: PushConfig) -> AbstractContextManager[None]:
    """Nothing is written to what is pushed until it is there."""
    return reading_lock(*(local_directory(name) for name in (config.directory, config.include_scored) if name))


class Target:
    """The repository that a push goes to, and the user who pushes."""

    def __init__(self, config: PushConfig, client: Client) -> None:
        self.config, self.client = config, client
        self.tagged = False
        """Whether the tag is there already, at the head."""

    @classmethod
    def of(cls, config: PushConfig) -> Target:
        """With the token, which is looked up but not used. Raises ConfigError where there is none."""
        token = find_token(from_stdin=config.token_stdin)
        retry = Retry(config.retries, config.retry_seconds, token)
        return cls(config, Client(config.repo, token, retry, config.timeout))

    def check_license(self, card: str) -> None:
        """Data without a known licence are not made public. Raises ConfigError."""
        if not self.config.private and not is_known(self.config.license or license_of(card)):
            raise ConfigError("--public: the licence of the data is not known", fix="add --license ID")

    def open(self) -> None:
        """Make the repository and the branch where they are not there. Raises HubError for one of other visibility."""
        client, config = self.client, self.config
        user = client.who_am_i()
        private = client.visibility()
        changed = "nothing was changed there"
        if private is None:
            client.create(private=config.private)
            private = client.visibility()
            if private is None:
                raise HubError(
                    f"{user} cannot see it, and cannot make it", where=config.repo, fix="check the name and the rights"
                )
            changed = "it was made so just now, as its owner's settings are, and is empty"
            log.info("made the %s repository %s", "private" if private else "public", config.repo)
        if private != config.private:
            is_, asked = ("private", "public") if private else ("public", "private")
            raise HubError(
                f"the repository is {is_}, this push is {asked}; {changed}",
                where=config.repo,
                fix=f"add --{is_}, or push to another repository"
                + (" (a push is private by default)" if not private else ""),
            )
        if config.branch == "main" and not config.tag:
            return
        branches, tags = client.refs()
        self.tagged = config.tag in tags
        if config.tag in tags and tags[config.tag] != branches.get(config.branch, branches.get("main")):
            raise HubError(
                f"the tag {config.tag} is there already, on another commit; nothing was changed there",
                where=config.repo,
                fix="choose another --tag",
            )
        if config.branch not in branches:
            client.create_branch(config.branch)

    def push(self, local: Local) -> PushSummary:
        """Bring the branch to hold the files, load them back, set the tag."""
        client, config = self.client, self.config
        uploads = _Uploads(local, config, client, tagged=self.tagged)
        commit = client.call("committing", uploads.attempt, kept="nothing was committed; what was uploaded is kept")
        name = check_arrived(client, local, commit)
        if config.tag:
            client.tag(config.tag, commit)
        return PushSummary(
            repo=config.repo,
            commit=commit,
            tag=config.tag,
            files=uploads.committed,
            uploaded_bytes=uploads.bytes,
            already_there=not uploads.committed,
            load=f'load_dataset("{config.repo}", "{name}", split="train", revision="{config.tag or commit}")',
        )


class _Uploads:
    """The attempts to bring a branch to what a directory holds."""

    def __init__(self, local: Local, config: PushConfig, client: Client, *, tagged: bool) -> None:
        self._local, self._config, self._client, self._tagged = local, config, client, tagged
        self._checked: str | None = None
        self.committed = self.bytes = 0

    def attempt(self) -> str:
        """One attempt, from the head as it is now: the commit that holds everything, made now or found.

        Everything is built again, because the library's operations remember what was at an older head.
        """
        client, config = self._client, self._config
        head = client.head(config.branch)
        remote = client.tree(head)
        ours = stale(self._local, config.repo, remote, lambda path: client.text(path, head))
        files = {**self._local.files, CARD: LocalFile.of(self._card(remote, head).encode())}
        wanted = changes(files, remote, ours)
        if not wanted:
            return head
        if self._tagged:
            raise HubError(
                f"the tag {config.tag} is there already, on the commit {head}, and this push would make another; "
                "nothing was committed",
                where=config.repo,
                fix="choose another --tag",
            )
        self.committed = len(wanted.add) + len(wanted.delete)
        self.bytes = sum(files[path].size for path in wanted.add)
        additions = self._upload(wanted, files)
        message = config.commit_message or f"{self._local.kind} dataset {self._local.content_digest[:12]}"
        return client.commit(additions, wanted.delete, branch=config.branch, parent=head, message=message)

    def _card(self, remote: dict[str, RemoteFile], head: str) -> str:
        """The card to push: ours, with what the one in the repository says besides; checked by the Hub once."""
        there = self._client.text(CARD, head) if CARD in remote else ""
        clashing = clashing_configs(self._local.card, there)
        if clashing:
            raise HubError(
                f"its {CARD} has a configuration of its own named {', '.join(clashing)}, which would be replaced; "
                "nothing was changed there",
                where=self._config.repo,
                fix="rename it there, or push to another repository or --branch",
            )
        text = merged_card(self._local.card, there)
        if self._config.license:
            text = with_license(text, self._config.license)
        if text != self._checked:
            self._client.check_card(text)
            self._checked = text
            if not license_of(text):
                log.warning("the licence of the data is not known: add --license ID, or a line to %s", CARD)
        return text

    def _upload(self, wanted: Changes, files: dict[str, LocalFile]) -> list[CommitOperationAdd]:
        additions: list[CommitOperationAdd] = []
        with Progress("uploading", self.bytes, "bytes", per="bytes") as progress:
            for group in batches(wanted.add, files, BATCH_BYTES, BATCH_FILES):
                additions += self._client.upload(group, files, self._config.branch)
                size = sum(files[path].size for path in group)
                progress.add(size, size)
        return additions
