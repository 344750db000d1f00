"""What a machine keeps of the scored rows and of the survey of a recipe, made once by one process of all."""

from __future__ import annotations

import logging
from pathlib import Path

from entrodrop_prep import __version__
from entrodrop_prep.config.names import user_path
from entrodrop_prep.errors import OutputError
from entrodrop_prep.export.job import Job
from entrodrop_prep.store import digest
from entrodrop_prep.store.locks import locked, reading_lock
from entrodrop_prep.training.columns import NAME as FINISHED
from entrodrop_prep.training.columns import Columns, store, stored, write_columns

log = logging.getLogger(__name__)


def cache_directory(given: str | Path | None) -> Path:
    """What was given, or ``entrodrop`` in the cache of ``datasets``."""
    if given is not None:
        return user_path(str(given))
    import datasets

    return Path(datasets.config.HF_DATASETS_CACHE) / "entrodrop"


def opened(job: Job, cache: Path) -> Columns:
    """The job's rows from the cache, and the job surveyed; what is not there is made, by one process of all.

    The scored directories are read, and checked, only where something is to be made. Raises IntegrityError for a cache
    that is damaged; one of an earlier version, which had no checksums, is made again.
    """
    epochs = range(job.config.epochs)
    home = cache / digest.of_json(job.rows_identity)[:32]
    survey = home / f"survey-{digest.of_json([__version__, job.identity, len(epochs)])[:32]}.json"
    if stored(survey) is None or stored(home / FINISHED) is None:
        with reading_lock(*(scored.directory for scored in job.directories)):
            try:
                with locked(home, wait=True):
                    _make(job, home, survey)
            except OutputError as e:
                raise type(e)(e.what, where=e.where, fix="give another cache_dir") from e
    job.recall(stored(survey) or {})
    return Columns(home)


def _make(job: Job, home: Path, survey: Path) -> None:
    """Make what is missing. The caller holds the lock."""
    missing = stored(home / FINISHED) is None
    if not missing and stored(survey) is not None:
        return
    for scored in job.directories:
        scored.check()
    job.survey(range(job.config.epochs))
    if missing:
        log.info("caching the scored rows in %s", home)
        write_columns(home, job.once())
    store(survey, job.surveyed)
