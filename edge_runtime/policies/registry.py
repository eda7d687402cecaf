"""Find a policy by name in the entry-point group ``nearfar.policies``."""

from __future__ import annotations

from importlib.metadata import entry_points

from edge_runtime.contract.errors import ConfigError
from edge_runtime.policies.base import Policy

__all__ = ["find_policy", "policy_names"]

_GROUP = "nearfar.policies"


def policy_names() -> tuple[str, ...]:
    """Every registered name, sorted."""
    return tuple(sorted({point.name for point in entry_points(group=_GROUP)}))


def find_policy(name: str) -> Policy:
    """A new policy of this name. Raises ``ConfigError`` naming the ones there are.

    Two entry points of one name are a programming error and refused.
    """
    points = entry_points(group=_GROUP, name=name)
    found = {point.value: point for point in points}
    if not found:
        raise ConfigError(f"no policy {name!r}; there are: {', '.join(policy_names())}")
    if len(found) > 1:
        raise ConfigError(f"two packages register the policy {name!r}: {', '.join(sorted(found))}")
    (point,) = found.values()
    policy = point.load()()
    if not isinstance(policy, Policy):
        raise ConfigError(
            f"{point.value} is no Policy: it needs name, uses_local, uses_cloud, "
            "prewarms and decide(situation)"
        )
    return policy
