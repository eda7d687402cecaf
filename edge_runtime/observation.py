"""From what a runtime has measured to the ``Situation`` that a policy decides from."""

from __future__ import annotations

import math
import time

import msgspec

from edge_runtime.conditions import Conditions, read_conditions, read_network_id
from edge_runtime.engine import Engine
from edge_runtime.estimators.transfer import wire_bytes
from edge_runtime.local import LocalAnswer
from edge_runtime.local_queue import Ticket
from edge_runtime.offload.transport import UploadReceipt
from edge_runtime.photo import Photo
from edge_runtime.policies.base import LinkOutlook, Situation, UploadProgress
from edge_runtime.seed import Seed

__all__ = ["Asked", "OwnUpload", "observe"]


class Asked(msgspec.Struct, frozen=True, kw_only=True):
    """One request as its caller made it; times on ``time.monotonic``."""

    image: Photo | Seed
    started_s: float
    deadline_ms: float
    answer_by_s: float
    """When a held answer has to leave."""
    private: bool

    @property
    def deadline_s(self) -> float:
        """The deadline itself."""
        return self.started_s + self.deadline_ms / 1e3


class OwnUpload:
    """A request's upload, from the moment it is handed to the network."""

    def __init__(self, body_bytes: int, now_s: float, link: LinkOutlook | None) -> None:
        self.body_bytes = body_bytes
        self.submitted_s = now_s
        self.receipt = UploadReceipt()
        self.features: tuple[float, ...] = ()
        self.predicted_ms: float | None = None
        self._setup_s = 0.0
        if link is not None:
            self._setup_s = (link.promotion_ms + link.setup_round_trips * link.rtt_ms) / 1e3

    def progress(self, link: LinkOutlook, now_s: float, *, answered: bool) -> UploadProgress:
        """How far it came: as acknowledged, or over plain HTTP as far as the rate predicts."""
        receipt, elapsed_s = self.receipt, now_s - self.submitted_s
        if receipt.multiplexed:
            sending, acknowledged = receipt.sent_bytes > 0, float(receipt.received_bytes)
        else:
            sent_s = elapsed_s - self._setup_s - link.rtt_ms / 1e3
            sending = elapsed_s > self._setup_s
            rate = math.exp(min(link.log_rate_mean, 25.0))
            acknowledged = min(max(0.0, sent_s * rate), float(self.body_bytes))
        return UploadProgress(
            elapsed_ms=elapsed_s * 1e3,
            wire_bytes=wire_bytes(self.body_bytes),
            acknowledged_bytes=acknowledged,
            sending=sending,
            answered=answered,
        )


def observe(
    engine: Engine,
    asked: Asked,
    *,
    confidence: float | None,
    ticket: Ticket[LocalAnswer] | None,
    upload: OwnUpload | None,
    answered: bool,
    gain_reason: str | None,
) -> tuple[Situation, Conditions]:
    """The situation now.

    ``ticket``: of the request's local run, once it was submitted. ``upload``: under way, or
    ``answered`` and held.
    """
    now_s = time.monotonic()
    conditions = read_conditions(engine.conditions)
    link = cloud = progress = None
    if engine.uplink is not None:
        own_bytes = 0 if upload is None or answered else upload.body_bytes
        link, cloud = engine.uplink.outlook(
            conditions.link_type, own_bytes, read_network_id(engine.conditions)
        )
        if upload is not None:
            progress = upload.progress(link, now_s, answered=answered)
    arrivals, memory, budgets = engine.history.snapshot()
    local = engine.local
    situation = Situation(
        upload_bytes=asked.image.upload_bytes,
        deadline_ms=asked.deadline_ms,
        time_left_ms=(asked.answer_by_s - now_s) * 1e3,
        local=None if local is None else local.outlook(asked.answer_by_s, ticket, id(asked)),
        link=link,
        cloud=cloud,
        confidence=confidence,
        scored=local is None or local.scored,
        private=asked.private,
        conditions=conditions,
        prices=engine.prices,
        budgets=budgets,
        gain_reason=gain_reason,
        upload=progress,
        arrivals=arrivals,
        memory=memory,
    )
    return situation, conditions
