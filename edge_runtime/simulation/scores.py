"""From the records of a simulation to figures: what each policy achieved in one cell.

Every trace has the same weight, however many requests fell on it: a figure is the mean over
traces of the mean over a trace's requests (all seeds together).
"""

from __future__ import annotations

import math
import os
import platform
from collections.abc import Sequence
from typing import Any, Final

import msgspec
import numpy as np
from numpy.typing import NDArray

from edge_runtime.contract.errors import ConfigError
from edge_runtime.simulation.bootstrap import Bootstrap, Estimate
from edge_runtime.simulation.calibration import Bin, calibration, weighted_quantiles
from edge_runtime.simulation.records import NET_ORACLES, PolicyRun, SimulationResult

__all__ = [
    "BALANCED",
    "DEFINITIONS",
    "LOCAL_ONLY",
    "ORACLE",
    "SAVER",
    "ClassScore",
    "PolicyScore",
    "Tariff",
    "cell_document",
    "is_bound",
    "machine",
    "score",
]

LOCAL_ONLY: Final = "LocalOnly"
ORACLE: Final = "Oracle"

DEFINITIONS: Final = {
    "accuracy_in_deadline": "expected share of requests answered right within the deadline",
    "net_utility": "accuracy_in_deadline - 0.05 per uploaded MB - 0.002 per joule",
    "gain_capture": "(accuracy_in_deadline - LocalOnly's) / (Oracle's - LocalOnly's), from sums "
    "over traces of equal weight; null where the Oracle is less than 0.1 points above LocalOnly",
    "net_gain_capture": "the same of net_utility, bounded by Oracle:net",
    "net_gain_capture_saver": "the same at 0.5 per MB and 0.01 per joule, by Oracle:saver",
    "miss_rate": "share of requests without an answer within the deadline",
    "mean_ms": "mean latency of the requests that were answered, in time or late",
    "p95_ms": "95th percentile of the latency of all requests; null: no answer at this rank",
    "kb_per_request": "uploaded kB (1000 bytes), headers, set-up and keep-warm pings included",
    "wasted_kb_per_request": "the part of it whose answer was not delivered in time",
    "joules_per_request": "device energy: local model, radio active, promotions and tails",
    "offload_share": "share of requests whose image's upload was begun",
    "brier": "mean squared error of the predicted chance of a cloud answer in time, scored "
    "against what an upload at that decision would have met",
    "decision_us": "99th percentile of the wall time of a decision; decision_p50_us: the median",
    "ci95": "95 % interval over traces drawn again, the same for all policies",
}
"""What the figures mean, in a sentence each."""

_LEAST_HEADROOM: Final = 1e-3
_LEAST_CLASS_HEADROOM: Final = 5e-3
_TOLERANCE_MS: Final = 1e-6
"""A held answer is delivered at the deadline itself, give or take a rounding."""


class Tariff(msgspec.Struct, frozen=True, kw_only=True):
    """What a megabyte and a joule cost, in right answers."""

    name: str
    per_megabyte: float
    per_joule: float


BALANCED: Final = Tariff(name="balanced", per_megabyte=0.05, per_joule=0.002)
SAVER: Final = Tariff(name="saver", per_megabyte=0.5, per_joule=0.01)


class ClassScore(msgspec.Struct, frozen=True, kw_only=True):
    """A policy's figures on the traces of one class."""

    traces: int
    gain_capture: float | None
    """None: the Oracle is less than half a point above LocalOnly; judge it by its cost."""
    accuracy_in_deadline: float
    miss_rate: float
    mean_ms: float | None
    kb_per_request: float
    joules_per_request: float
    offload_share: float


class PolicyScore(msgspec.Struct, frozen=True, kw_only=True):
    """A policy's figures in one cell; ``DEFINITIONS`` says what they mean."""

    gain_capture: Estimate
    net_gain_capture: Estimate
    net_gain_capture_saver: Estimate
    net_utility: float
    accuracy_in_deadline: float
    miss_rate: float
    mean_ms: float | None
    p95_ms: float | None
    kb_per_request: float
    wasted_kb_per_request: float
    joules_per_request: float
    offload_share: float
    cloud_share: float
    requests: int
    unanswered: int
    brier: float | None
    decision_us: float | None
    decision_p50_us: float | None
    reliability: tuple[Bin, ...]
    by_class: dict[str, ClassScore]
    ci95: dict[str, tuple[float, float] | None]
    """Of the figures that are plain numbers above."""


