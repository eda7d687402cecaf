"""What one recorded uplink is to the simulation: its rate over time and its round trips."""

from __future__ import annotations

from typing import Literal

import msgspec
import numpy as np

RADIOS = ("3g", "lte", "5g", "wifi")
BIN_MS = 100.0
"""Time that one value of ``Trace.uplink_mbps`` covers, ms."""
RTT_STEP_MS = 200.0
"""Time between two values of ``Trace.rtt_ms``, ms."""

Radio = Literal["3g", "lte", "5g", "wifi"]


class Trace(msgspec.Struct, frozen=True, kw_only=True):
    """One recorded uplink.

    Attributes:
        name: What the result calls it; unique within a folder.
        group: The class it is reported under (an index's ``class`` column, else the radio).
        radio: Which radio's promotion, tail and power constants apply.
        uplink_mbps: float64 [bins], the capacity of each 100 ms, Mbit/s, finite and >= 0.
        rtt_ms: float64 [replies], one round trip per 200 ms, ms; None: drawn by radio.
    """

    name: str
    group: str
    radio: Radio
    uplink_mbps: np.ndarray
    rtt_ms: np.ndarray | None
