"""8-bit arithmetic for an OpenVINO model: its ranges, seen on inputs, written into its graph.

What goes into a convolution or a product with fixed weights gets one range a tensor, from the
least to the largest number seen; weights get one an output channel, around zero (Jacob et al.,
"Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference",
2018). ``FakeQuantize`` operators say so in the graph, and OpenVINO runs what lies between them
in integers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

__all__ = ["quantize"]

_WEIGHTED: Final = {"Convolution": 1, "GroupConvolution": 2, "MatMul": 0}
"""Operators with weights, and how many leading axes of these are output channels."""
_LEVELS: Final = 256
_WEIGHT_LEVELS: Final = 255
"""From -127 to 127: zero stays zero."""
_LEAST_RANGE: Final = 1e-12


def quantize(openvino: Any, model: Any, inputs: Sequence[NDArray[np.generic]]) -> int:
    """Quantize ``model`` in place; how many of its operators it was.

    ``inputs``: ``[batch, ...]`` each, as the model takes them. What multiplies two computed
    tensors stays in floating point, and so does what never leaves zero.
    """
    weighted = [operator for operator in model.get_ordered_ops() if _weights(operator) is not None]
    ranges = _ranges(openvino, model, weighted, inputs)
    operators = openvino.opset13
    quantized: dict[tuple[str, int], Any] = {}
    done = 0
    for operator in weighted:
        source = operator.input(0).get_source_output()
        key = _key(source)
        low, high = ranges[key]
        if high - low < _LEAST_RANGE:
            continue
        if key not in quantized:
            quantized[key] = _fake(operators, source, low, high, _LEVELS)
        operator.input(0).replace_source_output(quantized[key].output(0))
        weights = operator.input(1).get_source_output()
        bounds = _bounds(operator, weights.get_node().data)
        made = _fake(operators, weights, -bounds, bounds, _WEIGHT_LEVELS)
        operator.input(1).replace_source_output(made.output(0))
        done += 1
    model.validate_nodes_and_infer_types()
    return done


def _weights(operator: Any) -> NDArray[np.generic] | None:
    """Fixed weights of an operator that has them."""
    if operator.get_type_name() not in _WEIGHTED:
        return None
    node = operator.input(1).get_source_output().get_node()
    return node.data if node.get_type_name() == "Constant" else None


def _bounds(operator: Any, weights: NDArray[np.generic]) -> NDArray[np.float32]:
    """The largest magnitude in each output channel; broadcasts over ``weights``."""
    kind = operator.get_type_name()
    if kind == "MatMul":
        transposed = operator.get_attributes()["transpose_b"]
        axes: tuple[int, ...] = (weights.ndim - 1 if transposed else max(weights.ndim - 2, 0),)
    else:
        axes = tuple(range(_WEIGHTED[kind], weights.ndim))
    largest = np.abs(weights.astype(np.float32)).max(axis=axes, keepdims=True)
    return np.maximum(largest, np.float32(_LEAST_RANGE))


def _fake(operators: Any, source: Any, low: Any, high: Any, levels: int) -> Any:
    bounds = [operators.constant(np.asarray(bound, dtype=np.float32)) for bound in (low, high)]
    return operators.fake_quantize(source, *bounds, *bounds, levels)


def _key(output: Any) -> tuple[str, int]:
    return output.get_node().get_friendly_name(), output.get_index()


def _ranges(
    openvino: Any, model: Any, weighted: Sequence[Any], inputs: Sequence[NDArray[np.generic]]
) -> dict[tuple[str, int], tuple[float, float]]:
    """The least and the largest number in what goes into each operator, on all inputs.

    With a negative number the range is a signed integer's around zero, else it begins at zero.
    """
    names = {operator.get_friendly_name() for operator in weighted}
    watched = model.clone()
    operators = openvino.opset13
    ends: list[Any] = []
    keys: list[tuple[str, int]] = []
    for operator in watched.get_ordered_ops():
        if operator.get_friendly_name() not in names:
            continue
        source = operator.input(0).get_source_output()
        if _key(source) in keys:
            continue
        keys.append(_key(source))
        axes = operators.constant(np.arange(len(source.partial_shape), dtype=np.int64))
        ends += [
            operators.result(operators.reduce_min(source, axes, False)),
            operators.result(operators.reduce_max(source, axes, False)),
        ]
    first = len(watched.outputs)
    watched.add_results(ends)
    precise = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}
    compiled = openvino.Core().compile_model(watched, "CPU", precise)
    seen = np.zeros((len(keys), 2))
    for rows in inputs:
        given = compiled([rows])
        found = np.array([float(given[first + place]) for place in range(2 * len(keys))])
        lows, highs = found[::2], found[1::2]
        seen = np.stack([np.minimum(seen[:, 0], lows), np.maximum(seen[:, 1], highs)], axis=1)
    ranges: dict[tuple[str, int], tuple[float, float]] = {}
    for key, (low, high) in zip(keys, seen.tolist(), strict=True):
        if low < 0.0:
            step = max(-low / 128, high / 127)
            low, high = -128 * step, 127 * step
        ranges[key] = (low, high)
    return ranges
