"""Static int8 for ExecuTorch: PT2E with XNNPACK's quantizer, corrected.

What the stock configuration does wrong for converted nets, each measured:

* its weight observer floors the scale at 2^-12, so a channel whose largest weight is below
  0.031 gets fewer than 127 steps; here the floor lies far below any real weight, so that
  the integers are those that ``round_weights`` chose (``_check_integers``);
* convolution and ReLU6 are quantized one after the other with one shared range, which
  wastes every step beyond 6; here they are one pattern, as convolution and ReLU are;
* a mean over height and width gets the range of its input, and so few steps of its own
  smaller values; here it has its own range;
* a normalization written out as arithmetic would be quantized; here it stays float;
* arithmetic of the baked normalization and of NMS would be quantized too, constants
  included; here only the net itself is.

Ranges of activations are the true minimum and maximum over the calibration inputs.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from converters.formats.executorch_annotate import WEIGHT_FLOOR, make_quantizer
from converters.formats.inner import inner_module, kept_modules
from converters.ready import ReadyModule
from converters.worker import report_progress
from edge_runtime.contract.errors import ConversionError

__all__ = ["Quantized", "calibration_input", "quantize"]

_BIAS_STEPS = 2.0**30
"""The bias is stored as int32 in steps of input scale * weight scale."""
_ON_GRID = 0.05
"""Steps that a rounded weight may lie beside its integer."""


@dataclasses.dataclass(kw_only=True)
class Quantized:
    """A converted PT2E module: the reference for the engine, and what is lowered."""

    module: Any
    kept: tuple[str, ...]
    """Of the modules asked for, those that do compute something and stayed float."""


def calibration_input(ready: ReadyModule, index: int) -> Any:
    """One calibration input as the module takes it: a tensor of the input's dtype."""
    import torch

    values = torch.from_numpy(ready.calibration(index, index + 1))
    return values.to(torch.uint8) if ready.inputs[0].dtype == "uint8" else values


def quantize(
    exported: Any, ready: ReadyModule, keep: tuple[str, ...], *, rounded: bool
) -> Quantized:
    """Quantize ``exported`` (the graph module of ``torch.export``) on all calibration inputs.

    ``keep``: names of modules of the source that stay in floating point. ``rounded``: the
    weights lie on the int8 grid already, and must come out as the same integers. Raises
    ``ConversionError`` where they do not.
    """
    import torch
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    kept_modules(inner_module(ready.module), keep)  # refuses names that there are not
    scope = _Scope(_inner_path(ready.module), keep)
    prepared = prepare_pt2e(exported, make_quantizer(scope.wanted, ready.ranges))
    chosen = _layer_weights(prepared)
    count = ready.calibration_count
    with torch.no_grad():
        for index in range(count):
            report_progress("calibrating", index + 1, count)
            prepared(calibration_input(ready, index))
    converted = convert_pt2e(prepared)
    if rounded:
        _check_integers(converted, chosen)
    _widen_thin_channels(converted)
    return Quantized(module=converted, kept=tuple(name for name in keep if name in scope.met))


def _inner_path(module: Any) -> str:
    """Where the source's own net lies in what ``export_module`` exports, with a dot."""
    inner = inner_module(module)
    name = next(name for name, one in module.named_modules() if one is inner)
    return f"net.{name}." if name else "net."


class _Scope:
    """Which nodes of the graph are to be quantized: the net's own, but not kept ones."""

    def __init__(self, inner: str, keep: tuple[str, ...]) -> None:
        self.inner = inner
        self.keep = {inner + name: name for name in keep}
        self.met: set[str] = set()
        self._known: dict[str, bool] = {}

    def wanted(self, node: Any) -> bool:
        """The filter that XNNPACK's quantizer asks."""
        paths = _module_paths(node)
        if not paths:  # weights, and constants that the quantizer itself made
            return True
        if self._kept(node, paths):
            return False
        # A wrapper's own arithmetic lies outside of the net.
        return any(f"{one}.".startswith(self.inner) for one in paths)

    def _kept(self, node: Any, paths: list[str]) -> bool:
        """In a kept module, or the sum of a kept layer and its shortcut.

        Rounded to 8 bits, the sum would lose again what keeping the layer won.
        """
        known = self._known.get(node.name)
        if known is None:
            names = [
                name
                for path, name in self.keep.items()
                if any(one == path or one.startswith(f"{path}.") for one in paths)
            ]
            self.met.update(names)
            known = bool(names) or (
                bool(self.keep)
                and str(node.target).startswith("aten.add")
                and any(self._kept(one, _module_paths(one)) for one in node.all_input_nodes)
            )
            self._known[node.name] = known
        return known