class _TraceMeans(msgspec.Struct, frozen=True, kw_only=True, eq=False):
    """One policy's means, float64 [traces] each, in the result's order of traces."""

    accuracy: NDArray[np.float64]
    miss: NDArray[np.float64]
    mean_ms: NDArray[np.float64]
    """NaN: nothing was answered."""
    kilobytes: NDArray[np.float64]
    wasted: NDArray[np.float64]
    joules: NDArray[np.float64]
    offloaded: NDArray[np.float64]
    cloud: NDArray[np.float64]

    def net(self, tariff: Tariff) -> NDArray[np.float64]:
        """Accuracy less the price of bytes and joules."""
        return (
            self.accuracy
            - tariff.per_megabyte * self.kilobytes / 1e3
            - tariff.per_joule * self.joules
        )


def is_bound(policy: str) -> bool:
    """Whether a name is a clairvoyant bound's, which no device can run."""
    return policy == ORACLE or policy in NET_ORACLES.values()


def score(result: SimulationResult, *, seed: int = 0) -> dict[str, PolicyScore]:
    """Figures of every policy of a cell. The same result and seed give the same figures.

    Raises ``ConfigError`` when a policy lacks a trace or runs twice under one seed.
    """
    runs = _group(result)
    means = {policy: _trace_means(result, runs[policy]) for policy in result.policies}
    groups = _groups(result)
    bootstrap = Bootstrap(len(result.traces), seed=seed)
    return {
        policy: _score_one(policy, result, runs[policy], means, groups, bootstrap)
        for policy in result.policies
    }


def _group(result: SimulationResult) -> dict[str, dict[str, list[PolicyRun]]]:
    runs: dict[str, dict[str, list[PolicyRun]]] = {
        policy: {trace: [] for trace in result.traces} for policy in result.policies
    }
    seen: set[tuple[str, str, int]] = set()
    for run in result.runs:
        key = (run.policy, run.trace, run.seed)
        if key in seen:
            raise ConfigError(f"policy {run.policy} ran twice on {run.trace}, seed {run.seed}")
        seen.add(key)
        runs[run.policy][run.trace].append(run)
    for policy, by_trace in runs.items():
        missing = [trace for trace, found in by_trace.items() if not _requests(found)]
        if missing:
            raise ConfigError(f"policy {policy} has no request on trace {missing[0]}")
    return runs


def _requests(runs: Sequence[PolicyRun]) -> int:
    return sum(run.arrived_s.size for run in runs)


def _groups(result: SimulationResult) -> dict[str, list[int]]:
    """Which traces, by number, are of which class, in order of first appearance."""
    number = {trace: i for i, trace in enumerate(result.traces)}
    found: dict[str, set[int]] = {}
    for run in sorted(result.runs, key=lambda run: number[run.trace]):
        found.setdefault(run.group, set()).add(number[run.trace])
    return {group: sorted(members) for group, members in found.items()}


def _join(runs: Sequence[PolicyRun], field: str) -> NDArray[Any]:
    return np.concatenate([getattr(run, field) for run in runs])


def _trace_means(result: SimulationResult, by_trace: dict[str, list[PolicyRun]]) -> _TraceMeans:
    rows = []
    for trace in result.traces:
        runs = by_trace[trace]
        latency = _join(runs, "latency_ms")
        answered = latency[np.isfinite(latency)]
        rows.append(
            (
                _join(runs, "correct").mean(),
                (latency > _join(runs, "deadline_ms") + _TOLERANCE_MS).mean(),
                answered.mean() if answered.size else math.nan,
                _join(runs, "uploaded_bytes").mean() / 1e3,
                _join(runs, "wasted_bytes").mean() / 1e3,
                math.fsum(run.joules for run in runs) / _requests(runs),
                _join(runs, "offloaded").mean(),
                _join(runs, "source_cloud").mean(),
            )
        )
    columns = np.asarray(rows, np.float64).T
    return _TraceMeans(**dict(zip(_TraceMeans.__struct_fields__, columns, strict=True)))


