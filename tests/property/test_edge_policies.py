"""Policies are pure, and better conditions never make them upload less."""

from __future__ import annotations

import math

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_runtime.conditions import Conditions
from edge_runtime.contract.errors import ConfigError
from edge_runtime.estimators.arrivals import ArrivalEstimator
from edge_runtime.estimators.baselines import BaselineMemory
from edge_runtime.policies import find_policy, policy_names
from edge_runtime.policies.adaptive import Adaptive, GainPrior
from edge_runtime.policies.base import (
    Action,
    Budgets,
    CloudOutlook,
    Decision,
    InferenceMode,
    LinkOutlook,
    LocalOutlook,
    Policy,
    Prices,
    Situation,
    UploadProgress,
)
from edge_runtime.policies.constraints import cloud_obstacle
from edge_runtime.policies.forecast import forecast
from edge_runtime.policies.learned import HarmonicMean, LinUCB, MinLatency, Quantile
from edge_runtime.policies.reasons import REASONS, sentence
from edge_runtime.policies.statics import (
    BandwidthThreshold,
    Cascade,
    CloudOnly,
    Hedged,
    HedgingPolicy,
    LocalOnly,
    RetryThrottling,
)
from edge_runtime.policies.utility import ExpectedUtility

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


# The line-up ------------------------------------------------------------------------------

LINE_UP: list[Policy] = [
    LocalOnly(), CloudOnly(), BandwidthThreshold(), MinLatency(), HarmonicMean(), Quantile(),
    LinUCB(), Hedged(), Cascade(0.7), ExpectedUtility("accuracy"), ExpectedUtility("balanced"),
    ExpectedUtility("saver"),
]  # fmt: skip
progress = st.builds(
    UploadProgress,
    elapsed_ms=st.floats(0, 1000),
    wire_bytes=st.floats(1, 1e6),
    acknowledged_bytes=st.floats(0, 1e6),
    sending=st.booleans(),
    answered=st.booleans(),
)
memories = st.builds(
    BaselineMemory,
    ewma_rate=st.none() | st.floats(1e3, 1e8),
    throughputs=st.lists(st.floats(1e3, 1e8), max_size=5).map(tuple),
    ratios=st.lists(st.floats(0.1, 10), max_size=5).map(tuple),
    rounds=st.integers(0, 30),
)
rhythms = st.builds(
    lambda gap, count: _rhythm(gap, count), st.floats(0.05, 100), st.integers(0, 20)
)


def _rhythm(gap_s: float, count: int) -> ArrivalEstimator:
    state = ArrivalEstimator()
    for number in range(count):
        state = state.observe(number * gap_s)
    return state


@pytest.mark.parametrize("policy", LINE_UP, ids=lambda policy: policy.name)
@settings(max_examples=12)
@given(
    situation=situations,
    upload=st.none() | progress,
    memory=st.none() | memories,
    arrivals=st.none() | rhythms,
)
def test_every_policy_of_the_line_up_is_pure_and_total(
    policy: Policy,
    situation: Situation,
    upload: UploadProgress | None,
    memory: BaselineMemory | None,
    arrivals: ArrivalEstimator | None,
) -> None:
    situation = msgspec.structs.replace(situation, upload=upload, memory=memory, arrivals=arrivals)
    decision = policy.decide(situation)
    assert isinstance(policy, Policy)
    again = msgspec.json.decode(msgspec.json.encode(situation), type=Situation)
    assert policy.decide(again) == decision
    assert decision.reason in REASONS or decision.reason == "unauthorized"
    assert 0 <= decision.p_cloud_in_deadline <= 1
    parts = decision.price_bytes + decision.price_energy + decision.price_time
    assert parts == 0 or decision.price == pytest.approx(parts)
    if situation.private and situation.local is not None and policy.uses_local:
        assert decision.action is Action.LOCAL or (upload is not None and upload.answered)


def _on_lte(**changes: object) -> Situation:
    return open_situation(
        conditions=Conditions(link_type="lte"), arrivals=_rhythm(2.0, 20), **changes
    )


def test_a_sure_local_answer_cancels_an_upload_under_way() -> None:
    upload = UploadProgress(elapsed_ms=60, wire_bytes=1e5, acknowledged_bytes=3e4)
    sure = ExpectedUtility("accuracy").decide(_on_lte(confidence=0.97, upload=upload))
    assert (sure.action, sure.reason) == (Action.LOCAL, "confident")
    unsure = ExpectedUtility("accuracy").decide(_on_lte(confidence=0.4, upload=upload))
    assert unsure.action is Action.HEDGED
    assert unsure.review_ms is not None


