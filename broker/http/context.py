"""What handlers share, and what one request carries from layer to layer."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from aiohttp import web

from broker.accounts.keys import KeyRing, Principal
from broker.accounts.rates import RateLimits
from broker.executors.base import Executor
from broker.http.reply import Reply
from broker.http.sessions.registry import Sessions
from broker.jobs.jobs import Jobs
from broker.models.repository import Repository
from broker.models.rollout import Rollouts
from broker.models.servable import ModelKey
from broker.models.shadowing import Shadows
from broker.scheduling.replays import Replays
from broker.scheduling.residency import Residency
from broker.scheduling.scheduler import Scheduler
from broker.telemetry import Telemetry

__all__ = ["SERVICES", "TRACE", "Services", "Trace"]


@dataclass(slots=True)
class Services:
    """The parts that a running broker is made of."""

    repository: Repository
    rollouts: Rollouts
    shadows: Shadows
    executor: Executor
    scheduler: Scheduler
    telemetry: Telemetry
    feeding: asyncio.Task[None]
    """The scheduler's loop."""
    key_ring: KeyRing | None
    """None: nobody is asked for a key."""
    sessions: Sessions
    replays: Replays[Reply]
    jobs: Jobs
    rates: RateLimits
    residency: Residency | None = None
    """None: all models in service are in memory."""
    cors_origins: tuple[str, ...] = ()
    loading: asyncio.Lock = field(default_factory=asyncio.Lock)
    """Held while a model is loaded or freed: one at a time."""
    freeing: set[asyncio.Task[None]] = field(default_factory=set)
    """Unloaded models whose memory is still held."""
    draining: bool = False
    in_flight: int = 0
    """Requests whose answer has not gone out."""


@dataclass(slots=True)
class Trace:
    """One request on its way: for the log, the metrics and the answer's headers."""

    request_id: str
    arrived_s: float
    """End of the header block, on the event loop's clock."""
    route: str = "unmatched"
    principal: Principal | None = None
    model: ModelKey | None = None
    """Set once it is known to exist."""
    split: bool = False
    """Its version was drawn: how it ends counts in the canary's trial."""
    admitted: bool = False
    joined: bool = False
    """A retry that waited for its first try, or got its answer."""
    code: str | None = None
    """Of the error that was answered."""
    retry_after_s: float | None = None
    """Of a refusal that knows; else the queue's delay says."""
    upload_bytes: int = 0
    recv_ms: float | None = None
    queue_ms: float | None = None
    inference_ms: float | None = None


SERVICES: web.AppKey[Services] = web.AppKey("services", Services)
TRACE: web.RequestKey[Trace] = web.RequestKey("trace", Trace)
