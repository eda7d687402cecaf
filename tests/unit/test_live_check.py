"""The live check: its world holds what was measured, and its verdict says what differs."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
from pathlib import Path

import msgspec
import numpy as np
import pytest

from benchmarks.live_check.compare import Figures, PolicyReport, order_breaks, report
from benchmarks.live_check.device import Record
from benchmarks.live_check.live import LiveRun
from benchmarks.live_check.material import Link, draw_offset_s
from benchmarks.live_check.measured import (
    MeasuredWorld,
    Pair,
    make_world,
    open_path,
    overhead_ms,
    server_ms,
    simulate_policy,
)
from benchmarks.live_check.network import Network
from edge_runtime.contract import limits
from edge_runtime.results import Timings
from edge_runtime.simulation.capacity import Capacity
from edge_runtime.simulation.played import trace_schedule
from edge_runtime.simulation.traces import Trace
from edge_runtime.simulation.transport import plan_upload

_PAIR = Pair(
    body_bytes=[100_000, 20_000, 160_000],
    local_ms=[20.0, 30.0, 25.0],
    confidence=[0.2, 0.95, 0.4],
    local_right=[False, True, True],
    cloud_right=[True, True, False],
    server_ms=[30.0, 40.0, 50.0],
    overhead_ms=10.0,
    header_bytes=200.0,
)
_ARRIVED_S = [1.0, 2.5, 4.0]


def _link() -> Link:
    rng = np.random.default_rng(3)
    trace = Trace(
        name="drawn",
        group="LTE",
        radio="lte",
        uplink_mbps=rng.uniform(4.0, 30.0, 300),
        rtt_ms=rng.uniform(20.0, 60.0, 150),
    )
    return Link(trace=trace, folder=Path())


def _world(offset_s: float = 7.4) -> MeasuredWorld:
    return make_world(_link(), _PAIR, _ARRIVED_S, [0, 1, 2], deadline_ms=400.0, offset_s=offset_s)


def test_a_request_is_uploaded_and_answered_when_the_trace_says() -> None:
    """On a warm window: size over the trace, half a round trip, the service, and half again."""
    world, trace = _world(), _link().trace
    warm = open_path()._replace(window_bytes=1e6, window_s=0.9)
    plan = plan_upload(world, warm, 1.0, 1)
    capacity = Capacity(trace.uplink_mbps, 7.4)
    assert world.radio_power.promotion_s == 0.0
    assert plan.ready_s == 1.0
    assert plan.wire_bytes == 20_200.0
    assert plan.up_end_s == pytest.approx(capacity.drain(1.0, 20_200.0), abs=1e-9)
    segments = trace_schedule(trace, offset_s=7.4, seconds=60.0)
    assert plan.up_end_s == pytest.approx(segments.transmit("uplink", 1.0, 20_200.0), abs=1e-6)
    done_s = plan.up_end_s + segments.at(plan.up_end_s).rtt_ms / 2e3 + 0.050
    assert plan.answer_s == pytest.approx(done_s + segments.at(done_s).rtt_ms / 2e3, abs=1e-9)


def test_what_is_under_way_is_the_sessions_window() -> None:
    """24 KiB, and what the link holds by the last request's rate and shortest round trip."""
    trace = Trace(
        name="flat",
        group="LTE",
        radio="lte",
        uplink_mbps=np.full(300, 8.0),
        rtt_ms=np.array([50.0] * 5 + [30.0] * 145),
    )
    world = make_world(
        Link(trace=trace, folder=Path()), _PAIR, [0.5, 2.5, 20.0], [0, 1, 2],
        deadline_ms=400.0, offset_s=0.0,
    )  # fmt: skip
    window_bytes = limits.SESSION_WINDOW_BYTES
    assert world.max_window_bytes(0.4) == window_bytes
    assert world.max_window_bytes(0.5) == pytest.approx(window_bytes + 50_000)
    assert world.max_window_bytes(2.5) == pytest.approx(window_bytes + 30_000)
    assert world.max_window_bytes(15.0) == window_bytes


def test_the_device_answers_itself_as_fast_as_it_was_measured() -> None:
    outcomes, _ = simulate_policy(_world(), "LocalOnly")
    latencies_ms = [1e3 * (o.answer_s - at) for o, at in zip(outcomes, _ARRIVED_S, strict=True)]
    assert latencies_ms == pytest.approx([20.0, 30.0, 25.0])
    assert [outcome.uploaded_bytes for outcome in outcomes] == [0.0] * 3


def test_what_holds_no_answer_waits_to_the_deadline_and_what_does_leaves_before() -> None:
    slow = _link()
    trace = msgspec.structs.replace(slow.trace, uplink_mbps=np.full(300, 0.1))
    world = make_world(
        Link(trace=trace, folder=Path()), _PAIR, _ARRIVED_S, [0, 1, 2],
        deadline_ms=400.0, offset_s=0.0,
    )  # fmt: skip
    cloud, _ = simulate_policy(world, "CloudOnly")
    assert all(outcome.answer_s == float("inf") for outcome in cloud)
    hedged, _ = simulate_policy(world, "Hedged")
    waited_ms = [1e3 * (o.answer_s - at) for o, at in zip(hedged, _ARRIVED_S, strict=True)]
    assert waited_ms == pytest.approx([390.0] * 3)


def test_what_the_link_and_the_broker_took_is_no_overhead() -> None:
    timings = Timings(total_ms=49.0, upload_ms=9.0, server_queue_ms=1.0, server_inference_ms=25.0)
    assert server_ms(timings) == 26.0
    assert overhead_ms(50.0, timings, 4.0) == pytest.approx(11.0)
    assert overhead_ms(30.0, timings, 4.0) == 0.1
    assert server_ms(Timings(total_ms=400.0, upload_ms=9.0)) is None


