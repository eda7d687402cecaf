"""Radio energy: promotion, transfer and tail.

    P = a_u t_u + b  while bytes move (Huang et al., MobiSys 2012, section 5),

then the radio stays connected for a tail. LTE, 3G and Wi-Fi are Huang's tables 3 and 4. For
5G the slope is a fit to the power traces of Narayanan et al., SIGCOMM 2021 (NSA low band,
n = 255); base and tail are assumptions between LTE's and those traces'. Device and display
are not included. Carriers and chips differ: pass a table of your own.
"""

from __future__ import annotations

from functools import cached_property
from typing import Final

import msgspec

__all__ = ["RADIO_POWER", "RadioPower", "radio_power"]

_BITS_PER_MEGABIT = 1e6


class RadioPower(msgspec.Struct, frozen=True, kw_only=True, dict=True):
    """One kind of radio; watts, seconds, and joules per megabit sent."""

    joules_per_megabit: float
    """The slope a_u: milliwatts per Mbit/s are millijoules per megabit."""
    base_watts: float
    promotion_s: float
    promotion_watts: float
    tail: tuple[tuple[float, float], ...]
    """``(seconds, watts)`` of each step, in order."""

    @cached_property
    def tail_s(self) -> float:
        """After this much silence the radio sleeps."""
        return sum(seconds for seconds, _ in self.tail)

    def tail_joules(self, silence_s: float) -> float:
        """Energy of the first ``silence_s`` of the tail."""
        joules, left_s = 0.0, max(0.0, silence_s)
        for seconds, watts in self.tail:
            joules += watts * min(left_s, seconds)
            left_s = max(0.0, left_s - seconds)
        return joules

    def transfer_joules(self, size_bytes: float, active_s: float) -> float:
        """Sending ``size_bytes`` within ``active_s``."""
        return self.joules_per_megabit * 8 * size_bytes / _BITS_PER_MEGABIT + (
            self.base_watts * active_s
        )

    def promotion_joules(self) -> float:
        """Waking the radio."""
        return self.promotion_s * self.promotion_watts


RADIO_POWER: Final[dict[str, RadioPower]] = {
    "lte": RadioPower(
        joules_per_megabit=0.43839,
        base_watts=1.28804,
        promotion_s=0.2601,
        promotion_watts=1.2107,
        tail=((11.576, 1.060),),
    ),
    "3g": RadioPower(
        joules_per_megabit=0.86898,
        base_watts=0.81788,
        promotion_s=0.58206,
        promotion_watts=0.6594,
        tail=((8.088, 0.8039), (0.824, 0.6013)),
    ),
    "wifi": RadioPower(
        joules_per_megabit=0.28317,
        base_watts=0.13286,
        promotion_s=0.0791,
        promotion_watts=0.1244,
        tail=((0.2381, 0.1193),),
    ),
    "5g": RadioPower(
        joules_per_megabit=0.0322,
        base_watts=1.5,
        promotion_s=0.2601,
        promotion_watts=1.2107,
        tail=((10.5, 1.097),),
    ),
    "ethernet": RadioPower(
        joules_per_megabit=0.0, base_watts=0.0, promotion_s=0.0, promotion_watts=0.0, tail=()
    ),
}
"""By link type."""


def radio_power(link_type: str) -> RadioPower:
    """The table's entry; LTE's, the dearest, for a type that is not in it."""
    return RADIO_POWER.get(link_type, RADIO_POWER["lte"])
