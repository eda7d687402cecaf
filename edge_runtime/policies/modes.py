"""The four inference modes of Firebase AI Logic."""

from __future__ import annotations

import msgspec

from edge_runtime.policies.base import Action, Decision, InferenceMode, Situation
from edge_runtime.policies.constraints import cloud_obstacle
from edge_runtime.policies.forecast import forecast

__all__ = ["OnlyInCloud", "OnlyOnDevice", "PreferInCloud", "PreferOnDevice"]

_LATE_START_MARGIN_MS = 20.0


def _predict(situation: Situation, action: Action, reason: str) -> Decision:
    """A decision with the numbers filled in, though they did not lead to it."""
    local, link, cloud = situation.local, situation.link, situation.cloud
    predicted_local_ms = None if local is None else local.queue_wait_ms + local.p50_ms
    if link is None or cloud is None or situation.private:
        return Decision(action=action, reason=reason, predicted_local_ms=predicted_local_ms)
    outlook = forecast(link, cloud, situation.upload_bytes, situation.time_left_ms)
    return Decision(
        action=action,
        reason=reason,
        p_cloud_in_deadline=outlook.p_in_time,
        predicted_local_ms=predicted_local_ms,
        predicted_cloud_ms=outlook.cloud_ms,
        predicted_upload_ms=outlook.upload_ms,
        price=situation.prices.upload(
            situation.upload_bytes,
            outlook.cloud_ms,
            metered=situation.conditions.metered is True,
        ),
    )


class OnlyOnDevice:
    """ONLY_ON_DEVICE: never opens a socket."""

    name = InferenceMode.ONLY_ON_DEVICE.value
    uses_local = True
    uses_cloud = False
    prewarms = False

    def decide(self, situation: Situation) -> Decision:
        """LOCAL, always."""
        return _predict(situation, Action.LOCAL, "only_on_device")


class PreferOnDevice:
    """PREFER_ON_DEVICE: the cloud only when the device cannot run the model."""

    name = InferenceMode.PREFER_ON_DEVICE.value
    uses_local = True
    uses_cloud = True
    prewarms = False

    def decide(self, situation: Situation) -> Decision:
        """LOCAL, or CLOUD_ONLY where no local model could be loaded."""
        if situation.local is None:
            return _predict(situation, Action.CLOUD_ONLY, "no_local_model")
        return _predict(situation, Action.LOCAL, "prefer_on_device")


class PreferInCloud:
    """PREFER_IN_CLOUD: the cloud when it can be asked; the device as late as is safe."""

    name = InferenceMode.PREFER_IN_CLOUD.value
    uses_local = True
    uses_cloud = True
    prewarms = True

    def decide(self, situation: Situation) -> Decision:
        """CLOUD_FIRST; LOCAL when the cloud cannot be asked, CLOUD_ONLY with no local model.

        The local run starts when 1.5 times its 95th percentile, its queue and 20 ms are
        left.
        """
        local = situation.local
        if local is None:
            return _predict(situation, Action.CLOUD_ONLY, "no_local_model")
        obstacle = cloud_obstacle(situation)
        if obstacle is not None:
            return _predict(situation, Action.LOCAL, obstacle)
        decision = _predict(situation, Action.CLOUD_FIRST, "prefer_in_cloud")
        needed_ms = local.queue_wait_ms + 1.5 * local.p95_ms + _LATE_START_MARGIN_MS
        return msgspec.structs.replace(
            decision, local_start_ms=max(0.0, situation.time_left_ms - needed_ms)
        )


class OnlyInCloud:
    """ONLY_IN_CLOUD: no local model is loaded at all."""

    name = InferenceMode.ONLY_IN_CLOUD.value
    uses_local = False
    uses_cloud = True
    prewarms = True

    def decide(self, situation: Situation) -> Decision:
        """CLOUD_ONLY, always."""
        return _predict(situation, Action.CLOUD_ONLY, "only_in_cloud")
