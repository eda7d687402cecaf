"""Policies in simulated worlds: deadlines, fairness, counterfactuals and the bound."""

from __future__ import annotations

import math

import msgspec
import numpy as np
import pytest

from edge_runtime.contract.errors import ConfigError
from edge_runtime.offload import contact, session
from edge_runtime.policies.base import Action, Decision, Situation
from edge_runtime.simulation import watch
from edge_runtime.simulation.capacity import Capacity
from edge_runtime.simulation.device import DeviceRun
from edge_runtime.simulation.lineup import LINEUP, expand_policies, make_policy
from edge_runtime.simulation.oracle import run_oracle
from edge_runtime.simulation.records import PolicyRun, SimulationResult
from edge_runtime.simulation.requests import Outcome
from edge_runtime.simulation.run import simulate
from edge_runtime.simulation.traces import Trace
from edge_runtime.simulation.world import Outage, World
from tests.support.worlds import plain_world, short_constants, steady_trace, world

HELD = [name for name in LINEUP if name.startswith(("Hedged", "Cascade", "ExpectedUtility"))]


def _run(one: World, name: str) -> list[Outcome]:
    return DeviceRun(one, make_policy(name)).run()


def _late(one: World, outcomes: list[Outcome]) -> int:
    return sum(
        outcome.answer_s > arrived + one.deadline_s + 1e-9
        for outcome, arrived in zip(outcomes, one.arrived_s, strict=True)
    )


def _accuracy(one: World, outcomes: list[Outcome]) -> float:
    right = [
        (one.cloud_correct(i) if outcome.from_cloud else one.confidence[i])
        if outcome.answer_s <= one.arrived_s[i] + one.deadline_s + 1e-9
        else 0.0
        for i, outcome in enumerate(outcomes)
    ]
    return float(np.mean(right))


def _rough_trace() -> Trace:
    """On for a while, off for a while."""
    pattern = np.repeat([12.0, 0.0, 3.0, 0.2, 25.0, 6.0], 40)
    return Trace(
        name="rough", group="rough", radio="lte", uplink_mbps=pattern, rtt_ms=np.full(30, 60.0)
    )


@pytest.mark.parametrize("name", HELD)
@pytest.mark.parametrize("refuses", [True, False])
def test_a_held_answer_is_never_late_however_the_broker_fails(name: str, refuses: bool) -> None:
    dead = msgspec.structs.replace(world(_rough_trace()), outages=[Outage(10.0, 1e9, refuses)])
    assert _late(dead, _run(dead, name)) == 0


def test_a_slow_broker_makes_no_held_answer_late() -> None:
    slow = world(_rough_trace())
    slow = msgspec.structs.replace(slow, queue_s=[5.0] * len(slow.queue_s))
    for name in HELD:
        assert _late(slow, _run(slow, name)) == 0


def test_every_policy_meets_the_same_world() -> None:
    one = world(_rough_trace())
    before = msgspec.structs.asdict(one)
    for name in ("Hedged", "ExpectedUtility:balanced", "LinUCB"):
        assert len(_run(one, name)) == len(one.arrived_s)
    assert all(getattr(one, field) == value for field, value in before.items())


def test_a_run_is_the_same_twice() -> None:
    one = world(_rough_trace())
    for name in ("LinUCB", "ExpectedUtility:balanced"):
        first, second = _run(one, name), _run(one, name)
        assert [o.answer_s for o in first] == [o.answer_s for o in second]
        assert [o.uploaded_bytes for o in first] == [o.uploaded_bytes for o in second]


def test_local_only_is_the_local_latency_and_nothing_else() -> None:
    one = plain_world([1.0, 5.0])
    run = DeviceRun(one, make_policy("LocalOnly"))
    outcomes = run.run()
    assert outcomes[0].answer_s == pytest.approx(1.060)
    assert [o.uploaded_bytes for o in outcomes] == [0, 0]
    assert run.joules == pytest.approx(2.0 * 0.060 * 2, rel=0.02)


def test_hedging_takes_the_clouds_answer_when_it_is_in_time() -> None:
    one = plain_world([1.0, 2.0])
    cold, warm = _run(one, "Hedged")
    assert not cold.from_cloud
    assert cold.answer_s == pytest.approx(1.4)
    assert cold.wasted_bytes > 0
    assert warm.from_cloud
    assert warm.answer_s < 2.4
    assert warm.wasted_bytes == 0


