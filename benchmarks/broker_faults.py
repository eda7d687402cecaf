"""Faults of the broker's own parts under load: how soon is goodput back, who was not answered?

    python -m benchmarks.broker_faults --json build/bench/broker_faults.json [--quick] [--only F]

A real broker in a process of its own; an open loop of photos, with the deadline that phones
have, at a share of what the broker answers; and two runtimes of devices, which must have an
answer by each deadline whatever happens. In the middle one thing goes wrong. Goodput is back at
the first moment from which on, over two seconds, 95 % of what was sent is answered in time.
Exits 1 when a demand is not met.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import importlib.util
import os
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import msgspec

from benchmarks.machine import describe_machine
from benchmarks.serving.load import GAVE_UP, Kind, Phase, Plan, Record
from benchmarks.serving.measure import send
from benchmarks.serving.processes import tree
from edge_runtime import EdgeRuntime
from edge_runtime.contract.errors import NearfarError
from tests.support.broker import BrokerProcess, broker_process, is_running, predict, wait_until_gone
from tests.support.bundles import photo, servable, tiny_bundle
from tests.support.images import encode
from tests.support.ray_cluster import add_node, local_cluster
from tests.support.servables import crashing_net, greedy_net, write_servable

DEADLINE_MS: Final = 200
LATE_MS: Final = 50.0
"""A device's answer may come so much after its deadline on a busy machine."""
BEFORE_S: Final = 4.0
AFTER_S: Final = 14.0
WINDOW_S: Final = 2.0
_EVENTS: Final = ("worker_exited", "request_quarantined", "batch_cap_learned", "actor_lost")
BACK: Final = 0.95
_STEP_S: Final = 0.05


@dataclass(frozen=True, slots=True)
class Scene:
    """A broker under load, for a fault to strike."""

    broker: BrokerProcess
    folder: Path
    model: Path
    cluster: Any = None
    node: Any = None


Strike = Callable[[Scene, contextlib.ExitStack], None]
"""Does the damage; what it starts ends with the stack. It returns when the damage is done, or,
of a broker that is started again, when that listens."""


def _kill_worker(scene: Scene, _: contextlib.ExitStack) -> None:
    os.kill(scene.broker.worker_pid(), signal.SIGKILL)


def _hang_worker(scene: Scene, _: contextlib.ExitStack) -> None:
    os.kill(scene.broker.worker_pid(), signal.SIGSTOP)


def _post(scene: Scene, bodies: Sequence[tuple[str, bytes]]) -> None:
    async def all_at_once() -> None:
        await asyncio.gather(
            *(
                predict(
                    scene.broker.url, body, model="full-size", content_type=kind, deadline_ms=5000
                )
                for kind, body in bodies
            )
        )

    asyncio.run(all_at_once())


def _send_poison(scene: Scene, _: contextlib.ExitStack) -> None:
    from PIL import Image

    black = [("image/png", encode(Image.new("RGB", (side, side)))) for side in (40, 41)]
    good = [("image/jpeg", photo(seed)) for seed in range(3)]
    _post(scene, [good[0], black[0], good[1], black[1], good[2]])


def _send_burst(scene: Scene, _: contextlib.ExitStack) -> None:
    _post(scene, [("image/jpeg", photo(seed)) for seed in range(16)])


def _kill_broker(scene: Scene, stack: contextlib.ExitStack) -> None:
    children = tree(scene.broker.process.pid)[1:]
    scene.broker.process.kill()
    for pid in children:
        if not wait_until_gone(pid, 10.0):
            raise SystemExit(f"process {pid} of a killed broker is still there")
    port = scene.broker.url.rpartition(":")[2]
    again = scene.folder / "again"
    again.mkdir()
    stack.enter_context(broker_process(again, "--models", str(scene.model), "--port", port))


