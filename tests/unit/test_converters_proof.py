"""Figures and gates: exact on known arrays, and no gate lets noise or NaN through."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from converters.verify.checks import candidates, check_labels, check_preprocess, probe_findings
from converters.verify.compare import Comparison
from converters.verify.figures import SQNR_CAP_DB, Closeness
from converters.verify.gates import Gate, check_gate, default_gates, read_gates
from converters.verify.metrics import (
    best_temperature,
    chance_probability,
    cross_entropy,
    sqnr_db,
)
from edge_runtime.contract.errors import ConfigError, EvaluationError
from edge_runtime.contract.preprocess import NAMED, named
from edge_runtime.contract.tasks import ClassificationTask

RNG = np.random.default_rng(0)
REFERENCE = RNG.normal(0, 3, (50, 10)).astype(np.float32)
GATES = default_gates("classification")
TASK = ClassificationTask(classes=10)


def closeness(
    reference: np.ndarray, answer: np.ndarray, task: ClassificationTask = TASK
) -> Closeness:
    comparison = Comparison(task)
    for exact, other in zip(reference, answer, strict=True):
        comparison.add([exact[None]], [other[None]])
    return comparison.result()


def reasons(
    precision: str, figures: Closeness, size_ratio: float = 0.3, share: float | None = 1.0
) -> list[str]:
    gate = GATES[precision]  # type: ignore[index]
    return [f.name for f in check_gate(gate, precision, figures, size_ratio, share)]  # type: ignore[arg-type]


def test_sqnr_of_known_noise_is_exact() -> None:
    reference = np.array([[3.0, 4.0]])
    assert sqnr_db(reference, np.array([[3.0, 4.5]]))[0] == pytest.approx(20.0)
    assert sqnr_db(reference, reference)[0] == SQNR_CAP_DB
    assert sqnr_db(reference, np.array([[np.nan, 4.0]]))[0] == -SQNR_CAP_DB
    assert sqnr_db(np.zeros((1, 2)), np.ones((1, 2)))[0] == -SQNR_CAP_DB


@pytest.mark.parametrize("precision", sorted(GATES))
def test_identical_answers_pass_and_nan_fails_every_gate(precision: str) -> None:
    assert reasons(precision, closeness(REFERENCE, REFERENCE)) == []
    broken = REFERENCE.copy()
    broken[7, 3] = np.nan
    assert reasons(precision, closeness(REFERENCE, broken)) == ["not-finite"]


@pytest.mark.parametrize("precision", sorted(GATES))
def test_another_models_answers_fail_every_gate(precision: str) -> None:
    other = RNG.normal(0, 3, REFERENCE.shape).astype(np.float32)
    assert reasons(precision, closeness(REFERENCE, other)).count("agreement") == 2
    assert "parity" in reasons(precision, closeness(REFERENCE, other))


def test_noise_of_a_silent_mistake_fails_int8() -> None:
    """13 dB is what the mildest wrong pre-processing left of a trained ImageNet net."""
    noise = RNG.normal(0, 1, REFERENCE.shape)
    noise *= np.sqrt((REFERENCE**2).sum(1) / (noise**2).sum(1) / 10**1.3)[:, None]
    figures = closeness(REFERENCE, (REFERENCE + noise).astype(np.float32))
    assert figures.sqnr_db_mean == pytest.approx(13.0, abs=0.01)
    assert "parity" in reasons("int8", figures)


def test_file_that_was_not_quantized_fails_by_its_size_or_its_weights() -> None:
    same = closeness(REFERENCE, REFERENCE)
    assert reasons("int8", same, size_ratio=1.0) == ["not-quantized"]
    assert reasons("int8", same, share=0.1) == ["not-quantized"]
    assert reasons("fp32", same, size_ratio=1.0, share=0.0) == []


def test_fp32_allows_no_disagreement_on_few_images_and_lower_precisions_one() -> None:
    answer = REFERENCE[:20].copy()
    top = answer[0].argsort()
    answer[0, top[-1]], answer[0, top[-2]] = answer[0, top[-2]], answer[0, top[-1]]
    figures = closeness(REFERENCE[:20], answer)
    loose = Gate(
        sqnr_db_mean=-99, sqnr_db_min=-99, agreement=0.97, confident_agreement=0.5, size_ratio=9
    )
    assert figures.disagreements == 1
    assert figures.metrics["top5"] == 1.0
    assert len(check_gate(loose, "fp32", figures, 1.0, None)) == 1
    assert check_gate(loose, "int8", figures, 1.0, None) == []


def test_gates_file_changes_only_what_it_names(tmp_path: Path) -> None:
    path = tmp_path / "gates.toml"
    path.write_text("[int8]\nagreement = 0.5\n")
    gates = read_gates(path, "classification")
    assert gates["int8"].agreement == 0.5
    assert gates["int8"].sqnr_db_mean == GATES["int8"].sqnr_db_mean
    assert gates["fp32"] == GATES["fp32"]


@pytest.mark.parametrize(
    "text", ["[int8]\nagrement = 0.5\n", "[int9]\nagreement = 1\n", "int8 = 3\n", "[", "\x00"]
)
def test_gates_file_with_an_unknown_key_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "gates.toml"
    path.write_text(text)
    with pytest.raises(ConfigError):
        read_gates(path, "classification")


def test_chance_probability_of_coins_is_exact() -> None:
    assert chance_probability(0, 10, 2) == pytest.approx(1.0)
    assert chance_probability(10, 10, 2) == pytest.approx(2**-10)
    assert chance_probability(9, 10, 2) == pytest.approx(11 * 2**-10)


def test_cross_entropy_and_temperature_match_scipy() -> None:
    from scipy.special import log_softmax

    classes = RNG.integers(0, 10, 50)
    expected = -log_softmax(REFERENCE.astype(np.float64) / 2, axis=1)[np.arange(50), classes]
    np.testing.assert_allclose(cross_entropy(REFERENCE, classes, 2.0), expected)
    answers = _answers(3.0, classes, 1)
    ratio = best_temperature(answers * 5, classes) / best_temperature(answers, classes)
    assert ratio == pytest.approx(5.0, rel=0.07), "one step of the grid"


def _answers(quality: float, classes: np.ndarray, seed: int) -> np.ndarray:
    noise = np.random.default_rng(seed).normal(0, 1, (len(classes), 10))
    return np.asarray(np.eye(10)[classes] * quality + noise)


def test_better_preprocessing_is_noticed_and_a_worse_one_is_not() -> None:
    classes = RNG.integers(0, 10, 150)
    good, bad = _answers(3.0, classes, 1), _answers(1.5, classes, 2)
    found = check_preprocess(bad, [("tf", good), ("caffe", _answers(0, classes, 3))], classes)
    assert not found.passed
    assert "'tf'" in found.detail
    assert check_preprocess(good, [("tf", bad)], classes).passed


def test_overconfident_answers_do_not_reward_blur() -> None:
    """Forty times too large logits lose raw cross-entropy to a worse but milder net."""
    classes = RNG.integers(0, 10, 150)
    overconfident = _answers(3.0, classes, 1) * 40
    mild = _answers(1.5, classes, 2)
    assert cross_entropy(overconfident, classes, 1).mean() > cross_entropy(mild, classes, 1).mean()
    assert check_preprocess(overconfident, [("mild", mild)], classes).passed


def test_shuffled_labels_are_an_error_and_foreign_classes_bad_input() -> None:
    classes = RNG.integers(0, 10, 60)
    answers = _answers(5.0, classes, 1)
    assert check_labels(answers, classes).passed
    assert not check_labels(answers, (classes + 3) % 10).passed
    with pytest.raises(EvaluationError, match="0 to 9"):
        check_labels(answers, classes + 5)


def test_variant_that_answers_better_under_another_record_is_told() -> None:
    names = ["tf", "caffe", "red and blue swapped"]
    assert probe_findings(names, [20.0, 5.0, 8.0], own=0) == []
    assert probe_findings(names, [20.0, 22.9, 8.0], own=0) == [], "within the margin"
    assert probe_findings(names, [-1.5, 2.8, -3.0], own=0) == [], "it answers like neither"
    (found,) = probe_findings(names, [13.0, 25.0, 8.0], own=0)
    assert found.name == "preprocess-record"
    assert "'caffe'" in found.detail
    (found,) = probe_findings(names, [13.0, 12.0, 25.0], own=0)
    assert found.name == "channel-order"


def test_candidates_are_the_declared_all_names_and_the_swapped_channels() -> None:
    found = candidates(named("tf", 32, 32))
    assert found[0] == ("tf", named("tf", 32, 32))
    assert {name for name, _ in found} == {*NAMED, "red and blue swapped"}
    assert len(found) == len({str(record) for _, record in found})
    assert all(record.size == (32, 32) for _, record in found)
    assert dict(found)["red and blue swapped"].color == "BGR"
