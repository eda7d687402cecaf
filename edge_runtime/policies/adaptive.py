"""ADAPTIVE: answer on the device, hold it, and ask the cloud when that is worth its price.

With local confidence ``c`` and a time left ``t``, upload exactly when

    g(c) * P(T_cloud <= t) > price,     g(c) = max(0, P(cloud right | c) - c)

The local answer is held meanwhile, so a wrong guess costs bytes and never the answer. Where
answers carry no score (an image has none), ``GainPrior.local_right`` stands for ``c``, and
nothing is won by waiting for the local answer first.
"""

from __future__ import annotations

import msgspec

from edge_runtime.policies.base import (
    Action,
    CloudOutlook,
    Decision,
    InferenceMode,
    LinkOutlook,
    LocalOutlook,
    Situation,
    cloud_obstacle,
)
from edge_runtime.policies.forecast import Forecast, forecast

__all__ = ["Adaptive", "GainPrior"]

_CONFIDENCE_NODES = (0.232, 0.445, 0.594, 0.711, 0.807, 0.885, 0.946, 0.989)
"""Mid-quantiles of Beta(1.6, 0.69), a typical spread of a small classifier's confidence;
each stands for one eighth of the images whose confidence is not yet known."""


class GainPrior(msgspec.Struct, frozen=True, kw_only=True):
    """How often the cloud model is right, given whether the local one is.

    The defaults describe a compact and a full-size ImageNet classifier (72 % and 81 % right
    on the same photos); measure your own pair where you can. ``c`` is taken to be
    calibrated: the local model is right in a share ``c`` of the images it gives ``c``.
    """

    cloud_right_if_local_right: float = 0.95
    cloud_right_if_local_wrong: float = 0.48
    local_right: float = 0.72
    """Taken for ``c`` where answers carry no score: that compact classifier's share."""

    def signed(self, confidence: float) -> float:
        """P(cloud right | c) - c: below zero where the local answer is the better one."""
        c = min(max(confidence, 0.0), 1.0)
        cloud = self.cloud_right_if_local_right * c + self.cloud_right_if_local_wrong * (1.0 - c)
        return cloud - c

    def gain(self, confidence: float) -> float:
        """g(c): right answers won per image by taking the cloud's answer where it is better."""
        return max(0.0, self.signed(confidence))


