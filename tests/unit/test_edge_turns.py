"""A request asks its policy again: when the local answer comes, and while an upload goes on."""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from edge_runtime import (
    Action,
    Bundle,
    Conditions,
    Decision,
    EdgeRuntime,
    InferenceSource,
    NearfarError,
    Result,
    Situation,
)
from edge_runtime.policies.base import Budgets
from edge_runtime.punctuality import Punctuality
from edge_runtime.request import Request
from edge_runtime.testing import ScriptedTransport
from tests.support.bundles import photo, tiny_bundle

BUNDLE = Bundle.open(tiny_bundle())
LOCAL, CLOUD = InferenceSource.ON_DEVICE, InferenceSource.IN_CLOUD
LONG_MS = 20_000
"""Deadline, and the cloud's delay: whatever ends before it was not ended by time."""


class Told:
    """A policy that says what a test tells it to, and remembers what it was asked."""

    name = "Told"
    uses_local = True
    uses_cloud = True
    prewarms = False

    def __init__(self) -> None:
        self.say: Callable[[Situation], Decision] = lambda _: Decision(
            action=Action.LOCAL, reason="told"
        )
        self.asked: list[Situation] = []

    def decide(self, situation: Situation) -> Decision:
        self.asked.append(situation)
        return self.say(situation)


class Slow:
    """The cloud: its delay, and how many images it got."""

    delay_ms: float = LONG_MS
    images = 0


POLICY, SLOW = Told(), Slow()


@pytest.fixture(scope="module")
def edge() -> Iterator[EdgeRuntime]:
    scripted = ScriptedTransport.for_bundle(BUNDLE, lambda _: "cat")
    answer = scripted._handler

    async def handle(request: object) -> object:
        if request.method == "POST":  # type: ignore[attr-defined]
            SLOW.images += 1
            await asyncio.sleep(SLOW.delay_ms / 1e3)
        return await answer(request)  # type: ignore[arg-type, misc]

    made = EdgeRuntime(
        BUNDLE,
        policy=POLICY,
        variant="tflite-int8-dyn",
        transport=ScriptedTransport(handle),  # type: ignore[arg-type]
    )
    with made:
        yield made


@pytest.fixture(autouse=True)
def afresh() -> None:
    POLICY.asked.clear()
    SLOW.delay_ms, SLOW.images = LONG_MS, 0


def decision(action: Action, **fields: object) -> Decision:
    return Decision(action=action, reason="told", **fields)  # type: ignore[arg-type]


def by_turn(*said: Decision) -> Callable[[Situation], Decision]:
    """One after the other; the last one for ever."""
    return lambda _: said[min(len(POLICY.asked), len(said)) - 1]


def cascade_then_reviewed() -> Callable[[Situation], Decision]:
    return by_turn(
        decision(Action.CASCADE),
        decision(Action.CASCADE, review_ms=20.0),  # in the local model's thread
        decision(Action.LOCAL),
    )


def test_a_review_that_another_thread_plans_wakes_the_caller(edge: EdgeRuntime) -> None:
    POLICY.say = cascade_then_reviewed()
    result = edge.run(photo(0), deadline_ms=LONG_MS)
    assert (result.inference_source, result.deadline_met) == (LOCAL, True)
    assert result.timings.total_ms < LONG_MS / 4
    assert len(POLICY.asked) == 3
    assert SLOW.images == 1


async def test_it_wakes_a_caller_in_an_event_loop_too(edge: EdgeRuntime) -> None:
    POLICY.say = cascade_then_reviewed()
    result = await edge.arun(photo(0), deadline_ms=LONG_MS)
    assert result.inference_source is LOCAL
    assert result.timings.total_ms < LONG_MS / 4


@pytest.mark.parametrize("review_ms", [math.inf, math.nan])
def test_a_review_at_no_time_never_comes(edge: EdgeRuntime, review_ms: float) -> None:
    POLICY.say = by_turn(decision(Action.HEDGED, review_ms=review_ms))
    result = edge.run(photo(0), deadline_ms=100)
    assert result.inference_source is LOCAL
    assert len(POLICY.asked) == 1


def test_a_review_may_start_the_local_model_after_all(edge: EdgeRuntime) -> None:
    POLICY.say = by_turn(
        decision(Action.CLOUD_FIRST, local_start_ms=math.inf, review_ms=20.0),
        decision(Action.LOCAL),
    )
    result = edge.run(photo(0), deadline_ms=LONG_MS)
    assert result.inference_source is LOCAL
    assert result.timings.total_ms < LONG_MS / 4


def test_a_hedge_that_would_start_after_the_deadline_is_not_uploaded(edge: EdgeRuntime) -> None:
    POLICY.say = by_turn(decision(Action.HEDGED, cloud_start_ms=150.0))
    assert edge._engine.local is not None
    gate = threading.Event()
    edge._engine.local._queue.submit(gate.wait)  # the local answer comes too late
    threading.Timer(0.3, gate.set).start()
    result = edge.run(photo(0), deadline_ms=100)
    assert (result.inference_source, result.deadline_met) == (LOCAL, False)
    assert SLOW.images == 0


def test_a_held_cloud_answer_waits_for_the_local_one_and_the_policy_chooses(
    edge: EdgeRuntime,
) -> None:
    SLOW.delay_ms = 0.0
    assert edge._engine.local is not None
    for chosen, source in ((Action.LOCAL, LOCAL), (Action.CASCADE, CLOUD)):
        POLICY.asked.clear()
        POLICY.say = by_turn(
            decision(Action.HEDGED, ask_again=True, await_local=True), decision(chosen)
        )
        gate = threading.Event()
        edge._engine.local._queue.submit(gate.wait)
        threading.Timer(0.1, gate.set).start()
        result = edge.run(photo(0), deadline_ms=LONG_MS)
        assert result.inference_source is source
        assert POLICY.asked[-1].upload is not None
        assert POLICY.asked[-1].upload.answered


