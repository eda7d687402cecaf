"""The policy with the gain that was measured for the pair of models at hand."""

from __future__ import annotations

from edge_runtime.gain import GainLookup
from edge_runtime.policies.base import Policy
from edge_runtime.policies.gain import GainPrior, TakesGain

__all__ = ["Calibrated"]


class Calibrated:
    """Hands out the policy as it is, or with the measured gain, by cloud model.

    A policy whose caller gave it a gain keeps that. One request keeps one policy. Safe in any
    thread.
    """

    def __init__(self, policy: Policy, lookup: GainLookup | None) -> None:
        self.policy = policy
        self._lookup = lookup if isinstance(policy, TakesGain) and policy.gain_is_prior else None
        self._made: dict[str | None, Policy] = {}

    def now(self, cloud_sha256: str | None) -> tuple[Policy, str | None]:
        """The policy, and where its gain comes from: a code of ``GAIN_REASONS``, or None."""
        if self._lookup is None:
            return self.policy, None
        gain, reason = self._lookup.of(cloud_sha256)
        policy = self.policy
        if isinstance(gain, GainPrior) or not isinstance(policy, TakesGain):
            return policy, reason
        made = self._made.get(cloud_sha256)
        if made is None:  # two threads may make it: equal ones, and one stays
            made = self._made.setdefault(cloud_sha256, policy.with_gain(gain))
        return made, reason