class Adaptive:
    """Expected gain against price, with the cold path priced in."""

    name = InferenceMode.ADAPTIVE.value
    uses_local = True
    uses_cloud = True
    prewarms = True

    def __init__(self, gain: GainPrior | None = None) -> None:
        self.gain = gain or GainPrior()

    def decide(self, situation: Situation) -> Decision:
        """First CASCADE or HEDGED; then CASCADE (upload) or LOCAL.

        HEDGED or LOCAL where answers carry no score; CLOUD_ONLY without a local model.
        """
        local, link, cloud = situation.local, situation.link, situation.cloud
        obstacle = cloud_obstacle(situation)
        if local is None:
            return Decision(action=Action.CLOUD_ONLY, reason="no_local_model")
        if obstacle is not None or link is None or cloud is None:
            return Decision(
                action=Action.LOCAL,
                reason=obstacle or "no_broker",
                predicted_local_ms=local.queue_wait_ms + local.p50_ms,
            )
        if not situation.scored:
            return self._by_prior(situation, local, link, cloud)
        if situation.confidence is None:
            return self._before(situation, local, link, cloud)
        return self._after(situation, situation.confidence, link, cloud)

    def _after(
        self, situation: Situation, confidence: float, link: LinkOutlook, cloud: CloudOutlook
    ) -> Decision:
        """The local answer is held; is the cloud's worth its price?"""
        outlook = forecast(link, cloud, situation.upload_bytes, situation.time_left_ms)
        price = _price(situation, outlook)
        gain = self.gain.gain(confidence)
        expected = gain * outlook.p_in_time
        if expected > price:
            return _decision(Action.CASCADE, "gain_above_price", outlook, expected, price)
        if gain <= _price(situation, None):
            return _decision(Action.LOCAL, "confident", outlook, expected, price)
        decision = _decision(Action.LOCAL, "cloud_too_late", outlook, expected, price)
        warm = forecast(link, cloud, situation.upload_bytes, situation.time_left_ms, warm=True)
        pays = gain * warm.p_in_time > _price(situation, warm)
        return _with_warm_up(decision, situation, pays)

    def _by_prior(
        self, situation: Situation, local: LocalOutlook, link: LinkOutlook, cloud: CloudOutlook
    ) -> Decision:
        """No score will come: both sides at once, or the device alone."""
        local_ms = local.queue_wait_ms + local.p50_ms
        size, left_ms = situation.upload_bytes, situation.time_left_ms
        now = forecast(link, cloud, size, left_ms)
        price = _price(situation, now)
        gain = self.gain.gain(self.gain.local_right)
        expected = gain * now.p_in_time
        if expected > price:
            return _decision(
                Action.HEDGED, "prior_gain_above_price", now, expected, price, local_ms
            )
        if gain <= _price(situation, None):
            return _decision(Action.LOCAL, "prior_gain_below_price", now, expected, price, local_ms)
        decision = _decision(Action.LOCAL, "cloud_too_late", now, expected, price, local_ms)
        warm = forecast(link, cloud, size, left_ms, warm=True)
        return _with_warm_up(decision, situation, gain * warm.p_in_time > _price(situation, warm))

    def _before(
        self, situation: Situation, local: LocalOutlook, link: LinkOutlook, cloud: CloudOutlook
    ) -> Decision:
        """Nothing has run yet: wait for the confidence, or start both sides at once?"""
        local_ms = local.queue_wait_ms + local.p50_ms
        size, left_ms = situation.upload_bytes, situation.time_left_ms
        now = forecast(link, cloud, size, left_ms)
        price = _price(situation, now)
        later = forecast(link, cloud, size, left_ms - local_ms)
        hedged = self._mean_gain() * now.p_in_time - price
        cascade = self._cascade_value(later.p_in_time, price)
        if hedged > cascade and hedged > 0:
            expected = hedged + price
            return _decision(Action.HEDGED, "hedge_pays", now, expected, price, local_ms)
        if cascade > 0:
            return _decision(
                Action.CASCADE, "ask_after_local", later, cascade + price, price, local_ms
            )
        decision = _decision(Action.LOCAL, "cloud_too_late", later, 0.0, price, local_ms)
        warm = forecast(link, cloud, size, left_ms - local_ms, warm=True)
        pays = self._cascade_value(warm.p_in_time, _price(situation, warm)) > 0
        return _with_warm_up(decision, situation, pays)

    def _mean_gain(self) -> float:
        signed = [self.gain.signed(confidence) for confidence in _CONFIDENCE_NODES]
        return sum(signed) / len(signed)

    def _cascade_value(self, p_in_time: float, price: float) -> float:
        """E_c[max(0, g(c) p - price)]: what the option to upload later is worth."""
        values = [max(0.0, self.gain.gain(c) * p_in_time - price) for c in _CONFIDENCE_NODES]
        return sum(values) / len(values)


def _price(situation: Situation, outlook: Forecast | None) -> float:
    """What an upload costs; without an outlook, what it costs on a link without delay."""
    spare = situation.conditions.metered is True or situation.conditions.data_saver is True
    wait_ms = 0.0 if outlook is None else outlook.cloud_ms
    return situation.prices.upload(situation.upload_bytes, wait_ms, metered=spare)


def _decision(
    action: Action,
    reason: str,
    outlook: Forecast,
    expected_gain: float,
    price: float,
    predicted_local_ms: float | None = None,
) -> Decision:
    return Decision(
        action=action,
        reason=reason,
        p_cloud_in_deadline=outlook.p_in_time,
        predicted_local_ms=predicted_local_ms,
        predicted_cloud_ms=outlook.cloud_ms,
        predicted_upload_ms=outlook.upload_ms,
        expected_gain=expected_gain,
        price=price,
    )


def _with_warm_up(decision: Decision, situation: Situation, pays_when_warm: bool) -> Decision:
    """A cold connection alone must not keep the cloud out for ever: open it for next time."""
    if pays_when_warm and situation.conditions.data_saver is not True:
        return msgspec.structs.replace(decision, reason="connection_cold", warm_up=True)
    return decision