def test_an_interrupted_start_leaves_nothing_under_way(edge: EdgeRuntime) -> None:
    def interrupted(_: Situation) -> Decision:
        raise KeyboardInterrupt

    POLICY.say = interrupted
    with pytest.raises(KeyboardInterrupt):
        edge.run(photo(0), deadline_ms=LONG_MS)
    POLICY.say = by_turn(decision(Action.LOCAL))
    assert edge.run(photo(0)).inference_source is LOCAL


def test_a_broken_local_model_spends_no_budget_that_is_spent() -> None:
    class Metered:
        def read(self) -> Conditions:
            return Conditions(metered=True)

    images: list[bytes] = []

    def answer(image: bytes) -> str:
        images.append(image)
        return "cat"

    made = EdgeRuntime(
        BUNDLE,
        policy="PREFER_ON_DEVICE",
        variant="tflite-int8-dyn",
        transport=ScriptedTransport.for_bundle(BUNDLE, answer),
        budgets=Budgets(metered_bytes_left=0),
        conditions=Metered(),
    )
    with made as edge:
        assert edge._engine.local is not None
        edge._engine.local._selection.pipeline._model.close()
        with pytest.raises(NearfarError) as caught:
            edge.run(photo(0))
    assert caught.value.code == "inference"
    assert images == []


def test_any_turns_in_any_order_end_every_request(edge: EdgeRuntime) -> None:
    import random

    draw = random.Random(5)
    actions = [Action.LOCAL, Action.CASCADE, Action.HEDGED, Action.CLOUD_FIRST, Action.CLOUD_ONLY]

    def anything(_: Situation) -> Decision:
        return decision(
            draw.choice(actions),
            local_start_ms=draw.choice([0.0, 5.0, 50.0, math.inf]),
            cloud_start_ms=draw.choice([0.0, 5.0, 50.0, math.inf]),
            ask_again=draw.random() < 0.5,
            await_local=draw.random() < 0.5,
            review_ms=draw.choice([None, 0.0, 12.0, 30.0]),
            local_expires=draw.random() < 0.5,
        )

    POLICY.say = anything
    ends: list[Result | NearfarError] = []

    def ask() -> None:
        for number in range(8):
            SLOW.delay_ms = draw.choice([0.0, 10.0, 60.0])
            try:
                ends.append(edge.run(photo(number), deadline_ms=80))
            except NearfarError as error:
                ends.append(error)

    threads = [threading.Thread(target=ask) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert len(ends) == 40
    assert edge._engine.local is not None
    assert edge._engine.local._queue.pending == 0


def test_a_run_held_back_goes_before_one_that_would_lock_it_out(
    edge: EdgeRuntime, monkeypatch: pytest.MonkeyPatch
) -> None:
    local = edge._engine.local
    assert local is not None
    monkeypatch.setattr(local._queue, "_long_ms", lambda: float(LONG_MS))
    POLICY.say = by_turn(
        decision(Action.CLOUD_FIRST, local_start_ms=0.75 * LONG_MS, ask_again=True),
        decision(Action.LOCAL),
    )
    found: list[Result] = []
    first = threading.Thread(
        target=lambda: found.append(edge.run(photo(0), deadline_ms=LONG_MS)), daemon=True
    )
    first.start()
    for _ in range(1000):
        if SLOW.images:
            break
        threading.Event().wait(0.01)
    edge.run(photo(1), deadline_ms=2 * LONG_MS)
    first.join(LONG_MS / 4e3)
    assert [result.inference_source for result in found] == [LOCAL]
    outlook = POLICY.asked[1].local
    assert outlook is not None
    assert outlook.queue_wait_ms > 0.0  # the first one's run comes before
    assert local._queue._held == {}


def test_a_held_answer_leaves_earlier_where_alarms_ring_late(edge: EdgeRuntime) -> None:
    POLICY.say = by_turn(decision(Action.HEDGED))

    def begun(deadline_ms: float) -> tuple[Request, float]:
        started_s = time.monotonic()
        request = edge._begin(photo(0), started_s, deadline_ms, None, private=False)
        alarm_s = request.next_alarm_s()
        assert alarm_s is not None
        return request, (started_s + deadline_ms / 1e3 - alarm_s) * 1e3

    punctual, usual_ms = begun(400)
    assert 10.0 <= usual_ms < 80.0
    time.sleep(0.6)  # the caller's thread gets no turn
    punctual.on_alarm()
    assert not punctual.done.result(5).deadline_met
    late, guard_ms = begun(LONG_MS)
    late.abandon()
    assert guard_ms > 200.0


def test_how_late_alarms_rang_fades_and_takes_a_fifth_of_the_deadline_at_most() -> None:
    punctuality = Punctuality()
    assert [punctuality.guard_ms(ms) for ms in (50, 400, 4000)] == [5.0, 10.0, 10.0]
    punctuality.rang(30.0)
    assert [punctuality.guard_ms(ms) for ms in (50, 400, 4000)] == [10.0, 40.0, 40.0]
    for _ in range(64):
        punctuality.rang(0.1)
    assert punctuality.guard_ms(4000) == pytest.approx(10.0 + 15.0)
