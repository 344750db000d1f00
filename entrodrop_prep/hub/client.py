"""The calls to the Hub that a push needs, each tried again and each refusal in words."""

from __future__ import annotations

import contextlib
import functools
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from entrodrop_prep.errors import HubError
from entrodrop_prep.hub.credentials import without
from entrodrop_prep.hub.plan import LocalFile, RemoteFile
from entrodrop_prep.hub.retry import Failure, Retry

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd, HfApi

T = TypeVar("T")
UPLOADED_KEPT = "what was uploaded so far is kept there, and the same command sends only the rest"


@dataclass(frozen=True)
class Client:
    """One dataset repository as one user sees it."""

    repo: str
    token: str
    retry: Retry
    timeout: float

    @functools.cached_property
    def api(self) -> HfApi:
        """The Hub's own client. Raises HubError where it is told to stay offline."""
        from huggingface_hub import HfApi, constants

        if constants.HF_HUB_OFFLINE:
            raise HubError("HF_HUB_OFFLINE is set", where=self.repo, fix="unset it to push")
        return HfApi(token=self.token)

    def call(self, doing: str, call: Callable[[], T], *, kept: str = "nothing was changed there") -> T:
        """What ``call`` returns, after as many tries as it takes. Raises HubError."""

        def timed() -> T:
            from huggingface_hub import get_session

            get_session().timeout = self.timeout  # the library has none for most calls, and makes sessions anew
            return call()

        return self.retry(doing, timed, lambda failure: self.explain(failure, kept))

    def explain(self, failure: Failure, kept: str) -> HubError:
        """A failure as an error: what happened, what is kept, what to do."""
        from huggingface_hub import constants

        happened, fix = _WORDS.get(failure.status or 0, _OTHER if failure.status else _UNREACHABLE)
        if failure.status and failure.status >= 500:
            happened, fix = _TROUBLE
        wait = f" in {failure.retry_after:.0f} s" if failure.retry_after else " later"
        text = happened.format(endpoint=constants.ENDPOINT)
        return HubError(
            without(f"{text} ({failure.said}); {kept}", self.token), where=self.repo, fix=fix.format(later=wait)
        )

    # --- who, and where to

    def who_am_i(self) -> str:
        """The user's name; asked once, because the Hub limits how often. Raises HubError."""
        told: dict[str, Any] = self.call("asking whose token it is", self.api.whoami)
        if told.get("auth", {}).get("accessToken", {}).get("role") == "read":
            raise HubError(
                f"the token of {told['name']} may only read; nothing was changed there",
                where=self.repo,
                fix="make one that may write, and use it",
            )
        return str(told["name"])

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

    def refs(self) -> tuple[dict[str, str], dict[str, str]]:
        """Branches and tags, each with its commit."""
        found = self.call("listing branches", lambda: self.api.list_repo_refs(self.repo, repo_type="dataset"))
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
        with tempfile.TemporaryDirectory(prefix="entrodrop-") as cache:
            got = self.api.hf_hub_download(
                self.repo, path, repo_type="dataset", revision=commit, cache_dir=cache, etag_timeout=self.timeout
            )
            try:
                return Path(got).read_text(encoding="utf-8")
            except UnicodeDecodeError as e:
                raise HubError(f"its {path} is not UTF-8 text", where=self.repo, fix="mend or remove it there") from e

    # --- changing it

    def check_card(self, text: str) -> None:
        """Ask the Hub whether it takes the card. Raises HubError with its reasons."""
        import yaml
        from huggingface_hub import DatasetCard

        def ask() -> None:
            try:
                DatasetCard(text).validate(repo_type="dataset")
            except (ValueError, yaml.YAMLError) as e:
                raise self.refused_card(e) from e

        self.call("having the card checked", ask)

    def refused_card(self, error: Exception) -> HubError:
        """The error for a card that the Hub does not take."""
        return HubError(
            without(f"the Hub refuses the card, README.md: {error}; nothing was committed", self.token),
            where=self.repo,
            fix="mend the lines between the --- marks of README.md, here or there, and push again",
        )

    def upload(self, paths: Sequence[str], files: dict[str, LocalFile], branch: str) -> list[CommitOperationAdd]:
        """Send what large file storage does not have yet; operations for a commit. Raises HubError."""
        return self.call("uploading", lambda: self._upload(paths, files, branch), kept=UPLOADED_KEPT)

    def _upload(self, paths: Sequence[str], files: dict[str, LocalFile], branch: str) -> list[CommitOperationAdd]:
        from huggingface_hub import CommitOperationAdd

        additions = []
        for path in paths:
            content = files[path].content
            added = CommitOperationAdd(path, content if isinstance(content, bytes) else str(content))
            added.upload_info.sha256 = bytes.fromhex(files[path].sha256)  # known: the library need not read the file
            additions.append(added)
        with _uploading():
            self.api.preupload_lfs_files(self.repo, additions, repo_type="dataset", revision=branch, free_memory=False)
        return additions

    def commit(
        self, additions: Sequence[CommitOperationAdd], delete: Sequence[str], *, branch: str, parent: str, message: str
    ) -> str:
        """One commit on top of ``parent``; its id. Not tried again here. Raises what the library raises."""
        from huggingface_hub import CommitOperationDelete

        try:
            with _uploading():
                made = self.api.create_commit(
                    self.repo,
                    [*additions, *(CommitOperationDelete(path) for path in delete)],
                    commit_message=message,
                    repo_type="dataset",
                    revision=branch,
                    parent_commit=parent,
                )
        except ValueError as e:
            if "Invalid metadata" in str(e):
                raise self.refused_card(e) from e
            raise
        return str(made.oid)

    def tag(self, tag: str, commit: str) -> None:
        """Set a tag, if it is not there."""

        def make() -> None:
            self.api.create_tag(self.repo, tag=tag, revision=commit, repo_type="dataset", exist_ok=True)

        self.call("setting the tag", make, kept=f"the commit {commit} is there and was loaded back")


@contextlib.contextmanager
def _uploading() -> Iterator[None]:
    """Uploads raise RuntimeError: the library's, around the error of one file, and hf_xet's own."""
    try:
        yield
    except RuntimeError as e:
        raise ConnectionError(str(e)) from e


_UNREACHABLE = ("the Hub at {endpoint} cannot be reached", "check the network and HF_ENDPOINT, and push again")
_OTHER = ("the Hub refuses", "see what it says, and push again")
_TROUBLE = ("the Hub has a failure of its own", "push again{later}")
_WORDS = {
    400: ("the Hub does not take the request", "see what it says"),
    401: (
        "the Hub does not accept the token",
        "log in again with `hf auth login`, or set HF_TOKEN to one that is valid",
    ),
    402: ("the Hub asks for payment", "see the plan of the account, or push to another"),
    403: ("the token may not do this", "use a token that may write to this repository, or push to one of your own"),
    404: ("the Hub does not find it, or not for this token", "check the name, the branch and the token's rights"),
    409: ("another change is going on there", "wait for it, and push again"),
    412: ("others keep committing to the branch", "push again{later}, or to a branch of your own with --branch"),
    413: (
        "the commit is too large for the Hub",
        "make the directory again with a larger --rows-per-shard: fewer files",
    ),
    429: ("the Hub limits how often it may be called", "push again{later}"),
}
