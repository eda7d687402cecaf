"""The line before the local model: earliest deadline first, and nothing begun in vain."""

from __future__ import annotations

import threading
import time
from concurrent.futures import CancelledError

import pytest

from edge_runtime.contract.errors import DeadlineExceeded
from edge_runtime.local_queue import LocalQueue


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
