"""The device's local model: one worker, a line before it, and heat."""

from __future__ import annotations

import bisect
import math

from edge_runtime.conditions import ThermalState
from edge_runtime.simulation.constants import ThermalConstants
from edge_runtime.simulation.world import World

__all__ = ["Heat", "LocalWorker", "thermal_state"]

_STATES: tuple[tuple[float, ThermalState], ...] = (
    (0.25, "nominal"),
    (0.5, "fair"),
    (0.75, "serious"),
    (math.inf, "critical"),
)


class Heat:
    """Recent duty, exponentially forgotten; the slowdown grows with it up to its full."""

    __slots__ = ("_constants", "_duty", "_time_s")

    def __init__(self, constants: ThermalConstants) -> None:
        self._constants = constants
        self._duty = 0.0
        self._time_s = 0.0

    def advance(self, now_s: float, *, busy: bool) -> None:
        """The worker was busy, or idle, since the last call."""
        keep = math.exp(-(now_s - self._time_s) / self._constants.duty_tau_s)
        self._duty = self._duty * keep + (1.0 - keep if busy else 0.0)
        self._time_s = now_s

    @property
    def level(self) -> float:
        """0: cool; 1: as slow as it gets."""
        return min(1.0, self._duty / self._constants.full_duty)

    @property
    def slowdown(self) -> float:
        """Factor on the local latency."""
        return 1.0 + (self._constants.max_slowdown - 1.0) * self.level


def thermal_state(level: float) -> ThermalState:
    """What the platform would call it."""
    return next(name for bound, name in _STATES if level < bound or bound == math.inf)


class LocalWorker:
    """Runs one request at a time, earliest deadline first. The owner keeps the clock.

    Deadlines are equally long, so requests are in order of their numbers.
    """

    def __init__(self, world: World) -> None:
        self._world = world
        self.heat = Heat(world.constants.thermal)
        self.line: list[int] = []
        self.held: dict[int, float] = {}
        """Requests whose run is held back while the cloud is asked: when it has to start."""
        self.running: int | None = None
        self.started_s = 0.0
        self.ends_s = 0.0
        self.joules = 0.0

    def submit(self, index: int) -> None:
        """Put a request in line."""
        self.held.pop(index, None)
        bisect.insort(self.line, index)

    def leave(self, index: int) -> None:
        """A request needs no run any more."""
        self.held.pop(index, None)
        if index in self.line:
            self.line.remove(index)

    def locked_out(self, index: int, until_s: float) -> list[int]:
        """Held-back requests that have to start before a run of ``index`` ends, and are due first.

        They go first: a run cannot be interrupted for them.
        """
        return sorted(h for h, start_s in self.held.items() if h < index and start_s < until_s)

    def start(self, index: int, now_s: float) -> float:
        """Run ``index``; when it will end."""
        self.heat.advance(now_s, busy=False)
        base_s = self._world.device.local_median_ms / 1e3
        self.running = index
        self.started_s = now_s
        self.ends_s = now_s + base_s * self._world.local_factor[index] * self.heat.slowdown
        return self.ends_s

    def stop(self, now_s: float) -> None:
        """The run ended, or was cancelled."""
        self.heat.advance(now_s, busy=True)
        self.joules += (now_s - self.started_s) * self._world.device.local_watts
        self.running = None
