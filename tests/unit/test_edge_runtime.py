"""``EdgeRuntime`` against a scripted broker: who answers, with which error, how counted."""

from __future__ import annotations

import asyncio
import io
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import pytest
from PIL import Image

from edge_runtime import (
    Action,
    BrokerFault,
    Bundle,
    CircuitOpen,
    Conditions,
    ConfigError,
    DeadlineExceeded,
    Decision,
    EdgeRuntime,
    ImageError,
    InferenceMode,
    InferenceSource,
    LabelsMismatch,
    ModelNotFound,
    NetworkUnreachable,
    Overloaded,
    Policy,
    Prediction,
    Prices,
    Situation,
    Unauthorized,
    WireError,
)
from edge_runtime.contract.tasks.classification import probabilities
from edge_runtime.contract.wire import ModelRef, PredictAnswer
from edge_runtime.policies import find_policy
from edge_runtime.testing import HttpRequest, HttpResponse, ScriptedTransport, problem
from tests.support.bundles import LABELS, photo, reference_logits, tiny_bundle

BUNDLE = Bundle.open(tiny_bundle())
SURE = Bundle.open(tiny_bundle(scale=2000.0))
LOCAL, CLOUD = InferenceSource.ON_DEVICE, InferenceSource.IN_CLOUD


def broker(
    answer: Callable[[bytes], str | HttpResponse] = lambda _: "cat", **options: object
) -> ScriptedTransport:
    return ScriptedTransport.for_bundle(BUNDLE, answer, **options)  # type: ignore[arg-type]


def runtime(
    policy: str | Policy = "ADAPTIVE", transport: ScriptedTransport | None = None, **options: object
) -> EdgeRuntime:
    made = EdgeRuntime(
        options.pop("bundle", BUNDLE),  # type: ignore[arg-type]
        policy=policy,
        variant="tflite-fp32",
        transport=transport,
        **options,  # type: ignore[arg-type]
    )
    made.prewarm(wait_ms=2000)
    return made


def uploads(transport: ScriptedTransport) -> int:
    return sum(request.method == "POST" for request in transport.requests)


def failing(error: Exception) -> Callable[[bytes], str]:
    def answer(_: bytes) -> str:
        raise error

    return answer


# Bad input ------------------------------------------------------------------------------


