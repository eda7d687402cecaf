"""Estimators are pure, age as their equations say, and never leave their bounds."""

from __future__ import annotations

import math

import msgspec
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from edge_runtime.contract.wire import ServerTiming
from edge_runtime.estimators import CloudEstimator, LinkEstimator, LocalEstimator, RttEstimator
from edge_runtime.estimators.link import LINK_PRIORS
from edge_runtime.estimators.rtt import RTT_PRIORS_MS
from edge_runtime.estimators.transfer import (
    INITIAL_WINDOW_BYTES,
    required_rate,
    upload_ms,
    wire_bytes,
)

rates = st.floats(1e3, 1e9)
sizes = st.floats(1, 1e7)
rtts = st.floats(0.1, 2000)
windows = st.floats(1460, 1e6)
times = st.floats(0, 1e6)


@given(size=sizes, rate=rates, rtt=rtts, window=windows)
def test_required_rate_inverts_upload_time(
    size: float, rate: float, rtt: float, window: float
) -> None:
    budget = upload_ms(size, rate, rtt, window)
    needed = required_rate(size, budget, rtt, window)
    assume(needed < math.inf)  # rounding may eat the last byte of a whole window
    assert needed <= rate * (1 + 1e-6)
    assert upload_ms(size, needed * (1 + 1e-9), rtt, window) <= budget * (1 + 1e-6)


@given(size=sizes, rtt=rtts, window=windows, rate=rates, faster=st.floats(1, 100))
def test_a_faster_link_never_uploads_later(
    size: float, rtt: float, window: float, rate: float, faster: float
) -> None:
    assert upload_ms(size, rate * faster, rtt, window) <= upload_ms(size, rate, rtt, window)


@given(size=sizes, rate=rates, rtt=rtts, window=windows)
def test_upload_time_is_that_of_rounds_counted_one_by_one(
    size: float, rate: float, rtt: float, window: float
) -> None:
    left, total, step = size, 0.0, window
    while left > step:
        total += max(1000 * step / rate, rtt)
        left -= step
        step *= 2
    total += 1000 * left / rate
    assert upload_ms(size, rate, rtt, window) == pytest.approx(total, rel=1e-9)


def test_a_dead_link_uploads_nothing() -> None:
    assert upload_ms(1000, 0, 10) == math.inf
    assert required_rate(1000, 0, 10) == math.inf
    assert upload_ms(0, 1e6, 10) == 0


@given(
    link_type=st.sampled_from([*LINK_PRIORS, "carrier-pigeon"]),
    samples=st.lists(st.tuples(rates, st.floats(0, 100)), max_size=20),
    later=times,
)
def test_the_link_belief_stays_between_its_prior_and_what_was_seen(
    link_type: str, samples: list[tuple[float, float]], later: float
) -> None:
    state = LinkEstimator.prior(link_type)
    seen = [state.mean]
    now = 0.0
    for rate, pause in samples:
        now += pause
        state = state.observe(rate, now)
        seen.append(math.log(rate))
    belief = state.at(now + later)
    assert min(seen) - 1e-9 <= belief.log_rate_mean <= max(seen) + 1e-9
    assert 0 < belief.log_rate_deviation <= math.sqrt(state.long_run_variance) + 1e-9
    assert state.samples == len(samples)


@given(rate=rates, one=st.floats(0, 30), two=st.floats(0, 30))
def test_ageing_in_two_steps_is_ageing_in_one(rate: float, one: float, two: float) -> None:
    state = LinkEstimator.prior("lte").observe(rate, 0.0)
    keep = math.exp(-(one + two) / state.tau_s)
    belief = state.at(one + two)
    mean = state.long_run_mean + (state.mean - state.long_run_mean) * keep
    assert belief.log_rate_mean == pytest.approx(mean)
    assert belief.log_rate_deviation >= state.at(one).log_rate_deviation - 1e-12


def test_a_fresh_sample_outweighs_the_prior_and_an_old_one_does_not() -> None:
    state = LinkEstimator.prior("lte").observe(2e6, 100.0)
    assert state.at(100.0).median_rate == pytest.approx(2e6, rel=0.05)
    assert state.at(160.0).log_rate_mean == pytest.approx(state.long_run_mean, abs=1e-3)


@given(rate=rates, bound=rates, pause=st.floats(0, 20))
def test_a_cut_off_upload_never_raises_the_belief(rate: float, bound: float, pause: float) -> None:
    state = LinkEstimator.prior("lte").observe(rate, 0.0)
    before = state.at(pause)
    after = state.observe_at_most(bound, pause).at(pause)
    assert after.log_rate_mean <= before.log_rate_mean + 1e-9
    assert after.log_rate_deviation <= before.log_rate_deviation + 1e-9


