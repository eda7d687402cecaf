"""Calibration and gain on data whose truth is known."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

from edge_runtime.gain.fit import (
    best_temperature,
    binary_nll,
    brier,
    expected_calibration_error,
    reliability,
    top_score,
)
from edge_runtime.gain.model import (
    SAME_MISTAKE,
    cross_fitted_gain,
    fit_gain,
    gain_figures,
    prior_gain,
)
from edge_runtime.gain.samples import Samples
from edge_runtime.gain.scores import calibration_figures
from edge_runtime.policies.adaptive import GainPrior

PRIOR = GainPrior()


def drawn(count: int, temperature: float, seed: int = 3) -> tuple[np.ndarray, np.ndarray]:
    """Logits, and classes drawn from softmax(z / temperature)."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 3, (count, 10))
    scaled = np.exp(logits / temperature)
    shares = np.cumsum(scaled / scaled.sum(axis=1, keepdims=True), axis=1)
    return logits, (shares < rng.random((count, 1))).sum(axis=1)


def labeled(count: int = 3000, seed: int = 5) -> Samples:
    """A calibrated device, and a cloud that is right in 0.9 of all images whatever c is."""
    rng = np.random.default_rng(seed)
    confidence = rng.beta(2, 0.8, count)
    cloud = (rng.random(count) < 0.9).astype(float)
    local = (rng.random(count) < confidence).astype(float)
    digests = sorted(
        hashlib.sha256(bytes([seed]) + n.to_bytes(4)).hexdigest() for n in range(count)
    )
    return Samples(
        digests=tuple(digests),
        agreement=(local == cloud).astype(float),
        confidence=confidence,
        local_right=local,
        cloud_right=cloud,
    )


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.5])
def test_the_temperature_that_classes_were_drawn_with_is_found(temperature: float) -> None:
    logits, classes = drawn(4000, temperature)
    assert best_temperature(logits, classes) == pytest.approx(temperature, rel=0.06)


def test_a_net_that_is_always_right_or_knows_nothing_meets_the_bounds() -> None:
    logits = np.eye(4)[[0, 1, 2, 3]] * 5.0
    assert best_temperature(logits, np.arange(4)) == pytest.approx(0.05)
    assert best_temperature(logits, np.array([1, 2, 3, 0])) == pytest.approx(20.0)


def test_top_score_is_the_highest_softmax() -> None:
    scores = top_score(np.array([[np.log(3.0), 0.0], [1000.0, 0.0]]), 1.0)
    assert scores == pytest.approx([0.75, 1.0])
    assert top_score(np.array([[np.log(9.0), 0.0]]), 2.0) == pytest.approx([0.75])


def test_reliability_counts_exactly() -> None:
    confidence, right = np.array([0.1, 0.9, 0.9, 1.0]), np.array([0.0, 1.0, 0.0, 1.0])
    bins = reliability(confidence, right, bins=10)
    assert [(b.low, b.images, b.right) for b in bins] == [(0.1, 1, 0.0), (0.9, 3, 2 / 3)]
    assert bins[1].confidence == pytest.approx(2.8 / 3)
    ece = (1 * 0.1 + 3 * abs(2 / 3 - 2.8 / 3)) / 4
    assert expected_calibration_error(bins) == pytest.approx(ece)
    assert brier(confidence, right) == pytest.approx((0.01 + 0.01 + 0.81) / 4)
    assert binary_nll(np.array([0.8, 0.8]), np.array([1.0, 0.0])) == pytest.approx(
        -(np.log(0.8) + np.log(0.2)) / 2
    )


def test_a_known_gain_is_recovered() -> None:
    curve = fit_gain(labeled(), PRIOR)
    for c in (0.4, 0.6, 0.8, 0.95):
        assert curve.signed(c) == pytest.approx(0.9 - c, abs=0.06)
        assert curve.local(c) == pytest.approx(c, abs=0.06)
        assert curve.cloud(c) == pytest.approx(0.9, abs=0.08)
    assert len(curve.nodes) == 8
    assert curve.nodes == tuple(sorted(curve.nodes))
    assert curve.nodes[3] < float(np.median(np.asarray(labeled().confidence))) < curve.nodes[4]


def test_where_there_are_no_images_the_gain_is_the_priors() -> None:
    samples = labeled(400)
    sure = samples.where(np.asarray(samples.confidence) > 0.9)
    curve = fit_gain(sure, PRIOR)
    for c in (0.125, 0.325, 0.525):
        assert curve.signed(c) == pytest.approx(PRIOR.signed(c), abs=1e-9)


def test_three_images_cannot_bend_the_prior_far() -> None:
    samples = labeled(400).where(np.arange(400) < 3)
    curve = fit_gain(samples, PRIOR)
    assert all(abs(curve.signed(c) - PRIOR.signed(c)) < 0.25 for c in np.linspace(0, 1, 50))


