"""What a request costs: processor time of the whole process tree, and the front's memory.

64 callers ask again as soon as they are answered; bodies are 30 kB and not decoded; the model is
one small convolution. The front process holds no torch. The floor is aiohttp alone, without a
model: how many times its cost the broker takes says more than milliseconds of one machine.
"""

from __future__ import annotations

from benchmarks.serving.figures.base import Bench, Finding, Row
from benchmarks.serving.load import Plan
from benchmarks.serving.measure import median, quantile, run_load
from benchmarks.serving.peers import FLOOR
from benchmarks.serving.processes import has_mapped, pss_bytes, tree
from benchmarks.serving.targets import NEARFAR
from benchmarks.serving.workload import Work

CALLERS = 64
CPU_MS = 0.20
RATIOS = {"pytriton": 2.0, "ray": 3.0, "litserve": 9.0}
FRONT_BYTES = 120 * 2**20


def measure(bench: Bench) -> Finding:
    work = Work(
        kind="program",
        deadline_ms=10_000,
        servable=bench.trivial,
        tensor=True,
        max_batch=16,
    )
    seconds = 3.0 if bench.quick else 6.0
    rows: list[Row] = []
    for number in bench.turns():
        for name in (FLOOR, *bench.servers(tuned=False)):
            with bench.server(name, work) as target:
                kind = target.kind(bench.tensor)
                run_load(target, _plan(target.port, kind, 2.0, number))  # caches, threads
                run = run_load(target, _plan(target.port, kind, seconds, number))
                answered = [record.ms for record in run.records if record.status == 200]
                row: Row = {
                    "server": name,
                    "cpu_ms_per_request": round(run.cpu_s * 1e3 / max(len(answered), 1), 4),
                    "answered_per_s": round(len(answered) / seconds, 1),
                    "failed": len(run.records) - len(answered),
                    "p50_ms": quantile(answered, 0.5),
                    "p99_ms": quantile(answered, 0.99),
                    "pss_mb": round(sum(map(pss_bytes, tree(target.pid))) / 2**20, 1),
                    "load_average": run.load_average,
                }
                if name == NEARFAR:
                    row["front_pss_mb"] = round(pss_bytes(target.pid) / 2**20, 1)
                    row["front_has_torch"] = has_mapped(target.pid, "/torch/")
                rows.append(row)
    own = [row for row in rows if row["server"] == NEARFAR]
    cpu_ms = median([row["cpu_ms_per_request"] for row in own])
    floor_ms = median([row["cpu_ms_per_request"] for row in rows if row["server"] == FLOOR])
    for row in rows:
        row["times_the_floor"] = round(row["cpu_ms_per_request"] / floor_ms, 2)
    passed = {
        "cpu_per_request_0.20_ms": cpu_ms <= CPU_MS and not any(row["failed"] for row in own),
        "front_process_120_mb": max(row["front_pss_mb"] for row in own) * 2**20 <= FRONT_BYTES,
        "front_process_without_torch": not any(row["front_has_torch"] for row in own),
    }
    for peer, ratio in RATIOS.items():
        theirs = [row["cpu_ms_per_request"] for row in rows if row["server"] == peer]
        if theirs:
            passed[f"cpu_per_request_1/{ratio:g}_of_{peer}"] = cpu_ms * ratio <= median(theirs)
    return Finding(title="processor time per request, 30 kB, 64 callers", rows=rows, passed=passed)


def _plan(port: int, kind, seconds: float, seed: int) -> Plan:  # type: ignore[no-untyped-def]
    return Plan(
        port=port,
        kinds=(kind,),
        give_up_ms=20_000,
        callers=CALLERS,
        seconds=seconds,
        seed=seed + 1,
    )
