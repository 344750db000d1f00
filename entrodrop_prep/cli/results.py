"""What ``--json`` prints: the fields of each command's one object. Help and docs are made from this."""

from __future__ import annotations

_DIRECTORY = {"directory": "as it was given"}
_COMPLETE = {"already_complete": "true where there was nothing to do", "seconds": "that the work took"}

RESULTS = {
    "score": {
        **_DIRECTORY,
        **_COMPLETE,
        "counts": "rows, windows and tokens of the whole directory, and what was left out, as in the manifest",
        "scored_tokens": "tokens that this run scored",
    },
    "materialize": {
        **_DIRECTORY,
        **_COMPLETE,
        "epochs": "the figures of each epoch, as in the manifest",
        "written_tokens": "tokens that this run wrote",
        "pushed": "with --push-to-hub the fields of `push`, else null",
    },
    "push": {
        "repo": "the dataset repository",
        "commit": "that holds the directory",
        "tag": "that was set, else null",
        "files": "files in the commit",
        "uploaded_bytes": "bytes of these; 0 where nothing was missing",
        "already_there": "true where nothing was missing",
        "load": "Python that loads the dataset",
    },
    "verify": {
        **_DIRECTORY,
        "ok": "whether nothing is wrong; the exit code is 2 if not",
        "notes": "lines on what was checked and what was not",
        "findings": "lines on what is wrong",
    },
    "inspect": {
        **_DIRECTORY,
        "schema": "scored/1 or masked/1",
        "content_digest": "of the rows",
        "settings": "those that the rows depend on: the identity of scores, the recipe of masks",
        "source": "what was scored",
        "model": "that scored it",
        "counts": "of rows and tokens, of all epochs together",
        "entropy": "of scores: quantiles in nats over the first tokens; else null",
        "tau_nats": "of masks: the threshold, or those of sources or values; else null",
        "epochs": "of masks: the figures of each epoch, with its rates",
        "plain": "figures of that configuration, or null",
        "validation": "figures of that split, or null",
        "rows": "with --row, --row-id or --id: each window or epoch of the row, with its tokens",
    },
    "report": {"report": "the page"},
    "recipe": {"trainer": "as it was given", "recipe": "the text"},
    "schema": {"files": "that were written"},
    "demo": {**_DIRECTORY},
}
"""Command -> field -> what it is."""

_AMOUNT = "as value and error, the half-width of its range as a share of it"
DRY_RUNS = {
    "score": {
        "rows": f"of the source, {_AMOUNT}",
        "tokens": "to score, likewise",
        "trainable": "of these, likewise",
        "shards": "files",
        "there": "files that are finished",
        "disk": "bytes that are written, likewise",
        "memory_bytes": "of this process",
        "gpu_bytes": "of a GPU, 0 without one",
        "start": "seconds until the first row is scored",
        "scoring": "seconds from then on, likewise",
        "speed": "tokens a second",
        "bad_share": "of the rows, that cannot be scored",
        "bad_example": "what is wrong with one of them",
        "on_bad_row": "as it was given",
        "beginning": "true where only the first rows could be looked at",
    },
    "materialize": {
        "parts": "of each folder its rows, tokens, files and bytes",
        "disk": f"bytes that are written, {_AMOUNT}",
        "cache_bytes": "temporary ones beside them",
        "memory_bytes": "of this process",
        "start": "seconds until the first file is written",
        "writing": "seconds from then on, likewise",
        "speed": "tokens a second",
    },
}
"""The same with ``--dry-run``."""