def test_cut_off_uploads_far_below_the_belief_move_it_there() -> None:
    state = LinkEstimator.prior("lte")
    for second in range(5):
        state = state.observe_at_most(1e4, float(second))
    assert state.at(5.0).median_rate < 1e5
    unmoved = LinkEstimator.prior("lte")
    assert unmoved.observe_at_most(1e9, 0.0).mean == pytest.approx(unmoved.mean, abs=1e-3)
    assert unmoved.observe_at_most(math.inf, 0.0) == unmoved
    assert unmoved.observe_at_most(0.0, 0.0) == unmoved


@given(body=st.integers(20_000, 500_000), rate=st.floats(2e4, 2e6), rtt=st.floats(5, 300))
def test_a_receive_time_is_inverted_to_the_rate_that_made_it(
    body: int, rate: float, rtt: float
) -> None:
    size = wire_bytes(body)
    recv_ms = upload_ms(size, rate, rtt)
    assume(recv_ms >= 1)
    estimate = LinkEstimator.prior("unknown").observe_upload(body, recv_ms, rtt, 0.0)
    plain = 1000 * size / recv_ms
    # Where slow start hides the rate, the quotient of bytes and time stands in for it.
    if 1.05 * rate < 4 * plain and required_rate(size, recv_ms, rtt) >= 0.99 * rate:
        assert math.exp(estimate.mean) == pytest.approx(rate, rel=0.1)
    else:
        assert plain * 0.9 <= math.exp(estimate.mean) <= 4.1 * plain


def test_bodies_too_small_to_measure_teach_nothing() -> None:
    state = LinkEstimator.prior()
    assert state.observe_upload(1000, 3.0, 20.0, 0.0) == state
    assert state.observe_upload(10**6, math.nan, 20.0, 0.0) == state


@given(samples=st.lists(st.floats(0, 5000), min_size=1, max_size=50))
def test_rtt_follows_rfc_6298(samples: list[float]) -> None:
    state = RttEstimator.prior("lte")
    assert state.srtt_ms == RTT_PRIORS_MS["lte"]
    srtt = rttvar = 0.0
    for number, sample in enumerate(samples):
        state = state.observe(sample)
        if number == 0:
            srtt, rttvar = sample, sample / 2
        else:
            rttvar = 0.75 * rttvar + 0.25 * abs(srtt - sample)
            srtt = 0.875 * srtt + 0.125 * sample
    assert state.srtt_ms == pytest.approx(srtt)
    assert state.rttvar_ms == pytest.approx(rttvar)
    assert state.rto_ms == pytest.approx(max(1000.0, srtt + max(1.0, 4 * rttvar)))
    assert min(samples) - 1e-6 <= state.srtt_ms <= max(samples) + 1e-6


def test_nonsense_round_trips_are_ignored() -> None:
    state = RttEstimator.prior()
    assert state.observe(-1) == state.observe(math.nan) == state


@given(latencies=st.lists(st.floats(0, 1e4), min_size=1, max_size=200), q=st.floats(0.01, 1))
def test_a_latency_quantile_covers_its_share_of_the_last_64_runs(
    latencies: list[float], q: float
) -> None:
    state = LocalEstimator()
    for latency in latencies:
        state = state.observe(latency)
    kept = latencies[-64:]
    assert list(state.latencies_ms) == kept
    assert LocalEstimator.of(latencies) == state
    value = state.quantile_ms(q)
    assert sum(latency <= value for latency in kept) >= q * len(kept) - 1e-6
    assert value == min(x for x in kept if sum(y <= x for y in kept) >= q * len(kept) - 1e-9)


def test_no_runs_have_no_quantile() -> None:
    assert math.isnan(LocalEstimator().quantile_ms(0.5))


def test_the_brokers_own_queue_prediction_counts_and_fades() -> None:
    state = CloudEstimator().observe(
        ServerTiming(recv_ms=5, queue_ms=2, inference_ms=10), 400.0, 100.0
    )
    assert (state.queue_mean_ms, state.inference_mean_ms, state.samples) == (2, 10, 1)
    assert state.queue_ms(100.0) == pytest.approx(400)
    assert 2 < state.queue_ms(105.0) < 400
    assert state.queue_ms(1000.0) == pytest.approx(2, abs=0.01)


def test_an_answer_without_timing_teaches_nothing() -> None:
    state = CloudEstimator()
    assert state.observe(ServerTiming(), None, 0.0) == state


def test_the_time_of_an_answers_body_is_learned() -> None:
    timing = ServerTiming(recv_ms=5, queue_ms=2, inference_ms=10)
    first = CloudEstimator().observe(timing, None, 1.0, answer_ms=80.0)
    assert first.answer_mean_ms == 80
    assert first.observe(timing, None, 2.0, answer_ms=40.0).answer_mean_ms == 70
    assert first.observe(timing, None, 2.0).answer_mean_ms == 80


def test_states_survive_serialization() -> None:
    state = LinkEstimator.prior("5g").observe(1e6, 3.0)
    again = msgspec.json.decode(msgspec.json.encode(state), type=LinkEstimator)
    assert again == state
    assert INITIAL_WINDOW_BYTES == 14600
