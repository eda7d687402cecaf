"""Estimators are pure, age as their equations say, and never leave their bounds."""

from __future__ import annotations

import math

import msgspec
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from edge_runtime.contract.wire import ServerTiming
from edge_runtime.estimators import CloudEstimator, LinkEstimator, LocalEstimator, RttEstimator
from edge_runtime.estimators.arrivals import ArrivalEstimator
from edge_runtime.estimators.baselines import FEATURES, BaselineMemory
from edge_runtime.estimators.energy import RADIO_POWER, radio_power
from edge_runtime.estimators.link import LINK_PRIORS
from edge_runtime.estimators.path import PathEstimator
from edge_runtime.estimators.rtt import RTT_PRIORS_MS
from edge_runtime.estimators.transfer import (
    INITIAL_WINDOW_BYTES,
    required_rate,
    upload_ms,
    window_limited,
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
    widest = max(state.long_run_variance, LinkEstimator.prior(link_type).variance)
    assert 0 < belief.log_rate_deviation <= math.sqrt(widest + state.noise_variance) + 1e-9
    assert 0 <= belief.outage <= 1
    assert 0 <= belief.fresh_share <= 1
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
    assert state.at(100.0).median_rate == pytest.approx(2e6, rel=0.1)
    assert state.at(160.0).log_rate_mean == pytest.approx(state.long_run_mean, abs=1e-3)


@given(rate=rates, bound=rates, pause=st.floats(0, 20))
def test_a_cut_off_upload_never_raises_the_belief(rate: float, bound: float, pause: float) -> None:
    state = LinkEstimator.prior("lte").observe(rate, 0.0)
    before = state.at(pause)
    after = state.observe_at_most(bound, pause).at(pause)
    assert after.log_rate_mean <= before.log_rate_mean + 1e-9
    assert after.outage >= before.outage - 1e-9
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
    """Exactly where no slow start hides it; never past it where one does."""
    prior = LinkEstimator.prior("unknown")
    gain = prior.variance / (prior.variance + prior.noise_variance)
    open_ = 1e8
    recv_ms = upload_ms(wire_bytes(body), rate, rtt, open_)
    assume(recv_ms >= 1)
    plain = prior.observe_upload(body, recv_ms, rtt, 0.0, window_bytes=open_)
    assert prior.mean + (plain.mean - prior.mean) / gain == pytest.approx(math.log(rate), rel=1e-6)
    recv_ms = upload_ms(wire_bytes(body), rate, rtt)
    hidden = prior.observe_upload(body, recv_ms, rtt, 0.0)
    needed = required_rate(wire_bytes(body), recv_ms, rtt)
    assume(needed < math.inf)
    low, high = sorted((prior.mean, math.log(needed)))
    assert low - 1e-9 <= hidden.mean <= high + 1e-9
    assert hidden.variance <= prior.variance


def test_a_fast_link_behind_slow_start_is_not_taken_for_a_slow_one() -> None:
    """Four rounds of slow start take 170 ms whatever the link does beyond 1 MB/s."""
    body, rate, nodes = 110_000, 8e6, (45.0, 50.0, 55.0, 60.0, 70.0)
    recv_ms = upload_ms(wire_bytes(body), rate, 55.0)
    prior = LinkEstimator.prior("lte")
    told = prior.observe_upload(body, recv_ms, 55.0, 0.0, rtt_nodes_ms=nodes)
    plain = prior.observe(1e3 * wire_bytes(body) / recv_ms, 0.0)
    assert told.mean > plain.mean + 0.3
    assert told.variance > 2 * plain.variance
    short = prior.observe_upload(body, 60.0, 55.0, 0.0, rtt_nodes_ms=nodes)
    assert short.mean > prior.mean


def test_fades_move_the_long_run_less_than_a_change_of_place() -> None:
    state = LinkEstimator.prior("lte")
    for second in range(0, 60, 3):
        state = state.observe(4e6, float(second))
    usual = state.long_run_mean
    for second in range(60, 90, 3):
        state = state.observe(4e6 if second % 2 else 4e5, float(second))
    assert usual - state.long_run_mean < 0.5 * math.log(10)


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


# Links that go away -----------------------------------------------------------------------


def _known_link(rate: float = 2e6) -> LinkEstimator:
    state = LinkEstimator.prior("lte")
    for second in range(12):
        state = state.observe(rate, float(second))
    return state


def test_a_sample_far_below_the_long_run_is_an_outage_and_no_rate() -> None:
    before = _known_link()
    after = before.observe(2e3, 12.0)
    assert after.at(12.0).outage == 0.98
    assert after.at(12.0).median_rate == pytest.approx(before.at(12.0).median_rate)
    assert after.at(16.0).outage == pytest.approx(
        after.outage_share + (0.98 - after.outage_share) * math.exp(-1)
    )
    assert after.observe(2e6, 13.0).at(13.0).outage == 0.0


def test_something_small_that_passed_ends_an_outage_and_teaches_no_rate() -> None:
    gone = _known_link().observe(2e3, 12.0)
    back = gone.observe_alive(13.0)
    assert back.at(13.0).outage < 0.1
    assert back.at(13.0).log_rate_mean == pytest.approx(gone.at(13.0).log_rate_mean)
    calm = _known_link()
    assert calm.observe_alive(11.0) == calm


def test_a_missed_upload_is_an_outage_as_far_as_the_link_does_not_explain_it() -> None:
    steady = _known_link(2e6)
    unlikely = steady.observe_at_most(6e5, 12.0).at(12.0).outage
    likely = steady.observe_at_most(3e6, 12.0).at(12.0).outage
    assert likely < 0.05 < unlikely


@settings(max_examples=20)
@given(bounds=st.lists(rates, min_size=1, max_size=30))
def test_misses_alone_never_raise_the_long_run(bounds: list[float]) -> None:
    state = LinkEstimator.prior("wifi")
    for second, bound in enumerate(bounds):
        before = state.long_run_mean
        state = state.observe_at_most(bound, float(second))
        assert state.long_run_mean <= before + 1e-9
        assert 0 <= state.at(float(second)).outage <= 1


@settings(max_examples=20)
@given(rate=rates, bound=rates)
def test_a_window_that_was_the_limit_never_lowers_the_belief(rate: float, bound: float) -> None:
    state = LinkEstimator.prior("lte").observe(rate, 0.0)
    after = state.observe_at_least(bound, 1.0)
    assert after.at(1.0).log_rate_mean >= state.at(1.0).log_rate_mean - 1e-9
    assert state.observe_at_least(math.inf, 1.0) == state.observe_at_least(0.0, 1.0) == state


def test_the_end_of_a_slow_start_round_is_recognized() -> None:
    assert window_limited(14600)
    assert window_limited(3 * 14600)
    assert not window_limited(2 * 14600)
    assert not window_limited(5000)


# The whole path ---------------------------------------------------------------------------


def test_progress_is_a_sample_where_the_link_and_a_bound_where_the_window_is_the_limit() -> None:
    path = PathEstimator.prior("lte").pinged(50.0, 0.0)
    limited = path.progressed(20_000, 250.0, body_bytes=110_000, window_bytes=14_600.0, now_s=1.0)
    assert limited.link.samples == 1
    assert limited.link.at(1.0).median_rate == pytest.approx(1e5, rel=0.5)
    waiting = path.progressed(14_600, 99.0, body_bytes=110_000, window_bytes=14_600.0, now_s=1.0)
    assert waiting.link.samples == 0
    assert waiting.link.mean >= path.link.mean
    unheard = path.progressed(0, 900.0, body_bytes=110_000, window_bytes=14_600.0, now_s=1.0)
    assert unheard.link.at(1.0).median_rate < path.link.at(1.0).median_rate
    assert path.progressed(0, 40.0, body_bytes=1, window_bytes=14_600.0, now_s=1.0) == path


def test_small_requests_do_not_keep_tcps_window() -> None:
    timing = ServerTiming(recv_ms=120, queue_ms=2, inference_ms=10)
    path = PathEstimator.prior("lte").answered(
        110_000, timing, 190.0, window_bytes=14_600.0, now_s=5.0
    )
    assert path.window(5.5) == 14_600 + 110_000
    assert path.pinged(60.0, 6.9).window(7.0) == INITIAL_WINDOW_BYTES
    assert path.rtt.srtt_ms == pytest.approx(190 - 132)


def test_the_first_round_trips_are_not_drawn_to_the_worst_of_the_prior() -> None:
    state = RttEstimator.prior("lte")
    assert state.nodes_ms == tuple(sorted(state.nodes_ms))
    assert state.observe(60.0).nodes_ms[2] == 60.0
    assert state.observe(60.0).nodes_ms[3] <= 1.35 * 60.0


def test_the_last_round_trip_counts_where_it_tells_something_of_the_next() -> None:
    steady, restless = RttEstimator.prior("lte"), RttEstimator.prior("lte")
    for value in (*[50.0] * 6, *[52.0] * 5, 200.0, 210.0, 205.0, 215.0, 220.0):
        steady = steady.observe(value)
    for value in (50.0, 220.0) * 8:
        restless = restless.observe(value)
    assert steady.nodes_ms[2] >= 200.0
    assert restless.nodes_ms[0] == 50.0
    assert restless.nodes_ms[-1] == 220.0


def test_a_cut_upload_leaves_the_window_it_has_opened() -> None:
    path = PathEstimator.prior("lte").cut(40_000.0, window_bytes=14_600.0, now_s=3.0)
    assert path.window(3.5) == 54_600.0
    assert path.window(9.0) == INITIAL_WINDOW_BYTES
    assert path.cut(0.0, window_bytes=14_600.0, now_s=4.0) == path


def test_a_ping_that_waited_out_an_outage_is_no_round_trip() -> None:
    path = PathEstimator.prior("lte").pinged(50.0, 0.0).pinged(3000.0, 5.0)
    assert path.rtt.srtt_ms == pytest.approx(0.875 * 50 + 0.125 * 150)


def test_a_path_survives_serialization() -> None:
    timing = ServerTiming(recv_ms=120, queue_ms=2, inference_ms=10)
    path = PathEstimator.prior("5g").answered(
        110_000, timing, 190.0, window_bytes=14_600.0, now_s=5.0
    )
    again = msgspec.json.decode(msgspec.json.encode(path), type=PathEstimator)
    assert again == path


@settings(max_examples=20)
@given(samples=st.lists(st.floats(1, 3000), min_size=20, max_size=60))
def test_round_trip_nodes_are_ordered_samples(samples: list[float]) -> None:
    state = RttEstimator.prior("lte")
    for sample in samples:
        state = state.observe(sample)
    assert list(state.nodes_ms) == sorted(state.nodes_ms)
    assert set(state.nodes_ms) <= set(samples[-16:])


# Rhythm, energy, memory -------------------------------------------------------------------


@settings(max_examples=20)
@given(gaps=st.lists(st.floats(0.01, 500), max_size=40), x=st.floats(0, 600), y=st.floats(0, 600))
def test_the_rhythm_is_a_distribution(gaps: list[float], x: float, y: float) -> None:
    state = ArrivalEstimator()
    now = 0.0
    for gap in gaps:
        now += gap
        state = state.observe(now)
    low, high = sorted((x, y))
    assert 0 <= state.within(low) <= state.within(high) <= 1
    grown = state.expected_within(high) - state.expected_within(low)
    # the integral of the survival function over [low, high]
    assert (1 - state.within(high)) * (high - low) - 1e-6 <= grown
    assert grown <= (1 - state.within(low)) * (high - low) + 1e-6


def test_a_burst_and_a_pause_are_both_learned() -> None:
    state, now = ArrivalEstimator(), 0.0
    for _ in range(30):
        for _ in range(4):
            now += 0.3
            state = state.observe(now)
        now += 60.0
        state = state.observe(now)
    assert 0.6 < state.within(1.0) < 0.85
    assert state.within(30.0) - state.within(1.0) < 0.1


def test_radio_energy_is_that_of_the_table() -> None:
    lte = radio_power("lte")
    assert lte.tail_joules(1e9) == pytest.approx(11.576 * 1.060)
    assert lte.tail_joules(2.0) == pytest.approx(2.12)
    assert lte.transfer_joules(125_000, 0.5) == pytest.approx(0.43839 + 0.64402)
    umts = RADIO_POWER["3g"]
    assert umts.tail_s == pytest.approx(8.912)
    assert umts.tail_joules(8.5) == pytest.approx(8.088 * 0.8039 + 0.412 * 0.6013)
    assert radio_power("carrier-pigeon") == lte


@settings(max_examples=20)
@given(
    contexts=st.lists(
        st.tuples(*(st.floats(-3, 3) for _ in range(FEATURES))), min_size=1, max_size=12
    )
)
def test_the_bandits_inverse_is_the_inverse(contexts: list[tuple[float, ...]]) -> None:
    memory = BaselineMemory()
    design = np.eye(FEATURES)
    for context in contexts:
        memory = memory.uploaded(1e5, 200.0, 180.0, context, in_time=True)
        design += np.outer(context, context)
    inverse = np.array(memory.inverse).reshape(FEATURES, FEATURES)
    assert inverse @ design == pytest.approx(np.eye(FEATURES), abs=1e-6)


def test_the_harmonic_rate_is_discounted_by_its_worst_error() -> None:
    memory = BaselineMemory()
    assert memory.harmonic_rate() is None
    for size in (1e5, 2e5):
        memory = memory.uploaded(size, 1000.0, None, (), in_time=True)
    mean = 2 / (1 / 1e5 + 1 / 2e5)
    assert memory.harmonic_rate() == pytest.approx(mean / 1.5)
    assert memory.ewma_rate == pytest.approx(0.7 * 1e5 + 0.3 * 2e5)


# A stall and its end ----------------------------------------------------------------------


def test_a_first_round_trip_through_a_stall_is_not_believed_whole() -> None:
    path = PathEstimator.prior("lte").pinged(2147.0, 0.0)
    assert path.rtt.srtt_ms == 3 * RTT_PRIORS_MS["lte"]


def test_a_slow_round_trip_fades_in_silence_and_a_fast_one_stays() -> None:
    prior_ms = RTT_PRIORS_MS["lte"]
    slow = PathEstimator.prior("lte").pinged(300.0, 0.0)
    assert slow.round_trip(5.0) == slow.rtt, "seconds old, it holds"
    later = [slow.round_trip(float(at_s)).srtt_ms for at_s in range(5, 120)]
    assert later == sorted(later, reverse=True)
    assert later[-1] == pytest.approx(prior_ms, rel=0.02)
    assert max(slow.round_trip(120.0).nodes_ms) < 3 * prior_ms
    fast = PathEstimator.prior("lte").pinged(20.0, 0.0)
    assert fast.round_trip(600.0) == fast.rtt


def test_after_silence_one_good_round_trip_ends_the_belief_in_a_stall() -> None:
    path = PathEstimator.prior("lte")
    for number in range(10):
        path = path.pinged(2000.0, number / 10)
    assert path.rtt.srtt_ms > 500
    path = path.pinged(50.0, 60.0)
    assert path.rtt.srtt_ms < 100
    assert sorted(path.round_trip(60.0).nodes_ms)[2] < 150


@given(
    st.lists(st.floats(0, 1e5), min_size=1, max_size=30),
    st.floats(0, 1e6),
    st.sampled_from(sorted(RTT_PRIORS_MS)),
)
def test_silence_never_makes_a_round_trip_longer(
    samples: list[float], age_s: float, link_type: str
) -> None:
    path = PathEstimator.prior(link_type)
    for sample in samples:
        path = path.pinged(sample, 0.0)
    now, later = path.rtt, path.round_trip(age_s)
    assert later.srtt_ms <= now.srtt_ms * (1 + 1e-9)
    assert all(b <= a * (1 + 1e-9) for a, b in zip(now.nodes_ms, later.nodes_ms, strict=True))


@pytest.mark.parametrize("usual_ms", [8.0, 30.0, 240.0])
def test_what_is_assumed_of_round_trips_moves_to_those_that_were_measured(usual_ms: float) -> None:
    state = RttEstimator.prior("lte")  # 60 ms
    for _ in range(6):
        state = state.observe(usual_ms)
    spread = (2.2, 0.6, 1.35, 0.8, 1.0)
    scale_ms = (60.0 * usual_ms**6) ** (1 / 7)
    assert state.recent_ms == pytest.approx(
        (*(factor * scale_ms for factor in spread), *([usual_ms] * 6))
    )
    assert state.nodes_ms[2] == pytest.approx(usual_ms, rel=0.1)


def test_what_is_assumed_of_round_trips_goes_first() -> None:
    state = RttEstimator.prior("wifi")
    for rtt_ms in range(1, 21):
        state = state.observe(float(rtt_ms))
    assert (state.assumed, state.recent_ms) == (0, tuple(float(ms) for ms in range(5, 21)))
    assert state.observe(3.0).recent_ms[:-1] == state.recent_ms[1:]
