"""Calibration values become the range that was asked for."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from converters.ranges import MINMAX, Histogram, RangeMethod, parse_ranges
from edge_runtime.contract.errors import ConfigError

MSE = RangeMethod(kind="mse")


def _gathered(*parts: list[float]) -> Histogram:
    histogram = Histogram()
    for part in parts:
        histogram.observe(np.array(part, np.float32))
    return histogram


def _error(values: np.ndarray, low: float, high: float) -> float:
    step = (high - low) / 255
    rounded = np.round((np.clip(values, low, high) - low) / step) * step + low
    return float(((rounded - values) ** 2).mean())


@pytest.mark.parametrize(
    "text", ["", "max", "percentile", "percentile:", "percentile:89.9", "percentile:100.1", "mse:3"]
)
def test_an_unknown_method_is_refused_with_the_known_ones(text: str) -> None:
    with pytest.raises(ConfigError, match="take minmax, mse, or percentile:P"):
        parse_ranges(text)


def test_methods_are_read_and_say_what_they_do() -> None:
    assert parse_ranges("minmax") == MINMAX
    assert parse_ranges("percentile:99.99").sentence == "the middle 99.99 % of the values"
    assert parse_ranges("mse").sentence == "least squared error"


def test_nothing_observed_spans_nothing() -> None:
    assert Histogram().bounds(MSE) == (0.0, 0.0)
    assert _gathered([math.nan, math.inf]).bounds(MINMAX) == (0.0, 0.0)


def test_zeros_alone_span_nothing_whatever_the_method() -> None:
    zeros = _gathered([0.0] * 10)
    for method in (MINMAX, MSE, parse_ranges("percentile:99")):
        assert zeros.bounds(method) == (0.0, 0.0)


@given(st.lists(st.lists(st.floats(-1e6, 1e6, width=32), min_size=1), min_size=1, max_size=6))
def test_minmax_is_exact_however_the_values_come(parts: list[list[float]]) -> None:
    every = [value for part in parts for value in part]
    assert _gathered(*parts).bounds(MINMAX) == (min(every), max(every))


@settings(max_examples=25)
@given(st.integers(0, 2**32 - 1), st.floats(1e-3, 1e3), st.sampled_from([90.0, 99.0, 99.9]))
def test_a_percentile_leaves_out_that_share_of_the_values(
    seed: int, scale: float, percent: float
) -> None:
    generator = np.random.default_rng(seed)
    values = (generator.standard_normal(4000) * scale).astype(np.float32)
    values[generator.random(4000) < 0.3] = 0.0
    histogram = Histogram()
    for part in np.array_split(values, 7):
        histogram.observe(part)
    tail = (100.0 - percent) / 200.0
    low, high = histogram.bounds(RangeMethod(kind="percentile", percent=percent))
    # Within the values of one bin.
    assert float((values < low).mean()) == pytest.approx(tail, abs=0.003)
    assert float((values > high).mean()) == pytest.approx(tail, abs=0.003)


def test_outliers_do_not_take_the_levels_from_the_rest() -> None:
    generator = np.random.default_rng(7)
    values = generator.standard_normal(100_000).astype(np.float32)
    values[:5] = [40.0, -35.0, 50.0, -60.0, 45.0]
    histogram = _gathered(values.tolist())
    low, high = histogram.bounds(MSE)
    assert -60.0 < low < -3.0
    assert 3.0 < high < 50.0
    assert _error(values, low, high) < 0.85 * _error(values, -60.0, 50.0)


@settings(max_examples=25)
@given(st.integers(0, 2**32 - 1), st.sampled_from(["normal", "laplace", "relu", "uniform"]))
def test_mse_is_never_worse_than_minmax(seed: int, kind: str) -> None:
    generator = np.random.default_rng(seed)
    draw = {
        "normal": lambda n: generator.standard_normal(n),
        "laplace": lambda n: generator.laplace(size=n),
        "relu": lambda n: np.maximum(generator.standard_normal(n), 0),
        "uniform": lambda n: generator.uniform(-1, 3, n),
    }[kind]
    values = draw(20_000).astype(np.float32)
    histogram = Histogram()
    histogram.observe(values)
    low, high = histogram.bounds(MSE)
    whole = min(float(values.min()), 0.0), max(float(values.max()), 0.0)
    assert whole[0] <= low <= 0.0 <= high <= whole[1]
    assert _error(values, low, high) <= 1.05 * _error(values, *whole)


@given(st.lists(st.floats(-(2.0**99), 2.0**99, width=32), min_size=1, max_size=50))
def test_any_finite_values_give_a_range_inside_their_own(values: list[float]) -> None:
    for method in (MSE, parse_ranges("percentile:95")):
        low, high = _gathered(values).bounds(method)
        assert min(*values, 0.0) <= low <= high <= max(*values, 0.0)
