"""Records of a simulation that nobody ran, made of plain numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from edge_runtime.simulation.records import PolicyRun, SimulationResult


def policy_run(
    policy: str,
    trace: str,
    *,
    right: float,
    group: str = "LTE",
    seed: int = 0,
    requests: int = 4,
    latency_ms: float = 100.0,
    deadline_ms: float = 400.0,
    kilobytes: float = 0.0,
    joules: float = 0.0,
    p_cloud: Sequence[float] = (),
    cloud_in_time: Sequence[bool] = (),
) -> PolicyRun:
    """A run whose requests are all alike; ``joules`` and ``kilobytes`` are per request."""
    every = np.ones(requests)
    return PolicyRun(
        policy=policy,
        trace=trace,
        group=group,
        seed=seed,
        arrived_s=np.arange(requests, dtype=np.float64),
        deadline_ms=deadline_ms * every,
        latency_ms=latency_ms * every,
        correct=right * every,
        uploaded_bytes=1e3 * kilobytes * every,
        wasted_bytes=100.0 * kilobytes * every,
        offloaded=np.full(requests, kilobytes > 0),
        source_cloud=np.full(requests, kilobytes > 0 and math.isfinite(latency_ms)),
        p_cloud=np.asarray(p_cloud) if p_cloud else np.full(requests, math.nan),
        cloud_in_time=np.asarray(cloud_in_time or [False] * requests, np.bool_),
        decision_us=np.arange(1, requests + 1, dtype=np.float64),
        action=np.zeros(requests, np.int8),
        joules=joules * requests,
    )


def result_of(
    runs: Sequence[PolicyRun], constants: Mapping[str, object] | None = None
) -> SimulationResult:
    """A cell of these runs."""
    return SimulationResult(
        runs=tuple(runs),
        policies=tuple(dict.fromkeys(run.policy for run in runs)),
        traces=tuple(dict.fromkeys(run.trace for run in runs)),
        seeds=tuple(dict.fromkeys(run.seed for run in runs)),
        device="mid",
        deadline_ms=400.0,
        arrivals="poisson",
        constants=dict(constants or {"run": {"duration_s": 600.0}}),
    )
