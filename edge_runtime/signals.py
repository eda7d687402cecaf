"""Platform signals that are read here: on Linux from the kernel, elsewhere from the app.

On a phone, implement ``PlatformSignals`` over the platform's own services; ``SettableSignals``
is one that the app pushes into, from whatever thread its callbacks run on.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import EllipsisType
from typing import Any, Final

import msgspec

from edge_runtime.conditions import Conditions, LinkType, ThermalState
from edge_runtime.contract.errors import ConfigError

__all__ = ["LinuxSignals", "SettableSignals"]

_FRESH_S: Final = 2.0
_UP: Final = 0x1
_GATEWAY: Final = 0x2
_TRIPS: Final[tuple[tuple[str, ThermalState], ...]] = (
    ("critical", "critical"),
    ("hot", "serious"),
    ("passive", "fair"),
)
_TRUE: Final = frozenset(("1", "true", "yes", "on"))
_FALSE: Final = frozenset(("0", "false", "no", "off"))


class SettableSignals:
    """What the app last said. Thread-safe.

    signals = SettableSignals(link_type="wifi", network_id="home")
    signals.update(link_type="lte", metered=True)
    """

    def __init__(self, *, network_id: str | None = None, **signals: Any) -> None:
        self._lock = threading.Lock()
        self._now: tuple[Conditions, str | None] = (_conditions(Conditions(), signals), network_id)

    def update(self, *, network_id: str | EllipsisType | None = ..., **signals: Any) -> None:
        """Change some signals. Another link without a ``network_id`` is an unknown network.

        Raises ``ConfigError`` for a signal that there is not, or a value that it cannot have.
        """
        with self._lock:
            before, network = self._now
            after = _conditions(before, signals)
            if not isinstance(network_id, EllipsisType):
                network = network_id
            elif after.link_type != before.link_type:
                network = None
            self._now = after, network

    def read(self) -> Conditions:
        """The signals now."""
        return self._now[0]

    def network_id(self) -> str | None:
        """The network, as the app calls it."""
        return self._now[1]


def _conditions(before: Conditions, signals: Mapping[str, Any]) -> Conditions:
    unknown = set(signals) - set(Conditions.__struct_fields__)
    if unknown:
        raise ConfigError(f"there is no signal {min(unknown)!r}")
    try:
        return msgspec.convert(msgspec.to_builtins(before) | dict(signals), Conditions)
    except msgspec.ValidationError as error:
        raise ConfigError(f"signals: {error}") from None


class LinuxSignals:
    """Read from ``/sys`` and ``/proc`` at most every 2 s; what cannot be read is unknown.

    * link: the interface of the default route; ``none`` when no interface but loopback is up.
      A cellular modem counts as ``lte``: its generation is not told there.
    * network: the hardware address of the default gateway.
    * battery: ``/sys/class/power_supply``.
    * heat: each thermal zone against its own trip points (passive, hot, critical).
    * metered and data saver: ``NEARFAR_METERED`` and ``NEARFAR_DATA_SAVER`` (1 or 0) in the
      environment, as no file of the kernel tells them.

    ``root`` is prefixed to every path; ``environment`` stands for ``os.environ``.
    """

    def __init__(
        self,
        root: Path = Path("/"),
        *,
        environment: Mapping[str, str] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._root = root
        self._environment = os.environ if environment is None else environment
        self._clock = clock
        self._lock = threading.Lock()
        self._read_s = float("-inf")
        self._now: tuple[Conditions, str | None] = (Conditions(), None)

    def read(self) -> Conditions:
        """The signals, at most 2 s old."""
        return self._fresh()[0]

    def network_id(self) -> str | None:
        """Hardware address of the default gateway, at most 2 s old; None: not known."""
        return self._fresh()[1]

    def _fresh(self) -> tuple[Conditions, str | None]:
        with self._lock:
            now_s = self._clock()
            if now_s - self._read_s >= _FRESH_S:
                self._now, self._read_s = self._look(), now_s
            return self._now

    def _look(self) -> tuple[Conditions, str | None]:
        interface, gateway = self._default_route()
        percent, charging = self._battery()
        conditions = Conditions(
            link_type=self._link_type(interface),
            metered=_flag(self._environment.get("NEARFAR_METERED")),
            data_saver=_flag(self._environment.get("NEARFAR_DATA_SAVER")),
            battery_percent=percent,
            charging=charging,
            thermal=self._thermal(),
        )
        return conditions, self._hardware_address(gateway, interface)

    # Network --------------------------------------------------------------------------

    def _default_route(self) -> tuple[str | None, str | None]:
        """Interface and IPv4 gateway of the default route of the lowest metric."""
        best: tuple[int, str, str] | None = None
        for line in self._lines("proc/net/route")[1:]:
            fields = line.split()
            if len(fields) < 8 or fields[1] != "00000000" or fields[7] != "00000000":
                continue
            with contextlib.suppress(ValueError):  # no line of the kernel's
                flags, metric = int(fields[3], 16), int(fields[6])
                octets = bytes.fromhex(fields[2])[::-1]  # little-endian
                leads_out = flags & (_UP | _GATEWAY) == _UP | _GATEWAY
                if leads_out and (best is None or metric < best[0]):
                    best = metric, fields[0], ".".join(map(str, octets))
        if best is not None:
            return best[1], best[2]
        for line in self._lines("proc/net/ipv6_route"):
            fields = line.split()
            default = len(fields) >= 10 and fields[:2] == ["0" * 32, "00"]
            if default and fields[9] != "lo":
                return fields[9], None
        return None, None

    def _link_type(self, interface: str | None) -> LinkType:
        net = self._root / "sys/class/net"
        if interface is None:
            others = [path.name for path in _entries(net) if path.name != "lo"]
            up = any(self._text(f"sys/class/net/{name}/operstate") != "down" for name in others)
            return "unknown" if up or not net.is_dir() else "none"
        folder = net / interface
        if (folder / "wireless").exists() or (folder / "phy80211").exists():
            return "wifi"
        if "DEVTYPE=wwan" in self._lines(f"sys/class/net/{interface}/uevent"):
            return "lte"
        if interface.startswith(("wwan", "rmnet", "ppp")):
            return "lte"
        ethernet = self._text(f"sys/class/net/{interface}/type") == "1"
        return "ethernet" if ethernet and (folder / "device").exists() else "unknown"

    def _hardware_address(self, gateway: str | None, interface: str | None) -> str | None:
        for line in self._lines("proc/net/arp")[1:]:
            fields = line.split()
            known = len(fields) >= 6 and fields[3] != "00:00:00:00:00:00"
            if known and (fields[0], fields[5]) == (gateway, interface):
                return fields[3]
        return None

    # Battery and heat -----------------------------------------------------------------

    def _battery(self) -> tuple[float | None, bool | None]:
        percent: float | None = None
        charging: bool | None = None
        for supply in _entries(self._root / "sys/class/power_supply"):
            base = f"sys/class/power_supply/{supply.name}"
            kind = self._text(f"{base}/type")
            if kind == "Battery" and self._text(f"{base}/scope") != "Device":  # a mouse has one
                level = self._number(f"{base}/capacity")
                percent = None if level is None else min(max(level, 0.0), 100.0)
                status = self._text(f"{base}/status")
                charging = charging or (status in ("Charging", "Full") if status else None)
            elif kind in ("Mains", "USB") and self._text(f"{base}/online") == "1":
                charging = True
        return percent, charging

    def _thermal(self) -> ThermalState:
        """The hottest zone, against its own trip points."""
        states: list[ThermalState] = []
        for zone in _entries(self._root / "sys/class/thermal"):
            if not zone.name.startswith("thermal_zone"):
                continue
            base = f"sys/class/thermal/{zone.name}"
            temperature = self._number(f"{base}/temp")
            trips = self._trips(base)
            if temperature is None or not trips:
                continue
            reached = [state for kind, state in _TRIPS if temperature >= trips.get(kind, 1e9)]
            states.append(reached[0] if reached else "nominal")
        order: tuple[ThermalState, ...] = ("critical", "serious", "fair", "nominal")
        return next((state for state in order if state in states), "unknown")

    def _trips(self, base: str) -> dict[str, float]:
        found: dict[str, float] = {}
        for number in range(12):
            kind = self._text(f"{base}/trip_point_{number}_type")
            if kind is None:
                break
            at = self._number(f"{base}/trip_point_{number}_temp")
            if at is not None and at > 0:
                found[kind] = min(at, found.get(kind, at))
        return found

    # Files ----------------------------------------------------------------------------

    def _lines(self, path: str) -> list[str]:
        return (self._text(path) or "").splitlines()

    def _text(self, path: str) -> str | None:
        try:
            with (self._root / path).open("rb") as file:
                return file.read(65_536).decode("ascii", "replace").strip()
        except OSError:
            return None

    def _number(self, path: str) -> float | None:
        try:
            return float(self._text(path) or "")
        except ValueError:
            return None


def _entries(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError:
        return []


def _flag(value: str | None) -> bool | None:
    word = (value or "").strip().lower()
    return True if word in _TRUE else False if word in _FALSE else None
