"""Policies that fix one action, or one threshold, for good."""

from __future__ import annotations

import msgspec

from edge_runtime.policies.base import Action, Decision, Situation
from edge_runtime.policies.constraints import cloud_obstacle

__all__ = [
    "BandwidthThreshold",
    "Cascade",
    "CloudOnly",
    "Hedged",
    "HedgingPolicy",
    "LocalOnly",
    "RetryThrottling",
]


def local_ms(situation: Situation) -> float | None:
    """Queue and run, median."""
    local = situation.local
    return None if local is None else local.queue_wait_ms + local.p50_ms


def stay_local(situation: Situation, reason: str) -> Decision:
    """LOCAL, or CLOUD_ONLY where there is no local model."""
    if situation.local is None:
        return Decision(action=Action.CLOUD_ONLY, reason="no_local_model")
    return Decision(action=Action.LOCAL, reason=reason, predicted_local_ms=local_ms(situation))


class LocalOnly:
    """The device answers everything."""

    name = "LocalOnly"
    uses_local = True
    uses_cloud = False
    prewarms = False

    def decide(self, situation: Situation) -> Decision:
        """LOCAL, always."""
        return stay_local(situation, "only_on_device")


class CloudOnly:
    """The cloud answers everything."""

    name = "CloudOnly"
    uses_local = False
    uses_cloud = True
    prewarms = True

    def decide(self, situation: Situation) -> Decision:
        """CLOUD_ONLY, always."""
        return Decision(action=Action.CLOUD_ONLY, reason="only_in_cloud")


class BandwidthThreshold:
    """The cloud when the last measured rate is above a fixed one."""

    uses_local = True
    uses_cloud = True
    prewarms = True
    learns = True

    def __init__(self, mbps: float = 5.0) -> None:
        self.mbps = mbps
        self.name = "BandwidthThreshold"

    def decide(self, situation: Situation) -> Decision:
        """CLOUD_ONLY above the threshold, LOCAL below; unknown rates are not above."""
        obstacle = cloud_obstacle(situation)
        if obstacle is not None:
            return stay_local(situation, obstacle)
        memory = situation.memory
        rate = None if memory is None or not memory.throughputs else memory.throughputs[-1]
        if rate is None or rate * 8e-6 <= self.mbps:
            return stay_local(situation, "rate_below_threshold")
        return Decision(action=Action.CLOUD_ONLY, reason="rate_above_threshold")


class RetryThrottling(msgspec.Struct, frozen=True, kw_only=True):
    """gRPC A6: hedge only while more than half of the tokens are left."""

    max_tokens: float = 10.0
    token_ratio: float = 0.1


class HedgingPolicy(msgspec.Struct, frozen=True, kw_only=True):
    """The fields of gRPC A6. The device is the first attempt, the cloud the second.

    ``non_fatal_status_codes``: refusals after which the held answer is still waited for;
    with one other attempt, all are.
    """

    hedging_delay_ms: float = 0.0
    max_attempts: int = 2
    non_fatal_status_codes: tuple[str, ...] = ("UNAVAILABLE", "DEADLINE_EXCEEDED")
    retry_throttling: RetryThrottling | None = None


class Hedged:
    """Both at once (Dean and Barroso, CACM 2013); the cloud's answer is taken when in time."""

    name = "Hedged"
    uses_local = True
    uses_cloud = True
    prewarms = True
    learns = True

    def __init__(self, policy: HedgingPolicy | None = None) -> None:
        self.policy = policy or HedgingPolicy()

    def decide(self, situation: Situation) -> Decision:
        """HEDGED, unless throttled, barred or without a second attempt."""
        obstacle = cloud_obstacle(situation)
        if obstacle is not None or self.policy.max_attempts < 2:
            return stay_local(situation, obstacle or "only_on_device")
        throttling, memory = self.policy.retry_throttling, situation.memory
        if (
            throttling is not None
            and memory is not None
            and (memory.tokens <= throttling.max_tokens / 2)
        ):
            return stay_local(situation, "throttled")
        return Decision(
            action=Action.HEDGED,
            reason="hedge_always",
            predicted_local_ms=local_ms(situation),
            cloud_start_ms=self.policy.hedging_delay_ms,
        )


class Cascade:
    """The local answer first; the cloud where its confidence is below ``theta``."""

    uses_local = True
    uses_cloud = True
    prewarms = True

    def __init__(self, theta: float = 0.9) -> None:
        if not 0.0 <= theta <= 1.0:
            raise ValueError("theta is a confidence: 0 to 1")
        self.theta = theta
        self.name = f"Cascade({theta:g})"

    def decide(self, situation: Situation) -> Decision:
        """CASCADE first; then CASCADE (upload) below the threshold, LOCAL above."""
        obstacle = cloud_obstacle(situation)
        if obstacle is not None or situation.local is None:
            return stay_local(situation, obstacle or "no_local_model")
        confidence = situation.confidence
        if confidence is not None and confidence >= self.theta:
            return stay_local(situation, "confident")
        reason = "ask_after_local" if confidence is None else "confidence_below_threshold"
        return Decision(
            action=Action.CASCADE, reason=reason, predicted_local_ms=local_ms(situation)
        )