def _score_one(
    policy: str,
    result: SimulationResult,
    by_trace: dict[str, list[PolicyRun]],
    means: dict[str, _TraceMeans],
    groups: dict[str, list[int]],
    bootstrap: Bootstrap,
) -> PolicyScore:
    own = means[policy]
    runs = [run for trace in result.traces for run in by_trace[trace]]
    latency = _join(runs, "latency_ms")
    plain = {
        "net_utility": bootstrap.mean(own.net(BALANCED)),
        "accuracy_in_deadline": bootstrap.mean(own.accuracy),
        "miss_rate": bootstrap.mean(own.miss),
        "kb_per_request": bootstrap.mean(own.kilobytes),
        "wasted_kb_per_request": bootstrap.mean(own.wasted),
        "joules_per_request": bootstrap.mean(own.joules),
        "offload_share": bootstrap.mean(own.offloaded),
        "cloud_share": bootstrap.mean(own.cloud),
    }
    mean_ms = _mean_where_answered(own.mean_ms, bootstrap)
    brier, reliability = calibration(_join(runs, "p_cloud"), _join(runs, "cloud_in_time"))
    decisions = _join(runs, "decision_us")
    decisions = decisions[np.isfinite(decisions) & (not is_bound(policy))]
    return PolicyScore(
        gain_capture=_capture(policy, means, None, bootstrap),
        net_gain_capture=_capture(policy, means, BALANCED, bootstrap),
        net_gain_capture_saver=_capture(policy, means, SAVER, bootstrap),
        mean_ms=mean_ms.mean,
        p95_ms=_finite(float(weighted_quantiles(latency, _weights(result, by_trace), [0.95])[0])),
        requests=latency.size,
        unanswered=int(np.isinf(latency).sum()),
        brier=brier,
        decision_us=float(np.percentile(decisions, 99)) if decisions.size else None,
        decision_p50_us=float(np.percentile(decisions, 50)) if decisions.size else None,
        reliability=reliability,
        by_class={
            group: _class_score(policy, means, np.asarray(members))
            for group, members in groups.items()
        },
        ci95={name: found.ci95 for name, found in (*plain.items(), ("mean_ms", mean_ms))},
        **{name: _number(found) for name, found in plain.items()},
    )


def _number(found: Estimate) -> float:
    assert found.mean is not None  # noqa: S101  # every trace has requests
    return found.mean


def _mean_where_answered(values: NDArray[np.float64], bootstrap: Bootstrap) -> Estimate:
    """Over the traces on which anything was answered; an interval only when all are."""
    known = values[np.isfinite(values)]
    if known.size == values.size:
        return bootstrap.mean(values)
    return Estimate(mean=float(known.mean()) if known.size else None, ci95=None)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _bounds(
    means: dict[str, _TraceMeans], tariff: Tariff | None
) -> tuple[NDArray[np.float64], NDArray[np.float64]] | None:
    """LocalOnly's and the bound's value on each trace; None: one of them did not run."""
    bound = ORACLE if tariff is None else NET_ORACLES[tariff.name]
    if LOCAL_ONLY not in means or bound not in means:
        return None
    if tariff is None:
        return means[LOCAL_ONLY].accuracy, means[ORACLE].accuracy
    return means[LOCAL_ONLY].net(tariff), means[bound].net(tariff)


def _capture(
    policy: str, means: dict[str, _TraceMeans], tariff: Tariff | None, bootstrap: Bootstrap
) -> Estimate:
    bounds = _bounds(means, tariff)
    if bounds is None:
        return Estimate(mean=None, ci95=None)
    own = means[policy].accuracy if tariff is None else means[policy].net(tariff)
    return bootstrap.capture(own, *bounds, least=_LEAST_HEADROOM)


def _class_score(
    policy: str, means: dict[str, _TraceMeans], members: NDArray[np.int64]
) -> ClassScore:
    own = means[policy]
    answered = own.mean_ms[members]
    answered = answered[np.isfinite(answered)]
    capture = None
    bounds = _bounds(means, None)
    if bounds is not None:
        local, oracle = (values[members].mean() for values in bounds)
        if oracle - local >= _LEAST_CLASS_HEADROOM:
            capture = float((own.accuracy[members].mean() - local) / (oracle - local))
    return ClassScore(
        traces=members.size,
        gain_capture=capture,
        accuracy_in_deadline=float(own.accuracy[members].mean()),
        miss_rate=float(own.miss[members].mean()),
        mean_ms=float(answered.mean()) if answered.size else None,
        kb_per_request=float(own.kilobytes[members].mean()),
        joules_per_request=float(own.joules[members].mean()),
        offload_share=float(own.offloaded[members].mean()),
    )


def _weights(result: SimulationResult, by_trace: dict[str, list[PolicyRun]]) -> NDArray[np.float64]:
    """What each request counts, so that every trace counts the same; they sum to 1."""
    counts = [_requests(by_trace[trace]) for trace in result.traces]
    return np.concatenate([np.full(count, 1 / (count * len(counts))) for count in counts])


def cell_document(result: SimulationResult, scores: dict[str, PolicyScore]) -> dict[str, Any]:
    """One cell as JSON shows it: what was simulated, and what each policy achieved."""
    groups = _groups(result)
    return {
        "cell": {
            "device": result.device,
            "deadline_ms": result.deadline_ms,
            "arrivals": result.arrivals,
        },
        "seeds": list(result.seeds),
        "classes": {group: len(members) for group, members in groups.items()},
        "policies": msgspec.to_builtins(scores),
        "constants": result.constants,
    }


def machine() -> dict[str, Any]:
    """Where the figures come from."""
    return {
        "cpus": os.cpu_count(),
        "architecture": platform.machine(),
        "system": platform.system(),
        "python": platform.python_version(),
        "numpy": np.__version__,
    }
