"""One question to ``ExpectedUtility``, with what every answer to it needs.

The hot path of every request. Budget: all decisions of a request (two or three) within 2 % of
one local int8 MobileNetV2 inference, which is 79 us where that takes 3.97 ms; 200 us at most
for one of them, with cold caches. So: plain floats and loops (numpy takes a microsecond for
each call), one ``Way`` for all chances, nothing built twice, and no chance asked that cannot
matter.
"""

from __future__ import annotations

import math
from typing import Final

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
from edge_runtime.policies.constraints import must_ask
from edge_runtime.policies.forecast import Way, setup_ms
from edge_runtime.policies.gain_table import GainTable
from edge_runtime.policies.next_request import NextRequest, above
from edge_runtime.policies.pricing import Cost, Pricing

__all__ = ["Turn"]

_REVIEW_SHARE: Final = 0.8
"""Of the time that is left: an upload is looked at again after it."""
_NO_CHANCE: Final = 1e-3
"""Of an answer in time: what else an upload may be good for is not worth working out."""
_WASTE: Final = 5.0
"""Prices of a byte that is sent in vain: the user paid it for nothing."""
_LONG_RUN: Final = 0.35
"""Of the deadline: a local run that takes less is not held back for the cloud's answer."""
_SURE: Final = 0.995
"""Chance of the cloud's answer in time from which none of the device is needed."""
_START_MARGIN_MS: Final = 10.0
"""For waking up, and for handing the answer over."""
_MIN_REVIEW_MS: Final = 15.0
_SQRT_2: Final = math.sqrt(2.0)


