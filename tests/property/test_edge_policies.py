"""Policies are pure, and better conditions never make them upload less."""

from __future__ import annotations

import math

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_runtime.conditions import Conditions
from edge_runtime.contract.errors import ConfigError
from edge_runtime.policies import find_policy, policy_names
from edge_runtime.policies.adaptive import Adaptive, GainPrior
from edge_runtime.policies.base import (
    Action,
    CloudOutlook,
    Decision,
    InferenceMode,
    LinkOutlook,
    LocalOutlook,
    Policy,
    Prices,
    Situation,
)
from edge_runtime.policies.forecast import forecast
from edge_runtime.policies.reasons import REASONS, sentence

links = st.builds(
    LinkOutlook,
    log_rate_mean=st.floats(math.log(1e3), math.log(1e8)),
    log_rate_deviation=st.floats(0, 2),
    rtt_ms=st.floats(0.5, 500),
    rtt_deviation_ms=st.floats(0, 200),
    connection_open=st.booleans(),
    setup_round_trips=st.integers(0, 3),
    window_bytes=st.floats(14600, 1e6),
    in_flight_bytes=st.integers(0, 10**6),
)
clouds = st.builds(
    CloudOutlook,
    queue_ms=st.floats(0, 2000),
    inference_ms=st.floats(0, 500),
    answer_ms=st.floats(0, 500),
    breaker=st.sampled_from(["CLOSED", "OPEN", "HALF_OPEN"]),
    obstacle=st.sampled_from([None, None, "unauthorized"]),
)
conditions = st.builds(
    Conditions,
    link_type=st.sampled_from(["unknown", "wifi", "none"]),
    metered=st.sampled_from([None, True, False]),
    data_saver=st.sampled_from([None, True, False]),
)
situations = st.builds(
    Situation,
    upload_bytes=st.integers(1, 8 * 2**20),
    deadline_ms=st.floats(1, 1e5),
    time_left_ms=st.floats(-100, 1e5),
    local=st.none()
    | st.builds(
        LocalOutlook,
        p50_ms=st.floats(0.1, 1000),
        p95_ms=st.floats(0.1, 2000),
        queue_wait_ms=st.floats(0, 5000),
    ),
    link=links,
    cloud=clouds,
    confidence=st.none() | st.floats(0, 1),
    scored=st.booleans(),
    private=st.booleans(),
    conditions=conditions,
)
BUILT_IN = [find_policy(mode.value) for mode in InferenceMode]


def open_situation(**changes: object) -> Situation:
    """A sound broker on a decent link, asked by a device that has answered with doubt."""
    base = Situation(
        upload_bytes=100_000,
        deadline_ms=400,
        time_left_ms=330,
        local=LocalOutlook(p50_ms=60, p95_ms=75),
        link=LinkOutlook(
            log_rate_mean=math.log(1.5e6),
            log_rate_deviation=0.4,
            rtt_ms=40,
            rtt_deviation_ms=10,
            connection_open=True,
            window_bytes=1e6,
        ),
        cloud=CloudOutlook(queue_ms=3, inference_ms=10),
        confidence=0.4,
    )
    return msgspec.structs.replace(base, **changes)


def uploads(policy: Policy, situation: Situation) -> bool:
    return policy.decide(situation).action is not Action.LOCAL


@pytest.mark.parametrize("policy", BUILT_IN, ids=lambda policy: policy.name)
@given(situation=situations)
def test_a_policy_is_a_pure_total_function(policy: Policy, situation: Situation) -> None:
    decision = policy.decide(situation)
    assert decision == policy.decide(situation)
    assert decision.reason in REASONS or decision.reason == "unauthorized"
    assert sentence(decision.reason)
    assert 0 <= decision.p_cloud_in_deadline <= 1
    assert decision.expected_gain >= 0
    assert decision.price >= 0
    assert decision.local_start_ms >= 0
    again = msgspec.json.decode(msgspec.json.encode(decision), type=Decision)
    assert again == decision


@pytest.mark.parametrize("mode", ["ADAPTIVE", "PREFER_IN_CLOUD"])
@given(situation=situations)
def test_an_obstacle_keeps_everything_on_the_device(mode: str, situation: Situation) -> None:
    decision = find_policy(mode).decide(situation)
    assert situation.cloud is not None
    blocked = (
        situation.private
        or situation.cloud.breaker != "CLOSED"
        or situation.cloud.obstacle is not None
        or situation.conditions.link_type == "none"
    )
    if situation.local is not None and blocked:
        assert decision.action is Action.LOCAL
        assert decision.reason in ("private", "circuit_open", "unauthorized", "offline")


