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

import math
from typing import Final, Literal

import msgspec

from edge_runtime.estimators.transfer import wire_bytes
from edge_runtime.policies.base import (
    Action,
    CloudOutlook,
    Decision,
    LinkOutlook,
    LocalOutlook,
    Prices,
    Situation,
)
from edge_runtime.policies.constraints import cloud_obstacle, must_ask
from edge_runtime.policies.forecast import Forecast, Way, forecast, setup_ms
from edge_runtime.policies.gain import CONFIDENCE_NODES, Gain, GainPrior
from edge_runtime.policies.next_request import NextRequest, above
from edge_runtime.policies.pricing import Cost, Pricing

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

_REVIEW_SHARE = 0.8
_NO_CHANCE = 1e-3
"""Of an answer in time: what else an upload may be good for is not worth working out."""
_WASTE = 5.0
_LONG_RUN = 0.35
_SURE = 0.995
_START_MARGIN_MS = 10.0
_MIN_REVIEW_MS = 15.0


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
        nodes = self.gain.nodes or CONFIDENCE_NODES
        self._signed = tuple(self.gain.signed(c) for c in nodes)
        self._gains = tuple((self.gain.signed(c), self.gain.cloud(c)) for c in nodes)

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
        turn = _Turn(self, situation, local, link, cloud)
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


