"""The calls to the Hub that a push needs, each tried again and each refusal phrased for users."""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from entrodrop_prep.errors import HubError, IntegrityError
from entrodrop_prep.hub.credentials import without
from entrodrop_prep.hub.refusals import write_refusal
from entrodrop_prep.hub.retry import Failure, Retry, StoreError
from entrodrop_prep.publish.plan import LocalFile, RemoteFile
from entrodrop_prep.store.disk import scratch

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd, GitRefs, HfApi

T = TypeVar("T")
UPLOADED_KEPT = "what was uploaded so far is kept there, and the same command sends only the rest"
_STATUS = re.compile(r"HTTP status \w+ error \((\d{3})\b")
"""How ``hf_xet``, whose errors carry no answer, writes the status of one."""
_BY_NAME = {"XetAuthenticationError": 401, "XetObjectNotFoundError": 404}


@dataclass(frozen=True)
class Client:
    """One dataset repository as one user sees it."""

    repo: str
    token: str = field(repr=False)
    retry: Retry
    timeout: float

    @functools.cached_property
    def api(self) -> HfApi:
        """The Hub's own client. Raises HubError where it is set to stay offline."""
        from huggingface_hub import HfApi, constants

        if constants.HF_HUB_OFFLINE:
            raise HubError("HF_HUB_OFFLINE is set", where=self.repo, fix="unset it to push")
        return HfApi(token=self.token)

    def call(self, doing: str, call: Callable[[], T], *, kept: str = "nothing was changed there") -> T:
        """What ``call`` returns, after as many tries as it takes. Raises HubError."""

        def timed() -> T:
            from huggingface_hub import get_session

            get_session().timeout = self.timeout  # the library has none for most calls, and makes new sessions
            return call()

        return self.retry(doing, timed, lambda failure: self.explain(failure, kept))

    def explain(self, failure: Failure, kept: str) -> HubError:
        """A failure as an error: what happened, what is kept, what to do."""
        from huggingface_hub import constants

        happened, fix = write_refusal(failure.status, failure.retry_after)
        text = happened.format(endpoint=constants.ENDPOINT)
        return HubError(without(f"{text} ({failure.said}); {kept}", self.token), where=self.repo, fix=fix)

    # --- who, and where to

    def who_am_i(self) -> str:
        """The user's name; asked once, because the Hub limits how often. Raises HubError."""
        login: dict[str, Any] = self.call("asking whose token it is", self.api.whoami)
        access = (login.get("auth") or {}).get("accessToken") or {}  # of other kinds of login the Hub gives no role
        if access.get("role") == "read":
            raise HubError(
                f"the token of {login['name']} may only read; nothing was changed there",
                where=self.repo,
                fix="make one that may write, and use it",
            )
        return str(login["name"])

    def visibility(self) -> bool | None:
        """Whether the repository is private; None if there is none, or none that the token may see."""
        from huggingface_hub.errors import RepositoryNotFoundError

        def ask() -> bool | None:
            try:
                return bool(self.api.repo_info(self.repo, repo_type="dataset").private)
            except RepositoryNotFoundError:
                return None

        return self.call("looking for the repository", ask)

    def create(self, *, private: bool) -> None:
        """Make the repository, if it is not there."""

        def make() -> None:
            self.api.create_repo(self.repo, repo_type="dataset", private=private, exist_ok=True)

        self.call("making the repository", make)

    def refs(self, *, kept: str = "nothing was changed there") -> tuple[dict[str, str], dict[str, str]]:
        """Branches and tags, each with its commit."""

        def ask() -> GitRefs:
            return self.api.list_repo_refs(self.repo, repo_type="dataset")

        found = self.call("listing branches and tags", ask, kept=kept)
        branches, tags = ({ref.name: ref.target_commit for ref in refs} for refs in (found.branches, found.tags))
        return branches, tags

    def create_branch(self, branch: str) -> None:
        """Make a branch from main, if it is not there."""

        def make() -> None:
            self.api.create_branch(self.repo, branch=branch, repo_type="dataset", exist_ok=True)

        self.call("making the branch", make)

    # --- what is there

    def head(self, branch: str) -> str:
        """The commit that a branch is at."""
        return str(self.api.repo_info(self.repo, repo_type="dataset", revision=branch).sha)

    def tree(self, commit: str) -> dict[str, RemoteFile]:
        """Every file of a commit."""
        from huggingface_hub.hf_api import RepoFile

        listed = self.api.list_repo_tree(self.repo, repo_type="dataset", revision=commit, recursive=True)
        return {
            f.path: RemoteFile(f.size, f.blob_id, f.lfs.sha256 if f.lfs else None)
            for f in listed
            if isinstance(f, RepoFile)
        }

    def text(self, path: str, commit: str) -> str:
        """A small file of a commit. Raises HubError where it is no UTF-8 text."""
        from huggingface_hub.errors import LocalEntryNotFoundError

        with scratch() as cache:
            try:
                with _store_errors():
                    got = self.api.hf_hub_download(
                        self.repo,
                        path,
                        repo_type="dataset",
                        revision=commit,
                        cache_dir=cache,
                        etag_timeout=self.timeout,
                    )
            except LocalEntryNotFoundError as e:  # the library's for any failure on the way, which is its cause
                raise ConnectionError(str(e.__cause__ or e)) from e
            try:
                return Path(got).read_text(encoding="utf-8")
            except UnicodeDecodeError as e:
                raise HubError(f"its {path} is not UTF-8 text", where=self.repo, fix="fix or remove it there") from e

    # --- changing it

    def check_card(self, text: str) -> None:
        """Ask the Hub whether it takes the card. Raises HubError with its reasons."""
        import yaml
        from huggingface_hub import DatasetCard

        def ask() -> str | None:
            try:
                DatasetCard(text).validate(repo_type="dataset")
            except (ValueError, TypeError, RecursionError, yaml.YAMLError) as e:
                return str(e)
            return None

        refused = self.call("having the card checked", ask)
        if refused is not None:
            raise self.refused_card(refused)

    def refused_card(self, said: str) -> HubError:
        """The error for a card that the Hub does not take."""
        return HubError(
            without(f"the Hub refuses the card, README.md: {said}; nothing was committed", self.token),
            where=self.repo,
            fix="correct the lines between the --- marks of README.md, here or there, and push again",
        )

    def upload(self, paths: Sequence[str], files: dict[str, LocalFile], branch: str) -> list[CommitOperationAdd]:
        """Send what large file storage does not have yet; operations for a commit. Raises HubError."""
        return self.call("uploading", lambda: self._upload(paths, files, branch), kept=UPLOADED_KEPT)

    def _upload(self, paths: Sequence[str], files: dict[str, LocalFile], branch: str) -> list[CommitOperationAdd]:
        additions, refused = [self._addition(path, files[path]) for path in paths], ""
        try:
            with _store_errors():
                self.api.preupload_lfs_files(
                    self.repo, additions, repo_type="dataset", revision=branch, free_memory=False
                )
        except ValueError as e:
            refused = str(e)
            if "LFS batch API" not in refused:
                raise
        if refused:
            raise HubError(
                without(f"the Hub does not take files ({refused}); {UPLOADED_KEPT}", self.token),
                where=self.repo,
                fix="see what it says: make room in the account's storage, or push to another repository",
            )
        ignored = [added.path_in_repo for added in additions if added._should_ignore]
        if ignored:  # the library would leave them out silently
            raise HubError(
                f"a .gitignore there keeps out {', '.join(ignored)}; nothing was committed",
                where=self.repo,
                fix="remove that line of it, and push again",
            )
        return additions

    def _addition(self, path: str, file: LocalFile) -> CommitOperationAdd:
        from huggingface_hub import CommitOperationAdd

        content = file.content
        if isinstance(content, Path) and not content.is_file():
            raise IntegrityError(
                f"the file is gone since the push began; {UPLOADED_KEPT}",
                where=str(content),
                fix="restore it, or run the command that made it again",
            )
        added = CommitOperationAdd(path, content if isinstance(content, bytes) else str(content))
        added.upload_info.sha256 = bytes.fromhex(file.sha256)  # known: the library need not read the file
        return added

    def commit(
        self, additions: Sequence[CommitOperationAdd], delete: Sequence[str], *, branch: str, parent: str, message: str
    ) -> str:
        """One commit on top of ``parent``; its id. Not tried again here. Raises what the library raises."""
        from huggingface_hub import CommitOperationDelete

        try:
            with _store_errors():
                made = self.api.create_commit(
                    self.repo,
                    [*additions, *(CommitOperationDelete(path) for path in delete)],
                    commit_message=message,
                    repo_type="dataset",
                    revision=branch,
                    parent_commit=parent,
                )
            return str(made.oid)
        except ValueError as e:
            refused = str(e)
            if "Invalid metadata" not in refused:
                raise
        raise self.refused_card(refused)

    def tag(self, tag: str, commit: str) -> None:
        """Set a tag, if it is not there. Raises HubError where it is then on another commit."""

        def make() -> None:
            self.api.create_tag(self.repo, tag=tag, revision=commit, repo_type="dataset", exist_ok=True)

        kept = f"the commit {commit} is there and was loaded back"
        self.call("setting the tag", make, kept=kept)
        _, tags = self.refs(kept=kept)
        if tags.get(tag) != commit:
            raise HubError(
                f"the tag {tag} is on {tags.get(tag, 'no commit')}; {kept}", where=self.repo, fix="choose another --tag"
            )


@contextlib.contextmanager
def _store_errors() -> Iterator[None]:
    """What goes wrong with large files as a StoreError.

    They raise RuntimeError, the library's around the error of one file, and ``hf_xet``'s RuntimeError, ConnectionError
    and two classes of its own, which are errors of the operating system.
    """
    try:
        yield
    except (RuntimeError, OSError) as e:
        if isinstance(e, OSError) and not isinstance(e, ConnectionError) and type(e).__module__ != "hf_xet":
            raise
        said = f"{e} {e.__cause__ or ''}".strip()
        found = _STATUS.search(said)
        raise StoreError(int(found[1]) if found else _BY_NAME.get(type(e).__name__), said) from e