def test_a_sure_local_answer_beats_waiting_for_the_cloud() -> None:
    one = plain_world([1.0, 2.0, 3.0], confidence=0.99)
    for name in ("ExpectedUtility:accuracy", "ExpectedUtility:balanced"):
        outcomes = _run(one, name)
        assert not any(outcome.from_cloud for outcome in outcomes)
        assert outcomes[1].answer_s == pytest.approx(2.06, abs=0.01)


def test_a_doubtful_image_goes_to_the_cloud_once_the_path_is_warm() -> None:
    outcomes = _run(plain_world([1.0, 2.0, 3.0, 4.0]), "ExpectedUtility:balanced")
    assert [outcome.from_cloud for outcome in outcomes[1:]] == [True] * 3
    assert all(outcome.cloud_in_time for outcome in outcomes[1:])
    assert all(outcome.p_cloud > 0.5 for outcome in outcomes[2:])


def test_a_dead_link_is_left_alone() -> None:
    slow = Trace(
        name="slow", group="3G", radio="3g", uplink_mbps=np.full(600, 0.4),
        rtt_ms=np.full(300, 120.0),
    )  # fmt: skip
    one = world(slow, duration_s=600)
    outcomes = _run(one, "ExpectedUtility:balanced")
    assert np.mean([outcome.offloaded for outcome in outcomes]) <= 0.05
    assert np.mean([outcome.uploaded_bytes for outcome in outcomes]) <= 1500


def _stretches(*stretches: tuple[float, float]) -> Trace:
    """``(seconds, Mbit/s)`` one after the other."""
    rates = np.concatenate([np.full(round(10 * s), mbps) for s, mbps in stretches])
    return Trace(
        name="stretches", group="LTE", radio="lte", uplink_mbps=rates, rtt_ms=np.full(30, 50.0)
    )


@pytest.mark.parametrize("gone", ["link", "broker"])
def test_a_dead_path_opens_the_breaker_and_it_closes_when_the_path_is_back(gone: str) -> None:
    """Nothing waits any more after a dozen seconds, and all is as before within 35 s."""
    dead_s, back_s = 20.0, 80.0
    arrived_s = [1.0 + 0.7 * number for number in range(200)]
    one = plain_world(arrived_s)
    if gone == "link":
        trace = _stretches((dead_s, 20.0), (back_s - dead_s, 0.0), (200.0, 20.0))
        one = msgspec.structs.replace(one, capacity=Capacity(trace.uplink_mbps, 0.0))
    else:
        one = msgspec.structs.replace(one, outages=[Outage(dead_s, back_s, False)])
    run = DeviceRun(one, make_policy("Hedged"), timeline=True)
    outcomes = run.run()
    waited = [
        at for at, outcome in zip(arrived_s, outcomes, strict=True) if outcome.answer_s > at + 0.3
    ]
    assert 3 <= sum(dead_s <= at < back_s for at in waited) <= 24
    assert max(at for at in waited if at < back_s) < dead_s + 16.0
    reasons = {
        event.detail for event in run.events if event.kind == "decision" and event.time_s < back_s
    }
    assert "LOCAL circuit_open" in reasons
    late = [o for at, o in zip(arrived_s, outcomes, strict=True) if at > back_s + 35.0]
    assert late
    assert all(outcome.from_cloud for outcome in late)


def test_a_slow_link_that_is_heard_keeps_its_session() -> None:
    one = plain_world([1.0 + 0.7 * number for number in range(100)])
    trace = _stretches((200.0, 1.0))
    one = msgspec.structs.replace(one, capacity=Capacity(trace.uplink_mbps, 0.0))
    run = DeviceRun(one, make_policy("Hedged"), timeline=True)
    run.run()
    assert not any("circuit_open" in event.detail for event in run.events)


def test_silence_is_judged_as_the_runtime_judges_it() -> None:
    assert watch.SILENT_S == session._SILENT_S
    assert watch.CHECK_S == session._CHECK_S
    assert watch.HEALTH_S == contact._BACKGROUND_S


def test_a_local_run_that_cannot_end_in_time_is_not_started() -> None:
    burst = plain_world([1.0 + 0.01 * k for k in range(6)], device="pi", deadline_ms=600)
    dead = msgspec.structs.replace(burst, outages=[Outage(0.0, 1e9, True)])
    naive = _run(dead, "LocalOnly")
    careful = _run(dead, "ExpectedUtility:accuracy")
    assert sum(math.isfinite(outcome.answer_s) for outcome in naive) == 6
    assert sum(math.isfinite(outcome.answer_s) for outcome in careful) < 6
    assert _late(dead, careful) <= _late(dead, naive)


