"""Fair shares at three times the load: of two deadlines, and of two tenants.

Deadlines: 30 % of the requests have 600 ms, 70 % have 3 s; the device takes 80 + 20 n ms. Both
should be answered as often as they are asked. Weights: two tenants ask for the same, one has
three times the weight of the other.
"""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.serving.figures.base import Bench, Finding, Row
from benchmarks.serving.load import Phase, Plan, Record
from benchmarks.serving.measure import median, run_load, summary
from benchmarks.serving.targets import NEARFAR, Tenant
from benchmarks.serving.workload import Work

SHORT_MS, LONG_MS = 600, 3000
SHORT_SHARE = 0.3
DEMANDED_SHARE = 0.9
WEIGHTS = (3.0, 1.0)
ALLOWED_WEIGHT_ERROR = 0.05


def deadlines(bench: Bench) -> Finding:
    """Each class of deadlines against its fair share of the device."""
    work = Work(kind="sleep", deadline_ms=LONG_MS, fixed_ms=80, image_ms=20, servable=bench.trivial)
    seconds = 16.0 if bench.quick else 30.0
    classes = (("short", SHORT_MS, SHORT_SHARE), ("long", LONG_MS, 1.0 - SHORT_SHARE))
    rows: list[Row] = []
    for number in bench.turns():
        for name in bench.servers(tuned=True):
            if name != NEARFAR and bench.quick:
                continue
            with bench.server(name, work) as target:
                kinds = tuple(
                    target.kind(bench.photo, name=label, share=share, deadline_ms=deadline_ms)
                    for label, deadline_ms, share in classes
                )
                plan = Plan(
                    port=target.port,
                    kinds=kinds,
                    give_up_ms=2 * LONG_MS,
                    phases=(Phase(seconds=seconds, per_s=3 * work.capacity_per_s),),
                    seed=number + 1,
                )
                run = run_load(target, plan)
            for place, (label, deadline_ms, share) in enumerate(classes):
                row = _of_kind(run.records, place, deadline_ms, seconds)
                row |= {"server": name, "class": label, "load_average": run.load_average}
                row["fair_share"] = round(row["good_per_s"] / (share * work.capacity_per_s), 4)
                rows.append(row)
    passed = {
        f"mixed_deadlines_{label}_90_percent_of_fair_share": _median_share(rows, label)
        >= DEMANDED_SHARE
        for label, _, _ in classes
    }
    return Finding(title="mixed deadlines at 3x load", rows=rows, passed=passed)


def weights(bench: Bench) -> Finding:
    """Answers of two tenants against their weights."""
    work = Work(kind="sleep", deadline_ms=SHORT_MS, fixed_ms=20, image_ms=5, servable=bench.trivial)
    seconds = 12.0 if bench.quick else 30.0
    tenants = tuple(Tenant(f"tenant-{weight:g}", weight) for weight in WEIGHTS)
    rows: list[Row] = []
    errors = []
    for number in bench.turns():
        with bench.server(NEARFAR, work, tenants) as target:
            plan = Plan(
                port=target.port,
                kinds=tuple(
                    target.kind(bench.photo, name=tenant.name, tenant=tenant.name)
                    for tenant in tenants
                ),
                give_up_ms=5 * SHORT_MS,
                phases=(Phase(seconds=seconds, per_s=3 * work.capacity_per_s),),
                seed=number + 1,
            )
            run = run_load(target, plan)
        own = [_of_kind(run.records, place, SHORT_MS, seconds) for place in range(len(tenants))]
        total = sum(row["good_per_s"] for row in own)
        for tenant, row in zip(tenants, own, strict=True):
            row |= {"server": NEARFAR, "class": tenant.name, "load_average": run.load_average}
            row["share"] = round(row["good_per_s"] / total, 4)
            row["due_share"] = tenant.weight / sum(WEIGHTS)
            rows.append(row)
            errors.append(abs(row["share"] / row["due_share"] - 1.0))
    passed = {"tenant_weights_within_5_percent": median(errors) <= ALLOWED_WEIGHT_ERROR}
    return Finding(title="tenant weights 3 to 1 at 3x load", rows=rows, passed=passed)


def _of_kind(records: Sequence[Record], place: int, deadline_ms: int, seconds: float) -> Row:
    own = [record for record in records if record.kind == place]
    return summary(own, deadline_ms, seconds / 4, seconds - deadline_ms / 1e3)


def _median_share(rows: list[Row], label: str) -> float:
    return median(
        [row["fair_share"] for row in rows if row["server"] == NEARFAR and row["class"] == label]
    )
