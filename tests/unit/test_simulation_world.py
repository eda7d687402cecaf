"""The simulated world: its arithmetic can be checked by hand."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_runtime.contract.errors import ConfigError
from edge_runtime.estimators.energy import radio_power
from edge_runtime.simulation.capacity import Capacity, RoundTrips
from edge_runtime.simulation.constants import load_constants
from edge_runtime.simulation.executor import Heat, thermal_state
from edge_runtime.simulation.power import RadioMeter
from edge_runtime.simulation.transport import (
    cancel,
    crossed_bytes,
    fresh_path,
    plan_ping,
    plan_upload,
)
from edge_runtime.simulation.world import Outage
from tests.support.worlds import plain_world, steady_trace, world

rates = st.lists(st.floats(0, 100), min_size=1, max_size=30).filter(lambda r: sum(r) > 0.1)


@settings(max_examples=40)
@given(mbps=rates, phase=st.floats(0, 10), start=st.floats(0, 100), size=st.floats(1, 5e6))
def test_draining_inverts_the_integral_of_the_rate(
    mbps: list[float], phase: float, start: float, size: float
) -> None:
    capacity = Capacity(np.array(mbps), phase)
    end = capacity.drain(start, size)
    assert end >= start
    assert capacity.between(start, end) == pytest.approx(size, rel=1e-6, abs=1.0)
    if end > start + 1e-3:
        assert capacity.between(start, end - 1e-3) <= size + 1.0


def test_an_outage_in_the_recording_only_waits() -> None:
    capacity = Capacity(np.array([8.0, 0.0, 0.0, 8.0]), 0.0)
    assert capacity.drain(0.05, 75_000) == pytest.approx(0.325)
    assert capacity.drain(0.39, 10_000) == pytest.approx(0.4)
    assert Capacity(np.zeros(5), 0.0).drain(0.0, 1.0) == math.inf


def test_round_trips_repeat() -> None:
    trips = RoundTrips(np.array([10.0, 20.0]), 0.0)
    assert [trips.at(t) for t in (0.0, 0.19, 0.21, 0.41, 0.61)] == [0.01, 0.01, 0.02, 0.01, 0.02]


def test_a_cold_upload_pays_promotion_handshake_slow_start_and_the_way_back() -> None:
    one = plain_world([1.0])
    plan = plan_upload(one, fresh_path(), 1.0, 0)
    tcp, rate, rtt = one.constants.tcp, 1e6, 0.05
    handshake = 2 * (100 / rate + rtt)
    assert plan.promoted
    assert plan.ready_s == pytest.approx(1.0 + 0.2601 + handshake)
    size = tcp.overhead * 100_000 + tcp.header_bytes
    # three windows, each a round trip (14.6, 29.2 kB) or the link (58.4 kB), then the rest
    sending = rtt + rtt + 0.0584 + (size - 7 * 14_600) / rate
    assert plan.up_end_s - plan.ready_s == pytest.approx(sending)
    assert plan.answer_s - plan.up_end_s == pytest.approx(rtt + 0.010)
    assert plan.setup_bytes == tcp.handshake_bytes


def test_a_warm_upload_sends_at_once_and_a_kept_window_saves_slow_start() -> None:
    one = plain_world([1.0, 2.0])
    first = plan_upload(one, fresh_path(), 1.0, 0)
    soon = plan_upload(one, first.after, first.answer_s + 0.5, 1)
    assert soon.ready_s == soon.submitted_s
    assert soon.up_end_s - soon.ready_s == pytest.approx(soon.wire_bytes / 1e6)
    later = plan_upload(one, first.after, first.answer_s + 3.0, 1)
    assert later.ready_s == later.submitted_s
    assert later.window_bytes == one.constants.tcp.initial_window_bytes
    asleep = plan_upload(one, first.after, first.answer_s + 12.0, 1)
    assert asleep.promoted
    assert asleep.setup_bytes == 0
    closed = plan_upload(one, first.after, first.answer_s + 16.0, 1)
    assert closed.setup_bytes > 0


def test_a_ping_warms_the_path_but_keeps_no_window() -> None:
    one = plain_world([1.0])
    ping = plan_ping(one, fresh_path(), 0.0)
    assert ping.wire_bytes == 700 + 3800
    assert ping.round_trip_s == pytest.approx(0.05 + 700 / 1e6)
    plan = plan_upload(one, ping.after, 1.0, 0)
    assert plan.ready_s == 1.0
    assert plan.window_bytes == 14_600


@settings(max_examples=40)
@given(after=st.floats(0, 0.6))
def test_a_cancel_keeps_the_session_and_loses_at_most_what_was_unacknowledged(
    after: float,
) -> None:
    one = plain_world([1.0, 2.0])
    warm = plan_ping(one, fresh_path(), 0.0).after
    plan = plan_upload(one, warm, 1.0, 0)
    now = 1.0 + after
    path, used = cancel(one, plan, now)
    crossed = crossed_bytes(one, plan, now)
    assert crossed <= used <= min(crossed + 32_768, plan.wire_bytes) + 1e-6
    again = plan_upload(one, path, now + 0.2, 1)
    assert again.setup_bytes == 0
    assert path.link_free_s <= plan.up_end_s + 1e-9


def test_a_broker_that_refuses_is_noticed_and_one_that_vanishes_is_not() -> None:
    refusing = plain_world([1.0], outages=[Outage(0.5, 3.0, True)])
    plan = plan_upload(refusing, fresh_path(), 1.0, 0)
    assert plan.answer_s == math.inf
    assert plan.failed_s < 1.5
    black = plain_world([1.0], outages=[Outage(1.05, 3.0, False)])
    warm = plan_ping(black, fresh_path(), 0.0).after
    lost = plan_upload(black, warm, 1.0, 0)
    assert lost.answer_s == lost.failed_s == math.inf
    assert lost.most_bytes < lost.wire_bytes


def test_radio_energy_of_two_uploads_a_second_apart_has_one_tail() -> None:
    lte = radio_power("lte")
    meter = RadioMeter(lte)
    meter.used(0.0, 0.7601, 0.8601, 125_000, promoted=True)
    meter.used(1.8601, 1.9601, 2.0, 125_000, promoted=False)
    transfer = 2 * 0.43839 + 1.28804 * (0.5 + 0.1)
    silent = 1.060 * (0.1 + 1.0 + 0.0399 + 11.576)
    assert meter.joules() == pytest.approx(0.2601 * 1.2107 + transfer + silent)


def test_heat_slows_up_to_its_bound_and_leaves_again() -> None:
    heat = Heat(load_constants().thermal)
    assert heat.slowdown == 1.0
    heat.advance(1e3, busy=True)
    assert heat.slowdown == pytest.approx(1.8)
    assert thermal_state(heat.level) == "critical"
    heat.advance(1e3 + 300, busy=False)
    assert heat.slowdown == pytest.approx(1.0, abs=0.01)


def test_the_same_seed_draws_the_same_world_and_another_one_another() -> None:
    one, two, three = world(seed=4), world(seed=4), world(seed=5)
    for name in ("arrived_s", "body_bytes", "confidence", "local_factor", "service_s"):
        assert getattr(one, name) == getattr(two, name)
        assert getattr(one, name) != getattr(three, name)
    assert one.outages == two.outages
    other = world(seed=4, deadline_ms=900, device="pi")
    assert other.arrived_s == one.arrived_s
    assert other.confidence == one.confidence


def test_arrival_patterns_have_their_rates() -> None:
    for pattern, mean_gap_s in (("poisson", 2.0), ("sparse", 40.0)):
        arrived = world(arrivals=pattern, duration_s=20_000).arrived_s
        assert arrived == sorted(arrived)
        assert np.mean(np.diff(arrived)) == pytest.approx(mean_gap_s, rel=0.15)
    gaps = np.diff(world(arrivals="bursty", duration_s=20_000).arrived_s)
    assert np.mean((gaps >= 0.1) & (gaps <= 0.4)) > 0.75
    sizes = world(duration_s=20_000).body_bytes
    assert np.median(sizes) == pytest.approx(110_000, rel=0.05)
    assert min(sizes) >= 30_000
    assert max(sizes) <= 400_000


def test_the_constants_are_those_of_the_study() -> None:
    known = load_constants()
    assert known.tcp.initial_window_bytes == 14_600
    assert known.server.overload_queue_mean_ms == 200
    assert known.devices["pi"].local_median_ms == 250
    assert known.accuracy.cloud_right_if_local_wrong == 0.483


def test_constants_can_be_laid_over_and_nonsense_is_named(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text("[devices.mid]\nlocal_median_ms = 80.0\n")
    assert load_constants(file).devices["mid"].local_median_ms == 80
    assert load_constants(file).devices["mid"].local_watts == 2.0
    for text, named in (
        ("[tcp]\nwindow = 3\n", "window"),
        ("[images]\nmin_bytes = -1\n", "min_bytes"),
        ("[tcp\n", "cannot read"),
    ):
        file.write_text(text)
        with pytest.raises(ConfigError, match=named):
            load_constants(file)
    with pytest.raises(ConfigError, match="cannot read"):
        load_constants(tmp_path / "none.toml")


def test_unknown_names_are_told_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="flagship, mid, pi"):
        world(device="laptop")
    with pytest.raises(ConfigError, match="poisson, bursty, sparse"):
        world(arrivals="weekly")
    with pytest.raises(ConfigError, match="deadline_ms"):
        world(steady_trace(), deadline_ms=math.nan)
