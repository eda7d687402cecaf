"""What a broker keeps over a restart: read at its start, written now and then and at its end."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

from broker.executors.base import EventSink, Executor
from broker.models.repository import Repository
from broker.models.servable import ModelKey
from broker.scheduling.latency import LatencyModel
from broker.scheduling.profiles import Profiles
from broker.scheduling.scheduler import Scheduler
from broker.settings import Settings

__all__ = ["remembering"]

_EVERY_S = 60.0


@contextlib.asynccontextmanager
async def remembering(
    settings: Settings,
    repository: Repository,
    executor: Executor,
    scheduler: Scheduler,
    events: EventSink,
) -> AsyncIterator[None]:
    """T(b) of every model, for the length of the block, with ``executor`` started.

    Raises ``ConfigError`` for the folder.
    """
    if settings.state is None:
        yield
        return
    profiles = Profiles(Path(settings.state))
    useless = profiles.read()
    if useless is not None:
        events("state_ignored", {"reason": useless})
    digests = {servable.key: servable.sha256 for servable in repository}

    def name(model: ModelKey) -> str:
        """The same program, run the same way: elsewhere it is as fast as it is there."""
        way = (
            f"{settings.executor}/{executor.stats().device}/{settings.threads}"
            f"/{settings.runtime}/{settings.precision}"
        )
        return f"{digests[model]}/{way}"

    def recall(model: ModelKey) -> LatencyModel | None:
        return profiles.recall(name(model))

    def save() -> None:
        learned = {name(model): latency for model, latency in scheduler.learned().items()}
        try:
            profiles.write(learned)
        except OSError as error:
            events("state_not_written", {"reason": str(error.strerror)})

    async def save_often() -> None:
        while True:
            await asyncio.sleep(_EVERY_S)
            save()

    scheduler.remember(recall)
    saving = asyncio.create_task(save_often(), name="state")
    try:
        yield
    finally:
        saving.cancel()
        save()
