"""Is the simulator right? Its figures against those of real processes over the same link.

    python -m benchmarks.live_check --json build/bench/live_check.json [--quick]
    python -m benchmarks.live_check --bundle B --servable S --photos DIR --labels CSV \\
        --traces DIR --trace NAME --trace NAME

Live: a broker and a device (``EdgeRuntime`` with an int8 model) in two network namespaces, or on
loopback where there are none, joined by a relay that plays a trace; photos are taken at fixed
times, answered or not. Simulated: the same arrivals, trace, sizes, latencies and answers, as
measured before over a flat link (``measured.py``). Each policy runs on both sides.

Exits 1 unless, for each policy, accuracy within the deadline differs by 2 points at most and
mean latency by 15 %, and no two policies change places.
"""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from benchmarks.live_check.compare import describe, order_breaks, ranked, report
from benchmarks.live_check.device import DeviceTask
from benchmarks.live_check.live import Bed, LiveRun, broker
from benchmarks.live_check.material import (
    Link,
    Photos,
    draw_offset_s,
    flat,
    make_bundle,
    make_servable,
    read_photos,
    resolve_links,
)
from benchmarks.live_check.measured import Pair, make_world, overhead_ms, server_ms, simulate_policy
from benchmarks.live_check.network import Network
from benchmarks.machine import describe_machine

POLICIES = (
    "LocalOnly", "CloudOnly", "Hedged", "ExpectedUtility:accuracy", "ExpectedUtility:balanced",
)  # fmt: skip
_FLAT_MBPS, _FLAT_RTT_MS = 1000.0, 1.0
_MEASURED_DEADLINE_MS = 10_000.0
_MEASURED_GAP_S = 0.2


def measure_pair(bed: Bed, bundle: Path, variant: str, photos: Photos, link: Link) -> Pair:
    """Both models over all photos once, one at a time, over a flat fast link."""
    task = DeviceTask(
        bundle=str(bundle),
        variant=variant,
        broker="",
        api_key="",
        policy="LocalOnly",
        link_type="wifi",
        deadline_ms=_MEASURED_DEADLINE_MS,
        photos=photos.files,
        arrived_s=[0.5 + _MEASURED_GAP_S * number for number in range(len(photos.files))],
    )
    local = bed.run(task, link, offset_s=0.0, name="measure-local").records
    cloud_run = bed.run(
        msgspec.structs.replace(task, policy="CloudOnly"), link, offset_s=0.0, name="measure-cloud"
    )
    cloud = cloud_run.records
    if any(r.source is None or r.entry is None for r in (*local, *cloud)):
        raise SystemExit(f"no answer over a flat link: {[r.error for r in cloud if r.error][:3]}")
    body_bytes = [r.entry.outcome.uploaded_bytes for r in cloud if r.entry]
    header = max(0.0, (cloud_run.uplink_bytes - sum(body_bytes)) / len(body_bytes))
    confidence = [r.entry.outcome.confidence for r in local if r.entry]
    return Pair(
        body_bytes=body_bytes,
        local_ms=[r.latency_ms for r in local],
        confidence=[1.0 if value is None else value for value in confidence],
        local_right=[r.predicted == t for r, t in zip(local, photos.truth, strict=True)],
        cloud_right=[r.predicted == t for r, t in zip(cloud, photos.truth, strict=True)],
        server_ms=[server_ms(r.entry.outcome.timings) or 0.0 for r in cloud if r.entry],
        overhead_ms=float(
            np.median(
                [
                    overhead_ms(r.latency_ms, r.entry.outcome.timings, _FLAT_RTT_MS)
                    for r in cloud
                    if r.entry
                ]
            )
        ),
        header_bytes=header,
    )