@given(
    link=links, cloud=clouds, size=st.integers(1, 10**7), left=st.floats(-10, 1e4),
    more=st.floats(0, 5),
)  # fmt: skip
def test_a_faster_link_is_never_less_likely_in_time(
    link: LinkOutlook, cloud: CloudOutlook, size: int, left: float, more: float
) -> None:
    faster = msgspec.structs.replace(link, log_rate_mean=link.log_rate_mean + more)
    assert (
        forecast(faster, cloud, size, left).p_in_time
        >= forecast(link, cloud, size, left).p_in_time - 1e-12
    )


@given(
    link=links, cloud=clouds, size=st.integers(1, 10**7), left=st.floats(-10, 1e4),
    more=st.floats(0, 1e4),
)  # fmt: skip
def test_more_time_is_never_less_likely_in_time(
    link: LinkOutlook, cloud: CloudOutlook, size: int, left: float, more: float
) -> None:
    early = forecast(link, cloud, size, left)
    late = forecast(link, cloud, size, left + more)
    assert late.p_in_time >= early.p_in_time - 1e-12
    assert forecast(link, cloud, size, left, warm=True).p_in_time >= early.p_in_time - 1e-12


@given(situation=situations, confidence=st.floats(0, 1), less=st.floats(0, 1))
def test_less_confidence_never_stops_an_upload(
    situation: Situation, confidence: float, less: float
) -> None:
    policy = Adaptive()
    sure = msgspec.structs.replace(situation, confidence=confidence)
    unsure = msgspec.structs.replace(situation, confidence=confidence * less)
    if uploads(policy, sure):
        assert uploads(policy, unsure)


@given(situation=situations, more_rate=st.floats(0, 5), more_ms=st.floats(0, 1e4))
def test_a_better_link_or_more_time_never_stops_an_upload(
    situation: Situation, more_rate: float, more_ms: float
) -> None:
    policy = Adaptive()
    assert situation.link is not None
    better = msgspec.structs.replace(
        situation,
        time_left_ms=situation.time_left_ms + more_ms,
        link=msgspec.structs.replace(
            situation.link, log_rate_mean=situation.link.log_rate_mean + more_rate
        ),
    )
    if uploads(policy, situation):
        assert uploads(policy, better)


@given(situation=situations)
def test_an_upload_is_worth_its_price(situation: Situation) -> None:
    decision = Adaptive().decide(situation)
    if decision.action in (Action.CASCADE, Action.HEDGED):
        assert decision.expected_gain > decision.price


def test_the_rule_is_gain_times_probability_against_price() -> None:
    situation = open_situation()
    decision = Adaptive().decide(situation)
    assert decision.action is Action.CASCADE
    assert decision.reason == "gain_above_price"
    gain = 0.95 * 0.4 + 0.48 * 0.6 - 0.4
    assert decision.expected_gain == pytest.approx(gain * decision.p_cloud_in_deadline)
    wait_s = (decision.predicted_cloud_ms or 0) / 1000
    assert decision.price == pytest.approx(0.004 + 0.05 * 0.1 + 0.02 * wait_s)
    assert decision.p_cloud_in_deadline > 0.9


def test_a_sure_local_answer_is_final() -> None:
    decision = Adaptive().decide(open_situation(confidence=0.97))
    assert (decision.action, decision.reason) == (Action.LOCAL, "confident")


def test_a_cold_connection_that_is_too_slow_is_opened_for_the_next_time() -> None:
    link = open_situation().link
    assert link is not None
    cold = msgspec.structs.replace(
        link, connection_open=False, setup_round_trips=3, rtt_ms=90, rtt_deviation_ms=5
    )
    situation = open_situation(link=cold, time_left_ms=300, upload_bytes=10_000)
    decision = Adaptive().decide(situation)
    assert (decision.action, decision.reason) == (Action.LOCAL, "connection_cold")
    assert decision.warm_up
    saver = msgspec.structs.replace(situation, conditions=Conditions(data_saver=True))
    assert not Adaptive().decide(saver).warm_up


