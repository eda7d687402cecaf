"""Which values fp16 cannot hold, so that what makes and what reads them stays in fp32.

The largest fp16 number is 65504. A variance that is written out (the mean of squared
differences, as style networks from TensorFlow have it) passes it at once where pixels are
0..255, becomes infinite, and the layer answers its bias: 5 dB, on every chip, without a
warning. coremltools looks at constants only.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from converters.ready import ReadyModule
from edge_runtime.runtimes.mil.program import Function

__all__ = ["is_beside", "wide_values"]

_HEADROOM: Final = 4.0
"""Other inputs may reach so many times what these reached."""
_LIMIT: Final = float(np.finfo(np.float16).max) / _HEADROOM
_MOST_INPUTS: Final = 4
_HALF_SUFFIX: Final = "_cast_fp16"
"""What coremltools calls a value that it turned into fp16."""


def wide_values(function: Function, ready: ReadyModule) -> frozenset[str]:
    """Names, as in the program before it became fp16, of values beyond fp16 with headroom.

    From runs in fp32 over some of the calibration inputs, or over drawn ones where there are
    none.
    """
    from edge_runtime.runtimes.mil.interpreter import Interpreter

    interpreter = Interpreter(function, arithmetic="fp32")
    found: set[str] = set()

    def observe(name: str, value: Any) -> None:
        if not hasattr(value, "is_floating_point") or not value.is_floating_point():
            return
        largest = float(value.abs().max()) if value.numel() else 0.0
        if math.isnan(largest) or largest > _LIMIT:
            found.add(name.removesuffix(_HALF_SUFFIX))

    for given in _inputs(ready):
        interpreter.run({ready.inputs[0].name: given}, observe)
    return frozenset(found)


def is_beside(op: Any, wide: frozenset[str]) -> bool:
    """Whether a pymil operator makes or reads one of the values in ``wide``."""
    read = (
        var
        for value in op.inputs.values()
        for var in (value if isinstance(value, list | tuple) else (value,))
    )
    return any(
        _program_name(var.name) in wide for var in (*op.outputs, *read) if hasattr(var, "name")
    )


def _program_name(name: str) -> str:
    """A name as coremltools writes it: letters, digits and ``_``, no digit first."""
    cleaned = re.sub(r"[^a-zA-Z0-9_]", "_", name)
    return f"var_{cleaned}" if cleaned[:1].isdigit() else cleaned


def _inputs(ready: ReadyModule) -> Iterator[NDArray[np.generic]]:
    count = min(ready.calibration_count, _MOST_INPUTS)
    if count:
        for place in np.linspace(0, ready.calibration_count - 1, count).round().astype(int):
            yield ready.calibration(int(place), int(place) + 1)
        return
    yield from _drawn(ready)


def _drawn(ready: ReadyModule) -> Iterator[NDArray[np.generic]]:
    """Noise, and an edge from the darkest to the brightest; for a generator two latents."""
    spec = ready.inputs[0]
    generator = np.random.default_rng(0)
    if ready.preprocess is None:
        for _ in range(2):
            yield generator.standard_normal(spec.shape).astype(np.float32)
        return
    edge = np.zeros(spec.shape, np.float32)
    edge[..., spec.shape[-1] // 2 :] = 255.0
    noise = generator.integers(0, 256, spec.shape).astype(np.float32)
    table = ready.preprocess.normalization
    mean = np.array(table.mean, np.float32).reshape(1, -1, 1, 1)
    std = np.array(table.std, np.float32).reshape(1, -1, 1, 1)
    for pixels in (noise, edge):
        yield (pixels / np.float32(table.scale) - mean) / std
