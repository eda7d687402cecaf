"""One call of the command: read traces, simulate each cell, score it."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np

from edge_runtime.contract.errors import ConfigError, NearfarError
from edge_runtime.simulation.cells import CellSpec
from edge_runtime.simulation.constants import Constants, load_constants
from edge_runtime.simulation.interrupts import children_end_with_us
from edge_runtime.simulation.records import NET_ORACLES, PolicyRun, SimulationResult
from edge_runtime.simulation.report.cells import Cell, Page, Session, cell_name, own_policies
from edge_runtime.simulation.run import simulate
from edge_runtime.simulation.scores import LOCAL_ONLY, ORACLE, is_bound, machine, score
from edge_runtime.simulation.terminal import RunProgress, traces_text
from edge_runtime.simulation.traces import Trace, TraceFolder, read_traces
from edge_runtime.simulation.world import draw_world

__all__ = ["Request", "run_cells", "split_names"]

_BOUNDS: Final = (LOCAL_ONLY, ORACLE, *NET_ORACLES.values())
_BYTES_PER_MEGABIT: Final = 125_000.0


class Request(msgspec.Struct, frozen=True, kw_only=True):
    """What the command line asks for."""

    folder: Path
    specs: tuple[CellSpec, ...]
    policies: str
    seeds: int
    jobs: int
    assume_uplink: bool = False
    rate_unit: str | None = None
    constants: Path | None = None
    with_timeline: bool = False


def split_names(text: str) -> tuple[str, ...]:
    """Names between commas; commas in parentheses belong to a name."""
    return tuple(name for name in re.findall(r"[^,()]+(?:\([^()]*\))?", text) if name.strip())


def run_cells(request: Request, *, quiet: bool) -> Page:
    """Simulate every cell and score it. ``ConfigError`` says what makes no sense."""
    began_s = time.monotonic()
    named = tuple(name.strip() for name in split_names(request.policies))
    if not named:
        raise ConfigError("--policies names no policy: write all, or names with commas between")
    # What gains are measured by runs with any choice of policies: LocalOnly first, bounds last.
    policies = tuple(dict.fromkeys((LOCAL_ONLY, *named, *_BOUNDS)))
    constants = load_constants(request.constants)
    folder = read_traces(
        request.folder, assume_uplink=request.assume_uplink, rate_unit=request.rate_unit
    )
    if not quiet:
        print(traces_text(folder), file=sys.stderr, flush=True)  # noqa: T201
    cells: list[Cell] = []
    with children_end_with_us(), RunProgress(quiet=quiet) as progress:
        for number, spec in enumerate(request.specs, 1):
            name = cell_name(spec.device, spec.deadline_ms, spec.arrivals)
            count = f" ({number}/{len(request.specs)})" if len(request.specs) > 1 else ""
            progress.start(name + count)
            cells.append(_cell(request, spec, policies, folder, constants, progress.update))
    session = _session(cells[0], folder, constants) if request.with_timeline else None
    return Page(
        cells=tuple(cells),
        folder=folder,
        session=session,
        machine={**machine(), "jobs": request.jobs},
        run_s=time.monotonic() - began_s,
    )


def _cell(
    request: Request,
    spec: CellSpec,
    policies: tuple[str, ...],
    folder: TraceFolder,
    constants: Constants,
    progress: Callable[[int, int], None],
) -> Cell:
    result = _simulate(
        folder.traces,
        device=spec.device,
        deadline_ms=spec.deadline_ms,
        arrivals=spec.arrivals,
        policies=policies,
        seeds=tuple(range(request.seeds)),
        jobs=request.jobs,
        progress=progress,
        constants=constants,
    )
    return Cell(result=result, scores=score(result))


def _simulate(traces: Sequence[Trace], **arguments: Any) -> SimulationResult:
    try:
        return simulate(traces, **arguments)
    except BrokenProcessPool:
        raise NearfarError(
            "a process of the simulation died, perhaps for want of memory: try fewer --jobs"
        ) from None


def _session(cell: Cell, folder: TraceFolder, constants: Constants) -> Session | None:
    """One run again, with its events: of ours, where cloud and device take turns most."""
    result = cell.result
    shown = (own_policies(result.policies) or [n for n in result.policies if not is_bound(n)])[0]
    runs = [run for run in result.runs if run.policy == shown and run.arrived_s.size]
    if not runs:
        return None
    traces = {trace.name: trace for trace in folder.traces}
    best = max(runs, key=lambda run: _variety(run, traces[run.trace]))
    trace = traces[best.trace]
    (run,) = simulate(
        [trace],
        device=result.device,
        deadline_ms=result.deadline_ms,
        arrivals=result.arrivals,
        policies=[shown],
        seeds=[best.seed],
        timeline=True,
        constants=constants,
    ).runs
    return Session(run=run, trace=trace, rates_mbps=_rates(trace, best, cell, constants))


def _variety(run: PolicyRun, trace: Trace) -> float:
    """How much there is to see: answers from both sides, and a link that changes."""
    cloud = float(run.source_cloud.mean())
    changes = float(np.log1p(trace.uplink_mbps).std())
    return min(cloud, 1 - cloud) * min(changes, 1.5)


def _rates(trace: Trace, run: PolicyRun, cell: Cell, constants: Constants) -> np.ndarray:
    """The uplink's capacity as that run met it: a run begins anywhere in its trace."""
    world = draw_world(
        trace,
        run.seed,
        device=cell.result.device,
        deadline_ms=cell.result.deadline_ms,
        arrivals=cell.result.arrivals,
        constants=constants,
    )
    tenths = range(int(constants.run.duration_s * 10))
    passed = [world.capacity.between(i / 10, (i + 1) / 10) for i in tenths]
    return np.round(np.asarray(passed) * 10 / _BYTES_PER_MEGABIT, 6)
