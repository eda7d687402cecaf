"""ExpectedUtility: hold a local answer, and ask the cloud when that is worth its price.

With local confidence ``c``, time left ``t`` and a price for bytes, joules and waiting, an
upload is worth

    g(c) P(T_cloud <= t) - price,     g(c) = P(cloud right | c) - c

The local answer is held meanwhile, so a wrong guess costs bytes and never the answer. The
same rule is asked at every turn of a request: before anything ran (expectations over ``c``),
when the local answer is there, and while an upload is under way (what is already sent is
spent: only the rest has a price). A cold path is priced as it is, and opened for later
requests where that pays.
"""

from __future__ import annotations

from typing import Final, Literal

from edge_runtime.policies.base import Action, Decision, Prices, Situation
from edge_runtime.policies.constraints import cloud_obstacle
from edge_runtime.policies.gain import Gain, GainPrior
from edge_runtime.policies.gain_table import GainTable
from edge_runtime.policies.turn import Turn

__all__ = ["MODE_PRICES", "ExpectedUtility", "UtilityMode"]

UtilityMode = Literal["accuracy", "balanced", "saver"]

MODE_PRICES: Final[dict[str, Prices | None]] = {
    "accuracy": Prices(
        per_megabyte=0.01, per_metered_megabyte=0.1, per_joule=0.0003, per_second=0.002
    ),
    "balanced": None,
    "saver": Prices(per_megabyte=0.5, per_metered_megabyte=2.0, per_joule=0.01, per_second=0.02),
}
"""None: the runtime's own (``EdgeRuntime(prices=...)``)."""


class ExpectedUtility:
    """Args: ``mode`` names the prices; ``gain`` the pair of models; ``prices`` overrides."""

    uses_local = True
    uses_cloud = True
    prewarms = True

    def __init__(
        self,
        mode: UtilityMode = "balanced",
        gain: Gain | None = None,
        prices: Prices | None = None,
    ) -> None:
        self.mode = mode
        self.name = f"ExpectedUtility:{mode}"
        self.gain: Gain = gain or GainPrior()
        self.gain_is_prior = gain is None
        self.prices = prices or MODE_PRICES[mode]
        self._table = GainTable(self.gain)

    def with_gain(self, gain: Gain) -> ExpectedUtility:
        """The same mode and prices with a measured gain."""
        return ExpectedUtility(self.mode, gain, self.prices)

    def decide(self, situation: Situation) -> Decision:
        """What to do now; see the module for when it is asked."""
        local, link, cloud = situation.local, situation.link, situation.cloud
        upload = situation.upload
        if local is None:
            return Decision(action=Action.CLOUD_ONLY, reason="no_local_model")
        if upload is not None and upload.answered:
            return self._choose_answer(situation)
        obstacle = cloud_obstacle(situation)
        if obstacle is not None or link is None or cloud is None:
            return Decision(
                action=Action.LOCAL,
                reason=obstacle or "no_broker",
                predicted_local_ms=local.queue_wait_ms + local.p50_ms,
                local_expires=True,
            )
        turn = Turn(situation, local, link, cloud, self._table, self.prices or situation.prices)
        if upload is not None:
            return turn.go_on()
        if not situation.scored:
            return turn.by_prior()
        if situation.confidence is None:
            return turn.begin()
        return turn.after_local(situation.confidence)

    def _choose_answer(self, situation: Situation) -> Decision:
        """Both answers are there: the better one."""
        confidence = situation.confidence
        keep = confidence is not None and self.gain.signed(confidence) < 0.0
        if keep:
            return Decision(action=Action.LOCAL, reason="confident")
        return Decision(action=Action.CASCADE, reason="cloud_better")
