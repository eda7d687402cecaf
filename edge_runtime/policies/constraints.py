"""What comes before any utility: limits that no expected gain outweighs.

Pure. The order is that of the checks below; the first one that fails names the reason.
"""

from __future__ import annotations

from typing import Final

from edge_runtime.policies.base import Situation

__all__ = ["cloud_obstacle", "may_warm_up", "must_ask"]

_HEAT: Final = {"unknown": 0, "nominal": 0, "fair": 1, "serious": 2, "critical": 3}


def cloud_obstacle(situation: Situation) -> str | None:
    """The reason code for which the cloud cannot be asked at all; None: it can."""
    if situation.private:
        return "private"
    if situation.cloud is None or situation.link is None:
        return "no_broker"
    if situation.conditions.link_type == "none":
        return "offline"
    if situation.cloud.breaker != "CLOSED":
        return "circuit_open"
    if situation.cloud.obstacle is not None:
        return situation.cloud.obstacle
    return _over_budget(situation)


def _over_budget(situation: Situation) -> str | None:
    budgets, conditions = situation.budgets, situation.conditions
    size = situation.upload_bytes
    if conditions.metered is True and _lacks(budgets.metered_bytes_left, size):
        return "metered_budget_spent"
    if conditions.data_saver is True and _lacks(budgets.saver_bytes_left, size):
        return "saver_budget_spent"
    floor = budgets.min_battery_percent
    battery = conditions.battery_percent
    if (
        floor is not None
        and battery is not None
        and battery < floor
        and conditions.charging is not True
    ):
        return "battery_low"
    if budgets.max_thermal is not None and (_HEAT[conditions.thermal] > _HEAT[budgets.max_thermal]):
        return "too_hot"
    price, most = situation.cloud_price_microusd, budgets.max_price_microusd
    if price is not None and most is not None and price > most:
        return "price_too_high"
    return None


def _lacks(left_bytes: float | None, size_bytes: float) -> bool:
    return left_bytes is not None and left_bytes < size_bytes


def must_ask(situation: Situation) -> bool:
    """The local answer is known and below the accuracy that the caller insists on."""
    least, confidence = situation.budgets.min_confidence, situation.confidence
    return least is not None and confidence is not None and confidence < least


def may_warm_up(situation: Situation) -> bool:
    """Whether a connection may be opened for later requests."""
    return situation.conditions.data_saver is not True and not (
        situation.conditions.metered is True and situation.budgets.metered_bytes_left is not None
    )
