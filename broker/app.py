"""Wiring: which parts a broker is made of, and in which order they start and stop."""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncIterator
from pathlib import Path

from aiohttp import web

from broker.accounts.keys import KeyFile, KeyRing
from broker.accounts.rates import RateLimits
from broker.executors.base import EventSink, Executor, ExecutorOptions, create_executor
from broker.http.context import SERVICES, Services
from broker.http.middleware.auth import authenticate
from broker.http.middleware.cors import cross_origin
from broker.http.middleware.failures import answer_failures
from broker.http.middleware.observe import observe
from broker.http.routes import add_routes
from broker.http.sessions.registry import Sessions
from broker.jobs.execution import Execution
from broker.jobs.jobs import Jobs
from broker.jobs.journal import Journal
from broker.jobs.metrics import JobMetrics
from broker.models.repository import Repository
from broker.models.rollout import Rollouts
from broker.models.routing_state import begin_routing
from broker.models.shadowing import Shadows
from broker.models.warm_up import warm_up_body
from broker.remembering import remembering
from broker.scheduling.observer import Observers
from broker.scheduling.replays import Replays
from broker.scheduling.residency import Residency
from broker.scheduling.scheduler import Scheduler
from broker.settings import Settings
from broker.telemetry import Telemetry

__all__ = ["build_application", "running_services"]


@contextlib.asynccontextmanager
async def running_services(
    settings: Settings, repository: Repository, events: EventSink
) -> AsyncIterator[Services]:
    """Everything behind the HTTP layer, loaded and warm; all of it stopped afterwards.

    Raises ``ConfigError`` and what ``Executor.start`` and ``Scheduler.warm_up`` raise.
    """
    key_ring = None if settings.keys is None else KeyRing(KeyFile(Path(settings.keys)))
    options = ExecutorOptions(
        device=settings.device,
        threads=settings.threads,
        runtime=settings.runtime,
        precision=settings.precision,
        calibration=settings.calibration,
        backend=settings.backend,
        slots=settings.slots,
        backend_key=settings.read_backend_key(),
        start_timeout_s=settings.start_timeout_s,
        hang_timeout_s=settings.hang_timeout_s,
    )
    executor = create_executor(settings.executor, tuple(repository), options, events)
    residency = await _residency(settings, repository, executor, events)
    telemetry = Telemetry()
    rollouts = Rollouts(repository, events, rolled_back=telemetry.rolled_back)
    begin_routing(
        rollouts,
        repository,
        routing=None if settings.routing is None else Path(settings.routing),
        state=None if settings.state is None else Path(settings.state),
        events=events,
    )
    scheduler = Scheduler(
        executor,
        sorted(repository.keys, key=repository.is_default),  # warmed up last, these stay
        Observers(telemetry, rollouts),
        max_batch=settings.max_batch,
        largest={servable.key: servable.largest_batch for servable in repository},
        max_queue=settings.max_queue,
        residency=residency,
    )
    jobs = Jobs(
        Journal(None if settings.jobs is None else Path(settings.jobs)),
        Execution(repository, scheduler),
        events,
    )
    shadows = Shadows(rollouts, scheduler, executor, telemetry.shadowed)
    await executor.start()
    try:
        async with remembering(settings, repository, executor, scheduler, events):
            bodies = {servable.key: warm_up_body(servable) for servable in repository}
            await scheduler.warm_up(bodies)
            if residency is not None:
                telemetry.watch_memory(residency)
            telemetry.watch(scheduler, executor, repository.keys)
            await jobs.start()
            telemetry.registry.register(JobMetrics(jobs))
            services = Services(
                repository=repository,
                rollouts=rollouts,
                shadows=shadows,
                executor=executor,
                scheduler=scheduler,
                telemetry=telemetry,
                feeding=scheduler.start(),
                key_ring=key_ring,
                sessions=Sessions(scheduler, telemetry),
                replays=Replays(lambda reply: len(reply.body)),
                rates=RateLimits(),
                jobs=jobs,
                residency=residency,
                cors_origins=settings.cors_origins,
            )
            try:
                yield services
            finally:
                for freeing in services.freeing:
                    freeing.cancel()
    finally:
        await shadows.close()
        await scheduler.close()
        await jobs.close()
        await executor.close()


async def _residency(
    settings: Settings, repository: Repository, executor: Executor, events: EventSink
) -> Residency | None:
    """Who is in memory, where there is a budget. Raises ``ConfigError``."""
    if settings.memory_budget_mb is None:
        return None
    sizes = {servable.key: servable.program_bytes for servable in repository}
    budget_bytes = int(settings.memory_budget_mb * 1e6)
    residency = Residency(executor, sizes, budget_bytes, events, time.monotonic)
    await residency.begin()
    return residency


def build_application(services: Services) -> web.Application:
    """The aiohttp application over running services."""
    cors = [cross_origin] if services.cors_origins else []
    app = web.Application(middlewares=[observe, *cors, answer_failures, authenticate])
    app[SERVICES] = services
    add_routes(app.router)
    return app