def test_an_upload_that_cannot_arrive_any_more_is_given_up() -> None:
    stuck = UploadProgress(elapsed_ms=300, wire_bytes=4e5, acknowledged_bytes=1e4)
    decision = ExpectedUtility("accuracy").decide(
        _on_lte(confidence=0.2, upload=stuck, time_left_ms=20)
    )
    assert (decision.action, decision.reason) == (Action.LOCAL, "cloud_too_late")


def test_bytes_already_sent_have_no_price() -> None:
    situation = _on_lte(confidence=0.88, time_left_ms=300)
    assert ExpectedUtility("saver").decide(situation).action is Action.LOCAL
    nearly = UploadProgress(elapsed_ms=90, wire_bytes=1e5, acknowledged_bytes=9.9e4)
    going = msgspec.structs.replace(situation, upload=nearly)
    assert ExpectedUtility("saver").decide(going).action is Action.HEDGED


def test_of_two_answers_the_likelier_one_is_given() -> None:
    held = UploadProgress(elapsed_ms=200, wire_bytes=1e5, acknowledged_bytes=1e5, answered=True)
    policy = ExpectedUtility("accuracy")
    assert policy.decide(_on_lte(confidence=0.95, upload=held)).action is Action.LOCAL
    assert policy.decide(_on_lte(confidence=0.80, upload=held)).reason == "cloud_better"


def test_a_slow_device_starts_late_when_the_cloud_is_near_and_requests_come_thick() -> None:
    link = open_situation().link
    assert link is not None
    situation = open_situation(
        confidence=None,
        local=LocalOutlook(p50_ms=250, p95_ms=312.5, watts=3.0),
        link=msgspec.structs.replace(
            link, log_rate_mean=math.log(5e5), log_rate_deviation=0.3, window_bytes=14_600.0
        ),
        deadline_ms=500,
        time_left_ms=500,
        conditions=Conditions(link_type="lte"),
        arrivals=_rhythm(0.3, 20),
    )
    decision = ExpectedUtility("balanced").decide(situation)
    assert decision.action is Action.CLOUD_FIRST
    assert decision.local_start_ms == pytest.approx(500 - 1.1 * 312.5 - 10)
    assert decision.ask_again
    assert decision.local_expires


def test_the_late_local_run_starts_unless_the_answer_is_as_good_as_there() -> None:
    slow = LocalOutlook(p50_ms=300, p95_ms=380, watts=3.0)
    begun = UploadProgress(elapsed_ms=100, wire_bytes=1e5, acknowledged_bytes=2e4)
    at_start = _on_lte(confidence=None, local=slow, deadline_ms=500, time_left_ms=400, upload=begun)
    decision = ExpectedUtility("balanced").decide(at_start)
    assert decision.local_start_ms == 0 or decision.p_cloud_in_deadline >= 0.995


def test_a_path_is_kept_warm_for_a_near_request_and_left_to_sleep_for_a_far_one() -> None:
    link = open_situation().link
    assert link is not None
    idle = msgspec.structs.replace(link, idle_ms=9_000.0)
    sure = open_situation(confidence=0.97, link=idle, conditions=Conditions(link_type="lte"))
    near = msgspec.structs.replace(sure, arrivals=_rhythm(4.0, 20))
    far = msgspec.structs.replace(sure, arrivals=_rhythm(300.0, 20))
    policy = ExpectedUtility("balanced")
    assert policy.decide(near).warm_up
    assert not policy.decide(far).warm_up
    spare = msgspec.structs.replace(near, conditions=Conditions(link_type="lte", data_saver=True))
    assert not policy.decide(spare).warm_up


@pytest.mark.parametrize("confidence", [None, 0.3])
def test_an_upload_that_will_be_late_is_not_begun_for_the_window_it_would_open(
    confidence: float | None,
) -> None:
    """Requests come thick, and a fresh window would serve them; but it would be cut short."""
    slow = LinkOutlook(
        log_rate_mean=math.log(1e5), log_rate_deviation=0.75, rtt_ms=150, rtt_deviation_ms=20,
        connection_open=False, setup_round_trips=2, promotion_ms=1500.0, window_bytes=14_600,
        fresh_share=1.0, long_run_mean=math.log(1e5), long_run_deviation=0.75,
    )  # fmt: skip
    situation = open_situation(
        link=slow, confidence=confidence, conditions=Conditions(link_type="3g"),
        arrivals=_rhythm(0.3, 20), upload_bytes=60_000, time_left_ms=400,
    )  # fmt: skip
    decision = ExpectedUtility("accuracy").decide(situation)
    assert decision.p_cloud_in_deadline < 0.01
    assert decision.action is Action.LOCAL


@settings(max_examples=20)
@given(situation=situations)
def test_dearer_modes_upload_only_where_cheaper_ones_do(situation: Situation) -> None:
    known = msgspec.structs.replace(
        situation, confidence=situation.confidence or 0.5, scored=True, upload=None
    )
    if uploads(ExpectedUtility("saver"), known):
        assert uploads(ExpectedUtility("accuracy"), known)


