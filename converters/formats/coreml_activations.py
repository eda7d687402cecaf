"""W8A8: 8-bit activations in an ML program, ranges from the MIL interpreter.

coremltools calibrates by running the model, which only macOS can, and its passes leave out
what they have no pattern for. Here every layer's input gets one ``quantize``, ``dequantize``
pair, shared by all that read the value; Core ML fuses a layer with the pairs around it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from converters.formats.coreml_weights import WEIGHTS, weight_key
from converters.formats.float_region import arithmetic_region
from converters.ranges import Histogram
from converters.ready import ReadyModule
from converters.worker import report_progress
from edge_runtime.contract.errors import PrecisionRefused
from edge_runtime.runtimes.mil.program import Function

__all__ = ["Range", "measure_ranges", "quantize_activations"]

_LAYERS = ("conv", "conv_transpose", "linear")
_POOLS = ("avg_pool", "max_pool")
_KEEPS_RANGE = frozenset(
    {
        "expand_dims", "max_pool", "pixel_shuffle", "reshape", "slice_by_index", "slice_by_size",
        "squeeze", "transpose", "upsample_nearest_neighbor",
    }
)  # fmt: skip
"""Operators whose result fits the scale of their input: a second rounding then is exact."""
_ROOTS = frozenset({"rsqrt", "sqrt", "real_div"})
_ARITHMETIC = frozenset(
    {
        "add", "mul", "pow", "real_div", "reduce_mean", "reduce_sum", "reshape", "rsqrt", "sqrt",
        "square", "sub",
    }
)  # fmt: skip
_TINY = 2.0**-14
"""Smallest normal fp16: a smaller scale would be zero on some hardware."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Range:
    """Smallest and largest number a value took."""

    low: float
    high: float

    def scale_and_zero(self, dtype: type) -> tuple[Any, np.int8]:
        """Scale, of the value's own number type, and zero point: -128..127 spans the range.

        Zero is always in the range, so that padding stays exact.
        """
        low, high = min(self.low, 0.0), max(self.high, 0.0)
        scale = dtype(max((high - low) / 255.0, _TINY))
        zero = round(-128.0 - low / float(scale))
        return scale, np.int8(min(max(zero, -128), 127))


def measure_ranges(function: Function, ready: ReadyModule) -> dict[str, Range]:
    """The range of every float value of the program over the calibration inputs."""
    from edge_runtime.runtimes.mil.interpreter import Interpreter

    interpreter = Interpreter(function)
    ranges: dict[str, Range] = {}
    histograms: dict[str, Histogram] = {}
    clipped = ready.ranges.kind != "minmax"

    def observe(name: str, value: Any) -> None:
        if not hasattr(value, "is_floating_point") or not value.is_floating_point():
            return
        low, high = (float(bound) for bound in value.aminmax())
        known = ranges.get(name)
        if known is not None:
            low, high = min(low, known.low), max(high, known.high)
        ranges[name] = Range(low=low, high=high)
        if clipped:
            histograms.setdefault(name, Histogram()).observe(value.float().numpy())

    count = ready.calibration_count
    for index in range(count):
        report_progress("calibrating", index + 1, count)
        interpreter.run({ready.inputs[0].name: ready.calibration(index, index + 1)}, observe)
    for name, histogram in histograms.items():
        low, high = histogram.bounds(ready.ranges)
        ranges[name] = Range(low=low, high=high)
    return ranges