def check_link(
    bed: Bed, bundle: Path, photos: Photos, pair: Pair, link: Link, arguments: argparse.Namespace
) -> dict[str, Any]:
    """Every policy over one link, on both sides."""
    rng = np.random.default_rng(arguments.seed)
    gaps = rng.exponential(1.0 / arguments.rate, int(2 * arguments.seconds * arguments.rate) + 20)
    times = np.cumsum(gaps)
    arrived_s = times[times < arguments.seconds].tolist()
    shown = [number % len(photos.files) for number in range(len(arrived_s))]
    offset_s = arguments.offset_s
    if offset_s is None:
        offset_s = draw_offset_s(link, rng)

    def play(policy: str) -> LiveRun:
        task = DeviceTask(
            bundle=str(bundle),
            variant=arguments.variant,
            broker="",
            api_key="",
            policy=policy,
            link_type=link.trace.radio,
            deadline_ms=arguments.deadline_ms,
            photos=[photos.files[number] for number in shown],
            arrived_s=arrived_s,
        )
        return bed.run(task, link, offset_s=offset_s, name=_run_name(link, policy))

    with ThreadPoolExecutor(arguments.together) as pool:
        played = dict(zip(POLICIES, pool.map(play, POLICIES), strict=True))
    world = make_world(
        link,
        pair,
        arrived_s,
        shown,
        deadline_ms=arguments.deadline_ms,
        offset_s=offset_s,
        local_ms=[record.latency_ms for record in played["LocalOnly"].records],
        cloud_ms=[
            None if record.entry is None else server_ms(record.entry.outcome.timings)
            for record in played["CloudOnly"].records
        ],
    )
    truth = [photos.truth[number] for number in shown]
    reports = []
    for policy, live in played.items():
        outcomes, events = simulate_policy(world, policy)
        reports.append(report(policy, live, outcomes, world, truth))
        if arguments.details is not None:
            arguments.details.mkdir(parents=True, exist_ok=True)
            document = {
                "live": live,
                "events": events,
                "arrived_s": arrived_s,
                "shown": shown,
                "pair": pair,
            }
            path = arguments.details / f"{_run_name(link, policy)}.json"
            path.write_bytes(msgspec.json.encode(document))
    broken = order_breaks(reports)
    rates = link.trace.uplink_mbps
    return {
        "trace": link.trace.name,
        "class": link.trace.group,
        "offset_s": round(offset_s, 1),
        "median_mbps": round(float(np.median(rates)), 3),
        "requests": len(arrived_s),
        "policies": reports,
        "order_live": ranked(reports, "live"),
        "order_simulated": ranked(reports, "simulated"),
        "order_breaks": broken,
        "passed": not broken and all(found.passed for found in reports),
    }


def _run_name(link: Link, policy: str) -> str:
    return f"{link.folder.name}-{policy.replace(':', '-')}"


def show(link: dict[str, Any]) -> None:
    """A table for people."""
    print(
        f"\n{link['trace']} ({link['class']}, {link['median_mbps']:g} Mbit/s median, "
        f"from {link['offset_s']:g} s), {link['requests']} requests a policy"
    )
    print(f"{'':26}{'right in time %':>22}{'mean ms':>22}{'kB/request':>22}{'cloud %':>14}")
    head = f"{'live':>8}{'sim':>7}{'diff':>7}" + 2 * f"{'live':>8}{'sim':>7}{'ratio':>7}"
    print(f"{'':26}{head}{'live':>7}{'sim':>7}")
    for found in link["policies"]:
        live, simulated = found.live, found.simulated
        print(
            f"{found.policy:26}{100 * live.accuracy_in_deadline:8.1f}"
            f"{100 * simulated.accuracy_in_deadline:7.1f}{100 * found.accuracy_difference:+7.1f}"
            f"{_number(live.mean_ms, 8)}{_number(simulated.mean_ms, 7)}"
            f"{_number(found.latency_ratio, 7, 2)}"
            f"{live.kb_per_request:8.1f}{simulated.kb_per_request:7.1f}"
            f"{_number(found.bytes_ratio, 7, 2)}"
            f"{100 * live.cloud_share:7.0f}{100 * simulated.cloud_share:7.0f}"
            f"  {'' if found.passed else 'DIFFERS'}"
        )
    for pair in link["order_breaks"]:
        print(f"order differs: {pair}")


