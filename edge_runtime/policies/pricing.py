"""What an upload costs, in right answers: bytes, joules, seconds."""

from __future__ import annotations

import msgspec

from edge_runtime.estimators.energy import RadioPower, radio_power
from edge_runtime.policies.base import LinkOutlook, Prices, Situation

__all__ = ["UNKNOWN_RADIO_JOULES", "Cost", "Pricing", "radio_of"]

UNKNOWN_RADIO_JOULES = 2.0
"""What an upload costs where nothing is known of the radio."""


class Cost(msgspec.Struct, frozen=True, gc=False):
    """Parts of a price, in right answers."""

    bytes_: float
    energy: float
    time: float

    @property
    def total(self) -> float:
        """Their sum."""
        return self.bytes_ + self.energy + self.time


class Pricing:
    """Prices for one situation."""

    __slots__ = ("_standing_joules", "link", "prices", "radio", "situation")

    def __init__(self, situation: Situation, link: LinkOutlook, prices: Prices) -> None:
        self.situation = situation
        self.link = link
        self.prices = prices
        self.radio = radio_of(situation)
        self._standing_joules: float | None = None

    def of_bytes(self, size_bytes: float) -> float:
        """What the request and so many bytes cost."""
        prices, conditions = self.prices, self.situation.conditions
        spare = conditions.metered is True or conditions.data_saver is True
        rate = prices.per_metered_megabyte if spare else prices.per_megabyte
        return prices.per_request + rate * size_bytes / 1e6

    def of_wait(self, wait_ms: float) -> float:
        """What it costs that somebody waits."""
        return self.prices.per_second * wait_ms / 1e3

    def of_joules(self, size_bytes: float, upload_ms: float) -> float:
        """Transfer, promotion, and the part of the tail that would not burn anyway.

        The tail burns until the next request, which uses the radio itself; without a rhythm
        to go by, to its end.
        """
        radio = self.radio
        if radio is None:
            return self.prices.per_joule * UNKNOWN_RADIO_JOULES
        if self._standing_joules is None:
            self._standing_joules = self._stand(radio)
        joules = radio.transfer_joules(size_bytes, upload_ms / 1e3) + self._standing_joules
        return self.prices.per_joule * joules

    def _stand(self, radio: RadioPower) -> float:
        """Promotion and tail: the same for every upload that starts now."""
        link, arrivals, tail_s = self.link, self.situation.arrivals, radio.tail_s
        silence_s = tail_s if link.idle_ms is None else min(link.idle_ms / 1e3, tail_s)
        joules = radio.promotion_joules() if silence_s >= tail_s else 0.0
        burning_s = silence_s
        if arrivals is not None:
            burning_s = arrivals.expected_within(tail_s) - arrivals.expected_within(
                tail_s - silence_s
            )
        return joules + radio.tail_joules(burning_s)


def radio_of(situation: Situation) -> RadioPower | None:
    """The situation's own, else what its kind of link usually takes; None: unknown."""
    if situation.radio is not None:
        return situation.radio
    link_type = situation.conditions.link_type
    return None if link_type in ("unknown", "none") else radio_power(link_type)
