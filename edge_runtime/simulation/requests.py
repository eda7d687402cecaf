"""One simulated request: its live state while it runs, and what became of it."""

from __future__ import annotations

import math

from edge_runtime.policies.base import Decision
from edge_runtime.simulation.records import ACTION_CODES
from edge_runtime.simulation.transport import Upload

__all__ = ["Outcome", "Request"]


class Outcome:
    """What became of one request."""

    __slots__ = (
        "action",
        "answer_s",
        "cloud_in_time",
        "decision_s",
        "decisions",
        "from_cloud",
        "offloaded",
        "p_cloud",
        "uploaded_bytes",
        "wasted_bytes",
    )

    def __init__(self) -> None:
        self.answer_s = math.inf
        self.from_cloud = False
        self.offloaded = False
        self.uploaded_bytes = 0.0
        self.wasted_bytes = 0.0
        self.p_cloud = math.nan
        self.cloud_in_time = False
        self.decision_s = 0.0
        self.decisions = 0
        self.action = ACTION_CODES["LOCAL"]


class Request:
    """Live state of one request."""

    __slots__ = (
        "answer_by_s",
        "arrived_s",
        "cloud_held",
        "cloud_over",
        "cut",
        "decision",
        "done",
        "features",
        "held",
        "index",
        "local_submitted",
        "outcome",
        "over_session",
        "plan",
        "predicted_ms",
        "seen",
        "submitted_s",
        "version",
    )

    def __init__(self, index: int, arrived_s: float, deadline_s: float) -> None:
        self.index = index
        self.arrived_s = arrived_s
        self.answer_by_s = arrived_s + deadline_s
        self.outcome = Outcome()
        self.decision: Decision
        self.done = False
        self.held = False
        self.local_submitted = False
        self.plan: Upload | None = None
        self.submitted_s = math.inf
        self.version = 0
        self.cut = False
        self.cloud_over = False
        self.cloud_held = False
        self.over_session = True
        """Its upload shares the session, which outlives it."""
        self.features: tuple[float, ...] = ()
        self.predicted_ms: float | None = None
        self.seen = (0.0, 0.0)
        """When progress was last looked at, and the bytes acknowledged by then."""
