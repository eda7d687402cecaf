"""Int8 for PyTorch Mobile: FX graph mode for the QNNPACK engine, corrected where it fails.

Only the net itself is quantized: normalization, NMS and argmax around it stay in float.
What QNNPACK computes wrongly, each measured against the float arithmetic of the same
quantized module:

* clamps of quantized channels-last tensors (-1.4 dB): see ``converters.rewrites.relu6``;
* PReLU (2.8 dB instead of 35.5): stays in float;
* arithmetic with a number or a constant tensor: FX takes the range of the other operand
  for the result, which clips (``150 * tanh(x) + 127.5``: 1 dB), so it stays in float.
"""

from __future__ import annotations

import copy
import dataclasses
import warnings
from typing import Any

from converters.formats.float_region import arithmetic_region
from converters.formats.inner import (
    inner_module,
    is_post_processed,
    kept_modules,
    replace_inner,
)
from converters.formats.observers import clipping
from converters.ranges import RangeMethod
from converters.ready import ReadyModule
from converters.worker import report_progress
from edge_runtime.contract.errors import PrecisionRefused, SourceError, UnsupportedOperator

__all__ = ["Quantized", "quantize_dynamic", "quantize_static"]

_BATCH = 8
_MIN_DYNAMIC_SHARE = 0.2
_LEVELS = 255
_ROOTS = frozenset({"rsqrt", "sqrt", "std", "var", "std_mean", "var_mean"})
_DIVISIONS = frozenset({"div", "divide", "true_divide", "truediv"})
_BINARY = frozenset({"add", "mul", "sub", *_DIVISIONS})
_ARITHMETIC = frozenset(
    {"adaptive_avg_pool2d", "add", "broadcast_to", "expand", "mean", "mul", "neg", "pow",
     "reciprocal", "reshape", "square", "squeeze", "sub", "sum", "unsqueeze", "view",
     *_ROOTS, *_DIVISIONS}
)  # fmt: skip


@dataclasses.dataclass(kw_only=True)
class Quantized:
    """A module with int8 inside, float32 (or uint8 pixels) outside."""

    module: Any
    reference: Any | None
    """The same arithmetic in float, operator by operator: what the engine must match."""
    rewrites: list[str]
    kept: tuple[str, ...]
    """Of the modules asked for, those that have weights and stayed float."""


def quantize_static(ready: ReadyModule, keep: tuple[str, ...]) -> Quantized:
    """Static int8: per-channel symmetric weights, per-tensor min/max activations.

    Raises ``UnsupportedOperator`` for a model that torch.fx cannot trace, ``ConfigError``
    for a name in ``keep`` that the model does not have.
    """
    import torch
    from torch.ao.quantization.quantize_fx import convert_fx, convert_to_reference_fx

    from converters.rewrites.relu6 import cap_relus, uncap

    warnings.simplefilter("ignore")
    torch.backends.quantized.engine = "qnnpack"
    inner = inner_module(ready.module)
    kept = kept_modules(inner, keep)
    example = _inner_example(ready)
    traced, prefix = _traced(inner, example)
    capped = cap_relus(traced, example)
    statistics = _hide_statistics(traced)  # first: it walks what the other hides
    hidden = _hide_wrong(traced)
    final = _hide_final_activations(traced, ready)
    floats = tuple(prefix + name for name in keep)
    _hide_sums(traced, floats)
    while True:  # ends: each round has fewer capped ReLUs
        prepared = _prepare(copy.deepcopy(traced), example, floats, ready.ranges)
        _calibrate(replace_inner(ready.module, prepared), ready)
        loose = _uncapped(prepared)
        if not loose:
            break
        for path in loose:
            uncap(traced, path)
        capped, hidden = capped - len(loose), hidden + len(loose)
    names = {
        "cap_relu6": capped,
        "wrong_kernels_in_float": hidden,
        "statistics_in_float": statistics,
        "final_activation_in_float": final,
    }
    reference = convert_to_reference_fx(copy.deepcopy(prepared))
    return Quantized(
        module=replace_inner(ready.module, convert_fx(prepared)),
        reference=replace_inner(ready.module, reference),
        rewrites=[name for name, count in names.items() if count],
        kept=kept,
    )


def _inner_example(ready: ReadyModule) -> Any:
    """Calibration inputs, two where there are, as the net gets them: normalized."""
    import torch

    seen: list[Any] = []
    inner = inner_module(ready.module)
    hook = inner.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0]))
    try:
        with torch.no_grad():
            ready.module(torch.from_numpy(ready.calibration(0, 2)))
    finally:
        hook.remove()
    return seen[0]


