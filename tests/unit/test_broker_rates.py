"""Token buckets: what a key may ask for, on a clock of the test's own."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.accounts.keys import Principal
from broker.accounts.rates import RateLimits


class Clock:
    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def principal(key_id: str = "k", rate_per_s: float | None = 2.0, burst: int = 3) -> Principal:
    return Principal(tenant="t", key_id=key_id, rate_per_s=rate_per_s, burst=burst)


def test_an_empty_bucket_says_when_it_holds_a_token_again():
    clock = Clock()
    rates = RateLimits(clock)
    assert [rates.take(principal()) for _ in range(4)] == [0.0, 0.0, 0.0, 0.5]
    clock.now_s += 0.5
    assert rates.take(principal()) == 0.0
    assert rates.take(principal()) == pytest.approx(0.5)


def test_a_key_without_a_rate_is_never_counted():
    rates = RateLimits()
    assert all(rates.take(principal(rate_per_s=None)) == 0.0 for _ in range(1000))
    assert len(rates) == 0


def test_keys_do_not_spend_for_each_other():
    rates = RateLimits(Clock())
    assert rates.take(principal("a", burst=1)) == 0.0
    assert rates.take(principal("a", burst=1)) > 0.0
    assert rates.take(principal("b", burst=1)) == 0.0


def test_buckets_are_bounded_and_the_longest_unused_one_goes(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("edge_runtime.contract.limits.MAX_KEYS", 3)
    clock = Clock()
    rates = RateLimits(clock)
    for key_id in "abcd":
        clock.now_s += 1.0
        rates.take(principal(key_id, burst=1))
    assert len(rates) == 3
    assert rates.take(principal("d", rate_per_s=0.001, burst=1)) > 0.0


@given(
    st.floats(min_value=0.1, max_value=100.0),
    st.integers(1, 20),
    st.lists(st.floats(min_value=0.0, max_value=2.0), max_size=60),
)
def test_no_more_than_burst_and_rate_allow_ever_passes(
    rate_per_s: float, burst: int, pauses_s: list[float]
):
    clock = Clock()
    rates = RateLimits(clock)
    passed = 0
    for pause_s in pauses_s:
        clock.now_s += pause_s
        passed += rates.take(principal(rate_per_s=rate_per_s, burst=burst)) == 0.0
    assert passed <= burst + rate_per_s * sum(pauses_s) + 1e-6
