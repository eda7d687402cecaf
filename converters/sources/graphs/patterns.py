"""Recognize arithmetic that is one layer: a bias, a batch norm, a hard sigmoid."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from converters.sources.graphs.flat import Flat, bound, opname

__all__ = ["find_patterns"]

_aten = torch.ops.aten
_EPSILON = 1e-3


def find_patterns(flat: Flat) -> None:
    """Biases and scales of layers, batch norms, hard sigmoids. Needs ``record_shapes``."""
    for node in list(flat.graph.nodes):
        if opname(node) == "slice":
            _crop(flat, node)
    for node in list(flat.graph.nodes):
        if opname(node) in ("add", "mul", "multiply", "sub", "subtract"):
            _absorb(flat, node)
    for node in list(flat.graph.nodes):
        if opname(node) in ("sub", "subtract"):
            _batch_norm(flat, node)
    for node in list(flat.graph.nodes):
        if opname(node) in ("mul", "multiply"):
            _affine(flat, node)
    for node in list(flat.graph.nodes):
        _hard_sigmoid(flat, node)
    flat.clean()


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _sides(flat: Flat, node: fx.Node) -> tuple[Any, torch.Tensor | None, Any]:
    """The computed side, the constant one's value and its node, in either order."""
    first, second = node.args[:2]
    value = flat.constant(second)
    if value is not None:
        return first, value, second
    return second, flat.constant(first), first


def _per_channel(value: torch.Tensor, shape: tuple[int, ...]) -> bool:
    """Whether ``value`` broadcasts over ``shape`` ([B, C] or [B, C, H, W]) channel by channel."""
    wide = (1,) * (len(shape) - value.dim()) + tuple(value.shape)
    return (
        value.dim() <= len(shape) and len(shape) in (2, 4) and wide[1] == shape[1] == value.numel()
    )


def _absorb(flat: Flat, node: fx.Node) -> None:
    """Put an addition or a product, channel by channel, into the layer before it.

    Through crops of height and width too; there a difference as well, since a batch norm
    behind a crop could not be folded later.
    """
    name = opname(node)
    last, value, _ = _sides(flat, node)
    if value is None or not isinstance(last, fx.Node) or bound(node).get("alpha", 1) != 1:
        return
    shape = node.meta.get("shape", ())
    if not _per_channel(value, shape) or last.meta.get("shape") != shape:
        return
    layer = last
    while opname(layer) == "slice" and bound(layer)["dim"] in (2, 3) and len(layer.users) == 1:
        layer = layer.args[0]
    if len(layer.users) != 1 or (layer is last and name in ("sub", "subtract")):
        return
    parts = _layer_parts(flat, layer)
    if parts is None or (name in ("sub", "subtract") and last is not node.args[0]):
        return
    target, arguments, weight, bias, axis = parts
    value = -value.reshape(-1) if name in ("sub", "subtract") else value.reshape(-1)
    if name in ("mul", "multiply"):
        wide = [1] * weight.dim()
        wide[axis] = -1
        weight = weight * value.reshape(wide)
        bias = bias * value if bias is not None else None
    else:
        bias = value if bias is None else bias + value
    origin = flat.origin(layer.args[1])
    arguments["weight"] = flat.add_constant(weight, origin, layer)
    if bias is not None:
        arguments["bias"] = flat.add_constant(bias, origin, layer)
    new = flat.call(layer, target, *arguments.values())
    new.meta = dict(layer.meta)
    flat.replace(layer, new)
    flat.replace(node, new if layer is last else last)


def _crop(flat: Flat, node: fx.Node) -> None:
    """A crop behind a transposed convolution becomes its padding, as far as it is even."""
    layer, cut = node.args[0], bound(node)
    if opname(layer) != "conv_transpose2d" or len(layer.users) != 1 or cut["step"] != 1:
        return
    axis, size = cut["dim"], layer.meta.get("shape", (0, 0, 0, 0))[cut["dim"]]
    start, end, _ = slice(cut["start"], cut["end"]).indices(size)
    both = min(start, size - end)
    arguments = bound(layer)
    padding = [int(pad) for pad in arguments["padding"]]
    if axis not in (2, 3) or both <= 0 or len(padding) != 2:
        return
    padding[axis - 2] += both
    arguments["padding"] = padding
    new = flat.call(layer, layer.target, *arguments.values())
    shape = list(layer.meta["shape"])
    shape[axis] -= 2 * both
    new.meta = {**layer.meta, "shape": tuple(shape)}
    flat.replace(layer, new)
    if (start - both, end - both) == (0, shape[axis]):
        flat.replace(node, new)
    else:
        rest = flat.call(node, _aten.slice.Tensor, new, axis, start - both, end - both)
        rest.meta = dict(node.meta)
        flat.replace(node, rest)


_Parts = tuple[Any, dict[str, Any], torch.Tensor, torch.Tensor | None, int]