@pytest.mark.parametrize("deadline_ms", [0, -1, 0.5, float("nan"), float("inf"), 600_001])
def test_a_senseless_deadline_is_refused(deadline_ms: float) -> None:
    with pytest.raises(ConfigError, match="deadline_ms"):
        EdgeRuntime(BUNDLE, deadline_ms=deadline_ms)
    with runtime() as edge, pytest.raises(ConfigError, match="deadline_ms"):
        edge.run(photo(0), deadline_ms=deadline_ms)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"threads": 0}, "threads"),
        ({"policy": "ONLY_IN_CLOUD"}, "needs a broker"),
        ({"policy": "NEVER"}, "no policy 'NEVER'"),
        ({"policy": object()}, "members of Policy"),
        ({"broker": "ftp://x"}, "broker must be a URL"),
        ({"broker": "http://x", "api_key": "k"}, "unencrypted"),
        ({"broker": "https://x", "api_key": "a b"}, "API key"),
        ({"broker": "http://x", "transport": broker()}, "not both"),
    ],
)
def test_senseless_arguments_are_refused(options: dict[str, object], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        EdgeRuntime(BUNDLE, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("top_k", [0, -1, 1001])
def test_a_senseless_top_k_is_refused(top_k: int) -> None:
    with runtime() as edge, pytest.raises(ConfigError, match="top_k"):
        edge.run(photo(0), top_k=top_k)


@pytest.mark.parametrize("mode", list(InferenceMode))
def test_a_truncated_image_is_the_callers_error_in_every_mode(mode: InferenceMode) -> None:
    transport = broker(lambda _: problem(400, "image_unreadable"))
    with runtime(mode, transport) as edge:
        with pytest.raises(ImageError):
            edge.run(photo(0)[:2000])
        assert edge.status().counts.failed == 1


def test_a_broken_image_is_refused_before_upload() -> None:
    transport = broker()
    with runtime("ONLY_IN_CLOUD", transport) as edge, pytest.raises(ImageError):
        edge.run(photo(0)[:2000])
    assert uploads(transport) == 0


def test_a_private_image_has_no_place_in_a_cloud_only_runtime() -> None:
    with runtime("ONLY_IN_CLOUD", broker()) as edge, pytest.raises(ConfigError, match="private"):
        edge.run(photo(0), private=True)


def test_a_closed_runtime_says_so() -> None:
    edge = runtime()
    edge.close()
    edge.close()
    assert edge.status().closed
    assert not edge.prewarm()
    with pytest.raises(ConfigError, match="closed"):
        edge.run(photo(0))


# The local answer -----------------------------------------------------------------------


def test_the_local_answer_is_that_of_the_model() -> None:
    with runtime("ONLY_ON_DEVICE") as edge:
        result = edge.run(photo(3), top_k=10)
    rgb = np.asarray(Image.open(io.BytesIO(photo(3))).convert("RGB"))
    expected = probabilities(BUNDLE.manifest.task, reference_logits(rgb))  # type: ignore[arg-type]
    order = np.argsort(-expected, kind="stable")
    assert [p.index for p in result.predictions] == order.tolist()
    assert [p.label for p in result.predictions] == [LABELS[i] for i in order]
    assert [p.score for p in result.predictions] == pytest.approx(expected[order], abs=1e-5)
    assert (result.label, result.score) == (LABELS[order[0]], result.predictions[0].score)
    assert result.inference_source is LOCAL
    assert result.model == "tflite-fp32"
    assert result.deadline_met
    assert result.error is None
    assert 0 < (result.timings.local_ms or 0) <= result.timings.total_ms


def test_top_k_defaults_to_the_bundles_and_is_capped_by_the_classes() -> None:
    with runtime("ONLY_ON_DEVICE") as edge:
        assert len(edge.run(photo(0)).predictions) == 3
        assert len(edge.run(photo(0), top_k=1).predictions) == 1
        assert len(edge.run(photo(0), top_k=1000).predictions) == len(LABELS)


def test_an_array_and_its_png_get_the_same_answer() -> None:
    pixels = np.asarray(Image.open(io.BytesIO(photo(4))).convert("RGB"))
    buffer = io.BytesIO(b"")
    Image.fromarray(pixels).save(buffer, "PNG")
    with runtime("ONLY_ON_DEVICE") as edge:
        assert edge.run(pixels).predictions == edge.run(buffer.getvalue()).predictions


def test_a_local_model_slower_than_the_deadline_answers_late_and_says_so() -> None:
    slow = Bundle.open(tiny_bundle(slow_fp32_layers=6))
    with runtime("ADAPTIVE", broker(), bundle=slow, deadline_ms=20) as edge:
        result = edge.run(photo(0), private=True)
    assert result.inference_source is LOCAL
    assert not result.deadline_met
    assert result.timings.total_ms > 20
    assert edge.status().counts.deadline_missed == 1


# Modes ----------------------------------------------------------------------------------


def test_only_on_device_never_asks_the_broker() -> None:
    transport = broker()
    with runtime("ONLY_ON_DEVICE", transport) as edge:
        assert edge.run(photo(0)).inference_source is LOCAL
        assert edge.status().broker is None
    assert transport.requests == []


def test_prefer_on_device_asks_the_broker_only_when_the_model_fails() -> None:
    transport = broker()
    with runtime("PREFER_ON_DEVICE", transport) as edge:
        assert edge.run(photo(0)).inference_source is LOCAL
        assert uploads(transport) == 0
        assert edge._engine.local is not None
        edge._engine.local._selection.pipeline._model.close()  # the interpreter is gone
        result = edge.run(photo(0))
    assert result.inference_source is CLOUD
    assert result.error == "inference"
    assert result.decision.reason == "local_failed"


def test_prefer_on_device_opens_no_connection_in_advance() -> None:
    transport = broker()
    with EdgeRuntime(BUNDLE, policy="PREFER_ON_DEVICE", transport=transport) as edge:
        edge.run(photo(0))
    assert transport.requests == []


def test_prefer_in_cloud_takes_the_clouds_answer() -> None:
    with runtime("PREFER_IN_CLOUD", broker()) as edge:
        result = edge.run(photo(0))
    assert (result.inference_source, result.label) == (CLOUD, "cat")
    assert result.timings.local_ms is None


def test_prefer_in_cloud_starts_the_device_at_once_when_the_cloud_fails() -> None:
    with runtime("PREFER_IN_CLOUD", broker(failing(NetworkUnreachable("gone")))) as edge:
        result = edge.run(photo(0), deadline_ms=5000)
    assert result.inference_source is LOCAL
    assert result.error == "network_unreachable"
    assert result.timings.total_ms < 2000


def test_prefer_in_cloud_holds_a_local_answer_when_the_cloud_is_slow() -> None:
    with runtime("PREFER_IN_CLOUD", broker(delay_ms=3000)) as edge:
        result = edge.run(photo(0), deadline_ms=400)
    assert result.inference_source is LOCAL
    assert result.error == "deadline_exceeded"
    assert result.timings.total_ms < 2000, "the cloud was not waited for"
    assert result.timings.local_ms is not None


def test_only_in_cloud_loads_no_model_and_raises_at_the_deadline() -> None:
    with runtime("ONLY_IN_CLOUD", broker(delay_ms=3000)) as edge:
        assert edge.status().variant is None
        started = time.monotonic()
        with pytest.raises(DeadlineExceeded):
            edge.run(photo(0), deadline_ms=300)
        assert 0.29 <= time.monotonic() - started < 1.0


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (lambda _: problem(401, "unauthorized"), Unauthorized),
        (lambda _: problem(404, "model_not_found"), ModelNotFound),
        (lambda _: problem(429, "overloaded"), Overloaded),
        (lambda _: HttpResponse(status=200, headers={}, body=b"<html>"), WireError),
        (failing(NetworkUnreachable("gone")), NetworkUnreachable),
    ],
    ids=["unauthorized", "model_not_found", "overloaded", "wire", "network_unreachable"],
)
def test_a_failing_cloud_raises_alone_and_is_covered_by_the_device(
    answer: Callable[[bytes], str], error: type[Exception]
) -> None:
    with runtime("ONLY_IN_CLOUD", broker(answer)) as edge, pytest.raises(error):
        edge.run(photo(0))
    with runtime("ADAPTIVE", broker(answer)) as edge:
        result = edge.run(photo(0))
        assert result.inference_source is LOCAL
        assert result.error == error.code  # type: ignore[attr-defined]


