"""Quantize a float ``.tflite`` with ai-edge-quantizer: recipes as data.

The quantizer's own ``calibrate`` keeps a moving average of the ranges and so clips real
activations (15 dB instead of 30 dB on a trained net); here the ranges are the true minimum
and maximum. Inputs and outputs keep their type, float32 or 8-bit pixels.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable
from typing import Any

from converters.formats.float_region import arithmetic_region
from converters.formats.tflite_export import AROUND, NET
from converters.formats.tflite_file import operator_names, read_model
from converters.formats.tflite_hard_swish import split_hard_swish
from converters.ranges import MINMAX, Histogram, RangeMethod
from converters.rewrites.compensate import WIDE
from edge_runtime.contract.errors import ConversionError
from edge_runtime.contract.manifest import Precision

__all__ = ["QuantizedFile", "final_activations", "kept_operators", "quantize", "statistics"]

_STATIC = ("int8", "a16w8")
_WEIGHTED = ("CONV_2D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED", "TRANSPOSE_CONV")
"""Their second input is the weight."""
_ACTIVATIONS = ("LOGISTIC", "SOFTMAX")
_IMAGE_RANK = 4
_ROOTS = ("RSQRT", "SQRT")
_ARITHMETIC = (
    "ADD", "BROADCAST_TO", "DIV", "MEAN", "MUL", "POW", "RESHAPE", "RSQRT", "SQRT", "SQUARE",
    "SQUARED_DIFFERENCE", "SUB", "SUM",
)  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuantizedFile:
    """What the quantizer made of a float file."""

    data: bytes
    kept: tuple[str, ...]
    """Of the modules asked for, those that have operators and stayed in float."""
    rewrites: tuple[str, ...]


def quantize(
    data: bytes,
    precision: Precision,
    inputs: Iterable[Any],
    keep: tuple[str, ...],
    *,
    post_processed: bool,
    method: RangeMethod = MINMAX,
    least: int = WIDE,
) -> QuantizedFile:
    """Quantize a float file of ``export_float``.

    ``inputs``: calibration inputs as the file takes them; used for int8 and a16w8, whose
    ranges they set as ``method`` says (16 bits have levels enough: nothing is clipped).
    ``keep``: names of modules to leave in float. ``post_processed``: NMS or argmax follow
    the net. ``least``: inputs a group from which on int4w has 4 bits. Raises
    ``ConversionError`` when the quantizer gives up.
    """
    from ai_edge_quantizer import quantizer

    rewrites: tuple[str, ...] = ()
    values = list(inputs) if precision in _STATIC else []
    if precision == "int8":
        data, rewrites = _delegated(data, [] if post_processed else values)
    worker = quantizer.Quantizer(bytearray(data))
    worker.load_quantization_recipe(_recipe(precision, data, least))
    scopes, kept = kept_operators(data, keep, post_processed=post_processed)
    if precision in _STATIC:
        computed, final = statistics(data), final_activations(data)
        scopes += computed + final
        named = {"statistics_in_float": computed, "final_activation_in_float": final}
        rewrites += tuple(name for name, found in named.items() if found)
    _leave_in_float(worker, scopes, weights_in_8_bits=precision in _STATIC)
    ranges = None
    if precision in _STATIC:
        ranges = _ranges(data, worker, values)
        if precision == "int8" and method.kind != "minmax":
            _clip(ranges, data, values, method)
    result = worker.quantize(ranges, enable_progress_report=False).quantized_model
    if not result:
        raise ConversionError("ai-edge-quantizer gave no model: report this model")
    return QuantizedFile(data=bytes(result), kept=kept, rewrites=rewrites)


def _delegated(data: bytes, inputs: list[Any]) -> tuple[bytes, tuple[str, ...]]:
    """The same float net in operators that have 8-bit kernels, checked on the first input.

    Not behind NMS or argmax, where a last bit decides which box or class comes out.
    """
    from converters.rewrites.fold import check_equal

    changed, count = split_hard_swish(data)
    if not count:
        return data, ()
    if inputs:
        before, after = _answers(data, inputs[0]), _answers(changed, inputs[0])
        check_equal("split_hard_swish", before, after)
    return changed, ("split_hard_swish",)


def _answers(data: bytes, values: Any) -> tuple[Any, ...]:
    import torch
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(model_content=data, num_threads=1)
    interpreter.allocate_tensors()
    interpreter.set_tensor(interpreter.get_input_details()[0]["index"], values)
    interpreter.invoke()
    details = interpreter.get_output_details()
    return tuple(torch.from_numpy(interpreter.get_tensor(one["index"])) for one in details)


def _recipe(precision: Precision, data: bytes, least: int) -> Any:
    from ai_edge_quantizer import qtyping, recipe
    from ai_edge_quantizer.algorithm_manager import AlgorithmName
    from ai_edge_quantizer.recipe_manager import RecipeManager

    if precision == "int8":
        return recipe.static_wi8_ai8()
    if precision == "a16w8":
        return recipe.static_wi8_ai16()
    if precision == "int8-dyn":
        return recipe.dynamic_wi8_afp32()
    if precision == "int8w":
        return recipe.weight_only_wi8_afp32()
    rules = RecipeManager()
    if precision == "int4w":
        # LiteRT has no 4-bit depthwise or transposed convolution: those get 8 bits.
        rules.load_quantization_recipe(recipe.weight_only_wi8_afp32())
        for name in (
            qtyping.TFLOperationName.CONV_2D,
            qtyping.TFLOperationName.FULLY_CONNECTED,
        ):
            rules.add_weight_only_config(regex=".*", operation_name=name, num_bits=4)
        for scope in _narrow(data, least):
            rules.add_weight_only_config(
                regex=f"^{re.escape(scope)}$",
                operation_name=qtyping.TFLOperationName.ALL_SUPPORTED,
                num_bits=8,
            )
        return rules.get_quantization_recipe()
    assert precision == "fp16", precision  # noqa: S101  # planned so by the recipe
    rules.add_quantization_config(
        regex=".*",
        operation_name=qtyping.TFLOperationName.ALL_SUPPORTED,
        algorithm_key=AlgorithmName.FLOAT_CASTING,
        op_config=qtyping.OpQuantizationConfig(
            weight_tensor_config=qtyping.TensorQuantizationConfig(
                num_bits=16, dtype=qtyping.TensorDataType.FLOAT
            ),
            compute_precision=qtyping.ComputePrecision.FLOAT,
            explicit_dequantize=True,
        ),
    )
    return rules.get_quantization_recipe()


def _narrow(data: bytes, least: int) -> list[str]:
    """Scopes of the layers of fewer inputs a group: 4 bits would ruin them."""
    model = read_model(data)
    return [
        _scope(graph, operator)
        for graph in model.subgraphs
        for operator, kind in zip(graph.operators, operator_names(model, graph), strict=True)
        if kind in ("CONV_2D", "FULLY_CONNECTED")
        and int(graph.tensors[operator.inputs[1]].shape[-1]) < least
    ]


def _leave_in_float(worker: Any, scopes: Iterable[str], *, weights_in_8_bits: bool) -> None:
    """Compute these in float; 8-bit weights cost a layer next to nothing, its activations do.

    The interpreter turns such weights to float once, when it prepares the file.
    """
    from ai_edge_quantizer import qtyping
    from ai_edge_quantizer.algorithm_manager import AlgorithmName

    names = qtyping.TFLOperationName
    for operation in (names.INPUT, names.OUTPUT):
        worker.update_quantization_recipe(
            regex=".*", operation_name=operation, algorithm_key=AlgorithmName.NO_QUANTIZE
        )
    for scope in scopes:
        worker.update_quantization_recipe(
            regex=f"^{re.escape(scope)}$",
            operation_name=names.ALL_SUPPORTED,
            algorithm_key=AlgorithmName.NO_QUANTIZE,
        )
        for operation in (
            (names.CONV_2D, names.DEPTHWISE_CONV_2D, names.FULLY_CONNECTED, names.CONV_2D_TRANSPOSE)
            if weights_in_8_bits
            else ()
        ):
            worker.update_quantization_recipe(
                regex=f"^{re.escape(scope)}$",
                operation_name=operation,
                op_config=qtyping.OpQuantizationConfig(
                    weight_tensor_config=qtyping.TensorQuantizationConfig(
                        num_bits=8,
                        symmetric=True,
                        granularity=qtyping.QuantGranularity.CHANNELWISE,
                    ),
                    compute_precision=qtyping.ComputePrecision.FLOAT,
                    explicit_dequantize=True,
                ),
            )


def statistics(data: bytes) -> list[str]:
    """Scopes of the operators that normalize by computed statistics.

    See ``converters.formats.float_region``.
    """
    model = read_model(data)
    scopes: list[str] = []
    for graph in model.subgraphs:
        names = operator_names(model, graph)
        makers = {
            index: number
            for number, operator in enumerate(graph.operators)
            for index in operator.outputs
        }
        before: dict[int, set[int]] = {number: set() for number in range(len(names))}
        after: dict[int, set[int]] = {number: set() for number in range(len(names))}
        for number, operator in enumerate(graph.operators):
            for index in () if operator.inputs is None else operator.inputs:
                if index in makers:
                    before[number].add(makers[index])
                    after[makers[index]].add(number)
        seeds = [
            number
            for number, name in enumerate(names)
            if name in _ROOTS or (name == "DIV" and graph.operators[number].inputs[1] in makers)
        ]
        walkable = {number for number, name in enumerate(names) if name in _ARITHMETIC}
        for number in sorted(arithmetic_region(seeds, before, after, walkable)):
            scopes.append(_scope(graph, graph.operators[number]))
    return scopes


def final_activations(data: bytes) -> list[str]:
    """Scopes of the softmax or sigmoid that ends the net, images aside.

    In int8 their output has the scale 1/256, which makes every probability of a 1000-class
    net zero. In an image it is one of 256 shades.
    """
    model = read_model(data)
    return [
        _scope(graph, operator)
        for graph in model.subgraphs
        for operator, kind in zip(graph.operators, operator_names(model, graph), strict=True)
        if kind in _ACTIVATIONS
        and set(operator.outputs) & set(graph.outputs)
        and len(graph.tensors[operator.outputs[0]].shape) < _IMAGE_RANK
    ]


def _scope(graph: Any, operator: Any) -> str:
    """What the quantizer matches: the names of the outputs, each with a semicolon."""
    return "".join(f"{(graph.tensors[index].name or b'').decode()};" for index in operator.outputs)


def kept_operators(
    data: bytes, keep: tuple[str, ...], *, post_processed: bool
) -> tuple[list[str], tuple[str, ...]]:
    """Scopes of the operators to leave in float, and which of ``keep`` have any.

    An operator belongs to the modules in the name of its weight, or else
    of its outputs and constants; to what lies around the net when none is the net's. The sum
    of a kept layer and its shortcut stays in float as well: rounded to 8 bits, it would lose
    again what keeping the layer won.
    """
    model = read_model(data)
    scopes: list[str] = []
    met: set[str] = set()
    for graph in model.subgraphs:
        names = [(tensor.name or b"").decode() for tensor in graph.tensors]
        floats: set[int] = set()
        for operator, kind in zip(graph.operators, operator_names(model, graph), strict=True):
            inputs = [] if operator.inputs is None else [i for i in operator.inputs if i >= 0]
            constants = [i for i in inputs if _is_constant(model, graph.tensors[i])]
            own = [names[index] for index in (*operator.outputs, *constants)]
            paths = _paths(own)
            if kind in _WEIGHTED:  # other names may lie on it where two layers share an input
                paths = _paths([names[inputs[1]]]) or paths
            hit = {name for name in keep if any(_within(path, name) for path in paths)}
            met |= hit
            if hit or (kind == "ADD" and floats.intersection(inputs)):
                floats.update(operator.outputs)
                scopes.append(_scope(graph, operator))
            elif _is_around(own, paths, post_processed=post_processed):
                scopes.append(_scope(graph, operator))
    return scopes, tuple(name for name in keep if name in met)


def _is_constant(model: Any, tensor: Any) -> bool:
    content = model.buffers[tensor.buffer].data
    return content is not None and len(content) > 0


def _paths(names: Iterable[str]) -> set[str]:
    """Module paths of the net in tensor names as ``tflite_export`` gives them."""
    return {
        part.removeprefix(NET) for name in names for part in name.split(";") if part.startswith(NET)
    }


def _within(path: str, name: str) -> bool:
    return path == name or path.startswith(f"{name}.")


def _is_around(names: Iterable[str], paths: set[str], *, post_processed: bool) -> bool:
    if paths:
        return False
    # The last operator's output is named after the signature, not after a module.
    return post_processed or any(AROUND in name for name in names)


def _ranges(data: bytes, worker: Any, inputs: Iterable[Any]) -> Any:
    """True minimum and maximum of every tensor over the calibration inputs."""
    from ai_edge_quantizer.calibrator import Calibrator
    from ai_edge_quantizer.utils import qsv_utils

    (signature,) = read_model(data).signatureDefs
    name = signature.inputs[0].name.decode()
    ranges = Calibrator(data, num_threads=1, qsv_update_func=qsv_utils.min_max_update)
    dataset = [{name: one} for one in inputs]
    # Calibrator wants the recipe manager, which Quantizer keeps to itself.
    ranges.calibrate({signature.signatureKey.decode(): dataset}, worker._recipe_manager)
    return ranges.get_model_qsvs()


def _clip(ranges: Any, data: bytes, inputs: Iterable[Any], method: RangeMethod) -> None:
    """Narrow the measured range of every activation; weights keep theirs."""
    import numpy as np
    from ai_edge_litert.interpreter import Interpreter, OpResolverType

    interpreter = Interpreter(
        model_content=data,
        num_threads=1,
        experimental_preserve_all_tensors=True,
        # A delegate computes inside what could not be read.
        experimental_op_resolver_type=OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES,
    )
    interpreter.allocate_tensors()
    model = read_model(data)
    (graph,) = model.subgraphs
    computed = {index for operator in graph.operators for index in operator.outputs}
    computed |= set(graph.inputs)
    names = {
        detail["index"]: detail["name"]
        for detail in interpreter.get_tensor_details()
        if detail["index"] in computed
        and detail["dtype"] is np.float32
        and detail["name"] in ranges
    }
    histograms = {name: Histogram() for name in names.values()}
    (source,) = interpreter.get_input_details()
    for values in inputs:
        interpreter.set_tensor(source["index"], values)
        interpreter.invoke()
        for index, name in names.items():
            histograms[name].observe(interpreter.get_tensor(index))
    for name, histogram in histograms.items():
        for bound, value in zip(("min", "max"), histogram.bounds(method), strict=True):
            ranges[name][bound] = np.full_like(ranges[name][bound], value)
