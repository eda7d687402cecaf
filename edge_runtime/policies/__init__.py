"""Policies: pure functions from a ``Situation`` to a ``Decision``."""

from edge_runtime.policies.base import (
    Action,
    CloudOutlook,
    Decision,
    InferenceMode,
    LinkOutlook,
    LocalOutlook,
    Policy,
    Prices,
    Situation,
)
from edge_runtime.policies.registry import find_policy, policy_names

__all__ = [
    "Action",
    "CloudOutlook",
    "Decision",
    "InferenceMode",
    "LinkOutlook",
    "LocalOutlook",
    "Policy",
    "Prices",
    "Situation",
    "find_policy",
    "policy_names",
]
