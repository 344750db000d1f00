"""Loading a pushed dataset back, cold, and comparing it with the local files: all of it in a process of its own.

    python -m entrodrop_prep.publish.check < what to check, as JSON

The process has an empty cache and an empty working directory, so that what it compares came from the Hub: ``datasets``
would take a folder of the repository's name that is there. The token is in its environment.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from entrodrop_prep.errors import HubError
from entrodrop_prep.hub.credentials import without
from entrodrop_prep.store.disk import is_full, scratch, system_error

if TYPE_CHECKING:
    import pyarrow as pa

    from entrodrop_prep.publish.client import Client
    from entrodrop_prep.publish.local import Local

BATCH_ROWS = 1_000
ROOM = 6
STREAMED_ROWS = 100_000


def check_arrived(client: Client, local: Local, commit: str) -> str:
    """Load the smallest configuration from the Hub and compare it with the local files; its name. Raises HubError.

    Loaded as a whole, where the disk has room for it, and streamed.
    """
    name, entries = local.smallest
    from huggingface_hub import constants

    with scratch() as folder:
        home = str(folder)
        space = os.statvfs(home)
        asked = {
            "repo": client.repo,
            "config": name,
            "revision": commit,
            "directory": str(local.directory.resolve()),
            "shards": [[e["file"], e["rows"], e["content_digest"]] for e in entries],
            "whole": space.f_bavail * space.f_frsize > ROOM * sum(e["bytes"] for e in entries),
        }
        drop = ("HF_", "HUGGING_FACE_", "HUGGINGFACE_")
        kept = ("HF_ENDPOINT", "HF_HUB_DISABLE_XET", "HF_HUB_DISABLE_TELEMETRY", "HF_HUB_ETAG_TIMEOUT")
        environment = {k: v for k, v in os.environ.items() if not k.startswith(drop) or k in kept}
        environment |= {
            **{"HF_HOME": home, "HF_TOKEN": client.token, "HF_ENDPOINT": constants.ENDPOINT},
            **{"HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"},
            "USE_TORCH": "0",  # which `datasets` would import, and not use
            "PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path)),  # the same modules, from where they are here
        }
        empty = os.path.join(home, "empty")
        os.mkdir(empty)

        def run() -> subprocess.CompletedProcess[str]:
            done: subprocess.CompletedProcess[str] = subprocess.run(
                [sys.executable, "-m", "entrodrop_prep.publish.check"],
                input=json.dumps(asked),
                env=environment,
                cwd=empty,
                text=True,
                capture_output=True,
                check=False,
            )
            if done.returncode == 3:
                raise ConnectionError(" ".join(done.stderr.split()))
            return done

        def refused(said: str) -> HubError:
            text = without(f"{said}; the commit {commit} is there, the tag was not set", client.token)
            return HubError(text, where=f"{client.repo} {name}", fix="push again: only what is missing is sent")

        done = client.retry("loading it back", run, lambda f: refused(f"it cannot be loaded back ({f.said})"))
    if done.returncode:
        said = done.stderr.strip().splitlines()[-1:] or ["the process that loads it back said nothing"]
        ended = f" (it was ended by signal {-done.returncode})" if done.returncode < 0 else ""
        raise refused(said[0] + ended)
    return name


def _main() -> int:
    """0: what was loaded is what the files hold; 1: it is not; 3: it could not be loaded, which may pass."""
    asked = json.load(sys.stdin)
    try:
        found = difference(asked)
    except _passing() as e:
        refused = system_error(e)
        if refused is not None and is_full(refused):
            print("no room for temporary files: make room there, or set TMPDIR to another folder", file=sys.stderr)
            return 1
        print(f"{type(e).__name__}: {e}", file=sys.stderr)
        return 1 if isinstance(e, _lasting()) else 3
    if found:
        print(found, file=sys.stderr)
    return 1 if found else 0


def _passing() -> tuple[type[Exception], ...]:
    from datasets.exceptions import DatasetsError

    from entrodrop_prep.hub.retry import transport_errors

    return (*transport_errors(), DatasetsError, OSError, RuntimeError)


def _lasting() -> tuple[type[Exception], ...]:
    """Those among them that say that what the Hub gave is wrong: another try gives the same."""
    from datasets.exceptions import (
        ChecksumVerificationError,
        DatasetGenerationCastError,
        DefunctDatasetError,
        FileFormatError,
        SplitsVerificationError,
    )

    return (
        *(ChecksumVerificationError, DatasetGenerationCastError, DefunctDatasetError),
        *(FileFormatError, SplitsVerificationError),
    )


def difference(asked: dict[str, Any]) -> str | None:
    """What of a configuration on the Hub is not as in the local files, or None."""
    from datasets import load_dataset

    where = {"path": asked["repo"], "name": asked["config"], "revision": asked["revision"], "split": "train"}
    if asked["whole"]:
        loaded = load_dataset(**where).with_format("arrow")
        found = _compare(asked, loaded.iter(batch_size=BATCH_ROWS), None)
        if found:
            return f"loaded back, {found}"
    streamed = load_dataset(**where, streaming=True).with_format("arrow")
    found = _compare(asked, streamed.iter(batch_size=BATCH_ROWS), STREAMED_ROWS)
    return f"streamed back, {found}" if found else None


def _compare(asked: dict[str, Any], loaded: Iterator[pa.Table], limit: int | None) -> str | None:
    """The first difference between rows that were loaded and those of the files, of the first ``limit`` rows."""
    import pyarrow as pa

    local, rows = _rows(asked), 0
    ours = next(local)
    for theirs in loaded:
        while ours.num_rows < theirs.num_rows:
            more = next(local, None)
            if more is None:
                return f"it has more rows than the {rows + ours.num_rows:,} of the files"
            ours = pa.concat_tables([ours, more])
        mine, ours = ours.slice(0, theirs.num_rows), ours.slice(theirs.num_rows)
        if theirs.column_names != mine.column_names:
            return f"it has the columns {', '.join(theirs.column_names)}"
        if not theirs.cast(mine.schema).equals(mine):
            return f"rows {rows:,} to {rows + theirs.num_rows - 1:,} are not those of the files"
        rows += theirs.num_rows
        if limit is not None and rows >= limit:
            return None
    left = ours.num_rows + sum(table.num_rows for table in local)
    return f"it has {left:,} rows fewer than the files" if left else None


def _rows(asked: dict[str, Any]) -> Iterator[pa.Table]:
    """The rows of the local files in order."""
    import pyarrow as pa

    from entrodrop_prep.store.shards import read_batches

    for name, _, _ in asked["shards"]:
        for batch in read_batches(Path(asked["directory"]) / name, rows=BATCH_ROWS):
            yield pa.Table.from_batches([batch]).replace_schema_metadata(None)


if __name__ == "__main__":
    sys.exit(_main())
