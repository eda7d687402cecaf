"""Isotonic regression against its definition, and gains that never rise with confidence."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_runtime.gain.curve import GainCurve
from edge_runtime.gain.fit import best_temperature, isotonic, isotonic_blocks, top_score
from edge_runtime.gain.model import fit_gain
from edge_runtime.gain.samples import Samples
from edge_runtime.policies.adaptive import GainPrior

few = settings(max_examples=12)
numbers = st.floats(-10, 10).map(lambda x: round(x, 3))
weighted = st.lists(st.tuples(numbers, st.floats(0.1, 5)), min_size=1, max_size=9)


def by_definition(y: list[float], w: list[float]) -> list[float]:
    """max over s <= i of min over t >= i of the weighted mean of y[s..t]."""

    def mean(s: int, t: int) -> float:
        return sum(y[i] * w[i] for i in range(s, t + 1)) / sum(w[s : t + 1])

    return [
        max(min(mean(s, t) for t in range(i, len(y))) for s in range(i + 1)) for i in range(len(y))
    ]


@few
@given(weighted)
def test_isotonic_is_the_max_min_of_means(points: list[tuple[float, float]]) -> None:
    y, w = [p[0] for p in points], [p[1] for p in points]
    rising = isotonic(np.array(y), np.array(w))
    assert rising == pytest.approx(by_definition(y, w), abs=1e-9)
    falling = isotonic(np.array(y), np.array(w), increasing=False)
    assert falling == pytest.approx([-v for v in by_definition([-v for v in y], w)], abs=1e-9)


@few
@given(st.lists(st.tuples(st.integers(0, 5), numbers), min_size=1, max_size=20), st.randoms())
def test_blocks_take_points_in_any_order_and_equal_ones_as_one(points, random) -> None:
    shuffled = list(points)
    random.shuffle(shuffled)

    def blocks(given):
        x = np.array([float(p[0]) for p in given])
        y = np.array([p[1] for p in given])
        return isotonic_blocks(x, y)

    one, other = blocks(points), blocks(shuffled)
    assert [b.value for b in one] == pytest.approx([b.value for b in other], abs=1e-9)
    assert sum(b.weight for b in one) == len(points)
    assert all(a.value < b.value and a.position < b.position for a, b in itertools.pairwise(one))


outcomes = st.lists(
    st.tuples(st.floats(0, 1), st.sampled_from([0.0, 1.0]), st.sampled_from([0.0, 1.0])),
    min_size=1,
    max_size=60,
)


@few
@given(outcomes, st.booleans())
def test_a_fitted_gain_is_bounded_and_never_rises(rows, labeled: bool) -> None:
    samples = Samples(
        digests=tuple(f"{n:064x}" for n in range(len(rows))),
        agreement=np.array([float(a == b) for _, a, b in rows]),
        confidence=np.array([c for c, _, _ in rows]),
        local_right=np.array([a for _, a, _ in rows]) if labeled else None,
        cloud_right=np.array([b for _, _, b in rows]) if labeled else None,
    )
    curve = fit_gain(samples, GainPrior())
    signed = [curve.signed(c) for c in np.linspace(-0.1, 1.1, 60)]
    assert all(-1 <= g <= 1 for g in signed)
    assert all(a >= b - 1e-12 for a, b in itertools.pairwise(signed))
    assert 0 <= curve.local_right <= 1


@few
@given(
    st.lists(st.tuples(st.floats(0, 1), st.floats(-1, 1)), min_size=1, max_size=9,
             unique_by=lambda knot: round(knot[0], 6)),
    st.floats(-1, 2),
)  # fmt: skip
def test_a_curve_is_numpys_interpolation_of_its_knots(knots, c: float) -> None:
    ordered = sorted(knots)
    values = sorted((g for _, g in ordered), reverse=True)
    x = [position for position, _ in ordered]
    curve = GainCurve(knots=tuple(zip(x, values, strict=True)), local_right=0.5)
    assert curve.signed(c) == pytest.approx(float(np.interp(c, x, values)), abs=1e-6)
    assert curve.gain(c) == max(0.0, curve.signed(c))


@few
@given(st.floats(0.2, 5), st.integers(0, 2**32 - 1))
def test_scaling_logits_scales_their_temperature_and_keeps_the_scores(
    factor: float, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 2, (60, 4))
    classes = np.where(rng.random(60) < 0.7, logits.argmax(axis=1), rng.integers(0, 4, 60))
    plain, scaled = best_temperature(logits, classes), best_temperature(factor * logits, classes)
    if min(plain, scaled, plain * factor) > 0.06 and max(plain, scaled, plain * factor) < 19:
        assert scaled == pytest.approx(factor * plain, rel=1e-6)
        assert top_score(factor * logits, scaled) == pytest.approx(top_score(logits, plain))