# ADAPTIVE -------------------------------------------------------------------------------


def test_adaptive_asks_the_cloud_when_it_doubts_and_takes_its_answer() -> None:
    transport = broker()
    with runtime("ADAPTIVE", transport) as edge:
        result = edge.run(photo(0))
    assert (result.inference_source, result.label) == (CLOUD, "cat")
    assert isinstance(result.model, ModelRef)
    assert result.model.name == "scripted"
    assert uploads(transport) == 1


def test_adaptive_keeps_a_sure_answer() -> None:
    transport = ScriptedTransport.for_bundle(SURE, lambda _: "cat")
    with runtime("ADAPTIVE", transport, bundle=SURE) as edge:
        result = edge.run(photo(0))
    assert result.inference_source is LOCAL
    assert result.score > 0.95
    assert result.decision.reason == "confident"
    assert uploads(transport) == 0


def test_adaptive_gives_the_held_answer_by_the_deadline() -> None:
    with runtime("ADAPTIVE", broker(delay_ms=3000)) as edge:
        result = edge.run(photo(0), deadline_ms=400)
        assert result.inference_source is LOCAL
        # the last look at the upload gave it up, or time did
        gave_up = result.decision.reason == "cloud_too_late"
        assert result.error == (None if gave_up else "deadline_exceeded")
        assert result.deadline_met
        assert 300 < result.timings.total_ms <= 400


def test_adaptive_stays_local_when_uploads_cost_too_much() -> None:
    transport = broker()
    with runtime("ADAPTIVE", transport, prices=Prices(per_request=1.0)) as edge:
        assert edge.run(photo(0)).inference_source is LOCAL
    assert uploads(transport) == 0


