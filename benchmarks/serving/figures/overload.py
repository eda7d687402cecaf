"""Goodput at three times the load: answers within 200 ms from a device of 133 images a second.

The device is a sleep of 20 + 5 n ms in every server, at most 8 at once, so that what is compared
is what each server lets it work on. The broker runs with its defaults.
"""

from __future__ import annotations

from benchmarks.serving.device import waited_share
from benchmarks.serving.figures.base import Bench, Finding, Row
from benchmarks.serving.load import Phase, Plan
from benchmarks.serving.measure import median, run_load, summary
from benchmarks.serving.targets import NEARFAR
from benchmarks.serving.workload import Work

DEADLINE_MS = 200
DEMANDED_SHARE = 0.95
ALLOWED_LATE = 0.03
DEMANDED_RATIO = 1.2


def measure(bench: Bench) -> Finding:
    work = Work(
        kind="sleep", deadline_ms=DEADLINE_MS, fixed_ms=20, image_ms=5, servable=bench.trivial
    )
    seconds = 7.0 if bench.quick else 12.0
    rows: list[Row] = []
    for number in bench.turns():
        for name in bench.servers(tuned=True):
            with bench.server(name, work) as target:
                kind = target.kind(bench.photo)
                plan = Plan(
                    port=target.port,
                    kinds=(kind,),
                    give_up_ms=5 * DEADLINE_MS,
                    phases=(Phase(seconds=seconds, per_s=3 * work.capacity_per_s),),
                    seed=number + 1,
                )
                run = run_load(target, plan)
            row = summary(run.records, DEADLINE_MS, seconds / 4, seconds)
            row |= {"server": name, "load_average": run.load_average, "cpu_s": round(run.cpu_s, 2)}
            row["device_waited"] = waited_share((target.folder / "log").read_text())
            row["capacity_share"] = round(row["good_per_s"] / work.capacity_per_s, 4)
            rows.append(row)
    share = median([row["capacity_share"] for row in rows if row["server"] == NEARFAR])
    late = median([row["accepted_late_share"] for row in rows if row["server"] == NEARFAR])
    passed = {
        "goodput_at_3x_95_percent_of_capacity": share >= DEMANDED_SHARE,
        "accepted_but_late_at_most_3_percent": late <= ALLOWED_LATE,
    }
    best = max(
        (
            median([row["capacity_share"] for row in rows if row["server"] == peer])
            for peer in bench.servers(tuned=True)[1:]
        ),
        default=None,
    )
    if best is not None:
        passed["goodput_at_3x_1.2_times_the_best_tuned_peer"] = share >= DEMANDED_RATIO * best
    return Finding(title="goodput at 3x load, 200 ms deadline", rows=rows, passed=passed)
