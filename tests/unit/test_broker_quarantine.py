"""What the worker executor remembers: inputs that end a worker, and how long batches take."""

from __future__ import annotations

from broker.executors.base import BatchItem
from broker.executors.quarantine import QUARANTINE_S, Quarantine
from broker.executors.watchdog import Watchdog
from broker.models.servable import ModelKey
from edge_runtime.contract.errors import RequestRejected

ONE, OTHER = ModelKey("one", "1"), ModelKey("other", "1")


def test_the_same_bytes_are_refused_for_that_model_alone_and_for_an_hour():
    now = [0.0]
    quarantine = Quarantine(lambda: now[0])
    poison, good = BatchItem(b"poison"), BatchItem(b"good")
    assert quarantine.refusal(ONE, poison) is None
    assert isinstance(quarantine.add(ONE, poison), RequestRejected)
    assert isinstance(quarantine.refusal(ONE, BatchItem(b"poison", 3)), RequestRejected)
    assert quarantine.refusal(OTHER, poison) is None
    assert quarantine.refusal(ONE, good) is None
    now[0] = QUARANTINE_S
    assert quarantine.refusal(ONE, poison) is None
    assert len(quarantine) == 0


def test_it_holds_a_bounded_number_and_forgets_the_oldest():
    quarantine = Quarantine()
    for number in range(1025):
        quarantine.add(ONE, BatchItem(b"%d" % number))
    assert len(quarantine) == 1024
    assert quarantine.refusal(ONE, BatchItem(b"0")) is None
    assert quarantine.refusal(ONE, BatchItem(b"1")) is not None


def test_a_model_that_is_not_known_yet_gets_the_whole_time():
    watchdog = Watchdog(30.0)
    for _ in range(7):
        watchdog.observe(ONE, 4, 0.5)
    assert watchdog.limit_s(ONE, 4) == 30.0
    watchdog.observe(ONE, 4, 0.5)
    assert watchdog.limit_s(ONE, 4) == 5.0
    assert watchdog.limit_s(ONE, 2) == 5.0
    assert watchdog.limit_s(ONE, 5) == 30.0
    assert watchdog.limit_s(OTHER, 4) == 30.0
    watchdog.forget(ONE)
    assert watchdog.limit_s(ONE, 4) == 30.0


def test_one_batch_in_ten_may_be_slow_without_raising_the_limit():
    watchdog = Watchdog(30.0)
    for number in range(20):
        watchdog.observe(ONE, 2, 2.5 if number < 2 else 0.3)
    assert watchdog.limit_s(ONE, 2) == 3.0
    watchdog.observe(ONE, 2, 2.5)
    assert watchdog.limit_s(ONE, 2) == 25.0


def test_the_limit_is_at_least_a_second_and_at_most_the_setting():
    watchdog = Watchdog(30.0)
    for _ in range(8):
        watchdog.observe(ONE, 1, 0.001)
        watchdog.observe(OTHER, 1, 20.0)
    assert watchdog.limit_s(ONE, 1) == 1.0
    assert watchdog.limit_s(OTHER, 1) == 30.0
    short = Watchdog(0.5)
    for _ in range(8):
        short.observe(ONE, 1, 0.001)
    assert short.limit_s(ONE, 1) == 0.5