def _traced(module: Any, example: Any) -> tuple[Any, str]:
    """The module as a torch.fx graph without ``Identity``, and the prefix of its names.

    Folded batch norms leave ``Identity`` behind. One between a convolution and its ReLU
    would keep them from fusing, and the cap from reaching the convolution's output. Raises
    ``UnsupportedOperator``.
    """
    from torch import fx, nn

    module, prefix = _parented(module)
    try:
        traced = fx.symbolic_trace(module)
    except Exception as error:  # torch.fx raises many types on dynamic control flow
        traced = _exported(module, example, error)
    modules = dict(traced.named_modules())
    for node in list(traced.graph.nodes):
        if node.op == "call_module" and isinstance(modules[node.target], nn.Identity | nn.Dropout):
            node.replace_all_uses_with(node.args[0])
            traced.graph.erase_node(node)
    traced.recompile()
    return traced.eval(), prefix


def _exported(module: Any, example: Any, error: Exception) -> Any:
    """By torch.export, which follows control flow over shapes, and back to layers."""
    from converters.sources.graphs.build import as_layers

    try:
        return as_layers(module, example)
    except SourceError as other:
        reason = (str(error).splitlines() or [""])[0][:200]
        raise UnsupportedOperator(
            "torchscript int8 needs a model that torch.fx or torch.export can trace: "
            f"{type(error).__name__}: {reason}; {other.detail}. "
            "Remove data-dependent control flow, or leave torchscript int8 out"
        ) from error


def _parented(module: Any) -> tuple[Any, str]:
    """A bare layer inside a container, for layers are replaced in their parent only."""
    from torch import nn

    if type(module).__module__.startswith("torch.nn.") and not isinstance(module, nn.Sequential):
        return nn.Sequential(module).eval(), "0."
    return module, ""


def quantize_dynamic(ready: ReadyModule, keep: tuple[str, ...]) -> Quantized:
    """Int8 weights in ``Linear`` layers; their inputs are quantized while running.

    PyTorch Mobile has no other dynamic layer that image models use. Raises
    ``PrecisionRefused`` where ``Linear`` holds less than a fifth of the weights, and
    ``ConfigError`` for a name in ``keep`` that the model does not have.
    """
    import torch
    from torch import nn
    from torch.ao.quantization import per_channel_dynamic_qconfig

    warnings.simplefilter("ignore")
    torch.backends.quantized.engine = "qnnpack"
    inner = inner_module(ready.module)
    kept = kept_modules(inner, keep)
    parented, prefix = _parented(copy.deepcopy(inner))
    floats = tuple(prefix + name for name in keep)
    layers = {
        name: module.weight.numel()
        for name, module in parented.named_modules()
        if type(module) is nn.Linear
        and not any(name == one or name.startswith(f"{one}.") for one in floats)
    }
    total = sum(parameter.numel() for parameter in parented.parameters())
    share = sum(layers.values()) / total if total else 0.0
    if share < _MIN_DYNAMIC_SHARE:
        raise PrecisionRefused(
            f"torchscript int8-dyn would quantize {len(layers)} linear layers with "
            f"{share:.0%} of the weights: PyTorch Mobile has no dynamic convolutions. "
            "Take int8 with calibration images, or int8-dyn in tflite"
        )
    spec = dict.fromkeys(layers, per_channel_dynamic_qconfig)
    quantized = torch.ao.quantization.quantize_dynamic(parented, spec, dtype=torch.qint8)
    return Quantized(
        module=replace_inner(ready.module, quantized), reference=None, rewrites=[], kept=kept
    )


def _prepare(traced: Any, example: Any, floats: tuple[str, ...], method: RangeMethod) -> Any:
    from torch import (
        nn,
        per_channel_symmetric,
        per_tensor_affine,
        per_tensor_symmetric,
        qint8,
        quint8,
    )
    from torch.ao.quantization import QConfig, QConfigMapping
    from torch.ao.quantization.fx.custom_config import PrepareCustomConfig
    from torch.ao.quantization.observer import MinMaxObserver, PerChannelMinMaxObserver
    from torch.ao.quantization.quantize_fx import prepare_fx

    from converters.rewrites.in_float import InFloat

    weights = {"dtype": qint8, "quant_min": -127, "quant_max": 127}
    observer = clipping(MinMaxObserver, method)
    activation = observer.with_args(dtype=quint8, qscheme=per_tensor_affine)
    per_channel = QConfig(
        activation=activation,
        weight=PerChannelMinMaxObserver.with_args(
            qscheme=per_channel_symmetric, ch_axis=0, **weights
        ),
    )
    per_tensor = QConfig(
        activation=activation,
        weight=MinMaxObserver.with_args(qscheme=per_tensor_symmetric, **weights),
    )
    mapping = QConfigMapping().set_global(per_channel)
    for kind in (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d):
        mapping.set_object_type(kind, per_tensor)  # QNNPACK has no per-channel transposed conv
    for name in floats:
        mapping.set_module_name(name, None)
    custom = PrepareCustomConfig().set_non_traceable_module_classes([InFloat])
    return prepare_fx(traced, mapping, (example,), prepare_custom_config=custom)


