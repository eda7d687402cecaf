"""How far the local confidence is what it says, before and after calibration, held out."""

from __future__ import annotations

from typing import Literal

import msgspec
import numpy as np

from edge_runtime.gain.fit import (
    Bin,
    Values,
    best_temperature,
    binary_nll,
    brier,
    expected_calibration_error,
    isotonic_blocks,
    reliability,
    top_score,
)
from edge_runtime.gain.samples import Samples

__all__ = ["Calibration", "Reliability", "calibration_figures"]


class Reliability(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Confidence against what came true. The confidence is the first answer's being right."""

    ece: float
    """Expected calibration error, 15 bins of equal width."""
    brier: float
    nll: float
    """Binary, in nats."""
    bins: tuple[Bin, ...]


class Calibration(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``before``: as reported. ``after``: each half by the fit of the other one."""

    method: Literal["temperature", "isotonic"]
    temperature: float | None
    """Of all images; logits are divided by it. Relative to the manifest's own."""
    before: Reliability
    after: Reliability


def calibration_figures(samples: Samples) -> Calibration | None:
    """None without labels or without a confidence: there is nothing to calibrate."""
    if samples.local_right is None or samples.confidence is None:
        return None
    temperature = None
    if samples.logits is not None and samples.truth is not None:
        temperature = best_temperature(samples.logits, samples.truth)
    fold, after = samples.fold, np.empty(len(samples))
    for half in (0, 1):
        after[fold == half] = _calibrated(samples.where(fold != half), samples.where(fold == half))
    return Calibration(
        method="isotonic" if temperature is None else "temperature",
        temperature=temperature,
        before=_reliability(samples.confidence, samples.local_right),
        after=_reliability(after, samples.local_right),
    )


def _calibrated(fitted: Samples, held_out: Samples) -> Values:
    if fitted.logits is not None and fitted.truth is not None:
        assert held_out.logits is not None  # noqa: S101  # both halves have them
        return top_score(held_out.logits, best_temperature(fitted.logits, fitted.truth))
    assert fitted.confidence is not None  # noqa: S101  # the caller looked
    assert fitted.local_right is not None  # noqa: S101
    assert held_out.confidence is not None  # noqa: S101
    blocks = isotonic_blocks(fitted.confidence, fitted.local_right)
    positions, values = [b.position for b in blocks], [b.value for b in blocks]
    return np.interp(held_out.confidence, positions, values)


def _reliability(confidence: Values, right: Values) -> Reliability:
    clipped = np.clip(confidence, 0.0, 1.0)
    bins = reliability(clipped, right)
    return Reliability(
        ece=expected_calibration_error(bins),
        brier=brier(clipped, right),
        nll=binary_nll(clipped, right),
        bins=bins,
    )