def _number(value: float | None, width: int, digits: int = 1) -> str:
    return f"{'-':>{width}}" if value is None else f"{value:{width}.{digits}f}"


def main() -> None:
    """Parse the command line, run both sides, write the JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.live_check")
    parser.add_argument("--json", type=Path, default=Path("build/bench/live_check.json"))
    parser.add_argument("--quick", action="store_true", help="15 s a policy")
    parser.add_argument("--bundle", type=Path, help="default: zoo digits-small, converted")
    parser.add_argument("--variant", default="tflite-int8", help="of the bundle")
    parser.add_argument("--servable", type=Path, help="default: zoo digits-large, exported")
    parser.add_argument("--photos", type=Path, help="default: rendered digits, enlarged")
    parser.add_argument("--labels", type=Path, help="default: labels.csv beside the photos")
    parser.add_argument("--traces", type=Path, help="default: a synthetic link")
    parser.add_argument("--trace", action="append", default=[], help="of --traces; repeat it")
    parser.add_argument("--offset-s", type=float, help="default: drawn from the seed")
    parser.add_argument("--seconds", type=float, help="of each policy run; default: 120")
    parser.add_argument("--rate", type=float, default=1.5, help="photos a second")
    parser.add_argument("--deadline-ms", type=float, default=400.0)
    parser.add_argument("--count", type=int, default=180, help="photos, measured once")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--together", type=int, default=1, help="policy runs at a time")
    parser.add_argument("--nice", type=int, default=0, help="of the processes; below 0: as root")
    parser.add_argument("--loopback", action="store_true", help="no network namespaces")
    parser.add_argument("--details", type=Path, help="folder for every request's log and events")
    arguments = parser.parse_args()
    arguments.seconds = arguments.seconds or (15.0 if arguments.quick else 120.0)
    if arguments.quick:
        arguments.count = min(arguments.count, 30)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # what was made is removed
    began_s = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="nearfar-live-") as scratch:
        work = Path(scratch)
        bundle = arguments.bundle or make_bundle(work)
        servable = arguments.servable or make_servable(work)
        photos = read_photos(
            arguments.photos, arguments.labels, arguments.count, arguments.seed, work
        )
        links = resolve_links(arguments.traces, arguments.trace, arguments.seed, work)
        with (
            Network(loopback=arguments.loopback, nice=arguments.nice) as network,
            broker(servable, network, work) as bed,
        ):
            near = flat(_FLAT_MBPS, _FLAT_RTT_MS, work)
            pair = measure_pair(bed, bundle, arguments.variant, photos, near)
            measured = describe(pair)
            print(", ".join(f"{name} {value:g}" for name, value in measured.items()))
            checked = []
            for link in links:
                checked.append(check_link(bed, bundle, photos, pair, link, arguments))
                show(checked[-1])
    passed = all(link["passed"] for link in checked)
    document = {
        "machine": describe_machine(),
        "network": {"kind": network.kind, "reason": network.reason},
        "deadline_ms": arguments.deadline_ms,
        "rate_per_s": arguments.rate,
        "seconds": arguments.seconds,
        "seed": arguments.seed,
        "together": arguments.together,
        "nice": arguments.nice,
        "measured": measured,
        "links": checked,
        "passed": passed,
    }
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    arguments.json.write_bytes(msgspec.json.format(msgspec.json.encode(document), indent=1))
    print(
        f"\n{network.kind}, {time.monotonic() - began_s:.0f} s, "
        f"{'passed' if passed else 'DIFFERS'}; wrote {arguments.json}"
    )
    if not passed:
        sys.exit(1)


if __name__ == "__main__":
    main()