class Turn:
    """``prices``: those that count; ``table``: the gains to expect."""

    __slots__ = (
        "cloud", "left_ms", "link", "local", "prices", "pricing", "situation", "spread", "table",
    )  # fmt: skip

    def __init__(
        self,
        situation: Situation,
        local: LocalOutlook,
        link: LinkOutlook,
        cloud: CloudOutlook,
        table: GainTable,
        prices: Prices,
    ) -> None:
        self.situation = situation
        self.local = local
        self.link = link
        self.cloud = cloud
        self.table = table
        self.prices = prices
        self.pricing = Pricing(situation, link, prices)
        self.left_ms = situation.time_left_ms
        self.spread: float | None = None

    def _way(self) -> Way:
        return Way(self.link, self.cloud, self.situation.upload_bytes)

    # Turns --------------------------------------------------------------------------

    def begin(self) -> Decision:
        """Nothing has run yet: device alone, device first, both at once, or cloud first?

        Values are expected right answers less prices; a local run also costs its energy and
        the wait of requests that may come meanwhile.
        """
        local, left_ms, table, pricing = self.local, self.left_ms, self.table, self.pricing
        size_bytes = self.situation.upload_bytes
        local_ms = local.queue_wait_ms + local.p50_ms
        p_local = self._p_local(left_ms, local.queue_wait_ms)
        way = self._way()
        next_ = NextRequest(pricing, way, table.signed)
        p_now = way.chance(left_ms)
        p_later = way.chance(left_ms - local_ms) if p_now > 0.0 else 0.0  # less time, less chance
        keep = next_.window_worth() if max(p_now, p_later) > _NO_CHANCE else 0.0
        bytes_ = pricing.of_bytes(size_bytes)
        energy = pricing.of_joules(size_bytes, way.upload_ms)
        wait_ms = min(way.cloud_ms, max(left_ms, 0.0))
        price_now = Cost(bytes_, energy, pricing.of_wait(max(0.0, wait_ms - local_ms)))
        price_later = Cost(bytes_, energy, pricing.of_wait(max(0.0, wait_ms)))
        total_now, total_later = price_now.total, price_later.total
        run = self._run_cost(p_now)
        cascade = p_local * table.share * above(table.signed, p_later, keep, total_later)
        # a run that the cloud's answer cuts short costs less
        cut = p_now * max(0.0, 1.0 - way.cloud_ms / max(local_ms, 1.0))
        hedged, awaits = self._hedged(way, p_now, price_now, p_local, local_ms, keep, run * cut)
        first, start_ms = 0.0, self._latest_start_ms()
        if start_ms > 0.0 and local.p50_ms >= _LONG_RUN * self.situation.deadline_ms:
            price_first = Cost(bytes_, energy, pricing.of_wait(max(0.0, wait_ms - way.cloud_ms)))
            first = self._cloud_first(way, p_now, start_ms, price_first.total, p_local, run, keep)
        best = max(hedged, cascade, first)
        if best > 0.0 and best == first:
            return self._decision(
                Action.CLOUD_FIRST, "cloud_before_local", way, p_now, first + total_now,
                price_now, local_ms, start_ms=start_ms,
            )  # fmt: skip
        if best > 0.0 and best == hedged:
            return self._decision(
                Action.HEDGED, "hedge_pays", way, p_now, hedged + total_now,
                price_now, local_ms, awaits=awaits,
            )  # fmt: skip
        if cascade > 0.0:
            return self._decision(
                Action.CASCADE, "ask_after_local", way, p_later, cascade + total_later,
                price_later, local_ms,
                warm_up=next_.is_cold() and next_.warming_pays(left_ms - local_ms),
            )  # fmt: skip
        return self._stay(
            "cloud_too_late", next_, left_ms - local_ms, p_now, 0.0, price_now, local_ms
        )

    def _hedged(
        self,
        way: Way,
        p: float,
        price: Cost,
        p_local: float,
        local_ms: float,
        keep: float,
        saved: float,
    ) -> tuple[float, bool]:
        """What both at once is worth more than the device alone; whether to wait for both.

        ``saved``: of the local run, when the cloud's answer cuts it short.
        """
        table = self.table
        share, total, missing = table.share, price.total, 1.0 - p_local
        value = 0.0
        if local_ms <= way.cloud_ms:  # the confidence comes first and may end the upload
            sunk, paid = self._sunk(way, local_ms, price)
            rest = total - paid
            for g, q in table.pairs:
                left = p * (p_local * g + missing * q + keep) - rest
                if left > 0.0:
                    value += left
            return value * share - sunk, False
        with_both = share * table.local_better * p * p_local
        wait_ms = local_ms - way.cloud_ms
        awaits = with_both > self.prices.per_second * wait_ms / 1e3 + saved
        for g, q in table.pairs:
            if awaits and g < 0.0:
                g = 0.0  # then the local answer is taken
            value += p * (p_local * g + missing * q)
        return share * value + p * keep + (0.0 if awaits else saved) - total, awaits

    def _cloud_first(
        self,
        way: Way,
        p: float,
        start_ms: float,
        price: float,
        p_local: float,
        run: float,
        keep: float,
    ) -> float:
        """The same for the cloud first, with a local run that starts at ``start_ms``."""
        early = way.chance(start_ms)
        late = self._p_local(self.left_ms - start_ms, self.local.queue_wait_ms)
        value, missing = 0.0, 1.0 - p
        for g, q in self.table.pairs:
            value += p * q + missing * late * (q - g) - p_local * (q - g)
        return self.table.share * value + p * keep - price + run * early

    def after_local(self, confidence: float) -> Decision:
        """The local answer is held: is the cloud's worth its price?"""
        left_ms = self.left_ms
        way = self._way()
        next_ = NextRequest(self.pricing, way, self.table.signed)
        p = way.chance(left_ms)
        price = self._price(way)
        gain = self.table.gain.gain(confidence)
        expected = gain * p
        keep = 0.0
        if gain > 0.0 and p > _NO_CHANCE:
            keep = p * next_.window_worth()
        if expected + keep > price.total or must_ask(self.situation):
            return self._decision(Action.CASCADE, "gain_above_price", way, p, expected, price)
        reason = "confident" if self._never_pays(gain) else "cloud_too_late"
        return self._stay(reason, next_, left_ms, p, expected, price, None)

    def by_prior(self) -> Decision:
        """No score will come: both sides at once, or the device alone."""
        left_ms = self.left_ms
        local_ms = self.local.queue_wait_ms + self.local.p50_ms
        way = self._way()
        p = way.chance(left_ms)
        price = self._price(way)
        gain = self.table.gain.gain(self.table.gain.local_right)
        expected = gain * p
        if expected > price.total:
            return self._decision(
                Action.HEDGED, "prior_gain_above_price", way, p, expected, price, local_ms
            )
        if self._never_pays(gain):
            return self._decision(
                Action.LOCAL, "prior_gain_below_price", way, p, expected, price, local_ms
            )
        next_ = NextRequest(self.pricing, way, self.table.signed)
        return self._stay("cloud_too_late", next_, left_ms, p, expected, price, local_ms)

    def go_on(self) -> Decision:
        """An upload is under way: what is sent is spent; is the rest still worth it?"""
        situation, local, table, left_ms = self.situation, self.local, self.table, self.left_ms
        upload = situation.upload
        assert upload is not None  # noqa: S101  # the caller looked
        way = Way(self.link, self.cloud, situation.upload_bytes, False, upload)
        p = way.chance(left_ms)
        rest_bytes = max(0.0, upload.wire_bytes - upload.acknowledged_bytes)
        wait_ms = min(way.cloud_ms, max(left_ms, 0.0))
        confidence = situation.confidence
        share = table.share
        p_local = 1.0
        if confidence is None:
            p_local = self._p_local(left_ms, local.left_ms)
            wait_ms = max(0.0, wait_ms - (local.left_ms or 0.0))
            gain, missing = 0.0, 1.0 - p_local
            for g, q in table.pairs:
                gain += share * (p_local * (g if g > 0.0 else 0.0) + missing * q)
        else:
            gain = table.gain.gain(confidence)
        pricing = self.pricing
        price = Cost(pricing.of_bytes(rest_bytes), 0.0, pricing.of_wait(wait_ms))
        expected = gain * p
        worth = expected > price.total or (must_ask(situation) and p > 0.0)
        if not worth:
            reason = "confident" if gain <= 0.0 else "cloud_too_late"
            return self._decision(Action.LOCAL, reason, way, p, expected, price)
        waits = confidence is None and local.left_ms is None
        if not waits:
            awaits = False
            if confidence is None:
                local_left_ms = local.left_ms or 0.0
                both = share * p_local * table.local_better
                run = self._run_cost(p) * min(1.0, local_left_ms / local.p50_ms)
                awaits = both > self.prices.per_second * local_left_ms / 1e3 + run
            return self._decision(
                Action.HEDGED, "gain_above_price", way, p, expected, price, awaits=awaits
            )
        start_ms = self._latest_start_ms()
        if start_ms <= 0.0:  # now or never: is the local answer needed?
            start_ms = 0.0 if p < _SURE else math.inf
        return self._decision(
            Action.CLOUD_FIRST, "cloud_before_local", way, p, expected, price, start_ms=start_ms
        )

    # Parts --------------------------------------------------------------------------

    def _price(self, way: Way) -> Cost:
        """Of a whole upload."""
        pricing, size_bytes = self.pricing, self.situation.upload_bytes
        wait_ms = max(0.0, min(way.cloud_ms, max(self.left_ms, 0.0)))
        return Cost(
            pricing.of_bytes(size_bytes),
            pricing.of_joules(size_bytes, way.upload_ms),
            pricing.of_wait(wait_ms),
        )

    def _never_pays(self, gain: float) -> bool:
        """Were the cloud's answer there at once, it would not be worth its bytes."""
        return gain <= self.pricing.of_bytes(self.situation.upload_bytes)

    def _sunk(self, way: Way, until_ms: float, price: Cost) -> tuple[float, float]:
        """Of an upload begun now, the price that is spent when the local answer comes."""
        link = self.link
        sending_ms = until_ms - setup_ms(link)
        if sending_ms <= 0:
            return price.energy, price.energy
        rtt_ms = max(link.rtt_ms, 1.0)
        rounds = int(sending_ms / rtt_ms) + 1
        by_window = link.window_bytes * (2.0 ** min(rounds, 20) - 1.0)
        by_rate = math.exp(min(link.log_rate_mean, 25.0)) * sending_ms / 1e3
        share = min(1.0, min(by_window, by_rate) / wire_bytes(self.situation.upload_bytes))
        return price.energy + _WASTE * price.bytes_ * share, price.energy + price.bytes_ * share

    def _p_local(self, left_ms: float, wait_ms: float | None) -> float:
        """P(a local run ends within ``left_ms``): log-normal around its median.

        ``wait_ms``: before it starts; for a run under way, until it should end.
        """
        local = self.local
        p50_ms = local.p50_ms
        if not p50_ms > 0.0:
            return 1.0
        spread = self.spread
        if spread is None:
            spread = max(math.log(max(local.p95_ms / p50_ms, 1.0)) / 1.645, 0.05)
            self.spread = spread
        if local.left_ms is not None:
            z = (left_ms - local.left_ms) / (spread * p50_ms)
        else:
            room_ms = left_ms - (local.queue_wait_ms if wait_ms is None else wait_ms)
            if room_ms <= 0.0:
                return 0.0
            z = math.log(room_ms / p50_ms) / spread
        return 0.5 * math.erfc(-z / _SQRT_2)

    def _latest_start_ms(self) -> float:
        """How long a local run can wait and still end in time, almost surely.

        What other requests hold back has its place reserved; this run ends before, or starts
        after it.
        """
        local = self.local
        run_ms = 1.1 * local.p95_ms
        start_ms = self.left_ms - local.queue_wait_ms - run_ms - _START_MARGIN_MS
        for other_ms in reversed(local.reserved_ms):
            if other_ms < start_ms + run_ms and start_ms < other_ms + run_ms:
                start_ms = other_ms - run_ms
        return start_ms

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
        return energy + (1.0 - p_cloud) * self.table.mean_confidence * arrivals.within(run_s)

    def _stay(
        self,
        reason: str,
        next_: NextRequest,
        next_left_ms: float,
        p: float,
        expected: float,
        price: Cost,
        local_ms: float | None,
    ) -> Decision:
        """The device alone; a warm path for the next request, which has so long, if that pays."""
        warm_up = next_.warming_pays(next_left_ms)
        if warm_up and reason == "cloud_too_late" and next_.is_cold():
            reason = "connection_cold"
        return self._decision(
            Action.LOCAL, reason, next_.way, p, expected, price, local_ms, warm_up=warm_up
        )

    def _decision(
        self,
        action: Action,
        reason: str,
        way: Way,
        p: float,
        expected: float,
        price: Cost,
        local_ms: float | None = None,
        *,
        start_ms: float = 0.0,
        awaits: bool = False,
        warm_up: bool = False,
    ) -> Decision:
        uploads = action is not Action.LOCAL
        return Decision(
            action=action,
            reason=reason,
            p_cloud_in_deadline=p,
            predicted_local_ms=local_ms,
            predicted_cloud_ms=way.cloud_ms,
            predicted_upload_ms=way.upload_ms,
            expected_gain=max(0.0, expected),
            price=price.total,
            local_start_ms=start_ms,
            warm_up=warm_up,
            ask_again=uploads and self.situation.scored,
            review_ms=max(_MIN_REVIEW_MS, _REVIEW_SHARE * self.left_ms) if uploads else None,
            await_local=awaits,
            local_expires=True,
            price_bytes=price.bytes_,
            price_energy=price.energy,
            price_time=price.time,
        )
