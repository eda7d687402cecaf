"""The line before the local model: earliest deadline first, and nothing begun in vain."""

from __future__ import annotations

import threading
import time
from concurrent.futures import CancelledError

import pytest

from edge_runtime.contract.errors import DeadlineExceeded
from edge_runtime.local_queue import Held, LocalQueue


class _Gate:
    """A run that goes on until it is told to end."""

    def __init__(self, queue: LocalQueue) -> None:
        self.began, self.end = threading.Event(), threading.Event()
        self.ticket = queue.submit(self._wait)
        assert self.began.wait(5)

    def _wait(self) -> None:
        self.began.set()
        assert self.end.wait(5)


@pytest.fixture(name="queue")
def _queue():  # type: ignore[no-untyped-def]
    queue = LocalQueue("nearfar-test")
    yield queue
    queue.close(lambda: None)


def test_runs_begin_in_the_order_of_their_deadlines(queue: LocalQueue) -> None:
    gate, order = _Gate(queue), []
    tickets = [
        queue.submit(lambda name=name: order.append(name), deadline)  # type: ignore[misc]
        for name, deadline in (("late", 30.0), ("soon", 10.0), ("also soon", 10.0), ("mid", 20.0))
    ]
    gate.end.set()
    for ticket in tickets:
        ticket.future.result(5)
    assert order == ["soon", "also soon", "mid", "late"]


def test_a_run_that_cannot_end_in_time_is_not_begun_while_others_wait(queue: LocalQueue) -> None:
    gate, ran = _Gate(queue), []
    now = time.monotonic()
    hopeless = queue.submit(lambda: ran.append("hopeless"), now + 0.01, least_ms=lambda: 1000.0)
    other = queue.submit(lambda: ran.append("other"), now + 9.0, least_ms=lambda: 1000.0)
    gate.end.set()
    with pytest.raises(DeadlineExceeded, match="needs 1000 ms"):
        hopeless.future.result(5)
    other.future.result(5)
    assert ran == ["other"]


def test_alone_a_late_run_is_better_than_none(queue: LocalQueue) -> None:
    ticket = queue.submit(lambda: "late", time.monotonic() - 1.0, least_ms=lambda: 1000.0)
    assert ticket.future.result(5) == "late"


def test_a_run_that_nobody_wants_any_longer_leaves_the_line(queue: LocalQueue) -> None:
    gate = _Gate(queue)
    ticket = queue.submit(lambda: pytest.fail("it ran"), 1.0)
    assert queue.pending == 2
    assert ticket.future.cancel()
    assert queue.pending == 1
    gate.end.set()
    with pytest.raises(CancelledError):
        ticket.future.result(5)


def test_the_line_ahead_counts_earlier_deadlines_and_the_run_under_way(queue: LocalQueue) -> None:
    assert queue.ahead(None, 5.0) == (0, None)
    gate = _Gate(queue)
    first = queue.submit(lambda: None, 10.0)
    second = queue.submit(lambda: None, 20.0)
    assert queue.ahead(second, 0.0)[0] == 1
    assert queue.ahead(first, 0.0)[0] == 0
    assert queue.ahead(None, 15.0)[0] == 1
    assert queue.ahead(None, 5.0)[0] == 0
    running_s = queue.ahead(gate.ticket, 0.0)[1]
    assert running_s is not None
    assert 0.0 <= running_s < 5.0
    gate.end.set()
    second.future.result(5)


def test_an_error_is_the_futures_and_the_next_run_begins(queue: LocalQueue) -> None:
    broken = queue.submit(lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        broken.future.result(5)
    assert queue.submit(lambda: 7).future.result(5) == 7


def test_closing_finishes_the_line_and_takes_no_more() -> None:
    queue, order = LocalQueue("nearfar-test"), []
    queue.submit(lambda: order.append("run"), 1e9)
    queue.close(lambda: order.append("last"))
    queue.close(lambda: order.append("twice"))
    assert order == ["run", "last"]
    with pytest.raises(RuntimeError):
        queue.submit(lambda: None)


def test_a_run_held_back_goes_before_one_that_would_lock_it_out() -> None:
    queue = LocalQueue("nearfar-test", lambda: 300.0)
    try:
        gate, order, now = _Gate(queue), [], time.monotonic()
        begun: list[str] = []

        def begin(name: str, deadline_s: float) -> None:
            begun.append(name)
            queue.submit(lambda: order.append(name), deadline_s)

        for owner, (name, start_s, deadline_s) in enumerate(
            (
                ("due soon", now + 0.2, now + 10.0),
                ("due later", now + 60.0, now + 11.0),
                ("behind", now + 0.2, now + 99.0),
                ("given up", now + 0.1, now + 9.0),
            )
        ):
            queue.hold(owner, Held(start_s, deadline_s, lambda n=name, d=deadline_s: begin(n, d)))  # type: ignore[misc]
        queue.release(3)
        assert queue.ahead(None, now + 50.0)[0] == 1
        reserved_ms = queue.reserved_ms(owner=9, deadline_s=now + 50.0)
        assert reserved_ms == pytest.approx((200.0, 60_000.0), abs=5_000)
        assert len(queue.reserved_ms(owner=1, deadline_s=now + 50.0)) == 1
        other = queue.submit(lambda: order.append("at once"), now + 50.0)
        gate.end.set()
        other.future.result(5)
        assert (begun, order) == (["due soon"], ["due soon", "at once"])
    finally:
        queue.close(lambda: None)


def test_nothing_held_back_is_begun_for_a_run_that_nobody_wants() -> None:
    queue = LocalQueue("nearfar-test", lambda: 300.0)
    try:
        gate, now = _Gate(queue), time.monotonic()
        queue.hold(1, Held(now, now + 1.0, lambda: pytest.fail("it was begun")))
        assert queue.submit(lambda: None, now + 50.0).future.cancel()
        gate.end.set()
        queue.submit(lambda: None, now + 0.5).future.result(5)
    finally:
        queue.close(lambda: None)
