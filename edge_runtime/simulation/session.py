"""One call of the command: read traces, simulate each cell, score it."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import msgspec

from edge_runtime.simulation.cells import CellSpec
from edge_runtime.simulation.report.cells import Cell, Page, Session
from edge_runtime.simulation.run import simulate
from edge_runtime.simulation.scores import machine, score
from edge_runtime.simulation.terminal import RunProgress, traces_text
from edge_runtime.simulation.traces import TraceFolder, read_traces

__all__ = ["Request", "run_cells"]


class Request(msgspec.Struct, frozen=True, kw_only=True):
    """What the command line asks for."""

    folder: Path
    specs: tuple[CellSpec, ...]
    policies: str
    seeds: int
    jobs: int
    assume_uplink: bool = False
    rate_unit: str | None = None
    with_timeline: bool = False
