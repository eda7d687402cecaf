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
from converters.verify.outcome import VariantReport
from edge_runtime.contract.manifest import Format, Precision

__all__ = ["LADDER", "Prediction", "Restored", "finer_precisions", "restore"]

LADDER: tuple[Precision, ...] = (
    "pal4", "int4w", "int8", "int8-dyn", "int8w", "a16w8", "fp16", "fp32",
)  # fmt: skip
"""From coarse to fine: where a precision falls back to."""

_BUDGET = 5
_MARGIN_DB = 1.0
_ROOM_DB = 0.5
"""Above the bound: other images give other figures."""


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
            return f"{name}: {self._vain}; {self.stand_in} takes its place"
        return f"{name}: {self._vain}; it does not ship"

    @property
    def _vain(self) -> str:
        if not self.trials:
            return "no set of layers would help, by simulation"
        return f"no set of layers helped in {self.trials} trials"


def _db(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f} dB"


class Prediction(msgspec.Struct, frozen=True, kw_only=True):
    """What a simulation of the quantized net says before anything is converted."""

    order: list[str]
    """Layers, worst first."""
    curve: tuple[tuple[int, float], ...] = ()
    """How many of them are kept, from none on, and the simulated SQNR in dB."""

    def start(self, measured_db: float | None, wanted_db: float | None) -> int | None:
        """How many layers to keep in the first trial; None: not even the most will do.

        ``measured_db``: the file's own figure with nothing kept; the simulation is moved by
        how far it is off there. A margin of ``_MARGIN_DB`` is left before giving up.
        """
        usual = max(1, len(self.order) // 16)
        if not self.curve or measured_db is None or wanted_db is None:
            return usual
        moved = measured_db - self.curve[0][1]
        for count, ratio in self.curve[1:]:
            if ratio + moved >= wanted_db:
                return count
        best = max(ratio for _, ratio in self.curve) + moved
        return usual if best >= wanted_db - _MARGIN_DB else None


def finer_precisions(format_name: Format, precision: Precision) -> list[Precision]:
    """The finer precisions that the format has, the next first."""
    if precision not in LADDER:
        return []
    finer = LADDER[LADDER.index(precision) + 1 :]
    return [name for name in finer if (format_name, name) in RECIPES]


def restore(
    failed: VariantReport,
    prediction: Prediction,
    attempt: Callable[[tuple[str, ...]], VariantReport],
    guess: tuple[str, ...] = (),
) -> Restored:
    """Search for the layers to keep. ``attempt`` converts with them kept and judges the file.

    ``guess``: layers that helped another format; where they help here too, that is enough.
    Afterwards the caller settles on ``kept``, as the last attempt may be another one.
    """
    nothing = Restored(sqnr_db_before=failed.sqnr_db, size_before=failed.size_bytes)
    order = prediction.order
    wanted_db = None if failed.wanted_db is None else failed.wanted_db + _ROOM_DB
    start = prediction.start(failed.sqnr_db, wanted_db)
    if start is None:
        return nothing
    guessed = 0
    if guess:
        report = attempt(guess)
        if _good(report):
            return _restored(nothing, guess, report, trials=1)
        guessed = 1
    found = find_keep(
        order,
        attempt,
        _good,
        budget=_BUDGET - guessed,
        most=max(1, len(order) // 2),
        start=max(start, len(guess) + guessed),
    )
    trials = len(found.trials) + guessed
    if found.best is None:
        return msgspec.structs.replace(nothing, trials=trials)
    return _restored(nothing, found.best.keep, found.best.figures, trials=trials)


def _good(report: VariantReport) -> bool:
    if report.sqnr_db is None or report.wanted_db is None:
        return report.passed
    return report.passed and report.sqnr_db >= report.wanted_db + _ROOM_DB


def _restored(
    before: Restored, kept: tuple[str, ...], report: VariantReport, *, trials: int
) -> Restored:
    return msgspec.structs.replace(
        before,
        kept=kept,
        trials=trials,
        sqnr_db_after=report.sqnr_db,
        size_after=report.size_bytes,
    )