def test_a_run_held_back_is_not_locked_out_by_the_next_request() -> None:
    """The first is sent and its run waits; the second runs at once and would be too long."""

    class CloudFirstThenLocal:
        name, uses_local, uses_cloud, prewarms = "scripted", True, True, True
        asked = 0

        def decide(self, situation: Situation) -> Decision:
            self.asked += 1
            if self.asked == 1:
                return Decision(action=Action.CLOUD_FIRST, reason="test", local_start_ms=500.0)
            return Decision(action=Action.LOCAL, reason="test")

    two = plain_world([1.0, 1.4], device="pi", deadline_ms=800)
    dead = msgspec.structs.replace(two, outages=[Outage(0.0, 1e9, False)])
    run = DeviceRun(dead, CloudFirstThenLocal(), timeline=True)
    assert _late(dead, run.run()) == 0
    begun = [(event.request, event.time_s) for event in run.events if event.kind == "local_start"]
    assert begun[0] == (0, pytest.approx(1.4))
    assert [request for request, _ in begun] == [0, 1]


@pytest.mark.parametrize("arrivals", ["poisson", "bursty", "sparse"])
def test_the_oracle_bounds_every_policy(arrivals: str) -> None:
    for seed in range(2):
        one = world(_rough_trace(), seed=seed, arrivals=arrivals, duration_s=120)
        bound = _accuracy(one, run_oracle(one, "Oracle")[0])
        for name in ("LocalOnly", "Hedged", "Cascade(0.9)", "ExpectedUtility:accuracy"):
            assert _accuracy(one, _run(one, name)) <= bound + 1e-9


def test_the_oracle_knows_which_upload_fails() -> None:
    one = plain_world([1.0, 2.0, 3.0], outages=[Outage(2.9, 3.5, False)])
    outcomes, _ = run_oracle(one, "Oracle")
    assert [outcome.from_cloud for outcome in outcomes] == [False, True, False]
    assert not outcomes[2].offloaded


def test_a_cell_holds_one_run_per_policy_trace_and_seed() -> None:
    result = simulate(
        [steady_trace(), steady_trace(2.0, name="slow")],
        device="mid",
        deadline_ms=400,
        arrivals="poisson",
        policies=["LocalOnly", "ExpectedUtility:balanced", "Oracle"],
        seeds=[0, 3],
        constants=short_constants(20),
        timeline=True,
    )
    assert isinstance(result, SimulationResult)
    found = [(run.trace, run.seed, run.policy) for run in result.runs]
    assert len(found) == len(set(found)) == 2 * 2 * 3
    for run in result.runs:
        lengths = {
            len(getattr(run, name))
            for name in PolicyRun.__struct_fields__
            if isinstance(getattr(run, name), np.ndarray)
        }
        assert lengths == {len(run.arrived_s)}
        assert (run.correct[run.latency_ms > run.deadline_ms + 1e-6] == 0).all()
        assert (run.wasted_bytes <= run.uploaded_bytes + 1e-6).all()
    ours = next(run for run in result.runs if run.policy.startswith("Expected"))
    assert {event.kind for event in ours.events} >= {"arrival", "decision", "local_start"}


def test_nonsense_is_told_before_the_work() -> None:
    trace = [steady_trace()]
    cell = {"device": "mid", "deadline_ms": 400.0, "arrivals": "poisson"}
    with pytest.raises(ConfigError, match="the simulator also has"):
        simulate(trace, policies=["Guess"], seeds=[0], **cell)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="seeds"):
        simulate(trace, policies=["Hedged"], seeds=[], **cell)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="no traces"):
        simulate([], policies=["Hedged"], seeds=[0], **cell)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="jobs"):
        simulate(trace, policies=["Hedged"], seeds=[0], jobs=0, **cell)  # type: ignore[arg-type]


def test_all_means_the_line_up_and_cascades_take_any_threshold() -> None:
    assert expand_policies(["all", "Hedged"]) == LINEUP
    assert make_policy("Cascade(0.85)").name == "Cascade(0.85)"
    assert make_policy("ADAPTIVE").name == "ADAPTIVE"
