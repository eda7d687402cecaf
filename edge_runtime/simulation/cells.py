"""Cells: one device, deadline and arrival pattern each; the ten that are reported together."""

from __future__ import annotations

from typing import Final

import msgspec

from edge_runtime.contract.errors import ConfigError

__all__ = ["ARRIVALS", "DEVICES", "MAX_CELLS", "TEN_CELLS", "CellSpec", "parse_cells"]

DEVICES: Final = ("mid", "flagship", "pi")
ARRIVALS: Final = ("poisson", "bursty", "sparse")
MAX_CELLS: Final = 32
MIN_DEADLINE_MS: Final = 1.0
MAX_DEADLINE_MS: Final = 60_000.0


class CellSpec(msgspec.Struct, frozen=True):
    """What to simulate."""

    device: str
    deadline_ms: float
    arrivals: str


TEN_CELLS: Final = (
    CellSpec("mid", 300.0, "poisson"),
    CellSpec("mid", 400.0, "poisson"),
    CellSpec("mid", 800.0, "poisson"),
    CellSpec("flagship", 200.0, "poisson"),
    CellSpec("flagship", 400.0, "poisson"),
    CellSpec("mid", 400.0, "bursty"),
    CellSpec("mid", 600.0, "sparse"),
    CellSpec("pi", 500.0, "poisson"),
    CellSpec("pi", 1000.0, "poisson"),
    CellSpec("pi", 600.0, "bursty"),
)
"""A mid-range phone, a fast one and a small board; from hopeless to easy deadlines."""


def parse_cells(text: str) -> tuple[CellSpec, ...]:
    """``ten``, or cells as ``DEVICE:DEADLINE_MS:ARRIVALS`` with commas between.

    Raises ``ConfigError`` naming the cell that makes no sense, or is there twice.
    """
    if text.strip().lower() == "ten":
        return TEN_CELLS
    found: list[CellSpec] = []
    for part in text.split(","):
        cell = _parse_cell(part.strip())
        if cell in found:
            raise ConfigError(f"the cell {part.strip()} is named twice")
        found.append(cell)
    if len(found) > MAX_CELLS:
        raise ConfigError(f"{len(found)} cells are too many: at most {MAX_CELLS}")
    return tuple(found)


def _parse_cell(text: str) -> CellSpec:
    device, _, rest = text.partition(":")
    deadline, _, arrivals = rest.partition(":")
    try:
        deadline_ms = float(deadline)
    except ValueError:
        deadline_ms = -1.0
    if (
        device not in DEVICES
        or arrivals not in ARRIVALS
        or not MIN_DEADLINE_MS <= deadline_ms <= MAX_DEADLINE_MS
    ):
        raise ConfigError(
            f"no cell {text[:60]!r}: write 'ten', or {'|'.join(DEVICES)}:MILLISECONDS:"
            f"{'|'.join(ARRIVALS)}, as mid:400:poisson"
        )
    return CellSpec(device, deadline_ms, arrivals)
