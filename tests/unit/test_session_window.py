"""How much may be under way: enough for the link that acknowledgements prove, no more."""

from __future__ import annotations

from collections import deque

import pytest

from edge_runtime.contract import limits
from edge_runtime.offload.window import Arrival, SendWindow

BASE = limits.SESSION_WINDOW_BYTES


def arrive(window: SendWindow, link: float, chunks: int, *, chunk: int = 8192, at: float = 10.0,
           sent_s: float = 0.0) -> deque[Arrival]:  # fmt: skip
    """``chunks`` PROGRESS frames of a link of so many bytes per second."""
    arrivals = deque([Arrival(0.0, sent_s, 0)])
    for number in range(1, chunks + 1):
        window.delivered(0)
        arrivals.append(Arrival(number * chunk / link, sent_s, number * chunk))
        window.observe_arrivals(arrivals, at)
    return arrivals


def test_before_anything_is_known_the_window_is_the_published_one() -> None:
    window = SendWindow()
    assert window.limit_bytes(0.0) == BASE <= 32 * 1024
    window.sent(BASE - 1)
    assert window.room_bytes(0.0) == 1
    window.delivered(BASE - 1)
    assert window.room_bytes(0.0) == BASE


@pytest.mark.parametrize(("rate", "rtt"), [(250_000, 0.05), (2_500_000, 0.08), (6_250_000, 0.02)])
def test_the_first_burst_proves_the_link_and_the_window_is_what_it_holds(
    rate: float, rtt: float
) -> None:
    window = SendWindow()
    window.observe_round_trip(rtt, 10.0)
    arrive(window, rate, BASE // 8192 + 3)
    assert window.rate(10.0) == pytest.approx(rate)
    assert window.limit_bytes(10.0) == pytest.approx(BASE + rate * rtt, rel=0.01)


def test_a_burst_that_was_held_back_is_no_fast_link() -> None:
    """Ten pieces came at once after a hole; they were sent over a second."""
    window = SendWindow()
    arrivals = deque([Arrival(1.0, 0.0, 0)])
    for number in range(1, 11):
        arrivals.append(Arrival(1.0 + number * 1e-5, number * 0.1, number * 8192))
        window.observe_arrivals(arrivals, 10.0)
    assert window.rate(10.0) == pytest.approx(81_920, rel=0.01)


def test_one_wake_up_of_the_receiver_is_no_infinite_rate() -> None:
    window = SendWindow()
    arrivals = deque([Arrival(1.0, 0.0, 0), Arrival(1.0, 0.0, 65_536)])
    window.observe_arrivals(arrivals, 10.0)
    assert window.rate(10.0) == pytest.approx(65_536 / 0.005)


def test_a_link_that_slows_down_takes_its_window_with_it() -> None:
    window = SendWindow()
    window.observe_round_trip(0.05, 10.0)
    arrive(window, 5e6, 12, at=10.0)
    assert window.limit_bytes(10.1) > BASE + 200_000
    arrive(window, 1e5, 12, at=10.5)
    assert window.limit_bytes(10.5) == pytest.approx(BASE + 5_000, rel=0.05)


def test_what_was_proven_is_forgotten_after_ten_seconds() -> None:
    window = SendWindow()
    window.observe_round_trip(0.05, 10.0)
    arrive(window, 5e6, 12, at=10.0)
    assert window.proven_bytes(19.9) > 200_000
    assert window.proven_bytes(20.1) == 0


def test_the_shortest_round_trip_of_late_counts() -> None:
    window = SendWindow()
    assert window.round_trip_s(0.0) is None
    for at, seen in ((0.0, 0.3), (1.0, 0.08), (2.0, 0.2)):
        window.observe_round_trip(seen, at)
    assert window.round_trip_s(2.0) == 0.08
    assert window.round_trip_s(11.5) == 0.2
    assert window.round_trip_s(99.0) == 0.2  # an old one is better than none


@pytest.mark.parametrize(("rate", "size"), [(0, 4096), (1e5, 4096), (1e6, 10_000), (1e8, 65_536)])
def test_a_piece_is_about_ten_milliseconds_of_the_link(rate: float, size: int) -> None:
    window = SendWindow()
    window.observe_round_trip(0.05, 1.0)
    if rate:
        window._observe_rate(rate, 1.0)
    assert window.chunk_bytes(1.0) == size


def test_a_piece_is_never_more_than_a_quarter_of_the_window() -> None:
    """Else a window that lets no whole piece pass would wait for ever."""
    window = SendWindow()
    window.observe_round_trip(0.0001, 1.0)
    for rate in (0.0, 1e4, 1e6, 1e7, 1e9):
        window._observe_rate(rate, 1.0)
        assert 4096 <= window.chunk_bytes(1.0) <= max(4096, window.limit_bytes(1.0) // 4)