def _layer_parts(flat: Flat, layer: fx.Node) -> _Parts | None:
    """Target, arguments, weight, bias and the weight's output axis; None: no such layer."""
    name, arguments = opname(layer), {}
    if name in ("conv2d", "convolution", "conv_transpose2d", "linear"):
        arguments = dict(bound(layer))
        weight, bias = flat.constant(arguments["weight"]), flat.constant(arguments["bias"])
        if weight is None or (bias is None) != (arguments["bias"] is None):
            return None
        transposed = name == "conv_transpose2d" or bool(arguments.get("transposed"))
        if transposed and arguments["groups"] != 1:
            return None
        return layer.target, arguments, weight, bias, 1 if transposed else 0
    if name in ("matmul", "mm"):
        weight = flat.constant(layer.args[1])
        if weight is None or weight.dim() != 2:
            return None
        arguments = {"input": layer.args[0], "weight": None, "bias": None}
        return _aten.linear.default, arguments, weight.t(), None, 0
    return None


def _batch_norm(flat: Flat, node: fx.Node) -> None:
    """(x - mean) * multiplier + offset, as Keras writes it.

    The variance is in the multiplier already; the layer gets one that undoes its epsilon.
    """
    source, mean = node.args[0], flat.constant(node.args[1])
    shape = node.meta.get("shape", ())
    product = _only_user(node)
    if mean is None or product is None or opname(product) not in ("mul", "multiply"):
        return
    total = _only_user(product)
    if total is None or opname(total) != "add" or bound(node).get("alpha", 1) != 1:
        return
    _, multiplier, named = _sides(flat, product)
    _, offset, _ = _sides(flat, total)
    if multiplier is None or offset is None or bound(total).get("alpha", 1) != 1:
        return
    if not all(_per_channel(value, shape) for value in (mean, multiplier, offset)):
        return
    _as_batch_norm(flat, total, source, (multiplier, offset, mean), flat.origin(named))


def _affine(flat: Flat, node: fx.Node) -> None:
    """Multiplier and offset alone: the batch norm of a net that norms before it convolves."""
    source, multiplier, named = _sides(flat, node)
    total = _only_user(node)
    shape = node.meta.get("shape", ())
    if multiplier is None or total is None or opname(total) != "add" or len(shape) != 4:
        return
    _, offset, _ = _sides(flat, total)
    if offset is None or bound(total).get("alpha", 1) != 1:
        return
    if not all(_per_channel(value, shape) for value in (multiplier, offset)):
        return
    if source.meta.get("shape") == shape and opname(source):  # not the input's own scaling
        zero = torch.zeros_like(offset)
        _as_batch_norm(flat, total, source, (multiplier, offset, zero), flat.origin(named))


def _as_batch_norm(
    flat: Flat, last: fx.Node, source: Any, values: tuple[torch.Tensor, ...], origin: str
) -> None:
    """Replace ``last``: (source - mean) * multiplier + offset, in the order of ``values``."""
    variance = torch.full_like(values[0].reshape(-1), 1.0 - _EPSILON)
    constants = [
        flat.add_constant(value.reshape(-1), origin, last) for value in (*values, variance)
    ]
    new = flat.call(last, _aten.batch_norm.default, source, *constants, False, 0.1, _EPSILON, False)
    new.meta = dict(last.meta)
    flat.replace(last, new)


def _scalar(flat: Flat, value: Any) -> float | None:
    """A number, or a constant tensor that holds one."""
    if isinstance(value, int | float):
        return float(value)
    tensor = flat.constant(value)
    return float(tensor) if tensor is not None and tensor.numel() == 1 else None


def _relu6_input(node: Any) -> Any:
    name = opname(node)
    if name == "relu6":
        return node.args[0]
    if name in ("hardtanh", "clamp"):
        low, high = list(bound(node).values())[1:3]
        if (low, high) == (0, 6):
            return node.args[0]
    return None


def _hard_sigmoid(flat: Flat, node: fx.Node) -> None:
    """relu6(x + 3) / 6, and x times that."""
    name = opname(node)
    if name not in ("mul", "multiply", "div"):
        return
    clamped, factor = node.args[0], _scalar(flat, node.args[1])
    if factor is None and name != "div":
        clamped, factor = node.args[1], _scalar(flat, node.args[0])
    if factor is None or not math.isclose(factor, 6.0 if name == "div" else 1 / 6, rel_tol=1e-6):
        return
    shifted = _relu6_input(clamped)
    if opname(shifted) != "add" or bound(shifted).get("alpha", 1) != 1:
        return
    shift = _scalar(flat, shifted.args[1])
    source = shifted.args[0] if shift is not None else shifted.args[1]
    if shift is None:
        shift = _scalar(flat, shifted.args[0])
    if shift != 3.0:
        return
    new = flat.call(node, _aten.hardsigmoid.default, source)
    new.meta = dict(node.meta)
    flat.replace(node, new)
    for user in list(new.users):
        if opname(user) in ("mul", "multiply") and set(user.args[:2]) == {source, new}:
            swish = flat.call(user, _aten.hardswish.default, source)
            swish.meta = dict(user.meta)
            flat.replace(user, swish)
