"""Link schedules: what they promise as pure data."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_runtime.contract.errors import ConfigError
from edge_runtime.simulation.links import (
    SCHEDULE_NAMES,
    LinkSchedule,
    LinkSegment,
    find_schedule,
    steady,
)


def _segment(seconds: float, up: float, down: float = 1.0) -> LinkSegment:
    return LinkSegment(duration_s=seconds, uplink_mbps=up, downlink_mbps=down, rtt_ms=10.0)


def test_a_link_that_never_passes_a_byte_is_refused() -> None:
    with pytest.raises(ConfigError, match="uplink"):
        LinkSchedule((_segment(1.0, 0.0),))
    with pytest.raises(ConfigError, match="downlink"):
        LinkSchedule((_segment(1.0, 1.0, 0.0),))


def test_a_schedule_without_segments_is_refused() -> None:
    with pytest.raises(ConfigError, match="segments"):
        LinkSchedule(())


def test_an_unknown_name_is_refused_and_names_the_known() -> None:
    with pytest.raises(ConfigError, match="commuter"):
        find_schedule("teleport", 1)


@pytest.mark.parametrize("name", SCHEDULE_NAMES)
def test_one_seed_gives_one_schedule_and_another_seed_another(name: str) -> None:
    assert find_schedule(name, 7).segments == find_schedule(name, 7).segments
    assert find_schedule(name, 7).segments != find_schedule(name, 8).segments


def test_commuter_has_a_good_a_bad_and_no_link() -> None:
    segments = find_schedule("commuter", 1).segments
    rates = [segment.uplink_mbps for segment in segments]
    assert min(rates) == 0.0
    assert any(0.2 < rate < 1.5 for rate in rates)
    assert any(rate > 15 for rate in rates)
    assert {segment.name for segment in segments} == {
        "LTE", "LTE fading", "outage", "3G", "Wi-Fi",
    }  # fmt: skip


def test_time_to_send_is_integrated_over_segments_and_periods() -> None:
    schedule = LinkSchedule((_segment(1.0, 0.008), _segment(1.0, 0.0), _segment(1.0, 0.016)))
    # 1000 bytes a second, none, 2000 a second; 3000 a period of three seconds.
    assert schedule.transmit("uplink", 0.0, 500) == pytest.approx(0.5)
    assert schedule.transmit("uplink", 0.5, 1000) == pytest.approx(2.25)
    assert schedule.transmit("uplink", 1.2, 0) == pytest.approx(2.0)
    assert schedule.transmit("uplink", 0.0, 3000) == pytest.approx(3.0)
    assert schedule.transmit("uplink", 2.5, 1500) == pytest.approx(3.5)
    assert schedule.transmit("uplink", 0.0, 30_500) == pytest.approx(30.5)


def test_the_schedule_repeats() -> None:
    schedule = LinkSchedule((_segment(1.0, 1.0), _segment(2.0, 2.0)))
    assert schedule.period_s == 3.0
    assert [schedule.at(t).uplink_mbps for t in (0.0, 0.99, 1.0, 2.99, 3.0, 4.0)] == [
        1.0, 1.0, 2.0, 2.0, 1.0, 2.0,
    ]  # fmt: skip


_segments = st.lists(
    st.builds(
        _segment,
        st.floats(0.05, 5.0),
        st.one_of(st.just(0.0), st.floats(0.01, 50.0)),
    ),
    min_size=1,
    max_size=8,
).filter(lambda found: any(segment.uplink_mbps > 0 for segment in found))


@given(_segments, st.floats(0, 50), st.floats(0, 200_000), st.floats(0, 200_000))
def test_sending_in_two_parts_takes_as_long_as_at_once(
    segments: list[LinkSegment], start_s: float, first: float, second: float
) -> None:
    schedule = LinkSchedule(tuple(segments))
    middle_s = schedule.transmit("uplink", start_s, first)
    end_s = schedule.transmit("uplink", middle_s, second)
    assert start_s - 1e-6 <= middle_s <= end_s + 1e-6
    assert end_s >= schedule.transmit("uplink", start_s, first + second) - 1e-6


@given(st.floats(0.1, 100), st.floats(0, 1e6), st.floats(0, 1e4))
def test_a_steady_link_takes_size_over_rate(mbps: float, size: float, start_s: float) -> None:
    end_s = steady(mbps, 1.0, 1.0).transmit("uplink", start_s, size)
    assert end_s - start_s == pytest.approx(size / (mbps * 125_000), abs=1e-5, rel=1e-6)
