"""Does the engine compute what the saved file says? Its own arithmetic in float tells.

A quantized file is an exact recipe: integers, scales, zero points. An engine that follows
it differs from the same recipe computed in float only by roundings, and those are no
larger than what quantization itself cost. An engine with a wrong kernel (QNNPACK's clamp
and PReLU, oneDNN's transposed convolution) is far off although the recipe is good.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from edge_runtime.contract.errors import ConversionError

__all__ = ["MIN_ENGINE_DB", "compare_with_reference", "ratio_db"]

MIN_ENGINE_DB = 25.0
_MARGIN_DB = 3.0
_SAMPLES = 4

Run = Callable[[int], Sequence[NDArray[np.generic]]]
"""From the number of a calibration input to the answers for it."""


def ratio_db(exact: Sequence[NDArray[np.generic]], other: Sequence[NDArray[np.generic]]) -> float:
    """10 log10(sum exact^2 / sum (exact - other)^2) over all arrays; inf when equal."""
    signal = noise = 0.0
    for one, two in zip(exact, other, strict=True):
        first = np.asarray(one, dtype=np.float64)
        signal += float((first**2).sum())
        noise += float(((first - np.asarray(two, dtype=np.float64)) ** 2).sum())
    if not math.isfinite(noise):
        return -math.inf
    if noise == 0.0:
        return math.inf
    return 10.0 * math.log10(signal / noise) if signal > 0.0 else -math.inf


def compare_with_reference(
    format_name: str, *, engine: Run, reference: Run, exact: Run, count: int
) -> float:
    """Run a few calibration inputs through all three; returns the worst output's dB.

    ``engine``: the saved file. ``reference``: its arithmetic in float. ``exact``: the float
    model. ``count``: how many calibration inputs there are. Raises ``ConversionError`` when
    the engine is below ``MIN_ENGINE_DB`` against the reference on an output, and further
    from the float model than the reference is: coarse quantization alone is no fault of
    the engine, and other checks judge it.
    """
    chosen = sorted({int(index) for index in np.linspace(0, count - 1, min(count, _SAMPLES))})
    answers = [[list(run(index)) for index in chosen] for run in (engine, reference, exact)]
    by_output = [list(zip(*runs, strict=True)) for runs in answers]
    worst = math.inf
    for engine_out, reference_out, exact_out in zip(*by_output, strict=True):
        engine_db = ratio_db(reference_out, engine_out)
        worst = min(worst, engine_db)
        own, best = ratio_db(exact_out, engine_out), ratio_db(exact_out, reference_out)
        if engine_db < MIN_ENGINE_DB and own < best - _MARGIN_DB:
            raise ConversionError(
                f"{format_name}: the engine differs from its own arithmetic ({engine_db:.1f} dB, "
                f"at least {MIN_ENGINE_DB:.0f} expected; {own:.1f} dB from the float model, where "
                f"that arithmetic reaches {best:.1f}): one of its kernels is wrong for this "
                "model. Leave the layer out with --keep, or this precision out of --precision"
            )
    return worst
