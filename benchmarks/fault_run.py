"""Every network fault in every phase of a request: ended in time, typed, and nothing left?

    python -m benchmarks.fault_run --json build/bench/fault_run.json [--cases 600] [--seed N]

A real broker in a process of its own, a proxy before it that fails for real
(``tests/support/fault_proxy.py``), and cases drawn by hypothesis from a seed: fault, phase,
policy, session or POST, TLS, deadline, arrivals, callers that give up. Each case is a runtime
with three requests. Exits 1 when a promise is broken; ``--only N`` runs one case again.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import msgspec

from benchmarks.machine import describe_machine
from tests.support.broker import broker_process
from tests.support.bundles import servable
from tests.support.fault_cases import (
    TOGETHER,
    Arena,
    Certificates,
    draw_cases,
    hanging_names,
    run_cases,
    run_misses,
)
from tests.support.fault_proxy import ProxyHost

CASES = 600
QUICK = 100


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fault_run")
    parser.add_argument("--json", type=Path, default=Path("build/bench/fault_run.json"))
    parser.add_argument("--quick", action="store_true", help=f"{QUICK} cases")
    parser.add_argument("--cases", type=int, default=None, help=f"default: {CASES}")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--together", type=int, default=TOGETHER, help="cases at once")
    parser.add_argument("--requests", type=int, default=40, help="in a row, to count misses")
    parser.add_argument("--only", type=int, metavar="N", help="the N-th case alone")
    arguments = parser.parse_args()
    cases = draw_cases(arguments.seed, arguments.cases or (QUICK if arguments.quick else CASES))
    if arguments.only is not None:
        cases = [cases[arguments.only]]
    with tempfile.TemporaryDirectory(prefix="nearfar-faults-") as scratch:
        folder = Path(scratch)
        with broker_process(folder, "--models", str(servable(folder / "model"))) as broker:
            port = int(broker.url.rpartition(":")[2])
            with ProxyHost("127.0.0.1", port) as host, hanging_names():
                arena = Arena(host, Certificates(folder))
                with arena.timer:
                    report, outcomes = run_cases(arena, cases, arguments.seed, arguments.together)
                    misses = run_misses(arena, arguments.requests)
    document = {
        "machine": describe_machine(),
        **msgspec.to_builtins(report),
        "dead_black_holed_or_slow": msgspec.to_builtins(misses),
    }
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    arguments.json.write_bytes(msgspec.json.format(msgspec.json.encode(document), indent=1))
    for why in report.broken:
        print(f"BROKEN {why}")
    if arguments.only is not None:
        print(outcomes[0])
    print(
        f"{report.requests} requests in {report.cases} cases, {report.struck} struck, "
        f"{report.seconds:.0f} s, seed {report.seed}: worst overrun "
        f"{report.worst_overrun_ms:.0f} ms, slowest close {report.worst_close_ms:.0f} ms, "
        f"{report.leaks} leaks, {report.misses} of {report.answers} answers late, "
        f"{len(report.broken)} broken"
    )
    for miss in report.missed:
        print(f"late: {miss}")
    print(
        f"broker dead, black-holed or slow: {misses.misses} of {misses.requests} answers late "
        f"({misses.misses_punctual} while the machine was punctual; {misses.late_local} not "
        f"counted: the local model itself was too slow), worst {misses.worst_ms:+.0f} ms"
    )
    for late in misses.missed:
        print(f"late: {late}")
    print(", ".join(f"{kind} {count}" for kind, count in report.by_kind.items()))
    print(f"wrote {arguments.json}")
    if report.broken:
        sys.exit(1)


if __name__ == "__main__":
    main()