class _Turn:
    """One question, with what every answer to it needs."""

    def __init__(
        self,
        policy: ExpectedUtility,
        situation: Situation,
        local: LocalOutlook,
        link: LinkOutlook,
        cloud: CloudOutlook,
    ) -> None:
        self.policy = policy
        self.situation = situation
        self.local = local
        self.link = link
        self.cloud = cloud
        self.prices = policy.prices or situation.prices
        self.pricing = Pricing(situation, link, self.prices)
        self.next = NextRequest(self.pricing, cloud, policy._signed)
        self._way: Way | None = None
        self.left_ms = situation.time_left_ms
        self.size = wire_bytes(situation.upload_bytes)

    def _forecast(self, left_ms: float) -> Forecast:
        if self._way is None:
            self._way = Way(self.link, self.cloud, self.situation.upload_bytes)
        return self._way.forecast(left_ms)

    # Turns --------------------------------------------------------------------------

    def begin(self) -> Decision:
        """Nothing has run yet: device alone, device first, both at once, or cloud first?

        Values are expected right answers less prices; a local run also costs its energy and
        the wait of requests that may come meanwhile.
        """
        local_ms = self.local.queue_wait_ms + self.local.p50_ms
        p_local = self._p_local(self.left_ms, self.local.queue_wait_ms)
        now = self._forecast(self.left_ms)
        later = self._forecast(self.left_ms - local_ms)
        signed = self.policy._signed
        share = 1.0 / len(signed)
        likely = max(now.p_in_time, later.p_in_time) > _NO_CHANCE
        keep = self.next.window_worth() if likely else 0.0
        price_now = self.pricing.upload(now, waited_ms=local_ms)
        price_later = self.pricing.upload(later)
        run = self._run_cost(now.p_in_time)
        cascade = p_local * share * above(signed, later.p_in_time, keep, price_later.total)
        # a run that the cloud's answer cuts short costs less
        cut = now.p_in_time * max(0.0, 1.0 - now.cloud_ms / max(local_ms, 1.0))
        hedged, awaits = self._hedged(now, price_now, p_local, local_ms, keep, run * cut)
        first, start_ms = self._cloud_first(now, p_local, run, keep)
        best = max(hedged, cascade, first)
        if best > 0.0 and best == first:
            decision = self._decision(
                Action.CLOUD_FIRST,
                "cloud_before_local",
                now,
                first + price_now.total,
                price_now,
                local_ms,
            )
            return msgspec.structs.replace(decision, local_start_ms=start_ms)
        if best > 0.0 and best == hedged:
            decision = self._decision(
                Action.HEDGED, "hedge_pays", now, hedged + price_now.total, price_now, local_ms
            )
            return msgspec.structs.replace(decision, await_local=awaits)
        if cascade > 0.0:
            decision = self._decision(
                Action.CASCADE,
                "ask_after_local",
                later,
                cascade + price_later.total,
                price_later,
                local_ms,
            )
            return (
                self.next.warm(decision, self.left_ms - local_ms)
                if self.next.is_cold()
                else decision
            )
        decision = self._decision(Action.LOCAL, "cloud_too_late", now, 0.0, price_now, local_ms)
        return self.next.warm(decision, self.left_ms - local_ms)

    def _hedged(
        self,
        now: Forecast,
        price: Cost,
        p_local: float,
        local_ms: float,
        keep: float,
        saved: float,
    ) -> tuple[float, bool]:
        """What both at once is worth more than the device alone; whether to wait for both.

        ``saved``: of the local run, when the cloud's answer cuts it short.
        """
        p, share = now.p_in_time, 1.0 / len(self.policy._signed)
        if local_ms <= now.cloud_ms:  # the confidence comes first and may end the upload
            sunk, paid = self._sunk(local_ms, price)
            rest = price.total - paid
            value = 0.0
            for g, q in self.policy._gains:
                left = p * (p_local * g + (1.0 - p_local) * q + keep) - rest
                if left > 0.0:
                    value += left
            return value * share - sunk, False
        with_both = share * sum(max(0.0, -g) for g in self.policy._signed) * p * p_local
        wait_ms = local_ms - now.cloud_ms
        awaits = with_both > self.prices.per_second * wait_ms / 1e3 + saved
        value = share * sum(
            p * (p_local * (max(0.0, g) if awaits else g) + (1.0 - p_local) * q)
            for g, q in self.policy._gains
        )
        return value + p * keep + (0.0 if awaits else saved) - price.total, awaits

    def _cloud_first(
        self, now: Forecast, p_local: float, run: float, keep: float
    ) -> tuple[float, float]:
        """The same for the cloud first, and when the local run would have to start."""
        start_ms = self._latest_start_ms()
        if start_ms <= 0.0 or self.local.p50_ms < _LONG_RUN * self.situation.deadline_ms:
            return 0.0, 0.0
        assert self._way is not None  # noqa: S101  # ``begin`` has asked it
        early = self._way.chance(start_ms)
        p, share = now.p_in_time, 1.0 / len(self.policy._signed)
        late = self._p_local(self.left_ms - start_ms, self.local.queue_wait_ms)
        value = share * sum(
            p * q + (1.0 - p) * late * (q - g) - p_local * (q - g) for g, q in self.policy._gains
        )
        price = self.pricing.upload(now, waited_ms=now.cloud_ms)
        return value + p * keep - price.total + run * early, start_ms

    def after_local(self, confidence: float) -> Decision:
        """The local answer is held: is the cloud's worth its price?"""
        outlook = self._forecast(self.left_ms)
        price = self.pricing.upload(outlook)
        gain = self.policy.gain.gain(confidence)
        expected = gain * outlook.p_in_time
        keep = 0.0
        if gain > 0.0 and outlook.p_in_time > _NO_CHANCE:
            keep = outlook.p_in_time * self.next.window_worth()
        if expected + keep > price.total or must_ask(self.situation):
            return self._decision(Action.CASCADE, "gain_above_price", outlook, expected, price)
        free = self.pricing.cost(self.situation.upload_bytes, 0.0, 0.0)
        if gain <= free.bytes_ + free.time:
            decision = self._decision(Action.LOCAL, "confident", outlook, expected, price)
        else:
            decision = self._decision(Action.LOCAL, "cloud_too_late", outlook, expected, price)
        return self.next.warm(decision, self.left_ms)

    def by_prior(self) -> Decision:
        """No score will come: both sides at once, or the device alone."""
        local_ms = self.local.queue_wait_ms + self.local.p50_ms
        now = self._forecast(self.left_ms)
        price = self.pricing.upload(now)
        gain = self.policy.gain.gain(self.policy.gain.local_right)
        expected = gain * now.p_in_time
        if expected > price.total:
            return self._decision(
                Action.HEDGED, "prior_gain_above_price", now, expected, price, local_ms
            )
        free = self.pricing.cost(self.situation.upload_bytes, 0.0, 0.0)
        if gain <= free.bytes_ + free.time:
            return self._decision(
                Action.LOCAL, "prior_gain_below_price", now, expected, price, local_ms
            )
        decision = self._decision(Action.LOCAL, "cloud_too_late", now, expected, price, local_ms)
        return self.next.warm(decision, self.left_ms)

    def go_on(self) -> Decision:
        """An upload is under way: what is sent is spent; is the rest still worth it?"""
        upload = self.situation.upload
        assert upload is not None  # noqa: S101  # the caller looked
        outlook = forecast(
            self.link, self.cloud, self.situation.upload_bytes, self.left_ms, progress=upload
        )
        rest_bytes = max(0.0, upload.wire_bytes - upload.acknowledged_bytes)
        wait_ms = min(outlook.cloud_ms, max(self.left_ms, 0.0))
        confidence = self.situation.confidence
        share = 1.0 / len(self.policy._signed)
        p_local = 1.0
        if confidence is None:
            p_local = self._p_local(self.left_ms, self.local.left_ms)
            wait_ms = max(0.0, wait_ms - (self.local.left_ms or 0.0))
            gain = 0.0
            for g, q in self.policy._gains:
                gain += share * (p_local * (g if g > 0.0 else 0.0) + (1.0 - p_local) * q)
        else:
            gain = self.policy.gain.gain(confidence)
        price = self.pricing.cost(rest_bytes, wait_ms, 0.0)
        price = msgspec.structs.replace(price, energy=0.0)
        expected = gain * outlook.p_in_time
        worth = expected > price.total or (must_ask(self.situation) and outlook.p_in_time > 0.0)
        if not worth:
            reason = "confident" if gain <= 0.0 else "cloud_too_late"
            return self._decision(Action.LOCAL, reason, outlook, expected, price)
        waits = confidence is None and self.local.left_ms is None
        if not waits:
            decision = self._decision(Action.HEDGED, "gain_above_price", outlook, expected, price)
            left_ms = self.local.left_ms or 0.0
            both = share * p_local * sum(max(0.0, -g) for g in self.policy._signed)
            run = self._run_cost(outlook.p_in_time) * min(1.0, left_ms / self.local.p50_ms)
            awaits = both > self.prices.per_second * left_ms / 1e3 + run
            awaits = awaits and confidence is None
            return msgspec.structs.replace(decision, await_local=awaits)
        start_ms = self._latest_start_ms()
        if start_ms <= 0.0:  # now or never: is the local answer needed?
            start_ms = 0.0 if outlook.p_in_time < _SURE else math.inf
        decision = self._decision(
            Action.CLOUD_FIRST, "cloud_before_local", outlook, expected, price
        )
        return msgspec.structs.replace(decision, local_start_ms=start_ms)

    # Parts --------------------------------------------------------------------------

    def _sunk(self, until_ms: float, price: Cost) -> tuple[float, float]:
        """Of an upload begun now, the price that is spent when the local answer comes."""
        sending_ms = until_ms - setup_ms(self.link)
        if sending_ms <= 0:
            return price.energy, price.energy
        rtt_ms = max(self.link.rtt_ms, 1.0)
        rounds = int(sending_ms / rtt_ms) + 1
        by_window = self.link.window_bytes * (2.0 ** min(rounds, 20) - 1.0)
        by_rate = 2.718281828 ** min(self.link.log_rate_mean, 25.0) * sending_ms / 1e3
        share = min(1.0, min(by_window, by_rate) / self.size)
        return price.energy + _WASTE * price.bytes_ * share, price.energy + price.bytes_ * share

    def _p_local(self, left_ms: float, wait_ms: float | None) -> float:
        """P(a local run ends within ``left_ms``): log-normal around its median.

        ``wait_ms``: before it starts; for a run under way, until it should end.
        """
        local = self.local
        if not local.p50_ms > 0.0:
            return 1.0
        spread = max(math.log(max(local.p95_ms / local.p50_ms, 1.0)) / 1.645, 0.05)
        if local.left_ms is not None:
            z = (left_ms - local.left_ms) / (spread * local.p50_ms)
        else:
            room_ms = left_ms - (local.queue_wait_ms if wait_ms is None else wait_ms)
            if room_ms <= 0.0:
                return 0.0
            z = math.log(room_ms / local.p50_ms) / spread
        return 0.5 * math.erfc(-z / math.sqrt(2.0))

    def _latest_start_ms(self) -> float:
        """How long a local run can wait and still end in time, almost surely."""
        local = self.local
        return self.left_ms - local.queue_wait_ms - 1.1 * local.p95_ms - _START_MARGIN_MS

    def _mean_confidence(self) -> float:
        return sum(q - g for g, q in self.policy._gains) / len(self.policy._gains)

    def _run_cost(self, p_cloud: float) -> float:
        """Of one local run: its energy, and what it takes from others.

        Those are the requests that come while it occupies the device and whose cloud answer
        fails as well.
        """
        run_s = self.local.p50_ms / 1e3
        energy = self.prices.per_joule * self.local.watts * run_s
        arrivals = self.situation.arrivals
        if arrivals is None:
            return energy
        return energy + (1.0 - p_cloud) * self._mean_confidence() * arrivals.within(run_s)

    def _decision(
        self,
        action: Action,
        reason: str,
        outlook: Forecast,
        expected: float,
        price: Cost,
        local_ms: float | None = None,
    ) -> Decision:
        uploads = action is not Action.LOCAL
        review_ms = max(_MIN_REVIEW_MS, _REVIEW_SHARE * self.left_ms) if uploads else None
        return Decision(
            action=action,
            reason=reason,
            p_cloud_in_deadline=outlook.p_in_time,
            predicted_local_ms=local_ms,
            predicted_cloud_ms=outlook.cloud_ms,
            predicted_upload_ms=outlook.upload_ms,
            expected_gain=max(0.0, expected),
            price=price.total,
            price_bytes=price.bytes_,
            price_energy=price.energy,
            price_time=price.time,
            ask_again=uploads and self.situation.scored,
            review_ms=review_ms,
            local_expires=True,
        )