def test_a_private_image_is_not_uploaded() -> None:
    for mode in ("ADAPTIVE", "PREFER_IN_CLOUD", "PREFER_ON_DEVICE"):
        transport = broker()
        with runtime(mode, transport) as edge:
            result = edge.run(photo(0), private=True)
        assert result.inference_source is LOCAL
        assert result.situation.private
        assert uploads(transport) == 0


def test_every_decision_can_be_replayed() -> None:
    for mode in InferenceMode:
        with runtime(mode, broker()) as edge:
            result = edge.run(photo(0))
        situation = msgspec.json.decode(msgspec.json.encode(result.situation), type=Situation)
        assert find_policy(mode).decide(situation) == result.decision


@pytest.mark.slow
def test_repeated_misses_are_no_longer_believed_in() -> None:
    """An upload of next to no bytes may be tried again, but nobody waits to the end for it."""
    with runtime("ADAPTIVE", broker(delay_ms=3000)) as edge:
        results = [edge.run(photo(seed), deadline_ms=200) for seed in range(16)]
    assert {result.decision.reason for result in results[8:]} == {"cloud_too_late"}
    assert max(result.decision.p_cloud_in_deadline for result in results[8:]) < 0.1
    assert all(result.deadline_met for result in results[8:])


# Labels ---------------------------------------------------------------------------------


def test_a_cloud_model_with_other_labels_is_refused_and_nothing_uploaded() -> None:
    transport = broker(labels_sha256="0" * 64)
    with runtime("ONLY_IN_CLOUD", transport) as edge, pytest.raises(LabelsMismatch):
        edge.run(photo(0))
    assert uploads(transport) == 0
    transport = broker(labels_sha256="0" * 64)
    with runtime("ADAPTIVE", transport) as edge:
        result = edge.run(photo(0))
        assert result.inference_source is LOCAL
        assert result.decision.reason == "labels_mismatch"
    assert uploads(transport) == 0


def test_the_check_is_not_repeated_for_every_image() -> None:
    transport = broker()
    with runtime("ONLY_IN_CLOUD", transport) as edge:
        for seed in range(3):
            edge.run(photo(seed))
    assert [request.path for request in transport.requests].count("/v1/models") == 1


def test_a_model_updated_meanwhile_is_used_as_long_as_its_labels_fit() -> None:
    def updated(labels_sha256: str) -> HttpResponse:
        reference = ModelRef(
            name="scripted", version="2", sha256="f" * 64, labels_sha256=labels_sha256
        )
        answer = PredictAnswer(
            model=reference, predictions=(Prediction(index=1, label="bee", score=0.9),)
        )
        return HttpResponse(status=200, headers={}, body=msgspec.json.encode(answer))

    assert BUNDLE.manifest.labels is not None
    digests = iter([BUNDLE.manifest.labels.sha256, "0" * 64])
    with runtime("ONLY_IN_CLOUD", broker(lambda _: updated(next(digests)))) as edge:
        assert edge.run(photo(0)).label == "bee"
        status = edge.status().broker
        assert status is not None
        assert status.model == "scripted@2"
        with pytest.raises(LabelsMismatch):
            edge.run(photo(0))


def test_a_named_cloud_model_must_be_served() -> None:
    edge = runtime("ONLY_IN_CLOUD", broker(model="large"), cloud_model="huge")
    with edge, pytest.raises(ModelNotFound, match="it serves: large"):
        edge.run(photo(0))
    with runtime("ONLY_IN_CLOUD", broker(model="large"), cloud_model="large") as edge:
        assert edge.run(photo(0)).label == "cat"


# Breaker and pushback -------------------------------------------------------------------


