"""Masked datasets that are pushed to the Hub when they are finished: ``--push-to-hub``."""

from __future__ import annotations

from dataclasses import replace

from entrodrop_prep.config import MaterializeConfig, PushConfig
from entrodrop_prep.export import materialize as export
from entrodrop_prep.export.job import open_job
from entrodrop_prep.export.materialize import MaterializeSummary, check_job
from entrodrop_prep.publish.push import Target, push_to
from entrodrop_prep.store.shards import local_directory


def materialize(config: MaterializeConfig) -> MaterializeSummary:
    """Write the masked dataset of each epoch into ``config.out``, continuing whatever an earlier run finished.

    With ``config.push_to_hub`` it is pushed then; sources, token, name and visibility are checked before any work.

    Args:
        config: the settings, those of ``entrodrop materialize``.

    Returns:
        What the directory holds; ``pushed`` says what a push did.

    Raises:
        EntrodropError: see ``entrodrop_prep.errors``; finished files stay.
    """
    local = replace(config, push_to_hub=None)
    if config.push_to_hub is None:
        return export.materialize(local)
    target = Target.of(PushConfig(directory=config.out, repo=config.push_to_hub))
    check_job(
        local_directory(local.out), open_job(local)
    )  # what is wrong here is reported before anything is made there
    target.open()
    return replace(export.materialize(local), pushed=push_to(target))
