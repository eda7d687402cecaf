"""The live side: a broker, and for each policy a relay and a device, all real processes."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec

from benchmarks.live_check.device import DeviceTask, Record
from benchmarks.live_check.material import Link
from benchmarks.live_check.network import Network
from benchmarks.live_check.processes import Child, RelayControl, nearfar

__all__ = ["Bed", "LiveRun", "broker"]

_READY_S = 120.0
_AFTER_S = 60.0


class LiveRun(msgspec.Struct, frozen=True, kw_only=True):
    """One policy over one link."""

    records: list[Record]
    uplink_bytes: int
    """That crossed the link, from the start on, framing included."""
    discarded_bytes: int


class Bed(msgspec.Struct, frozen=True, kw_only=True):
    """Where runs happen."""

    network: Network
    logs: Path
    port: int
    """Of the broker."""
    api_key: str

    def run(self, task: DeviceTask, link: Link, *, offset_s: float, name: str) -> LiveRun:
        """Answer all photos of ``task`` (its broker and key are set here) behind ``link``."""
        seconds = task.arrived_s[-1] + _AFTER_S
        network = self.network
        relay_command = (
            "-m", "edge_runtime.simulation.relay", "--target", f"{network.broker_host}:{self.port}",
            "--host", network.relay_host, "--traces", str(link.folder), "--trace", "played",
            "--offset-s", f"{offset_s:.1f}", "--seconds", f"{seconds:.1f}",
        )  # fmt: skip
        with Child(f"relay-{name}", relay_command, logs=self.logs, prefix=network.prefix) as relay:
            ready = relay.read(_READY_S)
            command = ("-m", "benchmarks.live_check.device")
            with (
                RelayControl(ready["control_port"]) as control,
                Child(
                    f"device-{name}", command, logs=self.logs, prefix=network.device_prefix
                ) as device,
            ):
                task = msgspec.structs.replace(task, broker=ready["url"], api_key=self.api_key)
                device.write(msgspec.to_builtins(task))
                device.read(_READY_S)
                control.ask("restart")
                device.write({})
                device.read(_READY_S)
                before = control.ask("restart")
                start_s = time.monotonic() - before["elapsed_s"]
                device.write({"start_s": start_s})
                records = device.read(task.arrived_s[-1] + _AFTER_S)
                after = control.ask("stats")
        return LiveRun(
            records=msgspec.convert(records, list[Record]),
            uplink_bytes=after["uplink_bytes"] - before["uplink_bytes"],
            discarded_bytes=after["discarded_bytes"] - before["discarded_bytes"],
        )


@contextlib.contextmanager
def broker(servable: Path, network: Network, logs: Path) -> Iterator[Bed]:
    """A broker that asks for a key, as it must where others can reach it."""
    keys = logs / "keys.json"
    api_key = nearfar("keys", "add", "--file", str(keys), "--tenant", "live-check").split()[0]
    command = (
        "-m", "edge_runtime", "serve", "--models", str(servable), "--host", network.broker_host,
        "--port", "0", "--keys", str(keys), "--threads", "1", "--json-ready",
    )  # fmt: skip
    with Child("broker", command, logs=logs, prefix=network.broker_prefix) as child:
        ready = child.read(_READY_S)
        yield Bed(
            network=network,
            logs=logs,
            port=int(ready["url"].rpartition(":")[2]),
            api_key=api_key,
        )
