"""Replay policies over recorded links: every policy in the same worlds."""

from __future__ import annotations

import itertools
import multiprocessing
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed

import msgspec
import numpy as np

from edge_runtime.contract.errors import ConfigError
from edge_runtime.simulation.constants import Constants, load_constants
from edge_runtime.simulation.device import DeviceRun
from edge_runtime.simulation.lineup import ORACLES, expand_policies, make_policy
from edge_runtime.simulation.oracle import run_oracle
from edge_runtime.simulation.records import Event, PolicyRun, SimulationResult
from edge_runtime.simulation.requests import Outcome
from edge_runtime.simulation.traces import Trace
from edge_runtime.simulation.world import World, draw_world

__all__ = ["simulate"]


def simulate(
    traces: Sequence[Trace],
    *,
    device: str,
    deadline_ms: float,
    arrivals: str,
    policies: Sequence[str],
    seeds: Sequence[int],
    jobs: int = 1,
    progress: Callable[[int, int], None] | None = None,
    timeline: bool = False,
    constants: Constants | None = None,
) -> SimulationResult:
    """One cell: every policy through every trace with every seed.

    Args:
        traces: recorded links.
        device: ``flagship``, ``mid`` or ``pi``.
        deadline_ms: of every request.
        arrivals: ``poisson``, ``bursty`` or ``sparse``.
        policies: names of ``lineup.LINEUP``, ``Cascade(theta)``, registered ones, or ``all``.
        seeds: one world per trace and seed; not negative.
        jobs: processes.
        progress: called with (done, all) after each trace and seed.
        timeline: also record every event (large).
        constants: None: the shipped ones.

    Raises ``ConfigError``. The result does not depend on ``jobs`` but for ``decision_us``.
    """
    names = expand_policies(tuple(policies))
    if not traces:
        raise ConfigError("no traces to simulate")
    if not seeds or any(seed < 0 for seed in seeds):
        raise ConfigError("seeds must be 0 or more, and at least one")
    if jobs < 1:
        raise ConfigError(f"jobs must be 1 or more, not {jobs}")
    known = constants or load_constants()
    for trace in traces:  # a mistake is told before the work
        draw_world(
            trace, 0, device=device, deadline_ms=deadline_ms, arrivals=arrivals, constants=known
        )
    pairs = list(itertools.product(range(len(traces)), seeds))
    found: dict[tuple[int, int], list[PolicyRun]] = {}

    def note(pair: tuple[int, int], runs: list[PolicyRun]) -> None:
        found[pair] = runs
        if progress is not None:
            progress(len(found), len(pairs))

    cell = (device, deadline_ms, arrivals, names, known, timeline)
    if jobs == 1:
        for pair in pairs:
            note(pair, _run_pair(traces[pair[0]], pair[1], *cell))
    else:
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(jobs, mp_context=context) as pool:
            waiting = {
                pool.submit(_run_pair, traces[pair[0]], pair[1], *cell): pair for pair in pairs
            }
            for future in as_completed(waiting):
                note(waiting[future], future.result())
    return SimulationResult(
        runs=tuple(run for pair in pairs for run in found[pair]),
        policies=names,
        traces=tuple(trace.name for trace in traces),
        seeds=tuple(seeds),
        device=device,
        deadline_ms=deadline_ms,
        arrivals=arrivals,
        constants=msgspec.to_builtins(known),
    )


def _run_pair(
    trace: Trace,
    seed: int,
    device: str,
    deadline_ms: float,
    arrivals: str,
    names: tuple[str, ...],
    constants: Constants,
    timeline: bool,
) -> list[PolicyRun]:
    """Every policy in one world."""
    world = draw_world(
        trace,
        seed,
        device=device,
        deadline_ms=deadline_ms,
        arrivals=arrivals,
        constants=constants,
    )
    runs = []
    for name in names:
        if name in ORACLES:
            outcomes, joules = run_oracle(world, name)
            runs.append(_record(world, trace, seed, name, outcomes, joules, []))
            continue
        device_run = DeviceRun(world, make_policy(name), timeline=timeline)
        outcomes = device_run.run()
        runs.append(
            _record(world, trace, seed, name, outcomes, device_run.joules, device_run.events)
        )
    return runs


def _record(
    world: World,
    trace: Trace,
    seed: int,
    name: str,
    outcomes: Sequence[Outcome],
    joules: float,
    events: Sequence[Event],
) -> PolicyRun:
    arrived_s = np.asarray(world.arrived_s, dtype=np.float64)
    latency_ms = 1e3 * (np.array([o.answer_s for o in outcomes], dtype=np.float64) - arrived_s)
    deadline_ms = np.full(len(outcomes), 1e3 * world.deadline_s)
    from_cloud = np.array([o.from_cloud for o in outcomes], dtype=np.bool_)
    in_time = latency_ms <= deadline_ms + 1e-6
    right = np.where(
        from_cloud,
        [world.cloud_correct(index) for index in range(len(outcomes))],
        np.asarray(world.confidence, dtype=np.float64),
    )
    return PolicyRun(
        policy=name,
        trace=trace.name,
        group=trace.group,
        seed=seed,
        arrived_s=arrived_s,
        deadline_ms=deadline_ms,
        latency_ms=latency_ms,
        correct=np.where(in_time, right, 0.0),
        uploaded_bytes=np.array([o.uploaded_bytes for o in outcomes], dtype=np.float64),
        wasted_bytes=np.array([o.wasted_bytes for o in outcomes], dtype=np.float64),
        offloaded=np.array([o.offloaded for o in outcomes], dtype=np.bool_),
        source_cloud=from_cloud & in_time,
        p_cloud=np.array([o.p_cloud for o in outcomes], dtype=np.float64),
        cloud_in_time=np.array([o.cloud_in_time for o in outcomes], dtype=np.bool_),
        decision_us=np.array(
            [1e6 * o.decision_s / max(1, o.decisions) for o in outcomes], dtype=np.float64
        ),
        action=np.array([o.action for o in outcomes], dtype=np.int8),
        joules=joules,
        events=tuple(events),
    )
