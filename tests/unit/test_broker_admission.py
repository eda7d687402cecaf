"""Admission: predicted from headers, refused with the reason that helps."""

import math

import pytest

from broker.scheduling.admission import Margin, UploadRate, forecast, refusal, wants_probe
from broker.scheduling.latency import LatencyModel
from edge_runtime.contract.errors import DeadlineExceeded, Overloaded


@pytest.fixture
def latency() -> LatencyModel:
    """T(1) = 10 ms, T(4) = 16 ms."""
    model = LatencyModel()
    model.observe(1, 10.0, now_s=0.0)
    model.observe(4, 16.0, now_s=0.0)
    return model


def predict(latency: LatencyModel, **changes: float):
    values = {"ahead": 0, "others_ms": 0.0, "residual_ms": 0.0, "upload_ms": 0.0, "max_batch": 4}
    return forecast(latency, **(values | changes))  # type: ignore[arg-type]


def test_a_deadline_that_no_broker_could_keep_is_named_as_such(latency: LatencyModel):
    error = refusal(predict(latency), left_ms=9.0)
    assert isinstance(error, DeadlineExceeded)
    assert "about 10 ms and 9 ms are left" in error.detail


def test_a_deadline_that_only_the_queue_breaks_is_overload(latency: LatencyModel):
    error = refusal(predict(latency, residual_ms=50.0), left_ms=30.0)
    assert isinstance(error, Overloaded)
    assert error.retryable


def test_a_worker_that_is_down_for_unknown_time_is_overload(latency: LatencyModel):
    error = refusal(predict(latency, residual_ms=math.inf), left_ms=600_000.0)
    assert isinstance(error, Overloaded)
    assert "inf" not in error.detail


def test_on_an_idle_broker_the_average_run_decides():
    latency = LatencyModel()
    for duration_ms in (10.0, 10.0, 90.0, 90.0, 10.0, 10.0, 10.0, 10.0, 10.0, 10.0):
        latency.observe(1, duration_ms, now_s=0.0)
    assert latency.high_ms(1) == 90.0
    assert refusal(predict(latency), left_ms=40.0, margin_ms=30.0) is None
    assert isinstance(refusal(predict(latency, residual_ms=1.0), left_ms=40.0), Overloaded)


def test_the_margin_counts_as_soon_as_somebody_is_before(latency: LatencyModel):
    waiting = predict(latency, residual_ms=10.0)
    assert refusal(waiting, left_ms=25.0, margin_ms=5.0) is None
    assert isinstance(refusal(waiting, left_ms=25.0, margin_ms=5.1), Overloaded)


def test_the_margin_is_what_2_of_100_answers_exceed():
    margin = Margin()
    assert margin.for_deadline(200.0, 10.0) == 0.0
    for late_ms in range(100):
        margin.observe(200.0, error_ms=late_ms)
    assert margin.for_deadline(200.0, 10.0) == 97.0
    for _ in range(1100):  # what is long past says nothing any more
        margin.observe(200.0, error_ms=-5.0)
    assert margin.for_deadline(200.0, 10.0) == 0.0


def test_a_fault_that_has_passed_leaves_room_for_two_full_batches():
    margin = Margin()
    for _ in range(50):
        margin.observe(200.0, error_ms=math.inf)
    assert margin.for_deadline(200.0, 60.0) == 80.0
    assert margin.for_deadline(200.0, 90.0) == 50.0  # there is none: it keeps a quarter


def test_an_answer_that_never_came_counts_no_more_than_its_deadline():
    margin = Margin()
    margin.observe(200.0, error_ms=math.inf)
    assert margin.for_deadline(200.0, 10.0) == 100.0


def test_whoever_is_over_a_fair_share_waits_behind_its_own(latency: LatencyModel):
    assert predict(latency, fair_ms=15.9).wait_ms == 0.0  # it shares the next batch
    over = predict(latency, ahead=1, fair_ms=40.0)
    assert over.wait_ms == 2 * 16.0
    assert over.batch_ms == latency.high_ms(3)
    assert predict(latency, ahead=12, fair_ms=40.0).wait_ms == 3 * 16.0


def test_the_next_batch_is_taken_for_as_large_as_the_one_that_runs(latency: LatencyModel):
    assert predict(latency, residual_ms=5.0, recent_batch=4).batch_ms == latency.high_ms(4)
    assert predict(latency, residual_ms=5.0, recent_batch=9).batch_ms == latency.high_ms(4)


def test_the_margin_of_long_deadlines_does_not_shut_out_short_ones():
    margin = Margin()
    for _ in range(1000):
        margin.observe(3000.0, error_ms=math.inf)
    assert margin.for_deadline(3000.0, 16.0) == 1500.0  # never more than half
    assert margin.for_deadline(600.0, 16.0) == 0.0


def test_what_fits_exactly_is_admitted(latency: LatencyModel):
    assert refusal(predict(latency, residual_ms=20.0), left_ms=30.0) is None


def test_upload_and_wait_overlap(latency: LatencyModel):
    assert predict(latency, residual_ms=40.0, upload_ms=30.0).finish_ms == 50.0
    assert predict(latency, residual_ms=20.0, upload_ms=30.0).finish_ms == 40.0


def test_full_batches_ahead_run_first_and_the_rest_shares_its_batch(latency: LatencyModel):
    predicted = predict(latency, ahead=9)
    assert predicted.wait_ms == 2 * 16.0
    assert predicted.batch_ms == latency.high_ms(2)


def test_other_models_on_the_executor_add_their_work(latency: LatencyModel):
    assert predict(latency, others_ms=7.0, residual_ms=5.0).wait_ms == 12.0


def test_old_knowledge_wants_a_probe_and_fresh_does_not(latency: LatencyModel):
    assert not wants_probe(latency, now_s=1.0)
    assert wants_probe(latency, now_s=1.1)


def test_the_fastest_recent_upload_of_a_connection_sets_its_rate():
    rate = UploadRate()
    assert rate.expected_ms(1_000_000, now_s=0.0) == 0.0
    rate.observe(100_000, 60_000.0, now_s=1.0)
    rate.observe(100_000, 10.0, now_s=2.0)
    rate.observe(100_000, 500.0, now_s=3.0)
    assert rate.expected_ms(200_000, now_s=4.0) == pytest.approx(20.0)


def test_a_link_that_was_slow_is_not_taken_for_slow_forever():
    rate = UploadRate()
    rate.observe(100_000, 60_000.0, now_s=1.0)
    assert rate.expected_ms(100_000, now_s=2.0) == pytest.approx(60_000.0)
    assert rate.expected_ms(100_000, now_s=2.1) == 0.0


def test_tiny_bodies_say_nothing_about_the_upload_rate():
    rate = UploadRate()
    rate.observe(100, 5.0, now_s=1.0)
    assert rate.expected_ms(1_000_000, now_s=1.0) == 0.0