def test_limits_come_before_any_gain() -> None:
    cases = [
        ("metered_budget_spent", {"metered": True}, Budgets(metered_bytes_left=99_999)),
        ("saver_budget_spent", {"data_saver": True}, Budgets(saver_bytes_left=0)),
        ("battery_low", {"battery_percent": 9.0}, Budgets(min_battery_percent=10)),
        ("too_hot", {"thermal": "critical"}, Budgets(max_thermal="serious")),
    ]
    for reason, signals, budgets in cases:
        blocked = open_situation(conditions=Conditions(**signals), budgets=budgets)
        assert cloud_obstacle(blocked) == reason
        assert ExpectedUtility("accuracy").decide(blocked).reason == reason
        assert cloud_obstacle(msgspec.structs.replace(blocked, budgets=Budgets())) is None
    charging = Conditions(battery_percent=9.0, charging=True)
    charged = open_situation(conditions=charging, budgets=Budgets(min_battery_percent=10))
    assert cloud_obstacle(charged) is None
    dear = open_situation(cloud_price_microusd=11, budgets=Budgets(max_price_microusd=10))
    assert cloud_obstacle(dear) == "price_too_high"


def test_a_minimum_accuracy_asks_whatever_the_price() -> None:
    dear = Prices(per_request=1.0)
    situation = open_situation(confidence=0.6, prices=dear)
    assert Adaptive().decide(situation).action is Action.LOCAL
    insists = msgspec.structs.replace(situation, budgets=Budgets(min_confidence=0.7))
    assert Adaptive().decide(insists).action is Action.CASCADE


def test_hedging_stops_at_half_of_its_tokens() -> None:
    policy = Hedged(HedgingPolicy(retry_throttling=RetryThrottling()))
    memory = BaselineMemory()
    for _ in range(4):
        memory = memory.failed()
    assert policy.decide(open_situation(memory=memory)).action is Action.HEDGED
    decision = policy.decide(open_situation(memory=memory.failed()))
    assert (decision.action, decision.reason) == (Action.LOCAL, "throttled")
    assert Hedged(HedgingPolicy(max_attempts=1)).decide(open_situation()).action is Action.LOCAL
    late = Hedged(HedgingPolicy(hedging_delay_ms=40)).decide(open_situation())
    assert late.cloud_start_ms == 40


def test_rules_of_the_literature_pick_the_side_they_predict_to_be_better() -> None:
    fast = BaselineMemory(ewma_rate=1e8, throughputs=(1e8,))
    slow = BaselineMemory(ewma_rate=1e4, throughputs=(1e4,))
    for policy in (MinLatency(), HarmonicMean(), Quantile(), BandwidthThreshold()):
        near = open_situation(memory=fast)
        if isinstance(policy, MinLatency):  # a round trip alone is 40 ms
            near = msgspec.structs.replace(near, local=LocalOutlook(p50_ms=200, p95_ms=250))
        assert policy.decide(near).action is Action.CLOUD_ONLY
        assert policy.decide(open_situation(memory=slow)).action is Action.LOCAL
    assert LinUCB().decide(open_situation(memory=BaselineMemory(rounds=20))).action is (
        Action.CLOUD_ONLY
    )


def test_a_cascade_needs_a_confidence_for_its_threshold() -> None:
    with pytest.raises(ValueError, match="theta"):
        Cascade(1.5)
    assert Cascade(0.7).decide(open_situation(confidence=0.69)).action is Action.CASCADE
    assert Cascade(0.7).decide(open_situation(confidence=0.7)).action is Action.LOCAL


def test_a_late_run_takes_its_place_beside_those_that_others_hold_back() -> None:
    policy = ExpectedUtility("balanced")
    local = LocalOutlook(p50_ms=400.0, p95_ms=400.0)  # 440 ms are reserved for a run
    sending = open_situation(
        confidence=None,
        local=local,
        deadline_ms=1000.0,
        time_left_ms=990.0,
        upload=UploadProgress(elapsed_ms=1.0, wire_bytes=100_000.0),
    )

    def start_ms(*reserved_ms: float) -> float:
        busy = msgspec.structs.replace(local, reserved_ms=reserved_ms)
        decision = policy.decide(msgspec.structs.replace(sending, local=busy))
        assert decision.action is Action.CLOUD_FIRST
        return decision.local_start_ms

    assert start_ms() == pytest.approx(540.0)
    assert start_ms(90.0) == pytest.approx(540.0)  # which ends before
    assert start_ms(985.0) == pytest.approx(540.0)  # which starts after
    assert start_ms(530.0) == pytest.approx(90.0)
    assert start_ms(530.0, 985.0) == pytest.approx(90.0)
    crowded = start_ms(100.0, 530.0)
    assert crowded in {0.0, math.inf}  # there is no place: now, or not at all
