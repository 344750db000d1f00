"""What a machine keeps of the scored rows and of the survey of a recipe, made once by one process of all."""

from __future__ import annotations

import logging
from pathlib import Path

from entrodrop_prep.config.names import user_path
from entrodrop_prep.errors import OutputError
from entrodrop_prep.export.job import Job
from entrodrop_prep.masking import epoch_rows
from entrodrop_prep.masking.epoch_rows import EpochRows, Spec
from entrodrop_prep.store.locks import locked, reading_lock

log = logging.getLogger(__name__)


def cache_directory(given: str | Path | None) -> Path:
    """What was given, or ``entrodrop`` in the cache of ``datasets``."""
    if given is not None:
        return user_path(str(given))
    import datasets

    return Path(datasets.config.HF_DATASETS_CACHE) / "entrodrop"


def opened(job: Job, spec: Spec, cache_dir: str | Path | None) -> EpochRows:
    """Rows of the job from the cache; what is not there is made, by one process of all. Says so where nobody named one.

    The scored directories are read, and checked, only where no recipe before needed the same of them. Raises
    IntegrityError for a cache that is damaged.
    """
    home = cache_directory(cache_dir) / spec.columns_name
    if epoch_rows.is_written(home, spec):
        for scored in job.directories:
            scored.check_footers(first=True)
    else:
        with reading_lock(*(scored.directory for scored in job.directories)):
            try:
                with locked(home, wait=True):
                    if not epoch_rows.is_written(home, spec):
                        if not epoch_rows.has_columns(home):
                            for scored in job.directories:
                                scored.check()
                            if cache_dir is None:
                                log.info("caching the scored rows in %s", home)
                        epoch_rows.write(home, spec, lasting=True, jobs=1)
            except OutputError as e:
                raise type(e)(e.what, where=e.where, fix="give another cache_dir") from e
    return EpochRows(spec, home)
