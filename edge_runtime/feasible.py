"""A policy's decision, kept within what a request and its runtime can do at all."""

from __future__ import annotations

import msgspec

from edge_runtime.contract.errors import ConfigError
from edge_runtime.engine import Engine
from edge_runtime.policies.base import Action, Decision, Situation

__all__ = ["feasible"]


def feasible(decision: Decision, situation: Situation, engine: Engine) -> Decision:
    """The decision itself, or the nearest one that this request allows.

    Raises ``ConfigError`` where ``decision`` is none, and why there is no local model where
    nothing else could answer.
    """
    if not isinstance(decision, Decision):
        raise ConfigError(f"the policy {engine.policy.name} gave no Decision")
    no_cloud = situation.cloud is None or situation.private
    if decision.action is not Action.LOCAL and no_cloud:
        if situation.local is None:
            raise engine.local_error or ConfigError(
                "there is neither a local model nor a broker: pass broker=, or use a "
                "policy that runs on the device"
            )
        reason = "private" if situation.private else "no_broker"
        return Decision(
            action=Action.LOCAL, reason=reason, predicted_local_ms=decision.predicted_local_ms
        )
    if decision.action is not Action.CLOUD_ONLY and situation.local is None:
        if no_cloud:
            raise engine.local_error or ConfigError("there is no local model")
        return msgspec.structs.replace(decision, action=Action.CLOUD_ONLY, reason="no_local_model")
    return decision