def test_the_broker_takes_as_long_as_it_said_and_usually_where_it_said_nothing() -> None:
    def served_ms(cloud_ms: list[float | None] | None) -> list[float]:
        world = make_world(
            _link(), _PAIR, _ARRIVED_S, [0, 1, 2], deadline_ms=400.0, offset_s=0.0,
            cloud_ms=cloud_ms,
        )  # fmt: skip
        return [1e3 * value for value in world.service_s]

    assert served_ms([20.0, None, 24.0]) == pytest.approx([30.0, 32.0, 34.0])
    assert served_ms([None, None, None]) == served_ms(None) == pytest.approx([40.0, 50.0, 60.0])


def _live(latencies_ms: list[float], predicted: list[int]) -> LiveRun:
    records = [
        Record(latency_ms=ms, predicted=found, source="ON_DEVICE")
        for ms, found in zip(latencies_ms, predicted, strict=True)
    ]
    return LiveRun(records=records, uplink_bytes=0, discarded_bytes=0)


def test_equal_sides_pass_and_each_difference_fails() -> None:
    world = _world()
    outcomes, _ = simulate_policy(world, "LocalOnly")
    truth = [5, 6, 7]
    same = report("LocalOnly", _live([20.0, 30.0, 25.0], [0, 6, 7]), outcomes, world, truth)
    assert same.passed
    assert same.live.accuracy_in_deadline == same.simulated.accuracy_in_deadline == 0.6667
    slower = report("LocalOnly", _live([30.0, 30.0, 30.0], [0, 6, 7]), outcomes, world, truth)
    assert (slower.passed, slower.latency_ratio) == (False, 1.2)
    wrong = report("LocalOnly", _live([20.0, 30.0, 25.0], [0, 6, 0]), outcomes, world, truth)
    assert not wrong.passed
    assert wrong.accuracy_difference == pytest.approx(-1 / 3, abs=1e-3)
    late = report("LocalOnly", _live([20.0, 30.0, 401.0], [0, 6, 7]), outcomes, world, truth)
    assert late.live.accuracy_in_deadline == 0.3333
    assert late.live.late_or_none == 0.3333


def _figures(accuracy: float, mean_ms: float) -> Figures:
    return Figures(
        accuracy_in_deadline=accuracy, mean_ms=mean_ms, p95_ms=mean_ms, late_or_none=0.0,
        cloud_share=0.0, offloaded=0.0, kb_per_request=0.0,
    )  # fmt: skip


def _report(name: str, live: Figures, simulated: Figures) -> PolicyReport:
    return PolicyReport(
        policy=name, live=live, simulated=simulated, accuracy_difference=0.0, latency_ratio=1.0,
        bytes_ratio=None, other_side=0, late_start_ms=0.0, passed=True,
    )  # fmt: skip


def test_two_policies_that_change_places_are_named_and_ties_are_not() -> None:
    one = _report("one", _figures(0.80, 100.0), _figures(0.70, 100.0))
    other = _report("other", _figures(0.75, 100.0), _figures(0.75, 100.0))
    assert order_breaks([one, other]) == ["one and other"]
    tied = _report("tied", _figures(0.80, 100.0), _figures(0.80, 110.0))
    near = _report("near", _figures(0.81, 110.0), _figures(0.79, 100.0))
    assert order_breaks([tied, near]) == []
    fast = _report("fast", _figures(0.80, 50.0), _figures(0.80, 120.0))
    assert order_breaks([tied, fast]) == []
    slow = _report("slow", _figures(0.80, 50.0), _figures(0.80, 150.0))
    assert order_breaks([tied, slow]) == ["tied and slow"]


def _namespaces() -> set[str]:
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=False)
    return {line.split()[0] for line in listed.stdout.splitlines() if line}


def test_a_trace_is_entered_where_a_device_can_connect() -> None:
    rates = np.zeros(600)
    rates[200:240] = 5.0
    trace = msgspec.structs.replace(_link().trace, uplink_mbps=rates)
    found = {
        draw_offset_s(Link(trace=trace, folder=Path()), np.random.default_rng(seed))
        for seed in range(20)
    }
    assert found <= {20.0, 20.2, 20.4, 20.6, 20.8, 21.0}
    dead = msgspec.structs.replace(trace, uplink_mbps=np.zeros(600))
    offset_s = draw_offset_s(Link(trace=dead, folder=Path()), np.random.default_rng(0))
    assert 0.0 <= offset_s < 60.0


def test_a_network_falls_back_to_loopback_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", os.devnull)
    with Network() as network:
        assert (network.kind, network.broker_host) == ("loopback", "127.0.0.1")
        assert network.reason is not None
        assert network.broker_prefix == network.device_prefix == ()
    with Network(loopback=True) as network:
        assert (network.kind, network.reason) == ("loopback", "asked for")


def test_namespaces_see_only_the_relays_side_and_are_gone_after_a_failure() -> None:
    with Network() as network:
        if network.kind == "loopback":
            pytest.skip(str(network.reason))
        seen = subprocess.run(
            [*network.device_prefix, "ip", "-j", "route"], capture_output=True, check=True
        )
        assert [route["dev"] for route in json.loads(seen.stdout)] == ["nfdp"]
        with pytest.raises(OSError, match="broken"):
            _fail_in(network)
        made = {network.broker_prefix[3], network.device_prefix[3]}
        assert not made & _namespaces()


def _fail_in(network: Network) -> None:
    made = {network.broker_prefix[3], network.device_prefix[3]}
    with contextlib.ExitStack() as stack:
        stack.push(network.__exit__)
        assert made <= _namespaces()
        raise OSError("broken")
