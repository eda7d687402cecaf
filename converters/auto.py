"""``--auto``: a variant that fails its gate gets its accuracy back, or a stand-in.

First the fewest layers that must stay in floating point (``converters.restore``), then, where
even half of them do not help, the next precision of the same format. Nothing that fails
ships, and what was done is told.
"""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from converters.recipes import RECIPES
from converters.restore.search import find_keep
from converters.verify.verify import VariantReport
from edge_runtime.contract.manifest import Format, Precision

__all__ = ["LADDER", "Restored", "next_precision", "restore"]

LADDER: tuple[Precision, ...] = (
    "pal4", "int4w", "int8", "int8-dyn", "int8w", "a16w8", "fp16", "fp32",
)  # fmt: skip
"""From coarse to fine: where a precision falls back to."""

_BUDGET = 5


class Restored(msgspec.Struct, frozen=True, kw_only=True):
    """What ``--auto`` did for one variant."""

    kept: tuple[str, ...] = ()
    """Layers left in floating point; empty when that did not help."""
    trials: int = 0
    """Conversions it took."""
    sqnr_db_before: float | None
    sqnr_db_after: float | None = None
    size_before: int
    size_after: int | None = None
    stand_in: str | None = None
    """Id of the variant that takes its place, when keeping layers did not help."""

    def sentence(self, name: str) -> str:
        """For people."""
        if self.kept:
            after, before = self.size_after or 0, max(1, self.size_before)
            return (
                f"{name}: {len(self.kept)} layers stay in floating point "
                f"({', '.join(self.kept)}); {_db(self.sqnr_db_before)} became "
                f"{_db(self.sqnr_db_after)} for {after / before - 1:+.0%} of size, in "
                f"{self.trials} trials"
            )
        if self.stand_in is not None:
            return f"{name}: no set of layers helped in {self.trials} trials; {self.stand_in} ships"
        return f"{name}: nothing helped in {self.trials} trials; it does not ship"


def _db(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f} dB"


def next_precision(format_name: Format, precision: Precision) -> Precision | None:
    """The next finer precision that the format has."""
    if precision not in LADDER:
        return None
    for finer in LADDER[LADDER.index(precision) + 1 :]:
        if (format_name, finer) in RECIPES:
            return finer
    return None


def restore(
    failed: VariantReport,
    order: list[str],
    attempt: Callable[[tuple[str, ...]], VariantReport],
) -> Restored:
    """Search for the layers to keep. ``attempt`` converts with them kept and judges the file.

    ``order``: layers, worst first. Afterwards the caller attempts ``kept`` once more if the
    last attempt was another one.
    """
    found = find_keep(
        order,
        attempt,
        lambda report: report.passed,
        budget=_BUDGET,
        most=max(1, len(order) // 2),
        start=max(1, len(order) // 16),
    )
    if found.best is None:
        return Restored(
            trials=len(found.trials),
            sqnr_db_before=failed.sqnr_db,
            size_before=failed.size_bytes,
        )
    after = found.best.figures
    return Restored(
        kept=found.best.keep,
        trials=len(found.trials),
        sqnr_db_before=failed.sqnr_db,
        sqnr_db_after=after.sqnr_db,
        size_before=failed.size_bytes,
        size_after=after.size_bytes,
    )
