"""What an upload or a small request now is worth to the request that comes next."""

from __future__ import annotations

import math
from typing import Final

import msgspec

from edge_runtime.estimators.transfer import (
    CONNECTION_KEPT_S,
    INITIAL_WINDOW_BYTES,
    wire_bytes,
)
from edge_runtime.policies.base import Action, CloudOutlook, Decision, LinkOutlook
from edge_runtime.policies.constraints import may_warm_up
from edge_runtime.policies.forecast import chance
from edge_runtime.policies.pricing import UNKNOWN_RADIO_JOULES, Pricing

__all__ = ["NextRequest", "above"]

_WINDOW_KEPT_S: Final = 1.0
_MIN_SOON: Final = 0.1
_PING_BYTES: Final = 700.0
_HANDSHAKE_BYTES: Final = 3800.0


class NextRequest:
    """``signed``: the gains to expect, each of as many images."""

    def __init__(self, pricing: Pricing, cloud: CloudOutlook, signed: tuple[float, ...]) -> None:
        self.situation = pricing.situation
        self.link = pricing.link
        self.cloud = cloud
        self.prices = pricing.prices
        self.radio = pricing.radio
        self.signed = signed

    def window_worth(self) -> float:
        """An upload leaves TCP's window open for a request that comes within a second.

        One that is late is cut short, and leaves little: count this with its chance.
        """
        arrivals = self.situation.arrivals
        if arrivals is None:
            return 0.0
        soon = arrivals.within(_WINDOW_KEPT_S)
        if soon < _MIN_SOON:
            return 0.0
        open_ = msgspec.structs.replace(
            self.link,
            promotion_ms=0.0,
            setup_round_trips=0,
            window_bytes=INITIAL_WINDOW_BYTES + wire_bytes(self.situation.upload_bytes),
            in_flight_bytes=0,
        )
        shut = msgspec.structs.replace(open_, window_bytes=float(INITIAL_WINDOW_BYTES))
        left_ms = self.situation.deadline_ms
        return soon * max(0.0, self._worth(open_, left_ms) - self._worth(shut, left_ms))

    def is_cold(self) -> bool:
        """Whether the radio sleeps or the connection is shut."""
        return self.link.promotion_ms > 0 or self.link.setup_round_trips > 0

    def warm(self, decision: Decision, left_ms: float) -> Decision:
        """Keep the path warm for the next request, if it is near and that would pay.

        A request after the radio's tail, or after the connection was closed, finds a cold
        path. A small one now moves both limits; it gains what the next request's upload is
        worth more, times the probability that it comes in between. The tail burns until it
        comes.
        """
        arrivals = self.situation.arrivals
        if arrivals is None:
            return self._warm_if_cold(decision, left_ms)
        if not may_warm_up(self.situation) or self.link.in_flight_bytes > 0:
            return decision
        link, prices, radio = self.link, self.prices, self.radio
        tail_s = 0.0 if radio is None else radio.tail_s
        silence_s = math.inf if link.idle_ms is None else link.idle_ms / 1e3
        awake_s = max(0.0, tail_s - silence_s)
        open_s = 0.0
        if link.setup_round_trips == 0:
            open_s = max(0.0, CONNECTION_KEPT_S - silence_s)
        by_radio = arrivals.within(tail_s) - arrivals.within(awake_s)
        by_connection = arrivals.within(CONNECTION_KEPT_S) - arrivals.within(open_s)
        if by_radio + by_connection <= 0.0:
            return decision
        size_bytes = _PING_BYTES + (_HANDSHAKE_BYTES if link.setup_round_trips else 0.0)
        joules = UNKNOWN_RADIO_JOULES
        if radio is not None:
            burning_s = arrivals.expected_within(tail_s) - arrivals.expected_within(awake_s)
            joules = radio.tail_joules(burning_s)
            if awake_s <= 0.0:
                joules += radio.promotion_joules()
        price = prices.per_megabyte * size_bytes / 1e6 + prices.per_joule * joules
        ready = msgspec.structs.replace(link, promotion_ms=0.0, setup_round_trips=0)
        warm = self._worth(ready, left_ms)
        if (by_radio + by_connection) * warm <= price:
            return decision  # whatever a cold path is worth
        asleep = ready
        if radio is not None:
            asleep = msgspec.structs.replace(ready, promotion_ms=1e3 * radio.promotion_s)
        closed = msgspec.structs.replace(asleep, setup_round_trips=2)
        cool, cold = self._worth(asleep, left_ms), self._worth(closed, left_ms)
        gain = by_radio * (warm - cool) + by_connection * (cool - cold)
        if gain <= price:
            return decision
        reason = decision.reason
        if decision.action is Action.LOCAL and reason == "cloud_too_late" and self.is_cold():
            reason = "connection_cold"
        return msgspec.structs.replace(decision, reason=reason, warm_up=True)

    def _worth(self, link: LinkOutlook, left_ms: float) -> float:
        """Expected gain of an upload like this one, bytes paid, on such a path."""
        p = chance(link, self.cloud, self.situation.upload_bytes, left_ms)
        price = self.prices.per_megabyte * self.situation.upload_bytes / 1e6
        if p <= price:
            return 0.0  # no gain is above 1
        signed = self.signed
        return above(signed, p, 0.0, price) / len(signed)

    def _warm_if_cold(self, decision: Decision, left_ms: float) -> Decision:
        """Without a rhythm to go by: open a cold connection if a warm one would pay."""
        if not self.is_cold() or not may_warm_up(self.situation):
            return decision
        ready = msgspec.structs.replace(self.link, promotion_ms=0.0, setup_round_trips=0)
        if self._worth(ready, left_ms) <= self._worth(self.link, left_ms):
            return decision
        reason = decision.reason
        if decision.action is Action.LOCAL and reason == "cloud_too_late":
            reason = "connection_cold"
        return msgspec.structs.replace(decision, reason=reason, warm_up=True)


def above(signed: tuple[float, ...], p: float, keep: float, price: float) -> float:
    """Sum over g of max(0, (g + keep) p - price); a loop, as every decision needs several."""
    total = 0.0
    for g in signed:
        value = (g + keep) * p - price
        if value > 0.0:
            total += value
    return total
