"""Recorded mobile links."""

from __future__ import annotations

from typing import Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

__all__ = ["Trace"]


class Trace(msgspec.Struct, frozen=True, kw_only=True, eq=False):
    """One recorded uplink, and the round trips of a link of its kind."""

    name: str
    group: str
    radio: Literal["3g", "lte", "5g", "wifi"]
    uplink_mbps: NDArray[np.float64]
    """Capacity, one value per 100 ms."""
    rtt_ms: NDArray[np.float64] | None
    """One value per 200 ms; None: synthetic by radio."""
