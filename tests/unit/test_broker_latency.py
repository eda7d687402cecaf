"""T(b): means, high quantiles, and what is guessed between the sizes that ran."""

import math

import pytest

from broker.scheduling.latency import LatencyModel, RecentQuantile


def observed(*runs: tuple[int, float]) -> LatencyModel:
    model = LatencyModel()
    for batch, duration_ms in runs:
        model.observe(batch, duration_ms, now_s=0.0)
    return model


@pytest.mark.parametrize(("batch", "duration_ms"), [(0, 1.0), (1, -1.0), (1, math.nan)])
def test_an_impossible_run_is_refused(batch: int, duration_ms: float):
    with pytest.raises(ValueError, match="no batch"):
        LatencyModel().observe(batch, duration_ms, now_s=0.0)


def test_before_anything_ran_nothing_takes_time_and_the_age_is_infinite():
    model = LatencyModel()
    assert model.mean_ms(4) == model.high_ms(4) == model.drain_ms(9, 4) == 0.0
    assert model.age_s(5.0) == math.inf


def test_between_two_sizes_it_interpolates():
    model = observed((1, 10.0), (5, 30.0))
    assert model.mean_ms(3) == 20.0


def test_above_the_largest_size_it_grows_in_proportion():
    assert observed((2, 10.0)).mean_ms(6) == 30.0


def test_below_the_smallest_size_that_size_is_the_bound():
    assert observed((4, 12.0)).mean_ms(1) == 12.0


def test_draining_runs_full_batches_then_the_rest():
    model = observed((1, 5.0), (4, 8.0))
    assert model.drain_ms(9, 4) == 2 * 8.0 + 5.0
    assert model.drain_ms(0, 4) == 0.0


def test_the_high_value_follows_a_slowdown_that_the_quantile_does_not_show_yet():
    model = observed((1, 10.0))
    for _ in range(3):
        model.observe(1, 100.0, now_s=1.0)
    assert model.high_ms(1) >= model.mean_ms(1) > 10.0


def test_one_outlier_in_a_full_window_does_not_move_the_high_quantile():
    quantile = RecentQuantile(quantile=0.95, window=64)
    for _ in range(64):
        quantile.observe(10.0)
    quantile.observe(5_000.0)
    assert quantile.value == 10.0


def test_with_few_values_the_largest_counts_only_until_there_are_three():
    quantile = RecentQuantile(quantile=0.95, window=64)
    seen = []
    for value in (500.0, 10.0, 12.0, 11.0):
        quantile.observe(value)
        seen.append(quantile.value)
    assert seen == [500.0, 500.0, 12.0, 12.0]


def test_old_values_leave_the_window():
    quantile = RecentQuantile(quantile=0.5, window=3)
    for value in (100.0, 100.0, 100.0, 1.0, 1.0):
        quantile.observe(value)
    assert quantile.value == 1.0


def test_the_age_is_that_of_the_latest_run():
    model = LatencyModel()
    model.observe(1, 1.0, now_s=2.0)
    model.observe(1, 1.0, now_s=7.0)
    assert model.age_s(10.0) == 3.0
