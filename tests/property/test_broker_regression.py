"""The tests behind a rollback: exact where they can be, rarely wrong, and never blind."""

from __future__ import annotations

import random
from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.models.regression import (
    Comparison,
    fisher_greater,
    latency_ratio,
    van_elteren,
)
from broker.models.routing import draw

counts = st.integers(0, 12)


@given(counts, counts, counts, counts)
def test_fishers_test_is_the_share_of_all_ways_to_deal_the_failures(
    failed: int, passed: int, control_failed: int, control_passed: int
):
    total, control = failed + passed, control_failed + control_passed
    everybody = total + control
    if everybody > 9:
        total, everybody = min(total, 4), min(everybody, 9)
        control = everybody - total
        failed, control_failed = min(failed, total), min(control_failed, control)
    found = fisher_greater(failed, total, control_failed, control)
    failures = failed + control_failed
    if failed * everybody <= total * failures:
        assert found == 1.0
        return
    ways = list(combinations(range(everybody), failures))
    as_bad = sum(sum(one < total for one in way) >= failed for way in ways)
    assert found == pytest.approx(as_bad / len(ways), rel=1e-9)


def test_fishers_test_knows_a_textbook_table():
    # Fisher's tea tasting with all four right: 1 of 70 ways.
    assert fisher_greater(4, 4, 0, 4) == pytest.approx(1 / 70)
    assert fisher_greater(900_000, 1_000_000, 1, 1_000_000) == 0.0


times = st.lists(st.tuples(st.sampled_from((1, 2, 4)), st.floats(0.1, 1e3)), max_size=30)


@given(times, times)
def test_the_rank_test_is_a_probability_and_turns_with_its_sides(
    mine: list[tuple[int, float]], others: list[tuple[int, float]]
):
    one, other = van_elteren(mine, others), van_elteren(others, mine)
    assert 0.0 <= one <= 1.0
    if one < 1.0 or other < 1.0:
        assert one + other == pytest.approx(1.0)
    assert latency_ratio(mine, others) * latency_ratio(others, mine) == pytest.approx(1.0)


@given(st.text(max_size=20))
def test_a_draw_is_the_same_each_time_and_within_a_hundred(unit: str):
    drawn = draw("m", "2.0.0", unit)
    assert 0.0 <= drawn < 100.0
    assert draw("m", "2.0.0", unit) == drawn


@pytest.mark.parametrize("percent", [1.0, 5.0, 25.0, 60.0])
def test_the_split_has_the_share_it_was_given(percent: float):
    units = 20_000
    share = sum(draw("m", "2.0.0", f"device {n}") < percent for n in range(units)) / units
    spread = (percent / 100 * (1 - percent / 100) / units) ** 0.5
    assert abs(share - percent / 100) < 4 * spread


def test_another_version_draws_other_callers():
    both = sum(
        draw("m", "2", f"device {n}") < 10 and draw("m", "3", f"device {n}") < 10
        for n in range(20_000)
    )
    assert 130 < both < 270  # a hundredth of them, as by chance


def trial(rng: random.Random, *, requests: int, share: float, errors: tuple[float, float],
          slowdown: float = 1.0) -> str | None:  # fmt: skip
    """What a trial finds; the stable version fails at ``errors[0]``, the canary at [1]."""
    comparison = Comparison(
        min_requests=50, false_alarm=0.05, max_latency_ratio=1.01, max_error_increase=0.0
    )
    for _ in range(requests):
        canary = rng.random() < share
        failed = rng.random() < errors[canary]
        found = comparison.request(canary=canary, failed=failed)
        size = rng.choice((1, 1, 2) if canary else (1, 2, 4, 8))
        took_ms = (5 + 2 * size) * rng.lognormvariate(0, 0.3) * (slowdown if canary else 1.0)
        found = found or comparison.batch(canary=canary, images=size, duration_ms=took_ms)
        if found is not None:
            return found.kind
    return None


def test_equal_versions_are_seldom_told_apart_however_long_the_trial():
    rng = random.Random(11)
    runs = 200
    alarms = [trial(rng, requests=3000, share=0.2, errors=(0.05, 0.05)) for _ in range(runs)]
    false = sum(found is not None for found in alarms)
    # At most one in twenty: 10 of 200 expected at the bound, 10 + 3 * sqrt(9.5) = 19.
    assert false <= 19, alarms


@pytest.mark.parametrize(
    ("errors", "slowdown", "kind"),
    [((0.0, 1.0), 1.0, "errors"), ((0.02, 0.15), 1.0, "errors"), ((0.0, 0.0), 1.5, "latency")],
)
def test_a_worse_version_is_found(errors: tuple[float, float], slowdown: float, kind: str):
    rng = random.Random(5)
    found = [
        trial(rng, requests=6000, share=0.2, errors=errors, slowdown=slowdown) for _ in range(20)
    ]
    assert found.count(kind) >= 19
