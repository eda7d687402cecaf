"""The broker beside other servers: cost, overload, fairness, refusals; peers in the same run.

    python -m benchmarks.serving --json build/bench/serving.json [--quick] [--only FIGURE]

Each server is started for real, asked over a socket and stopped again; within a round they take
turns with the same bytes. ``make peers`` makes the peers' environments; one that is not there is
named as skipped. Exits 1 when a demand is not met.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

import msgspec

from benchmarks.machine import describe_machine
from benchmarks.serving import models
from benchmarks.serving.figures import compute, cost, mixed, overload, refusal
from benchmarks.serving.figures.base import Bench
from benchmarks.serving.peers import CONFIGURATIONS, PEERS, environment_of, installed_versions
from benchmarks.serving.report import print_finding, print_verdict

FIGURES = {
    "overload": overload.measure,
    "deadlines": mixed.deadlines,
    "weights": mixed.weights,
    "refusals": refusal.refusals,
    "recovery": refusal.recovery,
    "cost": cost.measure,
    "compute": compute.measure,
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serving")
    parser.add_argument("--json", type=Path, default=Path("build/bench/serving.json"))
    parser.add_argument("--quick", action="store_true", help="one round, under 5 minutes")
    parser.add_argument("--only", action="append", choices=sorted(FIGURES), help="repeat for more")
    arguments = parser.parse_args()
    started_s = time.monotonic()
    installed = [peer for peer in PEERS if environment_of(peer) is not None]
    skipped = sorted(set(PEERS) - set(installed))
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
        findings = {}
        for name, measure in FIGURES.items():
            if arguments.only is None or name in arguments.only:
                findings[name] = measure(bench)
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
        "skipped": dict.fromkeys(skipped, "not installed: make peers"),
        "seconds": round(time.monotonic() - started_s, 1),
        "figures": findings,
        "summary": {"passed": passed},
    }
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    arguments.json.write_bytes(msgspec.json.format(msgspec.json.encode(document), indent=2))
    print_verdict(passed, skipped, arguments.json)
    if not all(passed.values()):
        sys.exit(1)


if __name__ == "__main__":
    main()
