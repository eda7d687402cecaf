"""Figures of both sides, and whether they agree."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

import msgspec
import numpy as np

from benchmarks.live_check.live import LiveRun
from benchmarks.live_check.measured import MeasuredWorld, Pair
from edge_runtime.simulation.requests import Outcome

__all__ = [
    "ACCURACY_POINTS",
    "LATENCY_SHARE",
    "Figures",
    "PolicyReport",
    "describe",
    "order_breaks",
    "ranked",
    "report",
]

ACCURACY_POINTS: Final = 0.02
LATENCY_SHARE: Final = 0.15


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """One request on one side."""

    latency_ms: float | None
    """None: no answer."""
    from_cloud: bool
    right: bool
    uploaded: bool


class Figures(msgspec.Struct, frozen=True, kw_only=True):
    """One policy on one side."""

    accuracy_in_deadline: float
    mean_ms: float | None
    """Of those answered; None: none was."""
    p95_ms: float | None
    late_or_none: float
    """Share of requests."""
    cloud_share: float
    """Of requests answered by the cloud."""
    offloaded: float
    """Share of requests whose photo was uploaded, whole or in part."""
    kb_per_request: float


class PolicyReport(msgspec.Struct, frozen=True, kw_only=True):
    """Both sides of one policy."""

    policy: str
    live: Figures
    simulated: Figures
    accuracy_difference: float
    """Live less simulated."""
    latency_ratio: float | None
    bytes_ratio: float | None
    """Live to simulated; None: both uploaded nothing."""
    other_side: int
    """Requests that one side answered itself and the other had the cloud answer."""
    late_start_ms: float
    """99th percentile of how much later than planned a live request was made."""
    passed: bool
    requests: list[tuple[Answer, Answer]] = []
    """Live and simulated, in order of arrival."""


def report(
    policy: str,
    live: LiveRun,
    outcomes: Sequence[Outcome],
    world: MeasuredWorld,
    truth: Sequence[int],
) -> PolicyReport:
    """Compare the two."""
    deadline_ms = world.deadline_s * 1e3
    answers = [
        Answer(
            latency_ms=record.latency_ms if record.source else None,
            from_cloud=record.source == "IN_CLOUD",
            right=record.predicted == truth[index],
            uploaded=record.entry is not None and record.entry.outcome.uploaded_bytes > 0,
        )
        for index, record in enumerate(live.records)
    ]
    replayed = [_replayed(world, index, outcome) for index, outcome in enumerate(outcomes)]
    count = len(answers)
    ours = _figures(answers, deadline_ms, live.uplink_bytes / count)
    theirs = _figures(replayed, deadline_ms, sum(o.uploaded_bytes for o in outcomes) / count)
    difference = ours.accuracy_in_deadline - theirs.accuracy_in_deadline
    ratio = _ratio(ours.mean_ms, theirs.mean_ms)
    return PolicyReport(
        policy=policy,
        live=ours,
        simulated=theirs,
        accuracy_difference=round(difference, 4),
        latency_ratio=ratio,
        bytes_ratio=_ratio(ours.kb_per_request, theirs.kb_per_request),
        other_side=sum(
            a.from_cloud != b.from_cloud for a, b in zip(answers, replayed, strict=True)
        ),
        late_start_ms=round(float(np.quantile([r.late_ms for r in live.records], 0.99)), 2),
        passed=abs(difference) <= ACCURACY_POINTS + 1e-9
        and (ratio is None or abs(ratio - 1.0) <= LATENCY_SHARE),
        requests=list(zip(answers, replayed, strict=True)),
    )


def _replayed(world: MeasuredWorld, index: int, outcome: Outcome) -> Answer:
    answered = outcome.answer_s < math.inf
    right = world.cloud_right if outcome.from_cloud else world.local_right
    return Answer(
        latency_ms=(outcome.answer_s - world.arrived_s[index]) * 1e3 if answered else None,
        from_cloud=answered and outcome.from_cloud,
        right=answered and right[index],
        uploaded=outcome.offloaded,
    )


def _figures(answers: Sequence[Answer], deadline_ms: float, bytes_per_request: float) -> Figures:
    latencies = [a.latency_ms for a in answers if a.latency_ms is not None]
    in_time = [a.latency_ms is not None and a.latency_ms <= deadline_ms for a in answers]
    right = [a.right and timely for a, timely in zip(answers, in_time, strict=True)]
    return Figures(
        accuracy_in_deadline=round(float(np.mean(right)), 4),
        mean_ms=round(float(np.mean(latencies)), 2) if latencies else None,
        p95_ms=round(float(np.quantile(latencies, 0.95)), 2) if latencies else None,
        late_or_none=round(1.0 - float(np.mean(in_time)), 4),
        cloud_share=round(float(np.mean([a.from_cloud for a in answers])), 4),
        offloaded=round(float(np.mean([a.uploaded for a in answers])), 4),
        kb_per_request=round(bytes_per_request / 1e3, 3),
    )


def _ratio(live: float | None, simulated: float | None) -> float | None:
    if not live or not simulated:
        return None
    return round(live / simulated, 4)


def order_breaks(reports: Sequence[PolicyReport]) -> list[str]:
    """Pairs that one side puts in the opposite order of the other.

    The order is by accuracy, then by latency. Policies within 2 points of accuracy are equally
    accurate, and within 15 % of latency equally fast.
    """
    broken = []
    for number, one in enumerate(reports):
        for other in reports[number + 1 :]:
            live, simulated = _before(one.live, other.live), _before(one.simulated, other.simulated)
            if live * simulated < 0:
                broken.append(f"{one.policy} and {other.policy}")
    return broken


def _before(one: Figures, other: Figures) -> int:
    """1: better, -1: worse, 0: as good."""
    gap = one.accuracy_in_deadline - other.accuracy_in_deadline
    if abs(gap) > ACCURACY_POINTS:
        return 1 if gap > 0 else -1
    ratio = (one.mean_ms or math.inf) / (other.mean_ms or math.inf)
    if math.isnan(ratio) or abs(ratio - 1.0) <= LATENCY_SHARE:
        return 0
    return 1 if ratio < 1 else -1


def ranked(reports: Sequence[PolicyReport], side: str) -> list[str]:
    """Names, best first, by accuracy in hundredths, then latency."""
    return [
        found.policy
        for found in sorted(
            reports,
            key=lambda found: (
                -round(getattr(found, side).accuracy_in_deadline, 2),
                getattr(found, side).mean_ms or math.inf,
            ),
        )
    ]


def describe(pair: Pair) -> dict[str, float]:
    """What was measured of the two models, in short."""
    return {
        "photos": len(pair.body_bytes),
        "body_bytes_median": float(np.median(pair.body_bytes)),
        "header_bytes": round(pair.header_bytes, 1),
        "local_median_ms": round(pair.local_median_ms, 2),
        "local_log_sigma": round(pair.local_log_sigma, 3),
        "server_median_ms": round(float(np.median(pair.server_ms)), 2),
        "server_p95_ms": round(float(np.quantile(pair.server_ms, 0.95)), 2),
        "overhead_ms": round(pair.overhead_ms, 2),
        "local_accuracy": round(float(np.mean(pair.local_right)), 4),
        "cloud_accuracy": round(float(np.mean(pair.cloud_right)), 4),
        "confidence_mean": round(float(np.mean(pair.confidence)), 4),
    }