def test_three_hard_failures_open_the_circuit_and_no_image_probes_it() -> None:
    transport = broker(failing(NetworkUnreachable("gone")))
    with runtime("ONLY_IN_CLOUD", transport) as edge:
        for _ in range(3):
            with pytest.raises(NetworkUnreachable):
                edge.run(photo(0))
        with pytest.raises(CircuitOpen):
            edge.run(photo(0))
        assert uploads(transport) == 3
        time.sleep(1.1)  # the longest first back-off
        with pytest.raises(NetworkUnreachable):
            edge.run(photo(0))
        assert transport.requests[-1].method == "POST"
        assert transport.requests[-2].path == "/v2/health/ready"


def test_misses_and_refusals_of_the_request_never_open_the_circuit() -> None:
    for answer in (
        lambda _: problem(400, "wire"),
        lambda _: problem(504, "deadline_exceeded"),
        failing(DeadlineExceeded("late")),
    ):
        with runtime("PREFER_IN_CLOUD", broker(answer)) as edge:
            for seed in range(6):
                edge.run(photo(seed))
            status = edge.status().broker
            assert status is not None
            assert status.breaker == "CLOSED"


def test_retry_after_is_honored_without_asking_again() -> None:
    transport = broker(lambda _: problem(429, "overloaded", headers={"retry-after": "30"}))
    with runtime("ONLY_IN_CLOUD", transport) as edge:
        for _ in range(3):
            with pytest.raises(Overloaded):
                edge.run(photo(0))
    assert uploads(transport) == 1


# Users' own parts -----------------------------------------------------------------------


class Always:
    """A policy that gives one decision."""

    name = "always"
    uses_local = True
    uses_cloud = True
    prewarms = True

    def __init__(self, decision: object) -> None:
        self.decision = decision

    def decide(self, situation: Situation) -> Decision:
        if isinstance(self.decision, Exception):
            raise self.decision
        return self.decision  # type: ignore[return-value]


def test_a_policy_of_ones_own_decides() -> None:
    hedged = Always(Decision(action=Action.HEDGED, reason="mine"))
    with runtime(hedged, broker(delay_ms=20)) as edge:
        result = edge.run(photo(0))
    assert (result.inference_source, result.decision.reason) == (CLOUD, "mine")
    assert result.timings.local_ms is not None


@pytest.mark.parametrize("action", list(Action))
def test_no_decision_uploads_a_private_image_or_needs_a_broker(action: Action) -> None:
    policy = Always(Decision(action=action, reason="mine"))
    transport = broker()
    with runtime(policy, transport) as edge:
        assert edge.run(photo(0), private=True).inference_source is LOCAL
    assert uploads(transport) == 0
    with runtime(policy) as edge:
        assert edge.run(photo(0)).inference_source is LOCAL


def test_a_policys_own_error_reaches_the_caller() -> None:
    edge = runtime(Always(ZeroDivisionError("policy")), broker())
    with edge, pytest.raises(ZeroDivisionError):
        edge.run(photo(0))
    edge = runtime(Always(TimeoutError("policy")), broker())  # not taken for a missed alarm
    with edge, pytest.raises(TimeoutError, match="policy"):
        edge.run(photo(0))
    with runtime(Always("LOCAL"), broker()) as edge, pytest.raises(ConfigError, match="Decision"):
        edge.run(photo(0))


def test_a_transport_of_ones_own_may_fail_in_any_way() -> None:
    edge = runtime("ONLY_IN_CLOUD", broker(failing(KeyError("bug"))))
    with edge, pytest.raises(BrokerFault, match="transport failed"):
        edge.run(photo(0))


class Signals:
    def __init__(self, conditions: Conditions | Exception) -> None:
        self.conditions = conditions

    def read(self) -> Conditions:
        if isinstance(self.conditions, Exception):
            raise self.conditions
        return self.conditions


def test_device_signals_reach_the_decision() -> None:
    offline = Signals(Conditions(link_type="none"))
    with runtime("ADAPTIVE", broker(), conditions=offline) as edge:
        result = edge.run(photo(0))
    assert result.decision.reason == "offline"
    assert edge.status().conditions.link_type == "none"


def test_failing_signals_cost_no_answer() -> None:
    with runtime("ADAPTIVE", broker(), conditions=Signals(OSError("no sensor"))) as edge:
        assert edge.run(photo(0)).situation.conditions == Conditions()


