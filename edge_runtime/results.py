"""What ``EdgeRuntime`` gives back: answers and its own state, as frozen structs."""

from __future__ import annotations

from enum import StrEnum

import msgspec

from edge_runtime.conditions import Conditions
from edge_runtime.contract.tasks import Prediction
from edge_runtime.contract.wire import ModelRef
from edge_runtime.policies.base import BreakerState, Decision, Situation

__all__ = [
    "BrokerStatus",
    "Counts",
    "InferenceSource",
    "Measured",
    "Result",
    "Status",
    "Timings",
    "VariantStatus",
]


class InferenceSource(StrEnum):
    """Which side answered."""

    ON_DEVICE = "ON_DEVICE"
    IN_CLOUD = "IN_CLOUD"


class Timings(msgspec.Struct, frozen=True, kw_only=True):
    """Milliseconds; None: did not happen, or not known."""

    total_ms: float
    """From the call to the answer."""
    local_wait_ms: float | None = None
    local_ms: float | None = None
    """Decode, pre-processing, model, post-processing."""
    cloud_ms: float | None = None
    """From the start of the offload to its answer."""
    upload_ms: float | None = None
    """What the broker took to read the body (``Server-Timing: recv``)."""
    server_queue_ms: float | None = None
    server_inference_ms: float | None = None


class Result(msgspec.Struct, frozen=True, kw_only=True):
    """One answered image."""

    label: str
    """Of the first prediction."""
    score: float
    predictions: tuple[Prediction, ...]
    """Best first."""
    inference_source: InferenceSource
    model: str | ModelRef
    """The variant's id, or which cloud model answered."""
    deadline_met: bool
    timings: Timings
    decision: Decision
    """The last one made for this image: after a cascade, the one that knew the confidence."""
    situation: Situation
    """What that decision was made from."""
    error: str | None = None
    """Code of the side that was tried and failed while the other one answered."""


class Measured(msgspec.Struct, frozen=True, kw_only=True):
    """One variant that was loaded and timed, or why it could not be."""

    variant: str
    p50_ms: float | None = None
    p95_ms: float | None = None
    error: str | None = None


class VariantStatus(msgspec.Struct, frozen=True, kw_only=True):
    """The local model."""

    variant: str
    format: str
    precision: str
    reason: str
    """Why this one."""
    measured: tuple[Measured, ...]
    """In the order tried."""
    p50_ms: float
    p95_ms: float
    pending: int
    """Images waiting for the local model or in it."""


class BrokerStatus(msgspec.Struct, frozen=True, kw_only=True):
    """The way to the broker, and the broker."""

    model: str | None
    """The cloud model in use; None: not yet found."""
    breaker: BreakerState
    obstacle: str | None
    last_error: str | None
    connection_open: bool
    rate_bytes_per_s: float
    """Median of the belief about the upload rate."""
    rate_log_deviation: float
    rate_samples: int
    rtt_ms: float
    rtt_samples: int
    queue_ms: float
    inference_ms: float


class Counts(msgspec.Struct, frozen=True, kw_only=True):
    """Since the runtime was made."""

    requests: int = 0
    on_device: int = 0
    in_cloud: int = 0
    failed: int = 0
    """Ended in an error."""
    deadline_missed: int = 0
    uploads: int = 0
    """Uploads started, whether or not their answer came in time."""
    uploaded_bytes: int = 0
    """Bodies of these."""


class Status(msgspec.Struct, frozen=True, kw_only=True):
    """A snapshot of one ``EdgeRuntime``."""

    bundle: str
    policy: str
    closed: bool
    variant: VariantStatus | None
    """None: the policy uses no local model, or none could be loaded."""
    variant_error: str | None
    """Why no local model could be loaded."""
    broker: BrokerStatus | None
    conditions: Conditions
    counts: Counts
