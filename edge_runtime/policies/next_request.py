"""What an upload or a small request now is worth to the request that comes next."""

from __future__ import annotations

import math
from typing import Final

from edge_runtime.estimators.transfer import CONNECTION_KEPT_S
from edge_runtime.policies.constraints import may_warm_up
from edge_runtime.policies.forecast import Way
from edge_runtime.policies.pricing import UNKNOWN_RADIO_JOULES, Pricing

__all__ = ["NextRequest", "above"]

_WINDOW_KEPT_S: Final = 1.0
"""A sender that was idle for longer than a retransmission timeout starts slowly again (RFC 5681,
section 4.1)."""
_MIN_SOON: Final = 0.1
"""Requests to expect in that time; with fewer the window is worth next to nothing."""
_PING_BYTES: Final = 700.0
"""The small request and its answer."""
_HANDSHAKE_BYTES: Final = 3800.0
"""Of TCP and TLS, certificates included."""
_HANDSHAKE_ROUND_TRIPS: Final = 2
"""One for TCP, one for TLS 1.3 (RFC 8446)."""


class NextRequest:
    """``way``: of an upload that starts now. ``signed``: the gains to expect, equally likely."""

    __slots__ = ("link", "pricing", "signed", "situation", "way")

    def __init__(self, pricing: Pricing, way: Way, signed: tuple[float, ...]) -> None:
        self.pricing = pricing
        self.situation = pricing.situation
        self.link = pricing.link
        self.way = way
        self.signed = signed

    def window_worth(self) -> float:
        """An upload leaves TCP's window open for a request that comes within a second.

        One that is late is cut short, and leaves little: count this with its chance.
        """
        situation = self.situation
        arrivals = situation.arrivals
        if arrivals is None:
            return 0.0
        soon = arrivals.within(_WINDOW_KEPT_S)
        if soon < _MIN_SOON:
            return 0.0
        wide, narrow = self.way.chances_by_window(situation.upload_bytes, situation.deadline_ms)
        if narrow >= wide:
            return 0.0
        return soon * max(0.0, self._worth(wide) - self._worth(narrow))

    def is_cold(self) -> bool:
        """Whether the radio sleeps or the connection is shut."""
        return self.link.promotion_ms > 0 or self.link.setup_round_trips > 0

    def warming_pays(self, left_ms: float) -> bool:
        """Whether to keep the path warm for the next request: it is near, and that would pay.

        A request after the radio's tail, or after the connection was closed, finds a cold
        path. A small one now moves both limits; it gains what the next request's upload is
        worth more, times the probability that it comes in between. The tail burns until it
        comes.
        """
        arrivals, link, way = self.situation.arrivals, self.link, self.way
        if arrivals is None:
            return self._opening_pays(left_ms)
        if link.in_flight_bytes > 0 or not may_warm_up(self.situation):
            return False
        prices, radio = self.pricing.prices, self.pricing.radio
        tail_s = 0.0 if radio is None else radio.tail_s
        silence_s = math.inf if link.idle_ms is None else link.idle_ms / 1e3
        awake_s = max(0.0, tail_s - silence_s)
        open_s = 0.0
        if link.setup_round_trips == 0:
            open_s = max(0.0, CONNECTION_KEPT_S - silence_s)
        by_radio = arrivals.within(tail_s) - arrivals.within(awake_s)
        by_connection = arrivals.within(CONNECTION_KEPT_S) - arrivals.within(open_s)
        if by_radio + by_connection <= 0.0:
            return False
        size_bytes = _PING_BYTES + (_HANDSHAKE_BYTES if link.setup_round_trips else 0.0)
        joules = UNKNOWN_RADIO_JOULES
        if radio is not None:
            burning_s = arrivals.expected_within(tail_s) - arrivals.expected_within(awake_s)
            joules = radio.tail_joules(burning_s)
            if awake_s <= 0.0:
                joules += radio.promotion_joules()
        price = prices.per_megabyte * size_bytes / 1e6 + prices.per_joule * joules
        warm = self._worth(way.chance_if(left_ms, 0.0, 0))
        if (by_radio + by_connection) * warm <= price:
            return False  # whatever a cold path is worth
        asleep_ms = 0.0 if radio is None else 1e3 * radio.promotion_s
        cool = self._worth(way.chance_if(left_ms, asleep_ms, 0))
        cold = self._worth(way.chance_if(left_ms, asleep_ms, _HANDSHAKE_ROUND_TRIPS))
        gain = by_radio * (warm - cool) + by_connection * (cool - cold)
        return gain > price

    def _worth(self, p: float) -> float:
        """Expected gain of an upload like this one with such a chance, bytes paid."""
        price = self.pricing.prices.per_megabyte * self.situation.upload_bytes / 1e6
        if p <= price:
            return 0.0  # no gain is above 1
        signed = self.signed
        return above(signed, p, 0.0, price) / len(signed)

    def _opening_pays(self, left_ms: float) -> bool:
        """Without a rhythm to go by: open a cold connection if a warm one would pay."""
        if not self.is_cold() or not may_warm_up(self.situation):
            return False
        warm = self._worth(self.way.chance_if(left_ms, 0.0, 0))
        return warm > self._worth(self.way.chance(left_ms))


def above(signed: tuple[float, ...], p: float, keep: float, price: float) -> float:
    """Sum over g of max(0, (g + keep) p - price); a loop, as every decision needs several."""
    total = 0.0
    for g in signed:
        value = (g + keep) * p - price
        if value > 0.0:
            total += value
    return total
