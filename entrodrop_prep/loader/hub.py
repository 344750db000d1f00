"""Scores and a recipe from a dataset repository on the Hub: only the files that masks are made from."""

from __future__ import annotations

from pathlib import Path

from entrodrop_prep.errors import HubError
from entrodrop_prep.store.layout import RECIPE, SCORED_FOLDER

FILES = (
    "manifest.json",
    RECIPE,
    "unigram.npy",
    "tokenizer/*",
    "shard-*.parquet",
    f"{SCORED_FOLDER}/*",
)
"""Of a scored directory at the root, and of a masked one with the scores beside it; no masked row is fetched."""


def fetch(repo: str, revision: str | None, token: str | None) -> Path:
    """A folder in the cache of ``huggingface_hub`` with the repository's ``FILES``; what is there is not fetched again.

    Raises HubError where the repository, the revision or the Hub cannot be had.
    """
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    # Errors on the way to the Hub are those of the HTTP library that huggingface_hub uses: httpx, in newer ones httpx2.
    http = (base for base in HfHubHTTPError.__mro__ if issubclass(base, Exception) and base.__name__ == "HTTPError")
    failures: tuple[type[Exception], ...] = (HFValidationError, OSError, *http)
    log_in = "log in with `hf auth login` or set HF_TOKEN"
    try:
        return Path(
            snapshot_download(repo, repo_type="dataset", revision=revision, token=token, allow_patterns=list(FILES))
        )
    except GatedRepoError as e:
        fix = f"accept its terms on {constants.ENDPOINT}/datasets/{repo}, then {log_in}"
        raise HubError("the repository is gated", where=repo, fix=fix) from e
    except RevisionNotFoundError as e:
        raise HubError(f"it has no revision {revision!r}", where=repo, fix="give a branch, a tag or a commit") from e
    except RepositoryNotFoundError as e:
        fix = f"check the name; if it is private, {log_in}"
        raise HubError("there is no such dataset, or not for this token", where=repo, fix=fix) from e
    except LocalEntryNotFoundError as e:
        told = f"{constants.ENDPOINT} gives nothing ({e.__cause__ or 'not reached'})"
        what = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else told
        fix = "load it once with a network, or copy the directory and use MaskedRows.open"
        raise HubError(f"{what}, and the files are not in the cache", where=repo, fix=fix) from e
    except failures as e:
        raise HubError(f"it cannot be loaded: {e}", where=repo, fix="check the name and the network") from e