def _lose_node(scene: Scene, _: contextlib.ExitStack) -> None:
    scene.cluster.remove_node(scene.node)


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing that goes wrong."""

    title: str
    strike: Strike
    back_in_s: float
    """Demanded, from the moment that ``Strike`` names."""
    make: Callable[[Path], Path] = servable
    arguments: tuple[str, ...] = ()
    share: float = 0.5
    """Of the measured capacity, offered."""
    after_s: float = AFTER_S


def _crashing(target: Path) -> Path:
    return write_servable(target, crashing_net(), name="full-size")


def _greedy(target: Path) -> Path:
    return write_servable(target, greedy_net(), name="full-size")


FAULTS: Final = {
    "worker_killed": Fault("the worker is killed (-9)", _kill_worker, 2.0),
    "worker_hung": Fault("the worker hangs in a batch", _hang_worker, 2.0),
    "poison": Fault("two poison images among good ones", _send_poison, 2.0, make=_crashing),
    "memory": Fault("a batch does not fit into memory", _send_burst, 2.0, make=_greedy),
    "broker_killed": Fault("the broker is killed (-9) and started again", _kill_broker, 2.0),
    "ray_node_lost": Fault(
        "a Ray node is lost", _lose_node, 10.0, arguments=("--executor", "ray", "--slots", "2"),
        share=0.2, after_s=30.0,
    ),
}  # fmt: skip


class Devices(msgspec.Struct):
    """What the runtimes of two devices saw."""

    asked: int = 0
    on_device: int = 0
    in_cloud: int = 0
    unanswered: dict[str, int] = {}
    late: int = 0
    worst_ms: float = 0.0


class Finding(msgspec.Struct, kw_only=True):
    """One fault, measured."""

    fault: str
    offered_per_s: float
    capacity_per_s: float
    goodput_before: float
    """Share of what was sent that was answered in its deadline."""
    back_s: float | None
    """After the fault, or after the new broker listened; None: not in the time measured."""
    ends: dict[str, int]
    """Requests by HTTP status; 0: the client left, -1: the connection broke."""
    events: dict[str, int]
    """What the broker logged of it, by name."""
    devices: Devices
    left_processes: int
    passed: dict[str, bool]


@dataclass(slots=True)
class _Ask:
    """Asks with a runtime, ten times a second, until it is told to stop."""

    runtime: EdgeRuntime
    seen: Devices = field(default_factory=Devices)

    def until(self, stop: threading.Event) -> None:
        number = 0
        while not stop.wait(0.1):
            number += 1
            started_s = time.monotonic()
            self.seen.asked += 1
            try:
                result = self.runtime.run(photo(number % 8), deadline_ms=2 * DEADLINE_MS)
            except NearfarError as error:
                self.seen.unanswered[error.code] = self.seen.unanswered.get(error.code, 0) + 1
                continue
            took_ms = (time.monotonic() - started_s) * 1e3
            self.seen.worst_ms = round(max(self.seen.worst_ms, took_ms), 1)
            self.seen.late += took_ms > 2 * DEADLINE_MS + LATE_MS
            if result.inference_source == "ON_DEVICE":
                self.seen.on_device += 1
            else:
                self.seen.in_cloud += 1


@contextlib.contextmanager
def _devices(url: str) -> Iterator[list[_Ask]]:
    stop = threading.Event()
    with contextlib.ExitStack() as stack:
        asks = [
            _Ask(stack.enter_context(EdgeRuntime(tiny_bundle(), url, variant="tflite-fp32")))
            for _ in range(2)
        ]
        threads = [threading.Thread(target=ask.until, args=(stop,)) for ask in asks]
        for thread in threads:
            thread.start()
        try:
            yield asks
        finally:
            stop.set()
            for thread in threads:
                thread.join()


def _kind(folder: Path) -> Kind:
    body = photo(0)
    path = folder / "body"
    path.write_bytes(body)
    head = (
        "POST /v1/models/full-size:predict HTTP/1.1\r\nHost: 127.0.0.1\r\n"
        f"Content-Type: image/jpeg\r\nContent-Length: {len(body)}\r\n"
        f"X-Deadline-Ms: {DEADLINE_MS}\r\n\r\n"
    )
    return Kind(name="photo", head=head, body_path=str(path))


def _good(record: Record) -> bool:
    return record.status == 200 and record.ms <= DEADLINE_MS


def goodput(records: Sequence[Record], from_s: float, to_s: float) -> float:
    """The share of what was sent in a stretch that was answered in its deadline."""
    sent = [record for record in records if from_s <= record.at_s < to_s]
    return sum(map(_good, sent)) / len(sent) if sent else 0.0


def back_after(records: Sequence[Record], struck_s: float, end_s: float) -> float | None:
    """Seconds from ``struck_s`` to the first moment from which goodput is back; None: never."""
    steps = int((end_s - WINDOW_S - struck_s) / _STEP_S) + 1
    for step in range(max(steps, 0)):
        at_s = struck_s + step * _STEP_S
        # The first moments count too: a window may not begin with what the fault still costs.
        first = goodput(records, at_s, at_s + WINDOW_S / 10)
        if first >= BACK - 0.1 and goodput(records, at_s, at_s + WINDOW_S) >= BACK:
            return round(at_s - struck_s, 2)
    return None


def measure(fault: Fault, folder: Path, cluster: Any = None) -> Finding:
    """Load, strike, and what came of it."""
    model = fault.make(folder / "model")
    arguments = list(fault.arguments)
    node = None
    if cluster is not None:
        node = add_node(cluster)
        arguments += ["--backend", cluster.address]
    with contextlib.ExitStack() as stack:
        broker = stack.enter_context(broker_process(folder, "--models", str(model), *arguments))
        scene = Scene(broker, folder, model, cluster, node)
        port, kind = int(broker.url.rpartition(":")[2]), _kind(folder)
        closed = Plan(port=port, kinds=(kind,), give_up_ms=5000, callers=8, seconds=2.0)
        capacity = sum(map(_good, send(closed))) / 2.0
        phase = Phase(seconds=BEFORE_S + fault.after_s, per_s=max(capacity * fault.share, 5.0))
        plan = Plan(port=port, kinds=(kind,), give_up_ms=5000, phases=(phase,))
        pids = tree(broker.process.pid)
        with _devices(broker.url) as asks:
            records: list[Record] = []
            begun_s = time.monotonic()
            loading = threading.Thread(target=lambda: records.extend(send(plan)))
            loading.start()
            time.sleep(BEFORE_S)
            fault.strike(scene, stack)
            # The load's own process starts some tenths later: the first record says when.
            struck_s = time.monotonic() - begun_s
            if fault.strike is not _kill_broker:
                struck_s = BEFORE_S
            loading.join()
        total_s = BEFORE_S + fault.after_s
        back_s = back_after(records, struck_s, total_s)
    left = sum(not wait_until_gone(pid, 10.0) and is_running(pid) for pid in pids)
    seen = Devices()
    for ask in asks:
        for name in ("asked", "on_device", "in_cloud", "late"):
            setattr(seen, name, getattr(seen, name) + getattr(ask.seen, name))
        seen.worst_ms = max(seen.worst_ms, ask.seen.worst_ms)
        seen.unanswered = dict(Counter(seen.unanswered) + Counter(ask.seen.unanswered))
    ends = Counter(str(record.status) for record in records)
    # A killed broker breaks connections; nothing else may.
    broken = 0 if fault.strike is _kill_broker else ends["-1"]
    return Finding(
        fault=fault.title,
        offered_per_s=round(phase.per_s, 1),
        capacity_per_s=round(capacity, 1),
        goodput_before=round(goodput(records, 1.0, BEFORE_S - 0.5), 3),
        back_s=back_s,
        ends=dict(sorted(ends.items())),
        events={name: count for name in _EVENTS if (count := len(broker.events(name)))},
        devices=seen,
        left_processes=left,
        passed={
            f"goodput back within {fault.back_in_s:g} s": back_s is not None
            and back_s <= fault.back_in_s,
            "every request ends": ends[str(GAVE_UP)] == 0 and broken == 0,
            "every device has its answer": not seen.unanswered and seen.late == 0,
            "no process is left": left == 0,
        },
    )


def _print(name: str, finding: Finding) -> None:
    back = "not back" if finding.back_s is None else f"back in {finding.back_s:.2f} s"
    seen = finding.devices
    print(
        f"{name:14} {finding.fault}: {back}; {finding.offered_per_s:.0f} of "
        f"{finding.capacity_per_s:.0f} a second offered, {finding.goodput_before:.1%} good before; "
        f"ends {finding.ends}; {finding.events}; devices {seen.in_cloud} in the cloud, "
        f"{seen.on_device} themselves, "
        f"{sum(seen.unanswered.values())} unanswered, {seen.late} late (worst {seen.worst_ms:.0f} "
        "ms)",
        flush=True,
    )
    for demand, met in finding.passed.items():
        if not met:
            print(f"{'':14} NOT MET: {demand}")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.broker_faults")
    parser.add_argument("--json", type=Path, default=Path("build/bench/broker_faults.json"))
    parser.add_argument(
        "--quick", action="store_true", help="without Ray, whose nodes start slowly"
    )
    parser.add_argument("--only", action="append", choices=sorted(FAULTS), help="repeat for more")
    arguments = parser.parse_args()
    names = arguments.only or list(FAULTS)
    if arguments.quick or importlib.util.find_spec("ray") is None:
        names = [name for name in names if name != "ray_node_lost"]
    findings: dict[str, Finding] = {}
    with tempfile.TemporaryDirectory(prefix="nearfar-faults-") as scratch:
        for name in names:
            folder = Path(scratch) / name
            folder.mkdir()
            with local_cluster() if name == "ray_node_lost" else contextlib.nullcontext() as made:
                findings[name] = measure(FAULTS[name], folder, made)
            _print(name, findings[name])
    passed = {f"{name}: {k}": v for name, one in findings.items() for k, v in one.passed.items()}
    document = {
        "benchmark": "broker_faults",
        "machine": describe_machine(),
        "deadline_ms": DEADLINE_MS,
        "faults": findings,
        "skipped": sorted(set(FAULTS) - set(names)),
        "summary": {"passed": passed},
    }
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    arguments.json.write_bytes(msgspec.json.format(msgspec.json.encode(document), indent=1))
    if not all(passed.values()):
        sys.exit(1)


if __name__ == "__main__":
    main()
