"""From records to figures: what a mode achieved."""

from __future__ import annotations

import math
from collections.abc import Sequence

import msgspec

from edge_runtime.demo.records import DeviceEnd, RequestRecord
from edge_runtime.results import InferenceSource

__all__ = ["ModeScore", "percentile", "score"]


class ModeScore(msgspec.Struct, frozen=True, kw_only=True):
    """One mode's figures. Shares are of its requests, milliseconds of its answers."""

    requests: int
    answered: int
    """Requests that got an answer, in time or late, right or wrong; an error is none."""
    accuracy_in_deadline: float
    """Right and within the deadline."""
    accuracy: float
    """Right, however late."""
    in_deadline_share: float
    """Answered within the deadline, right or wrong."""
    p50_ms: float | None
    p95_ms: float | None
    """None: no answer came."""
    max_ms: float | None
    offloaded_share: float
    """Photos whose upload was started."""
    in_cloud_share: float
    """Answered by the cloud model."""
    uploaded_bytes: int
    """Crossed the uplink, connections and headers included; counted by the relay."""
    downloaded_bytes: int
    variant: str | None
    """The local variant in use."""
    seconds: float


def percentile(values: Sequence[float], share: float) -> float | None:
    """Nearest-rank percentile: the least value with at least ``share`` at or below it."""
    if not values:
        return None
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def score(
    records: Sequence[RequestRecord],
    end: DeviceEnd,
    *,
    deadline_ms: float,
    variant: str | None,
    seconds: float,
) -> ModeScore:
    """The figures of one mode."""
    count = len(records)
    answers = [record for record in records if record.answered]
    in_time = [record for record in answers if record.latency_ms <= deadline_ms]
    latencies = [record.latency_ms for record in answers]
    return ModeScore(
        requests=count,
        answered=len(answers),
        accuracy_in_deadline=sum(record.right for record in in_time) / count,
        accuracy=sum(record.right for record in answers) / count,
        in_deadline_share=len(in_time) / count,
        p50_ms=percentile(latencies, 0.5),
        p95_ms=percentile(latencies, 0.95),
        max_ms=max(latencies, default=None),
        offloaded_share=sum(record.upload_started for record in records) / count,
        in_cloud_share=sum(record.source is InferenceSource.IN_CLOUD for record in records) / count,
        uploaded_bytes=end.uploaded_bytes,
        downloaded_bytes=end.downloaded_bytes,
        variant=variant,
        seconds=seconds,
    )
