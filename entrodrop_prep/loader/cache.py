"""What a machine keeps of the scored rows and of the survey of a recipe, made once by one process of all."""

from __future__ import annotations

import json
import logging
from pathlib import Path

from entrodrop_prep import __version__, digest
from entrodrop_prep.disk import write_bytes
from entrodrop_prep.errors import OutputError
from entrodrop_prep.export.job import Job
from entrodrop_prep.loader.columns import NAME as FINISHED
from entrodrop_prep.loader.columns import Columns, write_columns
from entrodrop_prep.locks import locked
from entrodrop_prep.shards import user_path

log = logging.getLogger(__name__)


def cache_directory(given: str | Path | None) -> Path:
    """What was given, or ``entrodrop`` in the cache of ``datasets``."""
    if given is not None:
        return user_path(str(given))
    import datasets

    return Path(datasets.config.HF_DATASETS_CACHE) / "entrodrop"


def opened(job: Job, cache: Path) -> Columns:
    """The job's rows from the cache, and the job surveyed; what is not there is made, by one process of all.

    The scored directories are read, and checked, only where something is to be made.
    """
    epochs = range(job.config.epochs)
    home = cache / digest.of_json(job.rows_identity)[:32]
    survey = home / f"survey-{digest.of_json([__version__, job.identity, len(epochs)])[:32]}.json"
    if not (survey.exists() and (home / FINISHED).exists()):
        try:
            with locked(home, wait=True):
                _make(job, home, survey)
        except OutputError as e:
            raise type(e)(e.what, where=e.where, fix="give another cache_dir") from e
    job.recall(json.loads(survey.read_bytes()))
    return Columns(home)


def _make(job: Job, home: Path, survey: Path) -> None:
    """Make what is missing. The caller holds the lock."""
    missing = not (home / FINISHED).exists()
    if not missing and survey.exists():
        return
    for scored in job.directories:
        scored.check()
    job.survey(range(job.config.epochs))
    if missing:
        log.info("caching the scored rows in %s", home)
        write_columns(home, job.once())
    write_bytes(survey, json.dumps(job.surveyed).encode())
