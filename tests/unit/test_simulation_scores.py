"""Figures of a simulation: what is averaged, what is compared with what, and what is undefined."""

from __future__ import annotations

import math

import numpy as np
import pytest

from edge_runtime.contract.errors import ConfigError
from edge_runtime.simulation.bootstrap import Bootstrap
from edge_runtime.simulation.calibration import weighted_quantiles
from edge_runtime.simulation.records import PolicyRun
from edge_runtime.simulation.scores import PolicyScore, score
from tests.support.simulation import policy_run, result_of


def _cell(*own: PolicyRun, traces: tuple[str, ...] = ("a", "b")) -> dict[str, PolicyScore]:
    """LocalOnly right in .6, the bounds in .8 with nothing uploaded, and other runs."""
    runs = [policy_run("LocalOnly", trace, right=0.6) for trace in traces]
    for bound in ("Oracle", "Oracle:net", "Oracle:saver"):
        runs += [policy_run(bound, trace, right=0.8) for trace in traces]
    return score(result_of([*runs, *own]))


def test_gain_is_the_share_of_what_the_oracle_wins_over_the_device() -> None:
    own = [policy_run("P", trace, right=0.75) for trace in "ab"]
    scores = _cell(*own)
    assert scores["P"].gain_capture.mean == pytest.approx(0.75)
    assert scores["LocalOnly"].gain_capture.mean == 0.0
    assert scores["Oracle"].gain_capture.mean == pytest.approx(1.0)
    assert scores["P"].gain_capture.ci95 == pytest.approx((0.75, 0.75))


def test_net_gain_takes_the_price_of_bytes_and_joules() -> None:
    own = [policy_run("P", trace, right=0.8, kilobytes=200.0, joules=5.0) for trace in "ab"]
    found = _cell(*own)["P"]
    # 0.2 gained less 0.2 MB * 0.05 and 5 J * 0.002; at the saver's prices less 0.1 and 0.05.
    assert found.net_utility == pytest.approx(0.8 - 0.01 - 0.01)
    assert found.net_gain_capture.mean == pytest.approx(0.18 / 0.2)
    assert found.net_gain_capture_saver.mean == pytest.approx(0.05 / 0.2)
    assert found.kb_per_request == pytest.approx(200.0)
    assert found.wasted_kb_per_request == pytest.approx(20.0)
    assert found.joules_per_request == pytest.approx(5.0)


def test_a_trace_weighs_the_same_however_many_requests_it_had() -> None:
    own = [
        policy_run("P", "a", right=1.0, requests=1000, latency_ms=10.0),
        policy_run("P", "b", right=0.0, requests=10, latency_ms=30.0),
    ]
    found = _cell(*own)["P"]
    assert found.accuracy_in_deadline == pytest.approx(0.5)
    assert found.mean_ms == pytest.approx(20.0)
    assert found.p95_ms == 30.0
    assert found.requests == 1010


def test_seeds_of_a_trace_are_one_trace() -> None:
    own = [
        policy_run("P", "a", right=1.0, seed=0), policy_run("P", "a", right=0.0, seed=1),
        policy_run("P", "b", right=0.5, seed=0),
    ]  # fmt: skip
    assert _cell(*own)["P"].accuracy_in_deadline == pytest.approx(0.5)


def test_where_nothing_can_be_gained_there_is_no_share_and_no_effect() -> None:
    dead = [
        policy_run(name, "dead", group="3G", right=right)
        for name, right in {
            "LocalOnly": 0.6, "Oracle": 0.6, "Oracle:net": 0.6, "Oracle:saver": 0.6, "P": 0.599,
        }.items()
    ]  # fmt: skip
    found = _cell(policy_run("P", "a", right=0.8), policy_run("P", "b", right=0.8), *dead)["P"]
    assert found.gain_capture.mean == pytest.approx((0.2 + 0.2 - 0.001) / 0.4)
    assert found.by_class["3G"].gain_capture is None
    assert found.by_class["LTE"].gain_capture == pytest.approx(1.0)
    assert (found.by_class["3G"].traces, found.by_class["LTE"].traces) == (1, 2)
    low, high = found.gain_capture.ci95 or (0.0, 0.0)
    assert 0.9 < low <= high <= 1.0 + 1e-9


def test_without_the_bounds_a_gain_is_undefined() -> None:
    found = score(result_of([policy_run("P", "a", right=0.7)]))["P"]
    assert found.gain_capture.mean is None
    assert found.net_gain_capture.mean is None
    assert found.ci95["accuracy_in_deadline"] is None
    assert found.accuracy_in_deadline == pytest.approx(0.7)