def _module_paths(node: Any) -> list[str]:
    """Paths of the modules that a node was traced in, outermost first, without the root."""
    paths = []
    for path, _ in node.meta.get("nn_module_stack", {}).values():
        text = str(path).removeprefix("L['self']").lstrip(".")
        if text:
            paths.append(text)
    return paths


def _layers(converted: Any) -> list[tuple[Any, Any, Any]]:
    """(layer, dequantized input, dequantized weight) nodes of every int8 layer."""
    import torch

    decomposed = torch.ops.quantized_decomposed
    found = []
    for node in converted.graph.nodes:
        if node.op != "call_function" or len(node.args) < 2:
            continue
        value, weight = node.args[:2]
        if (
            getattr(weight, "target", None) == decomposed.dequantize_per_channel.default
            and getattr(value, "target", None) == decomposed.dequantize_per_tensor.default
            and weight.args[0].op == "get_attr"
        ):
            found.append((node, value, weight))
    return found


def _attribute(module: Any, node: Any) -> Any:
    """The tensor that a ``get_attr`` node stands for."""
    value = module
    for part in str(node.target).split("."):
        value = getattr(value, part)
    return value


def _widen_thin_channels(converted: Any) -> None:
    """Give channels of almost no weight a scale at which their bias fits into int32.

    Their weights then take fewer steps; a bias that wraps around would take the answer.
    """
    import torch

    with torch.no_grad():
        for layer, value, weight in _layers(converted):
            if len(layer.args) < 3 or not isinstance(layer.args[2], torch.fx.Node):
                continue
            bias = _attribute(converted, layer.args[2])
            scales = _attribute(converted, weight.args[1])
            needed = bias.abs().to(scales.dtype) / (float(value.args[1]) * _BIAS_STEPS)
            if not bool((needed > scales).any()):
                continue
            integers = _attribute(converted, weight.args[0])
            shape = [1] * integers.dim()
            shape[weight.args[3]] = -1
            wider = torch.maximum(scales, needed)
            ratio = (scales / wider).reshape(shape)
            integers.copy_(torch.round(integers * ratio).to(integers.dtype))
            scales.copy_(wider)


def _layer_weights(prepared: Any) -> dict[str, Any]:
    """The float weights of each layer that is to become int8, batch norms folded."""
    found = {}
    for node in prepared.graph.nodes:
        if node.op != "call_function" or len(node.args) < 2:
            continue
        observer = node.args[1]
        if getattr(observer, "op", None) != "call_module" or not observer.args:
            continue
        source = observer.args[0]
        if getattr(source, "op", None) == "get_attr":
            found[node.name] = _attribute(prepared, source).detach().clone()
    return found


def _check_integers(converted: Any, chosen: dict[str, Any]) -> None:
    """Find that the int8 weights are those that ``round_weights`` chose.

    A weight on the grid lies on its integer times its scale but for rounding errors; one
    that is on no grid lies up to half a step away. Transposed convolutions are not rounded
    beforehand. Raises ``ConversionError``.
    """
    for layer, _, weight in _layers(converted):
        original = chosen.get(layer.name)
        if original is None or weight.args[3] != 0:
            continue
        integers = _attribute(converted, weight.args[0])
        shape = [1] * integers.dim()
        shape[0] = -1
        scales = _attribute(converted, weight.args[1]).reshape(shape)
        real = scales > 2 * WEIGHT_FLOOR  # else a channel of next to nothing
        steps = float(((original / scales - integers).abs() * real).max())
        if not steps < _ON_GRID:
            raise ConversionError(
                f"{layer.name}: ExecuTorch's int8 weights are up to {steps:.2f} steps away from "
                "the integers chosen for all formats: report this model, or leave "
                "executorch int8 out"
            )
