"""Reason codes of the built-in policies, each with a sentence.

A code that is not here belongs to a policy of somebody else, or is the ``code`` of the
error (``contract/errors.py``) that keeps the broker from being asked for some seconds.
"""

from __future__ import annotations

from types import MappingProxyType

__all__ = ["REASONS", "sentence"]

REASONS = MappingProxyType(
    {
        "only_on_device": "the mode says so",
        "prefer_on_device": "the mode says so",
        "prefer_in_cloud": "the mode says so",
        "only_in_cloud": "the mode says so",
        "private": "the image is private",
        "no_broker": "no broker is configured",
        "offline": "the device is offline",
        "circuit_open": "the broker failed repeatedly and is left alone for now",
        "no_local_model": "no local model could be loaded",
        "local_failed": "the local model failed",
        "ask_after_local": "the local answer comes first and may need a second opinion",
        "hedge_pays": "waiting for the local answer would cost the cloud's",
        "gain_above_price": "the cloud's answer is worth more than its price",
        "prior_gain_above_price": "answers of this task carry no score; what the cloud usually "
        "gains is worth its price",
        "prior_gain_below_price": "answers of this task carry no score; what the cloud usually "
        "gains is not worth its price",
        "confident": "the local answer is sure enough",
        "cloud_too_late": "a cloud answer in time is too unlikely for its price",
        "cloud_before_local": "the cloud should answer before the device; the local run waits",
        "cloud_better": "both answers are there, and the cloud's is the likelier one",
        "metered_budget_spent": "the budget for metered uploads is spent",
        "saver_budget_spent": "the budget for uploads under data saver is spent",
        "battery_low": "the battery is below the limit for uploads",
        "too_hot": "the device is hotter than uploads are allowed at",
        "price_too_high": "the broker charges more than the limit",
        "hedge_always": "the policy always asks both",
        "throttled": "too many attempts failed; the tokens for hedging are used up",
        "confidence_below_threshold": "the local answer is below the policy's threshold",
        "rate_above_threshold": "the last upload was faster than the policy's threshold",
        "rate_below_threshold": "the last upload was slower than the policy's threshold",
        "predicted_better": "the policy predicts the cloud to be the better side",
        "predicted_worse": "the policy predicts the device to be the better side",
        "deferred": "the app deferred it until the device is well connected",
        "network_remembered": "the link is believed to be as this network was earlier",
        "network_new": "this network was not met before",
        "memory_unreadable": "what earlier runs learned could not be read and is left aside",
        "connection_cold": "the connection is not open yet; it is being opened for the next image",
    }
)


def sentence(reason: str) -> str:
    """Why, for people."""
    return REASONS.get(reason, f"the broker cannot be asked for now ({reason})")
