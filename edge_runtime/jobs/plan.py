"""Where a job runs: the policy is asked as for an image with the longest deadline there is."""

from __future__ import annotations

import msgspec

from edge_runtime.contract.errors import ConfigError
from edge_runtime.engine import Engine
from edge_runtime.observation import Asked, observe
from edge_runtime.policies.base import Action, Decision, Situation

__all__ = ["Plan", "in_cloud", "plan"]


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """A decision, what it was made from, and what it means for a job."""

    decision: Decision
    situation: Situation

    @property
    def on_device(self) -> bool:
        """It runs here, or here first."""
        return self.decision.action in (Action.LOCAL, Action.CASCADE)


def plan(engine: Engine, asked: Asked, confidence: float | None = None) -> Plan:
    """Decide once; with ``confidence``, after a local run. Raises ``ConfigError``."""
    uplink = engine.uplink
    policy, gain_reason = engine.policies.now(None if uplink is None else uplink.model_sha256)
    situation, _ = observe(
        engine,
        asked,
        confidence=confidence,
        ticket=None,
        upload=None,
        answered=False,
        gain_reason=gain_reason,
    )
    if engine.local is None:
        if uplink is None or asked.private:
            raise engine.local_error or ConfigError(
                "there is neither a local model nor a broker for this job: pass broker=, or use "
                "a policy that runs on the device"
            )
        return Plan(
            decision=Decision(action=Action.CLOUD_ONLY, reason="no_local_model"),
            situation=situation,
        )
    if uplink is None or asked.private:
        reason = "private" if asked.private else "no_broker"
        return Plan(decision=Decision(action=Action.LOCAL, reason=reason), situation=situation)
    return Plan(decision=policy.decide(situation), situation=situation)


def in_cloud(engine: Engine, asked: Asked, reason: str) -> Plan:
    """In the cloud whatever the policy says: the app asked for that."""
    situation, _ = observe(
        engine,
        asked,
        confidence=None,
        ticket=None,
        upload=None,
        answered=False,
        gain_reason=None,
    )
    return Plan(decision=Decision(action=Action.CLOUD_ONLY, reason=reason), situation=situation)
