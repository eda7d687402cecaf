"""Find a policy by name in the entry-point group ``nearfar.policies``."""

from __future__ import annotations

import re
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

    ``Cascade(0.7)`` gives the policy ``Cascade`` its one number. Two entry points of one name
    are a programming error and refused.
    """
    with_number = re.fullmatch(r"(.+)\(([0-9]{1,6}(?:\.[0-9]{1,6})?)\)", name)
    arguments = () if with_number is None else (float(with_number[2]),)
    points = entry_points(group=_GROUP, name=name if with_number is None else with_number[1])
    found = {point.value: point for point in points}
    if not found:
        raise ConfigError(f"no policy {name!r}; there are: {', '.join(policy_names())}")
    if len(found) > 1:
        raise ConfigError(f"two packages register the policy {name!r}: {', '.join(sorted(found))}")
    (point,) = found.values()
    try:
        policy = point.load()(*arguments)
    except (AttributeError, TypeError, ValueError) as error:
        raise ConfigError(f"no policy {name!r}: {error}") from None
    if not isinstance(policy, Policy):
        raise ConfigError(
            f"{point.value} is no Policy: it needs name, uses_local, uses_cloud, "
            "prewarms and decide(situation)"
        )
    return policy
