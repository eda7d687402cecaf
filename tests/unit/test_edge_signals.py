"""Platform signals: what Linux tells, what an app sets, and what nobody knows."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from edge_runtime import (
    Conditions,
    ConditionsSource,
    ConfigError,
    LinuxSignals,
    PlatformSignals,
    SettableSignals,
)
from edge_runtime.conditions import UnknownConditions, read_network_id

ROUTES = """Iface\tDestination\tGateway\tFlags\tRefCnt\tUse\tMetric\tMask\tMTU\tWindow\tIRTT
wlan0\t00000000\t0101A8C0\t0003\t0\t0\t600\t00000000\t0\t0\t0
eth0\t00000000\t0100000A\t0003\t0\t0\t100\t00000000\t0\t0\t0
eth0\t0000000A\t00000000\t0001\t0\t0\t100\t00FFFFFF\t0\t0\t0
"""
ARP = """IP address       HW type     Flags       HW address            Mask     Device
192.168.1.1      0x1         0x2         aa:bb:cc:dd:ee:01     *        wlan0
10.0.0.1         0x1         0x2         aa:bb:cc:dd:ee:02     *        eth0
"""


def system(root: Path, files: dict[str, str]) -> LinuxSignals:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return LinuxSignals(root, environment={})


@pytest.mark.parametrize(
    "files",
    [{}, {"proc/net/route": "h\na 00000000 zz x 0 0 0 00000000"}, {"proc/net/arp": "\x00" * 99}],
)
def test_what_cannot_be_read_is_unknown(tmp_path: Path, files: dict[str, str]) -> None:
    signals = system(tmp_path, files)
    assert signals.read() == Conditions()
    assert signals.network_id() is None


def test_a_signal_that_there_is_not_is_refused() -> None:
    with pytest.raises(ConfigError, match="no signal 'wifi'"):
        SettableSignals(wifi=True)
    with pytest.raises(ConfigError, match="signals"):
        SettableSignals().update(battery_percent=101)


def test_a_source_without_networks_or_with_a_broken_one_knows_none() -> None:
    class Broken(UnknownConditions):
        def network_id(self) -> str | None:
            raise OSError

    assert read_network_id(UnknownConditions()) is None
    assert read_network_id(Broken()) is None
    assert read_network_id(SettableSignals(network_id="home")) == "home"


def test_both_are_sources_of_conditions() -> None:
    for signals in (SettableSignals(), LinuxSignals()):
        assert isinstance(signals, PlatformSignals)
        assert isinstance(signals, ConditionsSource)


def test_what_the_app_sets_stays_until_it_sets_it_again() -> None:
    signals = SettableSignals(link_type="wifi", metered=False, network_id="home")
    signals.update(metered=True, battery_percent=30)
    assert signals.read() == Conditions(link_type="wifi", metered=True, battery_percent=30)
    assert signals.network_id() == "home"
    signals.update(link_type="lte")
    assert signals.network_id() is None  # another link, and not said which


def test_the_default_route_of_the_lowest_metric_is_the_link(tmp_path: Path) -> None:
    signals = system(
        tmp_path,
        {
            "proc/net/route": ROUTES,
            "proc/net/arp": ARP,
            "sys/class/net/eth0/type": "1\n",
            "sys/class/net/eth0/device/uevent": "",
        },
    )
    assert signals.read().link_type == "ethernet"
    assert signals.network_id() == "aa:bb:cc:dd:ee:02"


@pytest.mark.parametrize(
    ("files", "link_type"),
    [
        ({"sys/class/net/wlan0/wireless/x": ""}, "wifi"),
        ({"sys/class/net/wlan0/phy80211/x": ""}, "wifi"),
        ({"sys/class/net/wlan0/uevent": "INTERFACE=wlan0\nDEVTYPE=wwan\n"}, "lte"),
        ({"sys/class/net/wlan0/type": "1"}, "unknown"),  # a bridge or a tunnel
    ],
)
def test_an_interface_tells_its_kind(tmp_path: Path, files: dict[str, str], link_type: str) -> None:
    routes = "".join(line for line in ROUTES.splitlines(True) if "eth0" not in line)
    assert system(tmp_path, {"proc/net/route": routes, **files}).read().link_type == link_type


@pytest.mark.parametrize(("state", "link_type"), [("down", "none"), ("up", "unknown")])
def test_no_interface_up_is_offline(tmp_path: Path, state: str, link_type: str) -> None:
    files = {
        "sys/class/net/lo/operstate": "unknown",
        "sys/class/net/wlan0/operstate": state,
        "proc/net/route": ROUTES.splitlines(True)[0],
    }
    assert system(tmp_path, files).read().link_type == link_type


@pytest.mark.parametrize(
    ("status", "mains", "charging"),
    [("Discharging", "0", False), ("Charging", "1", True), ("Not charging", "1", True),
     ("Full", "0", True), ("", "0", None)],
)  # fmt: skip
def test_battery_and_mains(tmp_path: Path, status: str, mains: str, charging: bool | None) -> None:
    base = "sys/class/power_supply"
    files = {
        f"{base}/AC/type": "Mains", f"{base}/AC/online": mains,
        f"{base}/BAT0/type": "Battery", f"{base}/BAT0/capacity": "104",
        f"{base}/BAT0/status": status,
        f"{base}/mouse/type": "Battery", f"{base}/mouse/scope": "Device",
        f"{base}/mouse/capacity": "3",
    }  # fmt: skip
    conditions = system(tmp_path, files).read()
    assert (conditions.battery_percent, conditions.charging) == (100.0, charging)


@pytest.mark.parametrize(
    ("temperature", "state"),
    [("40000", "nominal"), ("80000", "fair"), ("90000", "serious"), ("101000", "critical")],
)
def test_heat_is_told_by_the_zones_own_trip_points(
    tmp_path: Path, temperature: str, state: str
) -> None:
    zone = "sys/class/thermal/thermal_zone0"
    files = {f"{zone}/temp": temperature, "sys/class/thermal/thermal_zone1/temp": "200000"}
    for number, (kind, at) in enumerate(
        [("passive", "75000"), ("hot", "85000"), ("critical", "100000")]
    ):
        files[f"{zone}/trip_point_{number}_type"] = kind
        files[f"{zone}/trip_point_{number}_temp"] = at
    assert system(tmp_path, files).read().thermal == state


def test_metered_and_data_saver_come_from_the_environment(tmp_path: Path) -> None:
    said = {"NEARFAR_METERED": "1", "NEARFAR_DATA_SAVER": "off"}
    conditions = LinuxSignals(tmp_path, environment=said).read()
    assert (conditions.metered, conditions.data_saver) == (True, False)


def test_files_are_read_again_after_two_seconds_only(tmp_path: Path) -> None:
    now = 0.0
    base = "sys/class/power_supply/BAT0"
    system(tmp_path, {f"{base}/type": "Battery", f"{base}/capacity": "50"})
    signals = LinuxSignals(tmp_path, environment={}, clock=lambda: now)
    assert signals.read().battery_percent == 50
    (tmp_path / base / "capacity").write_text("49")
    now = 1.9
    assert signals.read().battery_percent == 50
    now = 2.0
    assert signals.read().battery_percent == 49


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the Linux kernel's files")
def test_this_machine_is_read_without_an_error() -> None:
    LinuxSignals().read()