def test_data_saver_opens_no_connection_in_advance() -> None:
    transport = broker()
    saving = Signals(Conditions(data_saver=True))
    with EdgeRuntime(BUNDLE, transport=transport, conditions=saving):
        time.sleep(0.1)
    assert transport.requests == []


def test_a_new_link_type_forgets_the_old_links_samples() -> None:
    signals = Signals(Conditions(link_type="wifi"))
    headers = {"server-timing": "recv;dur=10.0, q;dur=0.1, inf;dur=1.0"}
    with runtime("ONLY_IN_CLOUD", broker(headers=headers), conditions=signals) as edge:
        edge.run(photo(0))
        status = edge.status().broker
        assert status is not None
        assert (status.rate_samples, status.rtt_samples > 0) == (1, True)
        signals.conditions = Conditions(link_type="lte")
        situation = edge.run(photo(0)).situation
        assert situation.link is not None
        assert situation.link.samples == 0


# Async ----------------------------------------------------------------------------------


async def test_arun_answers_inside_a_running_loop() -> None:
    async with runtime("ADAPTIVE", broker()) as edge:
        results = await asyncio.gather(*(edge.arun(photo(seed)) for seed in range(5)))
        assert [result.label for result in results] == ["cat"] * 5
        assert edge.run(photo(0), private=True).inference_source is LOCAL
        held = await edge.arun(np.zeros((20, 30, 3), np.uint8), private=True)
        assert held.inference_source is LOCAL
    assert edge.status().counts.requests == 7


async def test_arun_raises_at_the_deadline_without_blocking_the_loop() -> None:
    async with runtime("ONLY_IN_CLOUD", broker(delay_ms=3000)) as edge:
        ticks = 0

        async def tick() -> None:
            nonlocal ticks
            while True:
                await asyncio.sleep(0.01)
                ticks += 1

        ticking = asyncio.create_task(tick())
        with pytest.raises(DeadlineExceeded):
            await edge.arun(photo(0), deadline_ms=300)
        ticking.cancel()
        assert ticks >= 5


async def test_cancelling_arun_cancels_the_upload() -> None:
    started, cancelled = asyncio.Event(), []
    loop = asyncio.get_running_loop()

    async def handle(request: HttpRequest) -> HttpResponse:
        if request.method == "GET":
            return await sound.send(request)
        loop.call_soon_threadsafe(started.set)
        try:
            await asyncio.sleep(10)
        except asyncio.CancelledError:
            cancelled.append(True)
            raise
        raise AssertionError

    sound = broker()
    async with runtime("ONLY_IN_CLOUD", ScriptedTransport(handle)) as edge:
        task = asyncio.create_task(edge.arun(photo(0), deadline_ms=5000))
        await started.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        for _ in range(100):
            if cancelled:
                break
            await asyncio.sleep(0.01)
        assert cancelled
        counts = edge.status().counts
        assert (counts.requests, counts.failed) == (0, 0)


async def test_cancelling_arun_while_its_file_is_read_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "photo.jpg"
    path.write_bytes(photo(0))
    transport = broker(delay_ms=2000)
    async with runtime("ONLY_IN_CLOUD", transport) as edge:
        task = asyncio.create_task(edge.arun(path, deadline_ms=5000))
        await asyncio.sleep(0)  # the thread has started, the task has not its request yet
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await asyncio.sleep(0.1)
        assert edge._engine.uplink is not None
        assert edge._engine.uplink._in_flight_bytes == 0


# Counting -------------------------------------------------------------------------------


def test_counts_add_up() -> None:
    transport = broker(lambda _: "cat")
    with runtime("ADAPTIVE", transport) as edge:
        edge.run(photo(0))
        edge.run(photo(1), private=True)
        with pytest.raises(ImageError):
            edge.run(b"nothing")  # refused before it counts as a request
        with pytest.raises(ImageError):
            edge.run(photo(0)[:3000])
        counts = edge.status().counts
    assert (counts.requests, counts.on_device, counts.in_cloud, counts.failed) == (3, 1, 1, 1)
    assert counts.uploads == 1
    assert counts.uploaded_bytes == len(transport.requests[-1].body)
    assert msgspec.json.encode(edge.status())
