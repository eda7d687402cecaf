"""What a page shows: cells, and which color each policy has on all of its charts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import msgspec
import numpy as np
from numpy.typing import NDArray

from edge_runtime.simulation.records import PolicyRun, SimulationResult
from edge_runtime.simulation.scores import LOCAL_ONLY, ORACLE, PolicyScore, is_bound
from edge_runtime.simulation.traces import Trace, TraceFolder

__all__ = ["Cell", "Page", "Session", "cell_name", "colors", "is_drawn", "own_policies"]

_OWN: Final = ("ExpectedUtility", "ADAPTIVE")
_OWN_COLORS: Final = ("own", "own2", "own3")
_OTHERS: Final = ("c1", "c2", "c3")


class Cell(msgspec.Struct, frozen=True, kw_only=True, eq=False):
    """One simulated cell and its figures."""

    result: SimulationResult
    scores: dict[str, PolicyScore]

    @property
    def name(self) -> str:
        """Device, deadline and arrivals."""
        return cell_name(self.result.device, self.result.deadline_ms, self.result.arrivals)


class Session(msgspec.Struct, frozen=True, kw_only=True, eq=False):
    """One run with its events, and the uplink it ran over."""

    run: PolicyRun
    trace: Trace
    rates_mbps: NDArray[np.float64]
    """float64 [tenths of a second], the uplink's capacity from the start of the run."""


class Page(msgspec.Struct, frozen=True, kw_only=True, eq=False):
    """Everything on one page."""

    cells: tuple[Cell, ...]
    folder: TraceFolder
    session: Session | None
    machine: dict[str, Any]
    run_s: float


def cell_name(device: str, deadline_ms: float, arrivals: str) -> str:
    """What people call a cell."""
    return f"{device}, {deadline_ms:g} ms, {arrivals}"


def is_drawn(policy: str) -> bool:
    """Whether charts show a policy: of the bounds, the one that all gain is measured by."""
    return policy == ORACLE or not is_bound(policy)


def own_policies(policies: Sequence[str]) -> list[str]:
    """Those that weigh utility, the balanced one first."""
    found = [name for name in policies if name.startswith(_OWN)]
    return sorted(found, key=lambda name: "balanced" not in name)


def colors(cells: Sequence[Cell]) -> dict[str, str]:
    """A CSS class for each policy: the bounds, the two ends, ours, the best others, the rest.

    Ours are the expected-utility policies. The best others are by their net utility over all
    cells.
    """
    policies = list(dict.fromkeys(name for cell in cells for name in cell.result.policies))
    known: dict[str, str] = {}
    for policy in policies:
        if is_bound(policy):
            known[policy] = "bound"
        elif policy == LOCAL_ONLY:
            known[policy] = "local"
        elif policy == "CloudOnly":
            known[policy] = "cloud"
    known |= dict(zip(own_policies(policies), _OWN_COLORS, strict=False))

    def worth(policy: str) -> float:
        found = [cell.scores[policy].net_utility for cell in cells if policy in cell.scores]
        return sum(found) / len(found)

    rest = sorted((name for name in policies if name not in known), key=worth, reverse=True)
    known |= dict(zip(rest, _OTHERS, strict=False))
    return {policy: known.get(policy, "rest") for policy in policies}