def test_a_missing_answer_is_a_miss_and_no_latency() -> None:
    own = [
        policy_run("P", "a", right=0.0, latency_ms=math.inf),
        policy_run("P", "b", right=0.8, latency_ms=50.0),
    ]
    found = _cell(*own)["P"]
    assert found.miss_rate == pytest.approx(0.5)
    assert found.mean_ms == pytest.approx(50.0)
    assert found.p95_ms is None
    assert found.unanswered == 4
    assert found.ci95["mean_ms"] is None


def test_an_answer_at_the_deadline_is_in_time() -> None:
    own = [policy_run("P", trace, right=0.8, latency_ms=400.0 + 1e-8) for trace in "ab"]
    assert _cell(*own)["P"].miss_rate == 0.0


def test_calibration_is_scored_where_something_was_predicted() -> None:
    own = [
        policy_run(
            "P", trace, right=0.8, p_cloud=[0.95, 0.95, 0.25, math.nan],
            cloud_in_time=[True, False, False, True],
        )
        for trace in "ab"
    ]  # fmt: skip
    found = _cell(*own)["P"]
    assert found.brier == pytest.approx((0.05**2 + 0.95**2 + 0.25**2) / 3)
    bins = {bin_.low: bin_ for bin_ in found.reliability if bin_.n}
    assert (bins[0.9].n, bins[0.9].predicted, bins[0.9].observed) == (4, pytest.approx(0.95), 0.5)
    assert (bins[0.2].n, bins[0.2].observed) == (2, 0.0)
    assert sum(bin_.n for bin_ in found.reliability) == 6
    assert _cell()["LocalOnly"].brier is None


def test_the_decision_time_is_a_high_percentile() -> None:
    found = _cell(policy_run("P", "a", right=0.7, requests=1000),
                  policy_run("P", "b", right=0.7, requests=1000))["P"]  # fmt: skip
    assert found.decision_us == pytest.approx(990, abs=2)
    assert found.decision_p50_us == pytest.approx(500, abs=2)


def test_a_missing_or_repeated_run_is_refused() -> None:
    run = policy_run("P", "a", right=0.7)
    with pytest.raises(ConfigError, match="policy P ran twice on a, seed 0"):
        score(result_of([run, run]))
    with pytest.raises(ConfigError, match="policy Q has no request on trace b"):
        score(result_of([run, policy_run("P", "b", right=0.7), policy_run("Q", "a", right=0.7)]))


def test_intervals_are_of_traces_and_repeat() -> None:
    rng = np.random.default_rng(5)
    values = rng.normal(10.0, 2.0, 64)
    first, again = (Bootstrap(64, seed=3).mean(values) for _ in range(2))
    assert first == again
    assert first.ci95 is not None
    low, high = first.ci95
    # The interval of a mean of n is about 2 * 1.96 standard errors wide.
    expected = 2 * 1.96 * values.std() / 8
    assert low < first.mean < high  # type: ignore[operator]
    assert high - low == pytest.approx(expected, rel=0.1)
    assert Bootstrap(64, seed=4).mean(values).ci95 != first.ci95


def test_a_comparison_is_paired() -> None:
    """Traces differ wildly, the policy is always halfway: the interval has no width."""
    local = np.linspace(0.1, 0.7, 20)
    bound = local + np.linspace(0.01, 0.3, 20)
    found = Bootstrap(20).capture((local + bound) / 2, local, bound, least=1e-3)
    assert found.mean == pytest.approx(0.5)
    assert found.ci95 == pytest.approx((0.5, 0.5))


def test_an_interval_that_is_often_undefined_is_not_stated() -> None:
    local = np.zeros(3)
    bound = np.array([0.3, 0.0, 0.0])  # 8 of 27 draws have nothing to gain
    assert Bootstrap(3).capture(local, local, bound, least=1e-3).ci95 is None
    assert Bootstrap(1).mean(np.array([0.5])).ci95 is None


def test_a_weighted_quantile_takes_the_first_value_that_reaches_its_share() -> None:
    values, weights = np.array([3.0, 1.0, 2.0]), np.array([0.2, 0.5, 0.3])
    assert weighted_quantiles(values, weights, (0.0, 0.5, 0.51, 0.8, 0.81, 1.0)).tolist() == [
        1.0, 1.0, 2.0, 2.0, 3.0, 3.0,
    ]  # fmt: skip
