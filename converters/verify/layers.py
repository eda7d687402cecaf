"""Compare a saved file with the reference layer by layer, and name the first that diverges.

The reference's layers are the convolutions and linear layers of its ``torch.export`` graph,
each with the element-wise steps behind it that converters fuse. A file's inner values carry
other names and layouts: a layer's value is the one of its size that comes closest. Runs in
a child process.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from converters.jobs import LayerFinding, LayersJob, LayersResult
from converters.report.records import LayerRow
from converters.verify.causes import STATIC, Ranges, Reference, find_causes
from converters.verify.run_files import load_reference
from converters.verify.values import READERS, Value, as_reference, sampled
from converters.worker import report_progress
from edge_runtime.contract.errors import NearfarError

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
_FAILURES = (NearfarError, RuntimeError, ValueError, TypeError)
"""What a file that cannot be taken apart, or run, raises."""


@dataclasses.dataclass
class _Layer:
    """One layer of the reference and the values that may stand for its result."""

    name: str
    op: str
    strided: bool
    values: list[Array]


def compare_layers(job: LayersJob) -> LayersResult:
    """Rows for every variant whose inner values can be read; causes for every variant."""
    import torch

    torch.set_num_threads(1)
    program, record = load_reference(Path(job.reference))
    reference = Reference(program, record, job.images, job.latents)
    kept = reference.values(next(reference.batches()))
    layers = _reference_layers(program, kept)
    ranges = Ranges(reference, kept)
    inputs = reference.inputs
    result = LayersResult()
    for number, item in enumerate(job.variants):
        variant = item.variant
        report_progress(f"layers of {variant.id}", number + 1, len(job.variants))
        values: list[Value] = []
        try:
            fed = next(inputs.fed(variant.preprocess, variant.inputs[0]))
            values = list(READERS[variant.format](item, fed)) if variant.format in READERS else []
        except _FAILURES as error:
            result.errors[variant.id] = str(error)
        if values:
            rows, pairs = _match(layers, values)
            result.rows[variant.id] = rows
            bad = first_divergence(rows, variant.precision)
            if bad is not None:
                result.findings[variant.id] = _explain(layers, rows, pairs, bad, values)
        try:
            found = find_causes(item, reference, inputs, values)
            if not found and job.ranges and variant.precision in STATIC and values:
                ranges.add(variant.id, values)
            result.causes[variant.id] = found
        except _FAILURES as error:
            result.errors[variant.id] = str(error)
    report_progress("holding ranges against the reference")
    try:
        result.causes.update(ranges.judge())
    except _FAILURES as error:
        result.errors.update(dict.fromkeys(ranges.names, str(error)))
    return result


def first_divergence(rows: list[LayerRow], precision: str) -> int | None:
    """Index of the first layer after which the answers stay wrong; None when none does."""
    least = _FLOAT_DB.get(precision, _COARSE_DB)
    for index, row in enumerate(rows):
        later = [other.sqnr_db < least for other in rows[index:]]
        if row.sqnr_db < least and sum(later) * 2 > len(later):
            return index
    return None


def _reference_layers(program: Any, kept: dict[str, Array]) -> list[_Layer]:
    """Each layer's value and those of its followers; ``kept``: the value of every node."""
    layers = []
    for node in program.graph.nodes:
        computed = node.op == "call_function" and node.name in kept
        if not computed or not any(k in node.name for k in _LAYERS):
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


def _ratio_db(exact: Array, other: Array) -> float:
    noise = float(((exact - other) ** 2).sum(dtype=np.float64))
    signal = float((exact**2).sum(dtype=np.float64))
    if noise == 0.0:
        return 200.0
    return float(np.clip(10.0 * np.log10(max(signal, 1e-30) / noise), -200.0, 200.0))


def _match(
    layers: list[_Layer], values: Sequence[Value]
) -> tuple[list[LayerRow], list[tuple[Array, Array]]]:
    """The closest value of the file for each layer; layers without one are left out."""
    by_size: dict[int, list[Array]] = {}
    for value in values:
        by_size.setdefault(value.array.size, []).append(value.array)
    few: dict[tuple[int, tuple[int, ...]], Array] = {}
    rows: list[LayerRow] = []
    pairs: list[tuple[Array, Array]] = []
    for layer in layers:
        best: tuple[float, Array, Array] | None = None
        for exact in layer.values:
            exact_few = sampled(exact)
            for array in by_size.get(exact.size, []):
                other = as_reference(array, exact.shape)
                if other is None:
                    continue
                key = id(array), exact.shape
                if key not in few:
                    few[key] = sampled(other)
                ratio = _ratio_db(exact_few, few[key])
                if best is None or ratio > best[0]:
                    best = (ratio, exact, other)
        if best is not None:
            ratio = _ratio_db(best[1], best[2])
            rows.append(LayerRow(name=layer.name, op=layer.op, sqnr_db=round(ratio, 2)))
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
    values: Sequence[Value],
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
                other = as_reference(value.array, exact.shape)
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
