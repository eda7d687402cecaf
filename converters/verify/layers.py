"""Compare a saved file with the reference layer by layer, and name the first that diverges.

The reference's layers are the convolutions and linear layers of its ``torch.export`` graph,
each with the element-wise steps behind it that converters fuse. A file's inner values carry
other names and layouts: a layer's value is the one of its size that comes closest. Runs in
a child process.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from converters.jobs import LayerFinding, LayersJob, LayersResult, VariantRun
from converters.prepare import latent
from converters.report.records import LayerRow
from converters.verify.run_files import EVALUATION_SEED, load_reference
from converters.worker import report_progress
from edge_runtime.contract.errors import NearfarError
from edge_runtime.contract.imaging import decode_image
from edge_runtime.contract.preprocess import Preprocess, apply, apply_uint8
from edge_runtime.contract.tensors import TensorSpec, pack_image

__all__ = ["compare_layers", "first_divergence"]

Array = NDArray[np.float32]

_LAYERS = ("conv", "linear", "addmm", "matmul")
_FUSED = (
    "batch_norm", "relu", "hardtanh", "clamp", "silu", "hardswish", "sigmoid", "gelu", "tanh",
    "leaky_relu", "elu", "hardsigmoid", "add", "dropout", "view", "reshape", "permute",
)  # fmt: skip
_FLOAT_DB = {"fp32": 45.0, "fp16": 20.0}
_COARSE_DB = 6.0
_SHIFT_GAIN_DB = 12.0


@dataclasses.dataclass
class _Layer:
    """One layer of the reference and the values that may stand for its result."""

    name: str
    op: str
    strided: bool
    values: list[Array]


def compare_layers(job: LayersJob) -> LayersResult:
    """Rows for every variant whose inner values can be read; what cannot is left out."""
    import torch

    torch.set_num_threads(1)
    program, record = load_reference(Path(job.reference))
    batch = _input(job, record.preprocess, record.inputs[0])
    layers = _reference_layers(program, batch)
    result = LayersResult()
    for number, item in enumerate(job.variants):
        report_progress(f"layers of {item.variant.id}", number + 1, len(job.variants))
        reader = _READERS.get(item.variant.format)
        if reader is None:
            continue
        try:
            fed = _input(job, item.variant.preprocess, item.variant.inputs[0])
            values = list(reader(item, fed))
        except (NearfarError, RuntimeError, ValueError) as error:
            result.errors[item.variant.id] = str(error)
            continue
        rows, matches = _match(layers, values)
        result.rows[item.variant.id] = rows
        bad = first_divergence(rows, item.variant.precision)
        if bad is not None:
            result.findings[item.variant.id] = _explain(layers, rows, matches, bad, values)
    return result


def first_divergence(rows: list[LayerRow], precision: str) -> int | None:
    """Index of the first layer after which the answers stay wrong; None when none does."""
    least = _FLOAT_DB.get(precision, _COARSE_DB)
    for index, row in enumerate(rows):
        later = [other.sqnr_db < least for other in rows[index:]]
        if row.sqnr_db < least and sum(later) * 2 > len(later):
            return index
    return None


def _input(job: LayersJob, record: Preprocess | None, spec: TensorSpec) -> NDArray[Any]:
    if record is None:
        return latent(spec, EVALUATION_SEED)
    pixels = decode_image(Path(job.image).read_bytes())
    if spec.dtype == "uint8":
        return pack_image(apply_uint8(record, pixels), spec)
    return pack_image(apply(record, pixels), spec)


def _reference_layers(program: Any, batch: NDArray[Any]) -> list[_Layer]:
    """Run the graph node by node and keep what layers and their followers give."""
    import torch
    from torch import fx

    kept: dict[str, Array] = {}

    class Recorder(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            value = super().run_node(n)
            if isinstance(value, torch.Tensor) and value.is_floating_point():
                kept[n.name] = value.detach().numpy().astype(np.float32)
            elif isinstance(value, tuple) and value and isinstance(value[0], torch.Tensor):
                kept[n.name] = value[0].detach().numpy().astype(np.float32)
            return value

    with torch.no_grad():
        Recorder(program).run(torch.from_numpy(batch))
    layers = []
    for node in program.graph.nodes:
        if node.op != "call_function" or not any(k in node.name for k in _LAYERS):
            continue
        values, at = [kept[node.name]], node
        while len(at.users) == 1:
            (at,) = at.users
            if at.name not in kept or not any(k in at.name for k in _FUSED):
                break
            values.append(kept[at.name])
            if "add" in at.name:
                break
        layers.append(
            _Layer(name=_name(node), op=_kind(node), strided=_strided(node), values=values)
        )
    return layers


def _name(node: Any) -> str:
    """The module that holds the weight: ``features.0.0`` from ``features.0.0.weight``."""
    for argument in node.args:
        target = str(getattr(argument, "target", ""))
        if getattr(argument, "op", "") == "get_attr" and target.endswith("weight"):
            return target.removesuffix(".weight").removeprefix("model.")
    return str(node.name)


def _kind(node: Any) -> str:
    return str(getattr(node.target, "__name__", node.name)).partition(".")[0]


def _strided(node: Any) -> bool:
    stride = node.args[3] if "conv" in node.name and len(node.args) > 3 else 1
    sizes = stride if isinstance(stride, list | tuple) else [stride]
    return any(isinstance(size, int) and size > 1 for size in sizes)


def _tflite_values(item: VariantRun, batch: NDArray[Any]) -> Iterator[Array]:
    from ai_edge_litert.interpreter import Interpreter, OpResolverType

    interpreter = Interpreter(
        model_path=item.path,
        experimental_preserve_all_tensors=True,
        experimental_op_resolver_type=OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES,
        num_threads=1,
    )
    interpreter.allocate_tensors()
    interpreter.set_tensor(interpreter.get_input_details()[0]["index"], batch)
    interpreter.invoke()
    for detail in interpreter.get_tensor_details():
        try:
            value = interpreter.get_tensor(detail["index"])
        except ValueError:  # scratch memory, or a tensor without data
            continue
        scale, zero = detail["quantization"]
        if value.dtype in (np.int8, np.uint8, np.int16) and scale:
            yield ((value.astype(np.float32) - zero) * scale).astype(np.float32)
        elif value.dtype == np.float32:
            yield value


def _coreml_values(item: VariantRun, batch: NDArray[Any]) -> Iterator[Array]:
    from edge_runtime.runtimes.mil.interpreter import Interpreter
    from edge_runtime.runtimes.mil.program import read_program

    values: list[Array] = []

    def observe(_name: str, value: Any) -> None:
        if value.is_floating_point():
            values.append(value.detach().float().numpy().copy())

    interpreter = Interpreter(read_program(Path(item.path)))
    interpreter.run({item.variant.inputs[0].name: batch.astype(np.float32)}, observe)
    yield from values


_READERS: dict[str, Callable[[VariantRun, NDArray[Any]], Iterator[Array]]] = {
    "tflite": _tflite_values,
    "coreml": _coreml_values,
}


def _as_reference(value: Array, shape: tuple[int, ...]) -> Array | None:
    """``value`` in the reference's shape, when a change of layout leads there."""
    if value.shape == shape:
        return value
    if len(shape) == 4 and value.ndim == 4:
        turned = value.transpose(0, 3, 1, 2)
        if turned.shape == shape:
            return turned
    if value.size == int(np.prod(shape)) and max(shape) == value.size:
        return value.reshape(shape)
    return None


