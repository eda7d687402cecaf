"""What a request of a session that ended without an answer teaches: whose fault it was."""

from __future__ import annotations

import msgspec
import pytest

from edge_runtime.offload.measurements import Measurements
from edge_runtime.offload.transport import UploadReceipt

BODY = 100_000


def cut(
    received: int, elapsed_ms: float, after_ms: float, *, reported: bool = False
) -> Measurements:
    """A wifi link known to carry 1 MB/s at 20 ms; cut off ``after_ms``."""
    measured = Measurements("wifi")
    link, rtt = measured.path.link, measured.path.rtt
    for _ in range(20):
        link, rtt = link.observe(1e6, 10.0), rtt.observe(20.0)
    measured.path = msgspec.structs.replace(measured.path, link=link, rtt=rtt)
    receipt = UploadReceipt()
    receipt.multiplexed = True
    receipt.sent_bytes = BODY
    receipt.received_bytes, receipt.elapsed_ms = received, elapsed_ms
    receipt.rate_reported = reported
    measured.cut_off(
        BODY, after_ms, round_trips=1, window_bytes=65_536, now_s=10.0, receipt=receipt
    )
    return measured


def rate(measured: Measurements) -> float:
    """What to hope for: the median where anything passes at all."""
    belief = measured.path.link.at(10.0)
    return belief.median_rate * (1.0 - belief.outage)


def test_an_upload_that_arrived_whole_blames_the_broker_for_the_rest() -> None:
    measured = cut(BODY, 104.0, 400.0)
    usual = Measurements("wifi").path.cloud
    waited_ms = 400 - 104 - 20 - usual.inference_mean_ms
    assert measured.path.cloud.recent_at(10.0) == pytest.approx(
        usual.recent_at(10.0) + waited_ms / 2, abs=1
    )
    assert rate(measured) == pytest.approx(1e6, rel=0.1)


def test_a_wait_no_longer_than_usual_blames_nobody() -> None:
    measured = cut(BODY, 104.0, 140.0)
    assert measured.path.cloud.samples == 0
    assert rate(measured) == pytest.approx(1e6, rel=0.1)


def test_a_part_that_arrived_is_a_sample() -> None:
    measured = cut(40_000, 400.0, 430.0)
    assert measured.path.cloud.samples == 0
    assert measured.path.link.samples == 21
    assert 1e5 < rate(measured) < 9.5e5


def test_a_part_that_was_reported_on_the_way_is_not_counted_again() -> None:
    assert cut(40_000, 400.0, 430.0, reported=True).path.link.samples == 20


def test_a_link_that_stalled_after_a_good_start_is_a_slow_one() -> None:
    steady, stalled = cut(20_000, 20.0, 40.0), cut(20_000, 20.0, 1000.0)
    assert rate(steady) > 8e5
    assert rate(stalled) < 0.8 * rate(steady)


def test_nothing_that_arrived_is_a_slow_link() -> None:
    assert rate(cut(0, 0.0, 1000.0)) < 0.9e6
