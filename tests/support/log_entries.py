"""Log entries made by real policies from situations that tests can count on."""

from __future__ import annotations

import math

from edge_runtime.log.entries import LogEntry, Outcome, Step
from edge_runtime.log.parameters import describe_policy
from edge_runtime.policies import find_policy
from edge_runtime.policies.base import (
    Action,
    CloudOutlook,
    LinkOutlook,
    LocalOutlook,
    Policy,
    Situation,
)
from edge_runtime.results import InferenceSource, Timings


def situation(**changes: object) -> Situation:
    """A sound broker on a decent link, nothing has run yet."""
    values: dict[str, object] = {
        "upload_bytes": 100_000,
        "deadline_ms": 400.0,
        "time_left_ms": 390.0,
        "local": LocalOutlook(p50_ms=20.0, p95_ms=30.0),
        "link": LinkOutlook(
            log_rate_mean=math.log(2e6),
            log_rate_deviation=0.5,
            rtt_ms=40.0,
            rtt_deviation_ms=5.0,
            connection_open=True,
            idle_ms=100.0,
            window_bytes=200_000.0,
            samples=3,
        ),
        "cloud": CloudOutlook(queue_ms=5.0, inference_ms=30.0),
    }
    return Situation(**(values | changes))  # type: ignore[arg-type]


ADAPTIVE = find_policy("ADAPTIVE")


def entry(
    request: str = "r1",
    *,
    policy: Policy | None = None,
    confidence: float = 0.5,
    first: Situation | None = None,
    **outcome: object,
) -> LogEntry:
    """What the runtime would log: asked once, and again after a cascade."""
    chosen = policy or ADAPTIVE
    asked = first or situation()
    steps = [Step(situation=asked, decision=chosen.decide(asked))]
    if steps[0].decision.action is Action.CASCADE:
        left = asked.time_left_ms - 21.5
        known = situation(confidence=confidence, time_left_ms=left)
        steps.append(Step(situation=known, decision=chosen.decide(known)))
    values: dict[str, object] = {
        "source": InferenceSource.ON_DEVICE,
        "deadline_met": True,
        "timings": Timings(total_ms=25.0, local_wait_ms=0.5, local_ms=21.0),
        "confidence": confidence,
    }
    return LogEntry(
        nearfar="0.1.0",
        request=request,
        unix_s=1_700_000_000.25,
        task="classification",
        bundle="tiny@1.0.0",
        variant="tflite-fp32",
        policy=describe_policy(chosen),
        steps=tuple(steps),
        outcome=Outcome(**(values | outcome)),  # type: ignore[arg-type]
    )
