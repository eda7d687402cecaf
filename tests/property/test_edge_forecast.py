"""The loops of the forecast give what the plain formulas give."""

from __future__ import annotations

import math

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_runtime.estimators.arrivals import ArrivalEstimator
from edge_runtime.estimators.transfer import required_rate, upload_ms, wire_bytes
from edge_runtime.policies.base import CloudOutlook, LinkOutlook, UploadProgress
from edge_runtime.policies.forecast import Way

links = st.builds(
    LinkOutlook,
    log_rate_mean=st.floats(math.log(1e4), math.log(1e8)),
    log_rate_deviation=st.floats(0.05, 2),
    rtt_ms=st.floats(1, 300),
    rtt_deviation_ms=st.floats(0, 100),
    connection_open=st.booleans(),
    setup_round_trips=st.integers(0, 3),
    window_bytes=st.floats(14600, 1e6),
    in_flight_bytes=st.integers(0, 10**5),
    promotion_ms=st.floats(0, 600),
    rtt_nodes_ms=st.lists(st.floats(1, 500), min_size=5, max_size=5).map(tuple),
    outage=st.floats(0, 1),
    fresh_share=st.floats(0, 1),
    long_run_mean=st.floats(math.log(1e4), math.log(1e8)),
    long_run_deviation=st.floats(0.05, 2),
)
clouds = st.builds(
    CloudOutlook,
    queue_ms=st.floats(0, 50),
    inference_ms=st.floats(0, 100),
    tail_ms=st.just(0.0) | st.floats(0, 300),
)
sizes = st.integers(1000, 2_000_000)
times_ms = st.floats(1, 5000)


def normal_cdf(z: float) -> float:
    return 0.5 * math.erfc(-z / math.sqrt(2))


def expected_chance(
    link: LinkOutlook, cloud: CloudOutlook, size: float, time_ms: float, window: float
) -> float:
    """Every pair of nodes by ``transfer.required_rate``."""
    waits = ((0.5858, 0.8536), (3.4142, 0.1464)) if cloud.tail_ms else ((0.0, 1.0),)
    found = 0.0
    for rtt_ms in link.rtt_nodes_ms:
        for wait, share in waits:
            spent_ms = cloud.queue_ms + cloud.inference_ms + cloud.answer_ms
            spent_ms += link.promotion_ms + (1 + link.setup_round_trips) * rtt_ms
            rate = required_rate(size, time_ms - spent_ms - wait * cloud.tail_ms, rtt_ms, window)
            if rate == math.inf:
                continue
            known = normal_cdf((link.log_rate_mean - math.log(rate)) / link.log_rate_deviation)
            new = normal_cdf((link.long_run_mean - math.log(rate)) / link.long_run_deviation)
            found += share / 5 * ((1 - link.fresh_share) * known + link.fresh_share * new)
    return found * (1 - link.outage)


@given(link=links, cloud=clouds, size=sizes, time_ms=times_ms)
def test_the_chance_is_the_quadrature_of_required_rates(
    link: LinkOutlook, cloud: CloudOutlook, size: int, time_ms: float
) -> None:
    wire = wire_bytes(size) + link.in_flight_bytes
    found = Way(link, cloud, size).chance(time_ms)
    expected = expected_chance(link, cloud, wire, time_ms, link.window_bytes)
    assert found == pytest.approx(expected, abs=1e-9)


@given(link=links, cloud=clouds, size=sizes, time_ms=times_ms, wait_ms=st.floats(0, 500))
def test_another_path_is_asked_as_if_the_link_were_so(
    link: LinkOutlook, cloud: CloudOutlook, size: int, time_ms: float, wait_ms: float
) -> None:
    other = msgspec.structs.replace(link, promotion_ms=wait_ms, setup_round_trips=2)
    found = Way(link, cloud, size).chance_if(time_ms, wait_ms, 2)
    assert found == Way(other, cloud, size).chance(time_ms)


@given(link=links, cloud=clouds, size=sizes, time_ms=times_ms)
def test_both_windows_are_asked_as_if_the_link_were_so(
    link: LinkOutlook, cloud: CloudOutlook, size: int, time_ms: float
) -> None:
    usual = msgspec.structs.replace(cloud, queue_ms=cloud.queue_ms + cloud.tail_ms, tail_ms=0.0)

    def on_a_warm_path(window_bytes: float) -> float:
        warm = msgspec.structs.replace(
            link, promotion_ms=0.0, setup_round_trips=0, in_flight_bytes=0,
            window_bytes=window_bytes,
        )  # fmt: skip
        return Way(warm, usual, size).chance(time_ms)

    wide, narrow = Way(link, cloud, size).chances_by_window(size, time_ms)
    assert wide == pytest.approx(on_a_warm_path(14600 + wire_bytes(size)), abs=1e-9)
    assert narrow == pytest.approx(on_a_warm_path(14600.0), abs=1e-9)


@given(link=links, cloud=clouds, size=sizes, sent=st.floats(0, 1))
def test_the_median_upload_is_that_of_the_transfer(
    link: LinkOutlook, cloud: CloudOutlook, size: int, sent: float
) -> None:
    rate = math.exp(link.log_rate_mean)
    wire = wire_bytes(size) + link.in_flight_bytes
    usual = upload_ms(wire, rate, link.rtt_ms, link.window_bytes)
    assert Way(link, cloud, size).upload_ms == pytest.approx(usual)
    progress = UploadProgress(elapsed_ms=1.0, wire_bytes=wire, acknowledged_bytes=sent * wire)
    left = max(wire - sent * wire, 1.0)
    rest = upload_ms(left, rate, link.rtt_ms, link.window_bytes + sent * wire)
    assert Way(link, cloud, size, progress=progress).upload_ms == pytest.approx(rest)


@given(gaps=st.lists(st.floats(0.01, 2000), max_size=12), seconds=st.floats(0, 3000))
def test_a_rhythm_is_summed_by_octaves(gaps: list[float], seconds: float) -> None:
    state, now_s = ArrivalEstimator(), 0.0
    for gap_s in gaps:
        now_s += gap_s
        state = state.observe(now_s)
    total, within, expected_s, start_s = sum(state.weights), 0.0, 0.0, 0.0
    for octave, weight in enumerate(state.weights):
        end_s = 0.125 * 2.0**octave * (8 if octave == 11 else 1)
        covered = min(max((seconds - start_s) / (end_s - start_s), 0.0), 1.0)
        within += weight * covered
        # gaps are spread evenly over their octave
        reached_s = start_s + covered * (end_s - start_s)
        expected_s += weight * (
            covered * (start_s + reached_s) / 2 + (1 - covered) * min(seconds, end_s)
        )
        start_s = end_s
    assert state.within(seconds) == pytest.approx(within / total, abs=1e-12)
    assert state.expected_within(seconds) == pytest.approx(expected_s / total, rel=1e-9)
