"""How a simulated device notices that its broker is out of reach, and leaves it alone.

The breaker is the runtime's own (``offload/breaker.py``), and so are the rules that feed it:

* an upload that ends when nothing was heard for a second makes the device ask whether the
  broker is there; without an answer within two seconds the session is given up
  (``offload/session.py``);
* until the broker is heard again, an upload has a connection of its own, which is closed when
  it is cut short; a health request then opens the next one (``offload/uplink.py``);
* a health request without an answer within three seconds is a hard failure, and three of them
  open the breaker (``offload/contact.py``).

A dead link is therefore found out within a dozen seconds, as a dead broker is.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable
from typing import Final

from edge_runtime.simulation.knowledge import DeviceKnowledge
from edge_runtime.simulation.power import RadioMeter
from edge_runtime.simulation.records import Event
from edge_runtime.simulation.requests import Request
from edge_runtime.simulation.transport import Path, Ping, crossed_bytes, plan_ping
from edge_runtime.simulation.world import World

__all__ = ["CHECK_S", "HEALTH_S", "SILENT_S", "BrokerWatch"]

SILENT_S: Final = 1.0
CHECK_S: Final = 2.0
HEALTH_S: Final = 3.0


class BrokerWatch(DeviceKnowledge):
    """The clock of a run, and all exchanges with the broker that carry no image."""

    def __init__(self, world: World, path: Path | None, *, timeline: bool) -> None:
        super().__init__(world, path)
        self._heap: list[tuple[float, int, Callable[..., None], tuple[object, ...]]] = []
        self._number = 0
        self._requests: list[Request] = []
        self.meter = RadioMeter(self._radio)
        self.events: list[Event] = []
        self._timeline = timeline
        self._unheard_s: float | None = None
        """Since when an upload waits and nothing came."""
        self._session = True
        """Not given up since the broker was last heard."""
        self._checking = False
        self._asking = False

    def _at(self, time_s: float, handle: Callable[..., None], *arguments: object) -> None:
        if time_s < math.inf:
            self._number += 1
            heapq.heappush(self._heap, (max(time_s, self._now), self._number, handle, arguments))

    def _note(self, kind: str, request: int = -1, detail: str = "") -> None:
        if self._timeline:
            self.events.append(Event(time_s=self._now, kind=kind, request=request, detail=detail))

    # Silence --------------------------------------------------------------------------

    def _waits(self, request: Request) -> None:
        """An upload was submitted."""
        request.over_session = self._session and not self._checking
        if self._unheard_s is None:
            self._unheard_s = self._now

    def _heard(self) -> None:
        self._session = True
        self._unheard_s = self._now if self._active else None

    def _was_cut(self, request: Request) -> None:
        """An upload was withdrawn."""
        if not request.over_session:
            self._path = self._path._replace(connection_used_s=-math.inf)
            self._ask()
        elif self._is_silent(request):
            self._check()

    def _is_silent(self, request: Request) -> bool:
        now, since_s = self._now, self._unheard_s
        if since_s is None or now - since_s < SILENT_S:
            return False
        there_s = now - self._world.round_trips.at(now)
        for other in (*self._active, request):
            plan = other.plan
            if plan is not None and crossed_bytes(self._world, plan, there_s) > crossed_bytes(
                self._world, plan, there_s - SILENT_S
            ):
                self._unheard_s = now  # acknowledgements came
                return False
        return True

    def _check(self) -> None:
        """Ask on the open session whether the broker is there."""
        if self._checking:
            return
        self._checking = True
        ping = plan_ping(self._world, self._path, self._now)
        self._note("ping")
        if ping.answer_s <= self._now + CHECK_S:
            self._at(ping.answer_s, self._checked, self._now)
        else:
            self._at(self._now + CHECK_S, self._give_up_session)

    def _checked(self, asked_s: float) -> None:
        self._checking = False
        self._estimates = self._estimates.pinged((self._now - asked_s) * 1e3, self._now)
        self._heard()

    def _give_up_session(self) -> None:
        self._checking = self._session = False
        self._path = self._path._replace(connection_used_s=-math.inf)

    # Health ---------------------------------------------------------------------------

    def _probe(self) -> None:
        """A request came: find out whether a broker that failed is back, if that is due."""
        if self._breaker.probe_due(self._now) and not self._asking:
            self._breaker.begin_probe(self._now)
            self._ask()

    def _warm(self) -> None:
        """What a decision asked for; an upload under way does as well."""
        if not self._active:
            self._ask()

    def _ask(self) -> None:
        """A health request; the first one counts, others wait for its outcome."""
        if self._asking:
            return
        self._asking = True
        ping = plan_ping(self._world, self._path, self._now)
        if not self._active:
            self._path = ping.after
        self._note("ping")
        limit_s = self._now + HEALTH_S
        if ping.begin_s < limit_s:  # else it waits behind other bytes, and never leaves
            if self._requests:
                self._requests[-1].outcome.uploaded_bytes += ping.wire_bytes
            self.meter.used(
                ping.begin_s,
                min(ping.sent_s, limit_s),
                min(ping.answer_s, limit_s),
                ping.wire_bytes,
                promoted=ping.promoted,
            )
        if ping.answer_s <= limit_s:
            self._at(ping.answer_s, self._answered, ping)
        else:
            self._at(min(ping.failed_s, limit_s), self._unanswered)

    def _answered(self, ping: Ping) -> None:
        self._asking = False
        self._estimates = self._estimates.pinged(ping.round_trip_s * 1e3, self._now)
        self._breaker.succeed()
        self._heard()

    def _unanswered(self) -> None:
        self._asking = False
        self._breaker.fail(self._now)