def _ratio_db(exact: Array, other: Array) -> float:
    noise = float(((exact - other) ** 2).sum(dtype=np.float64))
    signal = float((exact**2).sum(dtype=np.float64))
    if noise == 0.0:
        return 200.0
    return float(np.clip(10.0 * np.log10(max(signal, 1e-30) / noise), -200.0, 200.0))


def _match(
    layers: list[_Layer], values: list[Array]
) -> tuple[list[LayerRow], list[tuple[Array, Array]]]:
    """The closest value of the file for each layer; layers without one are left out."""
    by_size: dict[int, list[Array]] = {}
    for value in values:
        by_size.setdefault(value.size, []).append(value)
    rows: list[LayerRow] = []
    pairs: list[tuple[Array, Array]] = []
    for layer in layers:
        best: tuple[float, Array, Array] | None = None
        for exact in layer.values:
            for value in by_size.get(exact.size, []):
                other = _as_reference(value, exact.shape)
                if other is None:
                    continue
                ratio = _ratio_db(exact, other)
                if best is None or ratio > best[0]:
                    best = (ratio, exact, other)
        if best is not None:
            rows.append(LayerRow(name=layer.name, op=layer.op, sqnr_db=round(best[0], 2)))
            pairs.append((best[1], best[2]))
    return rows, pairs


_SHIFTS = (
    ((slice(1, None), slice(None, -1)), "one pixel up and left"),
    ((slice(None, -1), slice(1, None)), "one pixel down and right"),
)


def _explain(
    layers: list[_Layer],
    rows: list[LayerRow],
    pairs: list[tuple[Array, Array]],
    index: int,
    values: list[Array],
) -> LayerFinding:
    """Where it diverges; a strided layer that matches when shifted was padded otherwise."""
    row = rows[index]
    before = rows[index - 1].name if index else "the input"
    detail = (
        f"it follows the reference up to {before}; {row.name} ({row.op}) is the first layer "
        f"that diverges ({row.sqnr_db:.1f} dB)"
    )
    layer = next(one for one in layers if one.name == row.name)
    exact, _ = pairs[index]
    if exact.ndim == 4 and min(exact.shape[2:]) > 3:
        for (first, second), where in _SHIFTS:
            for value in values:
                other = _as_reference(value, exact.shape)
                if other is None:
                    continue
                moved = _ratio_db(exact[:, :, first, first], other[:, :, second, second])
                if layer.strided and moved > row.sqnr_db + _SHIFT_GAIN_DB:
                    return LayerFinding(
                        name="padding",
                        layer=row.name,
                        detail=f"{detail}: its result is the reference's moved {where}, so it "
                        "pads on another side",
                    )
    return LayerFinding(name="layer", layer=row.name, detail=detail)
