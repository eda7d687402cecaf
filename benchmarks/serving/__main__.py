"""The broker beside other servers: cost, overload, fairness, refusals; peers in the same run.

    python -m benchmarks.serving --json build/bench/serving.json [--quick] [--only FIGURE]

Each server is started for real, asked over a socket and stopped again; within a round they take
turns with the same bytes. ``make peers`` makes the peers' environments; one that is not there is
named as skipped. All of it takes about an hour; ``--minutes`` bounds it: fewer rounds of each
figure, fewer peers, and in the end fewer figures, which are then named. Exits 1 when a demand is
not met.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import tempfile
import time
from pathlib import Path

import msgspec

from benchmarks.machine import describe_machine
from benchmarks.serving import models
from benchmarks.serving.figures import capacity, compute, cost, mixed, overload, refusal, two
from benchmarks.serving.figures.base import Bench, Finding
from benchmarks.serving.peers import (
    CONFIGURATIONS,
    PEERS,
    QUICK,
    environment_of,
    installed_versions,
)
from benchmarks.serving.report import print_finding, print_verdict

_QUICK_MINUTES = 4.5
_SHORT_MINUTES = 20.0
"""A run of fewer has no time for the peers that start slowly."""

FIGURES = {
    "overload": overload.measure,
    "cost": cost.measure,
    "refusals": refusal.refusals,
    "two": two.measure,
    "capacity": capacity.measure,
    "recovery": refusal.recovery,
    "weights": mixed.weights,
    "deadlines": mixed.deadlines,
    "best": compute.best,
    "compute": compute.measure,
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serving")
    parser.add_argument("--json", type=Path, default=Path("build/bench/serving.json"))
    parser.add_argument("--quick", action="store_true", help="one round, in about 5 minutes")
    parser.add_argument(
        "--minutes", type=float, help="fewer rounds (and below 20 fewer peers) to be done by then"
    )
    parser.add_argument("--only", action="append", choices=sorted(FIGURES), help="repeat for more")
    arguments = parser.parse_args()
    started_s = time.monotonic()
    short = arguments.quick or (arguments.minutes or math.inf) < _SHORT_MINUTES
    there = [peer for peer in PEERS if environment_of(peer) is not None]
    installed = [peer for peer in there if peer in QUICK or not short]
    skipped = {peer: "not installed: make peers" for peer in PEERS if peer not in there}
    skipped |= {peer: "a longer run" for peer in there if peer not in installed}
    chosen = {
        name: measure
        for name, measure in FIGURES.items()
        if arguments.only is None or name in arguments.only
    }
    with tempfile.TemporaryDirectory(prefix="nearfar-serving-") as scratch:
        folder = Path(scratch)
        bench = Bench(
            folder=folder,
            quick=arguments.quick,
            peers=tuple(name for peer in installed for name in CONFIGURATIONS[peer]),
            trivial=str(models.write_trivial(folder / "trivial")),
            resnet18=str(models.write_resnet18(folder / "resnet18")),
            photo=models.photo(),
            tensor=models.tensor(),
        )
        minutes = arguments.minutes or (_QUICK_MINUTES if arguments.quick else None)
        if minutes is not None:
            bench.until_s = started_s + 60 * minutes
        findings: dict[str, Finding] = {}
        took_s: dict[str, float] = {}
        left_out = []
        for done, (name, measure) in enumerate(chosen.items()):
            if bench.until_s is not None and time.monotonic() > bench.until_s:
                left_out.append(name)
                continue
            bench.figures_left = len(chosen) - done
            began_s = time.monotonic()
            findings[name] = measure(bench)
            took_s[name] = round(time.monotonic() - began_s, 1)
            print_finding(findings[name])
    passed = {
        demand: met for finding in findings.values() for demand, met in finding.passed.items()
    }
    document = {
        "benchmark": "serving",
        "quick": arguments.quick,
        "machine": describe_machine(),
        "load_average": [round(value, 2) for value in os.getloadavg()],
        "peers": {peer: installed_versions(peer) for peer in installed},
        "skipped": skipped,
        "no_time_for": left_out,
        "seconds": round(time.monotonic() - started_s, 1),
        "seconds_by_figure": took_s,
        "figures": findings,
        "summary": {"passed": passed},
    }
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    arguments.json.write_bytes(msgspec.json.format(msgspec.json.encode(document), indent=2))
    print_verdict(passed, skipped, left_out, arguments.json)
    if not all(passed.values()):
        sys.exit(1)


if __name__ == "__main__":
    main()
