"""All open sessions: how many there may be, what they are told, and when they end."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from typing import Final, Protocol

from broker.models.servable import ModelKey
from broker.scheduling.scheduler import Scheduler
from broker.telemetry import Telemetry
from edge_runtime.contract import limits
from edge_runtime.contract.errors import Overloaded
from edge_runtime.contract.frames import Hint

__all__ = ["GOING_AWAY", "Member", "Sessions", "is_news"]

GOING_AWAY: Final = 1001
"""RFC 6455 section 7.4.1."""
_TICK_S: Final = 0.25
_FLUSH_S: Final = 1.0
_FLUSH_POLL_S: Final = 0.005
_NEWS_MS: Final = 20
_NEWS_SHARE: Final = 0.25


class Member(Protocol):
    """What the registry needs of a session."""

    told_delay_ms: dict[ModelKey, int]
    """The queue delay that it knows, of each model that it used."""

    def tell(self, hint: Hint) -> None:
        """Queue a hint."""

    def idle_since_s(self) -> float | None:
        """When its last frame came; None while a request is in flight or an answer leaves."""

    def shut(self, code: int, reason: str) -> None:
        """Close it in the background."""

    async def ended(self) -> None:
        """Wait for its end."""


class Sessions:
    """Used from one event loop. Times are those of its clock."""

    def __init__(
        self,
        scheduler: Scheduler,
        telemetry: Telemetry,
        *,
        max_sessions: int = limits.MAX_SESSIONS,
        max_per_tenant: int = limits.MAX_SESSIONS_PER_TENANT,
        idle_ms: int = limits.MAX_SESSION_IDLE_MS,
    ) -> None:
        self._scheduler = scheduler
        self._telemetry = telemetry
        self.max_sessions = max_sessions
        self.max_per_tenant = max_per_tenant
        self.idle_ms = idle_ms
        self._members: dict[Member, str | None] = {}
        self._per_tenant: Counter[str] = Counter()
        self._ticking: asyncio.Task[None] | None = None
        self._draining = False

    def __len__(self) -> int:
        return len(self._members)

    def require_room(self) -> None:
        """Raise ``Overloaded`` when no further session may open."""
        if self._draining:
            raise Overloaded("the broker is shutting down: use another one")
        if len(self._members) >= self.max_sessions:
            raise Overloaded(f"{self.max_sessions} sessions are open: use POST, or ask later")

    def enter(self, member: Member) -> None:
        """One has upgraded; who it is, is not known yet."""
        self._members[member] = None
        self._telemetry.sessions_changed(len(self._members))
        if self._ticking is None:
            self._ticking = asyncio.create_task(self._tick(), name="sessions")

    def identify(self, member: Member, tenant: str) -> None:
        """Its HELLO named a tenant. Raises ``Overloaded`` when that one has too many."""
        if self._per_tenant[tenant] >= self.max_per_tenant:
            raise Overloaded(
                f"{self.max_per_tenant} sessions of this tenant are open: close some, or use POST"
            )
        self._members[member] = tenant
        self._per_tenant[tenant] += 1
        if self._draining:
            member.tell(Hint(draining=True))

    def leave(self, member: Member) -> None:
        """It has ended."""
        tenant = self._members.pop(member, None)
        if tenant is not None:
            self._per_tenant[tenant] -= 1
            if not self._per_tenant[tenant]:
                del self._per_tenant[tenant]
        self._telemetry.sessions_changed(len(self._members))
        if not self._members and self._ticking is not None:
            self._ticking.cancel()
            self._ticking = None

    def drain(self) -> None:
        """Tell everybody that the broker will end, and let nobody in."""
        self._draining = True
        for member in tuple(self._members):
            member.tell(Hint(draining=True))

    async def close(self) -> None:
        """End every session, after what is written already has left."""
        loop = asyncio.get_running_loop()
        end_s = loop.time() + _FLUSH_S
        while loop.time() < end_s and self._busy():  # noqa: ASYNC110  # once in a lifetime
            await asyncio.sleep(_FLUSH_POLL_S)
        members = tuple(self._members)
        for member in members:
            member.shut(GOING_AWAY, "draining")
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_FLUSH_S):
                await asyncio.gather(*(member.ended() for member in members))

    def _busy(self) -> bool:
        return any(member.idle_since_s() is None for member in self._members)

    async def _tick(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(_TICK_S)
            delays: dict[ModelKey, int] = {}
            for member in tuple(self._members):
                self._tell_news(member, delays)
                since_s = member.idle_since_s()
                if since_s is not None and loop.time() - since_s > self.idle_ms / 1e3:
                    member.shut(GOING_AWAY, "idle")

    def _tell_news(self, member: Member, delays: dict[ModelKey, int]) -> None:
        for model, told_ms in member.told_delay_ms.items():
            if model not in delays:
                delays[model] = self._scheduler.queue_delay_ms(model)
            if is_news(told_ms, delays[model]):
                member.told_delay_ms[model] = delays[model]
                member.tell(Hint(model=model.name, queue_delay_ms=delays[model]))


def is_news(told_ms: int, now_ms: int) -> bool:
    """Whether a queue delay differs enough from what a device was told to say so."""
    return abs(now_ms - told_ms) > max(_NEWS_MS, _NEWS_SHARE * told_ms)
