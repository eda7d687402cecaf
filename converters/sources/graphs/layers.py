"""Give a flat graph its layers back: ``nn`` modules and plain torch functions."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn

from converters.sources.graphs.flat import Flat, bound, opname
from converters.sources.graphs.functions import FUNCTIONS

__all__ = ["with_layers"]

_TRAILING = re.compile(
    r"[./](weight|bias|kernel|depthwise_kernel|pointwise_kernel|gamma|beta|moving_mean|"
    r"moving_variance|running_mean|running_var|alpha)(:0)?$"
)
_Arguments = dict[str, Any]


def with_layers(flat: Flat) -> fx.GraphModule:
    """``flat`` as a module of ``nn`` layers, named after their parameters where known."""
    return _Raiser(flat).run()


class _Raiser:
    def __init__(self, flat: Flat) -> None:
        self.flat = flat
        self.layers: dict[str, nn.Module] = {}
        self.makers: dict[str, Callable[[fx.Node, _Arguments], nn.Module | None]] = {
            "conv2d": self._conv,
            "convolution": self._conv,
            "conv_transpose2d": self._conv,
            "linear": self._linear,
            "addmm": self._addmm,
            "mm": self._matmul,
            "matmul": self._matmul,
            "batch_norm": self._batch_norm,
            "_native_batch_norm_legit_no_training": self._batch_norm,
            "instance_norm": self._instance_norm,
            "layer_norm": self._layer_norm,
            "group_norm": self._group_norm,
            "prelu": self._prelu,
        }

    def run(self) -> fx.GraphModule:
        flat = self.flat
        for node in list(flat.graph.nodes):
            name = opname(node)
            if not name:
                continue
            arguments = bound(node)
            maker = self.makers.get(name)
            layer = maker(node, arguments) if maker is not None else _plain(name, arguments)
            if layer is not None:
                source = node.args[1] if name == "addmm" else node.args[0]
                self._install(node, layer, source)
            elif name in FUNCTIONS:
                FUNCTIONS[name](flat, node, arguments)
        flat.clean()
        root: dict[str, Any] = {**flat.tensors, **self.layers}
        used = {str(node.target) for node in flat.graph.nodes if node.op == "call_module"}
        root = {name: value for name, value in root.items() if name in used | set(flat.tensors)}
        module = fx.GraphModule(root, flat.graph, class_name="Layers")
        module.graph.lint()
        return module.eval().requires_grad_(False)

    def _install(self, node: fx.Node, layer: nn.Module, source: fx.Node) -> None:
        name = self._name(node, layer)
        self.layers[name] = layer.eval()
        with self.flat.graph.inserting_before(node):
            new = self.flat.graph.create_node("call_module", name, (source,))
        new.meta = dict(node.meta)
        self.flat.replace(node, new)

    def _name(self, node: fx.Node, layer: nn.Module) -> str:
        """After the parameter's own name, else after the layer's kind; unique."""
        names = [
            self.flat.origin(value)
            for value in node.all_input_nodes
            if self.flat.constant(value) is not None
        ]
        base = ""
        for name in names:
            trimmed = _TRAILING.sub("", name.rpartition("_torch_params.")[2])
            if trimmed != name.rpartition("_torch_params.")[2]:
                base = re.sub(r"[^A-Za-z0-9_.]", "_", trimmed.replace("/", "."))
                break
        if not base or any(not part for part in base.split(".")):
            base = type(layer).__name__.lower()
        if hasattr(fx.GraphModule, base.partition(".")[0]):
            base = f"layer_{base}"
        name, number = base, 1
        while self._taken(name):
            number += 1
            name = f"{base}_{number}"
        return name

    def _taken(self, name: str) -> bool:
        """Used already, or a parent or child of a used name."""
        every = [*self.layers, *self.flat.tensors]
        return any(
            name == other or name.startswith(f"{other}.") or other.startswith(f"{name}.")
            for other in every
        )

    def _value(self, node: Any) -> torch.Tensor | None:
        return self.flat.constant(node)

    def _conv(self, node: fx.Node, arguments: _Arguments) -> nn.Module | None:
        weight, bias = self._value(arguments["weight"]), self._value(arguments["bias"])
        if weight is None or weight.dim() != 4 or (arguments["bias"] is not None and bias is None):
            return None
        transposed = opname(node) == "conv_transpose2d" or bool(arguments.get("transposed"))
        groups = int(arguments["groups"])
        options: dict[str, Any] = {
            "stride": _pair(arguments["stride"]),
            "padding": _padding(arguments["padding"]),
            "dilation": _pair(arguments["dilation"]),
            "groups": groups,
            "bias": bias is not None,
        }
        size = (int(weight.shape[2]), int(weight.shape[3]))
        layer: nn.Module
        if transposed:
            options["output_padding"] = _pair(arguments.get("output_padding", 0))
            layer = nn.ConvTranspose2d(
                int(weight.shape[0]), int(weight.shape[1]) * groups, size, **options
            )
        else:
            layer = nn.Conv2d(int(weight.shape[1]) * groups, int(weight.shape[0]), size, **options)
        return _filled(layer, weight=weight, bias=bias)

    def _linear(self, node: fx.Node, arguments: _Arguments) -> nn.Module | None:
        weight, bias = self._value(arguments["weight"]), self._value(arguments["bias"])
        if weight is None or weight.dim() != 2 or (arguments["bias"] is not None and bias is None):
            return None
        layer = nn.Linear(int(weight.shape[1]), int(weight.shape[0]), bias=bias is not None)
        return _filled(layer, weight=weight, bias=bias)

    def _addmm(self, node: fx.Node, arguments: _Arguments) -> nn.Module | None:
        weight, bias = self._value(arguments["mat2"]), self._value(arguments["self"])
        if weight is None or bias is None or (arguments["beta"], arguments["alpha"]) != (1, 1):
            return None
        layer = nn.Linear(int(weight.shape[0]), int(weight.shape[1]))
        return _filled(layer, weight=weight.t(), bias=bias.expand(weight.shape[1]))

    def _matmul(self, node: fx.Node, arguments: _Arguments) -> nn.Module | None:
        weight = self._value(list(arguments.values())[1])
        if weight is None or weight.dim() != 2:
            return None
        layer = nn.Linear(int(weight.shape[0]), int(weight.shape[1]), bias=False)
        return _filled(layer, weight=weight.t())

    def _batch_norm(self, node: fx.Node, arguments: _Arguments) -> nn.Module | None:
        mean, variance = (self._value(arguments[name]) for name in ("running_mean", "running_var"))
        if mean is None or variance is None or arguments.get("training"):
            return None
        weight, bias = self._value(arguments["weight"]), self._value(arguments["bias"])
        kind = nn.BatchNorm2d if len(node.meta["shape"]) == 4 else nn.BatchNorm1d
        layer = kind(int(mean.shape[0]), eps=float(arguments["eps"]))
        return _filled(
            layer,
            weight=weight if weight is not None else torch.ones_like(mean),
            bias=bias if bias is not None else torch.zeros_like(mean),
            running_mean=mean,
            running_var=variance,
        )

    def _instance_norm(self, node: fx.Node, arguments: _Arguments) -> nn.Module | None:
        weight, bias = self._value(arguments["weight"]), self._value(arguments["bias"])
        if len(node.meta["shape"]) != 4 or not arguments["use_input_stats"]:
            return None
        if arguments["weight"] is not None and (weight is None or bias is None):
            return None
        channels = int(node.meta["shape"][1])
        layer = nn.InstanceNorm2d(channels, eps=float(arguments["eps"]), affine=weight is not None)
        return _filled(layer, weight=weight, bias=bias)

    def _layer_norm(self, node: fx.Node, arguments: _Arguments) -> nn.Module | None:
        weight, bias = self._value(arguments["weight"]), self._value(arguments["bias"])
        if weight is None or bias is None:
            return None
        layer = nn.LayerNorm(tuple(arguments["normalized_shape"]), eps=float(arguments["eps"]))
        return _filled(layer, weight=weight, bias=bias)

    def _group_norm(self, node: fx.Node, arguments: _Arguments) -> nn.Module | None:
        weight, bias = self._value(arguments["weight"]), self._value(arguments["bias"])
        if weight is None or bias is None:
            return None
        channels = int(node.meta["shape"][1])
        layer = nn.GroupNorm(int(arguments["num_groups"]), channels, eps=float(arguments["eps"]))
        return _filled(layer, weight=weight, bias=bias)

    def _prelu(self, node: fx.Node, arguments: _Arguments) -> nn.Module | None:
        weight = self._value(arguments["weight"])
        if weight is None:
            return None
        return _filled(nn.PReLU(weight.numel()), weight=weight.reshape(-1))


def _filled(layer: nn.Module, **values: torch.Tensor | None) -> nn.Module:
    for name, value in values.items():
        if value is not None:
            getattr(layer, name).data = value.detach().clone().contiguous().float()
    return layer


def _pair(value: Any) -> tuple[int, int]:
    numbers = [int(number) for number in (value if isinstance(value, list | tuple) else [value])]
    return (numbers[0], numbers[-1])


def _padding(value: Any) -> Any:
    return value if isinstance(value, str) else _pair(value)


def _plain(name: str, arguments: _Arguments) -> nn.Module | None:
    """Layers without parameters."""
    values = list(arguments.values())[1:]
    simple: dict[str, Callable[[], nn.Module]] = {
        "relu": nn.ReLU,
        "relu6": nn.ReLU6,
        "hardswish": nn.Hardswish,
        "hardsigmoid": nn.Hardsigmoid,
        "sigmoid": nn.Sigmoid,
        "tanh": nn.Tanh,
        "silu": nn.SiLU,
        "mish": nn.Mish,
    }
    if name in simple:
        return simple[name]()
    if name in ("hardtanh", "clamp"):
        low, high = values[0], values[1]
        if not all(isinstance(value, int | float) for value in (low, high)):
            return nn.ReLU() if (low, high) == (0, None) else None
        return nn.ReLU6() if (low, high) == (0, 6) else nn.Hardtanh(float(low), float(high))
    if name == "leaky_relu":
        return nn.LeakyReLU(float(arguments["negative_slope"]))
    if name == "elu" and (arguments["scale"], arguments["input_scale"]) == (1, 1):
        return nn.ELU(float(arguments["alpha"]))
    if name == "gelu":
        return nn.GELU(approximate=str(arguments["approximate"]))
    if name == "max_pool2d":
        kernel, stride, padding, dilation = values[0], values[1] or values[0], values[2], values[3]
        return nn.MaxPool2d(
            _pair(kernel), _pair(stride), _pair(padding), _pair(dilation),
            ceil_mode=bool(arguments["ceil_mode"]),
        )  # fmt: skip
    if name == "avg_pool2d":
        return nn.AvgPool2d(
            _pair(values[0]), _pair(values[1] or values[0]), _pair(arguments["padding"]),
            ceil_mode=bool(arguments["ceil_mode"]),
            count_include_pad=bool(arguments["count_include_pad"]),
            divisor_override=arguments["divisor_override"],
        )  # fmt: skip
    if name == "adaptive_avg_pool2d":
        return nn.AdaptiveAvgPool2d(_pair(arguments["output_size"]))
    if name == "pixel_shuffle":
        return nn.PixelShuffle(int(arguments["upscale_factor"]))
    if name == "pixel_unshuffle":
        return nn.PixelUnshuffle(int(arguments["downscale_factor"]))
    return None