def quantize_activations(block: Any, ranges: Mapping[str, Range], skip: set[str]) -> int:
    """Insert the pairs into a pymil function, in place; returns how many.

    ``skip``: keys (``weight_key``) of weights whose layers stay in float. Raises
    ``PrecisionRefused`` when the program has no layer that could compute on 8 bits.
    """
    from coremltools.converters.mil.mil import Builder, types

    pairs: dict[str, Any] = {}
    floats: set[str] = set()
    layers = 0
    region = _arithmetic(block)
    with block:
        for op in list(block.operations):
            if _stays_float(op, skip, floats):
                floats.update(var.name for var in op.outputs)
                continue
            arguments = _quantizable(op, skip)
            if not arguments or op.name in region:
                continue
            layers += op.op_type in _LAYERS
            replaced = {}
            for argument in arguments:
                var = op.inputs[argument]
                if var.name not in pairs:
                    kind = np.float16 if var.dtype == types.fp16 else np.float32
                    scale, zero = _range(var, ranges).scale_and_zero(kind)
                    levels = Builder.quantize(
                        input=var, scale=scale, zero_point=zero, output_dtype="int8", before_op=op
                    )
                    pairs[var.name] = Builder.dequantize(
                        input=levels, scale=scale, zero_point=zero, before_op=op
                    )
                replaced[argument] = pairs[var.name]
            op.set_inputs(type_inference=False, **replaced)
    if not layers:
        raise PrecisionRefused(
            "coreml int8: no layer of this model can compute on 8-bit numbers: take int8w"
        )
    return len(pairs)


def _stays_float(op: Any, skip: set[str], floats: set[str]) -> bool:
    """A kept layer, or the sum of one and its shortcut.

    Rounded to 8 bits, the sum would lose again what keeping the layer won. ``floats``: names
    of the values before ``op`` of which this is so.
    """
    if op.op_type in _LAYERS:
        weight = op.inputs[WEIGHTS[op.op_type]]
        return weight.val is not None and weight_key(weight.val) in skip
    if op.op_type != "add":
        return False
    return any(getattr(op.inputs[name], "name", None) in floats for name in ("x", "y"))


def _quantizable(op: Any, skip: set[str]) -> tuple[str, ...]:
    """Which arguments of an operator become 8-bit."""
    if op.op_type in _LAYERS:
        weight = op.inputs[WEIGHTS[op.op_type]]
        if not _computed(op.inputs["x"]) or weight.val is None:
            return ()
        return () if weight_key(weight.val) in skip else ("x",)
    if op.op_type in _POOLS:
        return ("x",) if _computed(op.inputs["x"]) else ()
    if op.op_type == "add":
        both = [op.inputs["x"], op.inputs["y"]]
        if all(map(_computed, both)) and both[0].shape == both[1].shape:
            return ("x", "y")
    return ()


def _computed(var: Any) -> bool:
    from coremltools.converters.mil.mil import types

    return var.val is None and var.dtype in (types.fp16, types.fp32)


def _range(var: Any, ranges: Mapping[str, Range]) -> Range:
    """The measured range, or that of the value this one only rearranges."""
    while var.op is not None and _computed(var):
        if var.op.op_type == "dequantize":
            var = var.op.inputs["input"].op.inputs["input"]
        elif var.op.op_type in _KEEPS_RANGE and _computed(var.op.inputs["x"]):
            var = var.op.inputs["x"]
        else:
            break
    return ranges[var.name]


def _arithmetic(block: Any) -> set[str]:
    """Names of operators that work out means, variances and what divides by their roots."""
    before: dict[str, list[str]] = {}
    after: dict[str, list[str]] = {}
    kinds: dict[str, str] = {}
    seeds = []
    for op in block.operations:
        if op.op_type == "const":
            continue
        kinds[op.name] = op.op_type
        before[op.name] = []
        for value in op.inputs.values():
            for var in value if isinstance(value, list | tuple) else (value,):
                if var is not None and var.op is not None and var.op.op_type != "const":
                    before[op.name].append(var.op.name)
                    after.setdefault(var.op.name, []).append(op.name)
        if op.op_type in _ROOTS and (op.op_type != "real_div" or _computed(op.inputs["y"])):
            seeds.append(op.name)
    walkable = {name for name, kind in kinds.items() if kind in _ARITHMETIC}
    return arithmetic_region(seeds, before, after, walkable)
