"""What the device knows about itself: one frozen snapshot, and who supplies it.

Every signal may be unknown. On a phone, implement ``ConditionsSource`` over the platform's
own services (ConnectivityManager, NWPathMonitor, PowerManager, ProcessInfo) and pass it to
``EdgeRuntime(conditions=...)``.
"""

from __future__ import annotations

import logging
from typing import Annotated, Literal, Protocol, runtime_checkable

import msgspec

__all__ = [
    "Conditions",
    "ConditionsSource",
    "LinkType",
    "PlatformSignals",
    "ThermalState",
    "UnknownConditions",
    "read_conditions",
    "read_network_id",
]

_log = logging.getLogger(__name__)

LinkType = Literal["unknown", "none", "ethernet", "wifi", "5g", "lte", "3g"]
"""``none``: the device is offline."""
ThermalState = Literal["unknown", "nominal", "fair", "serious", "critical"]
"""Apple's names; Android's thermal statuses map onto them."""


class Conditions(msgspec.Struct, frozen=True, kw_only=True):
    """Device signals at one moment; None or ``unknown``: not known."""

    link_type: LinkType = "unknown"
    metered: bool | None = None
    """Uploads cost the user money."""
    data_saver: bool | None = None
    """The user asked apps to spare data; no connection is opened in advance then."""
    battery_percent: Annotated[float, msgspec.Meta(ge=0, le=100)] | None = None
    charging: bool | None = None
    thermal: ThermalState = "unknown"


@runtime_checkable
class ConditionsSource(Protocol):
    """Supplies the snapshot; called once per request, from any thread, so it must be quick."""

    def read(self) -> Conditions:
        """The signals now."""


@runtime_checkable
class PlatformSignals(ConditionsSource, Protocol):
    """A source that also tells networks apart, so that each can have its own memory."""

    def network_id(self) -> str | None:
        """The same on the same network (an SSID, a gateway's address); None: not known.

        It is never logged or sent; on disk there is a salted hash of it.
        """


class UnknownConditions:
    """The default source: knows nothing."""

    def read(self) -> Conditions:
        """Everything unknown."""
        return Conditions()


def read_conditions(source: ConditionsSource) -> Conditions:
    """The snapshot; a source that fails costs the signals, never the answer."""
    try:
        return source.read()
    except Exception:
        _log.exception("the conditions source failed: its signals count as unknown")
        return Conditions()


def read_network_id(source: ConditionsSource) -> str | None:
    """The network's identity, where the source tells it; what fails is not known."""
    ask = getattr(source, "network_id", None)  # isinstance of a Protocol costs microseconds
    if ask is None:
        return None
    try:
        found = ask()
        return found if isinstance(found, str) else None
    except Exception:
        _log.exception("the conditions source failed: its network counts as unknown")
        return None
