"""The circuit breaker against a model of its rules, and each rule by itself."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from edge_runtime.offload.breaker import Breaker


class BreakerMachine(RuleBasedStateMachine):
    """Keeps the outcomes itself and predicts the state from the documented rules."""

    def __init__(self) -> None:
        super().__init__()
        self.jitter = 0.0
        self.breaker = Breaker(lambda: self.jitter)
        self.now = 0.0
        self.outcomes: list[bool] = []
        self.expected = "CLOSED"
        self.backoff = 1.0
        self.retry_at = 0.0

    def _trip(self) -> None:
        self.expected = "OPEN"
        self.outcomes = []
        self.retry_at = self.now + self.backoff * (0.5 + 0.5 * self.jitter)

    @rule(seconds=st.floats(0, 40), jitter=st.floats(0, 0.999))
    def time_passes(self, seconds: float, jitter: float) -> None:
        self.now += seconds
        self.jitter = jitter

    @rule()
    def succeed(self) -> None:
        self.breaker.succeed()
        if self.expected == "CLOSED":
            self.outcomes.append(True)
        elif self.expected == "HALF_OPEN":
            self.expected, self.outcomes, self.backoff = "CLOSED", [], 1.0

    @rule()
    def fail(self) -> None:
        self.breaker.fail(self.now)
        if self.expected == "HALF_OPEN":
            self.backoff = min(30.0, 2 * self.backoff)
            self._trip()
        elif self.expected == "CLOSED":
            self.outcomes.append(False)
            recent = self.outcomes[-20:]
            many = len(recent) >= 5 and recent.count(False) >= len(recent) / 2
            if self.outcomes[-3:] == [False] * 3 or many:
                self._trip()

    @precondition(lambda self: self.expected == "OPEN")
    @rule()
    def probe(self) -> None:
        due = self.now >= self.retry_at
        assert self.breaker.probe_due(self.now) == due
        if due:
            self.breaker.begin_probe(self.now)
            self.expected = "HALF_OPEN"
        else:
            with pytest.raises(ValueError, match="no probe is due"):
                self.breaker.begin_probe(self.now)

    @rule()
    def abandon(self) -> None:
        self.breaker.abandon_probe()
        if self.expected == "HALF_OPEN":
            self.expected = "OPEN"

    @invariant()
    def state_is_as_the_rules_say(self) -> None:
        assert self.breaker.state == self.expected
        if self.expected != "OPEN":
            assert not self.breaker.probe_due(self.now)


BreakerMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestBreaker = BreakerMachine.TestCase


def test_three_hard_failures_in_a_row_open_it() -> None:
    breaker = Breaker(lambda: 0.0)
    breaker.fail(0.0)
    breaker.fail(0.0)
    assert breaker.state == "CLOSED"
    breaker.fail(0.0)
    assert breaker.state == "OPEN"


def test_half_of_the_window_opens_it_without_three_in_a_row() -> None:
    breaker = Breaker(lambda: 0.0)
    for _ in range(2):
        breaker.succeed()
        breaker.fail(0.0)
    assert breaker.state == "CLOSED"
    breaker.fail(0.0)
    assert breaker.state == "OPEN"


def test_the_back_off_doubles_to_thirty_seconds_and_a_success_resets_it() -> None:
    breaker = Breaker(lambda: 1.0)
    now = 0.0
    for _ in range(3):
        breaker.fail(now)
    for expected_s in (1, 2, 4, 8, 16, 30, 30):
        assert not breaker.probe_due(now + expected_s - 0.01)
        now += expected_s
        breaker.begin_probe(now)
        breaker.fail(now)
    now += 30
    breaker.begin_probe(now)
    breaker.succeed()
    assert breaker.state == "CLOSED"
    for _ in range(3):
        breaker.fail(now)
    assert breaker.probe_due(now + 1.0)


def test_jitter_halves_the_back_off_at_most() -> None:
    breaker = Breaker(lambda: 0.0)
    for _ in range(3):
        breaker.fail(0.0)
    assert not breaker.probe_due(0.49)
    assert breaker.probe_due(0.5)
