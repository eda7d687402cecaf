"""What one device is predicted to answer, and what it answers.

The prediction is the one of ``docs/operations.md``: with T(n) for a batch of n and a deadline D,
batches have the largest size b, up to ``--max-batch``, for which two of them fit into the
deadline, and the device answers 1000 b / T(b) requests a second, or what is asked of it.
"""

from __future__ import annotations

from typing import NamedTuple

from benchmarks.serving.figures.base import Bench, Finding, Row
from benchmarks.serving.load import Phase, Plan
from benchmarks.serving.measure import median, run_load, summary
from benchmarks.serving.targets import NEARFAR
from benchmarks.serving.workload import Work

ALLOWED_ERROR = 0.10


class _Point(NamedTuple):
    """A device, its largest batch, a deadline, and how much is asked of its capacity."""

    fixed_ms: float
    image_ms: float
    max_batch: int
    deadline_ms: int
    load: float


_POINTS = (
    _Point(20, 5, 8, 200, 3.0),
    _Point(20, 5, 8, 200, 0.8),
    _Point(20, 5, 16, 400, 3.0),
    _Point(60, 2, 4, 300, 3.0),
)


def predicted_per_s(work: Work) -> float:
    """Answers a second in time, when more is asked for."""

    def takes_ms(images: int) -> float:
        return work.fixed_ms + images * work.image_ms

    sizes = [n for n in range(1, work.max_batch + 1) if 2 * takes_ms(n) <= work.deadline_ms]
    return max((1e3 * n / takes_ms(n) for n in sizes), default=0.0)


def measure(bench: Bench) -> Finding:
    seconds = 5.0 if bench.quick else 12.0
    rows: list[Row] = []
    errors: dict[_Point, list[float]] = {}
    for number in bench.turns():
        for point in _POINTS[:2] if bench.quick else _POINTS:
            work = Work(
                kind="sleep",
                deadline_ms=point.deadline_ms,
                fixed_ms=point.fixed_ms,
                image_ms=point.image_ms,
                max_batch=point.max_batch,
                servable=bench.trivial,
            )
            most_per_s = predicted_per_s(work)
            with bench.server(NEARFAR, work) as target:
                plan = Plan(
                    port=target.port,
                    kinds=(target.kind(bench.photo),),
                    give_up_ms=5 * point.deadline_ms,
                    phases=(Phase(seconds=seconds, per_s=point.load * most_per_s),),
                    seed=number + 1,
                )
                run = run_load(target, plan)
            said = summary(
                run.records, point.deadline_ms, seconds / 4, seconds - point.deadline_ms / 1e3
            )
            predicted = min(most_per_s, said["offered_per_s"])
            error = said["good_per_s"] / predicted - 1.0
            errors.setdefault(point, []).append(abs(error))
            rows.append(
                {
                    "server": NEARFAR,
                    **point._asdict(),
                    "offered_per_s": said["offered_per_s"],
                    "predicted_per_s": round(predicted, 1),
                    "good_per_s": said["good_per_s"],
                    "error": round(error, 4),
                    "load_average": run.load_average,
                }
            )
    within = all(median(found) <= ALLOWED_ERROR for found in errors.values())
    return Finding(
        title="capacity: predicted and measured",
        rows=rows,
        passed={"capacity_predicted_within_10_percent": within},
    )