def test_a_hopeless_link_is_left_alone() -> None:
    link = open_situation().link
    assert link is not None
    slow = msgspec.structs.replace(link, log_rate_mean=math.log(1e4))
    decision = Adaptive().decide(open_situation(link=slow))
    assert (decision.action, decision.reason) == (Action.LOCAL, "cloud_too_late")
    assert not decision.warm_up


def test_both_sides_start_at_once_when_waiting_for_the_device_loses_the_cloud() -> None:
    slow = LocalOutlook(p50_ms=250, p95_ms=300)
    situation = open_situation(confidence=None, local=slow, time_left_ms=390)
    assert Adaptive().decide(situation).action is Action.HEDGED
    quick = open_situation(confidence=None, time_left_ms=390)
    assert Adaptive().decide(quick).action is Action.CASCADE


def test_metered_uploads_cost_ten_times_as_much() -> None:
    prices = Prices(per_request=0)
    free = prices.upload(1_000_000, 0, metered=False)
    assert prices.upload(1_000_000, 0, metered=True) == pytest.approx(10 * free)
    barely = open_situation(confidence=0.8, upload_bytes=300_000, time_left_ms=3000)
    assert uploads(Adaptive(), barely)
    metered = msgspec.structs.replace(barely, conditions=Conditions(metered=True))
    assert not uploads(Adaptive(), metered)


@given(confidence=st.floats(0, 1))
def test_the_gain_prior_is_what_its_docstring_says(confidence: float) -> None:
    gain = GainPrior().gain(confidence)
    assert gain == pytest.approx(max(0.0, 0.48 - 0.53 * confidence), abs=1e-12)


def test_the_late_local_start_leaves_time_for_a_slow_run() -> None:
    decision = find_policy("PREFER_IN_CLOUD").decide(open_situation(time_left_ms=390))
    assert decision.action is Action.CLOUD_FIRST
    assert decision.local_start_ms == pytest.approx(390 - 1.5 * 75 - 20)


def test_without_a_local_model_the_cloud_answers() -> None:
    for mode in ("ADAPTIVE", "PREFER_ON_DEVICE", "PREFER_IN_CLOUD", "ONLY_IN_CLOUD"):
        decision = find_policy(mode).decide(open_situation(local=None))
        assert decision.action is Action.CLOUD_ONLY


def test_every_mode_is_registered_and_an_unknown_one_is_named_with_the_known() -> None:
    assert {mode.value for mode in InferenceMode} <= set(policy_names())
    with pytest.raises(ConfigError, match=r"there are: .*ADAPTIVE"):
        find_policy("SOMETIMES")


# Answers without a score ------------------------------------------------------------------


def test_without_a_score_the_prior_stands_for_the_confidence() -> None:
    """The same upload as with a local answer of that confidence, but started at once."""
    for price in (0.0, 0.01, 0.05, 0.09, 0.2):
        prices = Prices(per_request=price, per_megabyte=0, per_second=0)
        prior = Adaptive().decide(open_situation(confidence=None, scored=False, prices=prices))
        known = Adaptive().decide(open_situation(confidence=0.72, prices=prices))
        assert (prior.action is Action.HEDGED) == (known.action is Action.CASCADE)
        assert prior.expected_gain == known.expected_gain
    assert prior.action is Action.LOCAL
    assert prior.reason == "prior_gain_below_price"


def test_without_a_score_nothing_waits_for_the_local_answer() -> None:
    decision = Adaptive().decide(open_situation(confidence=None, scored=False))
    assert (decision.action, decision.reason) == (Action.HEDGED, "prior_gain_above_price")
    none_gained = Adaptive(GainPrior(local_right=1.0))
    decision = none_gained.decide(open_situation(confidence=None, scored=False))
    assert (decision.action, decision.reason) == (Action.LOCAL, "prior_gain_below_price")


def test_a_large_answer_takes_its_time_too() -> None:
    link, cloud = open_situation().link, open_situation().cloud
    assert link is not None
    assert cloud is not None
    heavy = msgspec.structs.replace(cloud, answer_ms=120)
    plain, slow = forecast(link, cloud, 200_000, 300), forecast(link, heavy, 200_000, 300)
    assert slow.cloud_ms == pytest.approx(plain.cloud_ms + 120)
    assert slow.p_in_time < plain.p_in_time
    late = open_situation(cloud=msgspec.structs.replace(cloud, answer_ms=400), scored=False)
    assert Adaptive().decide(late).action is Action.LOCAL
