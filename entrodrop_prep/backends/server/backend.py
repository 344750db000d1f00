"""Scores from vLLM servers: shards are cut into requests, which go to whichever server is free."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from entrodrop_prep.backends.batch import AtWork, batches
from entrodrop_prep.backends.server.connect import Checks, connect_all
from entrodrop_prep.backends.server.dispatch import Dispatcher
from entrodrop_prep.backends.server.http import Server, Trouble, api_key, server_urls
from entrodrop_prep.backends.server.request import MOST_SEQUENCES
from entrodrop_prep.errors import EntrodropError

if TYPE_CHECKING:
    from entrodrop_prep.backends import Scores
    from entrodrop_prep.backends.model import ModelInfo
    from entrodrop_prep.backends.prefetch import PrefetchQueue, ShardTokens
    from entrodrop_prep.config import ScoreConfig

log = logging.getLogger(__name__)

MOST_TOKENS = 8192
"""Of one request."""
SECONDS_TO_LOOK = 0.5
SECONDS_TO_READ = 0.02
"""How long to wait for scores before looking whether the next shard has been read."""


class ServerBackend:
    """One or several servers. Raises ConfigError when none can be used, or one is the wrong one."""

    def __init__(self, config: ScoreConfig, info: ModelInfo) -> None:
        urls, key = server_urls(config.server), api_key()
        checks = Checks(config.model, info, info.max_length(config.max_length), config.timeout)
        servers = [Server(url, key) for url in urls]
        try:
            found = connect_all(servers, checks)
        except EntrodropError:
            for server in servers:
                server.close()
            raise
        for server, result in zip(servers, found, strict=True):
            if isinstance(result, Trouble):
                log.warning("continuing without the server %s: %s", server.url, result)
        self.step_tokens = config.batch_tokens
        self._most_tokens = min(config.batch_tokens, MOST_TOKENS)
        self._dispatcher = Dispatcher(servers, found, checks, config.timeout, config.patience)

    def environment(self) -> dict[str, str]:
        """See ``Backend.environment``. What the servers run on they do not say."""
        return {
            "backend": "server",
            "device": "server",
            "vllm": ", ".join(self._dispatcher.versions),
            "served_dtype": ", ".join(self._dispatcher.dtypes),
        }

    def each(self) -> Iterator[tuple[str, ServerBackend]]:
        """See ``Backend.each``. The servers were compared with each other when they were connected to."""
        yield "", self

    def score(
        self, jobs: PrefetchQueue, done: Callable[[ShardTokens, int], None]
    ) -> Iterator[tuple[ShardTokens, list[Scores]]]:
        """See ``Backend.score``. A job is taken when the servers have less than two requests each to come."""
        generation = self._dispatcher.begin()
        at_work = AtWork()
        try:
            while True:
                while self._dispatcher.needs_work():
                    job = jobs.take(wait=not at_work)
                    if job is None:
                        break
                    if not job.sequences:
                        yield job, []
                        continue
                    at_work.add(job)
                    self._dispatcher.add(batches(job, self._most_tokens, MOST_SEQUENCES, generation))
                if not at_work and jobs.ended:
                    return
                # While the next shard is still being read, look for it now and then.
                reading = not jobs.ended and self._dispatcher.needs_work()
                for batch, scores in self._dispatcher.collect(SECONDS_TO_READ if reading else SECONDS_TO_LOOK):
                    done(batch.job, sum(map(len, batch.sequences)))
                    whole = at_work.finish(batch, scores)
                    if whole is not None:
                        yield batch.job, whole
        finally:
            self._dispatcher.begin()

    def close(self) -> None:
        """Disconnect from the servers; they run on."""
        self._dispatcher.close()
