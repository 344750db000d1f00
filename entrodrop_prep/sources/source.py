"""What SOURCE means, and opening it.

In this order: a local path that exists; an fsspec URL (``scheme://``); a local glob; a name that looks like a path is
an error; anything else is a Hub dataset id.
"""

from __future__ import annotations

import glob

from entrodrop_prep.errors import ConfigError, SourceError
from entrodrop_prep.sources.file_source import FileSource
from entrodrop_prep.sources.files import check_utf8, find_glob, find_local, local_path
from entrodrop_prep.sources.given_paths import check_source
from entrodrop_prep.sources.hub_source import is_saved, open_hub, open_saved
from entrodrop_prep.sources.lines import MAX_ROW_BYTES
from entrodrop_prep.sources.remote import find_url
from entrodrop_prep.sources.rows import Source


def open_source(
    source: str,
    *,
    split: str,
    split_given: bool,
    config: str | None,
    limit: int | None,
    revision: str | None = None,
    stream: bool = False,
    text_rows: str = "document",
    max_row_bytes: int = MAX_ROW_BYTES,
) -> Source:
    """The rows of SOURCE.

    split: split to read where the source has splits: a Hub dataset, a saved DatasetDict, a directory whose file or
        folder names carry split names. split_given: whether the user asked for it; a file or a glob has no splits.
    config: configuration of a Hub dataset; files have none.
    limit: rows to read at most, None for all.
    revision: branch, tag or commit of a Hub dataset. stream: whether to read it over the network, storing nothing.
    text_rows: ``document`` or ``line``: what of a text file is one row.
    max_row_bytes: a longer row is not kept in memory, and bad.

    Raises SourceError for a source that is missing, empty, damaged or without that split; ConfigError for ``split``,
    ``config``, ``revision`` or ``stream`` with a source that has none.
    """
    if not source.strip():
        raise SourceError("SOURCE is empty", fix="give a path, a glob, a URL or a Hub dataset id")
    check_source(source)
    path = local_path(source)
    is_glob = path is None and "://" not in source and glob.has_magic(source)
    if path is None and "://" not in source and not is_glob:
        return open_hub(
            source,
            split=split,
            config=config,
            limit=limit,
            revision=revision,
            stream=stream,
            max_row_bytes=max_row_bytes,
        )
    if config is not None:
        raise ConfigError(f"--config {config} has no use with files", where=source, fix="leave out --config")
    if revision is not None:
        raise ConfigError(f"--source-revision {revision} has no use with files", where=source, fix="leave it out")
    if stream:
        raise ConfigError("--stream has no use with files", where=source, fix="leave it out: they are read piecewise")
    if path is not None and is_saved(path):
        check_utf8(path, path)
        return open_saved(path, split=split, split_given=split_given, limit=limit, max_row_bytes=max_row_bytes)
    if path is not None:
        found = find_local(path)
    elif is_glob:
        found = find_glob(source)
    else:
        found = find_url(source)
    if not found.directory and split_given and split != "train":
        raise ConfigError(f"--split {split}: files have no splits", where=source, fix="leave out --split")
    return FileSource(found, where=source, split=split, limit=limit, text_rows=text_rows, max_row_bytes=max_row_bytes)
