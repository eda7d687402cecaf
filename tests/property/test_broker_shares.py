"""The account of fair shares, against what really waits."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from broker.scheduling.shares import Flow, Shares

TENANTS = st.sampled_from("abc")
LEFT_MS = st.sampled_from((50.0, 200.0, 600.0, 3000.0))
WORK_MS = st.floats(min_value=0.1, max_value=50.0)


class AccountAgainstWaiting(RuleBasedStateMachine):
    """Requests come, leave, and are taken by the device in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.shares = Shares()
        self.waiting: list[tuple[Flow, float]] = []
        self.now_s = 0.0

    @rule(tenant=TENANTS, left_ms=LEFT_MS, work_ms=WORK_MS, priority=st.integers(1, 3))
    def admit(self, tenant: str, left_ms: float, work_ms: float, priority: int) -> None:
        flow = self.shares.flow(priority, tenant, ord(tenant) - 96.0, left_ms, self.now_s)
        wait_ms = self.shares.wait_ms(flow, left_ms, self.now_s)
        assert 0.0 <= wait_ms < float("inf")
        flow.ask(work_ms, self.now_s)
        self.shares.admit(flow, work_ms)
        self.waiting.append((flow, work_ms))

    @rule(place=st.integers(0, 1000), dispatched=st.booleans())
    def take(self, place: int, dispatched: bool) -> None:
        if self.waiting:
            flow, work_ms = self.waiting.pop(place % len(self.waiting))
            if dispatched:
                self.shares.dispatch(flow.priority, work_ms)
            else:
                self.shares.leave(flow, work_ms)

    @rule(seconds=st.floats(min_value=0.0, max_value=60.0))
    def pass_time(self, seconds: float) -> None:
        self.now_s += seconds

    @invariant()
    def backlogs_sum_up_to_what_waits(self) -> None:
        real_ms = sum(work_ms for _, work_ms in self.waiting)
        assert self.shares.backlog_ms() == pytest.approx(real_ms, abs=1e-3)
        for group in self.shares._classes.values():
            own_ms = [flow.backlog_ms for flow in group.flows.values()]
            assert all(backlog_ms >= 0.0 for backlog_ms in own_ms)
            assert sum(own_ms) == pytest.approx(group.backlog_ms, abs=1e-3)


TestAccountAgainstWaiting = AccountAgainstWaiting.TestCase


def _saturate(
    flows: dict[tuple[str, float], tuple[float, int]], steps: int = 3000
) -> dict[tuple[str, float], int]:
    """Each step every flow asks so many times (weight, asks) and the device takes one of each 4.

    A flow is let in while its wait at its share fits into its deadline, as admission does.
    """
    shares, now_s = Shares(), 0.0
    admitted = dict.fromkeys(flows, 0)
    waiting = 0
    for step in range(steps):
        now_s += 0.04  # four requests of 10 ms
        for (tenant, left_ms), (weight, asks) in flows.items():
            for _ in range(asks):
                flow = shares.flow(2, tenant, weight, left_ms, now_s)
                wait_ms = shares.wait_ms(flow, left_ms, now_s)
                flow.ask(10.0, now_s)
                if wait_ms + 40.0 <= left_ms:
                    shares.admit(flow, 10.0)
                    waiting += 1
                    admitted[tenant, left_ms] += step >= steps // 4
        taken = min(waiting, 4)
        waiting -= taken
        for _ in range(taken):
            shares.dispatch(2, 10.0)
    return admitted


@given(st.lists(st.sampled_from((0.5, 1.0, 2.0, 4.0)), min_size=2, max_size=5))
def test_saturating_tenants_get_their_weights(weights: list[float]) -> None:
    flows = {(f"t{n}", 800.0): (weight, 8) for n, weight in enumerate(weights)}
    admitted = _saturate(flows, steps=1000)
    total = sum(admitted.values())
    for (tenant, _), count in admitted.items():
        due = weights[int(tenant[1:])] / sum(weights)
        assert count / total == pytest.approx(due, rel=0.05)


@given(st.integers(1, 6), st.integers(4, 12))
def test_deadlines_of_one_tenant_are_answered_as_often_as_they_are_asked(
    short: int, long: int
) -> None:
    admitted = _saturate({("t", 600.0): (1.0, short), ("t", 3000.0): (1.0, long)}, steps=1500)
    share = admitted["t", 600.0] / sum(admitted.values())
    assert share == pytest.approx(short / (short + long), rel=0.1)


@given(st.integers(4, 40))
def test_whoever_asks_for_less_than_a_share_is_never_refused_for_others(asks: int) -> None:
    flows = {("modest", 400.0): (1.0, 1), ("greedy", 400.0): (1.0, asks)}
    admitted = _saturate(flows, steps=1000)
    assert admitted["modest", 400.0] == 750
    assert admitted["modest", 400.0] + admitted["greedy", 400.0] >= 0.99 * 4 * 750


def test_nobody_starves_beside_a_tenant_of_a_hundredfold_weight() -> None:
    admitted = _saturate({("big", 800.0): (100.0, 20), ("small", 800.0): (1.0, 20)})
    assert admitted["small", 800.0] > 0


def test_a_tenant_alone_has_the_whole_device() -> None:
    shares = Shares()
    flow = shares.flow(2, "only", 0.01, 500.0, 0.0)
    shares.admit(flow, 70.0)
    assert shares.wait_ms(flow, 500.0, 0.0) == 70.0


def test_a_lower_class_waits_for_all_that_a_higher_one_has_and_asks_for() -> None:
    shares = Shares()
    high, low = (shares.flow(priority, "t", 1.0, 500.0, 0.0) for priority in (1, 3))
    for _ in range(10):
        high.ask(100.0, 0.0)  # half of the device, over two seconds
    shares.admit(high, 100.0)
    shares.admit(low, 20.0)
    assert shares.wait_ms(high, 500.0, 1.0) == pytest.approx(100.0)
    assert shares.wait_ms(low, 500.0, 1.0) == pytest.approx(
        120.0 / (1 - 0.5 * 2.718**-0.5), rel=0.01
    )
