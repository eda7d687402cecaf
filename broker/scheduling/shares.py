"""Who may wait how much: fair shares of the device, kept as an account of waiting work.

Requests are grouped into flows: a tenant, and an octave of deadlines. When more is asked for
than the device can do, tenants share it by their weights, and the deadlines of one tenant in
proportion to what is asked for; who asks for less leaves the rest to the others (max-min).

The account is a fluid one (generalized processor sharing: Parekh and Gallager, "A generalized
processor sharing approach to flow control", 1993). What is admitted adds its work to the backlog
of its flow. What is dispatched, whoever it was, is taken from the backlogs of all flows by their
shares: so the backlogs sum up to what really waits, and each flow's own drains as if it had its
share of the device for itself. A flow whose backlog would take too long *at its share* is over
it, and is refused, however early its deadlines would put it into the queue or however much room
its late deadlines have. The queue itself stays in the order of deadlines, which keeps every
promise made to flows within their shares.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

__all__ = ["Flow", "Shares"]

_DEMAND_S = 2.0
"""Time constant of the demand: what came so long ago counts 1/e."""
_REFRESH_S = 0.05
_FORGET_S = 30.0
"""A flow of which nothing came for so long leaves the account."""
_HEADROOM = 1.1
"""Beside others a flow counts its wait so much longer than it is. At their exact shares all flows
together fill every deadline to the brim, and then whoever comes first gets the next place."""
_MOST_FROM_ABOVE = 0.95
_NOTHING_MS = 1e-6


@dataclass(slots=True, eq=False)
class Flow:
    """Requests that share one fate: of one class, one tenant, one octave of deadlines."""

    priority: int
    tenant: str
    weight: float
    """Of its tenant."""
    backlog_ms: float = 0.0
    """Work in the fluid account."""
    share: float = 1.0
    """Of the device time that its class gets."""
    seen_s: float = -math.inf
    _demand: float = 0.0
    _counted_s: float = -math.inf

    def ask(self, work_ms: float, now_s: float) -> None:
        """Somebody asked for so much, whether it is admitted or not."""
        self._demand = self.demand(now_s) + work_ms / 1e3 / _DEMAND_S
        self._counted_s = now_s

    def demand(self, now_s: float) -> float:
        """Device time asked for lately, per second."""
        if self._demand == 0.0:
            return 0.0
        return self._demand * math.exp(-max(now_s - self._counted_s, 0.0) / _DEMAND_S)


@dataclass(slots=True)
class _Class:
    """All flows of one priority."""

    flows: dict[tuple[str, int], Flow] = field(default_factory=dict)
    backlog_ms: float = 0.0
    demand: float = 0.0
    """At the last refresh."""


class Shares:
    """The account of one device. Times are milliseconds of work, clocks seconds."""

    def __init__(self) -> None:
        self._classes: dict[int, _Class] = {}
        self._refreshed_s = -math.inf

    def flow(self, priority: int, tenant: str, weight: float, left_ms: float, now_s: float) -> Flow:
        """The flow of a request with so much time left."""
        group = self._classes.get(priority)
        if group is None:
            group = self._classes[priority] = _Class()
        key = (tenant, math.frexp(max(left_ms, 1.0))[1])
        found = group.flows.get(key)
        if found is None:
            found = group.flows[key] = Flow(priority, tenant, weight)
            self._refreshed_s = -math.inf
        found.weight = weight
        found.seen_s = now_s
        return found

    def wait_ms(self, flow: Flow, left_ms: float, now_s: float) -> float:
        """How long the backlog of ``flow`` takes at its share, with ``left_ms`` to go.

        Never longer than all that waits, and all that others may still ask for meanwhile.
        """
        self._refresh(now_s)
        group = self._classes[flow.priority]
        others = max(group.demand - flow.demand(now_s), 0.0)
        most_ms = group.backlog_ms + others * left_ms
        wait_ms = min(flow.backlog_ms / flow.share * self._headroom(group, flow), most_ms)
        above_ms = demand_above = 0.0
        for priority, other in self._classes.items():
            if priority < flow.priority:
                above_ms += other.backlog_ms
                demand_above += other.demand
        return (wait_ms + above_ms) / (1.0 - min(demand_above, _MOST_FROM_ABOVE))

    @staticmethod
    def _headroom(group: _Class, flow: Flow) -> float:
        return _HEADROOM if len(group.flows) > 1 and flow.share < 1.0 - 1e-6 else 1.0

    def admit(self, flow: Flow, work_ms: float) -> None:
        """A request of ``flow`` waits from now on."""
        flow.backlog_ms += work_ms
        self._classes[flow.priority].backlog_ms += work_ms

    def leave(self, flow: Flow, work_ms: float) -> None:
        """One left without having run: its own flow is relieved, as far as it has a backlog."""
        group = self._classes[flow.priority]
        own_ms = min(work_ms, flow.backlog_ms)
        flow.backlog_ms -= own_ms
        group.backlog_ms = max(group.backlog_ms - own_ms, 0.0)
        self._drain(group, work_ms - own_ms)

    def dispatch(self, priority: int, work_ms: float) -> None:
        """The device takes so much work of this class."""
        group = self._classes.get(priority)
        if group is not None:
            self._drain(group, work_ms)

    def backlog_ms(self) -> float:
        """All that waits."""
        return sum(group.backlog_ms for group in self._classes.values())

    def _drain(self, group: _Class, work_ms: float) -> None:
        """Take work from the backlogs by their shares; who has less leaves it to the others."""
        group.backlog_ms = max(group.backlog_ms - work_ms, 0.0)
        active = [flow for flow in group.flows.values() if flow.backlog_ms > _NOTHING_MS]
        while active and work_ms > _NOTHING_MS:
            total = sum(flow.share for flow in active)
            level_ms = min(flow.backlog_ms / flow.share for flow in active)
            step_ms = min(level_ms, work_ms / total)
            for flow in active:
                flow.backlog_ms = max(flow.backlog_ms - step_ms * flow.share, 0.0)
            work_ms -= step_ms * total
            active = [flow for flow in active if flow.backlog_ms > _NOTHING_MS]

    def _refresh(self, now_s: float) -> None:
        """Shares from what was asked for lately."""
        if now_s - self._refreshed_s < _REFRESH_S:
            return
        self._refreshed_s = now_s
        for group in self._classes.values():
            _forget(group, now_s)
            group.demand = sum(flow.demand(now_s) for flow in group.flows.values())
            _share_out(group.flows.values(), now_s)


def _forget(group: _Class, now_s: float) -> None:
    gone = [
        key
        for key, flow in group.flows.items()
        if flow.backlog_ms <= _NOTHING_MS and now_s - flow.seen_s > _FORGET_S
    ]
    for key in gone:
        del group.flows[key]


def _share_out(flows: Iterable[Flow], now_s: float) -> None:
    """What each flow gets if it asks for without end, and the others for what they do."""
    tenants: dict[str, list[Flow]] = {}
    for flow in flows:
        tenants.setdefault(flow.tenant, []).append(flow)
    demands = {tenant: sum(flow.demand(now_s) for flow in own) for tenant, own in tenants.items()}
    weights = {tenant: own[-1].weight for tenant, own in tenants.items()}
    levels = _levels(demands, weights)
    for tenant, own in tenants.items():
        for flow in own:
            part = flow.demand(now_s) / demands[tenant] if demands[tenant] > 0.0 else 1 / len(own)
            flow.share = max(levels[tenant] * weights[tenant] * part, 1e-9)


def _levels(demands: dict[str, float], weights: dict[str, float]) -> dict[str, float]:
    """Device time per weight for each tenant, by filling up the others in the order of need.

    The common level solves sum(min(demand, level * weight)) = 1; a tenant below it may have what
    the level would be without a bound on its own demand.
    """
    order = sorted(demands, key=lambda tenant: demands[tenant] / weights[tenant])
    left, weight_left = 1.0, sum(weights.values())
    levels: dict[str, float] = {}
    for tenant in order:
        level = left / weight_left
        levels[tenant] = level
        need = min(demands[tenant], level * weights[tenant])
        left -= need
        weight_left -= weights[tenant]
    return levels
