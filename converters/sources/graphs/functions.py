"""ATen calls as the plain torch functions that tracers and quantizers know."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from converters.sources.graphs.flat import Flat, opname

__all__ = ["FUNCTIONS"]

_Arguments = dict[str, Any]
_Rule = Callable[[Flat, fx.Node, _Arguments], None]


def _swap(flat: Flat, node: fx.Node, function: Any, *args: Any, **kwargs: Any) -> None:
    new = flat.call(node, function, *args, **kwargs)
    new.meta = dict(node.meta)
    flat.replace(node, new)


def _operator(function: Any) -> _Rule:
    def rule(flat: Flat, node: fx.Node, arguments: _Arguments) -> None:
        if arguments.get("alpha", 1) == 1 and "rounding_mode" not in arguments:
            _swap(flat, node, function, *node.args[:2])

    return rule


def _cat(flat: Flat, node: fx.Node, arguments: _Arguments) -> None:
    _swap(flat, node, torch.cat, arguments["tensors"], dim=arguments["dim"])


def _flatten(flat: Flat, node: fx.Node, arguments: _Arguments) -> None:
    if "end_dim" in arguments:
        _swap(flat, node, torch.flatten, node.args[0], arguments["start_dim"], arguments["end_dim"])


def _reshape(flat: Flat, node: fx.Node, _: _Arguments) -> None:
    """``[batch, ...]`` with all but the batch fixed becomes ``[-1, ...]``."""
    sizes = list(node.args[1])
    if any(isinstance(size, fx.Node) for size in sizes[1:]) or -1 in sizes[1:]:
        if not isinstance(sizes[0], fx.Node) or sizes.count(-1) != 1 or len(sizes) != 2:
            return
        shape = node.meta.get("shape", ())
        if len(shape) != 2:
            return
        sizes = [sizes[0], int(shape[1])]
    if isinstance(sizes[0], fx.Node):
        sizes[0] = -1
    if len(sizes) == 2 and sizes[0] == -1 and len(node.args[0].meta.get("shape", ())) > 2:
        source = node.args[0].meta["shape"]
        if source[0] == node.meta["shape"][0]:
            _swap(flat, node, torch.flatten, node.args[0], 1)
            return
    _swap(flat, node, torch.reshape, node.args[0], tuple(sizes))


def _permute(flat: Flat, node: fx.Node, arguments: _Arguments) -> None:
    _swap(flat, node, torch.permute, node.args[0], tuple(arguments["dims"]))


def _softmax(flat: Flat, node: fx.Node, arguments: _Arguments) -> None:
    _swap(flat, node, torch.softmax, node.args[0], dim=arguments["dim"])


def _mean(flat: Flat, node: fx.Node, arguments: _Arguments) -> None:
    """Over height and width: the pooling layer that every backend has."""
    axes = arguments.get("dim")
    rank = len(node.args[0].meta.get("shape", ()))
    if axes is None or rank != 4:
        return
    axes = [axes] if isinstance(axes, int) else list(axes)
    if sorted(axis % 4 for axis in axes) != [2, 3]:
        _swap(flat, node, torch.mean, node.args[0], tuple(axes), keepdim=arguments["keepdim"])
        return
    pooled = flat.call(node, F.adaptive_avg_pool2d, node.args[0], (1, 1))
    if arguments["keepdim"]:
        pooled.meta = dict(node.meta)
        flat.replace(node, pooled)
    else:
        _swap(flat, node, torch.flatten, pooled, 1)


def _pad(flat: Flat, node: fx.Node, arguments: _Arguments) -> None:
    mode = arguments.get("mode", "constant")
    value = arguments.get("value") or 0.0
    pads = [int(pad) for pad in arguments["pad"]]
    while len(pads) > 4 and not any(pads[-2:]):
        pads = pads[:-2]
    _swap(flat, node, F.pad, node.args[0], tuple(pads), mode, value)


def _upsample(flat: Flat, node: fx.Node, arguments: _Arguments) -> None:
    """By the size where it is known: every backend takes fixed sizes."""
    mode = {"upsample_nearest2d": "nearest", "upsample_bilinear2d": "bilinear"}[opname(node)]
    shape = node.meta.get("shape", ())
    if len(shape) != 4:
        return
    options: dict[str, Any] = {"size": (int(shape[2]), int(shape[3])), "mode": mode}
    if mode == "bilinear":
        options["align_corners"] = bool(arguments["align_corners"])
    _swap(flat, node, F.interpolate, node.args[0], **options)


FUNCTIONS: dict[str, _Rule] = {
    "add": _operator(operator.add),
    "sub": _operator(operator.sub),
    "subtract": _operator(operator.sub),
    "mul": _operator(operator.mul),
    "multiply": _operator(operator.mul),
    "div": _operator(operator.truediv),
    "true_divide": _operator(operator.truediv),
    "cat": _cat,
    "flatten": _flatten,
    "view": _reshape,
    "_unsafe_view": _reshape,
    "reshape": _reshape,
    "permute": _permute,
    "softmax": _softmax,
    "mean": _mean,
    "pad": _pad,
    "constant_pad_nd": _pad,
    "upsample_nearest2d": _upsample,
    "upsample_bilinear2d": _upsample,
}
"""What to do with a call; a rule that does not apply leaves it as it is."""