def _hide_wrong(traced: Any) -> int:
    """Keep what QNNPACK computes wrongly away from it; returns how many operators."""
    from torch import nn

    from converters.rewrites.in_float import hide
    from converters.rewrites.relu6 import is_clamp

    modules = dict(traced.named_modules(remove_duplicate=False))

    def wrong(node: Any) -> bool:
        if node.op == "call_module" and isinstance(modules[node.target], nn.PReLU):
            return True
        if node.op not in ("call_function", "call_method"):
            return is_clamp(node, modules)
        name = _operation(node.target)
        return is_clamp(node, modules) or name == "prelu" or (name in _BINARY and one_sided(node))

    def one_sided(node: Any) -> bool:
        """Whether an operand is a number or a constant tensor."""
        return any(getattr(operand, "op", "get_attr") == "get_attr" for operand in node.args[:2])

    nodes = [node for node in traced.graph.nodes if wrong(node)]
    for node in nodes:
        hide(traced, node)
    return len(nodes)


def _hide_statistics(traced: Any) -> int:
    """Keep normalization by computed statistics in float; returns how many operators.

    See ``converters.formats.float_region``.
    """
    from converters.rewrites.in_float import hide

    calls = {
        node: _operation(node.target)
        for node in traced.graph.nodes
        if node.op in ("call_function", "call_method")
    }
    seeds = [
        node
        for node, name in calls.items()
        if name in _ROOTS
        or (name in _DIVISIONS and getattr(node.args[1], "op", "get_attr") != "get_attr")
    ]
    region = arithmetic_region(
        seeds,
        {node: node.all_input_nodes for node in calls},
        {node: list(node.users) for node in calls},
        {node for node, name in calls.items() if name in _ARITHMETIC},
    )
    for node in [node for node in calls if node in region]:  # in the order of the graph
        hide(traced, node)
    return len(region)


def _hide_final_activations(traced: Any, ready: ReadyModule) -> int:
    """Keep the softmax or sigmoid that ends the net in float, images aside.

    In int8 their output has the scale 1/256, which makes every probability of a 1000-class
    net zero. In an image it is one of 256 shades. Returns how many.
    """
    from torch import nn

    from converters.rewrites.in_float import hide

    if is_post_processed(ready.module):
        return 0
    modules = dict(traced.named_modules(remove_duplicate=False))
    (answer,) = next(n for n in traced.graph.nodes if n.op == "output").args
    nodes = answer if isinstance(answer, tuple | list) else [answer]
    count = 0
    for node, spec in zip(nodes, ready.outputs, strict=False):
        module = modules.get(node.target) if node.op == "call_module" else None
        name = _operation(node.target) if module is None else ""
        ends = isinstance(module, nn.Softmax | nn.Sigmoid) or name in ("softmax", "sigmoid")
        if ends and spec.layout != "NCHW":
            hide(traced, node)
            count += 1
    return count


def _hide_sums(traced: Any, floats: tuple[str, ...]) -> None:
    """Keep the sum of a kept layer and its shortcut in float as well.

    Rounded to 8 bits, it would lose again what keeping the layer won.
    """
    from converters.rewrites.in_float import hide

    kept: set[Any] = set()
    for node in list(traced.graph.nodes):
        if node.op == "call_module":
            target = str(node.target)
            if any(target == name or target.startswith(f"{name}.") for name in floats):
                kept.add(node)
        elif (
            node.op in ("call_function", "call_method")
            and _operation(node.target) == "add"
            and kept.intersection(node.all_input_nodes)
        ):
            kept.add(hide(traced, node))


def _operation(target: Any) -> str:
    """``add`` for ``operator.add``, ``torch.add``, ``aten.add.Tensor`` and the method."""
    if isinstance(target, str):
        return target.rstrip("_")
    packet = getattr(target, "overloadpacket", target)
    return str(getattr(packet, "__name__", "")).rstrip("_")


def _calibrate(module: Any, ready: ReadyModule) -> None:
    import torch

    from converters.rewrites.relu6 import apply_caps

    count = ready.calibration_count
    with torch.no_grad(), apply_caps(module):
        for start in range(0, count, _BATCH):
            report_progress("calibrating", start, count)
            module(torch.from_numpy(ready.calibration(start, start + _BATCH)))


def _uncapped(prepared: Any) -> list[str]:
    """Paths of capped ReLUs whose output does not saturate at the cap.

    One that fuses with nothing, or that shares its range with another tensor, keeps that
    range; one without an observer stays in float.
    """
    from converters.rewrites.relu6 import cap_of

    modules = dict(prepared.named_modules(remove_duplicate=False))
    loose = []
    for node in prepared.graph.nodes:
        capped = cap_of(modules[node.target]) if node.op == "call_module" else None
        if capped is None:
            continue
        cap, path = capped
        observers = [
            modules[user.target]
            for user in node.users
            if user.op == "call_module" and hasattr(modules[user.target], "calculate_qparams")
        ]
        if not observers or not all(_saturates(observer, cap) for observer in observers):
            loose.append(path)
    return loose


def _saturates(observer: Any, cap: float) -> bool:
    scale, zero_point = observer.calculate_qparams()
    return int(zero_point) == 0 and float(scale) * _LEVELS <= cap * (1 + 1e-5)
