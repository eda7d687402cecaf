"""Move a channels-last graph to channels-first: permutes sink until they cancel.

A Keras model in its usual layout permutes before and after every convolution. L, the
permute from channels-first to channels-last, commutes with everything that works element by
element, and with reductions, pads, slices and concatenations once their axes are renamed.
Pushed downward through those, each L meets the permute F back of the next convolution, and
both vanish.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from converters.sources.graphs.flat import Flat, bound, opname

__all__ = ["to_channels_first"]

_LAST = [0, 2, 3, 1]
_FIRST = [0, 3, 1, 2]
_aten = torch.ops.aten

_UNARY = frozenset(
    {"abs", "celu", "clamp", "clamp_max", "clamp_min", "elu", "erf", "exp", "floor", "gelu",
     "hardsigmoid", "hardswish", "hardtanh", "leaky_relu", "log", "log_sigmoid", "mish", "neg",
     "reciprocal", "relu", "relu6", "round", "rsqrt", "selu", "sigmoid", "sign", "silu",
     "softplus", "sqrt", "square", "tanh", "_to_copy", "to"}
)  # fmt: skip
_BINARY = frozenset(
    {"add", "div", "divide", "maximum", "minimum", "mul", "multiply", "pow", "sub", "subtract",
     "true_divide"}
)  # fmt: skip
_REDUCTIONS = frozenset({"amax", "amin", "mean", "sum"})
_FLATTENING = frozenset({"_unsafe_view", "flatten", "reshape", "view"})


def to_channels_first(flat: Flat) -> None:
    """Sink every channels-last permute. Needs ``record_shapes``; record them again after."""
    for node in list(flat.graph.nodes):
        name = opname(node)
        if name == "permute":
            _meet(flat, node)
        elif name in _UNARY:
            _sink_unary(flat, node)
        elif name in _BINARY:
            _sink_binary(flat, node)
        elif name in _REDUCTIONS:
            _sink_reduction(flat, node)
        elif name == "cat":
            _sink_cat(flat, node)
        elif name in ("pad", "constant_pad_nd"):
            _sink_pad(flat, node)
        elif name in ("slice", "softmax", "_softmax"):
            _sink_axis(flat, node)
        elif name in _FLATTENING:
            _sink_reshape(flat, node)
    flat.clean()


def _permuted(node: Any, order: list[int]) -> bool:
    return opname(node) == "permute" and list(bound(node)["dims"]) == order


def _last(node: Any) -> bool:
    return _permuted(node, _LAST)


def _shape(node: fx.Node) -> tuple[int, ...]:
    return tuple(node.meta.get("shape", ()))


def _permute(flat: Flat, before: fx.Node, source: fx.Node, order: list[int]) -> fx.Node:
    node = flat.call(before, _aten.permute.default, source, order)
    node.meta["shape"] = tuple(_shape(source)[axis] for axis in order)
    node.meta["dtype"] = source.meta.get("dtype")
    return node


def _first_of(flat: Flat, before: fx.Node, source: fx.Node) -> fx.Node:
    """``source``, channels-last, in channels-first order."""
    if _last(source):
        return source.args[0]
    batch, height, width, channels = _shape(source)
    if height == width == 1:
        del batch
        node = flat.call(before, _aten.reshape.default, source, [-1, channels, 1, 1])
        node.meta["shape"] = (_shape(source)[0], channels, 1, 1)
        node.meta["dtype"] = source.meta.get("dtype")
        return node
    return _permute(flat, before, source, _FIRST)


def _emit(flat: Flat, node: fx.Node, *args: Any, **kwargs: Any) -> None:
    """``node`` on channels-first arguments, with L behind it."""
    new = flat.call(node, node.target, *args, **kwargs)
    shape = _shape(node)
    new.meta["shape"] = tuple(shape[axis] for axis in _FIRST)
    new.meta["dtype"] = node.meta.get("dtype")
    flat.replace(node, _permute(flat, node, new, _LAST))


def _meet(flat: Flat, node: fx.Node) -> None:
    source, order = node.args[0], list(bound(node)["dims"])
    if opname(source) == "permute":
        inner = list(bound(source)["dims"])
        order = [inner[axis] for axis in order]
        source = source.args[0]
        if order == list(range(len(order))):
            flat.replace(node, source)
        else:
            flat.replace(node, _permute(flat, node, source, order))
    elif order == _FIRST and _shape(source)[1:3] == (1, 1):
        flat.replace(node, _first_of(flat, node, source))


def _sink_unary(flat: Flat, node: fx.Node) -> None:
    if _last(node.args[0]):
        _emit(flat, node, node.args[0].args[0], *node.args[1:], **node.kwargs)


def _sink_binary(flat: Flat, node: fx.Node) -> None:
    pair = list(node.args[:2])
    if len(_shape(node)) != 4 or not any(_last(side) for side in pair):
        return
    for side in pair:
        if not isinstance(side, fx.Node) or flat.constant(side) is not None:
            continue
        if len(_shape(side)) not in (0, 4):
            return
    sides = []
    for side in pair:
        value = flat.constant(side)
        if not isinstance(side, fx.Node) or not _shape(side):
            sides.append(side)
        elif value is not None:
            wide = value.reshape((1,) * (4 - value.dim()) + tuple(value.shape))
            sides.append(flat.add_constant(wide.permute(_FIRST), flat.origin(side), node))
        else:
            sides.append(_first_of(flat, node, side))
    _emit(flat, node, *sides, *node.args[2:], **node.kwargs)


def _sink_reduction(flat: Flat, node: fx.Node) -> None:
    source = node.args[0]
    arguments = bound(node)
    axes = arguments.get("dim")
    if not _last(source) or axes is None:
        return
    axes = sorted(axis % 4 for axis in ([axes] if isinstance(axes, int) else axes))
    renamed = [_LAST[axis] for axis in axes]
    if arguments["keepdim"]:
        _emit(flat, node, source.args[0], renamed, True)
    elif axes == [1, 2]:  # batch and channels stay, in this order in both layouts
        new = flat.call(node, node.target, source.args[0], renamed, False)
        new.meta = dict(node.meta)
        flat.replace(node, new)


def _sink_cat(flat: Flat, node: fx.Node) -> None:
    sources = list(node.args[0])
    if not any(_last(source) for source in sources) or len(_shape(node)) != 4:
        return
    axis = _LAST[bound(node)["dim"] % 4]
    _emit(flat, node, [_first_of(flat, node, source) for source in sources], axis)


def _sink_pad(flat: Flat, node: fx.Node) -> None:
    source = node.args[0]
    pads = list(bound(node)["pad"])
    pads += [0] * (8 - len(pads))
    if not _last(source) or any(pads[:2]) or any(pads[6:]):
        return
    _emit(flat, node, source.args[0], pads[2:6], *node.args[2:], **node.kwargs)


def _sink_axis(flat: Flat, node: fx.Node) -> None:
    source = node.args[0]
    if not _last(source):
        return
    arguments = bound(node)
    arguments["dim"] = _LAST[arguments["dim"] % 4]
    _emit(flat, node, source.args[0], *list(arguments.values())[1:])


def _sink_reshape(flat: Flat, node: fx.Node) -> None:
    source = node.args[0]
    if not _last(source):
        return
    height, width = _shape(source)[1:3]
    if height == width == 1:  # nothing moves in memory
        new = flat.call(node, node.target, source.args[0], *node.args[1:], **node.kwargs)
        new.meta = dict(node.meta)
        flat.replace(node, new)
    elif len(_shape(node)) == 2 and _shape(node)[0] == _shape(source)[0]:
        _reorder_linear(flat, node, source)


def _reorder_linear(flat: Flat, node: fx.Node, source: fx.Node) -> None:
    """Flatten, then linear: permute the weights instead of the activations."""
    _, height, width, channels = _shape(source)
    uses = []
    for user in node.users:
        name = opname(user)
        weight = user.args[1] if len(user.args) > 1 else None
        value = flat.constant(weight)
        if name not in ("linear", "matmul", "mm") or value is None or user.args[0] is not node:
            return
        if value.dim() != 2:
            return
        uses.append((user, weight, value, name == "linear"))
    for user, weight, value, rows_out in uses:
        matrix = value if rows_out else value.t()
        moved = matrix.reshape(-1, height, width, channels).permute(0, 3, 1, 2)
        matrix = moved.reshape(matrix.shape)
        new = flat.add_constant(matrix if rows_out else matrix.t(), flat.origin(weight), user)
        user.update_arg(1, new)
    new = flat.call(node, node.target, source.args[0], *node.args[1:], **node.kwargs)
    new.meta = dict(node.meta)
    flat.replace(node, new)