def test_without_labels_the_agreement_of_the_prior_gives_the_gain_of_the_prior() -> None:
    c = np.linspace(0.02, 0.98, 300)
    agree = PRIOR.cloud_right_if_local_right * c
    agree = agree + SAME_MISTAKE * (1 - PRIOR.cloud_right_if_local_wrong) * (1 - c)
    samples = Samples(digests=tuple(f"{n:064x}" for n in range(300)), agreement=agree, confidence=c)
    curve = fit_gain(samples, PRIOR)
    for at in (0.1, 0.5, 0.9):
        assert curve.signed(at) == pytest.approx(PRIOR.signed(at), abs=1e-3)
    assert curve.local_right == pytest.approx(float(c.mean()), abs=1e-9)


def test_answers_without_a_score_have_one_gain() -> None:
    samples = labeled(1000)
    plain = Samples(
        digests=samples.digests,
        agreement=samples.agreement,
        local_right=samples.local_right,
        cloud_right=samples.cloud_right,
    )
    curve = fit_gain(plain, PRIOR)
    assert samples.local_right is not None
    assert samples.cloud_right is not None
    difference = float((samples.cloud_right - samples.local_right).mean())
    assert curve.signed(0.0) == curve.signed(1.0) == pytest.approx(difference)
    assert curve.local_right == pytest.approx(float(samples.local_right.mean()))


def test_the_halves_share_nothing() -> None:
    """Whatever happens in one half changes no prediction for that half."""
    samples = labeled(600)
    assert samples.cloud_right is not None
    changed = np.where(samples.fold == 0, 0.0, samples.cloud_right)
    other = Samples(
        digests=samples.digests,
        agreement=samples.agreement,
        confidence=samples.confidence,
        local_right=samples.local_right,
        cloud_right=changed,
    )
    one, two = cross_fitted_gain(samples, PRIOR), cross_fitted_gain(other, PRIOR)
    assert (one[samples.fold == 0] == two[samples.fold == 0]).all()
    assert (one[samples.fold == 1] != two[samples.fold == 1]).any()
    assert 200 < int(samples.fold.sum()) < 400


def test_a_measured_gain_beats_a_wrong_prior_on_images_it_has_not_seen() -> None:
    samples = labeled()
    wrong = GainPrior(cloud_right_if_local_right=0.5, cloud_right_if_local_wrong=0.1)
    measured = gain_figures(samples, cross_fitted_gain(samples, wrong))
    prior = gain_figures(samples, prior_gain(samples, wrong))
    assert measured.error < 0.04 < 0.2 < prior.error
    assert measured.squared_error < prior.squared_error
    assert sum(b.images for b in measured.bins) == len(samples)


def test_spending_counts_the_final_answers() -> None:
    samples = Samples(
        digests=("00" * 32, "01" * 32, "02" * 32, "03" * 32),
        agreement=np.zeros(4),
        confidence=np.array([0.1, 0.2, 0.8, 0.9]),
        local_right=np.array([0.0, 0.0, 1.0, 1.0]),
        cloud_right=np.array([1.0, 0.0, 0.0, 1.0]),
    )
    figures = gain_figures(samples, np.array([0.5, 0.5, 0.03, -0.2]))
    by_price = {one.price: (one.uploaded, one.right) for one in figures.spending}
    assert by_price == {0.005: (0.75, 0.5), 0.02: (0.75, 0.5), 0.05: (0.5, 0.75), 0.1: (0.5, 0.75)}


def test_calibration_helps_an_overconfident_net_on_held_out_images() -> None:
    logits, classes = drawn(2000, 3.0)
    confidence = top_score(logits, 1.0)
    right = (logits.argmax(axis=1) == classes).astype(float)
    samples = Samples(
        digests=tuple(hashlib.sha256(n.to_bytes(4)).hexdigest() for n in range(2000)),
        agreement=right,
        confidence=confidence,
        truth=classes,
        local_right=right,
        cloud_right=right,
        logits=logits,
    )
    found = calibration_figures(samples)
    assert found is not None
    assert (found.method, found.temperature) == ("temperature", pytest.approx(3.0, rel=0.1))
    assert found.after.ece < 0.05 < 0.2 < found.before.ece
    assert found.after.brier < found.before.brier
    plain = calibration_figures(
        Samples(digests=samples.digests, agreement=right, confidence=confidence, truth=classes,
                local_right=right, cloud_right=right)
    )  # fmt: skip
    assert plain is not None
    assert (plain.method, plain.temperature) == ("isotonic", None)
    assert plain.after.ece < 0.07


def test_nothing_is_calibrated_without_labels_or_confidence() -> None:
    samples = labeled(50)
    assert calibration_figures(
        Samples(digests=samples.digests, agreement=samples.agreement, confidence=samples.confidence)
    ) is None  # fmt: skip
