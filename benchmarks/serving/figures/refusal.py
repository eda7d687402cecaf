"""How a no is said, and how soon after a burst a yes is said again.

Refusals are timed from the first byte of the headers to the end of the answer, by clients that
wait for ``100 Continue`` and by clients that send the body 25 ms after the headers unasked, as a
slow uplink does. A refusal counts only when no byte of the body had to be sent. Recovery: after
a burst of three times the load for two seconds, how many of the requests that then come at 80 %
of the load are answered in time, in each of the deadlines that follow.
"""

from __future__ import annotations

from benchmarks.serving.figures.base import Bench, Finding, Row
from benchmarks.serving.load import Phase, Plan
from benchmarks.serving.measure import median, quantile, run_load, summary
from benchmarks.serving.targets import NEARFAR
from benchmarks.serving.workload import Work

DEADLINE_MS = 200
P50_MS, P99_MS = 2.0, 20.0
BODY_AFTER_MS = 25.0
QUIET_S, BURST_S, AFTER_S = 4.0, 2.0, 6.0
LATER_LOAD = 0.8
RECOVERED = 0.95


def refusals(bench: Bench) -> Finding:
    """Time to a refusal on the headers, with ``Expect`` and without."""
    work = _work(bench)
    seconds = 4.0 if bench.quick else 12.0
    rows: list[Row] = []
    passed = {}
    for expect in (True, False):
        p50, p99, early = [], [], []
        for number in bench.turns():
            with bench.server(NEARFAR, work) as target:
                kind = target.kind(
                    bench.photo, expect=expect, body_after_ms=0.0 if expect else BODY_AFTER_MS
                )
                plan = Plan(
                    port=target.port,
                    kinds=(kind,),
                    give_up_ms=5 * DEADLINE_MS,
                    phases=(Phase(seconds=seconds, per_s=3 * work.capacity_per_s),),
                    seed=number + 1,
                )
                run = run_load(target, plan)
            refused = [record for record in run.records if record.status == 503]
            times = [record.ms for record in refused]
            row: Row = {"server": NEARFAR, "expect": expect, "refused": len(refused)}
            row |= {"refused_p50_ms": quantile(times, 0.5), "refused_p99_ms": quantile(times, 0.99)}
            without = sum(not record.body_sent for record in refused) / max(len(refused), 1)
            row |= {"before_the_body": round(without, 4), "load_average": run.load_average}
            rows.append(row)
            p50.append(row["refused_p50_ms"] or 1e9)
            p99.append(row["refused_p99_ms"] or 1e9)
            early.append(without)
        way = "with_expect" if expect else "without_expect"
        passed[f"refusal_{way}_p50_2_ms_p99_20_ms"] = (
            median(p50) <= P50_MS and median(p99) <= P99_MS
        )
        passed[f"refusal_{way}_before_the_body"] = median(early) >= 0.99
    return Finding(title="refusals", rows=rows, passed=passed)


def recovery(bench: Bench) -> Finding:
    """Goodput after a burst, deadline by deadline."""
    work = _work(bench)
    low = LATER_LOAD * work.capacity_per_s
    rows: list[Row] = []
    shares, before = [], []
    for number in bench.turns():
        with bench.server(NEARFAR, work) as target:
            plan = Plan(
                port=target.port,
                kinds=(target.kind(bench.photo),),
                give_up_ms=5 * DEADLINE_MS,
                phases=(
                    Phase(seconds=QUIET_S, per_s=low),
                    Phase(seconds=BURST_S, per_s=3 * work.capacity_per_s),
                    Phase(seconds=AFTER_S, per_s=low),
                ),
                seed=number + 1,
            )
            run = run_load(target, plan)
        over_s = QUIET_S + BURST_S
        windows = {
            "before": (1.0, QUIET_S),
            "first two deadlines after": (over_s, over_s + 2 * DEADLINE_MS / 1e3),
            "later": (over_s + 2 * DEADLINE_MS / 1e3, over_s + AFTER_S),
        }
        for label, (from_s, to_s) in windows.items():
            row = summary(run.records, DEADLINE_MS, from_s, to_s)
            row |= {"server": NEARFAR, "class": label, "load_average": run.load_average}
            row["good_share"] = round(row["good_per_s"] / max(row["offered_per_s"], 1e-9), 4)
            rows.append(row)
            if label == "later":
                shares.append(row["good_share"])
            elif label == "before":
                before.append(row["good_share"])
    passed = {
        "recovery_within_2_deadlines": median(shares) >= RECOVERED * median(before),
    }
    return Finding(title="recovery after a burst of 3x", rows=rows, passed=passed)


def _work(bench: Bench) -> Work:
    return Work(
        kind="sleep", deadline_ms=DEADLINE_MS, fixed_ms=20, image_ms=5, servable=bench.trivial
    )
