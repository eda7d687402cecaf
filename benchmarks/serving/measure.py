"""Running a load against a target, and what the records say."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from benchmarks.serving.load import GAVE_UP, Plan, Record
from benchmarks.serving.processes import cpu_s
from benchmarks.serving.targets import ROOT, Target

__all__ = ["Run", "quantile", "run_load", "send", "summary"]


@dataclass(frozen=True, slots=True)
class Run:
    """One load on one target."""

    records: list[Record]
    cpu_s: float
    """User and system time of the server's process tree meanwhile."""
    load_average: float


def run_load(target: Target, plan: Plan) -> Run:
    """Run ``plan``, whose processor time is nobody's but its own process's."""
    before_s = cpu_s(target.pid)
    records = send(plan)
    return Run(records, cpu_s(target.pid) - before_s, round(os.getloadavg()[0], 2))


def send(plan: Plan) -> list[Record]:
    """Run ``plan`` in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.serving.load"],
        input=msgspec.json.encode(plan),
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=True,
    )
    return msgspec.json.decode(done.stdout, type=list[Record])


def quantile(values: Sequence[float], share: float) -> float | None:
    """By nearest rank; None of nothing."""
    if not values:
        return None
    ordered = sorted(values)
    return round(ordered[min(int(share * len(ordered)), len(ordered) - 1)], 2)


def summary(
    records: Sequence[Record], deadline_ms: float, from_s: float, to_s: float
) -> dict[str, Any]:
    """What became of the requests sent from ``from_s`` to ``to_s``."""
    window = [record for record in records if from_s <= record.at_s < to_s]
    seconds = to_s - from_s
    answered = [record.ms for record in window if record.status == 200]
    good = sum(ms <= deadline_ms for ms in answered)
    refused = [record for record in window if record.status > 200]
    # What a broker let in and answered too late, or took back with 504 after the upload.
    late = len(answered) - good + sum(record.status == 504 for record in refused)
    late += sum(record.status == GAVE_UP for record in window)
    return {
        "offered_per_s": round(len(window) / seconds, 1),
        "good_per_s": round(good / seconds, 1),
        "accepted_late_share": round(late / max(good + late, 1), 4),
        "answered_p50_ms": quantile(answered, 0.5),
        "answered_p99_ms": quantile(answered, 0.99),
        "refused_p50_ms": quantile([record.ms for record in refused], 0.5),
        "refused_p99_ms": quantile([record.ms for record in refused], 0.99),
        "statuses": _counts(window),
    }


def _counts(records: Sequence[Record]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for record in records:
        counts[str(record.status)] = counts.get(str(record.status), 0) + 1
    return dict(sorted(counts.items()))


def median(values: Sequence[float]) -> float:
    return round(statistics.median(values), 4)
